"""A graph becomes text and instructions that say what it holds, and nothing is left of the templates."""

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

from pedgpt.corpus.builders.knowledge_graph import (
    diseases,
    evidiag,
    medkqa,
    negative,
    trerecom,
    two_hop,
    verbalize,
)
from pedgpt.data import Triple, iter_records
from pedgpt.data.tasks import EVIDIAG, MEDKQA, TRERECOM

SAMPLE = Path(__file__).resolve().parents[2] / "recipes" / "sample_corpus" / "knowledge_graph.tsv"

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


def test_relations_of_a_users_own_have_generic_text_and_questions():
    names = [Triple("感冒", "别名", name, "kg.tsv:1") for name in ("伤风", "着凉")]
    (disease,) = diseases([names[0], *graph("感冒"), names[1]])
    first, second = verbalize(disease)
    assert first.text.endswith("感冒的别名：伤风、着凉。") and second.text.count("伤风、着凉") == 1
    asked = [row for row in medkqa(disease) if "别名" in texts_of(row)[0]]
    assert texts_of(asked[0]) == ["感冒的别名是什么？", "感冒的别名：伤风、着凉。"]
    assert len(asked) >= 2 and all("伤风、着凉" in texts_of(row)[1] for row in asked)
    (plain,) = diseases(graph("感冒"))
    assert len(list(medkqa(disease))) == len(list(medkqa(plain))) + len(asked)
    (alone,) = diseases([Triple("感冒", "{别名}", "伤{0}风", "kg.tsv:1")])  # braces are text
    assert all("伤{0}风" in texts_of(row)[1] for row in medkqa(alone)) and "伤{0}风" in next(verbalize(alone)).text


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
        assert {row.disease for row in rows} == {"感冒"}
        assert rows == list(builder(diseases(graph("感冒"))[0]))
        for row in rows:
            assert not re.search(r"[{}]|None", "".join(texts_of(row)))
    assert not any(re.search(r"[{}]", document.text) for document in verbalize(disease))


@pytest.fixture(scope="module")
def sample():
    return diseases(list(iter_records(SAMPLE, "triples")))


def test_two_hops_from_symptoms_that_one_disease_alone_has(sample):
    facts = {disease.name: disease.facts for disease in sample}
    rows = list(two_hop(sample))
    assert rows == list(two_hop(sample)) and len({texts_of(row)[0] for row in rows}) == len(rows) > 100
    assert max(Counter(row.disease for row in rows).values()) <= 4
    by_symptoms = 0
    for row in rows:
        question, answer = texts_of(row)
        own = facts[row.disease]
        listed = {r: "、".join(tails) for r, tails in own.items()}
        assert row.disease in answer and not re.search(r"[{}]", question + answer)
        if row.disease in question:
            continue
        by_symptoms += 1
        relation = "检查" if row.task == MEDKQA else "治疗"
        assert listed[relation] in answer
        told = [s for s in own["症状"] if s in question]
        # Brute force: every disease that has something like each of three of the symptoms named.
        for triple in itertools.combinations(told, 3):
            if question.count("、") and all(s in answer for s in triple):
                alike = [d for d, f in facts.items()
                         if all(any(s in t or t in s for t in f["症状"]) for s in triple)]  # fmt: skip
                if alike == [row.disease]:
                    break
        else:
            raise AssertionError(question)
    assert by_symptoms > 60


def test_symptoms_that_fit_two_diseases_are_not_asked_for():
    two = graph("甲") + graph("乙", 症状=["高热发热", "咳嗽", "鼻塞", "咽痛"])
    assert not list(two_hop(diseases(two)))
    three = two + [Triple("甲", "症状", "皮疹", "x")]
    asked = [texts_of(row)[0] for row in two_hop(diseases(three))]
    assert len(asked) == 2 and all("皮疹" in question for question in asked)


def test_two_hops_over_a_complication():
    known = [*graph("甲", 并发症=["乙", "丁"]), *graph("乙", 治疗=["光疗"], 预防=["晒太阳"], 并发症=["甲状腺炎"])]
    rows = [row for row in two_hop(diseases(known)) if row.disease == "甲"]
    assert [row.task for row in rows] == [MEDKQA, TRERECOM]
    for row, tail in zip(rows, ("晒太阳", "光疗"), strict=True):
        question, answer = texts_of(row)
        assert "甲" in question and "乙" not in question and tail in answer and "乙" in answer
    more = [*known, *graph("丁", 治疗=["手术"], 预防=["系安全带"])]
    rows = [row for row in two_hop(diseases(more)) if row.disease == "甲"]
    assert len(rows) == 4  # which of them is meant must be said
    assert ["乙" in texts_of(row)[0] for row in rows] == [True, False, True, False]
    assert len([row for row in two_hop(diseases(more), most=1) if row.disease == "甲"]) == 1
    # A complication on the other side of the split is no disease of the list.
    assert not any("乙" in "".join(texts_of(row)) for row in two_hop(diseases(graph("甲", 并发症=["乙"]))))


def test_yes_and_no_are_balanced_and_true(sample):
    facts = {disease.name: disease.facts for disease in sample}
    rows = list(negative(sample))
    assert rows == list(negative(sample)) and len({texts_of(row)[0] for row in rows}) == len(rows)
    assert set(Counter(row.disease for row in rows).values()) <= {2, 4} and len(rows) > 200
    answers = Counter()
    for row in rows:
        question, answer = texts_of(row)
        own = facts[row.disease]
        every = [tail for tails in own.values() for tail in tails]
        told = {r for r, tails in own.items() if sum(tail in answer for tail in tails) == len(tails)}
        assert told and row.task == MEDKQA and row.disease in question and not re.search(r"[{}]", question + answer)
        yes = answer.startswith("是的")
        answers[yes] += 1
        asked = question.replace(row.disease, "")
        if yes:
            assert any(tail in question for tail in every)  # which may hold the disease's name
        else:
            assert "没有记载" in answer and re.search("请.*(?:核实|咨询)", answer) and "排除" in answer
            assert not any(tail in asked for tail in every)
            assert not re.search("不会|不可能|不能|绝不|不支持", answer) and "警惕" not in question
            (strange,) = re.findall("没有记载(.+?)，记载的是", answer)
            assert strange in question and not any(strange in tail or tail in strange for tail in every)
            held = {relation for f in facts.values() for relation, tails in f.items() if strange in tails}
            assert held - {"好发年龄", "并发症", "治疗"}  # a no to these could be dangerous
    assert answers[True] == answers[False]
    first = Counter(texts_of(row)[1].startswith("是的") for row in rows[::2])
    assert min(first.values()) > len(sample) // 4  # neither always comes first


def test_what_resembles_a_fact_is_not_asked_for_as_a_stranger():
    facts = {"症状": "发热", "预防": "避免被动吸烟", "病因": "受凉"}
    known = [Triple("甲", relation, tail, "a") for relation, tail in facts.items()]
    for relation, tail, strange in [
        ("症状", "高热", False), ("症状", "反复发热", False), ("症状", "受凉", False), ("症状", "咳嗽", True),
        ("预防", "避免烟草烟雾", False), ("预防", "勤洗手", True),
    ]:  # fmt: skip
        rows = negative(diseases([*known, Triple("乙", relation, tail, "b")]))
        asked = [texts_of(row)[0] for row in rows if row.disease == "甲"]
        assert any(tail in question for question in asked) == strange, (tail, asked)
    assert not list(negative(diseases(known))) and not list(negative([])) and not list(two_hop([]))
