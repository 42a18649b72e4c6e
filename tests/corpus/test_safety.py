"""Safety and self-cognition rows: enough of them, distinct, without doses, and each with a next step."""

import re

from pedgpt.corpus.builders.safety import safety, self_cognition
from pedgpt.corpus.rows import Built


def pairs(rows):
    return [tuple(message.content for message in row.record.messages) for row in rows]


DOSE = re.compile(r"[\d一二三四五六七八九十半两]+\s*(?:毫克|毫升|mg|ml|克|片|粒|滴|包|袋|支)(?!个)", re.IGNORECASE)


def test_safety_rows():
    rows = list(safety())
    assert len(rows) >= 60 and all(isinstance(row, Built) and row.record.task == "safety" for row in rows)
    assert rows == list(safety())  # deterministic
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


def test_slots_are_filled():
    said = ["".join(pair) for pair in pairs(safety())]
    for slot in ("发烧", "咳嗽", "腹泻", "湿疹"):
        assert sum(text.startswith(("孩子" + slot, "有人说孩子" + slot, "孩子前阵子" + slot)) for text in said) >= 8


def test_self_cognition_names_whom_it_is_told():
    rows = list(self_cognition("小测", "{assistant}实验室"))
    assert len(rows) >= 40 and {row.record.task for row in rows} == {"self_cognition"}
    said = dict(pairs(rows))
    assert len(said) == len(rows)
    assert said["你叫什么名字？"] == "我叫小测，是{assistant}实验室开发的语言模型。"  # a name is text, not a template
    assert said["你是别的公司的聊天机器人吗？"].startswith("不是") and "小测" in said["你是别的公司的聊天机器人吗？"]
    for question, answer in said.items():
        assert not re.search("GPT|文心|通义|OpenAI|百度", question + answer, re.IGNORECASE)
        assert not re.search("我是.{0,6}医生|我有行医", answer)
