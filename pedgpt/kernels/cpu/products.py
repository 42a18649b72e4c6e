"""Linear layers whose float32 products on the CPU are oneDNN's where it is the faster library.

torch calls MKL for them. Which of the two is faster depends on the processor, the size, and which operand is transposed
(`python benchmarks/bench_operators.py`), so each kind of product is measured. oneDNN is part of torch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pedgpt.kernels._transforms import transformed
from pedgpt.kernels.cpu.choice import CANDIDATES, Form, prefer
from pedgpt.kernels.cpu.packed import packed_product

AVAILABLE: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_times: Any = torch.ops.mkldnn._linear_pointwise.default if AVAILABLE else None
# Size classes: at least so many multiplications, and the [T, D, O] that stands for them, on AVX2 the worst for oneDNN.
# torch computes what is smaller, and products of fewer rows, which read a weight once: rearranging it does not pay.
FEWEST_ROWS = 8
CLASSES = {"large": (2**29, 256, 512, 5120), "medium": (2**26, 128, 512, 3072)}
KINDS = ("x W^T", "dy W")  # torch computes dyᵀ x, because oneDNN gained nothing with AVX-512 or AVX2


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ b) [..., O] for x [..., D], weight [O, D], bias [O]: `F.linear` up to rounding."""
    if (found := packed_product(x, weight, bias)) is not None:
        return found
    trains, size = torch.is_grad_enabled(), _size_class(x, weight)
    fits = bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1])
    if size is None or not fits or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)  # which says what is wrong, if anything is
    if not any(prefer(kind, x.dtype, size) for kind in (KINDS if trains else KINDS[:1])):
        return F.linear(x, weight, bias)
    times = _Linear.apply if trains else _onednn
    return times(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ b) [T, O] for x [T, D] and W [O, D], either of which may be transposed in memory; without autograd."""
    if (found := packed_product(x, weight, bias)) is not None:
        return found
    size = _size_class(x, weight)
    if size is not None and prefer(KINDS[0 if weight.is_contiguous() else 1], x.dtype, size):
        return _onednn(x, weight, bias)
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def sum_of_products(x: Tensor, weight: Tensor, h: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + h Bᵀ (+ b) [T, O] for x [T, D], W [O, D], and h [T, R], B = `up` [O, R] of few columns; without autograd.

    In half precision the large product is the second: the sum is rounded once. In float32 it is the first, because the
    small one then finds its memory in use already, and oneDNN is slow at adding where R is small.
    """
    if x.element_size() > 2:
        return product(x, weight, bias).addmm_(h, up.t())
    y = product(h, up, bias)
    return y.addmm_(x, weight.t()) if (found := packed_product(x, weight, onto=y)) is None else found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        times = linear if torch.is_grad_enabled() else product  # under create_graph=True, to be differentiated again
        return (
            times(dy, weight.t()) if needs_x else None,
            dy.t() @ x if needs_weight else None,
            dy.sum(0) if needs_bias else None,
        )


def refuse_create_graph(operator: str) -> None:
    """For backward passes that have no derivative of their own: RuntimeError where they would be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{operator} is differentiable once: no create_graph=True")


def _size_class(x: Tensor, weight: Tensor) -> str | None:
    """The size class of a product that oneDNN could compute; None if torch computes it in any case."""
    work = x.numel() * weight.shape[0] if weight.ndim == 2 and x.ndim and x.dtype == torch.float32 else 0
    # A compiler chooses products itself and cannot follow the operator below; torch.func and subclasses lack it.
    if not work or work < CLASSES["medium"][0] or not AVAILABLE or transformed() or torch.jit.is_tracing():
        return None
    if not torch.backends.mkldnn.enabled:
        return None
    for t in (x, weight):
        if type(t) not in (Tensor, nn.Parameter) or t.dtype != torch.float32 or t.layout != torch.strided:
            return None
        if t.device.type != "cpu" or t.shape[-1] != x.shape[-1] or t.numel() < FEWEST_ROWS * t.shape[-1]:
            return None
    return next(size for size, (least, *_) in CLASSES.items() if work >= least)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()
    return _times(x.contiguous(), weight, None if bias is None else bias.contiguous(), "none", [], "")


def _forms(kind: str, rows: int, depth: int, width: int) -> tuple[Form, Form]:
    x, weight = (torch.full((size, depth), 0.5, dtype=torch.float32) for size in (rows, width))
    weight = weight if kind == KINDS[0] else weight.t().contiguous().t()
    return (lambda: _onednn(x, weight)), (lambda: x @ weight.t())


for _kind, _size in ((kind, size) for kind in KINDS for size in CLASSES if AVAILABLE):
    CANDIDATES[_kind, torch.float32, _size] = partial(_forms, _kind, *CLASSES[_size][1:])
