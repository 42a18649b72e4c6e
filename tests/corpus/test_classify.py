"""Tasks of raw conversations, judged by a person first."""

import pytest

from pedgpt.corpus import classify
from pedgpt.data import Conversation, Message

CASES = [
    ("MedKQ&A", ["新生儿黄疸是什么症状引起的疾病？", "多数是生理性的。"]),
    ("MedKQ&A", ["小儿肺炎会传染吗？", "部分由病毒感染引起，注意隔离，必要时到医院检查。"]),
    ("TreRecom", ["孩子发烧咳嗽怎么办？", "多喝水，必要时就医。"]),
    ("TreRecom", ["三岁儿童过敏性鼻炎吃什么药？", "请到医院检查后遵医嘱。"]),
    ("EviDiag", ["宝宝发热两天了", "有没有咳嗽？", "有咳嗽，痰多", "考虑支气管炎，建议检查。"]),
    ("EviDiag", ["我女儿肚子疼，怎么办？", "发烧吗？", "没有", "可以到医院检查。"]),
    ("general_medical", ["高血压患者能喝酒吗？", "建议少喝，按医生要求治疗。"]),
    ("general_medical", ["胃痛怎么治疗？", "先检查。", "做过胃镜", "考虑胃炎。"]),
    ("general_medical", ["糖尿病患者怎么治疗？", "控制血糖；孩子也要少吃糖。"]),
    ("general", ["孩子生病了，请假条怎么写？", "写明日期和天数。"]),
    ("general", ["写一首关于春天的诗", "春风拂面花自开。"]),
    ("general", ["How do I sort a list in Python?", "Use sorted()."]),
    ("general", ["给孩子起个好听的名字", "可以叫子轩。"]),
    ("general", ["怎么治理公司的财务？", "完善制度。"]),
]


@pytest.mark.parametrize(("task", "texts"), CASES)
@pytest.mark.parametrize("system", [(), (Message("system", "你是儿科医生，为患儿诊断疾病。"),)])
def test_classify_matches_a_reader(task, texts, system):
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    assert classify(Conversation(system + messages, "f:1")) == task  # what a system text says does not count


@pytest.mark.parametrize(
    ("department", "pediatric", "task"),
    [("", False, "general"), ("儿科", False, "MedKQ&A"), ("小儿外科", False, "MedKQ&A"),
     ("内科", False, "general_medical"), ("", True, "MedKQ&A"), ("内科", True, "MedKQ&A")],
)  # fmt: skip
def test_department_and_what_is_known_of_a_source_decide_where_words_do_not(department, pediatric, task):
    messages = (Message("user", "晚上睡不好是什么缘故"), Message("assistant", "作息要规律。"))
    assert classify(Conversation(messages, "f:1", department=department), pediatric) == task
