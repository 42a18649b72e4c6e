"""Stage-3 pairs: both sides say what the correct answer says, one of them humanely."""

import re
from pathlib import Path

import pytest

from pedgpt.corpus.builders.preferences import humane_pair
from pedgpt.corpus.rows import Built, Dropped, Unusable
from pedgpt.data import read_conversations
from pedgpt.data.records import Conversation, Message, PreferencePair

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
FEVER = "宝宝发烧38.5度怎么办？"
ANSWER = "您好，患儿家长应注意观察。如果体温超过38.5度，可以用退热药，千万不要捂汗，您可以多喂水。建议您及时就医。"


def row(question, answer, *more, system=""):
    turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate([question, answer, *more])]
    return Conversation((*([Message("system", system)] if system else []), *turns), "qa.csv:3", "x", "感冒", "儿科")


def only(conversation, **teachers):
    (result,) = humane_pair(conversation, **teachers)
    return result


def test_offline_pair():
    result = only(row(FEVER, ANSWER, system="你是医生"))
    pair = result.record
    assert isinstance(pair, PreferencePair)
    assert [m.content for m in pair.prompt] == ["你是医生", FEVER]
    assert (pair.source, pair.disease, pair.department) == ("qa.csv:3", "感冒", "儿科")
    said = "您应注意观察。如果体温超过38.5度，可以用退热药，千万不要捂汗，您可以多喂水。建议您及时就医。"
    opening, middle, closing = pair.chosen.partition(said)
    assert middle and re.search("您", opening) and re.search("孩子|体温", opening) and closing.endswith("。")
    assert pair.rejected == "患儿家长应注意观察。如体温超过38.5度，可用退热药，勿捂汗，可多喂水。建议及时就医。"
    assert result.details == {"correct": ANSWER, "kind": "fever", "chosen_by": "template", "rejected_by": "template"}


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("宝宝不肯吃奶是怎么了？", "多数是厌奶期。", "feeding"),
        ("孩子夜里老醒怎么办？", "先看看是不是热了。", "sleep"),
        ("孩子血常规白细胞偏高严重吗？", "多提示感染。", "examination"),
        ("孩子湿疹用什么药？", "保湿为主。", "treatment"),
        ("手足口病是什么？", "由肠道病毒引起。", "knowledge"),
        ("孩子有点不对劲。", "先观察。", "worry"),
        ("孩子发烧抽搐", "请立即拨打120，让孩子侧躺。", "urgent"),
        ("孩子误吞电池", "不要催吐，马上去医院。", "urgent"),
        ("孩子咳了两声", "一般不需要马上去医院，多喝水。", "worry"),
        ("孩子呛奶了", "不用打120，拍拍背就好。", "worry"),
        ("孩子喝多少奶粉？", "每次120ml就够。", "feeding"),
        ("我血压正常吗？", "高压不超过120就正常。", "examination"),
        ("孩子夜里咳嗽", "多喝水。", "worry"),
        ("孩子嗜睡", "请仔细观察。", "worry"),
    ],
)
def test_opening_fits_the_question(question, answer, kind):
    result = only(row(question, answer))
    assert result.details["kind"] == kind
    assert answer in result.record.chosen and not result.record.chosen.startswith(answer)
    assert result.record.chosen != result.record.rejected


def test_adults_are_not_told_of_children():
    chosen = only(row("高血压怎么治疗？", "低盐饮食，规律服药。")).record.chosen
    assert "孩子" not in chosen and "宝宝" not in chosen


@pytest.mark.parametrize("question", ["请为一名有咳嗽的肺炎患儿制定治疗计划。", "肺炎患儿出现气促，下一步怎么处理？"])
def test_colleagues_are_not_comforted(question):
    assert list(humane_pair(row(question, "吸氧，补液。"))) == []


def test_danger_is_no_time_to_calm_down():
    answers = [f"可发生心源性休克，第{i}天最多见。" for i in range(1, 10)]
    said = [only(row(f"川崎病{i}怎么治？", answer)).record.chosen for i, answer in enumerate(answers)]
    assert not [chosen for chosen in said if "着急" in chosen or "放宽心" in chosen]
    said = [only(row(f"湿疹{i}怎么治？", "注意保湿。")).record.chosen for i in range(9)]
    assert [chosen for chosen in said if "着急" in chosen]


@pytest.mark.parametrize(
    ("answer", "plain"),
    [("不要去网吧，也不要去酒吧。", "勿去网吧，也勿去酒吧。"), ("多喝水吧，多休息哈。", "多喝水，多休息。"),
     ("孩子打哈哈，咿咿呀呀，不怕。", "孩子打哈哈，咿咿呀呀，不怕。")],
)  # fmt: skip
def test_particles_alone_are_cut(answer, plain):
    assert only(row("孩子上网", answer)).record.rejected == plain


def test_telegraph_style_keeps_the_meaning():
    answer = "您先别担心。不需要手术，也不应该热敷，要不要紧看检查。如果疼的话，要复查；肿的话，需要拍片。"
    plain = "不需手术，也不应热敷，要不要紧看检查。如疼，要复查；肿时，需拍片。"
    assert only(row("孩子骨折", answer)).record.rejected == plain


def test_lists_stay_lists():
    chosen = only(row("孩子湿疹怎么护理？", "注意：1、保湿；2、少洗澡。")).record.chosen
    assert chosen.split("\n")[1:4] == ["注意：", "1. 保湿。", "2. 少洗澡。"]


def test_dialogues_yield_nothing_and_empty_answers_are_dropped():
    assert list(humane_pair(row("问", "答", "又问", "又答"))) == []
    result = only(row("孩子发烧", "您好，谢谢，祝您健康！"))
    assert isinstance(result, Dropped) and result.reason == "no answer left to rephrase"


def says(answer):
    return lambda system, user, fields: {"answer": answer}


def raises(system, user, fields):
    raise Unusable("no JSON")


def test_teachers_write_each_side():
    humane, bare = "您别急，孩子烧到38.5度以上再用退热药，多喂水。", "体温超过38.5度用退热药。"
    result = only(row(FEVER, ANSWER), ask=says(humane), plain=says(bare))
    assert (result.record.chosen, result.record.rejected) == (humane, bare)
    assert (result.details["chosen_by"], result.details["rejected_by"]) == ("teacher", "teacher")
    result = only(row(FEVER, ANSWER), ask=says(humane))
    assert result.record.chosen == humane and result.details["rejected_by"] == "template"
    result = only(row(FEVER, ANSWER), plain=says(bare))
    assert result.record.rejected == bare and result.details["chosen_by"] == "template"


@pytest.mark.parametrize("side", ["ask", "plain"])
@pytest.mark.parametrize(
    ("answer", "added"),
    [("每次喂10毫升退热药。", "10"), ("考虑肺炎，多喂水。", "炎"), ("吃阿莫西林。", "阿莫西林"), ("拍胸片。", "胸片")],
)
def test_a_fact_that_the_answer_lacks_is_dropped(side, answer, added):
    result = only(row(FEVER, ANSWER), **{side: says(answer)})
    assert isinstance(result, Dropped) and result.reason == "teacher's answer was not supported"
    assert added in result.detail


@pytest.mark.parametrize("side", ["ask", "plain"])
def test_unusable_teacher_drops_the_row(side):
    result = only(row(FEVER, ANSWER), **{side: raises})
    assert isinstance(result, Dropped) and result.reason == "teacher's answer was unusable"


def test_equal_sides_are_dropped():
    same = says("体温超过38.5度用退热药。")
    assert only(row(FEVER, ANSWER), ask=same, plain=same).reason == "chosen equals rejected"


def check(conversations, fewest):
    results = [result for conversation in conversations for result in humane_pair(conversation)]
    assert results == [result for conversation in conversations for result in humane_pair(conversation)]
    rows = {conversation.source: conversation for conversation in conversations}
    pairs = [result.record for result in results if isinstance(result, Built)]
    assert len(pairs) >= fewest
    for pair in pairs:
        numbers = set(re.findall(r"[0-9]+", rows[pair.source].messages[-1].content))
        assert pair.chosen != pair.rejected and len(pair.chosen) > len(pair.rejected)
        for side in (pair.chosen, pair.rejected):
            assert set(re.findall(r"[0-9]+", side)) >= numbers, pair.source
        assert not re.match("[你您]好[，,！!]", pair.rejected)


def test_sample_answers_become_pairs():
    conversations = read_conversations(ROOT / "recipes" / "sample_corpus" / "general_medical_qa.jsonl")
    check(conversations, len(conversations))


@pytest.mark.skipif(not SHARED.is_dir(), reason="real questions are not here")
def test_real_answers_become_pairs():
    check(read_conversations(SHARED / "pediatric_qa.jsonl", on_bad_row="skip"), 500)
