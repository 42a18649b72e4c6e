"""Weights in oneDNN's blocked layout, from which products of a few rows are up to twice as fast.

The cost of decoding is reading weights, and the layout lets a processor read them in order (`bench_generate.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pedgpt.files import available_memory
from pedgpt.kernels._dispatch import transformed

MAX_ROWS = 64  # With more rows, arithmetic bounds the products and the layout gains little.
LEAST = 2**17  # numbers of a weight, because for fewer the call costs what the layout gains
CACHED = 2**22  # numbers; fewer in all weights stay in the processor's cache, and one row gains nothing from the layout


class _Active(threading.local):
    copies: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}  # noqa: RUF012


_ACTIVE = _Active()


class PackedWeights:
    """Copies of matrices [O, D] in the blocked layout, which products of `rows` rows read within a `with` block.

    There are none of small weights, for more than 64 rows, for one row of a small model, and where they would take more
    than half of the free memory.
    """

    def __init__(self, weights: Iterable[Tensor], rows: int) -> None:
        chosen = {(weight.data_ptr(), weight.shape): weight for weight in weights if _pays(weight, rows)}
        fit = 2 * sum(weight.nbytes for weight in chosen.values()) <= (available_memory() or 0)
        fit = fit and (rows > 1 or sum(weight.numel() for weight in chosen.values()) >= CACHED)
        reorder = torch.ops.mkldnn._reorder_linear_weight
        # A weight is kept beside its copy, so that no other tensor gets its address.
        self.copies = {key: (w, reorder(w.detach(), rows)) for key, w in chosen.items() if fit}

    def __enter__(self) -> None:
        self.before, _ACTIVE.copies = _ACTIVE.copies, self.copies

    def __exit__(self, *_: object) -> None:
        _ACTIVE.copies = self.before


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor | None:
    """x Wᵀ (+ b), or y + x Wᵀ `onto` y, by a copy that is active in this thread; None if there is none of W."""
    if transformed() or not _ACTIVE.copies or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    _, copy = _ACTIVE.copies.get((weight.data_ptr(), weight.shape), (None, None))
    fits = x.dtype == weight.dtype and x.shape[-1] == weight.shape[-1] and weight.is_contiguous()
    if copy is None or not fits or x.numel() > MAX_ROWS * x.shape[-1]:
        return None
    if bias is not None and (bias.dtype != x.dtype or len(bias) != len(weight)):
        return None
    if onto is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, onto, copy, None, "add")
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, copy, bias, "none", [], "")


def _pays(weight: Tensor, rows: int) -> bool:
    """Whether oneDNN multiplies it from the layout on this processor."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu" or not weight.is_contiguous():
        return False
    known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bfloat16())
    return known and rows <= MAX_ROWS and weight.numel() >= LEAST and torch.backends.mkldnn.is_available()


def multiplies_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
