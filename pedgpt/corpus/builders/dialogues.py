"""Doctor-patient dialogues as EviDiag rows: courtesies and boilerplate cut, terse doctor turns completed.

Evidence is never touched: a clause with a symptom, a finding, an examination, a diagnosis, a drug or a digit stays as
it was written. What counts as evidence, as courtesy and as boilerplate says templates/dialogues.toml.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from pedgpt.corpus.builders.knowledge_graph import EVIDIAG
from pedgpt.corpus.rows import Ask, Built, Dropped, Unusable, templates
from pedgpt.data.records import Conversation, Message

NUMBER = re.compile(r"\d+(?:\.\d+)?")
_SENTENCE = re.compile(r"[^。！？!?\n]*[。！？!?]+[”’」』）)]*|[^。！？!?\n]+")
_CLAUSE = re.compile(r"[^，,]+[，,]?")
_LONGEST = 60  # characters of a courtesy; it also keeps the time of the patterns below linear in the text
_EDGES = " \t\u3000，,。.！!？?；;：:~～…"
_PATTERNS = ("medical", "core", "wish", "wished", "condition", "dangling", "leaning", "remark", "hearing")
_ASKING = re.compile(r"[？?]|吗|呢|么[。！]?$|什么|怎么|如何|多少|能不能|是不是|有没有")


def evidiag_dialogue(conversation: Conversation, ask: Ask | None = None) -> Iterator[Built | Dropped]:
    """The dialogue without courtesies and with terse doctor turns completed, by the teacher or by template.

    Two turns of the patient or more: EviDiag. Fewer: task "", for the caller to classify. Dropped if nothing medical is
    left, or nothing that the doctor says. `details` counts the cut turns and lists the rewritten ones. A teacher's form
    that changes a number, a term or a diagnosis gives way to the template.
    """
    system = [m for m in conversation.messages if m.role == "system"]
    spoken = conversation.messages[len(system) :]
    kept, cut = _cleaned(list(zip(spoken[::2], spoken[1::2], strict=True)))
    if not any(assistant.loss and without_boilerplate(assistant.content) for _, assistant in kept):
        text = "".join(message.content for message in spoken)
        yield Dropped(conversation.source, "fewer than two turns after cleaning", text[:80])
        return
    messages, rewritten = list(system), []
    try:
        for user, assistant in kept:
            turn, by = _completed(assistant.content, [*messages, user], ask)
            messages += [user, replace(assistant, content=turn)]
            if by:
                change = {"turn": len(messages) - len(system), "before": assistant.content, "after": turn, "by": by}
                rewritten.append(change)
    except Unusable as error:
        yield Dropped(conversation.source, "teacher's answer was unusable", str(error)[:80])
        return
    text = "".join(message.content for message in messages)
    if len(kept) < 2 and not (is_evidence(text) or _patterns()["medical"].search(text)):
        yield Dropped(conversation.source, "fewer than two turns after cleaning", text[:80])
        return
    task = EVIDIAG if len(kept) > 1 else ""
    details = {"cut_turns": cut, "rewritten": rewritten}
    yield Built(replace(conversation, messages=tuple(messages), task=task), details)


def is_evidence(text: str) -> bool:
    """Whether a text holds a symptom, a finding, an examination, a diagnosis, a drug or a digit."""
    return bool(NUMBER.search(text) or _patterns()["evidence"].search(text))


def evidence(text: str) -> set[str]:
    """The numbers of a text and its words for symptoms, findings, diseases, drugs and the like."""
    return {*NUMBER.findall(text), *(match[0] for match in _patterns()["evidence"].finditer(text))}


def whole_sentences(text: str) -> list[str]:
    """The sentences of a text as written, up to 。！？ or a line's end, not up to ； as sections.sentences has them."""
    return _SENTENCE.findall(text)


def without_boilerplate(text: str) -> str:
    """A doctor's turn without thanks, wishes and platform clauses; "" if it holds nothing else.

    Only whole sentences, and clauses at the edges of a sentence, are removed; greetings before an answer stay.
    """
    lines = []
    for line in text.split("\n"):
        kept = "".join(_stripped(sentence) for sentence in whole_sentences(line)).strip()
        if kept or not line.strip():
            lines.append(kept)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def without_greeting(text: str) -> str:
    """A text without the greetings that open it."""
    while (opening := re.match(r"[^，,。！!？?：:；;\s]{1,12}[，,。！!：:；;\s]+", text)) and _is_greeting(opening[0]):
        text = text[opening.end() :]
    return "" if _is_greeting(text) else text


def ask_text(ask: Ask, prompts: dict[str, str], **values: str) -> str:
    """What a teacher answers to `prompts`; raises Unusable if it is blank or no text."""
    answer = ask(prompts["system"], prompts["user"].format(**values), {"answer": str}).get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise Unusable(f"answer is {answer!r}, expected a text")
    return answer.strip()


def _cleaned(pairs: list[tuple[Message, Message]]) -> tuple[list[tuple[Message, Message]], int]:
    """The pairs that are kept, and how many turns were cut; a patient's turns around a cut one become one."""
    kept: list[tuple[Message, Message]] = []
    pending, cut = "", 0
    for i, (user, assistant) in enumerate(pairs):
        asked_before = bool(kept) and bool(_ASKING.search((whole_sentences(kept[-1][1].content) or [""])[-1]))
        courtesy = _patient_is_courteous(user.content, asked_before)
        answer = without_boilerplate(assistant.content)
        silent = not answer or _doctor_says_nothing(answer, user.content)
        if courtesy and answer != assistant.content.strip() and _patterns()["remark"].fullmatch(answer):
            silent = silent or not (is_evidence(answer) or _ASKING.search(answer))
        if pending and courtesy:
            cut += 1
        said = pending if pending and courtesy else _joined(pending, user.content)
        if not silent:
            kept.append((replace(user, content=said), replace(assistant, content=answer)))
            pending = ""
        elif not said.strip() or (courtesy and not pending):
            cut += 2
        elif i + 1 < len(pairs):  # the doctor only nods: the patient speaks on
            pending, cut = said, cut + 1
        elif is_evidence(said) or _ASKING.search(said):  # never lost, even if no more than a courtesy answers it
            kept.append((replace(user, content=said), assistant))
        else:
            cut += 2
    return kept, cut


def _stripped(sentence: str) -> str:
    body = sentence.rstrip("。！？!?”’」』）) ")
    clauses = _CLAUSE.findall(body)
    greets = [_is_greeting(clause) for clause in clauses]
    closes = _closings(clauses)
    if not clauses or (any(closes) and all(map(max, greets, closes))):
        return "" if any(closes) or not body.strip() else sentence
    start = next(i for i in range(len(clauses)) if not (greets[i] or closes[i]) or not any(closes[i:]))
    if _patterns()["leaning"].fullmatch(clauses[start]):
        start = 0
    stop = len(clauses)
    while stop > start and closes[stop - 1]:
        stop -= 1
    if stop < len(clauses) and _patterns()["dangling"].fullmatch(clauses[stop - 1].strip(_EDGES)):
        stop = len(clauses)
    kept = [clause for i, clause in enumerate(clauses[:stop]) if i >= start or not closes[i]]
    if stop == len(clauses):
        return "".join(kept) + sentence[len(body) :]
    return "".join(kept).rstrip("，, ") + "。"


def _closings(clauses: list[str]) -> list[bool]:
    """Which clauses only thank, wish or advertise; a condition ("如果还有问题") counts with the clause after it."""
    patterns = _patterns()
    closes = [False] * len(clauses)
    for i in reversed(range(len(clauses))):
        bare = clauses[i].strip(_EDGES)
        if len(bare) > _LONGEST:
            continue
        if any(p.fullmatch(bare) for p in patterns["platform"]) and not NUMBER.search(bare):
            closes[i] = True
        elif not bare or is_evidence(bare):
            continue
        elif patterns["wish"].fullmatch(bare):
            closes[i] = True
        elif i + 1 < len(clauses) and closes[i + 1] and patterns["condition"].fullmatch(bare):
            closes[i] = True
        else:
            closes[i] = bool(not patterns["polite"].sub("", bare) and patterns["core"].search(bare))
    wishing = False  # "祝您手术顺利，恢复迅速"
    for i, clause in enumerate(clauses):
        bare = clause.strip(_EDGES)
        goes_on = wishing and bool(patterns["wished"].fullmatch(bare)) and not is_evidence(bare)
        wishing = goes_on or (closes[i] and bool(patterns["wish"].fullmatch(bare)))
        closes[i] = closes[i] or goes_on
    return closes


def _is_greeting(clause: str) -> bool:
    bare = clause.strip(_EDGES)
    return len(bare) <= _LONGEST and any(p.fullmatch(bare) for p in _patterns()["greeting"])


def _patient_is_courteous(text: str, answers_a_question: bool) -> bool:
    patterns = _patterns()
    clauses = [clause.strip(_EDGES) for line in whole_sentences(text) for clause in _CLAUSE.findall(line)]
    clauses = [clause for clause in clauses if clause and not _is_greeting(clause)]
    said = "".join(clauses)
    if is_evidence(said) or (said and _ASKING.search(text)) or (answers_a_question and not re.search("谢|再见", said)):
        return False
    return all(patterns["wish"].fullmatch(c) or not patterns["acknowledging"].sub("", c) for c in clauses)


def _doctor_says_nothing(answer: str, patient: str) -> bool:
    clauses = [c.strip(_EDGES) for line in whole_sentences(answer) for c in _CLAUSE.findall(line)]
    heard = [bool(_patterns()["hearing"].fullmatch(c)) for c in clauses if c]
    greets = [_is_greeting(c) for c in clauses if c]
    return all(map(max, heard, greets)) and not (any(heard) and _ASKING.search(patient))


def _joined(first: str, second: str) -> str:
    if not first:
        return second
    return first.rstrip() + ("" if first.rstrip()[-1] in "。！？!?；;，," else "。") + second.lstrip()


def _completed(turn: str, before: list[Message], ask: Ask | None) -> tuple[str, str]:
    """(the turn, "") or (its completed form, who completed it)."""
    forms = templates("dialogues")["terse"]
    offline = _by_template(turn, before[-1].content, forms)
    prompts = templates("dialogues")["teacher"]
    if ask is None or not (offline or len(turn.strip(_EDGES)) <= prompts["limit"]):
        return (offline, "template") if offline else (turn, "")
    names = {"system": "说明", "user": "患者", "assistant": "医生"}
    dialogue = "\n".join(f"{names[m.role]}：{m.content}" for m in before)
    answer = ask_text(ask, prompts, dialogue=dialogue, turn=turn)
    known = evidence(dialogue + turn)
    diagnosis = [s for s in whole_sentences(turn) if is_evidence(s)]
    survives = all(s.strip(_EDGES) in answer for s in diagnosis) and evidence(answer) <= known
    if answer == turn or not survives or len(answer) < len(turn):
        return (offline, "template") if offline else (turn, "")
    return answer, "teacher"


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


@cache
def _patterns() -> dict[str, Any]:
    table = templates("dialogues")

    def words(*names: str) -> re.Pattern[str]:
        listed = sorted({word for name in names for word in table[name]}, key=lambda word: (-len(word), word))
        return re.compile("|".join(map(re.escape, listed)))

    compiled: dict[str, Any] = {name: re.compile(table[name]) for name in _PATTERNS}
    compiled |= {name: [re.compile(p, re.IGNORECASE) for p in table[name]] for name in ("greeting", "platform")}
    compiled |= {"polite": words("polite"), "acknowledging": words("polite", "acknowledging")}
    return compiled | {"evidence": re.compile("|".join(table["evidence"]))}
