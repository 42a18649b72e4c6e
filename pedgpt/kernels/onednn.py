"""Linear layers whose float32 products on the CPU are oneDNN's.

torch calls MKL for them, which on processors not of its maker takes about twice as long (`python
benchmarks/bench_experts.py`). oneDNN is part of torch; elsewhere, and where it is absent, torch's own products stay.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pedgpt.kernels._transforms import transformed
from pedgpt.kernels.cpu.packed import packed_product

AVAILABLE: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ b) [..., O] for x [..., D], weight [O, D], bias [O]: `F.linear` up to rounding."""
    fits = weight.ndim == 2 and x.ndim and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
    if not fits or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)  # which says what is wrong, if anything is
    if (found := packed_product(x, weight, bias)) is not None:
        return found
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():  # The operator takes x as it is, and this path decodes: every microsecond counts.
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise.default(x, _dense(weight), bias, "none", [], "")
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ b) [T, O] for x [T, D] and W [O, D], either of which may be transposed in memory; without autograd."""
    if (found := packed_product(x, weight, bias)) is not None:
        return found
    if _by_onednn(x, weight):
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise.default(_dense(x), _dense(weight), bias, "none", [], "")
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def product_onto(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x Wᵀ, the sum rounded once, in the memory of y or another; without autograd. y is given away."""
    if (found := packed_product(x, weight, onto=y)) is not None:
        return found
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise.binary(_dense(x), y, _dense(weight), None, "add")
    return y.addmm_(x, weight.t())


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
            times(dy.t(), x.t()) if needs_weight else None,
            dy.sum(0) if needs_bias else None,
        )


def refuse_create_graph(operator: str) -> None:
    """For backward passes that are no derivatives of anything: RuntimeError where they would be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{operator} is differentiable once: no create_graph=True")


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    # A compiler chooses products itself and cannot follow the operators below; torch.func and subclasses lack them.
    if transformed() or torch.jit.is_tracing():
        return False
    if not {type(x), type(weight)} <= {Tensor, nn.Parameter} or torch.strided != x.layout or x.layout != weight.layout:
        return False
    if torch.float32 != x.dtype or x.dtype != weight.dtype or x.device.type != "cpu" or weight.device.type != "cpu":
        return False
    if not x.numel() or not weight.numel() or x.shape[-1] != weight.shape[-1]:
        return False
    return AVAILABLE and bool(torch.backends.mkldnn.enabled)


def _dense(matrix: Tensor) -> Tensor:
    """The matrix, copied unless its rows or its columns lie one after another."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()
