"""Repeated rows are found, and others stay."""

import importlib.util
import random
import time
from pathlib import Path

import pytest

from pedgpt.corpus.duplicates import NearDuplicates, digest
from pedgpt.corpus.split import Names

spec = importlib.util.spec_from_file_location(
    "bench_quality", Path(__file__).resolve().parents[2] / "benchmarks" / "bench_quality.py"
)
planted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planted)


@pytest.fixture(scope="module")
def rows():
    """(text, kind) of 1500 rows, of which one in thirty is of each kind of copy."""
    return planted.planted_duplicates(random.Random(1), 1500)


def near(texts, **settings):
    found = NearDuplicates(**settings)
    assert [found.add(text) for text in texts] == list(range(len(texts)))
    pairs = found.find()
    found.close()
    return pairs


def by_brute_force(texts, threshold=0.8):
    """Each row against every earlier kept one with the same numbers."""
    sets, kept, dropped = [], [], set()
    counted = [planted.NUMBERS.findall(planted.plain(text)) for text in texts]
    for text in map(planted.plain, texts):
        sets.append({text[i : i + 5] for i in range(max(1, len(text) - 4))})
    for i, own in enumerate(sets):
        if any(counted[i] == counted[j] and len(own & sets[j]) / len(own | sets[j]) >= threshold for j in kept):
            dropped.add(i)
        else:
            kept.append(i)
    return dropped


def test_planted_duplicates_are_found_and_less_similar_rows_stay(rows):
    kinds = [kind for _, kind in rows]
    pairs = near([text for text, _ in rows])
    dropped = {i for i, _, _ in pairs}
    copies = {i for i, kind in enumerate(kinds) if kind in ("exact", "near")}
    assert len(copies) == 100 and len(copies & dropped) / len(copies) >= 0.99
    assert len(copies & dropped) / len(dropped) >= 0.98
    assert not dropped & {i for i, kind in enumerate(kinds) if kind in ("far", "number")}
    assert pairs == sorted(pairs) and len(dropped) == len(pairs)
    for i, j, similarity in pairs:
        assert j < i and j not in dropped and similarity >= 0.8
        assert similarity == pytest.approx(planted.similarity(rows[i][0], rows[j][0]))


def test_exact_copies_have_equal_digests(rows):
    seen, repeated = set(), set()
    for i, (text, _) in enumerate(rows):
        repeated |= {i} if digest(text) in seen else set()
        seen.add(digest(text))
    assert repeated == {i for i, (_, kind) in enumerate(rows) if kind == "exact"}
    assert len(digest("")) == 16 and digest("孩子发烧？") == digest("孩子　发烧！") != digest("孩子发热？")


def templated(rng, count):
    """Rows of one form with small vocabularies: many pairs lie just above and below the threshold."""
    form = "孩子{symptom}，是很常见的情况，家长不用太着急，请{care}，必要时做{test}。"
    return [planted.HELLO + planted.fill(rng, form) + planted.BYE + planted.POLITE[4] for _ in range(count)]


def test_same_rows_are_dropped_as_by_comparing_all_pairs():
    rng = random.Random(3)
    texts = [text for text, _ in planted.planted_duplicates(rng, 200)] + templated(rng, 250)
    texts += ["", "？！", "热", "发烧", "发 烧", "发烧了", "发烧了吗孩子", "发烧了吗孩"]
    rng.shuffle(texts)
    for threshold in (0.7, 0.8, 0.9):
        found = {i for i, _, _ in near(texts, threshold=threshold)}
        expected = by_brute_force(texts, threshold)
        # Of the pairs right at the threshold a few per thousand are never looked at; and then other rows are kept.
        assert len(found ^ expected) <= 0.02 * len(expected) + 1 and len(expected) > 20
    assert near(texts) == near(texts) and near(["", "？！", "热", "热。", "痛"]) == [(1, 0, 1.0), (3, 2, 1.0)]


def test_the_first_row_stays_and_chains_end_there():
    text = planted.row(random.Random(4))[1]
    rng = random.Random(5)
    chain = [text]
    for _ in range(8):
        chain.append(planted.changed_to(rng, chain[-1], 0.88, 0.93))
    pairs = near(chain)
    assert all(planted.similarity(chain[i], chain[j]) >= 0.8 for i, j, _ in pairs)
    kept = [i for i in range(9) if i not in {i for i, _, _ in pairs}]
    assert kept[0] == 0 and len(kept) > 1  # the last ones are unlike the first
    assert {i for i, _, _ in near([chain[1], chain[0]])} == {1} == {i for i, _, _ in near(chain[:2])}


def boilerplate(rng, count):
    """Rows of which more than half is one text: of similarity about 0.6 to each other."""
    shared = planted.HELLO + planted.BYE + "".join(form for form in planted.POLITE if len(form) > 15)
    return [shared + "".join(rng.choices(planted.COMMON, k=40)) for _ in range(count)]


def test_boilerplate_hides_no_duplicates_and_costs_no_more_than_its_rows():
    rng = random.Random(6)
    seconds = {}
    for count in (400, 1600):  # if all were compared with all, the latter would take 11 times as long and more
        texts = boilerplate(rng, count)
        copies = rng.sample(texts, 50)
        started = time.process_time()
        pairs = near(texts + [copy[:-1] + "好" for copy in copies])
        seconds[count] = time.process_time() - started
        assert {i for i, _, _ in pairs} == set(range(count, count + 50))
    assert seconds[1600] < 8 * seconds[400]


# What differs stands in the middle of a text long enough to be a near duplicate by its characters.
AROUND = (
    "孩子发热时家长先不要着急，让孩子多休息，多喝温开水，穿宽松的衣服，房间注意通风，{}，观察精神和食欲，"
    "如果精神很差或者一直不退，就带孩子到医院请医生看。"
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("每次1.5毫升", "每次15毫升"), ("1-2岁", "12岁"), ("3-5天", "35天"), ("38.5℃", "385℃"),
        ("HBsAg(-)", "HBsAg"), ("38。5℃", "385℃"), ("1：2000稀释", "12000稀释"), ("血压120/80", "血压12080"),
        ("①5天", "15天"), ("计数10⁹", "计数109"),
        ("3、5天", "35天"), ("5%葡萄糖", "5葡萄糖"), ("体温-2", "体温2"), ("BE-2.5", "BE2.5"), ("mg/kg", "mgkg"),
        ("HBsAg-，再查", "HBsAg，再查"),
    ],
)  # fmt: skip
def test_numbers_and_signs_that_differ_only_in_a_mark_are_different_texts(one, other):
    one, other = AROUND.format(one), AROUND.format(other)
    assert digest(one) != digest(other) and not near([one, other])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("每次１．５毫升", "每次1.5毫升"), ("每次1.50毫升", "每次1.5毫升"), ("１～２ 岁", "1-2岁"),
        ("1—2岁", "1-2岁"), ("每日1,000毫升", "每日1000ml"),
        ("每次5 毫升；", "每次5毫升，"), ("HBsAg（－）", "HBsAg(-)"), ("三天", "3天"),
        ("3至5天", "3-5天"), ("38.5度", "38.5℃"),
    ],
)  # fmt: skip
def test_one_number_written_in_two_ways_is_one(one, other):
    one, other = AROUND.format(one), AROUND.format(other)
    assert near([one, other]) == [(1, 0, pytest.approx(planted.similarity(one, other), abs=0.2))]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("每次5毫升", "每次5毫克"), ("每日两次", "每日三次"), ("吃3包", "吃3盒"), ("5mg", "5mg/kg"),
        ("每公斤2毫升", "每次2毫升"),
        ("尿糖(+)", "尿糖(-)"), ("结果阴性", "结果阳性"), (">38度", "<38度"), ("ALT高", "AST高"), ("3月", "3个月"),
        ("用布洛芬", "用阿司匹林"), ("像手足口病", "像水痘"),
    ],
)  # fmt: skip
def test_texts_that_differ_in_a_number_a_unit_a_sign_or_a_known_name_are_no_near_duplicates(one, other):
    rows = NearDuplicates()
    for text in (one, other, one + "啊"):
        rows.add(AROUND.format(text))
    found = rows.find(Names(["布洛芬", "阿司匹林", "手足口病", "水痘"]))
    rows.close()
    assert [(i, j) for i, j, _ in found] == [(2, 0)]  # the third differs from the first in no such thing


def test_composed_characters_are_one_and_numbers_that_stand_by_themselves_stay_apart():
    assert digest("ｶﾞ1.5①2") == digest("ガ1.5 1 2") != digest("ガ15 12")
