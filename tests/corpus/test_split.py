"""Held-out rows share no disease and no question with training rows, whatever else is in the data."""

import pytest

from pedgpt.corpus.split import Split, question_key
from pedgpt.data import Conversation, Document, Message, PreferencePair


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("孩子发烧怎么办？", "孩子 发烧，怎么办", True),
        ("ＣＴ检查要多久", "ct 检查要多久?", True),
        ("“３岁”宝宝", "3岁宝宝！！\n", True),
        ("孩子发烧怎么办？", "孩子发热怎么办？", False),
        ("3岁", "4岁", False),
        ("Straße", "STRASSE", True),
    ],
)
def test_question_key_ignores_how_a_question_is_written(one, other, equal):
    assert (question_key(one) == question_key(other)) == equal


def talk(asked, disease=""):
    return Conversation((Message("user", asked), Message("assistant", "多喝水。")), "f:1", disease=disease)


@pytest.mark.parametrize("seed", range(3))
def test_share_of_questions_is_held_out_and_depends_on_name_and_seed_alone(seed):
    def heldout(share, seed):
        split = Split(heldout_share=share, seed=seed)
        return {name for name in (f"question/第{i}问" for i in range(4000)) if split.side(name) == "heldout"}

    found = heldout(0.1, seed)
    assert 0.085 < len(found) / 4000 < 0.115  # three standard deviations
    assert found < heldout(0.3, seed) and not heldout(0.0, seed)
    assert len(found & heldout(0.1, seed + 1)) < len(found) / 2


@pytest.mark.parametrize(("share", "count"), [(0.1, 7), (0.0, 0), (0.5, 34), (0.01, 1)])
def test_share_of_known_diseases_is_exact_and_seeded(share, count):
    names = [f"第{i}种病" for i in range(68)]
    sides = [Split(order, heldout_share=share, seed=3).side for order in (names, names[::-1])]
    found = {name for name in names if sides[0](f"disease/{name}") == "heldout"}
    assert len(found) == count == sum(sides[1](f"disease/{name}") == "heldout" for name in found)


def test_rows_on_a_disease_are_one_group_however_they_name_it():
    groups = Split(["肺炎", "支原体肺炎", "感冒"], heldout_share=0.1, seed=0)
    same = {
        groups.group(talk("支原体肺炎怎么治？")),
        groups.group(talk("孩子咳嗽怎么办？", disease="支原体肺炎")),
        groups.group(Document("支原体肺炎多见于学龄儿童。", "b:1", "支原体肺炎诊疗建议")),
        groups.group(Document("支原体肺炎的孩子咳嗽。", "b:2")),
        groups.group(PreferencePair((Message("user", "得了支原体肺炎要住院吗？"),), "别急。", "不必。", "p:1")),
    }
    assert same == {"disease/支原体肺炎"}  # the longest name counts, not 肺炎
    assert groups.group(talk("肺炎会传染吗？")) == "disease/肺炎"
    assert groups.group(talk("不知名的病", disease="川崎病")) == "disease/川崎病"  # a row's own disease needs no graph


def test_rows_without_a_known_disease_go_by_their_question():
    groups = Split(["感冒"], heldout_share=0.1, seed=0)
    one, two = groups.group(talk("孩子 发烧，怎么办")), groups.group(talk("孩子发烧怎么办？"))
    assert one == two != groups.group(talk("孩子发热怎么办？"))
    asked_twice = Conversation((*talk("孩子发烧怎么办").messages, *talk("要吃药吗").messages), "f:2")
    assert groups.group(asked_twice) == one  # a dialogue goes by its first question
    assert Split(heldout_share=0.1, seed=0).group(talk("感冒了")).startswith("question/")


def two_sides():
    """A split, a training disease and a held-out one; the names share no character."""
    names = ["水痘", "麻疹", "川崎病", "百日咳", "猩红热", "哮喘", "脚气", "贫血", "湿疹", "白喉"]
    split = Split(names, heldout_share=0.1, seed=0)
    heldout = next(name for name in names if split.side(f"disease/{name}") == "heldout")
    return split, next(name for name in names if name != heldout), heldout


def test_disease_is_found_wherever_a_row_names_it_and_however_its_own_field_is_written():
    split, _, heldout = two_sides()
    long = "病程较长。" * 100
    rows = [
        talk("孩子发热怎么办？", disease=f"{heldout} "),
        talk("孩子发热怎么办？", disease=f"儿童{heldout}"),
        Document("应早期用药。", f"book.md:7 › {heldout} › 治疗", "治疗"),
        Document(f"{long}{heldout}多见于幼儿。", "book.txt"),
        Conversation((*talk("医生您好").messages, Message("user", "会是什么病"),
                      Message("assistant", f"考虑{heldout}。")), "f:1"),
        PreferencePair((Message("user", "是什么病？"),), f"别急，是{heldout}。", "不知道。", "p:1"),
    ]  # fmt: skip
    for row in rows:
        assert split.group(row) == f"disease/{heldout}" and split.side(split.group(row)) == "heldout", row


def test_row_about_diseases_of_both_sides_has_no_group_but_a_complication_may_be_named():
    split, train, heldout = two_sides()
    both = [
        talk(f"{train}和{heldout}怎么区别？"),
        Document("都会发热。", f"b.md:3 › {train}与{heldout}", "鉴别"),
    ]
    assert [split.group(row) for row in both] == ["", ""]
    often = Document(f"{heldout}多见于幼儿，{train}少见，{heldout}会发热。", "b:1")
    assert split.group(often) == f"disease/{heldout}"  # no title: what it names most often
    about = Document(f"{train}可并发{heldout}。", "b:1", train)
    assert split.group(about) == split.group(talk("会怎样？", disease=train)) == f"disease/{train}"


def test_named_takes_the_longest_of_names_inside_one_another_and_matches_a_plain_search():
    split = Split(["肺炎", "支原体肺炎", "支原体", "炎症"], heldout_share=0, seed=0)
    assert split.named("支原体肺炎和肺炎症") == ["支原体肺炎", "肺炎"]
    assert split.named("") == [] and Split(heldout_share=0, seed=0).named("肺炎") == []
    text = "原体支原体肺肺炎症"
    assert split.named(text) == ["支原体", "肺炎"]
