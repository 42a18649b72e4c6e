"""Progressive instruction reconstruction of existing rows: judge, enrich, reorganise (PediatricsGPT, section 3.1).

Of a conversation of several turns the last answer alone is worked on, with the patient's turns as the question: its
other turns are context, and pass unchanged. No medical fact is added: the offline steps add where to turn to and mend
the form, and a teacher's answer that brings new numbers, or loses old ones, is refused and the previous version kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from pedgpt.corpus.builders.dialogues import NUMBER, evidence, whole_sentences, without_boilerplate, without_greeting
from pedgpt.corpus.rows import Ask, Built, Dropped, Unusable, pick, templates
from pedgpt.data.records import Conversation

_CJK = "\u4e00-\u9fff"
_MARK = re.compile(r"(?<![\d.A-Za-z])(?:[（(](\d{1,2})[)）]、?|(\d{1,2})[、.．)）](?!\d)|([①-⑳])[、.]?)\s*")
_WIDE = {",": "，", ";": "；", ":": "：", "?": "？", "!": "！", ".": "。"}


def reconstruct(conversation: Conversation, ask: Ask | None = None) -> Iterator[Built | Dropped]:
    """The row with its last answer judged, enriched and reorganised, or dropped as "judged unusable: ...".

    `details["versions"]` holds, for the judgement and each step that changed something, the answer before it and why;
    `details["refused"]`, if there, a teacher's answers that were not taken.
    """
    asked = "\n".join(message.content for message in conversation.messages if message.role == "user")
    answer = conversation.messages[-1].content
    versions: list[dict[str, str]] = []
    refused: list[dict[str, str]] = []
    try:
        score, phrases, reason = _judge(asked, answer) if ask is None else _judged(asked, answer, ask)
        versions.append({"step": "judge", "answer": answer, "reason": f"score {score:.1f}: {reason}"})
        if phrases:
            reasons = f"judged unusable: {phrases}"
            yield Dropped(conversation.source, reasons, f"{versions[-1]['reason']}: {answer[:60]}")
            return
        for step in ("enrich", "reorganise"):
            if ask is None and step == "enrich":
                form, reason = _enrich(asked, answer)
            elif ask is None:
                form, reason = reorganise(answer), templates("reconstruct")["reorganise"]["reason"]
            else:
                form, reason = _said(step, asked, answer, ask)
                if fault := _fault(asked, answer, form):
                    refused.append({"step": step, "answer": form, "reason": fault})
                    form = answer
            if form != answer:
                versions.append({"step": step, "answer": answer, "reason": reason})
                answer = form
    except Unusable as error:
        yield Dropped(conversation.source, "teacher's answer was unusable", str(error)[:80])
        return
    messages = (*conversation.messages[:-1], replace(conversation.messages[-1], content=answer))
    details = {"versions": versions} | ({"refused": refused} if refused else {})
    yield Built(replace(conversation, messages=messages), details)


def _judge(asked: str, answer: str) -> tuple[float, str, str]:
    """(score, the phrase of its worst fault if it is below the threshold, all faults), by rules."""
    words, rules = _patterns(), templates("reconstruct")["judge"]
    said = reorganise(answer)
    bare = re.sub(rf"[^{_CJK}A-Za-z0-9]", "", without_greeting(said))
    found = {
        "terse": len(bare) < rules["terse"],
        "unrelated": not (_bigrams(asked) & _bigrams(answer) or set(bare) & evidence(asked)),
        "promotional": bool(words["promotional"].search(answer)),
        "referral": not words["see_doctor_asked"].search(asked) and _only_refers(said),
        "cut_off": _cut_off(answer),
        "rude": bool(words["rude"].search(answer)),
    }
    faults = [rules["faults"][name] for name, is_so in found.items() if is_so]
    score = 1 - sum(fault["share"] for fault in faults)
    worst = max(faults, key=lambda fault: fault["share"])["phrase"] if score < rules["threshold"] else ""
    return score, worst, ", ".join(fault["phrase"] for fault in faults) or "no fault"


def _judged(asked: str, answer: str, ask: Ask) -> tuple[float, str, str]:
    reply = _reply("judge", asked, answer, ask, {"score": int, "reason": str})
    score, reason = reply.get("score"), reply.get("reason")
    if type(score) is not int or not 1 <= score <= 5 or not isinstance(reason, str):
        raise Unusable(f"judged {score!r}, expected a whole number from 1 to 5 and a reason")
    return score, "by the teacher" if score < templates("reconstruct")["teacher"]["judge"]["lowest"] else "", reason


def _said(step: str, asked: str, answer: str, ask: Ask) -> tuple[str, str]:
    reply = _reply(step, asked, answer, ask, {"answer": str, "reason": str})
    if not isinstance(form := reply.get("answer"), str) or not form.strip():
        raise Unusable(f"answer is {form!r}, expected a text")
    return form.strip(), str(reply.get("reason", ""))


def _reply(step: str, asked: str, answer: str, ask: Ask, fields: dict[str, type]) -> dict[str, Any]:
    prompts = templates("reconstruct")["teacher"][step]
    return ask(prompts["system"], prompts["user"].format(question=asked, answer=answer), fields)


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
    forms, words = templates("reconstruct")["enrich"], _patterns()
    if not words["treatment"].search(asked) or words["sees_doctor"].search(answer):
        return answer, ""
    added, reasons = [], []
    for name, wanted in (("ask_about_drugs", words["names_drug"].search(answer)), ("see_doctor", True)):
        if wanted:
            added.append(pick(forms[name], asked))
            reasons.append(forms[f"{name}_reason"])
    return f"{_ended(answer)}\n{''.join(added)}", "; ".join(reasons)


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
    parts = _patterns()["heading"].split(re.sub(r"[\u3000\xa0\t ]+", " ", answer))
    yield "", parts[0]
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        if heading in forms["advice"]:
            yield forms["advice_prefix"], text
        elif heading in forms["inquiry"]:
            yield (forms["inquiry_prefix"] if re.search("[？?]|吗|呢", text) else ""), text
        else:
            yield (f"{heading}：" if heading in forms["other"] else ""), text


def _items(text: str) -> list[str]:
    """A text's lines, with each item of an enumeration (1、 2、 …, from 1 on, at least two) on its own line."""
    lines = []
    for line in text.split("\n"):
        marks = [(m, int(m[1] or m[2] or ord(m[3]) - ord("①") + 1)) for m in _MARK.finditer(line)]
        chosen: list[tuple[re.Match[str], int]] = []
        last_second = max((i for i, (_, number) in enumerate(marks) if number == 2), default=0)
        for i, (mark, number) in enumerate(marks):
            follows = bool(chosen) and number == chosen[-1][1] + 1
            opens = number == 1 and i < last_second
            if follows or opens:
                chosen.append((mark, number))
        start, head = 0, ""
        for mark, number in chosen:
            lines.append(head + line[start : mark.start()])
            start, head = mark.end(), f"{number}. "
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
    return bool(text) and text[-1] not in "。！？!?.…" and bool(_patterns()["dangling_end"].search(text))


def _only_refers(answer: str) -> bool:
    said = [sentence.strip("，,。！？!? ") for sentence in whole_sentences(answer)]
    return bool(said) and all(not s or (len(s) <= 60 and _patterns()["referral"].fullmatch(s)) for s in said)


def _bigrams(text: str) -> set[str]:
    runs = re.findall(rf"[{_CJK}]+|[A-Za-z0-9]+", _patterns()["common"].sub(" ", text))
    pairs = {run[i : i + 2].lower() for run in runs for i in range(len(run) - 1)}
    return pairs | {run.lower() for run in runs if run.isascii()}


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    words, forms = templates("reconstruct")["words"], templates("reconstruct")["reorganise"]
    names = ("promotional", "rude", "referral", "treatment", "sees_doctor", "names_drug", "common")
    headings = {*forms["analysis"], *forms["advice"], *forms["inquiry"], *forms["other"]}
    long = "|".join(sorted(headings - set(forms["short"]), key=lambda heading: (-len(heading), heading)))
    short = rf"(?:^|(?<=[\s。！？!?，,；;]))(?:{'|'.join(forms['short'])})"
    return {
        **{name: re.compile(words[name]) for name in names},
        "see_doctor_asked": re.compile("哪个科|什么科|挂号|哪家医院|什么医院|看医生|去医院|就诊"),
        "heading": re.compile(rf"({long}|{short})\s*[：:]\s*"),
        "dangling_end": re.compile(words["dangling"] + "$"),
    }
