"""Next-token loss and sequence log-probabilities, from logits or from hidden states and the head.

Labels are aligned everywhere: `labels[b, t]` is the token that position t predicts, −100 is ignored.
Letters: B batch, T tokens, D hidden, V vocabulary, S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels import linear_nll, linear_token_logps, transformed

IGNORE_INDEX = -100


def causal_lm_loss(logits: Tensor, labels: Tensor, num_tokens: int | Tensor | None = None) -> Tensor:
    """− Σ log p(label) / N over the supervised positions of logits [B, T, V], a float32 scalar.

    `num_tokens` is N, the number of supervised tokens in the whole global batch (all ranks and accumulation steps), so
    that the update does not depend on how the batch is split; None counts this batch alone. With nothing supervised the
    loss is 0. Raises ValueError for labels of another shape.
    """
    return -_token_logps(logits, labels).sum().float() / _count(labels, num_tokens)


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ log p(label) of each row, float32 [B], from logits [B, T, V]; −100 is left out, an empty row sums to 0."""
    return _token_logps(logits, labels).sum(-1).float()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_tokens: int | Tensor | None = None,
    *,
    normalize: bool = False,
    metrics: dict[str, Tensor] | None = None,
) -> Tensor:
    """`causal_lm_loss(hidden Wᵀ, labels)` without the logits: chunk by chunk, gradients in the same pass.

    hidden [B, T, D], or of any shape before D, weight [V, D], labels [B, T]; positions without a label cost nothing.
    `normalize` divides the rows of W by their lengths first (NormHead), without a copy. Products are in the dtype of
    the operands, or autocast's; the rest in float32, or float64 for float64. The backward pass runs once. Under a
    compiler or torch.func the logits are made as a whole. `metrics` is filled with "entropy" of the predicted
    distributions in nats and with "mean_token_accuracy", the share of labels that no token was more probable than;
    divided as the loss is. Raises ValueError for shapes, dtypes or labels that do not fit.
    """
    if hidden.ndim < 2 or hidden.shape[:-1] != labels.shape:
        shapes = f"{list(hidden.shape)} and {list(labels.shape)}"
        raise ValueError(f"expected hidden [B, T, D] and labels [B, T], found {shapes}; any shape before D will do")
    count = _count(labels, num_tokens)
    loss, entropy, correct = linear_nll(
        hidden.flatten(0, -2), _whole(weight), labels.flatten(), count, normalize=normalize
    )
    if metrics is not None:
        metrics.update({"entropy": entropy, "mean_token_accuracy": correct})
    return loss


def next_token_loss(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(Σ − log p(label), metrics) over a batch, all of them sums, which the training loop divides by the tokens."""
    hidden, metrics = model.hidden_states(batch.tokens, documents=batch.documents), dict[str, Tensor]()
    settings: Any = {"num_tokens": 1, "normalize": model.config.normalize_head, "metrics": metrics}
    return linear_cross_entropy(hidden, model.lm_head.weight, batch.labels, **settings), metrics


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sequences: Tensor | None = None,
    num_sequences: int | None = None,
    normalize: bool = False,
    metrics: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(Σ log p(label) float32 [S], number of labels int64 [S]) of each sequence, without the logits.

    A row is a sequence, unless `sequences` [B, T] says which of `num_sequences` a label belongs to: then a row may hold
    several, or parts of them. A frozen head takes two matrix products in all, and the backward pass may run again.
    Everything else as in `linear_cross_entropy`; `metrics` are means over the labels of each sequence, [S].
    """
    _check_shapes("hidden", "D", hidden, labels)
    supervised = labels != IGNORE_INDEX
    if sequences is None:
        sequences, num_sequences = torch.arange(len(labels), device=labels.device)[:, None], len(labels)
    elif num_sequences is None or sequences.shape != labels.shape:
        shape = list(sequences.shape)
        raise ValueError(f"sequences {shape} needs num_sequences and the shape of labels, {list(labels.shape)}")
    elif not transformed() and (((sequences < 0) | (sequences >= num_sequences)) & supervised).any():
        raise ValueError(f"sequences must be in [0, {num_sequences}) wherever there is a label")
    places = sequences.long().expand(labels.shape).where(supervised, 0).flatten()
    tokens = linear_token_logps(hidden.flatten(0, 1), _whole(weight), labels.flatten(), normalize=normalize)
    # One after another in float32 the terms of a long response would lose digits that its difference to another needs.
    logps, entropy, correct = (
        value.new_zeros(num_sequences, dtype=torch.float64).index_add(0, places, value.double()).to(value.dtype)
        for value in tokens
    )
    counts = supervised.new_zeros(num_sequences, dtype=torch.int64).index_add(0, places, supervised.flatten().long())
    if metrics is not None:
        means = (total / counts.clamp(min=1) for total in (entropy, correct))
        metrics["entropy"], metrics["mean_token_accuracy"] = means
    return logps, counts


def _token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    _check_shapes("logits", "V", logits, labels)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return -F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view(labels.shape)


def _check_shapes(name: str, last: str, values: Tensor, labels: Tensor) -> None:
    if values.ndim != 3 or values.shape[:2] != labels.shape:
        shapes = f"{list(values.shape)} and {list(labels.shape)}"
        raise ValueError(f"expected {name} [B, T, {last}] and labels [B, T], found {shapes}")


def _count(labels: Tensor, num_tokens: int | Tensor | None) -> int | Tensor:
    return (labels != IGNORE_INDEX).sum().clamp(min=1) if num_tokens is None else num_tokens


def _whole(weight: Any) -> Tensor:
    """The weight itself, or all of one that FSDP2 has split; its gradient is averaged over ranks, as FSDP2's are."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial  # which takes 0.4 s and 40 MB

    mesh = weight.device_mesh
    whole: Tensor = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole
