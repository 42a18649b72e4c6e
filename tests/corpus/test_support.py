"""An answer that its passage supports passes; a wrong number, drug, direction or subject does not."""

import json
from pathlib import Path

import pytest

from pedgpt.corpus.builders.sections import sentences
from pedgpt.corpus.builders.support import support

SAMPLE = Path(__file__).resolve().parents[2] / "recipes" / "sample_corpus"
COLD = (
    "急性上呼吸道感染绝大多数由病毒引起，主要表现为发热、鼻塞、流涕、咽痛，婴幼儿可伴食欲减退或呕吐。诊断依靠病史和咽部体格检查，必要时查血常规。"
    "治疗以休息并多饮水、对症缓解鼻塞为主，发热时使用退热药。无细菌感染证据者不推荐使用抗生素，也不推荐给婴幼儿使用复方感冒药。"
    "3个月以下婴儿发热，发热超过三天，呼吸急促，抽搐，嗜睡或拒绝饮水，应及时就医。病程多为一周左右，预后良好，约百分之五的患儿并发中耳炎。"
)
SCARLET = (
    "猩红热治疗首选青霉素类抗生素，须足疗程使用，过敏者由医生选择其他药物，同时呼吸道隔离，经有效治疗满24小时且症状好转后解除隔离。"
    "5至15岁儿童多见，冬春季高发。推荐病后两至三周复查尿常规。不应自行停药。避免剧烈运动。"
)

SUPPORTED = [  # passage, answer
    (COLD, "治疗以休息并多饮水、对症缓解鼻塞为主，发热时使用退热药。"),
    (COLD, "无细菌感染证据者不推荐使用抗生素，也不推荐给婴幼儿使用复方感冒药。"),
    (COLD, "您好，别着急。治疗以休息并多饮水、对症缓解鼻塞为主，发热时使用退热药。希望对您有帮助，祝宝宝早日康复！"),
    (COLD, "您好，孩子的感冒绝大多数是由病毒引起的，主要会有发热、鼻塞、流涕和咽痛，小婴儿还可能食欲减退或者呕吐。"),
    (COLD, "如果没有细菌感染的证据，就不推荐给孩子使用抗生素，婴幼儿也不推荐使用复方感冒药。"),
    (COLD, "诊断主要依靠病史和咽部的体格检查，必要时可以查血常规。"),
    (COLD, "孩子发热超过3天，或者出现呼吸急促、抽搐、嗜睡、拒绝饮水，应该及时就医。"),
    (COLD, "发热超过72小时，呼吸急促，应及时就医。"),
    (COLD, "病程多为7天左右，预后良好，约5%的患儿会并发中耳炎。"),
    (COLD, "看着孩子这样，做家长的心里一定不好过。治疗以休息并多饮水、对症缓解鼻塞为主，发热时使用退热药。"),
    (COLD, "1. 治疗以休息并多饮水为主；\n2. 对症缓解鼻塞；\n3. 发热时使用退热药。"),
    (COLD, "①休息并多饮水；②发热时使用退热药。"),
    (SCARLET, "猩红热首选青霉素类抗生素治疗，必须足疗程使用，孩子好转了也不应自行停药。"),
    (SCARLET, "有效治疗满一天并且症状好转以后，就可以解除隔离了。"),
    (SCARLET, "这种病在五至十五岁的儿童中多见，冬春季高发。"),
    (SCARLET, "病后2～3周推荐复查尿常规。"),
    (SCARLET, "请避免让孩子做剧烈运动，同时做好呼吸道隔离。"),
    ("不应自行停药。", "家长不应自行停药，也不可以擅自停药。"),
    ("头颅磁共振检查用于查找病灶。", "查找病灶可以用头颅磁共振检查。"),
    ("热性惊厥好发于6个月至5岁。", "热性惊厥在半岁到5岁之间好发。"),
    ("女孩7岁半前出现性发育征象为性早熟。", "性早熟指女孩七岁半前出现性发育征象。"),
]

UNSUPPORTED = [  # passage, answer, a word of what is said to be missing
    (COLD, "孩子发热超过五天，呼吸急促，抽搐，应及时就医。", "五天"),
    (COLD, "孩子发热超过3小时，呼吸急促，抽搐，应及时就医。", "3小时"),
    (COLD, "3岁以下婴儿发热，应及时就医。", "3岁"),
    (COLD, "病程多为一周左右，预后良好，约15%的患儿并发中耳炎。", "15%"),
    (COLD, "病程多为一至两周，预后良好，约百分之五的患儿并发中耳炎。", "两周"),
    (COLD, "退热药每次5毫升，每日三次，发热时使用退热药，治疗以休息并多饮水为主。", "5毫升"),
    (SCARLET, "猩红热治疗首选阿奇霉素，须足疗程使用，过敏者由医生选择其他药物。", "奇霉素"),
    (SCARLET, "猩红热治疗首选头孢克肟，须足疗程使用，过敏者由医生选择其他药物。", "孢克肟"),
    (COLD, "治疗以休息并多饮水、对症缓解鼻塞为主，发热时使用布洛芬。", "布洛芬"),
    (COLD, "诊断依靠病史和咽部体格检查，必要时查EV71核酸。", "EV71"),
    (COLD, "无细菌感染证据者推荐使用抗生素。", "turned round"),
    (COLD, "建议给婴幼儿使用复方感冒药。", "turned round"),
    (COLD, "发热时不推荐使用退热药，治疗以休息并多饮水为主。", "turned round"),
    (SCARLET, "孩子好转了可以自行停药。", "turned round"),
    (SCARLET, "如果孩子好转，可以自行停药。", "turned round"),
    ("无细菌感染证据者不推荐使用抗生素。", "无细菌感染证据时，推荐使用抗生素。", "turned round"),
    (SCARLET, "猩红热的孩子可以做剧烈运动，同时呼吸道隔离。", "turned round"),
    ("热退疹出后无需特殊治疗。", "热退疹出后需要特殊治疗。", "turned round"),
    ("禁止反复强行灌肠，应及时手术。", "可以反复强行灌肠，应及时手术。", "turned round"),
    (COLD, "牛奶蛋白回避试验和口服食物激发试验是诊断的重要依据，后者应在医院监护下进行。", "share"),
    (COLD, "先给孩子做一次推拿，再用艾草泡脚，饮食上忌口海鲜羊肉，多晒太阳。", "share"),
    # One sentence out of nowhere among those of the passage.
    (COLD, COLD + "民间偏方葱姜熬汤熏蒸鼻腔疗效显著。", "weakest sentence 0.0"),
    (COLD, "您好，请放心，祝宝宝早日康复！", "share"),
    (COLD, "", "share"),
]  # fmt: skip


@pytest.mark.parametrize(("passage", "answer"), SUPPORTED)
def test_supported(passage, answer):
    found = support(answer, passage)
    assert found.ok(), found.describe()


@pytest.mark.parametrize(("passage", "answer", "missing"), UNSUPPORTED)
def test_unsupported(passage, answer, missing):
    found = support(answer, passage)
    assert not found.ok()
    assert missing in found.describe()


def test_sentences_of_a_passage_are_wholly_supported_by_it():
    checked = 0
    for name in ("textbook.jsonl", "guidelines.jsonl"):
        for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"]
            for answer in [text, *(s for s in sentences(text) if len(s) >= 8)]:
                found = support(answer, text)
                assert found.ok(1.0) and found.share == found.weakest == 1.0, (answer, found)
                checked += 1
    assert checked > 500


@pytest.mark.parametrize("name", ["textbook.jsonl", "guidelines.jsonl"])
def test_sentences_of_other_passages_are_not(name):
    passages = [json.loads(line)["text"] for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]
    accepted = [(i, s) for i, text in enumerate(passages) for s in sentences(passages[i - 10])
                if len(s) >= 20 and support(s, text).ok()]  # fmt: skip
    assert len(accepted) <= len(passages) // 30, accepted


def test_share_is_the_part_of_the_pairs_that_the_passage_has():
    # 患病 病鸡 鸡鸣 鸣叫: the passage has the first two.
    assert support("患病鸡鸣叫", "患病鸡").share == 0.5
    assert support("患病鸡鸣叫", "患病鸡", question="鸡鸣叫吗").share == 1.0  # what is asked counts for neither
    assert support("EB 患病鸡", "EB患病").share == pytest.approx(2 / 3)  # a Latin word counts as a pair


def test_numbers_of_the_question_are_known():
    assert support("2岁的孩子患感冒要休息。", "感冒要休息。").missing["numbers"] == ["2岁"]
    assert support("2岁的孩子患感冒要休息。", "感冒要休息。", question="我家孩子两岁，感冒了怎么办？").ok()


@pytest.mark.parametrize(
    ("said", "given", "missing"),
    [
        ("三天", "3天", False), ("三天", "3日", False), ("３天", "三天", False), ("一百二十次", "120次", False),
        ("三十八点五度", "38.5℃", False), ("39℃", "38.5℃", True), ("半小时", "30分钟", False), ("两周", "14天", False),
        ("一岁半", "18个月", False), ("18月龄", "1岁半", False), ("3岁", "3年", True), ("百分之三十", "30%", False),
        ("三分之二", "2/3", True), ("两三天", "两三天", False), ("两三天", "三四天", True),
        ("3～5天", "三至五天", False), ("3-6天", "三至五天", True),
        ("4天", "三至五天", True), ("进一步、十分、百日咳、三凹征", "", False), ("第三天", "第3天", False),
        ("生后2、4、6月龄", "2月龄、4月龄、6月龄", False), ("1000毫克", "1克", False), ("1毫克", "1克", True),
        ("一天三次", "每日3次", False), ("每天一次", "每天两次", True), ("再做一次", "", False),
        ("10万单位", "100000单位", False), ("5", "5天", False),
    ],
)  # fmt: skip
def test_numbers_are_compared_by_value_and_unit(said, given, missing):
    assert bool(support(said, given).missing["numbers"]) == missing


def test_what_the_words_do_not_show_passes():
    passage = "急性支气管炎多由病毒感染引起，主要表现为咳嗽、咳痰、发热。"
    assert support("急性支气管炎多由病毒感染引起，主要表现为咳嗽、咳痰、皮疹。", passage).ok()


@pytest.mark.parametrize(
    ("answer", "passage"),
    [
        ("，".join(f"{i}天" for i in range(5000)), "，".join(f"{i}天" for i in range(5000, 10000))),
        ("3" + "-" * 5000 + "啊5天", "x"), ("\n " * 20000, "x"), ("1" * 20000 + "天", "x"), ("一" * 20000 + "天", "x"),
        ("1" + ",000" * 5000, "x"), ("A" + "1" * 30000, "x"), ("x", "一次" * 20000), ("应" * 20000, "不" * 20000),
    ],
)  # fmt: skip
def test_time_is_bounded_on_hostile_text(answer, passage):
    support(answer, passage)  # seconds to minutes, or a number too long for int(), without the bounds
