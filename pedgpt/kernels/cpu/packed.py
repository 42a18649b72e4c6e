"""Weights in oneDNN's blocked layout, from which products of a few rows are up to three times as fast.

The cost of decoding is reading weights, and the layout lets a processor read them in order (`bench_generate.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pedgpt.files import available_memory

MAX_ROWS = 64  # With more rows, arithmetic bounds the products and the layout gains little.
_ACTIVE = threading.local()


class PackedWeights:
    """Copies of matrices [O, D] in the blocked layout, which `linear` and `product` read within a `with` block.

    There are none for more than 64 rows, and where they would take more than half of the free memory.
    """

    def __init__(self, weights: Iterable[Tensor], rows: int) -> None:
        chosen = {(weight.data_ptr(), weight.shape): weight for weight in weights if _suits(weight)}
        fit = rows <= MAX_ROWS and 2 * sum(weight.nbytes for weight in chosen.values()) <= (available_memory() or 0)
        reorder = torch.ops.mkldnn._reorder_linear_weight
        # A weight is kept beside its copy, so that no other tensor gets its address.
        self.copies = {key: (w, reorder(w.detach(), rows)) for key, w in chosen.items() if fit}

    def __enter__(self) -> None:
        self.before, _ACTIVE.copies = getattr(_ACTIVE, "copies", {}), self.copies

    def __exit__(self, *_: object) -> None:
        _ACTIVE.copies = self.before


def find(x: Tensor, weight: Tensor) -> Tensor | None:
    """The copy that multiplies x [..., D], if a `PackedWeights` of this thread is active and holds this matrix."""
    copies = getattr(_ACTIVE, "copies", None)
    if not copies or torch.is_grad_enabled() or x.dtype != weight.dtype or not weight.is_contiguous():
        return None
    few = x.shape[-1] == weight.shape[-1] and x.numel() <= MAX_ROWS * x.shape[-1]
    return copies.get((weight.data_ptr(), weight.shape), (None, None))[1] if few else None


def _suits(weight: Tensor) -> bool:
    """Whether oneDNN multiplies it on this processor: bfloat16 takes AVX-512."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu" or not weight.is_contiguous():
        return False
    known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bfloat16())
    return known and weight.numel() > 0 and torch.backends.mkldnn.is_available()


def multiplies_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
