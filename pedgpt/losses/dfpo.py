"""Direct following preference optimization (PediatricsGPT §3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class DFPOLoss(NamedTuple):
    """The loss (scalar), its two parts (scalars) and what is worth watching ([B], detached)."""

    loss: Tensor
    preference: Tensor
    regularization: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracies: Tensor


def dfpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    chosen_token_counts: Tensor,
    beta: float = 0.1,
    mu: float = 1.0,
    label_smoothing: float = 0.0,
) -> DFPOLoss:
    """DPO with a likelihood term that keeps the chosen answer probable.

        L = −E[ log σ( β (log π(y_w|x) − log r(y_w|x)) − β (log π(y_l|x) − log r(y_l|x)) ) ] + μ Φ(x, y_w)
        Φ = − log π(y_w|x) / |y_w|, averaged over pairs

    All inputs are [B]: log-probabilities summed over response tokens, and |y_w| in tokens. Computed in float32.
    `label_smoothing` ε mixes in the flipped preference: −(1−ε) log σ(z) − ε log σ(−z). μ = 0 is DPO (Rafailov et al.
    2023). Raises ValueError for shapes that differ or settings out of range.
    """
    inputs = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
        "chosen_token_counts": chosen_token_counts,
    }
    for name, value in inputs.items():
        if value.ndim != 1 or value.shape != policy_chosen_logps.shape:
            shape, expected = list(value.shape), list(policy_chosen_logps.shape)
            raise ValueError(f"{name} has the shape {shape}; expected one value a pair, {expected}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), found {label_smoothing}")
    if beta < 0 or mu < 0:
        raise ValueError(f"beta and mu must not be negative, found beta={beta}, mu={mu}")

    chosen_logratios = policy_chosen_logps.float() - reference_chosen_logps.float()
    rejected_logratios = policy_rejected_logps.float() - reference_rejected_logps.float()
    z = beta * (chosen_logratios - rejected_logratios)
    preference = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    regularization = -policy_chosen_logps.float() / chosen_token_counts.float()

    chosen_rewards, rejected_rewards = beta * chosen_logratios.detach(), beta * rejected_logratios.detach()
    margins = chosen_rewards - rejected_rewards
    return DFPOLoss(
        loss=preference.mean() + mu * regularization.mean(),
        preference=preference.detach().mean(),
        regularization=regularization.detach().mean(),
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        margins=margins,
        accuracies=(margins > 0).float(),
    )
