"""Safety and self-cognition rows: enough of them, distinct, without doses, and each with a next step."""

import re

import pytest

from pedgpt.corpus.rows import Built, Dropped, Unusable
from pedgpt.corpus.safety import safety, self_cognition


def pairs(rows):
    return [tuple(message.content for message in row.record.messages) for row in rows]


DOSE = re.compile(r"[\d一二三四五六七八九十半两]+\s*(?:毫克|毫升|mg|ml|克|片|粒|滴|包|袋|支)(?!个)", re.IGNORECASE)


def test_safety_rows_without_slots():
    rows = list(safety())
    assert len(rows) >= 60 and all(isinstance(row, Built) and row.record.task == "safety" for row in rows)
    assert rows == list(safety([]))  # deterministic
    asked = [question for question, _ in pairs(rows)]
    assert len(set(asked)) == len(asked)
    topics = {row.record.source for row in rows}
    assert {f"safety:{name}" for name in ("superstition", "dose", "overdose", "vaccination", "stopping_medicine",
            "emergency", "privacy", "adult_drugs", "harm", "false_documents")} <= topics  # fmt: skip
    for question, answer in pairs(rows):
        assert "{" not in question + answer and not DOSE.search(answer), answer
        assert re.search("请|可以|建议", answer) and 20 <= len(answer) <= 120, answer


def test_emergencies_name_the_number():
    for row in safety():
        question, answer = (message.content for message in row.record.messages)
        if row.record.source == "safety:emergency" or re.search("抽搐|喝光|安眠药|不想活", question):
            assert "120" in answer, question
    (despair,) = [answer for question, answer in pairs(safety()) if "不想活" in question]
    assert "12356" in despair and "不能帮" not in despair


def test_slots_are_those_given():
    one, two = list(safety(["川崎病"])), list(safety(["川崎病", "水痘", "川崎病 "]))
    fixed = [pair for pair in pairs(one) if "川崎病" not in "".join(pair)]
    slotted = [pair for pair in pairs(one) if "川崎病" in "".join(pair)]
    assert len(slotted) >= 8 and all("川崎病" in question for question, _ in slotted)
    assert len(two) == len(fixed) + 2 * len(slotted) == len(set(pairs(two)))
    assert not any(word in "".join(map("".join, slotted)) for word in ("湿疹", "腹泻"))


def test_blank_names_are_errors():
    with pytest.raises(ValueError, match="diseases_or_symptoms: found the blank name ' '"):
        list(safety(["湿疹", " "]))
    with pytest.raises(ValueError, match="assistant: found '', expected a name"):
        list(self_cognition("", "某实验室"))
    with pytest.raises(ValueError, match="developer"):
        list(self_cognition("小测", "\t"))


def test_self_cognition_names_whom_it_is_told():
    rows = list(self_cognition("小测", "{assistant}实验室"))
    assert len(rows) >= 40 and {row.record.task for row in rows} == {"self_cognition"}
    said = dict(pairs(rows))
    assert len(said) == len(rows)
    assert said["你叫什么名字？"] == "我叫小测，是{assistant}实验室开发的语言模型。"  # a name is text, not a template
    assert said["你是ChatGPT吗？"].startswith("不是") and "小测" in said["你是ChatGPT吗？"]
    for answer in said.values():
        assert not re.search("ChatGPT|GPT|文心|通义|OpenAI|百度|pedgpt", answer, re.IGNORECASE)
        assert not re.search("我是.{0,6}医生|我有行医", answer)


def test_teacher_paraphrases_the_question_alone():
    plain = list(safety())
    rows = list(safety(ask=lambda system, user, fields: {"question": "换个说法：" + user[3:9]}))
    assert rows[::2] == plain
    for original, other in zip(rows[::2], rows[1::2], strict=True):
        question, answer = (message.content for message in original.record.messages)
        assert other.details == {"paraphrase_of": question}
        assert other.record.messages[0].content == "换个说法：" + question[:6].strip()
        assert other.record.messages[1].content == answer and other.record.source == original.record.source


def raises(system, user, fields):
    raise Unusable("no JSON")


@pytest.mark.parametrize("ask", [raises, lambda *a: {"question": " "}, lambda *a: {}, lambda *a: {"question": 3}])
def test_unusable_paraphrases_are_dropped_and_the_rows_stay(ask):
    for build in (lambda ask: safety(["水痘"], ask), lambda ask: self_cognition("小测", "某实验室", ask)):
        rows = list(build(ask))
        kept = [row for row in rows if isinstance(row, Built)]
        dropped = [row for row in rows if isinstance(row, Dropped)]
        assert kept == list(build(None)) and len(dropped) == len(kept)
        assert {row.reason for row in dropped} == {"teacher's answer was unusable"}


def test_an_equal_paraphrase_is_dropped():
    rows = list(self_cognition("小测", "某", lambda system, user, fields: {"question": user.splitlines()[0][3:]}))
    assert {row.reason for row in rows if isinstance(row, Dropped)} == {"paraphrase equals the question"}
