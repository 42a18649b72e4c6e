"""The plan of batches: nothing lost, nothing twice, the same for any number of ranks."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pedgpt.training import BatchPlan, TrainingSettings

SIZES = st.integers(1, 9)


def make(num_rows, **chosen):
    return BatchPlan.from_settings(num_rows, TrainingSettings(output="", **chosen))


@settings(max_examples=200, deadline=None)
@given(
    num_rows=st.integers(1, 40), size=SIZES, micro=SIZES, world=st.integers(1, 5), seed=st.integers(0, 3),
    epochs=st.one_of(st.sampled_from([1.0, 2.0, 3.0]), st.floats(0.05, 3.0)),
)  # fmt: skip
def test_every_row_is_trained_on_once_an_epoch_over_all_ranks(num_rows, size, micro, world, seed, epochs):
    plan = make(num_rows, epochs=epochs, global_batch_size=size, micro_batch_size=micro, seed=seed)
    alone = make(num_rows, epochs=epochs, global_batch_size=size, micro_batch_size=9, seed=seed)
    row_of = {}
    for step in range(plan.total_steps):
        ranks = [plan.micro_batches(step, rank, world) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1  # ranks gather weights together, so equally often
        batches = [batch for rank in ranks for batch in rank]
        assert all(len(rows) == len(ids) <= micro for rows, ids in batches)
        pairs = [pair for rows, ids in batches for pair in zip(ids, rows, strict=True)]
        assert len({id for id, _ in pairs}) == len(pairs) <= size
        assert step == plan.total_steps - 1 or len(pairs) == size
        # One rank and one micro-batch size see the same rows under the same ids.
        assert sorted(pairs) == sorted(
            pair for rows, ids in alone.micro_batches(step) for pair in zip(ids, rows, strict=True)
        )
        assert not row_of.keys() & dict(pairs).keys()
        row_of |= dict(pairs)
    total = max(1, round(epochs * num_rows))
    assert sorted(row_of) == list(range(total))
    order = [row_of[id] for id in range(total)]
    for start in range(0, total, num_rows):
        epoch = Counter(order[start : start + num_rows])
        assert max(epoch.values()) == 1 and set(epoch) <= set(range(num_rows))


def test_epochs_and_seeds_have_their_own_order():
    def order(seed, epochs):
        plan = make(50, epochs=epochs, global_batch_size=50, seed=seed)
        return [[r for rows, _ in plan.micro_batches(s) for r in rows] for s in range(plan.total_steps)]

    first, second = order(0, 2)
    (other,) = order(1, 1)
    assert sorted(first) == sorted(second) == sorted(other)
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(50))}) == 4
    assert order(0, 1) == [first]


def test_max_steps_repeats_the_data_as_often_as_needed():
    plan = make(7, max_steps=5, epochs=1, global_batch_size=4)
    assert plan.total_steps == 5
    seen = Counter(row for step in range(5) for rows, _ in plan.micro_batches(step) for row in rows)
    assert sum(seen.values()) == 20 and set(seen) == set(range(7)) and max(seen.values()) == 3


@pytest.mark.parametrize(
    ("rows", "chosen", "steps"),
    [(10, {}, 1), (10, {"global_batch_size": 4}, 3), (10, {"global_batch_size": 4, "epochs": 2.0}, 5),
     (10, {"global_batch_size": 4, "epochs": 0.5}, 2), (3, {"epochs": 0.01}, 1)],
)  # fmt: skip
def test_number_of_steps_matches_hand_count(rows, chosen, steps):
    assert make(rows, **chosen).total_steps == steps


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="nothing to train on"):
        make(0)
