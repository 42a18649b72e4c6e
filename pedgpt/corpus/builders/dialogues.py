"""Doctor-patient dialogues as EviDiag rows: courtesies and boilerplate cut, terse doctor turns completed by a teacher.

Evidence is never touched: a clause with a symptom, a finding, an examination, a diagnosis, a drug or a digit stays as
it was written. What counts as evidence, as courtesy and as boilerplate says templates/dialogues.toml.
"""

from __future__ import annotations

import re
from dataclasses import replace

from pedgpt.corpus.rows import Ask, Built, LeftOut, answered, builder, either, pattern, templates
from pedgpt.data.records import Conversation, Message
from pedgpt.data.tasks import EVIDIAG

NUMBER = re.compile(r"\d+(?:\.\d+)?")
# The sentences of a text as written, up to 。！？ or a line's end, not up to ； as sections.sentences has them.
whole_sentences = re.compile(r"[^。！？!?\n]*[。！？!?]+[”’」』）)]*|[^。！？!?\n]+").findall
_FORMS = templates("dialogues")
_CLAUSE = re.compile(r"[^，,]+[，,]?")
_LONGEST = 60  # characters of a courtesy; it also keeps the time of the patterns linear in the text
_EDGES = " \t\u3000，,。.！!？?；;：:~～…"
_ASKING = re.compile(r"[？?]|吗|呢|么[。！]?$|什么|怎么|如何|多少|能不能|是不是|有没有")
_POLITE = either(_FORMS["polite"])
_WHOLE = {
    "thanks": re.compile(f"(?=.*(?:{_FORMS['core']}))(?:{_POLITE})*"),
    "acknowledging": re.compile(f"(?:{_POLITE}|{either(_FORMS['acknowledging'])})*"),
}


@builder
def evidiag_dialogue(conversation: Conversation, ask: Ask | None = None) -> Built:
    """The dialogue without courtesies and, with a teacher, with terse doctor turns completed.

    Two turns of the patient or more: EviDiag. Fewer: task "", for the caller to classify. Dropped if nothing medical is
    left, or nothing that the doctor says. `details` counts the cut turns and lists the rewritten ones.
    """
    messages = [message for message in conversation.messages if message.role == "system"]
    said = conversation.messages[len(messages) :]
    kept = _cleaned(list(zip(said[::2], said[1::2], strict=True)))
    text = "".join(message.content for pair in kept for message in pair)
    medical = len(kept) > 1 or evidence(text) or pattern("dialogues", "medical").search(text)
    if not (medical and any(answer.loss and without_boilerplate(answer.content) for _, answer in kept)):
        raise LeftOut("fewer than two turns after cleaning", "".join(message.content for message in said)[:80])
    rewritten = []
    for turn, (user, assistant) in enumerate(kept, 1):
        form = _completed(assistant.content, [*messages, user], ask) if ask else assistant.content
        if form != assistant.content:
            rewritten.append({"turn": 2 * turn, "before": assistant.content, "after": form})
        messages += [user, replace(assistant, content=form)]
    record = replace(conversation, messages=tuple(messages), task=EVIDIAG if len(kept) > 1 else "")
    return Built(record, {"cut_turns": len(said) - 2 * len(kept), "rewritten": rewritten})


def evidence(text: str) -> set[str]:
    """The numbers of a text and its words for symptoms, findings, examinations, diagnoses and drugs."""
    return {*NUMBER.findall(text), *pattern("dialogues", "evidence").findall(text)}


def without_boilerplate(text: str) -> str:
    """A doctor's turn without the thanks, wishes and platform clauses at the edges of its sentences."""
    lines = [(line, "".join(map(_stripped, whole_sentences(line))).strip()) for line in text.split("\n")]
    kept = "\n".join(said for line, said in lines if said or not line.strip())
    return re.sub(r"\n{3,}", "\n\n", kept).strip()


def without_greeting(text: str) -> str:
    """A text without the greetings that open it."""
    while (opening := re.match(r"[^，,。！!？?：:；;\s]{1,12}[，,。！!：:；;\s]+", text)) and _fits(
        "greeting", opening[0]
    ):
        text = text[opening.end() :]
    return "" if _fits("greeting", text) else text


def _cleaned(pairs: list[tuple[Message, Message]]) -> list[tuple[Message, Message]]:
    """The pairs that are kept; a patient's turns around a cut one become one."""
    kept: list[tuple[Message, Message]] = []
    pending = ""
    for i, (user, assistant) in enumerate(pairs):
        asked_before = kept and _ASKING.search((whole_sentences(kept[-1][1].content) or [""])[-1])
        courtesy = _patient_is_courteous(user.content, bool(asked_before))
        said, answer = pending if pending and courtesy else user.content, without_boilerplate(assistant.content)
        if pending and not courtesy:
            said = re.sub(r"(?<![。！？!?；;，,\s])\s*$", "。", pending).rstrip() + said.lstrip()
        clauses = _clauses(answer)
        nods = all(_fits("hearing", clause) for clause in clauses) and not (clauses and _ASKING.search(user.content))
        if answer and not nods:
            kept.append((replace(user, content=said), replace(assistant, content=answer)))
            pending = ""
        elif i + 1 < len(pairs):  # the doctor only nods: the patient speaks on
            pending = said if pending or not courtesy else ""
        elif (pending or not courtesy) and (evidence(said) or _ASKING.search(said)):
            kept.append((replace(user, content=said), assistant))  # never lost, even if a courtesy answers it
    return kept


def _stripped(sentence: str) -> str:
    body = sentence.rstrip("。！？!?”’」』）) ")
    clauses = _CLAUSE.findall(body)
    closes = _closings([clause.strip(_EDGES) for clause in clauses])
    said = [i for i, clause in enumerate(clauses) if not (closes[i] or _fits("greeting", clause))]
    if not any(closes) or not said:
        return "" if any(closes) or not body.strip() else sentence
    first = 0 if _fits("leaning", clauses[said[0]]) else said[0]
    last = len(clauses) if _fits("dangling", clauses[said[-1]]) else said[-1] + 1
    kept = "".join(clauses[first:last])
    return kept + sentence[len(body) :] if last == len(clauses) else kept.rstrip("，, ") + "。"


def _closings(clauses: list[str]) -> list[bool]:
    """Which clauses only thank, wish or advertise."""
    plain = [bool(clause) and not evidence(clause) for clause in clauses]
    closes = [
        (plain[i] and (_fits("thanks", clause) or _fits("wish", clause)))
        or (_fits("platform", clause) and not NUMBER.search(clause))
        for i, clause in enumerate(clauses)
    ]
    for i in reversed(range(len(clauses) - 1)):  # a condition belongs to what follows it: "如果还有问题"
        closes[i] = closes[i] or (closes[i + 1] and plain[i] and _fits("condition", clauses[i]))
    return closes


def _fits(form: str, text: str) -> bool:
    """Whether the whole text, if not too long for a courtesy, has a form of templates/dialogues.toml."""
    bare = text.strip(_EDGES)
    return len(bare) <= _LONGEST and bool((_WHOLE.get(form) or pattern("dialogues", form)).fullmatch(bare))


def _clauses(text: str) -> list[str]:
    """The clauses of a text but its greetings."""
    found = (clause.strip(_EDGES) for sentence in whole_sentences(text) for clause in _CLAUSE.findall(sentence))
    return [clause for clause in found if clause and not _fits("greeting", clause)]


def _patient_is_courteous(text: str, answers_a_question: bool) -> bool:
    clauses = _clauses(text)
    said = "".join(clauses)
    if evidence(said) or (said and _ASKING.search(text)) or (answers_a_question and not re.search("谢|再见", said)):
        return False
    return all(_fits("wish", clause) or _fits("acknowledging", clause) for clause in clauses)


def _completed(turn: str, before: list[Message], ask: Ask) -> str:
    """A terse turn as a teacher completes it, unless that changes a number, a term or a diagnosis."""
    prompts = _FORMS["teacher"]
    if len(turn.strip(_EDGES)) > prompts["limit"]:
        return turn
    names = {"system": "说明", "user": "患者", "assistant": "医生"}
    dialogue = "\n".join(f"{names[message.role]}：{message.content}" for message in before)
    answer = answered(ask, prompts, {"answer": str}, dialogue=dialogue, turn=turn)["answer"]
    diagnoses = filter(evidence, whole_sentences(turn))
    survives = all(said.strip(_EDGES) in answer for said in diagnoses) and evidence(answer) <= evidence(dialogue + turn)
    return answer if survives and len(answer) >= len(turn) else turn
