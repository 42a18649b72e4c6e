"""Rows through an Assembly: each is written once or listed once with its reason; no held-out row leaks into training.

The oracles share nothing with the library: keys, similarities, sums and files are made and read here.
"""

import json
import random
import re
import unicodedata
from collections import Counter
from functools import cache
from itertools import combinations, pairwise

import pytest

from pedgpt.corpus.build import Step
from pedgpt.corpus.rows import Built, Dropped
from pedgpt.corpus.sources import Source
from pedgpt.corpus.split import Split
from pedgpt.data import Conversation, Document, Message, PreferencePair

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 2500)]
SOURCE, TEXTS = Source("instructions", "talk", domain="pediatric"), Source("encyclopedia", "book")
DISEASES = ["", "", "肺炎", "水痘", "麻疹", "风疹", "哮喘"]


def talk(*turns, source="f:1", **fields):
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))
    return Conversation(messages, source, **{"task": "MedKQ&A"} | fields)


def pair(asked, chosen, rejected, source="f:1", **fields):
    return PreferencePair((Message("user", asked),), chosen, rejected, source, **fields)


def words(seed, n=40):
    return "".join(random.Random(seed).sample(HAN, n))


def jsonl(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def said(row):
    if "text" in row:
        return [row["text"]]
    return [message["content"] for message in row.get("messages", row.get("prompt"))] + [
        row[name] for name in ("chosen", "rejected") if name in row
    ]


def key(text):
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


@cache
def grams(text):
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def jaccard(one, other):
    shared = len(grams(one) & grams(other))
    return shared / (len(grams(one)) + len(grams(other)) - shared)


def asked(row):
    if "prompt" in row:
        return key(row["prompt"][-1]["content"])
    return key(next(m["content"] for m in row["messages"] if m["role"] == "user")) if "messages" in row else None


def mutated(rng, text, changes):
    """The text with some characters changed, and punctuation and spaces that no comparison may see."""
    letters = list(text)
    for place in rng.sample(range(len(letters)), changes):
        letters[place] = rng.choice(HAN)
    for place in sorted(rng.sample(range(len(letters)), 3), reverse=True):
        letters.insert(place, rng.choice("，。 ！"))
    return "".join(letters)


def random_inputs(rng, count):
    """Inputs of one to four rows, many like earlier ones, the later rows built from one of the former."""
    bases, number = [words(rng.random(), 60) for _ in range(4)], 0
    for _ in range(count):
        steps = []
        for place in range(rng.randint(1, 4)):
            number += 1
            text = mutated(rng, rng.choice(bases), rng.choice([0, 0, 1, 2, 3, 6, 60]))
            name, source = rng.choice(DISEASES), f"in:{number}"
            named = "".join(rng.sample(DISEASES, rng.choice([0, 0, 1, 2])))
            question = named + rng.choice([text[:14], text[:14], words(rng.random(), 15)])
            builder = rng.choice(["", "", "", "evidiag", "role_play"])
            row = rng.choice([
                Built(talk(question, text[14:], source=source, disease=name)),
                Built(talk(question, text[14:40], text[40:50], text[50:], source=source, disease=name, task="EviDiag")),
                Built(pair(question, text[14:40], text[40:], source=source, disease=name)),
                Built(Document(rng.choice(["", *DISEASES]) + text, source, rng.choice(["", question]), name)),
                Dropped(source, "a builder's reason", text),
            ])  # fmt: skip
            parent = rng.randint(-1, place - 1) if place and rng.random() < 0.6 else -1
            steps.append(Step(builder, row, parent))
        yield steps


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("threshold", [0.7, 0.8, 1.0])
def test_every_row_is_written_or_listed_once_and_no_heldout_row_leaks(assembled, seed, share, threshold):
    inputs = list(random_inputs(random.Random(f"{seed} {share} {threshold}"), 40))
    split = Split([name for name in DISEASES if name], heldout_share=share, seed=seed + int(10 * threshold))
    assembly, rows, left = assembled(inputs, split=split, near_duplicate=threshold)
    steps = [step for taken in inputs for step in taken]
    place = {id(step): (step.row.record.source if isinstance(step.row, Built) else step.row.source) for step in steps}
    written = [(side, row) for (side, _, _), found in rows.items() for row in found]
    written_places = Counter(row["origin"]["place"] for _, row in written)
    assert written_places + Counter(row["place"] for row in left) == Counter(place.values())
    assert assembly.built["talk"] == len(written) + len(left) == len(steps)
    assert Counter(row["reason"] for row in left) == {reason: n for (_, reason), n in assembly.dropped.items()}
    assert sum(file["rows"] for file in assembly.files) == len(written)

    for taken in inputs:  # nothing stays of what is built from a row that is left out
        for step in taken:
            if step.parent >= 0 and place[id(step)] in written_places:
                assert place[id(taken[step.parent])] in written_places
    for found in rows.values():
        numbers = [int(row["origin"]["place"].removeprefix("in:")) for row in found]
        assert numbers == sorted(numbers)

    full = {place[id(step)]: key("".join(said_of(step.row.record))) for step in steps if isinstance(step.row, Built)}
    same = {place[id(step)]: step.builder for step in steps}
    documents = [step.row.record for step in steps if isinstance(step.row, Built) and hasattr(step.row.record, "title")]
    known = sorted({*DISEASES, *(key(document.title) for document in documents)} - {""}, key=len, reverse=True)
    named = {place: re.findall("|".join(known), text) for place, text in full.items()}
    for (_, one), (_, other) in combinations(written, 2):
        one, other = one["origin"]["place"], other["origin"]["place"]
        if "role_play" not in (same[one], same[other]):
            assert jaccard(full[one], full[other]) < threshold or named[one] != named[other]
    train, heldout = ([row for side, row in written if side == part] for part in ("train", "heldout"))
    assert not {asked(row) for row in train} & {asked(row) for row in heldout} - {None}
    assert not {row.get("disease") for row in train} & {row.get("disease") for row in heldout} - {None}
    for row in train:  # nor does it ask about a held-out disease, unless it says that it is about another
        about = (row.get("title") or row["text"]) if "text" in row else asked(row)
        held = {name for name in DISEASES if name and split.side(f"disease/{name}") == "heldout"}
        assert row.get("disease") or not any(name in about for name in held)
    assert share or not heldout
    for row in left:
        if row["reason"] in ("exact duplicate", "near duplicate"):
            similarity, _, other = row["detail"].partition("of ")
            assert int(other.removeprefix("in:")) < int(row["place"].removeprefix("in:"))
            measured = jaccard(full[row["place"]], full[other])
            assert measured >= threshold
            assert measured == (1 if not similarity else pytest.approx(float(similarity), abs=0.0051))


def said_of(record):
    if isinstance(record, Document):
        return [record.text]
    turns = record.prompt if isinstance(record, PreferencePair) else record.messages
    texts = [message.content for message in turns]
    return [*texts, record.chosen, record.rejected] if isinstance(record, PreferencePair) else texts


@pytest.mark.parametrize("disease", ["", "肺炎"])
@pytest.mark.parametrize("held_first", [True, False])
def test_of_two_rows_alike_on_both_sides_one_stays(assembled, disease, held_first):
    """One is a near duplicate: it must not take the other, which it resembles, with it."""
    split = Split(["肺炎", "水痘"], heldout_share=0.5, seed=0)
    held, trained = (name for side in ("heldout", "train") for name in ("肺炎", "水痘")
                     if split.side(f"disease/{name}") == side)  # fmt: skip
    if not disease:  # the same with the rows' own diseases, unknown to the split
        split = Split([], heldout_share=0.5, seed=0)
        names = [words(i, 4) for i in range(40)]
        held = next(name for name in names if split.side(f"disease/{name}") == "heldout")
        trained = next(name for name in names if split.side(f"disease/{name}") == "train")
    answer = words("answer", 200)
    rows = [talk(words(name, 8), answer, source=f"in:{name}", disease=name) for name in (held, trained)]
    _, rows, left = assembled([[Step("", Built(row))] for row in (rows if held_first else rows[::-1])], split=split)
    assert sum(map(len, rows.values())) == 1 and [row["reason"] for row in left] == ["near duplicate"]
    assert {side for side, *_ in rows} == {"heldout" if held_first else "train"}


def test_child_of_a_row_that_is_left_out_at_once_or_in_the_end_is_left_out(assembled):
    first, second = words(1), words(2)
    inputs = [
        [Step("", Built(Document(first, "a:1")))],
        [Step("", Dropped("b:1", "unfit")), Step("role_play", Built(talk(words(3), words(4), source="b:1")), 0)],
        [Step("", Built(Document(first + "。", "c:1"))), Step("role_play", Built(talk(words(5), words(6))), 0),
         Step("preferences", Built(pair(words(7), words(8), words(9))), 1), Step("", Built(Document(second, "c:2"))),
         Step("role_play", Dropped("c:3", "a builder's reason"), 0)],
        [Step("", Built(Document(mutated(random.Random(0), words("d", 90), 1), "d:1"))),
         Step("", Built(Document(mutated(random.Random(0), words("d", 90), 2), "d:2"))),
         Step("evidiag", Built(talk(words(10), words(11), source="d:3")), 1),
         Step("preferences", Built(pair(words(12), words(13), words(14), source="d:4")), 2)],
    ]  # fmt: skip
    _, rows, left = assembled(inputs, source=TEXTS)
    assert [row["origin"]["place"] for row in rows["train", "text/pediatric", "book"]] == ["a:1", "c:2", "d:1"]
    assert sum(map(len, rows.values())) == 3
    parent = "built from a row that was left out"
    assert [(row["place"], row["reason"], row["detail"]) for row in left if row["reason"] == parent] == [
        ("b:1", parent, ""), ("f:1", parent, ""), ("f:1", parent, ""), ("d:3", parent, "d:2"), ("d:4", parent, "d:3"),
    ]  # fmt: skip
    assert Counter(row["reason"] for row in left) == {
        parent: 5, "unfit": 1, "exact duplicate": 1, "near duplicate": 1, "a builder's reason": 1,
    }  # fmt: skip


def test_four_doses_in_answer_to_one_question_are_all_kept(assembled):
    answer = "按体重用布洛芬混悬液，每次{}毫升，两次之间至少隔六小时，注意多喝水，精神不好就到医院看。"
    asked, doses = "孩子发热，布洛芬混悬液每次喝多少？", ("4.7", "47", "3", "6")
    doses = [talk(asked, answer.format(dose), source=f"in:{dose}") for dose in doses]
    _, rows, left = assembled([[Step("", Built(row))] for row in doses])
    assert not left and sum(map(len, rows.values())) == 4


def test_rows_that_name_another_drug_of_a_graph_or_a_heading_are_no_near_duplicates(assembled):
    said = "孩子发热，家长先不要着急，让孩子多休息，多喝温开水，穿宽松的衣服，再用{}，观察精神和食欲，" + words(0, 60)
    inputs = [Built(Document(said.format(name), f"in:{name}")) for name in ("甲芬", "乙芬", "丙芬", "丁芬")]
    inputs.append(Built(Document(words(1), "book.md:1 › 第一章 退热药 › 乙芬 › 用法", "用法")))
    _, _, left = assembled(
        [[Step("", row)] for row in inputs], source=TEXTS, before=lambda assembly: assembly.names.add("甲芬")
    )
    assert [row["place"] for row in left] == ["in:丁芬"]  # 丙芬 and 丁芬 are names to nobody


def test_an_evaluation_row_with_a_stock_answer_removes_no_training_row(assembled):
    stock = "建议您带孩子到正规医院儿科就诊，在医生指导下用药。"
    asked = ["咳嗽两周", "嘴角起泡", "夜里磨牙", "走路内八字", "头发稀黄", "耳朵流水"]
    inputs = [[Step("", Built(talk(f"孩子{name}怎么办？", stock, source=name)))] for name in [*asked, "总揉眼睛"]]
    evaluation = [talk("孩子总揉眼睛怎么办？", stock, source="e:1")]
    _, rows, left = assembled(inputs, before=lambda assembly: assembly.protect(evaluation))
    assert [row["place"] for row in left] == ["总揉眼睛"]  # the one that asks the same


@pytest.mark.parametrize("builder", ["", "evidiag", "graph/evidiag", "role_play", "preferences"])
def test_question_of_a_heldout_row_is_asked_of_no_other_disease_in_training(assembled, builder):
    split = Split(["肺炎", "水痘"], heldout_share=0.5, seed=0)
    held = next(name for name in ("肺炎", "水痘") if split.side(f"disease/{name}") == "heldout")
    other = ({"肺炎", "水痘"} - {held}).pop()
    question = "孩子发热、咳嗽三天，夜里睡不安稳，是怎么回事？"
    made = {True: talk(question, words(1), disease=held), False: pair(question, words(2), words(3), disease=held)}
    asks = [talk(question, words(4), source="in:1", disease=other),
            pair(question.replace("，", " "), words(5), words(6), source="in:2", disease=other)]  # fmt: skip
    inputs = [*asks, talk(words(7), words(8), source="in:3", disease=other)]
    steps = [[Step("", Built(row))] for row in inputs] + [[Step(builder, Built(made[builder != "preferences"]))]]
    _, rows, left = assembled(steps, split=split)
    assert sorted(row["place"] for row in left) == ["in:1", "in:2"]
    assert sorted(side for side, *_ in rows) == ["heldout", "train"]


EVALUATED = {
    "conversation": (talk(words("q", 20), words("a", 30)),
                     [talk(words("q", 20), words(1)), talk(words(2), words("a", 30))]),
    "pair": (pair(words("q", 20), words("c", 30), words("r", 30)),
             [talk(words("q", 20), words(1)), pair(words(2), words("c", 30), words(3)),
              pair(words(4), words(5), words("r", 30))]),
    "document": (Document(words("d", 60), "e:1"),
                 [Document(words(1) + words("d", 60) + words(2), "t"), talk(words(3), words("d", 60))]),
    "short question": (talk("百日咳要隔离吗？", "要。"), [talk("百日咳，要隔离吗", words(1))]),
}  # fmt: skip


@pytest.mark.parametrize("kind", EVALUATED)
def test_no_training_row_holds_what_is_evaluated(assembled, kind):
    item, rows = EVALUATED[kind]
    free = [talk(words(100 + i), words(200 + i), source=f"free:{i}") for i in range(4)]
    mixed = [row for two in zip(free, (rows * 4)[:4], strict=True) for row in two]
    _, written, left = assembled([[Step("", Built(row))] for row in mixed], before=lambda a: a.protect([item]))
    assert [row["origin"]["place"] for rows in written.values() for row in rows] == [f"free:{i}" for i in range(4)]
    assert "overlaps with evaluation or held-out rows" in {row["reason"] for row in left}


def test_evaluated_rows_may_be_held_out_and_what_a_patient_says_later_is_anybodys(assembled):
    split = Split(["肺炎", "水痘"], heldout_share=0.5, seed=0)
    held = next(name for name in ("肺炎", "水痘") if split.side(f"disease/{name}") == "heldout")
    item = talk(words("q", 20), words("a", 30), "好的，谢谢医生的耐心解答和建议", words("b", 30), disease=held)
    other = {"肺炎": "水痘", "水痘": "肺炎"}[held]
    other = talk(words(1), words(2), "好的，谢谢医生的耐心解答和建议", words(3), source="in:2", disease=other)
    _, rows, left = assembled(
        [[Step("", Built(item))], [Step("", Built(other))]], split=split, before=lambda a: a.protect([item])
    )
    assert not left and {side for side, *_ in rows} == {"heldout", "train"}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_sample_for_stage_two_is_spread_evenly_over_each_task(assembled, share):
    inputs = [[Step("", Built(talk(words(i), words(-i), source=f"in:{i}", task=task)))]
              for i, task in zip(range(1, 61), ("MedKQ&A", "TreRecom", "safety") * 20, strict=True)]  # fmt: skip
    _, rows, _ = assembled(inputs, share=share)
    numbers = {row["origin"]["place"]: row["task"] for row in rows.get(("train", "tasks_sample", "talk"), [])}
    assert Counter(numbers.values()) == {t: n for t in ("MedKQ&A", "TreRecom") if (n := round(20 * share))}
    for task, first in (("MedKQ&A", 1), ("TreRecom", 2)):
        places = sorted((int(p[3:]) - first) // 3 for p, name in numbers.items() if name == task)
        assert all(b - a in (int(1 / share), int(1 / share) + 1) for a, b in pairwise(places))
