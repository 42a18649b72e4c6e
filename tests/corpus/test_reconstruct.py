"""Existing rows are judged, enriched and reorganised, every version is kept, and no fact is added or lost."""

import re
import unicodedata
from pathlib import Path

import pytest

from pedgpt.corpus.builders.reconstruct import reconstruct, reorganise
from pedgpt.corpus.rows import Built, Dropped, Unusable
from pedgpt.data import read_conversations
from pedgpt.data.records import Conversation, Message

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def row(question, answer, *before):
    turns = [*before, question, answer]
    messages = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns))
    return Conversation(messages, "qa.csv:3", "TreRecom", "湿疹", "儿科")


def only(conversation, ask=None):
    (result,) = reconstruct(conversation, ask)
    return result


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (
            "问题分析：你好，孩子可能是积食引起的,不用太担心. 意见建议：少吃多餐,多喝水。希望对您有帮助，祝您健康！",
            "孩子可能是积食引起的，不用太担心。\n建议：少吃多餐，多喝水。",
        ),
        ("病情分析： 您好，考虑湿疹。意见建议：建议保持皮肤清洁。。", "考虑湿疹。\n建议保持皮肤清洁。"),
        ("指导意见：你好，多喝水", "多喝水。"),
        (
            "要注意以下几点：1、多休息；2、多喝水；3、体温超过38.5度就医。",
            "要注意以下几点：\n1. 多休息。\n2. 多喝水。\n3. 体温超过38.5度就医。",
        ),
        ("护理：（1）勤换尿布（2）涂护臀膏", "护理：\n1. 勤换尿布。\n2. 涂护臀膏。"),
        ("①多休息②多喝水", "1. 多休息。\n2. 多喝水。"),
        ("每天1、2次，每次1.5小时，结石1.2cm", "每天1、2次，每次1.5小时，结石1.2cm。"),  # no enumeration
        ("多休息，多喝水,", "多休息，多喝水。"),
        ("，。多喝水！！注意保暖。，再观察", "多喝水！注意保暖。再观察。"),
        ("体温和缓了，可以用温水擦洗的", "体温和缓了，可以用温水擦洗的。"),
        ("建议：多喝水。\n建议：多休息。", "建议：多喝水。\n建议：多休息。"),
        ("谢谢，祝您健康！", ""),
    ],
)
def test_reorganised(raw, clean):
    if raw.startswith("建议："):  # advice that nothing precedes needs no heading
        clean = clean.removeprefix("建议：")
    assert reorganise(raw) == clean
    assert reorganise(clean) == clean


def test_every_step_keeps_the_version_before_it():
    raw = "问题分析：你好，考虑湿疹。意见建议：可以涂炉甘石洗剂软膏。"
    result = only(row("孩子身上起湿疹怎么办？", raw))
    judged, enriched, reorganised = result.details["versions"]
    assert (judged["step"], judged["answer"], judged["reason"]) == ("judge", raw, "no fault")
    assert enriched["step"] == "enrich" and enriched["answer"] == raw and "doctor" in enriched["reason"]
    assert reorganised["step"] == "reorganise" and reorganised["answer"].startswith(raw)
    first, second, third = result.record.messages[-1].content.split("\n")
    assert (first, second) == ("考虑湿疹。", "建议：可以涂炉甘石洗剂软膏。")
    assert re.search("医嘱|药师", third) and re.search("就医|医院|就诊", third)
    assert (result.record.source, result.record.task, result.record.disease) == ("qa.csv:3", "TreRecom", "湿疹")


def test_a_clean_answer_is_judged_and_passes():
    answer = "湿疹多和过敏有关，注意保湿。加重时请去医院。"
    result = only(row("孩子湿疹怎么办？", answer))
    assert result.record.messages[-1].content == answer
    assert [version["step"] for version in result.details["versions"]] == ["judge"]


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("孩子流鼻血怎么办？", "戴镜。", "too terse"),
        ("小儿脑血管畸形的患病比例是多少？", "0.13%", "too terse"),
        ("孩子发烧怎么办？", "你好，谢谢！", "too terse"),
        ("孩子发烧怎么办？", "建议尽快带孩子去正规医院儿科检查，听医生的。", "only refers to a doctor"),
        ("孩子湿疹怎么办？", "湿疹欢迎来我院就诊，电话：010-12345678。", "promotional"),
        ("孩子发烧怎么办？", "宝妈想挣奶粉钱的加我扣123456789了解，时间自由。", "promotional"),
        ("孩子能喝酒吗？", "废话，孩子当然不能喝酒，影响大脑发育。", "rude"),
    ],
)
def test_unusable_answers_are_dropped_with_their_fault(question, answer, reason):
    result = only(row(question, answer))
    assert isinstance(result, Dropped) and result.reason == f"judged unusable: {reason}"
    assert result.source == "qa.csv:3" and answer[:10] in result.detail


@pytest.mark.parametrize("answer", ["可以包治百病的东西是没有的，湿疹要保湿。", "湿疹患者去医院检查过敏原后避开它。"])
def test_usable_answers_are_not_mistaken(answer):
    assert isinstance(only(row("孩子湿疹怎么办？", answer)), Built)


def test_of_several_turns_the_last_answer_alone_is_worked_on():
    result = only(row("那要怎么护理？", "你好，湿疹要保湿,少洗澡", "孩子湿疹。", "问题分析：多久了？"))
    assert [m.content for m in result.record.messages[:3]] == ["孩子湿疹。", "问题分析：多久了？", "那要怎么护理？"]
    assert result.record.messages[3].content == "湿疹要保湿，少洗澡。"


class Teacher:
    """Answers the three calls in turn with what it is given; an exception is raised."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, system, user, fields):
        self.asked.append((user, dict(fields)))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


GOOD = {"score": 4, "reason": "切题"}


def test_teacher_judges_enriches_and_reorganises():
    teacher = Teacher(GOOD, {"answer": "二", "reason": "乙"}, {"answer": "三", "reason": "丙"})
    result = only(row("问", "一"), teacher)
    assert result.record.messages[-1].content == "三"
    assert result.details == {
        "versions": [
            {"step": "judge", "answer": "一", "reason": "score 4: 切题"},
            {"step": "enrich", "answer": "一", "reason": "乙"},
            {"step": "reorganise", "answer": "二", "reason": "丙"},
        ]
    }
    fields = [{"score": int, "reason": str}] + [{"answer": str, "reason": str}] * 2
    assert [wanted for _, wanted in teacher.asked] == fields
    assert "二" in teacher.asked[2][0]


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ("体温超过39度就医，多喝水。", "loses the number 38.5"),
        ("体温超过38.5度就医，每次喂10毫升，多喝水。", "adds the number 10"),
        ("38.5", "loses more than half of the answer"),
    ],
)
def test_a_teachers_change_of_facts_is_refused(bad, fault):
    answer = "体温超过38.5度就医，多喝水。"
    teacher = Teacher(GOOD, {"answer": bad, "reason": ""}, {"answer": answer, "reason": ""})
    result = only(row("三岁孩子发烧", answer), teacher)
    assert result.record.messages[-1].content == answer
    assert result.details["refused"] == [{"step": "enrich", "answer": bad, "reason": fault}]
    assert len(result.details["versions"]) == 1


def test_a_teachers_list_numbers_are_no_new_numbers():
    listed = "1. 多休息。\n2. 体温超过38.5度就医。"
    answer = "多休息，体温超过38.5度就医。"
    teacher = Teacher(GOOD, {"answer": answer, "reason": ""}, {"answer": listed, "reason": "分条"})
    result = only(row("发烧", answer), teacher)
    assert result.record.messages[-1].content == listed


def test_teacher_judges_a_row_unusable():
    result = only(row("问", "答非所问"), Teacher({"score": 1, "reason": "答非所问"}))
    assert isinstance(result, Dropped) and result.reason == "judged unusable: by the teacher"
    assert "答非所问" in result.detail


@pytest.mark.parametrize(
    "answers",
    [
        (Unusable("no JSON"),),
        ({"score": 9, "reason": "好"},),
        (GOOD, {"answer": "一", "reason": ""}, Unusable("cut off")),
    ],
)
def test_unusable_teacher_drops_the_row(answers):
    result = only(row("问", "一"), Teacher(*answers))
    assert isinstance(result, Dropped) and result.reason == "teacher's answer was unusable"


@pytest.mark.skipif(not SHARED.is_dir(), reason="real questions are not here")
@pytest.mark.parametrize("name", ["pediatric_qa.jsonl", "internal_medicine_qa.csv"])
def test_no_number_of_real_answers_is_lost_or_added(name):
    rows = read_conversations(SHARED / name, on_bad_row="skip")[:1500]
    results = [only(conversation) for conversation in rows]
    assert results[:300] == [only(conversation) for conversation in rows[:300]]
    kept = [(before, after) for before, after in zip(rows, results, strict=True) if isinstance(after, Built)]
    assert len(kept) > 0.95 * len(rows)
    for before, after in kept:
        old, new = (unicodedata.normalize("NFKC", c.messages[-1].content) for c in (before, after.record))
        assert set(re.findall(r"\d+", old)) <= set(re.findall(r"\d+", new)), before.source
        assert set(re.findall(r"\d+", new)) <= set(re.findall(r"\d+", old + before.messages[0].content)), before.source
        assert not re.search("[，。]{2}|^[，。]|(?:问题|病情)分析[：:]", new), before.source
        assert new[-1] in "。！？!?：…"
        assert after.details["versions"][0]["answer"] == before.messages[-1].content
        assert reorganise(after.record.messages[-1].content) == after.record.messages[-1].content, before.source


@pytest.mark.parametrize("unit", ["如果", "建议你去医院", "1、", "，", "在", "病情分析：", "你好，"])
def test_time_is_bounded_on_hostile_text(unit):
    list(reconstruct(row("孩子咳嗽怎么办", unit * 4000)))  # seconds to minutes, were a pattern quadratic or worse
