"""RMSNorm and SwiGLU that keep their inputs alone for the backward pass and compute the rest again.

Autograd would keep the normed states and silu(gate) too: of a block's activations in float32 about a sixth.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels._transforms import transformed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w · x / √(mean(x²) + ε) over the last axis [..., D] (Zhang & Sennrich 2019), in float32 up to the weight."""
    if torch.is_grad_enabled() and not transformed():
        return _RMSNorm.apply(x, weight, eps)
    return weight * _normed(x, eps)[0].to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer 2020), of one shape and dtype."""
    if torch.is_grad_enabled() and not transformed():
        return _SwiGLU.apply(gate, up)
    return F.silu(gate) * up


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale, scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normed(x, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return weight * normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the scale depends on x
            scale = _normed(x, ctx.eps)[1]
        normed = x * scale
        along = dy * normed
        dweight = along.reshape(-1, len(weight)).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        inner = (along * weight).mean(-1, keepdim=True)
        dx = (dy * weight).to(scale.dtype).addcmul_(normed, inner, value=-1).mul_(scale)
        return dx.to(x.dtype), dweight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed():  # create_graph=True, many gradients at once: nothing in place
            slope = gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
            return dout * up * slope, dout * F.silu(gate)
        dup, dsilu = F.silu(gate).mul_(dout), dout * up
        return torch.ops.aten.silu_backward.grad_input(dsilu, gate, grad_input=dsilu), dup
