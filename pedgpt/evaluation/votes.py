"""The files that doctors' pages export, checked and merged: majorities, comparisons, agreement, and what to look at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from pedgpt.evaluation.agreement import (
    Array,
    bootstrap,
    bradley_terry_intervals,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    raw_agreement,
)
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
        told, ratings = found.pop("checksum"), dict(found["ratings"])
        whole, page, form = found["set"], key["pages"].get(found["page"]), found["format"]
        if form != FORMAT:
            raise ValueError(f"its format is {form!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a file that a page exported ({reason}); ask for a new export") from None
    if told != digest(found):
        raise ValueError(f"{path}: its checksum is wrong, so it was changed after its export; ask for a new export")
    if whole != key["set"] or page is None:
        raise ValueError(f"{path}: is of the set {whole}, but the key of {key['set']}; give the key of its pages")
    if strange := ratings.keys() - page["orders"].keys():
        raise ValueError(f"{path}: rates question {min(strange)}, which the page of {page['rater']} does not ask")
    for question, rating in ratings.items():
        behind: dict[Any, Any] = {TIE: TIE, None: None, **dict(zip(LETTERS, page["orders"][question], strict=False))}
        try:
            choices = {name: behind[rating.get(name)] for name in DIMENSIONS}
            unsafe = [behind[letter] for letter in rating["unsafe"]]
            told = {"comment": str(rating["comment"]), "seconds": int(rating["seconds"]), "left": behind["A"]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: its rating of question {question} cannot be read ({error!r})") from None
        ratings[question] = {**choices, "unsafe": unsafe, **told}
    missing = sum(None in ratings.get(question, {"all": None}).values() for question in page["orders"])
    if missing and not partial:
        raise ValueError(
            f"{path}: {missing} of {len(page['orders'])} questions lack a choice; wait for the rest, or set partial"
        )
    return page["rater"], ratings


def majority(votes: Array) -> Array:
    """The choice of most raters [N, R] → [N]: a tie where two choices lead, NaN where nobody chose."""
    found = np.full(len(votes), np.nan)
    for number, row in enumerate(votes):
        leading = Counter(row[~np.isnan(row)].tolist()).most_common(2)
        if len(leading) == 2 and leading[0][1] == leading[1][1]:
            found[number] = EQUAL
        elif leading:
            found[number] = leading[0][0]
    return found


def compare(choices: Array, systems: Sequence[str], **sampling: Any) -> list[dict[str, Any]]:
    """Shares of wins, ties and losses of each pair of systems [N], with intervals over questions.

    Of more than two systems, a question where a third one was chosen says nothing of the pair and is not counted.
    """
    found = []
    for first, second in combinations(range(len(systems)), 2):
        outcomes = np.stack([choices == first, choices == EQUAL, choices == second], 1).astype(float)
        outcomes = outcomes[outcomes.any(1)]
        row: dict[str, Any] = {"first": systems[first], "second": systems[second], "n": len(outcomes)}
        if len(outcomes):
            shares = np.stack(bootstrap(outcomes, **sampling), 1).tolist()
            row |= {"win": shares[0], "tie": shares[1], "loss": shares[2]}
        found.append(row)
    return found


def agree(votes: Array, **sampling: Any) -> dict[str, Any]:
    """Every measure of agreement of votes [N, R]; None where it is undefined, or for other numbers of raters."""
    raters = (~np.isnan(votes)).sum(1)
    shared = votes[raters > 1]
    found: dict[str, Any] = {"n": len(shared), "raw": raw_agreement(shared)}
    found["cohen"] = cohen_kappa(*shared.T.tolist()) if votes.shape[1] == 2 else np.nan
    found["fleiss"] = fleiss_kappa(shared) if len({*raters[raters > 1]}) == 1 else np.nan
    alpha = bootstrap(shared, statistic=krippendorff_alpha, **sampling) if len(shared) else (np.nan,) * 3
    return {**found, "krippendorff": list(alpha)}


def strengths(choices: Array, systems: Sequence[str], **sampling: Any) -> dict[str, list[float]]:
    """Bradley-Terry strengths with intervals, from choices [N]; the chosen system beats all others, a tie is half."""
    chosen = choices[~np.isnan(choices)]
    wins = np.stack([(chosen == EQUAL) / 2 + (chosen == system) for system in range(len(systems))], 1)
    games = wins[:, :, None] * (1 - np.eye(len(systems)))  # [N, S, S]
    return dict(zip(systems, np.stack(bradley_terry_intervals(games, **sampling), 1).tolist(), strict=True))


def describe(column: Array, others: Array, ratings: Mapping[str, Any]) -> dict[str, Any]:
    """How one rater chose [4N], beside the `others` [4N, R - 1]: what tells haste, a habit, or another opinion."""
    both = ~np.isnan(column[:, None]) & ~np.isnan(others)
    untied = [(rating[name], rating["left"]) for rating in ratings.values() for name in DIMENSIONS]
    untied = [(chosen, left) for chosen, left in untied if chosen not in (TIE, None)]
    return {
        "questions": len(ratings),
        "ties": float((column == EQUAL).sum() / max(1, (~np.isnan(column)).sum())),
        "left": sum(chosen == left for chosen, left in untied) / max(1, len(untied)),
        "agreement": float((column[:, None] == others)[both].mean()) if both.any() else np.nan,
        "seconds": float(np.median([rating.get("seconds", 0) for rating in ratings.values()] or [np.nan])),
        "unsafe": sum(len(rating["unsafe"]) for rating in ratings.values()),
    }


def remarkable(
    found: Mapping[str, Mapping[str, Any]], key: Mapping[str, Any], decided: Sequence[Array]
) -> dict[str, Any]:
    """The votes on each question, those where raters disagree, and the answers that somebody calls unsafe."""
    lists: dict[str, Any] = {"votes": [], "disagreements": [], "unsafe": []}
    names = dict(enumerate(key["systems"])) | {EQUAL: TIE}
    for place, (question, told) in enumerate(key["questions"].items()):
        given = {rater: ratings[question] for rater, ratings in found.items() if question in ratings}
        comments = {rater: rating["comment"] for rater, rating in given.items() if rating.get("comment")}
        for name, most in zip(DIMENSIONS, decided, strict=True):
            votes = {rater: rating[name] for rater, rating in given.items() if rating[name]}
            about = {"number": told["number"], "task": told["task"], "dimension": name}
            lists["votes"].append({**about, "majority": names.get(most[place]), "votes": votes})
            if len({*votes.values()}) > 1:
                lists["disagreements"].append({**told, "dimension": name, "votes": votes, "comments": comments})
        for system in key["systems"]:
            if raters := [rater for rater, rating in given.items() if system in rating["unsafe"]]:
                lists["unsafe"].append({**told, "system": system, "raters": raters, "comments": comments})
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
    votes = np.array([[[codes[r.get(i, {}).get(d)] for r in found.values()] for i in asked] for d in DIMENSIONS])
    decided = [majority(each) for each in votes]  # votes is [4, N, R]
    tasks = [row["task"] for row in asked.values()]
    results: dict[str, Any] = {"set": key["set"], "question_set": key.get("question_set"), "systems": systems}
    results |= {"questions": len(asked), **sampling}
    results["missing_raters"] = [page["rater"] for page in key["pages"].values() if page["rater"] not in found]
    everything = votes.reshape(-1, len(found))
    results["raters"] = {
        rater: describe(everything[:, r], np.delete(everything, r, 1), found[rater]) for r, rater in enumerate(found)
    }
    results |= {"comparisons": [], "agreement": [], "strengths": {}}
    for task in ["all", *sorted({*tasks} if len({*tasks}) > 1 else ())]:
        these = np.array([task in ("all", each) for each in tasks])
        for name, all_votes, most in zip(DIMENSIONS, votes, decided, strict=True):
            about = {"task": task, "dimension": name}
            results["agreement"].append({**about, **agree(all_votes[these], **sampling)})
            for by, choices in zip(("majority", *found), (most, *all_votes.T), strict=True):
                rows = compare(choices[these], systems, **sampling)
                results["comparisons"] += [{"by": by, **about, **row} for row in rows]
            if task == "all" and len(systems) > 2 and not np.isnan(most).all():
                results["strengths"][name] = strengths(most, systems, **sampling)
    return _plain(results | remarkable(found, key, decided))


def _plain(value: Any) -> Any:
    """A value for JSON, which knows no NaN."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value
