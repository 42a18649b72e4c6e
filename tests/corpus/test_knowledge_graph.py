"""A graph becomes text and instructions that say what it holds, and nothing is left of the templates."""

import re

import pytest

from pedgpt.corpus import EVIDIAG, MEDKQA, TRERECOM, diseases, evidiag, medkqa, trerecom, verbalize
from pedgpt.data import Triple

FACTS = {
    "症状": ["发热", "咳嗽", "鼻塞", "咽痛"],
    "好发年龄": ["6个月至3岁"],
    "病因": ["病毒感染", "受凉"],
    "检查": ["血常规", "胸部X线"],
    "治疗": ["休息", "补液"],
    "预防": ["勤洗手"],
    "并发症": ["中耳炎", "肺炎"],
}


def graph(head="感冒{0}", without=(), **changed):
    facts = {**FACTS, **changed}
    return [
        Triple(head, relation, tail, f"kg.tsv:{i}")
        for i, (relation, tails) in enumerate(facts.items())
        if relation not in without
        for tail in tails
    ]


def texts_of(conversation):
    return [message.content for message in conversation.messages]


def test_triples_are_grouped_by_head_in_order():
    shuffled = [*graph("甲", without=("治疗",)), *graph("乙"), Triple("甲", "治疗", "休息", "kg.tsv:99")]
    first, second = diseases([*shuffled, *shuffled])  # repeated facts are kept once
    assert (first.name, second.name) == ("甲", "乙")
    assert first.facts == {**FACTS, "治疗": ["休息"]} and second.facts == FACTS
    assert diseases([]) == []


def test_unknown_relation_is_an_error_that_names_the_line():
    with pytest.raises(ValueError, match="kg.tsv:7.*别名.*症状"):
        diseases([*graph(), Triple("感冒", "别名", "伤风", "kg.tsv:7")])


def test_verbalised_text_holds_every_fact():
    (disease,) = diseases(graph())
    documents = list(verbalize(disease))
    assert len({document.text for document in documents}) == len(documents) >= 2
    for document in documents:
        assert document.title == disease.name and disease.name in document.source
        for fact in [fact for facts in FACTS.values() for fact in facts]:
            assert document.text.count(fact) == 1
        assert document.text.count(disease.name) >= len(FACTS)
    (partial,) = diseases(graph(without=("病因", "并发症")))
    for document in verbalize(partial):
        assert "受凉" not in document.text and "补液" in document.text and "并发" not in document.text


def test_every_question_on_a_relation_is_answered_with_its_facts():
    (disease,) = diseases(graph())
    rows = list(medkqa(disease))
    questions = [texts_of(row)[0] for row in rows]
    assert len(set(questions)) == len(rows)
    told = {relation: 0 for relation in FACTS}
    for row in rows:
        question, answer = texts_of(row)
        assert row.task == MEDKQA and disease.name in question and disease.name in answer
        (relation,) = [r for r, facts in FACTS.items() if all(fact in answer for fact in facts)]
        told[relation] += 1
    assert min(told.values()) == max(told.values()) >= 5
    (partial,) = diseases(graph(without=("检查",)))
    assert len(list(medkqa(partial))) == len(rows) - told["检查"]


def test_treatment_answers_hold_treatment_care_and_warning():
    (disease,) = diseases(graph())
    rows = list(trerecom(disease))
    assert len({texts_of(row)[0] for row in rows}) == len(rows) >= 6
    for row in rows:
        question, answer = texts_of(row)
        assert row.task == TRERECOM and disease.name in question
        assert all(fact in answer for fact in ["休息", "补液", "勤洗手", "中耳炎"])


def test_diagnosis_is_three_turns_on_evidence():
    (disease,) = diseases(graph())
    rows = list(evidiag(disease))
    assert 4 <= len(rows) <= 8
    assert len({texts_of(row)[0] for row in rows}) == len(rows)
    for row in rows:
        opening, inquiry, finding, diagnosis, _, plan = texts_of(row)
        assert [message.role for message in row.messages] == ["user", "assistant"] * 3
        assert row.task == EVIDIAG
        assert disease.name not in opening + inquiry + finding  # not named before it is concluded
        assert disease.name in diagnosis and "血常规" in diagnosis and "6个月至3岁" in finding
        complained = [symptom for symptom in FACTS["症状"] if symptom in opening]
        (found,) = [symptom for symptom in FACTS["症状"] if symptom in finding]
        assert len(complained) == 2 and found not in complained and found in inquiry
        assert all(symptom in diagnosis for symptom in [*complained, found])
        assert "补液" in plan and "勤洗手" in plan and "中耳炎" in plan


@pytest.mark.parametrize(
    ("builder", "needs"),
    [
        (trerecom, ["症状", "治疗", "预防", "并发症"]),
        (evidiag, ["症状", "好发年龄", "检查", "治疗", "预防", "并发症"]),
    ],
)
def test_disease_that_lacks_a_needed_relation_gives_no_rows(builder, needs):
    for relation in FACTS:
        (disease,) = diseases(graph(without=(relation,)))
        assert bool(list(builder(disease))) == (relation not in needs)


@pytest.mark.parametrize(("symptoms", "most"), [(1, 0), (2, 0), (3, 2), (6, 8)])
def test_diagnosis_needs_three_symptoms(symptoms, most):
    (disease,) = diseases(graph(症状=["发热", "咳嗽", "鼻塞", "咽痛", "皮疹", "呕吐"][:symptoms]))
    rows = list(evidiag(disease))
    assert len(rows) <= most and bool(rows) == bool(most)
    assert list(trerecom(disease))  # needs one symptom only


def test_no_placeholder_is_left_and_the_same_graph_gives_the_same_rows():
    (disease,) = diseases(graph("感冒"))
    for builder in (medkqa, trerecom, evidiag):
        rows = list(builder(disease))
        assert rows == list(builder(diseases(graph("感冒"))[0]))
        for row in rows:
            assert not re.search(r"[{}]|None", "".join(texts_of(row)))
    assert not any(re.search(r"[{}]", document.text) for document in verbalize(disease))
