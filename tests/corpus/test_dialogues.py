"""Cleaned dialogues: courtesies go, a teacher completes terse turns, and nothing medical is lost."""

import re
from collections import Counter
from pathlib import Path

import pytest

from pedgpt.corpus.builders.dialogues import evidence, evidiag_dialogue, without_boilerplate, without_greeting
from pedgpt.corpus.rows import Built, Dropped, Unusable
from pedgpt.data import read_conversations
from pedgpt.data.records import Conversation, Message
from pedgpt.data.tasks import EVIDIAG

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
SAMPLE = Path(__file__).parents[2] / "recipes" / "sample_corpus" / "consultations.jsonl"


def dialogue(*turns, system=""):
    spoken = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns)]
    return Conversation((*([Message("system", system)] if system else []), *spoken), "d.jsonl:1", "", "肺炎", "儿科")


def built(conversation, ask=None):
    (row,) = evidiag_dialogue(conversation, ask)
    assert isinstance(row, Built), row
    return row


def turns_of(row):
    return [message.content for message in row.record.messages]


FEVER = "孩子三岁，发烧两天，有点咳嗽。"
ASKS = "最高多少度？有没有气促？"
FINDS = "最高39.2度，没有气促。"
DIAGNOSIS = "考虑急性上呼吸道感染，多喝水，注意观察。"


def test_greetings_thanks_and_farewell_are_cut():
    row = built(
        dialogue(
            "医生您好", "您好，请问有什么可以帮您的？",
            FEVER, ASKS,
            FINDS, "感谢您提供的信息。" + DIAGNOSIS + "祝您的孩子早日康复！",
            "好的，我会按照您的建议去做的，谢谢医生！", "不客气，如果还有其他问题，请随时向我咨询。祝您身体健康！",
        )
    )  # fmt: skip
    assert turns_of(row) == [FEVER, ASKS, FINDS, DIAGNOSIS]
    assert row.details == {"cut_turns": 4, "rewritten": []}
    assert (row.record.task, row.record.source, row.record.disease) == (EVIDIAG, "d.jsonl:1", "肺炎")
    assert turns_of(built(row.record)) == turns_of(row)  # cleaning what is clean changes nothing


def test_patients_turns_around_a_nod_become_one():
    turns = ("孩子三岁", "嗯", "发烧两天", "好的，", "还有点咳嗽。", ASKS, FINDS, DIAGNOSIS)
    row = built(dialogue(*turns, system="你是医生"))
    assert turns_of(row) == ["你是医生", "孩子三岁。发烧两天。还有点咳嗽。", ASKS, FINDS, DIAGNOSIS]
    assert row.details["cut_turns"] == 4


@pytest.mark.parametrize(
    "turn", ["发烧吗？", "咳嗽几天了？", "考虑肺炎。", "39度？", "多喝水。", "先拍胸片。", "不是肺炎。"]
)
def test_evidence_and_advice_stay_as_written(turn):
    assert turns_of(built(dialogue(FEVER, turn, FINDS, DIAGNOSIS)))[1] == turn


def test_a_patients_answer_is_no_courtesy():
    row = built(dialogue(FEVER, "愿意住院吗？", "好的。", "请先做检查。"))
    assert turns_of(row)[2] == "好的。"


def test_evidence_at_the_end_is_kept_with_its_answer():
    last = "好的，我会坚持用阿莫西林颗粒，谢谢。"
    row = built(dialogue(FEVER, DIAGNOSIS, last, "不客气，祝您早日康复！"))
    assert turns_of(row)[-2:] == [last, "不客气，祝您早日康复！"]


def test_what_is_left_of_one_turn_is_for_the_caller_to_classify():
    row = built(dialogue(FEVER, DIAGNOSIS, "谢谢", "不客气"))
    assert turns_of(row) == [FEVER, DIAGNOSIS] and row.record.task == ""


@pytest.mark.parametrize(
    "turns",
    [
        ("你好", "您好", "谢谢", "不客气"),
        ("今天天气怎么样？", "今天晴朗，适合散步。"),
        ("孩子肚子痛。", "嗯", "谢谢", "不客气"),  # the doctor says nothing
    ],
)
def test_without_medical_content_it_is_dropped(turns):
    (row,) = evidiag_dialogue(dialogue(*turns))
    assert isinstance(row, Dropped) and row.reason == "fewer than two turns after cleaning"
    assert row.source == "d.jsonl:1" and row.detail.startswith(turns[0])


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("多喝水。以上是对“孩子发烧”这个问题的建议，希望对您有帮助，祝您健康！", "多喝水。"),
        ("您好，我是某某智能医学助手，根据您的描述，考虑湿疹。", "根据您的描述，考虑湿疹。"),
        ("不客气，如果症状加重，请及时就医。", "如果症状加重，请及时就医。"),
        ("如果症状加重，请随时联系我。", "如果症状加重，请随时联系我。"),
        ("请按时复诊，祝您手术顺利！", "请按时复诊。"),
        ("如果您还有其他疑问或需要进一步帮助，请随时告诉我。", ""),
        ("请记住，以上建议仅供参考。", ""),
        ("1. 多休息。\n祝早日康复！\n2. 多喝水。", "1. 多休息。\n2. 多喝水。"),
        # none of these is a courtesy
        ("很有希望，多数孩子能长期生存。", "很有希望，多数孩子能长期生存。"),
        ("希望您能提供更多症状的信息。", "希望您能提供更多症状的信息。"),
        ("如果需要帮助，请随时来医院。", "如果需要帮助，请随时来医院。"),
        ("可以。", "可以。"),
        ("你好，不是医生说的那样。", "你好，不是医生说的那样。"),
    ],
)
def test_boilerplate(text, cleaned):
    assert without_boilerplate(text) == cleaned == without_boilerplate(cleaned)


def test_greetings_open_a_text():
    assert without_greeting("你好，您好！孩子咳嗽。") == "孩子咳嗽。"
    assert without_greeting("您好") == "" and without_greeting("你好转了。") == "你好转了。"


def says(answer):
    return lambda system, user, fields: {"answer": answer}


def raises(system, user, fields):
    raise Unusable("no JSON")


def test_teacher_completes_a_terse_turn():
    seen = []

    def ask(system, user, fields):
        seen.append((user, dict(fields)))
        return {"answer": "您说孩子肚子痛，之前查过吗？"}

    row = built(dialogue("孩子最近总说肚子痛。", "查过吗？", FINDS, DIAGNOSIS), ask)
    assert turns_of(row)[1] == "您说孩子肚子痛，之前查过吗？"
    assert len(seen) == 1 and "孩子最近总说肚子痛。" in seen[0][0] and seen[0][1] == {"answer": str}


@pytest.mark.parametrize(
    "answer", ["查过血常规吗？", "您说孩子肚子痛，查过3次吗？", "查？", "孩子肚子痛，考虑阑尾炎，查过吗？"]
)
def test_a_teachers_new_fact_is_not_taken(answer):
    row = built(dialogue("孩子最近总说肚子痛。", "查过吗？", FINDS, DIAGNOSIS), says(answer))
    assert turns_of(row)[1] == "查过吗？" and row.details["rewritten"] == []


def test_a_teacher_may_not_change_a_diagnosis():
    row = built(dialogue(FEVER, "考虑肺炎。", FINDS, DIAGNOSIS), says("孩子发烧、咳嗽，可能是感冒，再观察一下。"))
    assert turns_of(row)[1] == "考虑肺炎。" and row.details["rewritten"] == []


def test_unusable_teacher_drops_the_row():
    (row,) = evidiag_dialogue(dialogue("孩子总说肚子痛。", "查过吗？", FINDS, DIAGNOSIS), raises)
    assert isinstance(row, Dropped) and row.reason == "teacher's answer was unusable"


def test_sample_consultations_pass_whole():
    rows = read_conversations(SAMPLE)
    assert [built(row).record.messages for row in rows] == [row.messages for row in rows]


@pytest.mark.skipif(not SHARED.is_dir(), reason="real dialogues are not here")
@pytest.mark.parametrize("name", ["dialogues_alpaca_history.jsonl", "cmd_model_dialogues.jsonl"])
def test_no_number_and_no_diagnosis_of_real_dialogues_is_lost(name):
    conversations = read_conversations(SHARED / name, on_bad_row="skip")
    assert len(conversations) > 400
    changed = 0
    for conversation in conversations:
        row = built(conversation)
        before = "。".join(message.content for message in conversation.messages)
        after = "。".join(message.content for message in row.record.messages)
        assert not Counter(re.findall(r"\d", before)) - Counter(re.findall(r"\d", after)), conversation.source
        for clause in re.split("[，,。！？!?\n]", before):
            if re.search("考虑|诊断|可能是|属于|疑似|确诊", clause) and not re.search("我会.*考虑", clause):
                assert clause.strip() in after, (conversation.source, clause)
        assert [m.role for m in row.record.messages if m.role != "system"][-1] == "assistant"
        assert built(row.record).record.messages == row.record.messages
        changed += row.record.messages != conversation.messages
    assert changed > 200  # it does clean


def test_evidence():
    for text in ("嗓子疼", "做了B超", "考虑感冒", "吃阿莫西林", "三天38.5"):
        assert evidence(text)
    for text in ("谢谢医生", "我会考虑的", "好的"):
        assert not evidence(text)


@pytest.mark.parametrize("unit", ["如果", "谢谢您", "希望您", "还有其他问题", "，", "好的"])
def test_time_is_bounded_on_hostile_text(unit):
    list(evidiag_dialogue(dialogue(FEVER, unit * 4000, unit * 4000, DIAGNOSIS)))
