"""Pairs of answers before a judge: win, tie and loss, with the judge's preference for a position and for length.

Each pair is shown in both orders. Where the two verdicts differ, it is a tie and counts as a flip, because the place of
an answer has decided. What a judge says must be exactly the JSON that was asked for. Otherwise it is asked again, then
listed; nothing is guessed.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pedgpt.data.records import Message
from pedgpt.endpoint import Unusable
from pedgpt.evaluation.agreement import LIMITS, bootstrap, bradley_terry_intervals, resampled_means
from pedgpt.evaluation.responses import Answers, Question, thin

DIMENSIONS = ("usefulness", "correctness", "consistency", "smoothness", "overall")
LEAST = 20  # verdicts that decide, before their habits are warned of
ATTEMPTS = 3  # answers of a judge to one question, before it counts as unreadable
Ask = Callable[..., str]  # messages, attempt=0 → text: `Endpoint.ask`
Verdict = dict[str, str]  # by dimension "1", "2" or "tie"


@dataclass(frozen=True)
class Showing:
    """An answer of system `first` and one of system `second` to question `number`, in this order; all count from 0."""

    number: int
    first: int
    second: int


@dataclass
class Judged:
    """The verdicts on all pairs of systems; `rows` hold those read in both orders, `unreadable` the others."""

    systems: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[dict[str, Any]] = field(default_factory=list)


def showings(systems: Sequence[Answers]) -> list[Showing]:
    """Every pair of systems on every question, in both orders, one after the other."""
    pairs = list(combinations(range(len(systems)), 2))
    count = len(systems[0].questions)
    return [Showing(i, *order) for i in range(count) for a, b in pairs for order in ((a, b), (b, a))]


@cache
def template() -> dict[str, Any]:
    """templates/judge.toml."""
    return tomllib.loads(files("pedgpt.evaluation").joinpath("templates/judge.toml").read_text(encoding="utf-8"))


def template_hash() -> str:
    """Names the wording of what judges are asked."""
    return hashlib.sha256(json.dumps(template(), sort_keys=True).encode()).hexdigest()[:16]


def pair_prompt(systems: Sequence[Answers], shown: Showing, *, reference: bool) -> list[dict[str, str]]:
    """The chat messages that ask for a verdict on two answers, with the true answer if `reference`."""
    question = systems[shown.first].questions[shown.number]
    answers = {"first": systems[shown.first], "second": systems[shown.second]}
    texts = {name: system.answers[shown.number].content or "（空）" for name, system in answers.items()}
    return _messages("pair", question, reference, **texts)


def score_prompt(question: Question, answer: str, points: int) -> list[dict[str, str]]:
    """The chat messages that ask for the points of an answer, 0 to `points`, against the question's reference."""
    return _messages("score", question, True, answer=answer or "（空）", points=str(points))


def _messages(kind: str, question: Question, reference: bool, **values: str) -> list[dict[str, str]]:
    names = {"system": "设定", "user": "家长", "assistant": "助手"}
    dialogue = "\n".join(f"{names[message.role]}：{_plain(message.content)}" for message in question.history)
    shown = question.reference if reference else ""
    given = template()["reference"].format(reference=_plain(shown)) if shown else ""
    values = {name: _plain(value) for name, value in values.items()}
    text = template()[kind]["user"].format(dialogue=dialogue, reference=given, **values).strip()
    return [{"role": "system", "content": template()["system"]}, {"role": "user", "content": text}]


def _plain(text: str) -> str:
    """A text that cannot imitate the headings of the prompt, such as 【回答2】."""
    return re.sub("【(?=对话|参考|回答|问题|考生)", "［", text)


def ask_strictly(ask: Ask, messages: list[dict[str, str]], read: Callable[[str], Any]) -> tuple[Any, str]:
    """(what `read` makes of the answer, "") or, after `ATTEMPTS`, (None, what was wrong with the last answer)."""
    problem = said = ""
    for attempt in range(ATTEMPTS):
        # Some servers refuse two turns of the user in a row, so what was said stands between them.
        said_before = {"role": "assistant", "content": said or "（空）"}
        again = [said_before, {"role": "user", "content": template()["again"]}] if attempt else []
        said = ""
        try:
            said = ask([*messages, *again], attempt=attempt)
            return read(said), ""
        except (Unusable, ValueError, RecursionError) as error:
            if not isinstance(error, Unusable) and not said:
                raise  # no answer at all: a refused key, a spent budget
            problem = f"{error}: {said[:200]!r}" if said else str(error)
    return None, problem


def read_verdict(text: str) -> Verdict:
    """A judge's verdict; ValueError unless the text is one JSON object with "1", "2" or "tie" for each dimension."""
    found = _only_json(text, DIMENSIONS)
    for name, value in found.items():
        if value not in ("1", "2", "tie"):
            raise ValueError(f'{name} is {value!r}, expected "1", "2" or "tie"')
    return found


def read_score(text: str, points: int) -> float:
    """The points that a judge gives; ValueError unless the text is {"score": a number from 0 to `points`}."""
    score = _only_json(text, ["score"])["score"]
    if type(score) not in (int, float) or not 0 <= score <= points:
        raise ValueError(f"score is {score!r}, expected a number from 0 to {points}")
    return float(score)


def _only_json(text: str, keys: Sequence[str]) -> dict[str, Any]:
    text = text.rpartition("</think>")[2].strip()
    if text.startswith("```"):  # a whole answer in a code block is still nothing but JSON
        text = text.removeprefix("```json").strip("`\n ")
    found = json.loads(text)
    # json keeps the last of two values of one key, but two verdicts on one thing are none.
    if not isinstance(found, dict) or found.keys() != set(keys) or any(text.count(f'"{key}"') > 1 for key in keys):
        raise ValueError(f"expected one JSON object with {', '.join(keys)}, each once")
    return found


def collect(systems: Sequence[Answers], verdicts: Iterator[tuple[Showing, Verdict | None, str]]) -> Judged:
    """The verdicts on `showings(systems)`, in that order, joined: an answer wins a dimension if both orders say so."""
    judged = Judged([system.name for system in systems])
    for (shown, one, problem), (_, two, other_problem) in zip(verdicts, verdicts, strict=True):
        a, b = shown.first, shown.second
        row: dict[str, Any] = {"number": shown.number + 1, "task": systems[a].questions[shown.number].task}
        row["systems"] = [systems[a].name, systems[b].name]
        if one is None or two is None:
            judged.unreadable.append({**row, "problems": [problem, other_problem]})
            continue
        swapped = {name: {"1": "2", "2": "1", "tie": "tie"}[value] for name, value in two.items()}
        joined = {name: one[name] if one[name] == swapped[name] else "tie" for name in DIMENSIONS}
        judged.rows.append({**row, "verdict": joined, "orders": [one, two]})
    return judged


def summarize(systems: Sequence[Answers], judged: Judged, *, seed: int = 0) -> dict[str, Any]:
    """The figures of all pairs of systems, with 95 % intervals by a bootstrap over conversations, and warnings."""
    pairs = [_pair_summary(systems, a, b, judged, seed) for a, b in combinations(range(len(systems)), 2)]
    found: dict[str, Any] = {"pairs": pairs, "unreadable": judged.unreadable}
    found["warnings"] = [warning for pair in pairs for warning in pair.pop("warnings")]
    if judged.unreadable:
        found["warnings"].append(f"{len(judged.unreadable)} pairs have no readable verdict and are left out")
    if len(systems) > 2 and judged.rows:
        wins = np.zeros((len(judged.rows), len(systems), len(systems)))
        for i, row in enumerate(judged.rows):
            a, b = (judged.systems.index(name) for name in row["systems"])
            share = {"1": 1.0, "tie": 0.5, "2": 0.0}[row["verdict"]["overall"]]
            wins[i, a, b], wins[i, b, a] = share, 1 - share
        clusters = [systems[0].questions[row["number"] - 1].conversation for row in judged.rows]
        strengths = np.stack(bradley_terry_intervals(wins, seed=seed, clusters=clusters), -1).tolist()
        found["bradley_terry"] = dict(zip(judged.systems, strengths, strict=True))
    return found


def _pair_summary(systems: Sequence[Answers], a: int, b: int, judged: Judged, seed: int) -> dict[str, Any]:
    names = [systems[a].name, systems[b].name]
    rows = [row for row in judged.rows if row["systems"] == names]
    numbers = [row["number"] - 1 for row in rows]
    clusters = [systems[a].questions[i].conversation for i in numbers]
    found: dict[str, Any] = {"systems": names, "rows": len(rows), "tasks": {}, "warnings": []}
    if not rows:
        return found
    tasks = dict.fromkeys(["all", *(row["task"] for row in rows if row["task"])])
    for task in tasks:
        chosen = [i for i, row in enumerate(rows) if task in ("all", row["task"])]
        found["tasks"][task] = {"rows": len(chosen)}
        kinds = [
            [[rows[i]["verdict"][name] == kind for kind in ("1", "tie", "2")] for name in DIMENSIONS] for i in chosen
        ]
        shares = np.stack(bootstrap(np.array(kinds), seed=seed, clusters=[clusters[i] for i in chosen]), -1).tolist()
        for name, found_shares in zip(DIMENSIONS, shares, strict=True):
            found["tasks"][task][name] = dict(zip(("win", "tie", "loss"), found_shares, strict=True))
    lengths = [[len(systems[s].answers[i].content) for s in (a, b)] for i in numbers]
    found |= _biases(rows, np.array(lengths, float), clusters, seed, names, found["warnings"])
    return found


def _biases(
    rows: Sequence[Mapping[str, Any]], lengths: NDArray, clusters: Sequence[str], seed: int, names: list[str],
    warnings: list[str],
) -> dict[str, Any]:  # fmt: skip
    """How far the place and the length of an answer decide, overall."""
    orders = np.array([[order["overall"] for order in row["orders"]] for row in rows])
    flips = np.mean([one != {"1": "2", "2": "1"}.get(two, two) for one, two in orders])
    decided = orders != "tie"
    found: dict[str, Any] = {"flips": float(flips), "first": _share(orders == "1", decided, clusters, seed)}
    wins = np.array([{"1": 1.0, "tie": 0.5, "2": 0.0}[row["verdict"]["overall"]] for row in rows])
    gaps = np.log1p(lengths[:, 0]) - np.log1p(lengths[:, 1])
    longer = (wins - 0.5) * gaps > 0
    found["longer"] = _share(longer[:, None], ((wins != 0.5) & (gaps != 0))[:, None], clusters, seed)
    found["win_rate"] = [float(x) for x in bootstrap(wins, seed=seed, clusters=clusters)]
    pair = " and ".join(names)
    if gaps.min() <= 0 <= gaps.max():
        found["length_controlled"] = length_controlled(wins, gaps, clusters, seed=seed)
        advice = f"read the length-controlled rate, {found['length_controlled'][0]:.0%}"
    else:  # at difference 0 the regression would say nothing but who won
        found["length_controlled"] = None
        advice = "compare answers of like length"
        which = names[int(gaps.max() < 0)]
        warnings.append(f"{pair}: every answer of {which} is the longer one, so there is no length-controlled rate")
    enough = decided.sum() >= LEAST
    if enough and found["first"] and not found["first"][1] <= 0.5 <= found["first"][2]:
        warnings.append(
            f"{pair}: the place decides: {found['first'][0]:.0%} of the verdicts that decide prefer the answer shown "
            f"first, and {flips:.0%} of the pairs change with the order"
        )
    elif enough and flips > 0.3:
        warnings.append(f"{pair}: the judge is unsteady: {flips:.0%} of the pairs change with the order")
    if enough and found["longer"] and found["longer"][1] > 0.6:
        warnings.append(
            f"{pair}: the judge prefers the longer answer in {found['longer'][0]:.0%} of its decisions; {advice}"
        )
    return found


def _share(hits: NDArray, counted: NDArray, clusters: Sequence[str], seed: int) -> list[float] | None:
    """(share of hits among what is counted, low, high), or None if nothing is counted."""
    if not counted.any():
        return None
    values = np.stack([(hits & counted).sum(1), counted.sum(1)], -1).astype(float)
    hit, all_counted = np.vstack([values.mean(0), resampled_means(values, seed=seed, clusters=clusters)]).T
    shares = hit / np.maximum(all_counted, 1e-12)
    return [float(shares[0]), *map(float, np.quantile(shares[1:], LIMITS))]


def length_controlled(wins: NDArray, gaps: NDArray, clusters: Sequence[str], *, seed: int = 0) -> list[float]:
    """[rate, low, high]: how often the first system would win if both answers were equally long.

    Logistic regression of the win, 1, ½ for a tie or 0, on the difference of log lengths in units of its standard
    deviation, with a ridge penalty of 1 on the slope, read at difference 0.
    """
    deviation = gaps.std()
    x = gaps / deviation if deviation > 0 else np.zeros_like(gaps)
    names, groups = np.unique(np.array(clusters), return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=2000)
    rates = 1 / (1 + np.exp(-_intercepts(wins, x, np.vstack([np.ones(len(names)), counts])[:, groups])))
    return [float(rates[0]), *map(float, np.quantile(rates[1:], LIMITS))]


def _intercepts(y: NDArray, x: NDArray, weights: NDArray) -> NDArray:
    """The intercept of the ridge regression for each row of weights [D, N], by Newton's method."""
    at, slope = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(at[:, None] + slope[:, None] * x, -30, 30)))
        error, curve = weights * (y - p), weights * p * (1 - p)
        g0, g1 = error.sum(1), (error * x).sum(1) - slope
        h00, h01, h11 = curve.sum(1) + 1e-6, (curve * x).sum(1), (curve * x * x).sum(1) + 1
        det = h00 * h11 - h01 * h01
        at = np.clip(at + np.clip((h11 * g0 - h01 * g1) / det, -2, 2), -20, 20)
        slope = slope + np.clip((h00 * g1 - h01 * g0) / det, -2, 2)
    return at


def known_judges(systems: Sequence[Answers], *, accuracy: float = 0.8, seed: int = 0) -> dict[str, dict[str, Any]]:
    """What the figures say of judges whose faults are known: a check of the figures, which asks nobody.

    "always first", "longest", "random", and one that finds a planted winner with this accuracy in each order. The
    truth is the planted winner: the last one's share of right verdicts is accuracy², of wrong ones (1 − accuracy)².
    """
    dice = random.Random(seed)
    planted = [dice.randrange(2) for _ in systems[0].questions]

    def longest(shown: Showing) -> str:
        one, two = (len(systems[s].answers[shown.number].content) for s in (shown.first, shown.second))
        return "tie" if one == two else "1" if one > two else "2"

    def finds(shown: Showing) -> str:
        winner_is_first = planted[shown.number] == (shown.first > shown.second)
        return "1" if winner_is_first == (dice.random() < accuracy) else "2"

    judges: dict[str, Callable[[Showing], str]] = {
        "always first": lambda _: "1", "longest": longest, "random": lambda _: dice.choice("12"), "planted": finds,
    }  # fmt: skip
    found = {}
    for name, judge in judges.items():
        verdicts = ((shown, dict.fromkeys(DIMENSIONS, judge(shown)), "") for shown in showings(systems[:2]))
        judged = collect(systems[:2], verdicts)
        summary = summarize(systems[:2], judged, seed=seed)
        sides = [{"1": 0, "2": 1}.get(row["verdict"]["overall"]) for row in judged.rows]
        pairs = list(zip(sides, planted, strict=True))
        right = bootstrap([side == truth for side, truth in pairs], seed=seed)
        wrong = bootstrap([side == 1 - truth for side, truth in pairs], seed=seed)
        found[name] = {**summary["pairs"][0], "warned": summary["warnings"], "right": right, "wrong": wrong}
    return found


def planted_pairs(system: Answers, limit: int = 50) -> list[tuple[list[Answers], Showing]]:
    """Pairs of which the right answer is known, in both orders: a reference, and that of another question of the task.

    The reference is system 0 of each pair. A question whose task has no other reference is left out.
    """
    found = []
    for numbers in system.tasks().values():
        for i, j in zip(numbers, numbers[len(numbers) // 2 :] + numbers[: len(numbers) // 2], strict=True):
            right, wrong = system.questions[i].reference, system.questions[j].reference
            if right and wrong and right != wrong:
                texts = {"reference": right, "another": wrong}
                pair = [Answers(n, [system.questions[i]], [Message("assistant", text)]) for n, text in texts.items()]
                found.append(pair)
    return [(pair, Showing(0, *order)) for pair in thin(found, limit) for order in ((0, 1), (1, 0))]


def found_planted(said: Sequence[tuple[Verdict | None, str]]) -> dict[str, Any]:
    """How often both orders of `planted_pairs` preferred the reference: "right", [share, low, high] of those read."""
    pairs = list(zip(said[::2], said[1::2], strict=True))
    read = [(one["overall"], two["overall"]) for (one, _), (two, _) in pairs if one and two]
    right = list(bootstrap([pair == ("1", "2") for pair in read])) if read else None
    return {"pairs": len(pairs), "unreadable": len(pairs) - len(read), "right": right}


def summarize_scores(
    systems: Sequence[Answers], said: Sequence[tuple[float | None, str]], points: int
) -> dict[str, Any]:
    """Mean points of each system by task, [mean, low, high]; `said` holds them system after system."""
    count = len(systems[0].questions)
    found: dict[str, Any] = {"points": points, "scores": {}, "values": {}, "unreadable": []}
    for system, start in zip(systems, range(0, len(said), count), strict=True):
        values = [score for score, _ in said[start : start + count]]
        found["values"][system.name] = values
        for number, (score, problem) in enumerate(said[start : start + count], 1):
            if score is None:
                found["unreadable"].append({"system": system.name, "number": number, "problem": problem})
        found["scores"][system.name] = {}
        for task, numbers in {"all": list(range(count)), **system.tasks()}.items():
            read = [i for i in numbers if values[i] is not None]
            if read and task:
                clusters = [system.questions[i].conversation for i in read]
                found["scores"][system.name][task] = bootstrap([values[i] for i in read], clusters=clusters)
    return found
