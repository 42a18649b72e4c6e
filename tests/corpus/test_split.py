"""Held-out rows share no question with training rows, whatever else is in the data."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pedgpt.corpus import question_key, split


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


def plain(text):
    """Letters and digits only, in lower case; for texts without full-width forms."""
    return "".join(c for c in text.lower() if c.isalnum())


QUESTIONS = st.lists(st.text(alphabet="甲乙ab1 ?，", min_size=1, max_size=4), max_size=40)


@given(QUESTIONS, st.integers(0, 5), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
@settings(max_examples=150, deadline=None)
def test_no_question_is_on_both_sides_and_no_row_is_lost(questions, seed, share):
    training, heldout, repeated = split(questions, lambda q: q, heldout_share=share, seed=seed)
    assert not {plain(q) for q in training} & {plain(q) for q in heldout}
    assert len(training) + len(heldout) + repeated == len(questions)
    assert {plain(q) for q in training + heldout} == {plain(q) for q in questions}
    assert repeated == len(questions) - len({plain(q) for q in questions})
    for side in (training, heldout):
        assert side == [q for q in dict.fromkeys(questions) if q in side]  # order is kept
    assert not (heldout if share == 0.0 else training if share == 1.0 else [])


def test_rows_of_one_question_stay_together_and_are_told_apart_by_identity():
    rows = [("问甲", "1"), ("问 甲？", "2"), ("问乙", "1"), ("问甲", "1。"), ("问乙", "3")]
    for seed in range(20):
        training, heldout, repeated = split(
            rows, lambda row: row[0], identity=lambda row: row[0] + row[1], heldout_share=0.5, seed=seed
        )
        assert repeated == 1 and rows[3] not in training + heldout
        for side in (training, heldout):
            assert (rows[0] in side) == (rows[1] in side) and (rows[2] in side) == (rows[4] in side)


def test_side_of_a_question_depends_on_itself_and_the_seed_alone():
    questions = [f"第{i}个问题" for i in range(3000)]
    heldout = split(questions, lambda q: q, heldout_share=0.1, seed=0)[1]
    assert 0.08 < len(heldout) / len(questions) < 0.12
    alone = split(questions[::-7], lambda q: q, heldout_share=0.1, seed=0)[1]
    assert set(alone) == set(heldout) & set(questions[::-7])
    other = split(questions, lambda q: q, heldout_share=0.1, seed=1)[1]
    assert len(set(other) & set(heldout)) < len(heldout) / 2
    wider = split(questions, lambda q: q, heldout_share=0.3, seed=0)[1]
    assert set(heldout) < set(wider)
