"""Weights in oneDNN's blocked layout, from which products of a few rows are up to three times as fast.

The cost of decoding is reading weights, and the layout lets a processor read them in order
(`python benchmarks/bench_generate.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pedgpt.files import available_memory

MAX_ROWS = 64  # With more rows, arithmetic bounds the products and the layout gains little.


class _Active(threading.local):
    copies: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}


_ACTIVE = _Active()


class PackedWeights:
    """Copies of matrices [O, D] in the blocked layout, which `linear` and `product` read within a `with` block.

    There are none for more than 64 rows, for bfloat16 on a processor that does not multiply it, and where they would
    take more than half of the free memory.
    """

    def __init__(self, weights: Iterable[Tensor], rows: int) -> None:
        self.copies: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
        chosen = {(weight.data_ptr(), weight.shape): weight for weight in weights if _suits(weight)}
        if rows <= MAX_ROWS and 2 * sum(weight.nbytes for weight in chosen.values()) <= (available_memory() or 0):
            for key, weight in chosen.items():  # kept beside its copy, so that no other tensor gets its address
                self.copies[key] = weight, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def __enter__(self) -> None:
        self.before, _ACTIVE.copies = _ACTIVE.copies, self.copies

    def __exit__(self, *_: object) -> None:
        _ACTIVE.copies = self.before


def find(x: Tensor, weight: Tensor) -> Tensor | None:
    """The copy that multiplies x [..., D], if a `PackedWeights` of this thread is active and holds this matrix."""
    if not _ACTIVE.copies or torch.is_grad_enabled() or x.dtype != weight.dtype or not weight.is_contiguous():
        return None
    if x.numel() > MAX_ROWS * x.shape[-1] or x.shape[-1] != weight.shape[-1]:
        return None
    found = _ACTIVE.copies.get((weight.data_ptr(), weight.shape))
    return None if found is None else found[1]


def _suits(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.is_contiguous()
    return plain and weight.numel() > 0 and _multiplies(weight.dtype)


def _multiplies(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
