"""Tasks of raw conversations, judged by a person first."""

import importlib.util
from pathlib import Path

import pytest

from pedgpt.corpus import classify
from pedgpt.corpus.classify import domain_of_texts
from pedgpt.data import Conversation, Message, read_documents

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"

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
    ("MedKQ&A", ["宝宝特别喜欢打嗝，正常吗？", "吃奶时吞进空气就会打嗝，喂完拍嗝。"]),
    ("MedKQ&A", ["寶寶夜裡總是咳嗽，是什麼病？", "多半是感冒，也可能是過敏。"]),
    ("general_medical", ["怀孕三个月了，吃辣椒对宝宝有影响吗？", "适量没事，注意便秘。"]),
    ("general_medical", ["硫糖铝和奥美拉唑能一起吃吗？", "间隔两小时服用。"]),
    ("general_medical", ["遗尿的发病部位是什么？", "肾"]),
    ("general", ["请你扮演医生，写一个关于医院的故事", "从前，医生走进病房，看见一个病人。"]),
]


@pytest.mark.parametrize(("task", "texts"), CASES)
@pytest.mark.parametrize("system", [(), (Message("system", "你是儿科医生，为患儿诊断疾病。"),)])
def test_classify_matches_a_reader(task, texts, system):
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    assert classify(Conversation(system + messages, "f:1")) == task  # what a system text says does not count


@pytest.mark.parametrize(
    ("department", "pediatric", "task"),
    [("", False, "general"), ("儿科", False, "MedKQ&A"), ("小儿外科", False, "MedKQ&A"),
     ("内科", False, "general_medical"), ("兒科", False, "MedKQ&A"), ("", True, "MedKQ&A"), ("内科", True, "MedKQ&A")],
)  # fmt: skip
def test_department_and_what_is_known_of_a_source_decide_where_words_do_not(department, pediatric, task):
    messages = (Message("user", "晚上睡不好是什么缘故"), Message("assistant", "作息要规律。"))
    assert classify(Conversation(messages, "f:1", department=department), pediatric) == task


def test_a_row_of_another_department_stays_there_although_it_speaks_of_a_child():
    messages = (Message("user", "孩子发烧怎么办？"), Message("assistant", "多喝水。"))
    assert classify(Conversation(messages, "f:1")) == "TreRecom"
    assert classify(Conversation(messages, "f:1", department="神经科")) == "general_medical"


@pytest.mark.parametrize(
    ("file", "domain"),
    [("textbook", "pediatric"), ("guidelines", "pediatric"), ("general_medical_text", "general_medical"),
     ("general_text", "general")],
)  # fmt: skip
def test_running_text_is_of_the_domain_that_its_words_tell(file, domain):
    assert domain_of_texts(read_documents(ROOT / "recipes" / "sample_corpus" / f"{file}.jsonl")) == domain


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_medical_questions_reach_the_medical_tables_and_general_chat_does_not():
    spec = importlib.util.spec_from_file_location("bench_classify", ROOT / "benchmarks" / "bench_classify.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    names = ("pediatric_qa", "medical_sharegpt", "cmd_cases")
    medical = [bench.measure(SHARED / f"{name}.jsonl", True) for name in names]
    assert sum(part["medical"] for part in medical) >= 0.97 * sum(part["rows"] for part in medical) > 500
    chat = bench.measure(SHARED / "general_sharegpt.jsonl", True)
    assert chat["rows"] > 300 and chat["medical"] - chat["read as medical"] <= 0.02 * chat["rows"]
