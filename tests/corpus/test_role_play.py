"""Rows of role-playing are asked as a person would, answered from the passage, and refused where it says otherwise."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pedgpt.corpus.builders.role_play import role_play, subject
from pedgpt.corpus.rows import Built, Dropped, Unusable
from pedgpt.data import Document, read_documents
from pedgpt.data.tasks import MEDKQA, TRERECOM

SAMPLE = Path(__file__).resolve().parents[2] / "recipes" / "sample_corpus"
COLD = Document(
    "感冒是鼻和咽部急性炎症的总称，多见于6个月至6岁。绝大多数由病毒引起，受凉可诱发。主要表现为发热、鼻塞、流涕。"
    "诊断依靠病史和咽部体格检查，必要时查血常规。治疗以休息并多饮水为主，发热时使用退热药。因此一般不使用抗生素。"
    "其病程多为一周左右，预后良好，少数并发中耳炎。勤洗手可减少发生。转诊指征：3个月以下发热，呼吸急促。",
    "guide.jsonl:4",
    "中国儿童感冒诊疗指南（2023年版）",
    "感冒",
    "儿科",
)
ASPECTS = {
    "概述": ("总称",), "病因": ("病毒引起",), "症状": ("表现为发热",), "检查": ("血常规",),
    "治疗": ("休息并多饮水", "抗生素"), "并发症与预后": ("病程",), "预防": ("勤洗手",), "就医与转诊": ("3个月以下",),
}  # fmt: skip


def asked(row):
    return row.record.messages[0].content


def said(row):
    return row.record.messages[1].content


def test_every_aspect_of_a_passage_is_asked_for_and_answered_with_its_sentences():
    rows = list(role_play(COLD))
    assert rows == list(role_play(COLD))
    assert {row.details["aspect"] for row in rows} == set(ASPECTS)
    for row in rows:
        aspect = row.details["aspect"]
        assert [message.role for message in row.record.messages] == ["user", "assistant"]
        assert "感冒" in asked(row) and "指南" not in asked(row)
        for other, marks in ASPECTS.items():
            assert all((mark in said(row)) == (other == aspect) for mark in marks), (aspect, said(row))
        assert row.record.task == (TRERECOM if aspect in ("治疗", "就医与转诊") else MEDKQA)
        assert (row.record.disease, row.record.department, row.record.source) == ("感冒", "儿科", "guide.jsonl:4")
        assert row.details["role"] in ("parent", "colleague") and 0.6 <= row.details["support"] <= 1
        assert not re.search(r"[{}]", asked(row) + said(row))
    (prognosis,) = [said(row) for row in rows if row.details["aspect"] == "并发症与预后"]
    assert "感冒的病程多为" in prognosis and "其病程" not in prognosis


@pytest.mark.parametrize(
    ("disease", "title", "source", "expected"),
    [
        ("感冒", "治疗", "a.md:3", "感冒"),
        ("", "急性支气管炎诊疗建议", "a.jsonl:1", "急性支气管炎"),
        ("", "《儿童肺炎支原体肺炎诊疗指南（2023年版）》", "a.jsonl:1", "肺炎支原体肺炎"),
        ("", "小儿腹泻病", "a.jsonl:1", "小儿腹泻病"),
        ("", "小儿腹泻病诊疗建议", "a.jsonl:1", "小儿腹泻病"),
        ("", "热性惊厥诊断治疗与管理专家共识", "a.jsonl:1", "热性惊厥"),
        ("", "治疗", "a.md:3 › 第三章 呼吸系统疾病 › 第一节 肺炎 › 二、治疗", "肺炎"),
        ("", "治疗", "a.md:3 › 二、治疗", ""),
        ("", "第三节", "a.md:3 › 21三体综合征 › 第三节", "21三体综合征"),
        ("", "治疗", "肺炎.md:3", ""),
        ("", "", "a.txt:1", ""),
        ("", "关于进一步加强全省儿童医疗卫生机构建设的若干意见的通知", "a.txt:1", ""),
    ],
)
def test_subject(disease, title, source, expected):
    passage = Document("治疗以休息为主。", source, title, disease)
    assert subject(passage) == expected
    assert [expected in asked(row) for row in role_play(passage)] == ([True] if expected else [])


def test_a_heading_settles_sentences_without_cues():
    (row,) = role_play(Document("多晒太阳，多到户外走走。", "a.md:3 › 佝偻病 › 预防", "预防"))
    assert row.details["aspect"] == "预防" and "佝偻病" in asked(row)


@pytest.fixture(scope="module")
def sample():
    documents = read_documents([SAMPLE / "textbook.jsonl", SAMPLE / "guidelines.jsonl"])
    return [(document, row) for document in documents for row in role_play(document)]


def test_sample_corpus(sample):
    assert len(sample) > 400 and all(isinstance(row, Built) for _, row in sample)
    assert {row.details["role"] for _, row in sample} == {"parent", "colleague"}
    roles = Counter(row.details["role"] for _, row in sample)
    assert min(roles.values()) > 0.4 * len(sample)
    assert len({asked(row) for _, row in sample}) > 0.9 * len(sample)
    per_passage = Counter(document.source for document, _ in sample)
    assert len(per_passage) == 104 and min(per_passage.values()) >= 2
    for document, row in sample:
        answer = said(row)
        name = document.title.removesuffix("诊疗建议")
        assert name in asked(row)
        assert not re.search(r"[；;，、]$|[{}]|。。", answer)
        # Whatever the templates add, a sentence of the passage is in the answer as it stands, but for its pronoun.
        text = document.text.replace("本病", name)
        assert any(part and part in answer for part in re.split("[。；，：]", text))
    bare = [re.sub("^(您好，)?(别着急，|我来说明一下。)?(好的。)?", "", said(row)) for _, row in sample]
    assert not [answer for answer in bare if re.match("但|因此|所以|同时|其(?!中)|本病|该病|随后|并[^发]", answer)]


def test_danger_is_told_without_calming_words(sample):
    calmed = [said(row) for _, row in sample if "别着急" in said(row)]
    assert calmed and not [answer for answer in calmed if re.search("立即|急(?!，)|休克|死亡|危险|危及", answer)]
    passage = Document("重者可突发心源性休克。", "a.md:3", "临床表现", "{}")
    for i in range(40):
        for row in role_play(replace(passage, disease=f"心肌炎{i}", text=f"{i}型{passage.text}")):
            assert "别着急" not in said(row)


def teacher(*answers):
    left = list(answers)

    def ask(system, user, fields):
        assert "医" in system or "角色" in system
        answer = left.pop(0)
        if answer is None:
            raise Unusable("no JSON in three answers")
        assert set(fields) == set(answer) and all(isinstance(answer[name], kind) for name, kind in fields.items())
        assert COLD.text in user and "感冒" in user
        return answer

    return ask


def asks(question):
    return {"question": question, "role": "家长"}


TREATMENT = asks("孩子感冒了，家里该怎么护理，要不要用抗生素？")
GOOD = {
    "answer": "您好，感冒以休息并多饮水为主，发热时可以使用退热药，一般不使用抗生素。",
    "evidence": "治疗以休息并多饮水为主，发热时使用退热药。",
}
CAUSE = asks("请教一下，感冒的病因是什么？")
CAUSED = {"answer": "绝大多数由病毒引起，受凉也可诱发。", "evidence": "绝大多数由病毒引起，受凉可诱发"}


def test_teacher_asks_in_one_role_and_answers_in_another():
    first, second = role_play(COLD, teacher(TREATMENT, GOOD, CAUSE, CAUSED))
    assert (asked(first), said(first)) == (TREATMENT["question"], GOOD["answer"])
    assert first.record.task == TRERECOM and second.record.task == MEDKQA
    assert (first.details["role"], second.details["role"]) == ("parent", "colleague")
    assert (first.details["aspect"], second.details["aspect"]) == ("治疗", "病因")
    assert first.details["evidence"] == GOOD["evidence"] and first.details["support"] > 0.8
    assert (first.record.disease, first.record.source) == ("感冒", "guide.jsonl:4")


UNSUPPORTED = "answer not supported by its passage"


@pytest.mark.parametrize(
    ("answers", "reason", "detail"),
    [
        ([None], "teacher's answer was unusable", "three answers"),
        ([TREATMENT, None], "teacher's answer was unusable", "three answers"),
        ([asks("根据上述内容，感冒怎么治？")], "question points at its passage", "上述"),
        ([TREATMENT, GOOD | {"evidence": "感冒要用抗生素。"}], "evidence is not in its passage", "用抗生素"),
        ([TREATMENT, GOOD | {"evidence": "。"}], "evidence is not in its passage", ""),
        ([TREATMENT, GOOD | {"answer": "文中说休息并多饮水。"}], "answer points at its passage", "文中"),
        ([TREATMENT, GOOD | {"answer": GOOD["answer"] + "每日三次。"}], UNSUPPORTED, "三次"),
        ([TREATMENT, GOOD | {"answer": "感冒以休息并多饮水为主，发热时使用布洛芬。"}], UNSUPPORTED, "布洛芬"),
        ([TREATMENT, GOOD | {"answer": "感冒可以使用抗生素，休息并多饮水。"}], UNSUPPORTED, "turned"),
        ([TREATMENT, GOOD | {"answer": "推拿配合艾灸效果明显，忌口海鲜。"}], UNSUPPORTED, "share 0"),
    ],
)  # fmt: skip
def test_what_a_teacher_gets_wrong_is_dropped_and_the_other_role_goes_on(answers, reason, detail):
    dropped, built = role_play(COLD, teacher(*answers, CAUSE, CAUSED))
    assert isinstance(dropped, Dropped) and (dropped.reason, dropped.source) == (reason, "guide.jsonl:4")
    assert detail in dropped.detail
    assert isinstance(built, Built) and asked(built) == CAUSE["question"]


def test_two_roles_do_not_ask_the_same():
    built, dropped = role_play(COLD, teacher(TREATMENT, GOOD, TREATMENT))
    assert isinstance(built, Built) and dropped.reason == "question repeats another role's"
