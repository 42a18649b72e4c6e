"""Training rows that contain evaluation items are recognised; rows like them are not."""

import importlib.util
import random
from pathlib import Path

from pedgpt.corpus.decontaminate import Decontaminator

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
    items, rows = planted.planted_contamination(random.Random(7), 2000, 6000)
    found = against(*items)
    matches = [found.match(texts) for texts, _ in rows]
    for kind in ("inside", "edited", "respelled", "question", "answer"):
        hits = [match is not None for match, (_, what) in zip(matches, rows, strict=True) if what == kind]
        assert len(hits) == 300 and sum(hits) >= 297, kind
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
    assert against(("e:1", polite), ("e:1", polite)).match([polite]) == ("e:1", 1.0)


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
