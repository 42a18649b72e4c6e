"""Pairs of answers before a judge: win, tie and loss, with the judge's preference for a position and for length.

Each pair is shown in both orders. Where the two verdicts differ, it is a tie and counts as a flip, because the place of
an answer has decided. What a judge says must be exactly the JSON that was asked for. Otherwise it is asked again, then
listed; nothing is guessed.

N questions, P pairs of systems, A aspects.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np

from pedgpt.data.records import Message
from pedgpt.endpoint import Unusable
from pedgpt.evaluation.agreement import Array, bootstrap, bradley_terry, by_task, compare, ratio
from pedgpt.evaluation.responses import Answers, Question, template, thin

DIMENSIONS = ("usefulness", "correctness", "consistency", "smoothness", "overall")
WIN, TIE, LOSS = 1.0, 0.5, 0.0  # of the first of two answers; NaN where a judge said nothing that can be read
CODES = {"1": WIN, "tie": TIE, "2": LOSS}
LEAST = 20  # verdicts that decide, before their habits are warned of
ATTEMPTS = 3  # answers of a judge to one question, before it counts as unreadable
Ask = Callable[..., str]  # messages, attempt=0 → text: `Endpoint.ask`
Verdict = dict[str, str]  # by dimension "1", "2" or "tie"


def template_hash() -> str:
    """Names the wording of what judges are asked."""
    return hashlib.sha256(json.dumps(template("judge"), sort_keys=True).encode()).hexdigest()[:16]


def pair_prompts(systems: Sequence[Answers], *, reference: bool) -> list[list[dict[str, str]]]:
    """The chat messages about every question, every pair of systems and both orders, the last varying fastest."""
    prompts = []
    for question, *said in zip(systems[0].questions, *(system.answers for system in systems), strict=True):
        for pair in combinations([one.content or "（空）" for one in said], 2):
            for first, second in (pair, pair[::-1]):
                prompts.append(_messages("pair", question, reference, first=first, second=second))
    return prompts


def score_prompts(systems: Sequence[Answers], points: int) -> list[list[dict[str, str]]]:
    """The chat messages that ask for the points, 0 to `points`, of each answer, system after system."""
    pairs = [pair for system in systems for pair in zip(system.questions, system.answers, strict=True)]
    told = [{"answer": said.content or "（空）", "points": str(points)} for _, said in pairs]
    return [_messages("score", question, True, **one) for (question, _), one in zip(pairs, told, strict=True)]


def _messages(kind: str, question: Question, reference: bool, **values: str) -> list[dict[str, str]]:
    names = {"system": "设定", "user": "家长", "assistant": "助手"}
    dialogue = "\n".join(f"{names[message.role]}：{_plain(message.content)}" for message in question.history)
    shown = question.reference if reference else ""
    given = template("judge")["reference"].format(reference=_plain(shown)) if shown else ""
    values = {name: _plain(value) for name, value in values.items()}
    text = template("judge")[kind]["user"].format(dialogue=dialogue, reference=given, **values).strip()
    return [{"role": "system", "content": template("judge")["system"]}, {"role": "user", "content": text}]


def _plain(text: str) -> str:
    """A text that cannot imitate the headings of the prompt, such as 【回答2】."""
    return re.sub("【(?=对话|参考|回答|问题|考生)", "［", text)


def ask_strictly(ask: Ask, messages: list[dict[str, str]], read: Callable[[str], Any]) -> tuple[Any, str]:
    """(what `read` makes of the answer, "") or, after `ATTEMPTS`, (None, what was wrong with the last answer)."""
    problem = said = ""
    for attempt in range(ATTEMPTS):
        # Some servers refuse two turns of the user in a row, so what was said stands between them.
        said_before = {"role": "assistant", "content": said or "（空）"}
        again = [said_before, {"role": "user", "content": template("judge")["again"]}] if attempt else []
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


def verdict_table(said: Sequence[Verdict | None], pairs: int) -> Array:
    """[N, P, order, A] `WIN`, `TIE` or `LOSS` of each pair's first system, from the answers to `pair_prompts`."""
    codes = [[CODES[one[name]] if one else np.nan for name in DIMENSIONS] for one in said]
    table = np.array(codes).reshape(-1, pairs, 2, len(DIMENSIONS))
    table[:, :, 1] = 1 - table[:, :, 1]  # the second order shows the pair's second system first
    return table


def joined(table: Array) -> Array:
    """[N, P, A]: an answer wins an aspect if both orders say so; NaN where one of them could not be read."""
    return np.where(table[:, :, 0] == table[:, :, 1], table[:, :, 0], TIE + 0 * table.sum(2))


def verdict_rows(systems: Sequence[Answers], said: Sequence[tuple[Verdict | None, str]]) -> dict[str, Any]:
    """ "verdicts", with the chosen system by aspect and what each order said, and those "unreadable"."""
    found: dict[str, Any] = {"verdicts": [], "unreadable": []}
    asked = product(enumerate(systems[0].questions, 1), combinations([system.name for system in systems], 2))
    for ((number, question), pair), (one, problem), (two, other) in zip(asked, said[::2], said[1::2], strict=True):
        row = {"number": number, "task": question.task, "systems": list(pair)}
        if one and two:
            agreed = {("1", "2"): pair[0], ("2", "1"): pair[1]}
            verdict = {name: agreed.get((one[name], two[name]), "tie") for name in DIMENSIONS}
            found["verdicts"].append({**row, "verdict": verdict, "orders": [one, two]})
        else:
            found["unreadable"].append({**row, "problems": [problem, other]})
    return found


def summarize(systems: Sequence[Answers], table: Array, *, seed: int = 0) -> dict[str, Any]:
    """The figures of all pairs of systems, with 95 % intervals by a bootstrap over conversations, and warnings."""
    questions, names = systems[0].questions, [system.name for system in systems]
    found: dict[str, Any] = {"comparisons": [], "pairs": [], "warnings": []}
    decided, lengths = joined(table), np.array([[len(said.content) for said in system.answers] for system in systems])
    talks, tasks = np.array([one.conversation for one in questions]), [one.task for one in questions]
    wins = np.zeros((len(questions), len(systems), len(systems)))
    for number, (a, b) in enumerate(combinations(range(len(systems)), 2)):
        pair = {"first": names[a], "second": names[b]}
        rows = compare(decided[:, number], (WIN, TIE, LOSS), tasks, DIMENSIONS, talks, seed=seed)
        found["comparisons"] += [{**pair, **row} for row in rows]
        overall = table[:, number, :, -1]
        read = ~np.isnan(overall).any(1)
        wins[:, a, b], wins[:, b, a] = np.nan_to_num([decided[:, number, -1], 1 - decided[:, number, -1]])
        gaps = np.subtract(*np.log1p(lengths[[a, b]][:, read]))
        biases = _biases(overall[read], gaps, talks[read], seed) if read.any() else {}
        found["pairs"].append({**pair, "n": int(read.sum()), **biases})
        found["warnings"] += _warnings(found["pairs"][-1], gaps) if biases else []
    if lost := int(np.isnan(decided[:, :, -1]).sum()):
        found["warnings"].append(f"{lost} pairs have no readable verdict and are left out")
    if len(systems) > 2:
        strengths = bootstrap(wins, talks, statistic=bradley_terry, seed=seed)
        found["bradley_terry"] = dict(zip(names, strengths, strict=True))
    return found


def _biases(orders: Array, gaps: Array, talks: Array, seed: int) -> dict[str, Any]:
    """How far the place and the length of an answer decide, overall, of [N, 2] verdicts in the two orders.

    "shown_first" and "longer" are shares of those that decide; `gaps` are differences of log lengths.
    """
    wins = np.where(orders[:, 0] == orders[:, 1], orders[:, 0], TIE)
    preferred = {"shown_first": orders == (WIN, LOSS), "longer": ((wins - TIE) * gaps > 0)[:, None]}
    deciding = {"shown_first": orders != TIE, "longer": ((wins != TIE) & (gaps != 0))[:, None]}
    found: dict[str, Any] = {"flips": float(np.mean(orders[:, 0] != orders[:, 1]))}
    found |= {"decisions": int(deciding["shown_first"].sum()), "win_rate": bootstrap(wins, talks, seed=seed)}
    for name, hits in preferred.items():
        counts = np.stack([hits.sum(1), deciding[name].sum(1)], 1)
        found[name] = bootstrap(counts, talks, statistic=ratio, seed=seed)
    # At difference 0, where no difference was seen, a regression would say nothing but who won.
    known = gaps.min() <= 0 <= gaps.max()
    return found | {"length_controlled": length_controlled(wins, gaps, talks, seed=seed) if known else None}


def _warnings(pair: Mapping[str, Any], gaps: Array) -> list[str]:
    found, names = [], f"{pair['first']} and {pair['second']}"
    (first, low, high), (longer, longer_low, _), flips = pair["shown_first"], pair["longer"], pair["flips"]
    controlled = pair["length_controlled"]
    if not controlled:
        which = pair["first"] if gaps.min() > 0 else pair["second"]
        found.append(f"{names}: every answer of {which} is the longer one, so there is no length-controlled rate")
    if pair["decisions"] >= LEAST and not low <= 0.5 <= high:
        told = f"{first:.0%} of the verdicts that decide prefer the answer shown first"
        found.append(f"{names}: the place decides: {told}, and {flips:.0%} of the pairs change with the order")
    elif pair["decisions"] >= LEAST and flips > 0.3:
        found.append(f"{names}: the judge is unsteady: {flips:.0%} of the pairs change with the order")
    if pair["decisions"] >= LEAST and longer_low is not None and longer_low > 0.6:
        advice = f"read the length-controlled rate, {controlled[0]:.0%}" if controlled else "compare like lengths"
        found.append(f"{names}: the judge prefers the longer answer in {longer:.0%} of its decisions; {advice}")
    return found


def length_controlled(wins: Array, gaps: Array, talks: Array, *, seed: int = 0) -> list[float]:
    """[rate, low, high]: how often the first system would win if both answers were equally long.

    Logistic regression of the win, 1, ½ for a tie or 0, on the difference of log lengths in units of its standard
    deviation, with a ridge penalty of 1 on the slope, read at difference 0.
    """
    x = gaps / (gaps.std() or 1)

    def rate(rows: Array, weights: Array) -> Array:
        at = slope = np.zeros(len(weights))
        for _ in range(30):  # Newton's method for each row of weights; few steps are enough
            p = 1 / (1 + np.exp(-np.clip(at[:, None] + slope[:, None] * x, -30, 30)))
            error, curve = weights * (rows - p), weights * p * (1 - p)
            g0, g1 = error.sum(1), error @ x - slope
            h00, h01, h11 = curve.sum(1) + 1e-6, curve @ x, curve @ x**2 + 1
            step = np.clip(np.array([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0]) / (h00 * h11 - h01**2), -2, 2)
            at, slope = np.clip(at + step[0], -20, 20), slope + step[1]
            if abs(step).max() < 1e-9:
                break
        return 1 / (1 + np.exp(-at))

    return bootstrap(wins, talks, statistic=rate, seed=seed)


def known_judges(systems: Sequence[Answers], *, accuracy: float = 0.8, seed: int = 0) -> dict[str, dict[str, Any]]:
    """What the figures say of judges whose faults are known: a check of the figures, which asks nobody.

    "always first", "longest", "random", and one that finds a planted winner with this accuracy in each order. The
    truth is the planted winner: the last one's share of right verdicts is accuracy², of wrong ones (1 − accuracy)².
    """
    dice, count = np.random.default_rng(seed), len(systems[0].questions)
    lengths = np.array([[len(said.content) for said in system.answers] for system in systems[:2]])
    planted = dice.integers(2, size=(count, 1))  # whether the first system is the winner
    judges = {
        "always first": np.tile([WIN, LOSS], (count, 1)),
        "longest": np.tile((np.sign(lengths[0] - lengths[1])[:, None] + 1) / 2, 2),
        "random": dice.integers(2, size=(count, 2)),
        "planted": np.where(dice.random((count, 2)) < accuracy, planted, 1 - planted),
    }
    found = {}
    for name, orders in judges.items():
        table = np.broadcast_to(orders[:, None, :, None].astype(float), (count, 1, 2, len(DIMENSIONS)))
        summary, wins = summarize(systems[:2], table, seed=seed), joined(table)[:, 0, -1:]
        shares = [row for row in summary["comparisons"] if row["task"] == "all" and row["dimension"] == "overall"]
        right, wrong = (bootstrap((wins == truth)[:, 0], seed=seed) for truth in (planted, 1 - planted))
        found[name] = shares[0] | summary["pairs"][0] | {"warned": summary["warnings"], "right": right, "wrong": wrong}
    return found


def planted_pairs(system: Answers, limit: int = 50) -> list[list[Answers]]:
    """Pairs of which the right answer is known: a reference, and that of another question of the task.

    The reference is the first of each pair. A question whose task has no other reference is left out.
    """
    found = []
    for numbers in system.tasks().values():
        for i, j in zip(numbers, numbers[len(numbers) // 2 :] + numbers[: len(numbers) // 2], strict=True):
            right, wrong = system.questions[i].reference, system.questions[j].reference
            if right and wrong and right != wrong:
                told = {"reference": right, "another": wrong}
                found.append([Answers(n, [system.questions[i]], [Message("assistant", t)]) for n, t in told.items()])
    return thin(found, limit)


def found_planted(said: Sequence[tuple[Verdict | None, str]]) -> dict[str, Any]:
    """How often both orders of `planted_pairs` preferred the reference: "right", [share, low, high] of those read."""
    wins = joined(verdict_table([verdict for verdict, _ in said], 1))[:, 0, -1]
    read = wins[~np.isnan(wins)]
    right = bootstrap(read == WIN) if len(read) else None
    return {"pairs": len(wins), "unreadable": len(wins) - len(read), "right": right}


def summarize_scores(
    systems: Sequence[Answers], said: Sequence[tuple[float | None, str]], points: int
) -> dict[str, Any]:
    """Mean points of each system by task, [mean, low, high]; `said` holds them system after system."""
    questions = systems[0].questions
    values = np.array([score for score, _ in said], dtype=float).reshape(len(systems), -1)
    talks = np.array([question.conversation for question in questions])
    places = product([system.name for system in systems], range(1, len(questions) + 1))
    found: dict[str, Any] = {"points": points, "scores": {}, "unreadable": []}
    for system, row in zip(systems, values, strict=True):
        known = {task: these & ~np.isnan(row) for task, these in by_task([one.task for one in questions])}
        scores = {task: bootstrap(row[these], talks[these]) for task, these in known.items() if these.any()}
        found["scores"][system.name] = scores
    for (name, number), (score, problem) in zip(places, said, strict=True):
        if score is None:
            found["unreadable"].append({"system": name, "number": number, "problem": problem})
    return found
