"""Training rows that contain evaluation items are recognised; rows like them are not."""

import importlib.util
import random
from pathlib import Path

import pytest

from pedgpt.corpus.decontaminate import Decontaminator
from pedgpt.corpus.split import Names

spec = importlib.util.spec_from_file_location(
    "bench_quality", Path(__file__).resolve().parents[2] / "benchmarks" / "bench_quality.py"
)
planted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planted)


def against(*items):
    found = Decontaminator()
    for item in items:
        found.add(*item)
    return found


def test_planted_items_are_found_and_rows_of_other_facts_stay():
    items, rows = planted.planted_contamination(random.Random(7), 800, 2400)
    found = against(*items)
    matches = [found.match(texts) for texts, _ in rows]
    for kind in ("inside", "edited", "respelled", "question", "answer"):
        hits = [match is not None for match, (_, what) in zip(matches, rows, strict=True) if what == kind]
        assert len(hits) == 120 and sum(hits) >= 119, kind
    right = sum(match is not None and what != "" for match, (_, what) in zip(matches, rows, strict=True))
    assert right / sum(match is not None for match in matches) >= 0.98
    places = {place for place, _, _ in items}
    assert all(match[0] in places and 0.75 <= match[1] <= 1 for match in matches if match)


QUESTION = "我家宝宝七个月大，昨天打完疫苗之后胳膊红肿，要不要热敷？"


def test_an_item_is_found_in_other_spellings_and_the_row_names_its_place():
    found = against(("e:1", QUESTION, True), ("e:2", "支原体感染后咳嗽两周还没有好，还要继续观察吗", True))
    assert found.match(["请问，" + QUESTION + "谢谢"]) == ("e:1", 1.0)
    respelled = "我家宝宝 七个月大 昨天打完疫苗之后，胳膊红肿;要不要热敷"
    assert found.match(["别的问题", respelled]) == ("e:1", 1.0) == found.match(["别的问题：" + respelled])
    place, share = found.match([QUESTION.replace("昨天", "前天")])
    assert place == "e:1" and 0.8 <= share < 1
    assert found.match(["我家宝宝八个月大，今天摔了一跤之后膝盖青紫，要不要热敷？"]) is None
    assert found.match([]) is None and found.match(["", "？"]) is None


def test_short_questions_match_whole_messages_and_short_answers_nothing():
    found = against(("e:1", "发烧怎么办？", True), ("e:1", "多喝水。"), ("e:2", "不客气，祝您早日康复！"))
    assert found.match(["发烧，怎么办", "多休息"]) == ("e:1", 1.0)
    assert found.match(["孩子发烧怎么办"]) is None
    assert found.match(["咳嗽怎么办", "多喝水"]) is None and found.match(["谢谢", "不客气，祝您早日康复"]) is None


def test_answers_of_several_rows_count_for_none_and_questions_always():
    polite = "不客气，如果还有别的问题可以随时来问我，祝您早日康复。"
    found = against(("e:1", polite), ("e:2", polite), ("e:1", QUESTION, True), ("e:2", QUESTION, True))
    assert found.match(["好的", polite]) is None and found.match([QUESTION]) == ("e:1", 1.0)
    fact = "针刺后胳膊红肿是卡介苗的正常反应，三个月左右结痂脱落。"
    assert against(("e:1", fact), ("e:1", fact)).match([fact]) == ("e:1", 1.0)
    assert against(("e:1", fact), ("e:2", fact)).match([fact]) is None


def test_boilerplate_of_many_items_does_not_decide():
    rng = random.Random(8)
    items = [(f"e:{i}", planted.HELLO + "".join(rng.choices(planted.COMMON, k=15)) + planted.BYE) for i in range(60)]
    found = against(*items)
    other = planted.HELLO + "".join(rng.choices(planted.COMMON, k=15)) + planted.BYE
    assert found.match([other]) is None
    assert found.match(["先说一句。" + items[7][1]]) == ("e:7", 1.0)


def test_items_may_be_added_after_a_match():
    found = Decontaminator()
    assert found.match([QUESTION]) is None
    found.add("e:1", QUESTION)
    assert found.match([QUESTION]) == ("e:1", 1.0)


STOCK = "建议您带孩子到正规医院儿科就诊，在医生指导下用药。"


def test_an_answer_of_stock_phrases_is_in_no_row_and_a_specific_one_is():
    polite = "不客气，希望以上建议对您有所帮助，如果还有其他问题，请随时咨询。"
    found = against(("e:1", "孩子总揉眼睛怎么办？", True), ("e:1", STOCK), ("e:2", polite))
    for i in range(6):
        assert found.match([f"第{i}个问题", "多半是结膜受了刺激。" + STOCK]) is None
    assert found.match(["问题", "不客气，希望我的建议对您有帮助，如果您还有其他问题，可以随时咨询我。"]) is None
    fact = against(("e:1", "多半是倒睫刺激了结膜，可用棉签把睫毛拨开，三岁后大多自己好转。" + STOCK))
    assert fact.match(["眼睛红", "您好，多半是倒睫刺激了结膜，可用棉签把睫毛拨开，三岁后大多自己好转。"])[0] == "e:1"


@pytest.mark.parametrize(
    ("item", "other"),
    [
        ("新生儿呕吐的临床表现", "新生儿并发症的临床表现"),
        ("新生儿呕吐的临床表现有哪些？", "新生儿腹泻的临床表现有哪些？"),
        ("新生儿呕吐的临床表现有哪些，应该如何护理和预防？", "新生儿黄疸的临床表现有哪些，应该如何护理和预防？"),
        ("早产儿接种乙肝疫苗以后的不良反应，和足月儿相比有什么不同？",
         "早产儿接种百白破疫苗以后的不良反应，和足月儿相比有什么不同？"),
    ],
)  # fmt: skip
def test_a_question_with_another_head_noun_is_no_overlap(item, other):
    found = against(("e:1", item, True))
    assert found.match([other]) is None and found.match(["有个问题", "您问的是" + other]) is None
    assert found.match([item + "！"]) == ("e:1", 1.0)


def test_an_item_about_another_known_disease_is_no_overlap():
    asked = "孩子得了{}已经住院一个星期，每天输液，烧退了但是夜里咳得睡不着，还能不能去上幼儿园？"
    found = against(("e:1", asked.format("肺炎"), True))
    assert found.match([asked.format("喉炎")])[0] == "e:1"  # one letter, for all that it knows
    found.names = Names(["肺炎", "喉炎"])
    assert found.match([asked.format("喉炎")]) is None and found.match([asked.format("肺炎")]) == ("e:1", 1.0)


def test_strings_of_digits_are_no_overlap():
    found = against(("e:1", "1234567890123456789"), ("e:2", "编号 2020-0101-3344-5566 和 7788-9900"))
    assert found.match(["问", "号码是1234567890123456789，编号2020-0101-3344-5566和7788-9900。"]) is None


def test_boilerplate_that_many_rows_share_is_no_overlap():
    notice = "本平台由王牌健康频道冠名播出，扫描下方二维码领取奶粉试用装，数量有限先到先得。"
    fact = "川崎病患儿应在起病十天内静脉滴注丙种球蛋白，同时口服阿司匹林。"
    for item in (notice, fact + notice):
        found = against(("e:1", item))
        rows = [["问题", "".join(random.Random(i).choices(planted.COMMON, k=30)) + notice] for i in range(30)]
        for texts in [*rows, ["川崎病？", fact]]:
            found.count(texts)
        assert not any(found.match(texts) for texts in rows)
        assert (found.match(["川崎病？", fact]) is not None) == (fact in item)


def test_an_answer_that_many_rows_give_to_other_questions_is_no_overlap_but_a_question_always_is():
    saying = "家长把心放到肚子里面，抱去小区门口溜达溜达吹吹风，睡一觉醒来准保啥事都没有啦。"
    found = against(("e:1", saying), ("e:2", QUESTION, True))
    rows = [[f"第{i}问", saying] for i in range(6)] + [[QUESTION, f"答{i}"] for i in range(30)]
    assert found.match(rows[0]) is not None
    for texts in rows:
        found.count(texts)
    assert [found.match(texts) is not None for texts in rows] == [False] * 6 + [True] * 30


def test_short_items_with_a_tenth_of_their_characters_edited_are_found():
    rng, hits = random.Random(9), 0
    found = against(("e:1", QUESTION, True))
    for _ in range(300):
        text = planted.edited(rng, QUESTION, rng.randint(1, len(QUESTION) // 10))
        hits += found.match(["请问", "家长：" + text]) is not None
    assert hits >= 297


def test_rows_on_the_same_form_as_an_evaluation_item_are_no_overlap():
    """They match the item because of the form, so a match must not keep the form from being counted."""
    form = "姓名：某某 性别：男 主诉：{} 现病史：患儿无明显诱因出现上述症状，精神可，食欲一般，大小便正常。"
    form += "既往史：体健，否认药物过敏史。查体：神清，咽部充血，双肺呼吸音粗。请给出初步诊断。"
    found = Decontaminator()
    found.add("e:1", form.format("面色苍白乏力"), True)
    rows = [[form.format(f"发热咳嗽{i}天"), f"答复{i}"] for i in range(120)]
    for row in rows:
        found.count(row)
    assert not any(map(found.match, rows))
