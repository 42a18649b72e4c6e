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
    other = Split(names, heldout_share=share, seed=4)
    assert share in (0.0, 0.01) or found != {name for name in names if other.side(f"disease/{name}") == "heldout"}


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
