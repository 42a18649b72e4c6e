"""Stage-3 pairs from correct answers: the same content said humanely (chosen) and plainly (rejected)."""

from __future__ import annotations

import re
from typing import Any

from pedgpt.corpus.builders.dialogues import evidence, whole_sentences
from pedgpt.corpus.builders.reconstruct import reorganise
from pedgpt.corpus.rows import Ask, Built, LeftOut, answered, builder, pattern, pick, rewritten, templates
from pedgpt.data.records import Conversation, PreferencePair
from pedgpt.data.tasks import TASKS

_FORMS = templates("preferences")


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
    if chosen == rejected:
        raise LeftOut("chosen equals rejected", chosen[:80])
    by = {"chosen_by": "teacher" if ask else "template", "rejected_by": "teacher" if plain else "template"}
    details = {"correct": correct, "kind": _kind(asked, bare)["name"]} | by
    origin = conversation.source, conversation.disease, conversation.department
    return Built(PreferencePair(tuple(prompt), chosen, rejected, *origin), details)


def _said(teacher: Ask | None, prompts: str, asked: str, correct: str) -> str:
    """A teacher's form of the correct answer, "" without a teacher."""
    if not teacher:
        return ""
    answer = answered(teacher, _FORMS[prompts], {"answer": str}, question=asked, correct=correct)["answer"]
    synonyms = [(others, word) for word, others in _FORMS["synonyms"].items()]
    known = rewritten(asked + correct, synonyms)
    new = sorted(term for term in evidence(rewritten(answer, synonyms)) if term not in known)
    if added := [term for term in new if not pattern("preferences", "connectives").fullmatch(term)]:
        raise LeftOut("teacher's answer was not supported", "、".join(added))
    return answer


def _humane(asked: str, answer: str, pediatric: bool) -> str:
    kind, child = _kind(asked, answer), pediatric or pattern("preferences", "child").search(asked)
    said = rewritten(answer, (_FORMS["humane"]["child"] if child else []) + _FORMS["humane"]["all"])
    who, told = "child" if child else "adult", pattern("preferences", "sees_doctor").search(answer)
    forms = kind[who]
    if pattern("role_play", "grave").search(asked + answer):
        forms = [form for form in forms if not pattern("preferences", "soothing").search(form)]
    closings = _FORMS["closing"].get(kind["name"]) or _FORMS["closing"][f"{who}_{'told' if told else 'untold'}"]
    return ("\n" if "\n" in said else "").join([pick(forms, asked), said, pick(closings, answer)])


def _plain(answer: str) -> str:
    def told(line: str) -> str:
        bare = (re.sub(_FORMS["plain"]["politeness"], "", said) for said in whole_sentences(line))
        return rewritten("".join(bare), _FORMS["plain"]["rewrite"])

    return "\n".join(filter(None, map(told, answer.split("\n")))) or answer


def _kind(asked: str, answer: str) -> dict[str, Any]:
    urgent, *kinds = _FORMS["kind"]
    opening = pattern("preferences", "not_urgent").sub("", answer.split("。")[0])
    is_urgent = pattern("preferences", "urgent").search(opening)
    return urgent if is_urgent else next(kind for kind in kinds if re.search(kind["cues"], asked))  # the last fits all
