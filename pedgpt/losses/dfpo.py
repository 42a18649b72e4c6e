"""Direct following preference optimization (PediatricsGPT §3.3)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels import transformed
from pedgpt.losses.causal_lm import linear_sequence_logps


class DFPOLoss(NamedTuple):
    """The loss (scalar), its two parts (scalars) and what is worth watching ([B], detached)."""

    loss: Tensor
    preference: Tensor
    regularization: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracies: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor


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
    2023), β = 0 leaves log 2 + μ Φ. Finite for log-ratios of any size. Raises ValueError for shapes that differ, values
    that are not finite, a chosen response without tokens, or settings out of range.
    """
    check_dfpo_settings(beta, mu, label_smoothing)
    inputs = {
        "policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps, "reference_rejected_logps": reference_rejected_logps,
        "chosen_token_counts": chosen_token_counts,
    }  # fmt: skip
    for name, value in inputs.items():
        if value.ndim != 1 or value.shape != policy_chosen_logps.shape:
            shape, expected = list(value.shape), list(policy_chosen_logps.shape)
            raise ValueError(f"{name} has the shape {shape}; expected one value a pair, {expected}")
    if not len(policy_chosen_logps):
        raise ValueError("no pairs: their mean is not defined")
    if not transformed():  # whose values cannot be looked at
        _check_values(inputs)

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
        chosen_logps=policy_chosen_logps.detach().float(),
        rejected_logps=policy_rejected_logps.detach().float(),
    )


def linear_dfpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    sequences: Tensor | None = None,
    normalize: bool = False,
    beta: float = 0.1,
    mu: float = 1.0,
    label_smoothing: float = 0.0,
    metrics: dict[str, Tensor] | None = None,
) -> DFPOLoss:
    """`dfpo_loss` of P pairs from hidden states [B, T, D], the head [V, D] and labels [B, T], without the logits.

    The reference's log-probabilities are [P]. Rows are the P chosen responses, then the P rejected ones; or `sequences`
    [B, T] numbers the response of each label in that order, wherever it stands, so that a pair can share its prompt.
    `normalize` and `metrics` as in `linear_cross_entropy`. Raises ValueError as it and `dfpo_loss` do.
    """
    pairs = len(reference_chosen_logps)
    if sequences is None and len(labels) != 2 * pairs:
        raise ValueError(f"{pairs} pairs are {2 * pairs} rows, chosen first, found {len(labels)}; or give sequences")
    logps, counts = linear_sequence_logps(
        hidden, weight, labels, sequences=sequences, num_sequences=None if sequences is None else 2 * pairs,
        normalize=normalize, metrics=metrics,
    )  # fmt: skip
    operands = logps[:pairs], logps[pairs:], reference_chosen_logps, reference_rejected_logps
    settings: Any = {"beta": beta, "mu": mu, "label_smoothing": label_smoothing}
    return dfpo_loss(*operands, chosen_token_counts=counts[:pairs], **settings)


def check_dfpo_settings(beta: float, mu: float, label_smoothing: float) -> None:
    """ValueError, with what is expected, for settings that `dfpo_loss` would refuse."""
    if not (0 <= beta < math.inf and 0 <= mu < math.inf):
        raise ValueError(f"beta and mu must be finite and not negative, found beta={beta}, mu={mu}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), found {label_smoothing}")


def _check_values(inputs: dict[str, Tensor]) -> None:
    """One look at all values, since each would wait for the device; the second look says which."""
    counts = inputs["chosen_token_counts"]
    if not torch.stack([*(~values.isfinite() for values in inputs.values()), counts <= 0]).any():
        return
    for name, values in inputs.items():
        if places := (~values.isfinite()).nonzero().flatten().tolist():
            hint = "; lower learning_rate or max_grad_norm, or use float32" if name.startswith("policy") else ""
            found = f"{name}[{places[0]}] is {values[places[0]].item()}"
            raise ValueError(f"{found}; expected a finite log-probability{hint}")
    place = int((counts <= 0).nonzero()[0])
    raise ValueError(f"chosen_token_counts[{place}] is {counts[place].item()}: a chosen response needs a token")
