"""A knowledge graph of diseases as running text and as instructions of the three PedCorpus tasks.

Everything is deterministic: the same triples and templates give the same rows in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pedgpt.corpus.builders.support import support
from pedgpt.corpus.rows import Ask, Built, Dropped, LeftOut, answered, builder, number, pick, spoken, templates
from pedgpt.data.records import Conversation, Document, Triple
from pedgpt.data.tasks import EVIDIAG, MEDKQA, TRERECOM

SYMPTOM, AGE, CAUSE, EXAMINATION = "症状", "好发年龄", "病因", "检查"
TREATMENT, PREVENTION, COMPLICATION = "治疗", "预防", "并发症"
RELATIONS = (SYMPTOM, AGE, CAUSE, EXAMINATION, TREATMENT, PREVENTION, COMPLICATION)  # others have generic templates


@dataclass(frozen=True)
class Disease:
    """One head of the graph: its facts by relation, in the order of the file."""

    name: str
    facts: dict[str, list[str]]

    def listed(self, relation: str) -> str:
        """All facts of a relation, joined as a Chinese list."""
        return "、".join(self.facts[relation])


def diseases(triples: Sequence[Triple]) -> list[Disease]:
    """Group triples by head, in the order of the file; relations may be others than RELATIONS."""
    facts: dict[str, dict[str, list[str]]] = {}
    for triple in triples:
        tails = facts.setdefault(triple.head, {}).setdefault(triple.relation, [])
        if triple.tail not in tails:
            tails.append(triple.tail)
    return [Disease(name, by_relation) for name, by_relation in facts.items()]


def verbalize(disease: Disease) -> Iterator[Document]:
    """The facts of a disease as short running texts, one for each set of sentence forms."""
    forms = templates("knowledge_graph")["verbalize"]
    for variant in range(2):
        text = ""
        for relation in _ordered(disease):
            values = {"head": disease.name, "relation": relation, "tails": disease.listed(relation)}
            text += forms.get(relation, forms["generic"])[variant].format(**values)
        yield Document(text, f"knowledge_graph:{disease.name}", disease.name, disease.name)


def verbalize_with(disease: Disease, ask: Ask) -> Iterator[Built | Dropped]:
    """The same facts as one fluent paragraph by a teacher; `details` hold its "form", "teacher" or "template".

    A paragraph that lacks the name or a fact, or gives a number, a drug or an advice that no fact does, is Dropped with
    what was found, and the first text of `verbalize` takes its place.
    """
    plain = next(verbalize(disease))
    (row,) = _paragraph(plain, disease, ask)
    yield row
    if isinstance(row, Dropped):
        yield Built(plain, {"form": "template"})


@builder
def _paragraph(plain: Document, disease: Disease, ask: Ask) -> Built:
    facts = "\n".join(f"{relation}：{disease.listed(relation)}" for relation in _ordered(disease))
    prompts = templates("knowledge_graph")["verbalize_with"]
    text = answered(ask, prompts, {"text": str}, head=disease.name, facts=facts)["text"]
    missing = [fact for fact in (disease.name, *itertools.chain(*disease.facts.values())) if fact not in text]
    found = support(text, plain.text)
    if missing or found.missing_numbers or found.missing_terms or found.flips:
        detail = f"missing from it: {'、'.join(missing)}" if missing else found.describe()
        raise LeftOut("paragraph does not hold exactly the facts", detail)
    return Built(replace(plain, text=text), {"form": "teacher"})


def medkqa(disease: Disease) -> Iterator[Conversation]:
    """Knowledge questions: every relation in every phrasing."""
    table = templates("knowledge_graph")
    for relation in _ordered(disease):
        forms = table["medkqa"].get(relation, table["generic"])
        values = {"relation": relation, "tails": disease.listed(relation), "first": disease.facts[relation][0]}
        for i in range(len(forms["questions"])):
            yield _conversation(MEDKQA, disease, _rotated(forms, i), values)


def trerecom(disease: Disease) -> Iterator[Conversation]:
    """Treatment recommendations: a question in every phrasing, answered with treatment, care and warning signs."""
    if not {SYMPTOM, TREATMENT, PREVENTION, COMPLICATION} <= disease.facts.keys():
        return
    forms, symptoms = templates("knowledge_graph")["trerecom"], disease.facts[SYMPTOM]
    for i in range(len(forms["questions"])):
        first, second = (symptoms[j % len(symptoms)] for j in (i, i + 1))
        values = {"first": first, "second": second, **_care(disease)}
        yield _conversation(TRERECOM, disease, _rotated(forms, i), values)


def evidiag(disease: Disease) -> Iterator[Conversation]:
    """Evidence-based diagnosis over three turns, one for every third ordering of three symptoms (at most eight)."""
    needed = {SYMPTOM, AGE, EXAMINATION, TREATMENT, PREVENTION, COMPLICATION}
    if not needed <= disease.facts.keys() or len(disease.facts[SYMPTOM]) < 3:
        return
    forms = templates("knowledge_graph")["evidiag"]
    fixed = {"age": disease.facts[AGE][0], "exam": disease.facts[EXAMINATION][0], "exams": disease.listed(EXAMINATION)}
    # Every third ordering: neighbours differ in the last symptom only.
    for i, symptoms in enumerate(itertools.islice(itertools.permutations(disease.facts[SYMPTOM], 3), 0, 24, 3)):
        parts = ("durations", "openings", "inquiries", "findings", "diagnoses", "followups", "plans")
        duration, *turns = _rotated(forms, i, parts)
        values = dict(zip(("first", "second", "third"), symptoms, strict=True))
        yield _conversation(EVIDIAG, disease, turns, {"duration": duration, **values, **fixed, **_care(disease)})


def two_hop(diseases: Sequence[Disease], *, most: int = 4) -> Iterator[Conversation]:
    """Questions over two facts, at most `most` of a disease: what is asked for is not said of what the question names.

    Three symptoms that one disease of the list alone has -> its examinations or treatment; a disease -> prevention or
    treatment of a complication that is itself in the list. The row belongs to the first disease, `disease` of the row.
    Give only diseases of one side of a split.
    """
    forms = templates("knowledge_graph")["two_hop"]
    named = {disease.name: disease for disease in diseases}
    holders = _holders(diseases)
    for disease in diseases:
        rows: list[Conversation] = []
        triples = [
            triple
            for triple in itertools.combinations(disease.facts.get(SYMPTOM, [])[:8], 3)
            if set.intersection(*(holders[symptom] for symptom in triple)) == {disease.name}
        ]
        asked = [relation for relation in (EXAMINATION, TREATMENT) if relation in disease.facts]
        chosen = sorted(triples, key=lambda triple: number(disease.name, *triple))
        for relation, (first, second, third) in zip(asked, chosen, strict=False):
            values = {"first": first, "second": second, "third": third, "tails": disease.listed(relation)}
            rows.append(_phrased(forms["symptoms"][relation], disease, relation, values))
        known = [named[tail] for tail in disease.facts.get(COMPLICATION, []) if tail in named and tail != disease.name]
        hops = [(other, relation) for relation in (PREVENTION, TREATMENT) for other in known if relation in other.facts]
        for other, relation in hops[: max(0, most - len(rows))]:
            # With one complication of the list the question need not name it; with more, it could mean any.
            kind = "complication" if len(known) == 1 else "complications"
            values = {"complication": other.name, "all": disease.listed(COMPLICATION), "tails": other.listed(relation)}
            rows.append(_phrased(forms[kind][relation], disease, relation, values))
        yield from rows[:most]


def negative(diseases: Sequence[Disease], *, most: int = 2) -> Iterator[Conversation]:
    """Yes/no questions in pairs, at most `most` pairs of a disease: a fact of it, and one of another's that it lacks.

    The answer to the latter is that the material does not record it and what it does record, never that it cannot be.
    Such a fact is in no relation of the disease and too unlike all its facts to be one of them in other words. Ages are
    not asked for, as they overlap, nor complications and treatment, where it would be dangerous to take such an answer
    for a no. Give only diseases of one side of a split.
    """
    forms = templates("knowledge_graph")["negative"]
    tails: dict[str, list[str]] = {}
    for disease in diseases:
        for relation, facts in disease.facts.items():
            tails.setdefault(relation, []).extend(facts)
    for disease in diseases:
        asked = disease.facts.keys() - {AGE, COMPLICATION, TREATMENT}
        ordered = sorted(asked, key=lambda relation: (number(disease.name, relation), relation))
        pairs = ((relation, _foreign(tails[relation], relation, disease)) for relation in ordered)
        for relation, foreign in itertools.islice((pair for pair in pairs if pair[1]), most):
            true = pick(disease.facts[relation], disease.name, relation)
            others = "、".join(tail for tail in disease.facts[relation] if tail != true)
            told = {"task": MEDKQA, "questions": forms.get(relation, forms["generic"])}
            values = {"relation": relation, "tails": disease.listed(relation), "others": others}
            answers = [(true, forms["yes" if others else "only"]), (foreign, forms["no"])]
            for tail, answer in answers if number(disease.name) % 2 else answers[::-1]:
                yield _phrased({**told, "answers": answer}, disease, relation, {"tail": tail, **values})


def _foreign(tails: Sequence[str], relation: str, disease: Disease) -> str:
    """One of the facts that the disease lacks, or ""; a few draws, so that the time is linear in the graph."""
    drawn = (pick(tails, disease.name, relation, str(i)) for i in range(20))
    return next((tail for tail in drawn if _strange(tail, relation, disease)), "")


def _strange(tail: str, relation: str, disease: Disease) -> bool:
    """Whether a fact can be told from all those of the disease: by its text, most characters, and a finding's last one.

    So 咳嗽 is no stranger to 剧烈咳嗽, 避免烟草烟雾 none to 避免被动吸烟, 高热 none to 发热.
    """
    for fact in (disease.name, *itertools.chain(*disease.facts.values())):
        few = min(len(set(tail)), len(set(fact)))
        if tail in fact or fact in tail or 2 * len(set(tail) & set(fact)) >= few:
            return False
    return relation != SYMPTOM or tail[-1] not in {fact[-1] for fact in disease.facts[relation]}


def _holders(diseases: Sequence[Disease]) -> dict[str, set[str]]:
    """Of each symptom, the diseases that have it, or one that holds it or that it holds: 咳嗽, 剧烈咳嗽."""
    exact: dict[str, set[str]] = {}
    for disease in diseases:
        for symptom in disease.facts.get(SYMPTOM, []):
            exact.setdefault(symptom, set()).add(disease.name)
    near = {symptom: set(names) for symptom, names in exact.items()}
    for symptom, names in exact.items():
        if len(symptom) > 40:  # a description, which no other symptom holds or is held by but by chance
            continue
        for start, end in itertools.combinations(range(len(symptom) + 1), 2):
            if (part := symptom[start:end]) in exact:
                near[part] |= names
                near[symptom] |= exact[part]
    return near


def _phrased(forms: Mapping[str, Any], disease: Disease, relation: str, values: Mapping[str, str]) -> Conversation:
    key = (disease.name, relation, *values.values())
    turns = [pick(forms[part], part, *key) for part in ("questions", "answers")]
    return _conversation(forms["task"], disease, turns, values)


def _ordered(disease: Disease) -> list[str]:
    return [*(r for r in RELATIONS if r in disease.facts), *(r for r in disease.facts if r not in RELATIONS)]


def _care(disease: Disease) -> dict[str, str]:
    complication = disease.facts[COMPLICATION][0]
    return {"tails": disease.listed(TREATMENT), "care": disease.listed(PREVENTION), "complication": complication}


def _rotated(forms: Mapping[str, Any], i: int, parts: Sequence[str] = ("questions", "answers")) -> list[str]:
    """The i-th phrasing of each part, from the first on again after the last."""
    return [forms[part][i % len(forms[part])] for part in parts]


def _conversation(task: str, disease: Disease, turns: Sequence[str], values: Mapping[str, str]) -> Conversation:
    filled = [turn.format(head=disease.name, **values) for turn in turns]
    return spoken(*filled, source=f"knowledge_graph:{disease.name}", task=task, disease=disease.name)
