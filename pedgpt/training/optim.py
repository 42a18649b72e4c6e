"""AdamW, in float32 or with stochastic rounding in bfloat16, and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pedgpt.kernels.hashing import hash_bits, signed
from pedgpt.kernels.optimizer import adamw_
from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import first_row, local, trained


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW that computes in float32 and rounds weights in bfloat16, and moments in `state_dtype`, stochastically.

    Random bits are a function of the seed, the step, the parameter's number and the place in the whole parameter, so
    equal gradients give equal updates on any number of ranks, and a run that goes on from a checkpoint repeats them.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.0, state_dtype: torch.dtype = torch.bfloat16, seed: int = 0,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "state_dtype": state_dtype, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. There is no closure: `train` computes the gradients."""
        assert closure is None
        numbered = enumerate((group, parameter) for group in self.param_groups for parameter in group["params"])
        for number, (group, parameter) in numbered:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter, dtype=group["state_dtype"])
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=group["state_dtype"])
            state["step"] += 1
            key = hash_bits(signed(hash_bits(signed(group["seed"])) + number)) + state["step"]
            tensors = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
            settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            first = first_row(parameter) * math.prod(parameter.shape[1:])
            adamw_(*map(local, tensors), step=state["step"], key=key, first=first, **settings)


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over what trains; weight decay on matrices, none on vectors.

    It rounds stochastically if a weight that trains, or `optimizer_state`, is bfloat16.
    """
    parameters = trained(model).values()
    if not parameters:
        raise ValueError("nothing to train: every parameter is frozen")
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    common: Any = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2)}
    if settings.optimizer_state == "float32" and all(p.dtype != torch.bfloat16 for p in parameters):
        return torch.optim.AdamW(groups, **common, fused=True)
    state_dtype = getattr(torch, settings.optimizer_state)
    return StochasticAdamW(groups, **common, state_dtype=state_dtype, seed=settings.seed)


def learning_rate(step: int, total_steps: int, settings: TrainingSettings) -> float:
    """The rate for step 0 … total_steps − 1: a linear warm-up, then the schedule from the peak to its final share."""
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    decay = min(math.ceil(settings.decay_ratio * total_steps), total_steps - warmup)
    height = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "constant": 1.0,
        "linear": 1 - progress,
        "wsd": min(1.0, (total_steps - step) / max(1, decay)),  # warm-up, stable, decay
    }[settings.schedule]
    floor = settings.final_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * height)
