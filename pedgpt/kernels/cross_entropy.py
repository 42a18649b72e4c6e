"""log p(label) of every token from its logits, over blocks of tokens on the CPU.

Beside the logits there is their gradient and one block in float32, where torch's cross entropy keeps two or three
tensors of [tokens, vocabulary] in float32. Positions without a label are skipped.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels._transforms import transformed

# Numbers of a block: 2 MiB in float32 stay in a processor's cache. For fewer logits than eight blocks torch's form is
# as fast, and takes little memory.
BLOCK = 2**19


def token_logps(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """log softmax(logits)[label] [T], in float32 at least, for logits [T, V] and labels [T]; 0 for `ignore_index`.

    The gradient has the dtype of the logits: d logits = d logp · (one-hot − softmax). Raises IndexError for a label
    outside of the vocabulary (on the CPU).
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.is_cuda or logits.device.type != "cpu" or transformed() or logits.numel() < 8 * BLOCK:
        return -F.cross_entropy(logits.to(dtype), labels, ignore_index=ignore_index, reduction="none")
    counts = labels != ignore_index
    if (wrong := labels[counts & ((labels < 0) | (labels >= logits.shape[1]))]).numel():
        raise IndexError(f"Target {wrong[0].item()} is out of bounds.")  # as torch says it
    return _TokenLogps.apply(logits, labels, counts.nonzero().squeeze(1), dtype)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        logps = torch.zeros(len(logits), dtype=dtype)
        for block, values, memory in _blocks(logits, rows, dtype):
            found = torch.log_softmax(values, -1, out=memory).gather(1, labels[block, None])
            logps[block] = found.squeeze(1)
        ctx.save_for_backward(logits, labels, rows)
        return logps

    @staticmethod
    def backward(ctx: Any, dlogps: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: in a form that autograd can differentiate again
            one_hot = F.one_hot(labels[rows], logits.shape[1])
            values = dlogps[rows, None] * (one_hot - logits[rows].to(dlogps.dtype).softmax(-1))
            return torch.zeros_like(logits).index_copy(0, rows, values.to(logits.dtype)), None, None, None
        dlogits = torch.empty_like(logits) if len(rows) == len(logits) else torch.zeros_like(logits)
        for block, values, memory in _blocks(logits, rows, dlogps.dtype):
            p = torch.softmax(values, -1, out=memory).mul_(-dlogps[block, None])
            dlogits[block] = p.scatter_add_(1, labels[block, None], dlogps[block, None]).to(logits.dtype)
        return dlogits, None, None, None


def _blocks(logits: Tensor, rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """(a block of `rows`, their logits in `dtype`, memory of that size), the memory the same for all blocks."""
    height = max(1, BLOCK // logits.shape[1])
    memory = torch.empty(min(height, len(rows)), logits.shape[1], dtype=dtype)
    for start in range(0, len(rows), height):
        part = slice(start, min(start + height, len(rows)))
        block = part if len(rows) == len(logits) else rows[part]
        values = logits[block]
        room = memory[: len(values)]
        yield block, values if values.dtype == dtype else room.copy_(values), room
