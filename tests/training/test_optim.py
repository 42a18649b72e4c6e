"""The schedule by hand, and AdamW by its definition in float64."""

import math

import pytest
import torch
from torch import nn

from pedgpt.training import TrainingSettings
from pedgpt.training.optim import build_optimizer, learning_rate


def rates(total, **chosen):
    settings = TrainingSettings(output="", learning_rate=2.0, **chosen)
    return [learning_rate(step, total, settings) for step in range(total)]


def test_schedule_matches_hand_calculation():
    # Two steps of warm-up; then 0.1 + 0.9 · (1 + cos πp)/2 of the peak for p = 0, 1/8, …; cos π/4 = √½.
    found = rates(10, warmup_ratio=0.2, final_learning_rate_ratio=0.1)
    half = math.sqrt(0.5)
    assert found[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert found[4] == pytest.approx(2 * (0.1 + 0.45 * (1 + half)))
    assert found[6] == pytest.approx(2 * 0.55)
    assert found[8] == pytest.approx(2 * (0.1 + 0.45 * (1 - half)))
    assert found[3:] == sorted(found[3:], reverse=True) and min(found[2:]) > 0.2


@pytest.mark.parametrize(
    ("total", "chosen", "expected"),
    [
        (1, {"warmup_ratio": 0.0}, [2.0]),
        (1, {"warmup_ratio": 0.03}, [2.0]),
        (4, {"warmup_ratio": 1.0}, [0.5, 1.0, 1.5, 2.0]),
        (3, {"warmup_ratio": 0.0, "final_learning_rate_ratio": 1.0}, [2.0, 2.0, 2.0]),
        (2, {"warmup_ratio": 0.0, "final_learning_rate_ratio": 0.0}, [2.0, 1.0]),
        (4, {"warmup_ratio": 0.01, "final_learning_rate_ratio": 1.0}, [2.0] * 4),  # a part of a step is a whole one
    ],
)
def test_schedule_at_its_limits_matches_hand_calculation(total, chosen, expected):
    assert rates(total, **chosen) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        # Two steps of warm-up, then eight: of the peak 2, down to 1 at the end, which the last step does not reach.
        ({"schedule": "constant"}, [1, 2, *[2] * 8]),
        ({"schedule": "linear"}, [1, 2, *(1 + left / 8 for left in range(8, 0, -1))]),
        ({"schedule": "wsd", "decay_ratio": 0.3}, [1, 2, *[2] * 6, 1 + 2 / 3, 1 + 1 / 3]),
        ({"schedule": "wsd", "decay_ratio": 0.0}, [1, 2, *[2] * 8]),
        ({"schedule": "wsd", "decay_ratio": 1.0}, [1, 2, *(1 + left / 8 for left in range(8, 0, -1))]),
    ],
)
def test_other_schedules_match_hand_calculation(chosen, expected):
    assert rates(10, warmup_ratio=0.2, final_learning_rate_ratio=0.5, **chosen) == pytest.approx(expected)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)

    def forward(self, x):
        return self.norm(self.linear(self.frozen(x)))


def adamw(weight, gradients, lr, decay, beta1, beta2, eps=1e-8):
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    w, m, v = weight.double(), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        w = w - lr * decay * w
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        w = w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return w


def test_optimizer_matches_adamw_with_decay_on_matrices_only():
    torch.manual_seed(0)
    model = Toy()
    with torch.no_grad():  # decay of a zero or a one would not show
        for parameter in model.parameters():
            parameter.normal_(std=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = TrainingSettings(output="", learning_rate=0.1, weight_decay=0.3, beta1=0.8, beta2=0.9)
    optimizer = build_optimizer(model, settings)
    gradients = {name: [] for name in before}
    for _ in range(4):
        model(torch.randn(5, 3)).square().sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                gradients[name].append(p.grad.double().clone())
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        if name.startswith("frozen"):
            assert torch.equal(p, before[name])
            continue
        expected = adamw(before[name], gradients[name], 0.1, 0.3 if name == "linear.weight" else 0.0, 0.8, 0.9)
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)
        other = adamw(before[name], gradients[name], 0.1, 0.0 if name == "linear.weight" else 0.3, 0.8, 0.9)
        assert (p - other).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "groups"), [(nn.Linear, 2), (lambda a, b: nn.Linear(a, b, bias=False), 1)])
def test_optimizer_takes_models_with_and_without_vectors(kind, groups):
    assert len(build_optimizer(kind(2, 2), TrainingSettings(output="")).param_groups) == groups


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), TrainingSettings(output=""))
