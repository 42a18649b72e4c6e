"""Exams: reading them, the answer that a text gives, the likelihood of options, and the score with its intervals.

PediaBench's sheets, the JSON of CMB and CMExam, and any table or JSON with question, options and answer are read, from
the user's own copy. PediaBench's total weights the kinds of questions; it also weights single questions by how many
other models answered them, which its files do not hold, so that is left out here.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pedgpt.data.chat import ChatFormat
from pedgpt.data.records import Message
from pedgpt.data.tables import Unfit, files_of, format_of, read_rows
from pedgpt.evaluation.agreement import LIMITS, bootstrap, resampled_means
from pedgpt.evaluation.likelihood import option_logps
from pedgpt.evaluation.responses import Question
from pedgpt.models.transformer import Transformer

WEIGHTS = {"true_false": 10, "choice": 40, "pairing": 10, "essay": 30, "case": 10}  # of PediaBench's total
POINTS = {"essay": 5, "case": 10}  # at most, by a judge
NAMES = {
    "question": ("question", "questions", "题目", "问题"), "options": ("options", "option", "选项"),
    "answer": ("answer", "answers", "答案"), "group": ("disease groups", "group", "exam_subject", "subject", "科目"),
    "number": ("question number",), "disrupted": ("disrupted answers",),
}  # fmt: skip
TRUE, FALSE = "对正确√", "错误×"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WIDE = str.maketrans({chr(code + 0xFEE0): chr(code) for code in range(33, 127)})


@dataclass(frozen=True)
class ExamQuestion:
    """A question of a kind in `WEIGHTS`; `options` by letter. `answer`: 对 or 错, letters, or a text as reference.

    Of a pairing group `text` holds all questions, and `answer` a letter for each of them, in order.
    """

    kind: str
    text: str
    answer: str
    place: str
    group: str = ""
    options: Mapping[str, str] | None = None

    @property
    def letters(self) -> list[str]:
        """What may be chosen."""
        return ["对", "错"] if self.kind == "true_false" else list(self.options or ())

    @property
    def single(self) -> bool:
        """Whether exactly one of `letters` is right."""
        return self.kind == "true_false" or (self.kind == "choice" and len(self.answer) == 1)

    def rotated(self) -> ExamQuestion:
        """The same question with each option under the next letter."""
        letters, texts = self.letters, list((self.options or {}).values())
        options = dict(zip(letters, texts[-1:] + texts[:-1], strict=True))
        moved = "".join(sorted(letters[(letters.index(one) + 1) % len(letters)] for one in self.answer))
        return ExamQuestion(self.kind, self.text, moved, self.place, self.group, options)


def read_exam(path: str | Path) -> list[ExamQuestion]:
    """The questions of a file, or of all files in a folder; ValueError names the place of what is not understood."""
    found: list[ExamQuestion] = []
    for file in files_of(path):
        rows = []
        for line, row in read_rows(file):
            if not str(line).isdecimal():
                break  # "sheet:line" of a workbook's further sheets
            if isinstance(row, Unfit) or not isinstance(row, dict):
                raise ValueError(f"{file}:{line}: {row if isinstance(row, Unfit) else 'expected an object'}")
            if any(value not in (None, "") for value in row.values()):
                rows.append((int(line), row))
        kind = _kind_of(file, rows)
        if kind == "pairing":
            found += _pairing(file, rows)
        else:
            found += [_question(file, line, row, kind) for line, row in rows]
    if not found:
        raise ValueError(f"{path}: holds no questions")
    return found


def _kind_of(file: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> str:
    """The kind of a file's questions, by its columns, its answers and, for essays and cases, its name."""
    columns = {str(name).strip().lower() for _, row in rows for name in row}
    if columns & set(NAMES["disrupted"]):
        return "pairing"
    if columns & set(NAMES["options"]):
        return "choice"
    answers = [str(_value(row, "answer")[1]).strip() in ("对", "错") for _, row in rows]
    if sum(answers) > len(answers) / 2:  # a mistake in one of them is refused later, with its place
        return "true_false"
    return "case" if re.search("case|病例", file.name, re.IGNORECASE) else "essay"


def _value(row: Mapping[str, Any], field: str) -> tuple[int, Any]:
    """(position of the column, value) of a field; the position of no column is -1."""
    for position, name in enumerate(row):
        if str(name).strip().lower() in NAMES[field]:
            return position, row[name]
    return -1, None


def _text(file: Path, line: int, row: Mapping[str, Any], field: str) -> str:
    position, value = _value(row, field)
    if isinstance(value, list):  # several letters
        value = "".join(map(str, value))
    if value is None or not str(value).strip() or str(value) == "nan":
        there = (
            f"found columns {', '.join(map(str, row))}" if position < 0 else f"{_place(file, line, row, field)}: empty"
        )
        raise ValueError(f"{file}:{line}: {there}, expected {NAMES[field][0]}; fill it in or delete the row")
    return str(value).strip()


def _place(file: Path, line: int, row: Mapping[str, Any], field: str) -> str:
    """ "cell C7" of a workbook, else the name of the field."""
    position, _ = _value(row, field)
    return f"cell {_LETTERS[position]}{line}" if format_of(file) == ".xlsx" and 0 <= position < 26 else field


def _question(file: Path, line: int, row: dict[str, Any], kind: str) -> ExamQuestion:
    text, answer = (_text(file, line, row, field) for field in ("question", "answer"))
    group, place = str(_value(row, "group")[1] or "").strip(), f"{file}:{line}"
    if kind == "choice":
        options = _options(_value(row, "options")[1])
        if len(options) < 2:
            where = _place(file, line, row, "options")
            raise ValueError(f"{place}: {where}: found {len(options)} options, expected A.… B.… and so on")
        letters = re.sub(r"[\s,，、;；]", "", answer.translate(_WIDE)).upper()
        if not letters or not set(letters) <= set(options) or len(set(letters)) < len(letters):
            where = _place(file, line, row, "answer")
            raise ValueError(f"{place}: {where}: answer is {answer!r}, expected some of {', '.join(options)}")
        return ExamQuestion(kind, text, "".join(sorted(letters)), place, group, options)
    if kind == "true_false" and answer not in ("对", "错"):
        raise ValueError(f"{place}: {_place(file, line, row, 'answer')}: answer is {answer!r}, expected 对 or 错")
    return ExamQuestion(kind, text, answer, place, group)


def _options(value: Any) -> dict[str, str]:
    """Options by letter, from an object, a list, or a text like "A.… B.…" on one line or several."""
    if isinstance(value, Mapping):
        pairs = [(str(letter).strip().upper(), text) for letter, text in value.items()]
        return {letter: str(text).strip() for letter, text in pairs if text not in (None, "")}
    if isinstance(value, list):
        if value and all(isinstance(one, Mapping) and one.keys() >= {"key", "value"} for one in value):  # CMExam's
            return _options({one["key"]: one["value"] for one in value})
        return dict(zip(_LETTERS, map(str, value), strict=False))
    text, found, at = str(value or ""), dict[str, tuple[int, int]](), 0
    plain = text.translate(_WIDE)
    for position, letter in enumerate(_LETTERS):  # in order, so that "vitamin D." inside an option begins none
        line = re.compile(rf"^\s*{letter}(?:\s*[.、:)]+|(?![A-Za-z]))\s*", re.IGNORECASE | re.MULTILINE)
        inside = re.compile(rf"(?<![A-Za-z]){letter}\s*[.、:)]+\s*")
        if match := line.search(plain, at) or inside.search(plain, at):
            found[letter], at = match.span(), match.end()
        elif len(found) < position:  # one letter may be missing, as in a sheet of PediaBench
            break
    ends = [*[start for start, _ in found.values()][1:], len(text)][: len(found)]
    return {letter: text[begin:end].strip() for (letter, (_, begin)), end in zip(found.items(), ends, strict=True)}


def _pairing(file: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> list[ExamQuestion]:
    """Groups of questions and shuffled answers; a group begins where the number of the question restarts."""
    groups: list[list[tuple[int, dict[str, Any]]]] = []
    before = 0
    for line, row in rows:
        number = int((re.findall(r"\d+", _text(file, line, row, "number")) or ["0"])[-1])
        if number <= before or not groups:
            groups.append([])
        groups[-1].append((line, row))
        before = number
    found = []
    for group in groups:
        texts = [_text(file, *one, "question") for one in group]
        answers = [_text(file, *one, "answer") for one in group]
        options = dict(zip(_LETTERS, (_text(file, *one, "disrupted") for one in group), strict=False))
        first, row = group[0]
        free, letters = dict(options), ""
        for answer, (line, one) in zip(answers, group, strict=True):
            letter = next((letter for letter, text in free.items() if _squeezed(text) == _squeezed(answer)), None)
            if letter is None:
                where = _place(file, line, one, "answer")
                raise ValueError(f"{file}:{line}: {where}: {answer!r} is not among the disrupted answers of its group")
            letters += letter
            del free[letter]
        text = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
        subject = str(_value(row, "group")[1] or "").strip()
        found.append(ExamQuestion("pairing", text, letters, f"{file}:{first}", subject, options))
    return found


def _squeezed(text: str) -> str:
    return re.sub(r"[\s\W]", "", text.translate(_WIDE)).lower()


@cache
def templates() -> dict[str, Any]:
    """templates/exam.toml."""
    return tomllib.loads(files("pedgpt.evaluation").joinpath("templates/exam.toml").read_text(encoding="utf-8"))


def as_questions(exam: Sequence[ExamQuestion]) -> list[Question]:
    """What a model is asked; the task of each is its kind's Chinese name."""
    several = any(one.kind == "choice" and not one.single for one in exam)
    found = []
    for one in exam:
        form = "single" if one.kind == "choice" and not several else one.kind
        options = "\n".join(f"{letter}. {text}" for letter, text in (one.options or {}).items())
        asked = templates()[form].format(text=one.text, options=options)
        found.append(Question((Message("user", asked),), one.answer, templates()["names"][one.kind]))
    return found


def read_answer(question: ExamQuestion, text: str) -> str | None:
    """The answer that a text gives, in the form of `ExamQuestion.answer`; None if it gives none, or more than one."""
    text = text.strip().translate(_WIDE)
    if question.kind == "true_false":
        return _read_truth(text)
    if question.kind == "pairing":
        return _read_pairs(question, text)
    letters = "".join(question.letters)
    bare = re.sub(r"[\s,、;和及.。()]", "", text).upper()
    if re.fullmatch(f"[{letters}]+", bare):
        said = {bare}
    else:
        run = rf"([{letters}](?:[\s,、;和及]*[{letters}])*+)(?![A-Za-z]|[\s\"”)]*[并都均]?(?:不|错|有误|是错|是不|或))"
        no = "".join(f"(?<!{word})" for word in ("不", "不应", "不能", "不可", "排除", "错误"))
        stated = rf"{no}(?:答案|选项?|选择)\s*(?:应?该?[是为选:]+)?\s*[\"“(]?\s*{run}"
        said = set(re.findall(stated, text.upper()))
        if not said and (opened := re.match(rf"([{letters}])\s*[.、:)](?!\s*[{letters}]\s*[.、:)])", text.upper())):
            others = re.findall(rf"(?m)^\s*([{letters}])\s*[.、:)]", text.upper())
            said = {opened[1]} if set(others) == {opened[1]} else set()
        said = {re.sub(r"[\s,、;和及]", "", one) for one in said}
    found = {"".join(sorted(set(one))) for one in said}
    return found.pop() if len(found) == 1 else None


def _read_truth(text: str) -> str | None:
    form = re.compile(
        r"(?:^|答案(?:是|为|:)?|说法(?:是)?|判断(?:为|:)?)\s*[\"“(]?"
        r"(不对|不正确|错误|错|正确|对|√|×)(?=的?(?:$|\W))(?!\?)"
    )
    found = {{"不对": "错", "不正确": "错"}.get(one, "对" if one in TRUE else "错") for one in form.findall(text)}
    return found.pop() if len(found) == 1 else None


def _read_pairs(question: ExamQuestion, text: str) -> str | None:
    """A letter for each question, "?" where the text gives none; None if it gives no pair, or contradicts itself."""
    found: dict[int, str] = {}
    for number, letter in re.findall(r"(\d+)\s*[-—–:.、)→]+\s*([A-Za-z])(?![A-Za-z])", text):
        if found.setdefault(int(number), letter.upper()) != letter.upper():
            return None
    return "".join(found.get(i, "?") for i in range(1, len(question.answer) + 1)) if found else None


def points(question: ExamQuestion, said: str | None) -> float:
    """The share of a question's points, 0 to 1: all or nothing, but a third for a pairing that is partly right."""
    if question.kind != "pairing" or said is None or said == question.answer:
        return float(said == question.answer)
    return 1 / 3 if any(a == b for a, b in zip(said, question.answer, strict=True)) else 0.0


def chance(question: ExamQuestion) -> float:
    """The share of points that guessing gives; 0 for texts."""
    if question.kind == "pairing":
        n = len(question.answer)
        none = sum((-1) ** k / math.factorial(k) for k in range(n + 1))  # of n in their places, by derangements
        return 1 / math.factorial(n) + (1 - 1 / math.factorial(n) - none) / 3
    if question.kind not in ("true_false", "choice"):
        return 0.0
    count = len(question.letters)
    return 1 / count if question.single else 1 / (2**count - 1)


def grade(exam: Sequence[ExamQuestion], texts: Sequence[str]) -> tuple[list[float | None], list[str]]:
    """(shares of points, the questions whose answer could not be read, with what was said).

    Essays and cases have None, because only a judge can grade them. An answer that cannot be read has no points.
    """
    shares: list[float | None] = []
    unread = []
    for number, (one, text) in enumerate(zip(exam, texts, strict=True), 1):
        if one.kind in POINTS:
            shares.append(None)
            continue
        said = read_answer(one, text)
        shares.append(points(one, said))
        if said is None:
            unread.append(f"question {number} ({one.place}): {text[:80]!r}")
    return shares, unread


def by_likelihood(model: Transformer, chat: ChatFormat, exam: Sequence[ExamQuestion], batch_size: int = 8) -> Any:
    """The score, as `summarize` gives it, if the most probable letter of each question counts as the answer.

    Only questions with one right letter count. "rotated" is the score with each option under the next letter, "stable"
    the share of choices in which the same option was taken both times, in per cent. Raises ValueError if none counts.
    """
    asked = [one for one in exam if one.single]
    if not asked:
        raise ValueError("no question has exactly one right letter, so none can be answered by likelihood")

    def choose(exam: Sequence[ExamQuestion]) -> tuple[list[str], list[float]]:
        letters = [one.letters for one in exam]
        histories = [question.history for question in as_questions(exam)]
        logps = option_logps(model, chat, list(zip(histories, letters, strict=True)), batch_size)
        best = [int(np.argmax(row)) for row in logps]
        shares = [math.exp(row[i] - np.logaddexp.reduce(row)) for row, i in zip(logps, best, strict=True)]
        return [options[i] for options, i in zip(letters, best, strict=True)], shares

    said, confidence = choose(asked)
    right = [points(one, letter) for one, letter in zip(asked, said, strict=True)]
    found = {**summarize(asked, right), "calibration": calibration(confidence, [share == 1 for share in right])}
    if choices := [(one, one.rotated(), letter) for one, letter in zip(asked, said, strict=True) if one.options]:
        again, _ = choose([moved for _, moved, _ in choices])
        taken = zip(choices, again, strict=True)
        stable = [(one.options or {})[first] == (moved.options or {})[then] for (one, moved, first), then in taken]
        rotated = [points(moved, letter) for (_, moved, _), letter in zip(choices, again, strict=True)]
        found |= {"rotated": summarize([moved for _, moved, _ in choices], rotated)["kinds"]["choice"]}
        found["stable"] = [100 * x for x in bootstrap(stable)]
    return found


def summarize(exam: Sequence[ExamQuestion], shares: Sequence[float | None], *, seed: int = 0) -> dict[str, Any]:
    """Scores in per cent by kind and by disease group, each [score, low, high], beside n and the chance level.

    `shares` are the shares of points, None for a question that was not graded. PediaBench's "total", also
    with its interval, is given if every kind was graded.
    """
    graded = [(one, share) for one, share in zip(exam, shares, strict=True) if share is not None]

    def columns(rows: Sequence[tuple[ExamQuestion, float]]) -> tuple[Any, list[str]]:
        """Per cent of the points, and what a question is: one that occurs twice is no new evidence."""
        return np.array([100 * share for _, share in rows]), [f"{one.text} {one.options}" for one, _ in rows]

    def score(chosen: Iterable[tuple[ExamQuestion, float]]) -> dict[str, Any]:
        rows = list(chosen)
        values, same = columns(rows)
        level = 100 * sum(chance(one) for one, _ in rows) / len(rows)
        interval = [float(x) for x in bootstrap(values, seed=seed, clusters=same)]
        return {"score": interval, "questions": len(rows), "chance": level}

    found: dict[str, Any] = {"kinds": {}, "groups": {}, "total": None}
    for name, key in (("kinds", lambda pair: pair[0].kind), ("groups", lambda pair: pair[0].group)):
        for value, rows in groupby(sorted(graded, key=key), key=key):
            if value:
                found[name][value] = score(rows)
    if found["kinds"].keys() == WEIGHTS.keys():
        total, draws = 0.0, np.zeros(1)
        for number, (kind, weight) in enumerate(WEIGHTS.items()):  # the kinds are drawn independently
            values, same = columns([pair for pair in graded if pair[0].kind == kind])
            total += weight / 100 * values.mean()
            draws = draws + weight / 100 * resampled_means(values, seed=seed + number, clusters=same)
        found["total"] = [float(x) for x in (total, *np.quantile(draws, LIMITS))]
    return found


def calibration(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> dict[str, Any]:
    """Expected calibration error in per cent, Σ n_b/n |accuracy_b − confidence_b| (Naeini et al. 2015), and the bins.

    `confidence` is the probability of the chosen option among all options.
    """
    at = np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)
    found, error = [], 0.0
    for number in np.unique(at):
        chosen = at == number
        mean, share = float(np.mean(np.asarray(confidence)[chosen])), float(np.mean(np.asarray(right)[chosen]))
        found.append({"questions": int(chosen.sum()), "confidence": mean, "accuracy": share})
        error += chosen.sum() / len(at) * abs(share - mean)
    return {"ece": 100 * error, "bins": found}
