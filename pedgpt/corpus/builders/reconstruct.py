"""Progressive instruction reconstruction of existing rows: judge, enrich, reorganise (PediatricsGPT, section 3.1).

Of a conversation of several turns the last answer alone is worked on, with the patient's turns as the question: its
other turns are context, and pass unchanged. No medical fact is added: the offline steps add where to turn to and mend
the form, and a teacher's answer that brings new numbers, or loses old ones, is refused and the previous version kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pedgpt.corpus.builders.dialogues import NUMBER, whole_sentences, without_boilerplate, without_greeting
from pedgpt.corpus.rows import Ask, Built, LeftOut, answered, builder, either, pattern, pick, rewritten, templates
from pedgpt.data.records import Conversation
from pedgpt.endpoint import Unusable

_FORMS = templates("reconstruct")
_PREFIXES = {heading: prefix for prefix, headings in _FORMS["headings"].items() for heading in headings}
_HEADING = re.compile(
    rf"({either(_PREFIXES.keys() - set(_FORMS['short']))}"
    rf"|(?:^|(?<=[\s。！？!?，,；;]))(?:{'|'.join(_FORMS['short'])}))\s*[：:]\s*"
)
_CJK = "\u4e00-\u9fff"
_MARK = re.compile(r"(?<![\d.A-Za-z])(?:[（(](\d{1,2})[)）]、?|(\d{1,2})[、.．)）](?!\d)|([①-⑳])[、.]?)\s*")
_NARROW = re.compile(rf"(?<=[{_CJK}”）)])\s*([,;:?!.])(?=\s*(?:[{_CJK}“（(]|$))")
_WIDE = str.maketrans(",;:?!.", "，；：？！。")


@builder
def reconstruct(conversation: Conversation, ask: Ask | None = None) -> Built:
    """The row with its last answer judged, enriched and reorganised, or dropped as "judged unusable: ...".

    `details["versions"]` holds, for the judgement and each step that changed something, the answer before it and why;
    `details["refused"]`, if there, a teacher's answers that were not taken.
    """
    question = "\n".join(message.content for message in conversation.messages if message.role == "user")
    *context, last = conversation.messages
    answer, refused = last.content, []
    versions = [{"step": "judge", "answer": answer, "reason": _judged(question, answer, ask)}]
    for step in ("enrich", "reorganise"):
        if ask:
            form, reason = _asked(step, question, answer, ask, answer=str, reason=str)
        elif step == "enrich":
            form, reason = _enrich(question, answer)
        else:
            form, reason = reorganise(answer), "forum headings, boilerplate, lists and punctuation put in order"
        if fault := _fault(question, answer, form) if ask else "":
            refused.append({"step": step, "answer": form, "reason": fault})
        elif form != answer:
            versions.append({"step": step, "answer": answer, "reason": reason})
            answer = form
    details = {"versions": versions} | ({"refused": refused} if refused else {})
    return Built(replace(conversation, messages=(*context, replace(last, content=answer))), details)


def _asked(step: str, question: str, before: str, ask: Ask, **fields: type) -> Iterable[Any]:
    """The fields of a teacher's answer, in order."""
    return answered(ask, _FORMS["teacher"][step], fields, question=question, answer=before).values()


def _judged(question: str, answer: str, ask: Ask | None) -> str:
    """The score of the answer and why; left out if it is too low."""
    if ask:
        score, reason = _asked("judge", question, answer, ask, score=int, reason=str)
        if not 1 <= score <= 5:
            raise Unusable(f"judged {score!r}, expected a whole number from 1 to 5")
        if score < _FORMS["teacher"]["judge"]["lowest"]:
            raise LeftOut("judged unusable: by the teacher", f"score {score}: {reason}: {answer[:60]}")
        return f"score {score}: {reason}"
    said = reorganise(answer)
    sentences = [sentence.strip("，,。！？!? ") for sentence in whole_sentences(said)]
    refers = all(not s or (len(s) <= 60 and pattern("reconstruct", "referral").fullmatch(s)) for s in sentences)
    faults = {
        "too terse": len(re.sub(r"[\W_]", "", without_greeting(said))) < _FORMS["terse"],
        "promotional": _has("promotional", answer),
        "only refers to a doctor": refers and not _has("see_doctor_asked", question),
        "rude": _has("rude", answer),
    }
    if fault := next((fault for fault, found in faults.items() if found), ""):
        raise LeftOut(f"judged unusable: {fault}", answer[:60])
    return "no fault"


def _has(words: str, text: str) -> bool:
    """Whether a text has some of these words of templates/reconstruct.toml."""
    return bool(pattern("reconstruct", words).search(text))


def _fault(question: str, before: str, after: str) -> str:
    """Why a teacher's version is refused, or ""."""
    asked, old, new = map(_numbers, (question, before, after))
    if lost := old - new:
        return f"loses the number {min(lost)}"
    if added := new - old - asked:
        return f"adds the number {min(added)}"
    return "loses more than half of the answer" if len(after) < len(before) / 2 else ""


def _numbers(text: str) -> set[str]:
    """The numbers of a text, those of its lists left out."""
    return set(NUMBER.findall("\n".join(re.sub(r"^\d{1,2}[.、](?!\d)", "", body) for _, body in _items(text))))


def _enrich(question: str, answer: str) -> tuple[str, str]:
    if not _has("treatment", question) or _has("sees_doctor", answer):
        return answer, ""
    forms = _FORMS["enrich"]
    names = ["ask_about_drugs", "see_doctor"] if _has("names_drug", answer) else ["see_doctor"]
    added = "".join(pick(forms[name], question) for name in names)
    return f"{_ended(answer)}\n{added}", "; ".join(forms[f"{name}_reason"] for name in names)


def reorganise(answer: str) -> str:
    """The answer in paragraphs and numbered lines, without headings, greetings and boilerplate."""
    lines: list[str] = []
    _, *rest = parts = _HEADING.split(re.sub(r"[\u3000\xa0\t ]+", " ", answer))
    for heading, section in zip(["", *rest[::2]], parts[::2], strict=True):
        found = [head + body for head, text in _items(section) if (body := _clean(text))]
        if found and lines and not re.match("建议|\\d", found[0]):
            found[0] = _PREFIXES.get(heading, "") + found[0]
        lines += found
    return "\n".join(map(_ended, lines))


def _items(text: str) -> list[tuple[str, str]]:
    """(its number or "", its text) of each line and of each item of an enumeration (1、 2、 …, at least two)."""
    lines = []
    for line in text.split("\n"):
        marks = [(m, int(m[1] or m[2] or ord(m[3]) - ord("①") + 1)) for m in _MARK.finditer(line)]
        last_second = max((i for i, (_, number) in enumerate(marks) if number == 2), default=0)
        start, head, last = 0, "", 0
        for i, (mark, number) in enumerate(marks):
            if (last and number == last + 1) or (number == 1 and i < last_second):
                lines.append(head + line[start : mark.start()])
                start, head, last = mark.end(), f"{number}. ", number
        lines.append(head + line[start:])
    return re.findall(r"(?m)^[^\S\n]*(\d{1,2}\. |)(.*\S)", "\n".join(lines))


def _clean(text: str) -> str:
    """A line or an item without greetings and boilerplate, with full-width marks between Chinese words."""
    text = _NARROW.sub(lambda mark: mark[1].translate(_WIDE), text)
    text = rewritten(text, _FORMS["punctuation"]).strip().lstrip("，,。.、；;：:！!？?>")
    body = re.sub("^[你您]好(?![转起像些了多的好吃奇])", "", without_greeting(text))
    return without_greeting(without_boilerplate(body)).strip(" ，,、；;")


def _ended(text: str) -> str:
    text = text.rstrip("，,、；;. ")
    return text if not text or text[-1] in "。！？!?：…" else text + "。"
