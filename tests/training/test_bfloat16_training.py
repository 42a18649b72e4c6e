"""Weights and AdamW's state in bfloat16: on any number of ranks, resumed, accumulated, clipped and planned."""

import copy
import os
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pedgpt import training
from pedgpt.training import BatchPlan, TrainingSettings, World, loop
from pedgpt.training.optim import StochasticAdamW, build_optimizer
from pedgpt.training.plan import count

WORLD = World(0, 1, torch.device("cpu"))
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
PURE = {"dtype": "bfloat16", "weight_dtype": "bfloat16", "optimizer_state": "bfloat16"}


@dataclass
class Batch:
    rows: list[int]

    @property
    def weight(self):
        return len(self.rows)

    num_tokens = weight

    def to(self, device):
        return self


def loss_function(model, batch):
    return (model(X[batch.rows]).float() - 1).square().sum(), {}


def model():
    """Rows and columns that no number of ranks divides, one row only, and vectors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1)).bfloat16()


def settings(output, **chosen):
    common = {"max_steps": 6, "global_batch_size": 6, "micro_batch_size": 2, "learning_rate": 0.02, "device": "cpu"}
    return TrainingSettings(str(output), **{**common, **PURE, "checkpoint_every": 2, "warmup_ratio": 0.0, **chosen})


def weights_of(made, world):
    found = {}
    training.gather_weights(made, world, lambda weights: found.update(copy.deepcopy(dict(weights))))
    return found


def run(output, world=WORLD, die_after=None, **chosen):
    """The weights after training; with `die_after` it dies after so many micro-batches."""
    how, made = settings(output, **chosen), training.shard(model(), [], world, torch.bfloat16)
    plan, asked = BatchPlan.from_settings(len(X), how), []

    def make_batch(rows, ids):
        asked.append(ids)
        if die_after and len(asked) > die_after:
            raise KeyboardInterrupt
        return Batch(rows)

    evaluate = training.evaluation(made, Heldout(), loss_function, how, world)
    try:
        training.train(made, plan, make_batch, loss_function, how, world, evaluate=evaluate)
    except KeyboardInterrupt:
        return None
    return weights_of(made, world)


class Heldout:
    def __len__(self):
        return 3

    def batch(self, rows, ids):
        return Batch(rows)


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def steps_with_given_gradients(mesh=None):
    """Weights and moments after three steps whose gradients are the same for any mesh."""
    made = model()
    if mesh is not None:
        fully_shard(made, mesh=mesh)
    optimizer = build_optimizer(made, settings(""))
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        for parameter in made.parameters():
            gradient = torch.randn(parameter.shape, generator=generator).bfloat16()
            parameter.grad = gradient if mesh is None else distribute_tensor(gradient, mesh, parameter.placements)
        optimizer.step()
    found = {name: whole(parameter.detach()) for name, parameter in made.named_parameters()}
    for name, parameter in made.named_parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 3 and state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        found |= {f"{name} {moment}": whole(state[moment]) for moment in ("exp_avg", "exp_avg_sq")}
    return found


def join(rank, ranks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{ranks}", rank=rank, world_size=ranks)
    return World(rank, ranks, torch.device("cpu"))


def leave(rank, ranks, folder):
    """Without a collective, and only when all are here: a rank that left early would break those of the others."""
    open(f"{folder}/{ranks}.{rank}", "w").close()
    while not all(os.path.exists(f"{folder}/{ranks}.{other}") for other in range(ranks)):
        time.sleep(0.01)
    os._exit(0)


def update_worker(rank, ranks, folder):
    join(rank, ranks, folder)
    found = steps_with_given_gradients(init_device_mesh("cpu", (ranks,)))
    if rank == 0:
        torch.save(found, f"{folder}/{ranks}.pt")
    leave(rank, ranks, folder)


@pytest.mark.parametrize("ranks", [2, 3])
def test_equal_gradients_give_equal_updates_on_any_number_of_ranks(tmp_path, start_ranks, ranks):
    start_ranks(update_worker, ranks, str(tmp_path), ranks=ranks)
    expected = steps_with_given_gradients()
    assert len(expected) == 18 and equal(torch.load(tmp_path / f"{ranks}.pt"), expected)


def test_a_run_goes_on_bit_for_bit(tmp_path):
    expected = run(tmp_path / "whole")
    assert run(tmp_path / "run", die_after=10) is None
    assert loop.latest_checkpoint(tmp_path / "run/checkpoints").name == "step_0000002"
    assert equal(run(tmp_path / "run"), expected)
    assert all(weight.dtype == torch.bfloat16 for weight in expected.values())
    assert not equal(run(tmp_path / "other", seed=1, epochs=9.0), expected)


@pytest.mark.parametrize("chosen", [{"optimizer_state": "float32"}, {"accumulate_in_float32": True}])
def test_with_other_settings_too_and_they_may_not_change(tmp_path, chosen):
    expected = run(tmp_path / "whole", **chosen)
    assert run(tmp_path / "run", die_after=10, **chosen) is None
    ((name, value),) = chosen.items()
    with pytest.raises(ValueError, match=f"{name} was {value!r}, is"):
        run(tmp_path / "run")
    assert equal(run(tmp_path / "run", **chosen), expected)
    assert not equal(run(tmp_path / "plain"), expected)


def test_the_best_weights_are_kept_bit_for_bit(tmp_path):
    """The second step, of an absurd rate, spoils the model."""
    best = run(tmp_path / "one", max_steps=1, schedule="constant")
    rates = {"schedule": "constant", "keep_best": True, "evaluate_every": 1}
    spoilt = pytest.MonkeyPatch()
    spoilt.setattr(loop, "learning_rate", lambda step, total, settings: 0.02 if step == 0 else 50.0)
    with spoilt.context():
        found = run(tmp_path / "two", max_steps=2, **rates)
    spoilt.undo()
    assert equal(found, best)


class Recorder(torch.optim.SGD):
    """An optimizer that only keeps the last parameter's gradient."""

    def step(self, closure=None):
        self.seen = whole(self.param_groups[0]["params"][-1].grad)


def accumulated(made, world, wide, numbers):
    """What the optimizer gets for the last bias, whose gradient in each micro-batch is one of the numbers."""

    def loss(made, batch):
        return made(X[:1]).float().sum() * batch.rows[0], {}

    optimizer, how = Recorder(made.parameters(), lr=0.0), settings("", accumulate_in_float32=wide, max_grad_norm=0.0)
    loop._step(made, optimizer, [Batch([number]) for number in numbers], loss, how, world)
    return optimizer.seen


def check_accumulation(world):
    small = 2.0**-9  # a quarter of the distance from 1 to bfloat16's next number
    numbers = [1.0, small, small, small]
    for wide, expected in ((False, 1 / 4), (True, (1 + 3 * small) / 4)):
        made = training.shard(model(), [], world, torch.bfloat16)
        for _ in "12":  # a second step, too, begins with gradients of its own
            found = accumulated(made, world, wide, numbers)
            assert found.dtype == (torch.float32 if wide else torch.bfloat16) and found.item() == expected
        assert accumulated(made, world, wide, numbers[:1]).dtype == torch.bfloat16  # there is nothing to add up


def test_gradients_of_micro_batches_are_added_in_float32_if_asked():
    check_accumulation(WORLD)


def resume_worker(rank, folder):
    world = join(rank, 2, folder)
    for name, chosen in (("plain", {}), ("wide", {"accumulate_in_float32": True})):
        expected = run(f"{folder}/{name}_whole", world, micro_batch_size=1, **chosen)
        assert run(f"{folder}/{name}", world, die_after=10, micro_batch_size=1, **chosen) is None
        assert equal(run(f"{folder}/{name}", world, micro_batch_size=1, **chosen), expected)
    check_accumulation(world)
    leave(rank, 2, folder)


def test_two_ranks_go_on_bit_for_bit_and_accumulate(tmp_path, start_ranks):
    start_ranks(resume_worker, str(tmp_path))


def test_clipping_holds_the_norm(tmp_path, monkeypatch):
    norms, step = [], StochasticAdamW.step

    def record(self, *rest):
        gradients = [parameter.grad.double() for group in self.param_groups for parameter in group["params"]]
        norms.append(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().item())
        return step(self, *rest)

    monkeypatch.setattr(StochasticAdamW, "step", record)
    run(tmp_path / "clipped", max_grad_norm=0.01)
    assert len(norms) == 6 and norms == pytest.approx([0.01] * 6, rel=0.01)  # bfloat16 has 8 bits


def test_small_steps_add_up_as_they_do_not_with_the_nearest_number():
    """1,000 steps of 10⁻⁴ from 1, where the numbers of bfloat16 have a distance of 1/256: 0.9 after all of them."""
    weights = {}
    for name in ("stochastic", "nearest"):
        parameter = nn.Parameter(torch.ones(20, 50).bfloat16())
        kind = StochasticAdamW if name == "stochastic" else torch.optim.AdamW
        optimizer = kind([parameter], lr=1e-4, weight_decay=0.0)
        for _ in range(1000):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        weights[name] = parameter.detach().double()
    assert (weights["nearest"] == 1).all()
    # a step goes down by 1/256 with probability 0.0256: the standard deviation of the sum of 1,000 is 0.0195
    assert weights["stochastic"].mean().item() == pytest.approx(0.9, abs=4 * 0.0195 / 1000**0.5)
    assert weights["stochastic"].std().item() == pytest.approx(0.0195, rel=0.2)


def test_parameters_and_seeds_have_bits_of_their_own():
    found = []
    for seed in (0, 1):
        twins = [nn.Parameter(torch.ones(1000).bfloat16()) for _ in "12"]
        for twin in twins:
            twin.grad = torch.ones_like(twin)
        StochasticAdamW(twins, lr=1e-3, seed=seed).step()
        found += [twin.detach() for twin in twins]
    assert all(0.2 < (one != other).float().mean() < 0.6 for i, one in enumerate(found) for other in found[:i])


def test_the_dtypes_choose_the_optimizer():
    adapter = nn.Linear(3, 2)  # float32 over a frozen base, whatever dtype all parameters would have
    assert type(build_optimizer(adapter, settings("", optimizer_state="float32"))) is torch.optim.AdamW
    assert type(build_optimizer(adapter, settings(""))) is StochasticAdamW
    plain = TrainingSettings("", dtype="bfloat16")
    assert type(build_optimizer(model(), plain)) is StochasticAdamW
    groups = build_optimizer(model(), settings("", seed=7)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] and groups[0]["seed"] == 7
    assert groups[0]["betas"] == (0.9, 0.95) and groups[0]["lr"] == 0.02


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("chosen", "state", "gradients"),
    [
        ({}, 4, 2),
        ({"optimizer_state": "float32"}, 8, 2),
        ({"micro_batch_size": 6}, 4, 2),
        ({"accumulate_in_float32": True, "micro_batch_size": 1}, 4, 4),
    ],
)
def test_a_plan_counts_what_there_is(ranks, chosen, state, gradients):
    def build(how, world):
        made = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).bfloat16()
        return training.shard(made, [], world, torch.bfloat16), loss

    def loss(made, batch):
        return made(torch.zeros(2, 64, dtype=torch.bfloat16)).float().sum(), {}

    found = count(build, lambda how, rows: Batch([0]), settings("", plan=f"{ranks}x1", **chosen))
    numbers = 2 * 64 * 64 // ranks
    assert found["weights"] == 2 * numbers and found["gradients"] == gradients * numbers
    assert found["AdamW's state"] == state * numbers
