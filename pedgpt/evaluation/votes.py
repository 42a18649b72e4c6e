"""The files that doctors' pages export, checked and merged: majorities, comparisons, agreement, and what to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from pedgpt.evaluation.agreement import MEASURES, Array, agreement, bootstrap, bradley_terry, by_task, compare
from pedgpt.evaluation.doctors import DIMENSIONS, FORMAT, LETTERS, TIE, digest
from pedgpt.files import read_object, unique_keys

EQUAL = -1.0  # a tie among the numbers of systems; NaN is no choice


def read_key(path: str | Path) -> dict[str, Any]:
    """The key that was written beside the pages; ValueError for another file."""
    path = Path(path)
    key = read_object(path.parent, path.name)
    if not {"set", "systems", "questions", "pages"} <= key.keys():
        raise ValueError(f"{path}: not the key of doctors' pages; give the key.json that was written beside them")
    return key


def read_ratings(path: str | Path, key: Mapping[str, Any], partial: bool = False) -> tuple[str, dict[str, Any]]:
    """The rater of an exported file and the ratings by question, with systems in place of letters.

    Raises ValueError for a file that was changed, is of another set, or lacks choices where `partial` is not set.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
        told, whole, page = found.pop("checksum"), found["set"], key["pages"].get(found["page"])
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}")
        if told != digest(found):
            raise ValueError("its checksum is wrong, so it was changed after its export")
        if whole != key["set"] or page is None:
            raise ValueError(f"it is of the set {whole}, but the key of {key['set']}; give the key of its pages")
        ratings = {}
        for question, rating in found["ratings"].items():
            order = page["orders"][question]
            behind: dict[Any, Any] = {TIE: TIE, None: None, **dict(zip(LETTERS, order, strict=False))}
            ratings[question] = {name: behind[rating.get(name)] for name in DIMENSIONS}
            ratings[question] |= {"unsafe": [behind[letter] for letter in rating["unsafe"]], "left": order[0]}
            ratings[question] |= {"comment": str(rating["comment"]), "seconds": int(rating["seconds"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing or unknown in it" if isinstance(error, LookupError) else error
        raise ValueError(f"{path}: not a file that a page exported ({reason}); ask for a new export") from None
    missing = sum(None in ratings.get(question, {"all": None}).values() for question in page["orders"])
    if missing and not partial:
        asked = len(page["orders"])
        raise ValueError(f"{path}: {missing} of {asked} questions lack a choice; wait for the rest, or set partial")
    return page["rater"], ratings


def majority(votes: Array) -> Array:
    """The choice of most raters [..., R] → [...]: a tie where two choices lead, NaN where nobody chose."""
    kinds = np.unique([EQUAL, *votes[~np.isnan(votes)]])  # a tie comes first
    counts = (votes[..., None] == kinds).sum(-2)
    leading = counts == counts.max(-1, keepdims=True)
    chosen = kinds[np.where(leading.sum(-1) > 1, 0, leading.argmax(-1))]
    return np.where(counts.any(-1), chosen, np.nan)


def describe(mine: Array, others: Array, ratings: Mapping[str, Any]) -> dict[str, Any]:
    """How one rater chose [N], beside the `others` [N, R - 1]: what tells haste, a habit, or another opinion."""
    both = ~np.isnan(mine[:, None]) & ~np.isnan(others)
    pairs = [(rating[name], rating["left"]) for rating in ratings.values() for name in DIMENSIONS]
    untied = [chosen == left for chosen, left in pairs if chosen not in (TIE, None)]
    return {
        "questions": len(ratings),
        "ties": float((mine == EQUAL).sum() / max(1, (~np.isnan(mine)).sum())),
        "left": sum(untied) / max(1, len(untied)),
        "agreement": float((mine[:, None] == others)[both].mean()) if both.any() else None,
        "seconds": float(np.median([rating["seconds"] for rating in ratings.values()])) if ratings else None,
        "unsafe": sum(len(rating["unsafe"]) for rating in ratings.values()),
    }


def remarkable(found: Mapping[str, Mapping[str, Any]], key: Mapping[str, Any], decided: Array) -> dict[str, Any]:
    """The votes on each question, those where raters disagree, and the answers that somebody calls unsafe."""
    lists: dict[str, Any] = {"votes": [], "disagreements": [], "unsafe": []}
    names = dict(enumerate(key["systems"])) | {EQUAL: TIE}
    for (question, told), most in zip(key["questions"].items(), decided, strict=True):
        given = {rater: ratings[question] for rater, ratings in found.items() if question in ratings}
        told = {**told, "comments": {rater: rating["comment"] for rater, rating in given.items() if rating["comment"]}}
        for name, code in zip(DIMENSIONS, most.tolist(), strict=True):
            votes = {rater: rating[name] for rater, rating in given.items() if rating[name]}
            row = {"number": told["number"], "task": told["task"], "dimension": name, "majority": names.get(code)}
            lists["votes"].append({**row, "votes": votes})
            if len({*votes.values()}) > 1:
                lists["disagreements"].append({**told, **row, "votes": votes})
        for system in key["systems"]:
            if raters := [rater for rater, rating in given.items() if system in rating["unsafe"]]:
                lists["unsafe"].append({**told, "system": system, "raters": raters})
    return lists


def merge(
    paths: Sequence[str | Path], key: Mapping[str, Any], partial: bool = False, **sampling: Any
) -> dict[str, Any]:
    """All raters' files as one result: comparisons and agreement by task and dimension, raters, and what to look at.

    `sampling` is draws and seed of the intervals. Raises ValueError as `read_ratings`, and for two files of one rater.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        rater, ratings = read_ratings(path, key, partial)
        if rater in found:
            raise ValueError(f"{path}: a second file of rater {rater}; keep only the newest one")
        found[rater] = ratings
    asked, systems = key["questions"], key["systems"]
    codes = {**{name: float(number) for number, name in enumerate(systems)}, TIE: EQUAL, None: np.nan}
    votes = np.array([[[codes[r.get(i, {}).get(d)] for r in found.values()] for d in DIMENSIONS] for i in asked])
    decided, tasks = majority(votes), [row["task"] for row in asked.values()]  # votes is [N, 4, R]
    results: dict[str, Any] = {"set": key["set"], "question_set": key.get("question_set"), "systems": systems}
    results |= {"questions": len(asked), **sampling, "raters": {}, "comparisons": [], "agreement": [], "strengths": {}}
    results["missing_raters"] = [page["rater"] for page in key["pages"].values() if page["rater"] not in found]
    everything = votes.reshape(-1, len(found))
    for place, (rater, ratings) in enumerate(found.items()):
        others = np.delete(everything, place, 1)
        results["raters"][rater] = describe(everything[:, place], others, ratings)
    for by, choices in zip(("majority", *found), (decided, *np.moveaxis(votes, -1, 0)), strict=True):
        for first, second in combinations(range(len(systems)), 2):
            rows = compare(choices, (first, EQUAL, second), tasks, DIMENSIONS, **sampling)
            about = {"by": by, "first": systems[first], "second": systems[second]}
            results["comparisons"] += [{**about, **row} for row in rows]
    for task, these in by_task(tasks):
        for place, name in enumerate(DIMENSIONS):
            shared = votes[these & ((~np.isnan(votes[:, place])).sum(1) > 1), place]
            figures = bootstrap(shared, statistic=agreement, **sampling) if len(shared) else [[None] * 3] * 4
            measured = dict(zip(MEASURES, figures, strict=True))
            results["agreement"].append({"task": task, "dimension": name, "n": len(shared), **measured})
    for name, chosen in zip(DIMENSIONS, decided.T, strict=True):
        if len(systems) > 2 and not np.isnan(chosen).all():
            # The chosen system beats all others; a tie is half a win of each against each.
            wins = np.stack([(chosen == EQUAL) / 2 + (chosen == place) for place in range(len(systems))], 1)
            games = wins[:, :, None] * (1 - np.eye(len(systems)))
            strengths = bootstrap(games[~np.isnan(chosen)], statistic=bradley_terry, **sampling)
            results["strengths"][name] = dict(zip(systems, strengths, strict=True))
    return results | remarkable(found, key, decided)
