"""Progressive instruction reconstruction of existing rows: judge, enrich, reorganise (PediatricsGPT, section 3.1).

Of a conversation of several turns the last answer alone is worked on, with the patient's turns as the question: its
other turns are context, and pass unchanged. No medical fact is added: the offline steps add where to turn to and mend
the form, and a teacher's answer that brings new numbers, or loses old ones, is refused and the previous version kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from pedgpt.corpus.builders.dialogues import NUMBER, evidence, whole_sentences, without_boilerplate, without_greeting
from pedgpt.corpus.rows import Ask, Built, LeftOut, Unusable, answered, builder, either, pattern, pick, templates
from pedgpt.data.records import Conversation

_CJK = "\u4e00-\u9fff"
_MARK = re.compile(r"(?<![\d.A-Za-z])(?:[（(](\d{1,2})[)）]、?|(\d{1,2})[、.．)）](?!\d)|([①-⑳])[、.]?)\s*")
_WIDE = {",": "，", ";": "；", ":": "：", "?": "？", "!": "！", ".": "。"}


@builder
def reconstruct(conversation: Conversation, ask: Ask | None = None) -> Built:
    """The row with its last answer judged, enriched and reorganised, or dropped as "judged unusable: ...".

    `details["versions"]` holds, for the judgement and each step that changed something, the answer before it and why;
    `details["refused"]`, if there, a teacher's answers that were not taken.
    """
    asked = "\n".join(message.content for message in conversation.messages if message.role == "user")
    answer = conversation.messages[-1].content
    score, unusable, reason = _judged(asked, answer, ask) if ask else _judge(asked, answer)
    reason = f"score {score:.1f}: {reason}"
    if unusable:
        raise LeftOut(f"judged unusable: {unusable}", f"{reason}: {answer[:60]}")
    versions, refused = [{"step": "judge", "answer": answer, "reason": reason}], []
    for step in ("enrich", "reorganise"):
        if ask:
            form, reason = _asked(step, asked, answer, ask, answer=str, reason=str)
            if fault := _fault(asked, answer, form):
                refused.append({"step": step, "answer": form, "reason": fault})
                form = answer
        elif step == "enrich":
            form, reason = _enrich(asked, answer)
        else:
            form, reason = reorganise(answer), templates("reconstruct")["reorganise"]["reason"]
        if form != answer:
            versions.append({"step": step, "answer": answer, "reason": reason})
            answer = form
    messages = (*conversation.messages[:-1], replace(conversation.messages[-1], content=answer))
    details = {"versions": versions} | ({"refused": refused} if refused else {})
    return Built(replace(conversation, messages=messages), details)


def _judge(asked: str, answer: str) -> tuple[float, str, str]:
    """(score, the phrase of its worst fault if it is below the threshold, all faults), by rules."""
    rules, said = templates("reconstruct")["judge"], reorganise(answer)
    bare = re.sub(rf"[^{_CJK}A-Za-z0-9]", "", without_greeting(said))
    found = {
        "terse": len(bare) < rules["terse"],
        "unrelated": not (_bigrams(asked) & _bigrams(answer) or set(bare) & evidence(asked)),
        "promotional": _has("promotional", answer),
        "referral": not _has("see_doctor_asked", asked) and _only_refers(said),
        "cut_off": _cut_off(answer),
        "rude": _has("rude", answer),
    }
    faults = [rules["faults"][name] for name, is_so in found.items() if is_so]
    score = 1 - sum(fault["share"] for fault in faults)
    worst = max(faults, key=lambda fault: fault["share"])["phrase"] if score < rules["threshold"] else ""
    return score, worst, ", ".join(fault["phrase"] for fault in faults) or "no fault"


def _has(words: str, text: str) -> bool:
    """Whether a text has some of these words of templates/reconstruct.toml."""
    return bool(pattern("reconstruct", words).search(text))


def _judged(asked: str, answer: str, ask: Ask) -> tuple[float, str, str]:
    score, reason = _asked("judge", asked, answer, ask, score=int, reason=str)
    if not 1 <= score <= 5:
        raise Unusable(f"judged {score!r}, expected a whole number from 1 to 5")
    return score, "by the teacher" if score < templates("reconstruct")["teacher"]["judge"]["lowest"] else "", reason


def _asked(step: str, asked: str, before: str, ask: Ask, **fields: type) -> Iterable[Any]:
    """The fields of a teacher's answer, in order."""
    prompts = templates("reconstruct")["teacher"][step]
    return answered(ask, prompts, fields, question=asked, answer=before).values()


def _fault(asked: str, before: str, after: str) -> str:
    """Why a teacher's version is refused, or ""."""
    old, new = _numbers(before), _numbers(after)
    if old - new:
        return f"loses the number {min(old - new)}"
    if new - old - _numbers(asked):
        return f"adds the number {min(new - old - _numbers(asked))}"
    if len(after) < len(before) / 2:
        return "loses more than half of the answer"
    return ""


def _numbers(text: str) -> set[str]:
    return set(NUMBER.findall(re.sub(r"(?m)^\s*\d{1,2}[.、](?!\d)\s*", "", "\n".join(_items(text)))))


def _enrich(asked: str, answer: str) -> tuple[str, str]:
    if not _has("treatment", asked) or _has("sees_doctor", answer):
        return answer, ""
    forms = templates("reconstruct")["enrich"]
    names = ["ask_about_drugs", "see_doctor"] if _has("names_drug", answer) else ["see_doctor"]
    added = "".join(pick(forms[name], asked) for name in names)
    return f"{_ended(answer)}\n{added}", "; ".join(forms[f"{name}_reason"] for name in names)


def reorganise(answer: str) -> str:
    """The answer in paragraphs and numbered lines, without headings, greetings, boilerplate and repeated sentences."""
    for _ in range(4):  # what one pass mends may show the next one a heading
        answer, before = _reorganised(answer), answer
        if answer == before:
            break
    return answer


def _reorganised(answer: str) -> str:
    paragraphs: list[str] = []
    seen: set[str] = set()
    for prefix, section in _sections(answer):
        lines = [line for text in _items(section) if (line := _clean(text, seen))]
        if lines and prefix and paragraphs and not re.match("建议|\\d", lines[0]):
            lines[0] = prefix + lines[0]
        paragraphs += lines
    return "\n".join(_ended_lines(paragraphs))


def _sections(answer: str) -> Iterator[tuple[str, str]]:
    """(what to put before it, text) of each part of an answer under forum headings."""
    forms = templates("reconstruct")["reorganise"]
    parts = _heading().split(re.sub(r"[\u3000\xa0\t ]+", " ", answer))
    yield "", parts[0]
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        prefix = f"{heading}：" if heading in forms["other"] else ""
        if heading in forms["advice"]:
            prefix = forms["advice_prefix"]
        elif heading in forms["inquiry"] and re.search("[？?]|吗|呢", text):
            prefix = forms["inquiry_prefix"]
        yield prefix, text


@cache
def _heading() -> re.Pattern[str]:
    forms = templates("reconstruct")["reorganise"]
    headings = {*forms["analysis"], *forms["advice"], *forms["inquiry"], *forms["other"]}
    short = rf"(?:^|(?<=[\s。！？!?，,；;]))(?:{'|'.join(forms['short'])})"
    return re.compile(rf"({either(headings - set(forms['short']))}|{short})\s*[：:]\s*")


def _items(text: str) -> list[str]:
    """A text's lines, with each item of an enumeration (1、 2、 …, from 1 on, at least two) on its own line."""
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
    return [line.strip() for line in lines if line.strip()]


def _clean(text: str, seen: set[str]) -> str:
    mark = re.match(r"\d{1,2}\. ", text)
    head, body = (mark[0], text[mark.end() :]) if mark else ("", text)
    body = re.sub("^[你您]好(?![转起像些了多的好吃奇])", "", without_greeting(_punctuated(body)))
    body = without_boilerplate(body)
    kept = []
    for sentence in map(without_greeting, whole_sentences(body)):
        key = sentence.strip(" 。！？!?，,")
        if len(key) < 8 or key not in seen:
            kept.append(sentence)
        seen.add(key)
    body = "".join(kept).strip(" ，,、；;")
    return head + body if body else ""


def _punctuated(text: str) -> str:
    """Full-width marks between Chinese words, none twice, none at the start, no spaces between Chinese words."""
    text = re.sub(rf"(?<=[{_CJK}”）)])\s*([,;:?!.])(?=\s*(?:[{_CJK}“（(]|$))", lambda m: _WIDE[m[1]], text)
    text = re.sub(rf"(?<=[{_CJK}]),(?=\d)", "，", text)
    text = re.sub(rf"(?<=[{_CJK}]{{4}}) +(?=(?:祝|希望|望|谢谢|感谢|以上|建议)[{_CJK}])", "，", text)
    if len(re.findall("[，。！？；、,.]", text)) * 20 < len(text):  # spaces stand for the marks that are not there
        text = re.sub(rf"(?<=[{_CJK}]{{4}}) +(?=[{_CJK}]{{4}})", "，", text)
    text = re.sub(rf"(?<=[{_CJK}，。！？；：、》”]) +(?=[{_CJK}，。！？；：、《“])", "", text)
    text = re.sub(r"([。！？、；：])\1+", r"\1", re.sub("[，,]{2,}", "，", text))
    text = re.sub("[，,]*([。！？；：])[，,。；.]*", r"\1", text)
    return text.strip().lstrip("，,。.、；;：:！!？?>")


def _ended_lines(lines: Sequence[str]) -> list[str]:
    """Lines that end as sentences do; the answer's last clause goes if it stops in the middle."""
    ended = list(lines)
    if ended and _cut_off(ended[-1]):
        whole, _, rest = ended[-1].rpartition("，")
        stop = max(ended[-1].rfind(mark) for mark in "。！？；")
        shorter = whole if len(whole) > stop else ended[-1][: stop + 1]
        ended[-1] = shorter if len(shorter) >= 8 and not NUMBER.search(ended[-1][len(shorter) :]) else ended[-1]
    return [_ended(line) for line in ended]


def _ended(text: str) -> str:
    text = text.rstrip("，,、；;. ")
    return text if not text or text[-1] in "。！？!?：…" else text + "。"


def _cut_off(answer: str) -> bool:
    text = answer.strip()
    return bool(text) and text[-1] not in "。！？!?.…" and _has("dangling", text)


def _only_refers(answer: str) -> bool:
    refers = pattern("reconstruct", "referral").fullmatch
    said = [sentence.strip("，,。！？!? ") for sentence in whole_sentences(answer)]
    return bool(said) and all(not s or (len(s) <= 60 and refers(s)) for s in said)


def _bigrams(text: str) -> set[str]:
    runs = re.findall(rf"[{_CJK}]+|[A-Za-z0-9]+", pattern("reconstruct", "common").sub(" ", text))
    pairs = {run[i : i + 2].lower() for run in runs for i in range(len(run) - 1)}
    return pairs | {run.lower() for run in runs if run.isascii()}
