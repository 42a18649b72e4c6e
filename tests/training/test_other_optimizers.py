"""Any optimizer's run goes on bit for bit, on one process and on two; another optimizer's state is refused."""

import copy
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pedgpt import training
from pedgpt.training import BatchPlan, TrainingSettings, World
from pedgpt.training.checkpoint import Checkpoints, latest_checkpoint

WORLD = World(0, 1, torch.device("cpu"))
X = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 2.0], [3.0, 1.0, -1.0], [-2.0, 0.5, 1.0], [1.0, 1.0, 0.0]])


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2; it counts its steps in a number, as some optimizers do."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(exp_avg=torch.zeros_like(parameter), steps=0)
                state["steps"] += 1
                moment, (beta1, beta2) = state["exp_avg"], group["betas"]
                update = torch.sign(beta1 * moment + (1 - beta1) * parameter.grad)
                parameter.sub_(update * (group["lr"] / state["steps"] ** 0.5))
                moment.mul_(beta2).add_(parameter.grad, alpha=1 - beta2)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "lion": Lion,
}
SHARDED = ("adamw", "momentum", "lion", "adagrad")  # torch's Adafactor does not factor split matrices


class Batch:
    def __init__(self, rows):
        self.rows, self.weight, self.num_tokens = rows, len(rows), len(rows)

    def to(self, device):
        return self


def loss_function(model, batch):
    return model(X[batch.rows]).square().sum(), {}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2))


def trained(output, name, world=WORLD, steps=5, die_after=None):
    """The weights of a run with this optimizer; with `die_after` it dies after that step's checkpoint."""
    settings = TrainingSettings(
        str(output), max_steps=steps, global_batch_size=4, learning_rate=0.05, checkpoint_every=2, device="cpu"
    )
    made = training.shard(model(), [], world, torch.float32)
    plan = BatchPlan.from_settings(len(X), settings)
    asked = []

    def make_batch(rows, ids):
        asked.append(ids)
        if die_after and len(asked) > die_after:
            raise KeyboardInterrupt
        return Batch(rows)

    optimizer = OPTIMIZERS[name]([parameter for parameter in made.parameters() if parameter.requires_grad])
    try:
        training.train(made, plan, make_batch, loss_function, settings, world, optimizer=optimizer)
    except KeyboardInterrupt:
        return None
    found = {}
    training.gather_weights(made, world, lambda weights: found.update(copy.deepcopy(dict(weights))))
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_goes_on_bit_for_bit(tmp_path, name):
    expected = trained(tmp_path / "whole", name)
    assert trained(tmp_path / "run", name, die_after=3) is None
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step_0000002"
    found = trained(tmp_path / "run", name)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    start = model().state_dict()
    assert not torch.equal(found["0.weight"], start["0.weight"]) and torch.equal(found["2.bias"], start["2.bias"])


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"))
    for name in SHARDED:
        expected = trained(f"{folder}/{name}_whole", name, world)
        assert trained(f"{folder}/{name}_run", name, world, die_after=3) is None
        found = trained(f"{folder}/{name}_run", name, world)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        if rank == 0:
            assert len(expected) == 6
            torch.save(expected, f"{folder}/{name}.pt")
    with pytest.raises(ValueError, match="optimizer was 'Lion', is 'AdamW'"):
        trained_on_another(f"{folder}/lion_run", world)
    open(f"{folder}/{rank}.done", "w").close()
    while not os.path.exists(f"{folder}/{1 - rank}.done"):  # a rank that left early would break the other's collectives
        time.sleep(0.01)
    os._exit(0)


def trained_on_another(output, world):
    checkpoint = latest_checkpoint(training.loop.Path(output) / "checkpoints")
    made = training.shard(model(), [], world, torch.float32)
    optimizer = OPTIMIZERS["adamw"]([parameter for parameter in made.parameters() if parameter.requires_grad])
    Checkpoints(checkpoint.parent, 2, made, optimizer, saved_run(checkpoint), world).load(checkpoint)


def saved_run(checkpoint):
    return training.loop.json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["run"]


def test_on_two_ranks_too_and_as_on_one(tmp_path, start_ranks):
    start_ranks(worker, str(tmp_path))
    for name in SHARDED:
        found, expected = torch.load(tmp_path / f"{name}.pt"), trained(tmp_path / f"{name}_alone", name)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
        # A checkpoint of two ranks serves one.
        assert trained(tmp_path / f"{name}_run", name).keys() == expected.keys()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (OPTIMIZERS["adamw"], r"_0000001 belongs to a run with other settings: .*; optimizer was 'SGD', is 'AdamW'"),
        (lambda p: torch.optim.SGD(p, momentum=0.5), r": momentum of group 1 was 0\.9, is 0\.5\. Go back"),
        (OPTIMIZERS["sgd"], r": momentum of group 1 was 0\.9, is 0\. Go back"),
    ],
)
def test_another_optimizer_or_another_setting_of_it_is_refused(tmp_path, other, message):
    made = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9)
    made(X).sum().backward()
    optimizer.step()
    Checkpoints(tmp_path, 2, made, optimizer, {}, WORLD).save(1)
    before = made.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, 2, made, other(made.parameters()), {}, WORLD).load(tmp_path / "step_0000001")
    assert torch.equal(made.weight, before)
    other_rate = torch.optim.SGD(made.parameters(), lr=0.7, momentum=0.9)  # that of the schedule counts
    assert Checkpoints(tmp_path, 2, made, other_rate, {}, WORLD).load(tmp_path / "step_0000001")["step"] == 1
