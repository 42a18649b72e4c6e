"""Exams: reading them, the answer that a text gives, the likelihood of options, and the score with its intervals.

PediaBench's sheets, the JSON of CMB and CMExam, and any table or JSON with question, options and answer are read, from
the user's own copy. PediaBench's total weights the kinds of questions; it also weights single questions by how many
other models answered them, which its files do not hold, so that is left out here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pedgpt.data.chat import ChatFormat
from pedgpt.data.records import Message
from pedgpt.data.tables import Unfit, files_of, format_of, read_rows
from pedgpt.evaluation.agreement import bootstrap, ratio
from pedgpt.evaluation.likelihood import option_logps
from pedgpt.evaluation.responses import Question, template
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


@dataclass(frozen=True)
class _Row:
    """A row of a file, its cells by the names of their columns in small letters."""

    file: Path
    line: int
    cells: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    def get(self, field: str) -> Any:
        return next((value for name, value in self.cells.items() if name in NAMES[field]), None)

    def text(self, field: str) -> str:
        """A field that may not be empty; of a list, such as several letters, all of it."""
        value = self.get(field)
        parts = value if isinstance(value, list) else [value]
        text = "".join("" if part is None else str(part) for part in parts).strip()
        if not text:
            found = "empty" if self.cells.keys() & {*NAMES[field]} else f"found columns {', '.join(self.cells)}"
            raise self.unfit(field, f"{found}, expected {NAMES[field][0]}; fill it in or delete the row")
        return text

    def unfit(self, field: str, told: str) -> ValueError:
        """What is wrong with a field, which a workbook calls "cell C7"."""
        position = next((i for i, name in enumerate(self.cells) if name in NAMES[field]), 26)
        cell = format_of(self.file) == ".xlsx" and position < 26
        return ValueError(f"{self.place}: {f'cell {_LETTERS[position]}{self.line}' if cell else field}: {told}")


def read_exam(path: str | Path) -> list[ExamQuestion]:
    """The questions of a file, or of all files in a folder; ValueError names the place of what is not understood."""
    found: list[ExamQuestion] = []
    for file in files_of(path):
        rows = []
        for line, row in read_rows(file):
            if not str(line).isdecimal():
                break  # "sheet:line" of a workbook's further sheets
            if not isinstance(row, dict):
                raise ValueError(f"{file}:{line}: {row if isinstance(row, Unfit) else 'expected an object'}")
            if any(value not in (None, "") for value in row.values()):
                rows.append(_Row(file, int(line), {str(name).strip().lower(): value for name, value in row.items()}))
        kind = _kind_of(file, rows)
        found += _pairing(rows) if kind == "pairing" else [_question(row, kind) for row in rows]
    if not found:
        raise ValueError(f"{path}: holds no questions")
    return found


def _kind_of(file: Path, rows: Sequence[_Row]) -> str:
    """The kind of a file's questions, by its columns, its answers and, for essays and cases, its name."""
    columns = {name for row in rows for name in row.cells}
    if columns & {*NAMES["disrupted"]}:
        return "pairing"
    if columns & {*NAMES["options"]}:
        return "choice"
    answers = [str(row.get("answer")).strip() in ("对", "错") for row in rows]
    if sum(answers) > len(answers) / 2:  # a mistake in one of them is refused later, with its place
        return "true_false"
    return "case" if re.search("case|病例", file.name, re.IGNORECASE) else "essay"


def _question(row: _Row, kind: str) -> ExamQuestion:
    text, answer, group = row.text("question"), row.text("answer"), str(row.get("group") or "").strip()
    if kind == "choice":
        options = _options(row.get("options"))
        if len(options) < 2:
            raise row.unfit("options", f"found {len(options)} options, expected A.… B.… and so on")
        letters = re.sub(r"[\s,，、;；]", "", answer.translate(_WIDE)).upper()
        if not letters or not set(letters) <= set(options) or len(set(letters)) < len(letters):
            raise row.unfit("answer", f"answer is {answer!r}, expected some of {', '.join(options)}")
        return ExamQuestion(kind, text, "".join(sorted(letters)), row.place, group, options)
    if kind == "true_false" and answer not in ("对", "错"):
        raise row.unfit("answer", f"answer is {answer!r}, expected 对 or 错")
    return ExamQuestion(kind, text, answer, row.place, group)


def _options(value: Any) -> dict[str, str]:
    """Options by letter, from an object, a list, or a text like "A.… B.…" on one line or several."""
    if isinstance(value, list) and all(isinstance(one, Mapping) and one.keys() >= {"key", "value"} for one in value):
        value = {one["key"]: one["value"] for one in value}  # CMExam's
    elif isinstance(value, list):
        value = dict(zip(_LETTERS, value, strict=False))
    if isinstance(value, Mapping):
        pairs = ((str(letter).strip().upper(), text) for letter, text in value.items())
        return {letter: str(text).strip() for letter, text in pairs if text not in (None, "")}
    text, found, at = str(value or ""), dict[str, tuple[int, int]](), 0
    plain = text.translate(_WIDE)
    for position, letter in enumerate(_LETTERS):  # in order, so that "vitamin D." inside an option begins none
        line = re.compile(rf"^\s*{letter}(?:\s*[.、:)]+|(?![A-Za-z]))\s*", re.IGNORECASE | re.MULTILINE)
        inside = re.compile(rf"(?<![A-Za-z]){letter}\s*[.、:)]+\s*")
        if match := line.search(plain, at) or inside.search(plain, at):
            found[letter], at = match.span(), match.end()
        elif len(found) < position:  # one letter may be missing, as in a sheet of PediaBench
            break
    ends = [*[start for start, _ in found.values()][1:], len(text)]
    return {letter: text[begin:end].strip() for (letter, (_, begin)), end in zip(found.items(), ends, strict=False)}


def _pairing(rows: Sequence[_Row]) -> list[ExamQuestion]:
    """Groups of questions and shuffled answers; a group begins where the number of the question restarts."""
    groups: list[list[_Row]] = []
    before = 0
    for row in rows:
        number = int((re.findall(r"\d+", row.text("number")) or ["0"])[-1])
        if number <= before or not groups:
            groups.append([])
        groups[-1].append(row)
        before = number
    found = []
    for group in groups:
        options = dict(zip(_LETTERS, (row.text("disrupted") for row in group), strict=False))
        free, letters = {letter: _squeezed(text) for letter, text in options.items()}, ""
        for row in group:
            answer = row.text("answer")
            same = [letter for letter, text in free.items() if text == _squeezed(answer)]
            if not same:
                raise row.unfit("answer", f"{answer!r} is not among the disrupted answers of its group")
            letters += same[0]
            del free[same[0]]
        text = "\n".join(f"{number}. {row.text('question')}" for number, row in enumerate(group, 1))
        subject = str(group[0].get("group") or "").strip()
        found.append(ExamQuestion("pairing", text, letters, group[0].place, subject, options))
    return found


def _squeezed(text: str) -> str:
    return re.sub(r"[\s\W]", "", text.translate(_WIDE)).lower()


def as_questions(exam: Sequence[ExamQuestion]) -> list[Question]:
    """What a model is asked; the task of each is its kind's Chinese name."""
    several = any(one.kind == "choice" and not one.single for one in exam)
    found, forms = [], template("exam")
    for one in exam:
        form = "single" if one.kind == "choice" and not several else one.kind
        options = "\n".join(f"{letter}. {text}" for letter, text in (one.options or {}).items())
        asked = forms[form].format(text=one.text, options=options)
        found.append(Question((Message("user", asked),), one.answer, forms["names"][one.kind]))
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
        histories = [(asked.history, one.letters) for asked, one in zip(as_questions(exam), exam, strict=True)]
        logps = [np.array(row) for row in option_logps(model, chat, histories, batch_size)]
        said = [one.letters[row.argmax()] for one, row in zip(exam, logps, strict=True)]
        return said, [float(np.exp(row.max() - np.logaddexp.reduce(row))) for row in logps]

    said, confidence = choose(asked)
    right = [points(one, letter) for one, letter in zip(asked, said, strict=True)]
    found = {**summarize(asked, right), "calibration": calibration(confidence, right)}
    if choices := [(one, letter) for one, letter in zip(asked, said, strict=True) if one.options]:
        moved = [one.rotated() for one, _ in choices]
        again, _ = choose(moved)
        rotated = [points(one, letter) for one, letter in zip(moved, again, strict=True)]
        pairs = zip(choices, moved, again, strict=True)
        same = [(one.options or {})[first] == (other.options or {})[then] for (one, first), other, then in pairs]
        found |= {"rotated": summarize(moved, rotated)["kinds"]["choice"]}
        found["stable"] = bootstrap([100 * one for one in same])
    return found


def summarize(exam: Sequence[ExamQuestion], shares: Sequence[float | None], *, seed: int = 0) -> dict[str, Any]:
    """Scores in per cent by kind and by disease group, each [score, low, high], beside n and the chance level.

    `shares` are the shares of points, None for a question that was not graded. PediaBench's "total", also
    with its interval, is given if every kind was graded. A question that occurs twice is no new evidence.
    """
    graded = [i for i, share in enumerate(shares) if share is not None]
    values = 100 * np.array([shares[i] for i in graded], dtype=float)
    same = np.array([f"{exam[i].text} {exam[i].options}" for i in graded])
    levels = 100 * np.array([chance(exam[i]) for i in graded])
    found: dict[str, Any] = {"kinds": {}, "groups": {}, "total": None}
    for part in ("kind", "group"):
        names = np.array([getattr(exam[i], part) for i in graded])
        for name in sorted({*names.tolist()} - {""}):
            these = names == name
            score = bootstrap(values[these], same[these], seed=seed)
            about = {"score": score, "questions": int(these.sum()), "chance": float(levels[these].mean())}
            found[f"{part}s"][name] = about
    if found["kinds"].keys() == WEIGHTS.keys():
        kinds = np.array([[exam[i].kind == kind for kind in WEIGHTS] for i in graded])
        weight = np.array([*WEIGHTS.values()]) / 100
        rows = np.stack([kinds * values[:, None], kinds], -1)
        found["total"] = bootstrap(rows, same, statistic=lambda rows, times: ratio(rows, times) @ weight, seed=seed)
    return found


def calibration(confidence: Sequence[float], right: Sequence[float], bins: int = 10) -> dict[str, Any]:
    """Expected calibration error in per cent, Σ n_b/n |accuracy_b − confidence_b| (Naeini et al. 2015), and the bins.

    `confidence` is the probability of the chosen option among all options.
    """
    sure, hits = np.array(confidence), np.array(right, dtype=float)
    at = np.minimum((sure * bins).astype(int), bins - 1)
    found, error = [], 0.0
    for chosen in (at == number for number in np.unique(at)):
        mean, share = float(sure[chosen].mean()), float(hits[chosen].mean())
        found.append({"questions": int(chosen.sum()), "confidence": mean, "accuracy": share})
        error += 100 * chosen.mean() * abs(share - mean)
    return {"ece": error, "bins": found}
