"""Next-token loss and sequence log-probabilities from logits.

Labels are aligned everywhere: `labels[b, t]` is the token that position t predicts.
Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from pedgpt.kernels import token_logps

IGNORE_INDEX = -100


def causal_lm_loss(logits: Tensor, labels: Tensor, num_tokens: int | Tensor | None = None) -> Tensor:
    """− Σ log p(label) / N over the supervised positions of logits [B, T, V], a float32 scalar.

    `num_tokens` is N, the number of supervised tokens in the whole global batch (all ranks and accumulation steps), so
    that the update does not depend on how the batch is split; None counts this batch alone. With nothing supervised the
    loss is 0. Raises ValueError for labels of another shape.
    """
    _check_shapes(logits, labels)
    total = -token_logps(logits.flatten(0, 1), labels.flatten(), IGNORE_INDEX).sum().float()
    return total / ((labels != IGNORE_INDEX).sum().clamp(min=1) if num_tokens is None else num_tokens)


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ log p(label) of each row, float32 [B], from logits [B, T, V]; −100 is left out, an empty row sums to 0."""
    _check_shapes(logits, labels)
    return token_logps(logits.flatten(0, 1), labels.flatten(), IGNORE_INDEX).view(labels.shape).sum(-1).float()


def _check_shapes(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        shapes = f"{list(logits.shape)} and {list(labels.shape)}"
        raise ValueError(f"expected logits [B, T, V] and labels [B, T], found {shapes}")
