"""Stage-3 pairs from correct answers: the same content said humanely (chosen) and plainly (rejected)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pedgpt.corpus.builders.dialogues import evidence, whole_sentences
from pedgpt.corpus.builders.reconstruct import reorganise
from pedgpt.corpus.rows import Ask, Built, LeftOut, answered, builder, pattern, pick, templates
from pedgpt.data.records import Conversation, PreferencePair
from pedgpt.data.tasks import TASKS

# Words of the evidence that name no finding.
_CONNECTIVES = re.compile("考虑|诊断|可能.?|属于|疑似|确诊|怀疑|引起|导致|报告|指标|症|不适")


@builder
def humane_pair(conversation: Conversation, ask: Ask | None = None, plain: Ask | None = None) -> Built | None:
    """A pair of a conversation of one turn, whose question is no colleague's (一名患儿…); others yield nothing.

    Chosen: a warm opening for the kind of question, the answer in the second person, and what to watch for, or what
    `ask` makes of it. Rejected: the answer in telegraph style, or what `plain`, a second teacher, says. A teacher's
    answer with numbers or medical terms that neither the question nor the correct answer has is dropped. A row of one
    of the three tasks is about a child.
    """
    *prompt, last = conversation.messages
    asked, correct = prompt[-1].content, last.content.strip()
    if [m.role for m in prompt if m.role != "system"] != ["user"] or pattern("preferences", "colleague").search(asked):
        return None
    if not (bare := reorganise(correct)):
        raise LeftOut("no answer left to rephrase", correct[:80])
    chosen = _said(ask, "teacher", asked, bare) or _humane(asked, bare, conversation.task in TASKS)
    rejected = _said(plain, "teacher_plain", asked, bare) or _plain(bare)
    for teacher, answer in ((ask, chosen), (plain, rejected)):
        if teacher and (added := _added(answer, asked, bare)):
            raise LeftOut("teacher's answer was not supported", "、".join(sorted(added)))
    if chosen == rejected:
        raise LeftOut("chosen equals rejected", chosen[:80])
    details = {"correct": correct, "kind": _kind(asked, bare)["name"]}
    details |= {"chosen_by": "teacher" if ask else "template", "rejected_by": "teacher" if plain else "template"}
    origin = conversation.source, conversation.disease, conversation.department
    return Built(PreferencePair(tuple(prompt), chosen, rejected, *origin), details)


def _said(teacher: Ask | None, prompts: str, asked: str, correct: str) -> str:
    """A teacher's form of the correct answer, "" without a teacher."""
    table = templates("preferences")[prompts]
    return answered(teacher, table, {"answer": str}, question=asked, correct=correct)["answer"] if teacher else ""


def _humane(asked: str, answer: str, pediatric: bool) -> str:
    table = templates("preferences")
    kind, child = _kind(asked, answer), pediatric or bool(re.search(table["child"], asked))
    said = _rewritten(answer, (table["humane"]["child"] if child else []) + table["humane"]["all"])
    who = "child" if child else "adult"
    forms = kind[who]
    if re.search(templates("role_play")["grave"], asked + answer):
        forms = [form for form in forms if not re.search(table["soothing"], form)]
    told = "told" if re.search(table["sees_doctor"], answer) else "untold"
    closings = table["closing"].get(kind["name"]) or table["closing"][f"{who}_{told}"]
    between = "\n" if "\n" in said else ""
    return f"{pick(forms, asked)}{between}{said}{between}{pick(closings, answer)}"


def _plain(answer: str) -> str:
    table = templates("preferences")["plain"]
    politeness = re.compile(f"^(?:(?:{table['politeness']})[，,。！!]+)+")
    lines = ("".join(politeness.sub("", said) for said in whole_sentences(line)) for line in answer.split("\n"))
    return "\n".join(filter(None, (_rewritten(line, table["rewrite"]) for line in lines))) or answer


def _kind(asked: str, answer: str) -> dict[str, Any]:
    table = templates("preferences")
    if re.search(table["urgent"], re.sub(table["not_urgent"], "", answer.split("。")[0])):
        return table["kind"][0]
    return next(kind for kind in table["kind"][1:] if re.search(kind["cues"], asked))  # the last one fits all


def _added(answer: str, asked: str, correct: str) -> set[str]:
    """The numbers and medical terms of an answer that neither the question nor the correct answer has."""
    known, new = _same_words(asked + correct), evidence(_same_words(answer))
    return {term for term in new if term not in known and not _CONNECTIVES.fullmatch(term)}


def _same_words(text: str) -> str:
    return _rewritten(text, [(others, word) for word, others in templates("preferences")["synonyms"].items()])


def _rewritten(text: str, changes: Sequence[Sequence[str]]) -> str:
    for form, replacement in changes:
        text = re.sub(form, replacement, text)
    return text
