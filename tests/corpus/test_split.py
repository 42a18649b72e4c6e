"""Held-out rows share no disease and no question with training rows, whatever else is in the data."""

import pytest

from pedgpt.corpus.split import Groups, question_key, side
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
def test_share_of_groups_is_held_out_and_depends_on_name_and_seed_alone(seed):
    names = [f"disease/第{i}种病" for i in range(4000)]
    heldout = {name for name in names if side(name, 0.1, seed) == "heldout"}
    assert 0.085 < len(heldout) / len(names) < 0.115  # three standard deviations
    assert heldout < {name for name in names if side(name, 0.3, seed) == "heldout"}
    assert {side(name, 0.0, seed) for name in names} == {"train"}
    other = {name for name in names if side(name, 0.1, seed + 1) == "heldout"}
    assert len(heldout & other) < len(heldout) / 2


def test_rows_on_a_disease_are_one_group_however_they_name_it():
    groups = Groups(["肺炎", "支原体肺炎", "感冒"])
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
    groups = Groups(["感冒"])
    one, two = groups.group(talk("孩子 发烧，怎么办")), groups.group(talk("孩子发烧怎么办？"))
    assert one == two != groups.group(talk("孩子发热怎么办？"))
    asked_twice = Conversation((*talk("孩子发烧怎么办").messages, *talk("要吃药吗").messages), "f:2")
    assert groups.group(asked_twice) == one  # a dialogue goes by its first question
    assert Groups().group(talk("感冒了")).startswith("question/")
