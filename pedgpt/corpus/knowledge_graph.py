"""A knowledge graph of diseases as running text and as instructions of the three PedCorpus tasks.

Everything is deterministic: the same triples and templates give the same rows in the same order.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from pedgpt.data.records import Conversation, Document, Message, Triple

MEDKQA, EVIDIAG, TRERECOM = "MedKQ&A", "EviDiag", "TreRecom"
TASKS = (MEDKQA, EVIDIAG, TRERECOM)
SYMPTOM, AGE, CAUSE, EXAMINATION = "症状", "好发年龄", "病因", "检查"
TREATMENT, PREVENTION, COMPLICATION = "治疗", "预防", "并发症"
RELATIONS = (SYMPTOM, AGE, CAUSE, EXAMINATION, TREATMENT, PREVENTION, COMPLICATION)


@dataclass(frozen=True)
class Disease:
    """One head of the graph: its facts by relation, in the order of the file."""

    name: str
    facts: dict[str, list[str]]

    def listed(self, relation: str) -> str:
        """All facts of a relation, joined as a Chinese list."""
        return "、".join(self.facts[relation])


def diseases(triples: Sequence[Triple]) -> list[Disease]:
    """Group triples by head. A head that lacks a relation keeps those it has; other relations are a ValueError."""
    facts: dict[str, dict[str, list[str]]] = {}
    for triple in triples:
        if triple.relation not in RELATIONS:
            raise ValueError(f"{triple.source}: relation {triple.relation!r}; expected one of {'、'.join(RELATIONS)}")
        tails = facts.setdefault(triple.head, {}).setdefault(triple.relation, [])
        if triple.tail not in tails:
            tails.append(triple.tail)
    return [Disease(name, by_relation) for name, by_relation in facts.items()]


def verbalize(disease: Disease) -> Iterator[Document]:
    """The facts of a disease as short running texts, one for each set of sentence forms."""
    forms = _templates()["verbalize"]
    for variant in range(2):
        sentences = [
            forms[relation][variant].format(head=disease.name, tails=disease.listed(relation))
            for relation in RELATIONS
            if relation in disease.facts
        ]
        yield Document("".join(sentences), f"knowledge_graph:{disease.name}", disease.name)


def medkqa(disease: Disease) -> Iterator[Conversation]:
    """Knowledge questions: every relation in every phrasing."""
    for relation, forms in _templates()["medkqa"].items():
        if relation not in disease.facts:
            continue
        values = {"head": disease.name, "tails": disease.listed(relation), "first": disease.facts[relation][0]}
        for i, question in enumerate(forms["questions"]):
            answer = forms["answers"][i % len(forms["answers"])]
            yield _conversation(MEDKQA, disease, question.format(**values), answer.format(**values))


def trerecom(disease: Disease) -> Iterator[Conversation]:
    """Treatment recommendations: a question in every phrasing, answered with treatment, care and warning signs."""
    if not {SYMPTOM, TREATMENT, PREVENTION, COMPLICATION} <= disease.facts.keys():
        return
    forms = _templates()["trerecom"]
    symptoms = disease.facts[SYMPTOM]
    for i, question in enumerate(forms["questions"]):
        values = {
            "head": disease.name,
            "first": symptoms[i % len(symptoms)],
            "second": symptoms[(i + 1) % len(symptoms)],
            "tails": disease.listed(TREATMENT),
            "care": disease.listed(PREVENTION),
            "complication": disease.facts[COMPLICATION][0],
        }
        answer = forms["answers"][i % len(forms["answers"])]
        yield _conversation(TRERECOM, disease, question.format(**values), answer.format(**values))


def evidiag(disease: Disease) -> Iterator[Conversation]:
    """Evidence-based diagnosis over three turns, one for every third ordering of three symptoms (at most eight)."""
    needed = {SYMPTOM, AGE, EXAMINATION, TREATMENT, PREVENTION, COMPLICATION}
    if not needed <= disease.facts.keys() or len(disease.facts[SYMPTOM]) < 3:
        return
    forms = _templates()["evidiag"]
    # Every third ordering: neighbours differ in the last symptom only.
    orders = list(itertools.permutations(disease.facts[SYMPTOM], 3))[:24:3]
    for i, (first, second, third) in enumerate(orders):
        values = {
            "head": disease.name, "first": first, "second": second, "third": third,
            "age": disease.facts[AGE][0],
            "duration": forms["durations"][i % len(forms["durations"])],
            "exam": disease.facts[EXAMINATION][0], "exams": disease.listed(EXAMINATION),
            "tails": disease.listed(TREATMENT), "care": disease.listed(PREVENTION),
            "complication": disease.facts[COMPLICATION][0],
        }  # fmt: skip
        turns = [
            forms[part][i % len(forms[part])].format(**values)
            for part in ("openings", "inquiries", "findings", "diagnoses", "followups", "plans")
        ]
        yield _conversation(EVIDIAG, disease, *turns)


def _conversation(task: str, disease: Disease, *turns: str) -> Conversation:
    messages = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns))
    return Conversation(messages, f"knowledge_graph:{disease.name}", task)


@cache
def _templates() -> dict[str, Any]:
    text = files("pedgpt.corpus").joinpath("templates/knowledge_graph.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
