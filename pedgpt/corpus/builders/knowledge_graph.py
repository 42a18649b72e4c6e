"""A knowledge graph of diseases as running text and as instructions of the three PedCorpus tasks.

The same triples and templates give the same rows in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice, permutations, product
from typing import Any

from pedgpt.corpus.rows import number, pick, spoken, templates
from pedgpt.data.records import Conversation, Document, Triple
from pedgpt.data.tasks import EVIDIAG, MEDKQA, TRERECOM

SYMPTOM, AGE, EXAMINATION = "症状", "好发年龄", "检查"
_CARE = TREATMENT, PREVENTION, COMPLICATION = "治疗", "预防", "并发症"
_FORMS = templates("knowledge_graph")


@dataclass(frozen=True)
class Disease:
    """One head of the graph: its facts by relation, in the order of the file."""

    name: str
    facts: dict[str, list[str]]

    def listed(self, relation: str) -> str:
        """All facts of a relation, joined as a Chinese list."""
        return "、".join(self.facts[relation])

    def has(self, *relations: str) -> bool:
        """Whether the disease has facts of all these relations."""
        return self.facts.keys() >= set(relations)


def diseases(triples: Sequence[Triple]) -> list[Disease]:
    """Group triples by head, in the order of the file; a relation without templates of its own has generic ones."""
    facts: dict[str, dict[str, dict[str, None]]] = {}
    for triple in triples:
        facts.setdefault(triple.head, {}).setdefault(triple.relation, {})[triple.tail] = None
    return [Disease(name, {relation: list(tails) for relation, tails in own.items()}) for name, own in facts.items()]


def verbalize(disease: Disease) -> Iterator[Document]:
    """The facts of a disease as short running texts, one for each set of sentence forms."""
    forms = _FORMS["verbalize"]
    for variant in range(2):
        text = ""
        for relation in _ordered(disease):
            values = {"head": disease.name, "relation": relation, "tails": disease.listed(relation)}
            text += forms.get(relation, forms["generic"])[variant].format(**values)
        yield Document(text, f"knowledge_graph:{disease.name}", disease.name, disease.name)


def medkqa(disease: Disease) -> Iterator[Conversation]:
    """Knowledge questions: every relation in every phrasing."""
    for relation in _ordered(disease):
        forms = _FORMS["medkqa"].get(relation, _FORMS["generic"])
        values = {"relation": relation, "tails": disease.listed(relation), "first": disease.facts[relation][0]}
        for i in range(len(forms["questions"])):
            yield _row(MEDKQA, disease, _rotated(forms, i), values)


def trerecom(disease: Disease) -> Iterator[Conversation]:
    """Treatment recommendations: a question in every phrasing, answered with treatment, care and warning signs."""
    if disease.has(SYMPTOM, *_CARE):
        forms, symptoms = _FORMS["trerecom"], disease.facts[SYMPTOM]
        for i in range(len(forms["questions"])):
            values = _named([symptoms[i % len(symptoms)], symptoms[(i + 1) % len(symptoms)]])
            yield _row(TRERECOM, disease, _rotated(forms, i), values | _care(disease))


def evidiag(disease: Disease) -> Iterator[Conversation]:
    """Evidence-based diagnosis over three turns, one for every third ordering of three symptoms (at most eight).

    Neighbouring orderings differ in the last symptom only.
    """
    if disease.has(SYMPTOM, AGE, EXAMINATION, *_CARE):
        exam, *_ = disease.facts[EXAMINATION]
        fixed = {"age": disease.facts[AGE][0], "exam": exam, "exams": disease.listed(EXAMINATION)} | _care(disease)
        for i, triple in enumerate(islice(permutations(disease.facts[SYMPTOM], 3), 0, 24, 3)):
            duration, *turns = _rotated(_FORMS["evidiag"], i)
            yield _row(EVIDIAG, disease, turns, {"duration": duration} | _named(triple) | fixed)


def two_hop(diseases: Sequence[Disease], *, most: int = 4) -> Iterator[Conversation]:
    """Questions over two facts, at most `most` of a disease: what is asked for is not said of what the question names.

    Three symptoms that one disease of the list alone has -> its examinations or treatment; a disease -> prevention or
    treatment of a complication that is itself in the list. The row belongs to the first disease, `disease` of the row.
    Give only diseases of one side of a split.
    """
    forms, named, holders = _FORMS["two_hop"], {disease.name: disease for disease in diseases}, _holders(diseases)
    for disease in diseases:
        rows: list[Conversation] = []
        triples = combinations(disease.facts.get(SYMPTOM, [])[:8], 3)
        unique = (t for t in triples if set.intersection(*(holders[symptom] for symptom in t)) == {disease.name})
        asked = (relation for relation in (EXAMINATION, TREATMENT) if disease.has(relation))
        for relation, triple in zip(asked, sorted(unique, key=lambda t: number(disease.name, *t)), strict=False):
            values = _named(triple) | {"tails": disease.listed(relation)}
            rows.append(_picked(forms["symptoms"][relation], disease, relation, values))
        known = [named[tail] for tail in disease.facts.get(COMPLICATION, []) if tail in named and tail != disease.name]
        # With one complication of the list the question need not name it; with more, it could mean any.
        kind = forms["complication" if len(known) == 1 else "complications"]
        for relation, other in product((PREVENTION, TREATMENT), known):
            if other.has(relation):
                tails = {"all": disease.listed(COMPLICATION), "tails": other.listed(relation)}
                rows.append(_picked(kind[relation], disease, relation, {"complication": other.name} | tails))
        yield from rows[:most]


def negative(diseases: Sequence[Disease], *, most: int = 2) -> Iterator[Conversation]:
    """Yes/no questions in pairs, at most `most` pairs of a disease: a fact of it, and one of another's that it lacks.

    The answer to the latter is that the material does not record it and what it does record, never that it cannot be.
    Ages are not asked for, as they overlap, nor complications and treatment, where it would be dangerous to take such
    an answer for a no. Give only diseases of one side of a split.
    """
    forms = _FORMS["negative"]
    tails: dict[str, list[str]] = defaultdict(list)
    for relation, facts in chain.from_iterable(disease.facts.items() for disease in diseases):
        tails[relation] += facts
    for disease in diseases:
        asked = disease.facts.keys() - {AGE, COMPLICATION, TREATMENT}
        strangers = {relation: _foreign(tails[relation], relation, disease) for relation in asked}
        ordered = sorted(filter(strangers.get, asked), key=lambda relation: (number(disease.name, relation), relation))
        for relation in ordered[:most]:
            true = pick(disease.facts[relation], disease.name, relation)
            others = "、".join(tail for tail in disease.facts[relation] if tail != true)
            values = {"relation": relation, "tails": disease.listed(relation), "others": others}
            answers = [(true, "yes" if others else "only"), (strangers[relation], "no")]
            for tail, answer in answers if number(disease.name) % 2 else answers[::-1]:
                turns = {"questions": forms.get(relation, forms["generic"]), "answers": forms[answer]}
                yield _picked(turns, disease, relation, {"tail": tail} | values)


def _foreign(tails: Sequence[str], relation: str, disease: Disease) -> str:
    """A fact that the disease lacks, or "" if a few draws find none, so that the time is linear in the graph.

    It shares less than half of its characters with each fact of the disease, and a finding's last one with none: 咳嗽
    is no stranger to 剧烈咳嗽, 避免烟草烟雾 none to 避免被动吸烟, 高热 none to 发热.
    """
    facts = [set(fact) for fact in (disease.name, *chain(*disease.facts.values()))]
    ends = {fact[-1] for fact in disease.facts[relation]} if relation == SYMPTOM else set()
    for tail in (pick(tails, disease.name, relation, str(i)) for i in range(20)):
        alike = any(2 * len(fact & set(tail)) >= min(len(fact), len(set(tail))) for fact in facts)
        if tail[-1] not in ends and not alike:
            return tail
    return ""


def _holders(diseases: Sequence[Disease]) -> dict[str, set[str]]:
    """Of each symptom, the diseases that have it, or one that holds it or that it holds: 咳嗽, 剧烈咳嗽."""
    exact: dict[str, set[str]] = defaultdict(set)
    for disease in diseases:
        for symptom in disease.facts.get(SYMPTOM, []):
            exact[symptom].add(disease.name)
    near = {symptom: set(names) for symptom, names in exact.items()}
    for symptom, names in exact.items():
        spans = combinations(range(min(len(symptom), 40) + 1), 2)  # a longer one is a description
        for part in {symptom[start:end] for start, end in spans} & exact.keys():
            near[part] |= names
            near[symptom] |= exact[part]
    return near


def _ordered(disease: Disease) -> list[str]:
    """The relations of a disease, those with templates of their own first."""
    known = list(_FORMS["verbalize"])
    return sorted(disease.facts, key=lambda relation: known.index(relation) if relation in known else len(known))


def _named(symptoms: Sequence[str]) -> dict[str, str]:
    return dict(zip(("first", "second", "third"), symptoms, strict=False))


def _care(disease: Disease) -> dict[str, str]:
    complication = disease.facts[COMPLICATION][0]
    return {"tails": disease.listed(TREATMENT), "care": disease.listed(PREVENTION), "complication": complication}


def _rotated(forms: Mapping[str, Sequence[str]], i: int) -> list[str]:
    """The i-th phrasing of each part, from the first on again after the last."""
    return [part[i % len(part)] for part in forms.values()]


def _picked(forms: Mapping[str, Any], disease: Disease, relation: str, values: Mapping[str, str]) -> Conversation:
    turns = [pick(form, part, disease.name, relation, *values.values()) for part, form in forms.items()]
    return _row(TRERECOM if relation == TREATMENT else MEDKQA, disease, turns, values)


def _row(task: str, disease: Disease, turns: Sequence[str], values: Mapping[str, str]) -> Conversation:
    filled = [turn.format(head=disease.name, **values) for turn in turns]
    return spoken(*filled, source=f"knowledge_graph:{disease.name}", task=task, disease=disease.name)
