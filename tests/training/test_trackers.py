"""Trackers get each step's record beside metrics.jsonl, and go on where the checkpoint is."""

import json
import sys

import pytest
import torch

from pedgpt import training
from pedgpt.training import BatchPlan, TrainingSettings, World

WORLD = World(0, 1, torch.device("cpu"))
# What wandb has of use here, noting its calls in a list.
WANDB = """
calls = []
class Run:
    def log(self, record, step):
        calls.append(("log", step, record))
    def finish(self):
        calls.append(("finish",))
def init(**settings):
    calls.append(("init", settings))
    return Run()
"""


class Batch:
    weight = num_tokens = 1

    def to(self, device):
        return self


def run(output, stop_after=None, **chosen):
    settings = TrainingSettings(
        str(output), max_steps=4, global_batch_size=1, micro_batch_size=1, checkpoint_every=2, **chosen
    )
    settings.check()
    model = torch.nn.Linear(2, 1)

    def watch(record):
        if record["step"] == stop_after:
            raise KeyboardInterrupt

    training.train(
        model, BatchPlan.from_settings(3, settings), lambda rows, ids: Batch(),
        lambda model, batch: (model(torch.ones(2)).square().sum(), {}), settings, WORLD,
        evaluate=lambda: {"loss": 7.0}, watch=watch,
    )  # fmt: skip
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda: sys.modules["wandb"].calls
    sys.modules.pop("wandb", None)


def test_wandb_gets_every_record_and_a_resumed_run_keeps_its_id(tmp_path, wandb):
    run(tmp_path / "plain")
    assert "wandb" not in sys.modules and not (tmp_path / "plain" / "wandb_id.txt").exists()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", stop_after=3, log_to=["wandb"])
    (_, started), *logs, end = wandb().copy()
    assert [step for _, step, _ in logs] == [1, 2, 3] and end == ("finish",)
    assert started["id"] and started["resume"] == "allow" and started["name"] == "run"
    assert started["config"]["learning_rate"] == 1e-5 and started["dir"] == str(tmp_path / "run")

    wandb().clear()
    records = run(tmp_path / "run", log_to=["wandb"])
    (_, resumed), *logs, end = wandb().copy()
    assert resumed["id"] == started["id"] and end == ("finish",)
    assert [(step, record) for _, step, record in logs] == [(3, records[2]), (4, records[3])]
    assert [record["step"] for record in records] == [1, 2, 3, 4] and records[3]["eval_loss"] == 7.0

    wandb().clear()
    run(tmp_path / "other", log_to=["wandb"])
    assert wandb()[0][1]["id"] != started["id"]


def test_a_run_that_starts_anew_gets_another_id(tmp_path, wandb):
    ids = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", stop_after=1, log_to=["wandb"])
        ids.append(wandb()[0][1]["id"])
        wandb().clear()
    assert len(set(ids)) == 2


def test_tensorboard_reads_what_a_run_and_its_resumption_wrote(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after=3, log_to=["tensorboard"])
    records = run(tmp_path, log_to=["tensorboard"])
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    losses = [(event.step, pytest.approx(event.value)) for event in found.Scalars("loss")]
    assert [(record["step"], record["loss"]) for record in records] == losses
    assert [event.step for event in found.Scalars("eval_loss")] == [4] and "step" not in found.Tags()["scalars"]
