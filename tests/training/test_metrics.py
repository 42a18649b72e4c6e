"""metrics.jsonl: every step exactly once, whatever a killed run left. The watch: told when due, and only then."""

import json
import random

import pytest

from pedgpt.training.metrics import ChosenLikelihoodWatch, cut_log


def record(step):
    return {"step": step, "loss": 1 / step, "tokens": 10 * step, "seconds": 0.5 * step}


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 6}'], ids=["whole", "torn", "no_line_break"])
def test_resuming_drops_the_steps_after_the_checkpoint(tmp_path, after, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 6)) + tail, encoding="utf-8")
    last = cut_log(path, after)
    assert path.read_text() == "".join(json.dumps(record(step)) + "\n" for step in range(1, after + 1))
    assert last == record(after) if after else (last["tokens"], last["seconds"]) == (0, 0.0)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_start_begins_an_empty_log(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    for _ in range(2):
        assert cut_log(path, 0)["tokens"] == 0 and path.read_bytes() == b""
        path.write_text('{"step": 1, "loss"', encoding="utf-8")


def warnings(chosen, margins, **settings):
    """(step, text) of what the watch says over a run."""
    watch = ChosenLikelihoodWatch(**{"beta": 0.1, "mu": 0.1, **settings})
    records = (
        {"step": step, "rewards/chosen": c, "rewards/margins": m, "loss": 0.7}
        for step, (c, m) in enumerate(zip(chosen, margins, strict=True), start=1)
    )
    return [(record["step"], text) for record in records if (text := watch(record)) is not None]


def ramp(slope, steps=100, start=0.0):
    return [start + slope * step for step in range(1, steps + 1)]


def noisy(series, size, seed):
    draw = random.Random(seed)
    return [value + draw.gauss(0, size) for value in series]


@pytest.mark.parametrize("window", [2, 5, 10, 25])
def test_a_steady_fall_is_told_at_the_end_of_the_second_window(window):
    ((step, _),) = warnings(ramp(-0.1), ramp(0.1), window=window)
    assert step == 2 * window
    assert not warnings(ramp(-0.1, 2 * window - 1), ramp(0.1, 2 * window - 1), window=window)


def test_the_warning_says_what_happened_in_nats_per_answer_and_what_to_raise():
    chosen, margins = [-0.5] * 10 + [-1.25] * 10, [1.0] * 10 + [3.0] * 10
    ((step, text),) = warnings(chosen, margins)
    assert step == 20
    assert text == (
        "the chosen answers become less likely while the margin grows: over the last 10 steps they were 12.50 nats per "
        "answer less likely than under the reference, and the margin was 30.00 nats; raise mu (now 0.1)"
    )
    for mu, beta, remedy in (
        (0, 0.1, "raise mu (now 0.0)"),
        (0.99, 0.1, "raise mu (now 0.99)"),
        (1, 0.1, "raise mu (now 1.0) or beta (now 0.1)"),
        (2.5, 0.25, "raise mu (now 2.5) or beta (now 0.25)"),
    ):
        ((_, text),) = warnings(chosen, margins, mu=mu, beta=beta)
        assert text.endswith(f"; {remedy}")
    assert "5.00 nats per answer less likely than under the reference" in text


SLOW = [0.0] * 20 + ramp(-0.01, 480)
CASES = {
    # chosen, margins: whether to warn
    "fall": (ramp(-0.05), ramp(0.02), True),
    "fall_after_a_rise": (ramp(0.05, 20) + ramp(-0.1, 80, start=1.0), ramp(0.05), True),
    "slow_fall_in_noise": (noisy(SLOW, 0.3, 1), noisy([-2 * c for c in SLOW], 0.4, 2), True),
    "chosen_rises": (ramp(0.05), ramp(0.1), False),
    "both_rise_from_below": (ramp(0.05, start=-9.0), ramp(0.1), False),
    "margin_shrinks": (ramp(-0.05), ramp(-0.02), False),
    "margin_stays": (ramp(-0.05), [0.5] * 100, False),
    "chosen_stays_below": ([-3.0] * 100, ramp(0.1), False),
    "falls_but_not_below_the_reference": (ramp(-0.05, start=6.0), ramp(0.1), False),
    "both_fall_and_recover": (
        ramp(-0.1, 30) + ramp(0.1, 70, start=-3.0),
        ramp(-0.1, 30) + ramp(0.1, 70, start=-3.0),
        False,
    ),
    "one_bad_window": ([0.0] * 10 + [-2.0] * 10 + [0.0] * 80, [0.0] * 10 + [2.0] * 10 + [0.0] * 80, False),
    "two_bad_windows_apart": (
        [-1.0] * 10 + [0.5] * 10 + [-2.0] * 10 + [0.5] * 70, [1.0] * 10 + [0.0] * 10 + [2.0] * 80, False,
    ),
    "one_wild_step": ([0.0] * 15 + [-500.0] + [0.0] * 84, ramp(0.1), False),
    "within_the_steps_noise": ([9.0, -10.0] * 5 + [8.0, -10.0] * 5 + [0.0] * 80, ramp(0.1), False),
    "less_than_a_nat": (ramp(-0.0009), ramp(0.1), False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_only_a_chosen_likelihood_that_falls_while_the_margin_grows_is_told(case):
    chosen, margins, expected = CASES[case]
    assert len(warnings(chosen, margins)) == expected


def test_noise_around_the_reference_is_not_told():
    for seed in range(300):
        chosen, rejected = (noisy([0.0] * 300, 0.3, f"{seed}/{side}") for side in ("chosen", "rejected"))
        assert not warnings(chosen, [c - r for c, r in zip(chosen, rejected, strict=True)]), seed


def test_the_warning_comes_once_a_run():
    # It falls, recovers far above, and falls again.
    chosen = ramp(-0.1) + ramp(0.2, start=-10.0) + ramp(-0.4, start=10.0)
    assert len(warnings(chosen, ramp(0.1, 300))) == 1


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_without_beta_there_are_no_rewards_and_no_warning(mu):
    assert not warnings(ramp(-0.1), ramp(0.1), beta=0.0, mu=mu)
    assert not warnings([0.0] * 100, [0.0] * 100, beta=0, mu=mu)
