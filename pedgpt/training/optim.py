"""AdamW and the learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import trained


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over what trains; weight decay on matrices, none on vectors."""
    parameters = trained(model).values()
    if not parameters:
        raise ValueError("nothing to train: every parameter is frozen")
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )


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
