"""Doctor-patient dialogues as EviDiag rows: courtesies and boilerplate cut, terse doctor turns completed.

Evidence is never touched: a clause with a symptom, a finding, an examination, a diagnosis, a drug or a digit stays as
it was written. What counts as evidence, as courtesy and as boilerplate says templates/dialogues.toml.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

from pedgpt.corpus.rows import Ask, Built, LeftOut, answered, builder, either, pattern, templates
from pedgpt.data.records import Conversation, Message
from pedgpt.data.tasks import EVIDIAG

NUMBER = re.compile(r"\d+(?:\.\d+)?")
# The sentences of a text as written, up to 。！？ or a line's end, not up to ； as sections.sentences has them.
whole_sentences = re.compile(r"[^。！？!?\n]*[。！？!?]+[”’」』）)]*|[^。！？!?\n]+").findall
_CLAUSE = re.compile(r"[^，,]+[，,]?")
_LONGEST = 60  # characters of a courtesy; it also keeps the time of the patterns below linear in the text
_EDGES = " \t\u3000，,。.！!？?；;：:~～…"
_ASKING = re.compile(r"[？?]|吗|呢|么[。！]?$|什么|怎么|如何|多少|能不能|是不是|有没有")


@builder
def evidiag_dialogue(conversation: Conversation, ask: Ask | None = None) -> Built:
    """The dialogue without courtesies and with terse doctor turns completed, by the teacher or by template.

    Two turns of the patient or more: EviDiag. Fewer: task "", for the caller to classify. Dropped if nothing medical is
    left, or nothing that the doctor says. `details` counts the cut turns and lists the rewritten ones. A teacher's form
    that changes a number, a term or a diagnosis gives way to the template.
    """
    messages = [m for m in conversation.messages if m.role == "system"]
    said = conversation.messages[len(messages) :]
    kept, cut = _cleaned(list(zip(said[::2], said[1::2], strict=True)))
    if not any(assistant.loss and without_boilerplate(assistant.content) for _, assistant in kept):
        raise LeftOut("fewer than two turns after cleaning", "".join(message.content for message in said)[:80])
    rewritten = []
    for turn, (user, assistant) in enumerate(kept, 1):
        form, by = _completed(assistant.content, [*messages, user], ask)
        messages += [user, replace(assistant, content=form)]
        if by:
            rewritten.append({"turn": 2 * turn, "before": assistant.content, "after": form, "by": by})
    text = "".join(message.content for message in messages)
    if len(kept) < 2 and not (is_evidence(text) or pattern("dialogues", "medical").search(text)):
        raise LeftOut("fewer than two turns after cleaning", text[:80])
    record = replace(conversation, messages=tuple(messages), task=EVIDIAG if len(kept) > 1 else "")
    return Built(record, {"cut_turns": cut, "rewritten": rewritten})


def is_evidence(text: str) -> bool:
    """Whether a text holds a symptom, a finding, an examination, a diagnosis, a drug or a digit."""
    return bool(evidence(text))


def evidence(text: str) -> set[str]:
    """The numbers of a text and its words for symptoms, findings, diseases, drugs and the like."""
    return {*NUMBER.findall(text), *pattern("dialogues", "evidence").findall(text)}


def without_boilerplate(text: str) -> str:
    """A doctor's turn without thanks, wishes and platform clauses; "" if it holds nothing else.

    Only whole sentences, and clauses at the edges of a sentence, are removed; greetings before an answer stay.
    """
    lines = [(line, "".join(map(_stripped, whole_sentences(line))).strip()) for line in text.split("\n")]
    kept = "\n".join(said for line, said in lines if said or not line.strip())
    return re.sub(r"\n{3,}", "\n\n", kept).strip()


def without_greeting(text: str) -> str:
    """A text without the greetings that open it."""
    while (opening := re.match(r"[^，,。！!？?：:；;\s]{1,12}[，,。！!：:；;\s]+", text)) and _is_greeting(opening[0]):
        text = text[opening.end() :]
    return "" if _is_greeting(text) else text


def _cleaned(pairs: list[tuple[Message, Message]]) -> tuple[list[tuple[Message, Message]], int]:
    """The pairs that are kept, and how many turns were cut; a patient's turns around a cut one become one."""
    kept: list[tuple[Message, Message]] = []
    pending, joined = "", 0
    for i, (user, assistant) in enumerate(pairs):
        asked_before = bool(kept) and bool(_ASKING.search((whole_sentences(kept[-1][1].content) or [""])[-1]))
        courtesy = _patient_is_courteous(user.content, asked_before)
        answer = without_boilerplate(assistant.content)
        silent = not answer or _doctor_says_nothing(answer, user.content)
        if courtesy and answer != assistant.content.strip() and _fits("remark", answer):
            silent = silent or not (is_evidence(answer) or _ASKING.search(answer))
        said = pending if pending and courtesy else user.content
        if pending and not courtesy:
            joined += 1
            pending = pending.rstrip()
            said = pending + ("" if pending[-1] in "。！？!?；;，," else "。") + said.lstrip()
        if not silent:
            kept.append((replace(user, content=said), replace(assistant, content=answer)))
            pending = ""
        elif said.strip() and (pending or not courtesy):
            if i + 1 < len(pairs):  # the doctor only nods: the patient speaks on
                pending = said
            elif is_evidence(said) or _ASKING.search(said):  # never lost, even if no more than a courtesy answers it
                kept.append((replace(user, content=said), assistant))
    return kept, 2 * (len(pairs) - len(kept)) - joined


def _stripped(sentence: str) -> str:
    body = sentence.rstrip("。！？!?”’」』）) ")
    clauses = _CLAUSE.findall(body)
    greets = [_is_greeting(clause) for clause in clauses]
    closes = _closings(clauses)
    if not clauses or (any(closes) and all(map(max, greets, closes))):
        return "" if any(closes) or not body.strip() else sentence
    start = next(i for i in range(len(clauses)) if not (greets[i] or closes[i]) or not any(closes[i:]))
    if _fits("leaning", clauses[start]):
        start = 0
    stop = len(clauses)
    while stop > start and closes[stop - 1]:
        stop -= 1
    if stop < len(clauses) and _fits("dangling", clauses[stop - 1].strip(_EDGES)):
        stop = len(clauses)
    kept = [clause for i, clause in enumerate(clauses[:stop]) if i >= start or not closes[i]]
    if stop == len(clauses):
        return "".join(kept) + sentence[len(body) :]
    return "".join(kept).rstrip("，, ") + "。"


def _closings(clauses: list[str]) -> list[bool]:
    """Which clauses only thank, wish or advertise; a condition ("如果还有问题") counts with the clause after it."""
    closes = [False] * len(clauses)
    bares = [clause.strip(_EDGES) for clause in clauses]
    for i, bare in reversed(list(enumerate(bares))):
        if len(bare) > _LONGEST:
            continue
        thanks = pattern("dialogues", "core").search(bare) and _only_words(bare, "polite")
        conditional = any(closes[i + 1 : i + 2]) and _fits("condition", bare)
        courteous = bare and not is_evidence(bare) and (thanks or conditional or _fits("wish", bare))
        closes[i] = bool(courteous or (_fits("platform", bare) and not NUMBER.search(bare)))
    wishing = False  # "祝您手术顺利，恢复迅速"
    for i, bare in enumerate(bares):
        goes_on = wishing and _fits("wished", bare) and not is_evidence(bare)
        wishing = goes_on or (closes[i] and _fits("wish", bare))
        closes[i] = closes[i] or goes_on
    return closes


def _fits(form: str, text: str) -> bool:
    """Whether the whole text has a form of templates/dialogues.toml."""
    return bool(pattern("dialogues", form).fullmatch(text))


def _only_words(text: str, *lists: str) -> bool:
    """Whether the text holds nothing but words of these lists of templates/dialogues.toml."""
    return not _word(*lists).sub("", text)


@cache
def _word(*lists: str) -> re.Pattern[str]:
    return re.compile(either(word for name in lists for word in templates("dialogues")[name]))


def _is_greeting(clause: str) -> bool:
    bare = clause.strip(_EDGES)
    return len(bare) <= _LONGEST and _fits("greeting", bare)


def _clauses(text: str) -> list[str]:
    found = (clause.strip(_EDGES) for sentence in whole_sentences(text) for clause in _CLAUSE.findall(sentence))
    return [clause for clause in found if clause]


def _patient_is_courteous(text: str, answers_a_question: bool) -> bool:
    clauses = [clause for clause in _clauses(text) if not _is_greeting(clause)]
    said = "".join(clauses)
    if is_evidence(said) or (said and _ASKING.search(text)) or (answers_a_question and not re.search("谢|再见", said)):
        return False
    return all(_fits("wish", clause) or _only_words(clause, "polite", "acknowledging") for clause in clauses)


def _doctor_says_nothing(answer: str, patient: str) -> bool:
    clauses = _clauses(answer)
    heard = [_fits("hearing", clause) for clause in clauses]
    greets = map(_is_greeting, clauses)
    return all(map(max, heard, greets)) and not (any(heard) and _ASKING.search(patient))


def _completed(turn: str, before: list[Message], ask: Ask | None) -> tuple[str, str]:
    """(the turn, "") or (its completed form, who completed it)."""
    forms, prompts = templates("dialogues")["terse"], templates("dialogues")["teacher"]
    offline = _by_template(turn, before[-1].content, forms)
    if ask and (offline or len(turn.strip(_EDGES)) <= prompts["limit"]):
        names = {"system": "说明", "user": "患者", "assistant": "医生"}
        dialogue = "\n".join(f"{names[m.role]}：{m.content}" for m in before)
        answer = answered(ask, prompts, {"answer": str}, dialogue=dialogue, turn=turn)["answer"]
        diagnoses = filter(is_evidence, whole_sentences(turn))
        survives = all(s.strip(_EDGES) in answer for s in diagnoses) and evidence(answer) <= evidence(dialogue + turn)
        if answer != turn and survives and len(answer) >= len(turn):
            return answer, "teacher"
    return (offline, "template") if offline else (turn, "")


def _by_template(turn: str, patient: str, forms: dict[str, Any]) -> str:
    bare = without_greeting(turn).strip(_EDGES)
    parts = [part for part in re.split("[，,。！!]", bare) if part]
    if not parts or len(bare) > forms["limit"] or is_evidence(bare):
        return ""
    quote = _quote(patient)
    if all(re.fullmatch(forms["assents"], part) for part in parts):
        return forms["answered"].format(quote=quote, turn=without_greeting(turn))
    if re.fullmatch(forms["elliptical"], bare):
        return forms["asked"].format(quote=quote, turn=without_greeting(turn).removeprefix("请问"))
    return ""


def _quote(patient: str) -> str:
    """What a terse turn refers to: the patient's last question, else the last sentence."""
    said = [s.strip(_EDGES) for s in whole_sentences(patient) if s.strip(_EDGES) and not _is_greeting(s)]
    asked = [s.strip(_EDGES) for s in whole_sentences(patient) if _ASKING.search(s) and s.strip(_EDGES)]
    chosen = (asked or said or [patient.strip()])[-1]
    chosen = re.sub("^[^，,]*谢[^，,]*[，,]", "", without_greeting(chosen)) or chosen
    return chosen.replace("“", "‘").replace("”", "’")
