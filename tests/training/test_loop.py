"""One step is Σ loss / Σ weight over the global batch, whatever its parts; the rest of the loop around it."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from pedgpt import training
from pedgpt.training import BatchPlan, TrainingSettings, World
from pedgpt.training.loop import describe_run

WORLD = World(0, 1, torch.device("cpu"))
X = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 1.0], [-2.0, 0.5], [1.0, 1.0], [2.0, -3.0], [0.5, 0.5]])
# Rows weigh differently, so a mean over micro-batches of their means would be wrong.
WEIGHTS = torch.tensor([1, 4, 2, 0, 3, 1, 2])


@dataclass
class Batch:
    rows: list[int]

    @property
    def weight(self):
        return int(WEIGHTS[self.rows].sum())

    @property
    def num_tokens(self):
        return 10 * len(self.rows)

    def to(self, device):
        return self


def loss_function(model, batch):
    rows = torch.tensor(batch.rows, dtype=torch.long)
    squares = (model(X[rows])[:, 0] ** 2) * WEIGHTS[rows]
    return squares.sum(), {"twice": 2 * squares.detach().sum()}


def model():
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[0.3, -0.2]])
    return linear


def run(tmp_path, micro=2, made=None, loss=loss_function, **chosen):
    sizes = {"max_steps": 3, "global_batch_size": 3, "micro_batch_size": micro}
    settings = TrainingSettings(str(tmp_path), **{**sizes, "learning_rate": 0.1, **chosen})
    plan = BatchPlan.from_settings(len(X), settings)
    trained = made or model()
    training.train(trained, plan, lambda rows, ids: Batch(rows), loss, settings, WORLD)
    return trained, plan, [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def gradients(monkeypatch):
    """What the optimizer is given at each step, and where the weights then are."""
    seen = []
    step = torch.optim.AdamW.step

    def record(self, *rest):
        (parameter,) = self.param_groups[0]["params"]
        seen.append((parameter.detach().clone(), parameter.grad.clone()))
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return seen


@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_gradient_and_metrics_match_float64_calculation(tmp_path, gradients, micro, clip):
    _, plan, metrics = run(tmp_path, micro, max_grad_norm=clip)
    assert len(metrics) == len(gradients) == 3
    for step, (line, (weight, gradient)) in enumerate(zip(metrics, gradients, strict=True)):
        rows = [row for rows, _ in plan.micro_batches(step) for row in rows]
        x, w, at = X[rows].double(), WEIGHTS[rows].double(), weight[0].double()
        # d/da Σ w (a·x)² / Σ w = Σ 2 w (a·x) x / Σ w
        expected = (2 * w * (x @ at)) @ x / w.sum()
        norm = expected.norm()
        clipped = expected * min(1.0, clip / norm) if clip else expected
        torch.testing.assert_close(gradient[0].double(), clipped, rtol=1e-4, atol=1e-7)
        loss = float((w * (x @ at) ** 2).sum() / w.sum())
        assert line["loss"] == pytest.approx(loss, rel=1e-5) and line["twice"] == pytest.approx(2 * loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert line["step"] == step + 1 and line["tokens"] == 30 * (step + 1)


def test_a_batch_without_weight_changes_nothing_but_the_step(tmp_path):
    trained, _, metrics = run(tmp_path, loss=lambda m, b: (m(X[:1]).sum() * 0, {}), max_steps=2, weight_decay=0.0)
    assert [line["loss"] for line in metrics] == [0.0, 0.0] and torch.equal(trained.weight, model().weight)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: (m(X[:1]).sum() / 0, {}), "the loss became "),
        (lambda m, b: (m(X[:1]).sum() * float("nan"), {}), "the loss became nan"),
        # The square root of 0 is finite, its slope is not.
        (lambda m, b: ((m(X[:1]) * 0).sqrt().sum(), {}), "the gradient's norm became nan"),
    ],
)
def test_a_step_that_is_not_finite_stops_before_it_changes_the_weights(tmp_path, loss, message):
    made = model()
    with pytest.raises(ValueError, match=f"{message}.*lower learning_rate"):
        run(tmp_path, made=made, loss=loss, checkpoint_every=1)
    assert torch.equal(made.weight, model().weight)
    assert not (tmp_path / "checkpoints").exists()


class Rows(list):
    def batch(self, rows, ids):
        return Batch(rows)


def test_held_out_loss_is_the_weighted_mean_in_evaluation_mode(tmp_path):
    made = nn.Sequential(model(), nn.Dropout(0.9)).train()
    for size in (1, 2, 4, 50):
        settings = TrainingSettings(str(tmp_path), micro_batch_size=size)
        found = training.evaluation(made, Rows(X), loss_function, settings, WORLD)()
        squares = (X.double() @ torch.tensor([0.3, -0.2]).double()) ** 2
        expected = float((squares * WEIGHTS).sum() / WEIGHTS.sum())
        assert found == {"loss": pytest.approx(expected), "twice": pytest.approx(2 * expected)}
    assert made.training and made[0].weight.grad is None
    assert training.evaluation(made, Rows(), loss_function, settings, WORLD) is None


def test_evaluation_is_written_when_asked_and_at_the_end(tmp_path):
    settings = TrainingSettings(str(tmp_path), max_steps=5, global_batch_size=2, evaluate_every=2)
    plan = BatchPlan.from_settings(len(X), settings)
    made, modes = model(), []

    def loss(m, batch):
        modes.append(m.training)
        return loss_function(m, batch)

    training.train(
        made, plan, lambda rows, ids: Batch(rows), loss, settings, WORLD, evaluate=lambda: made.eval() and {"loss": 7.0}
    )
    assert modes == [True] * 5 and not made.training
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if line.get("eval_loss") == 7.0] == [2, 4, 5]


class Stopped(Exception):
    """Stands for the death of a process."""


def best_of(tmp_path, losses, die_after=None, **chosen):
    """A run whose evaluations find these losses: (its weight at the end, the weights after each step)."""
    settings = TrainingSettings(
        str(tmp_path), **{"global_batch_size": 2, "evaluate_every": 1, "keep_best": True, "max_steps": len(losses),
                          "learning_rate": 0.1, "checkpoint_every": 1, **chosen},
    )  # fmt: skip
    plan, made, weights = BatchPlan.from_settings(len(X), settings), model(), {}

    def watch(record):
        weights[record["step"]] = made.weight.detach().clone()
        if record["step"] == die_after:
            raise Stopped

    steps = iter(range(max((int(path.name[5:]) for path in tmp_path.glob("checkpoints/step_*")), default=0), 99))
    training.train(
        made, plan, lambda rows, ids: Batch(rows), loss_function, settings, WORLD,
        evaluate=lambda: {"loss": losses[next(steps)]}, watch=watch,
    )  # fmt: skip
    return made.weight.detach(), weights


@pytest.mark.parametrize("losses", [[3, 1, 2, 2], [1, 2, 3, 4], [4, 3, 2, 1], [2, 1, 1, float("nan")]])
def test_the_best_model_is_that_of_the_lowest_held_out_loss(tmp_path, losses):
    found, weights = best_of(tmp_path, losses)
    assert torch.equal(found, weights[losses.index(min(losses)) + 1])
    last, weights = best_of(tmp_path / "last", losses, keep_best=False)
    assert torch.equal(last, weights[4]) and not (tmp_path / "last/checkpoints/best").exists()


@pytest.mark.parametrize("losses", [[3, 1, 2, 2], [1, 2, 3, 4], [4, 3, 2, 1], [3, 2, 1, 2]])
@pytest.mark.parametrize("die_after", [1, 2, 3])
@pytest.mark.parametrize("every", [1, 2, 0])
def test_the_best_model_survives_a_death(tmp_path, losses, die_after, every):
    expected, _ = best_of(tmp_path / "whole", losses)
    with pytest.raises(Stopped):
        best_of(tmp_path / "run", losses, die_after, checkpoint_every=every)
    found, _ = best_of(tmp_path / "run", losses, checkpoint_every=every)
    assert torch.equal(found, expected)
    again, weights = best_of(tmp_path / "run", losses, checkpoint_every=every)
    assert torch.equal(again, expected) and not weights.keys() - ({1, 2, 3, 4} if every == 0 else set())


def test_a_best_model_of_a_run_that_starts_anew_is_forgotten(tmp_path):
    with pytest.raises(Stopped):
        best_of(tmp_path, [0, 1, 1], die_after=2, checkpoint_every=0)
    found, weights = best_of(tmp_path, [2, 1, 1], checkpoint_every=0, seed=3)
    assert torch.equal(found, weights[2])


def test_the_best_model_needs_rows_to_evaluate_on(tmp_path):
    with pytest.raises(ValueError, match="keep_best needs rows to evaluate on; give held-out files"):
        run(tmp_path, keep_best=True, evaluate_every=1)


def watched(tmp_path, world, watch, **chosen):
    settings = TrainingSettings(str(tmp_path), **{"max_steps": 4, "global_batch_size": 2, **chosen})
    plan = BatchPlan.from_settings(len(X), settings)
    training.train(
        model(), plan, lambda rows, ids: Batch(rows), loss_function, settings, world,
        evaluate=lambda: {"loss": 7.0}, watch=watch,
    )  # fmt: skip


def test_watch_is_given_each_steps_record_and_its_text_is_shown(tmp_path, capsys):
    seen = []

    def watch(record):
        seen.append(dict(record))
        record.clear()  # the line on disk is written already
        return {2: "二 is odd", 3: "", 4: "so is four"}.get(len(seen))

    watched(tmp_path, WORLD, watch)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert seen == [json.loads(line) for line in lines] and [record["step"] for record in seen] == [1, 2, 3, 4]
    assert seen[-1]["eval_loss"] == 7.0 and seen[0]["twice"] == pytest.approx(2 * seen[0]["loss"])
    shown = capsys.readouterr()
    # Lines of their own: where the bar stood is wiped before, and it is drawn again below.
    warned = [line.rpartition("\r")[2] for line in shown.err.split("\n") if "warning" in line]
    assert warned == ["warning: 二 is odd", "warning: so is four"] and shown.out == ""
    assert "4/4" in shown.err.rpartition("warning: so is four\n")[2]


def test_watch_goes_on_from_a_checkpoint(tmp_path):
    seen = []

    def watch(record):
        seen.append(record["step"])
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched(tmp_path, WORLD, watch, checkpoint_every=2)
    watched(tmp_path, WORLD, watch, checkpoint_every=2)
    assert seen == [1, 2, 3, 3, 4]


def test_watch_is_called_on_the_main_rank_alone(tmp_path, capsys):
    other = World(1, 1, torch.device("cpu"))
    watched(tmp_path, other, lambda record: pytest.fail("not the main rank"), checkpoint_every=0)
    assert capsys.readouterr().err == "" and not (tmp_path / "metrics.jsonl").exists()


def test_a_run_is_finished_only_under_its_own_settings(tmp_path):
    settings = TrainingSettings(str(tmp_path), max_steps=2, global_batch_size=2, checkpoint_every=1)
    plan = BatchPlan.from_settings(len(X), settings)
    assert not training.is_finished(settings, plan, "data", WORLD)
    training.train(model(), plan, lambda rows, ids: Batch(rows), loss_function, settings, WORLD, fingerprint="data")
    assert not training.is_finished(settings, plan, "data", WORLD)
    assert (tmp_path / "checkpoints" / "step_0000001").is_dir()
    training.finish(settings, plan, "data", WORLD)
    assert training.is_finished(settings, plan, "data", WORLD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done.json", "metrics.jsonl"]
    free = TrainingSettings(
        str(tmp_path), max_steps=2, global_batch_size=2, micro_batch_size=1, checkpoint_every=9, keep_checkpoints=3,
        evaluate_every=1, device="cpu",
    )  # fmt: skip
    assert training.is_finished(free, plan, "data", WORLD)
    with pytest.raises(ValueError, match="rows_and_base_model was 'data', is 'other'"):
        training.is_finished(settings, plan, "other", WORLD)
    other = TrainingSettings(str(tmp_path), max_steps=2, global_batch_size=2, seed=5, learning_rate=0.5)
    with pytest.raises(ValueError, match="learning_rate was 1e-05, is 0.5; seed was 0, is 5"):
        training.is_finished(other, plan, "data", WORLD)


def test_what_a_run_is_names_all_that_changes_its_weights():
    settings = TrainingSettings("out", max_steps=2)
    described = describe_run(settings, BatchPlan.from_settings(7, settings), "data")
    assert set(described) == {
        "epochs", "max_steps", "global_batch_size", "learning_rate", "final_learning_rate_ratio", "warmup_ratio",
        "weight_decay", "beta1", "beta2", "max_grad_norm", "dtype", "save_dtype", "seed", "total_steps",
        "rows_and_base_model", "schedule", "decay_ratio", "keep_best", "weight_dtype", "optimizer_state",
        "accumulate_in_float32",
    }  # fmt: skip
    json.dumps(described)
