"""metrics.jsonl: every step exactly once, whatever a killed run left."""

import json

import pytest

from pedgpt.training.metrics import MetricsLog


def record(step):
    return {"step": step, "loss": 1 / step, "tokens": 10 * step, "seconds": 0.5 * step}


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_log_appends_one_line_a_step(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    log = MetricsLog(path)
    assert log.totals() == (0, 0.0)
    for step in (1, 2):
        log.write(record(step))
    assert path.read_text(encoding="utf-8").splitlines() == [json.dumps(record(1)), json.dumps(record(2))]


@pytest.mark.parametrize("after", range(7))
@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 6}'], ids=["whole", "torn", "no_line_break"])
def test_resuming_drops_the_steps_after_the_checkpoint(tmp_path, after, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 6)) + tail, encoding="utf-8")
    log = MetricsLog(path, after_step=min(after, 5))
    assert steps(path) == list(range(1, min(after, 5) + 1))
    if 0 < after:
        assert log.totals() == (10 * min(after, 5), 0.5 * min(after, 5))
    log.write(record(min(after, 5) + 1))
    assert steps(path) == list(range(1, min(after, 5) + 2))
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_start_begins_an_empty_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss"', encoding="utf-8")
    assert MetricsLog(path).totals() == (0, 0.0) and path.read_text(encoding="utf-8") == ""
