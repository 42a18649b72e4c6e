"""RMSNorm and SwiGLU that keep their inputs alone for the backward pass and compute the rest again.

Autograd would keep the normed states and silu(gate) too: of a block's activations in float32 about a sixth.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w · x / √(mean(x²) + ε) over the last axis [..., D] (Zhang & Sennrich 2019), in float32 up to the weight."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)[0]
    return weight * _normed(x, eps)[0].to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer 2020), of one shape and dtype."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate) * up


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale, scale


class _RMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, scale = _normed(x, eps)
        return weight * normed.to(x.dtype), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.eps = inputs[2]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the scale depends on x
            scale = _normed(x, ctx.eps)[1]
        normed = x * scale
        dweight = (dy * normed.to(x.dtype)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        dnormed = (dy * weight).to(scale.dtype)
        dx = scale * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
        return dx.to(x.dtype), dweight, None


class _SwiGLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the operator below has no derivative
            slope = gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
            return dout * up * slope, dout * F.silu(gate)
        dup, dsilu = F.silu(gate).mul_(dout), dout * up
        return torch.ops.aten.silu_backward.grad_input(dsilu, gate, grad_input=dsilu), dup
