"""RMSNorm, rotary embedding and SwiGLU, which cost what it takes to read and write their numbers.

For the backward pass RMSNorm keeps its input, and the rotary embedding its tables. On a GPU each pass is one Triton
kernel, and SwiGLU keeps its inputs only; elsewhere it is torch's own, which keeps silu(gate) too.

Letters: B batch, T tokens, H heads, G key-value heads, K head_dim, D width of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels import naive
from pedgpt.kernels._dispatch import autocast_dtype, by_triton, tl, transformed, triton, without_numbers
from pedgpt.kernels.cpu.products import refuse_create_graph
from pedgpt.kernels.recompute import recomputable

SMALL = 2**20  # numbers, for which one call of torch's operator is the fastest without gradients
WIDEST = 8192  # Numbers of a row that fit into the registers of one program.
PROGRAMS = 264  # Two for each multiprocessor of an H100 share the rows whose sum is the gradient of a norm's weight.


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns three tensors: the norm, x + residual, and 1/rms."""
    total = x if residual is None else x + residual
    wide = total.float() if total.element_size() == 2 else total
    square = wide.square()
    scale = (square.mean(-1, keepdim=True) + eps).rsqrt_()
    normed = torch.mul(wide, scale, out=square) if wide is total else wide.mul_(scale).to(total.dtype)
    y = normed.mul_(weight) if normed.dtype == weight.dtype else weight * normed
    return y if y.dtype == dtype else y.to(dtype), total, scale


def _norm_backward(dy: Tensor, dtotal: Any, total: Tensor, weight: Tensor, scale: Tensor, trains: bool) -> Any:
    """dx = scale (w dy - x scale² mean(w dy x)) and dw = Σ dy x scale; both sums are matrix-vector products."""
    width, wide = weight.shape[0], total.to(scale.dtype)
    along = (dy * wide).reshape(-1, width)
    dweight = scale.view(-1) @ along if trains else None
    inner = (along @ weight.to(scale.dtype)).view_as(scale).mul_(scale.square()).div_(-width)
    dx = (dy * weight).to(scale.dtype).addcmul_(wide, inner).mul_(scale)
    return dx if dtotal is None else dx.to(total.dtype).add_(dtotal), dweight


if triton is not None:

    @triton.jit
    def _load(at, mask):
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def rms_norm_fwd_kernel(x, residual, weight, y, total, scale, eps, rows, width,
                            BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
        """BLOCK_R whole rows [D]: x + residual, rounded and stored, if there is one; then the norm of it."""
        row, column = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
        at, mask = row[:, None] * width + column[None, :], (row < rows)[:, None] & (column < width)[None, :]
        value = _load(x + at, mask)
        if residual is not None:
            value = (value + _load(residual + at, mask)).to(total.dtype.element_ty).to(tl.float32)
            tl.store(total + at, value, mask=mask)
        factor = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
        tl.store(scale + row, factor, mask=row < rows)
        normed = (value * factor[:, None]).to(total.dtype.element_ty).to(tl.float32)
        tl.store(y + at, normed * _load(weight + column, column < width)[None, :], mask=mask)

    @triton.jit
    def rms_norm_bwd_kernel(dy, dtotal, total, weight, scale, dx, dweight, rows, width,
                            BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
        """dx, with dtotal if given, of every so many rows; their share [D] of the weight's gradient if it trains."""
        column = tl.arange(0, BLOCK_D)
        w, share = _load(weight + column, column < width)[None, :], tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
            row = tile * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
            at, mask = row[:, None] * width + column[None, :], (row < rows)[:, None] & (column < width)[None, :]
            factor, gradient = _load(scale + row, row < rows)[:, None], _load(dy + at, mask)
            normed = _load(total + at, mask) * factor
            if dweight is not None:
                share += gradient * normed
            gradient *= w
            gradient = (gradient - normed * (tl.sum(gradient * normed, axis=1) / width)[:, None]) * factor
            if dtotal is not None:
                gradient += _load(dtotal + at, mask)
            tl.store(dx + at, gradient, mask=mask)
        if dweight is not None:
            tl.store(dweight + tl.program_id(0) * width + column, tl.sum(share, axis=0), mask=column < width)

    @triton.jit
    def _rotate(x, out, strides, tokens, heads, half, c, s, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
        head, column = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_K)[None, :]
        row, mask = tl.program_id(0).to(tl.int64), (head < heads) & (column < half)
        x += row // tokens * strides[0] + row % tokens * strides[1] + head * strides[2] + column
        first, second = _load(x, mask), _load(x + half, mask)
        out += (row * heads + head) * 2 * half + column
        tl.store(out, first * c - second * s, mask=mask)
        tl.store(out + half, second * c + first * s, mask=mask)

    @triton.jit
    def rotary_kernel(q, k, cos, sin, q_out, k_out, q_strides, k_strides, tokens, heads, groups, half,
                      BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
        """All heads of q and k of one token."""
        column = tl.arange(0, BLOCK_K)[None, :]
        at = tl.program_id(0).to(tl.int64) * 2 * half + column
        c, s = _load(cos + at, column < half), _load(sin + at, column < half)
        _rotate(q, q_out, q_strides, tokens, heads, half, c, s, BLOCK_H, BLOCK_K)
        _rotate(k, k_out, k_strides, tokens, groups, half, c, s, BLOCK_G, BLOCK_K)

    @triton.jit
    def swiglu_kernel(gate, up, dout, out, dup, width, gate_stride, up_stride, BLOCK: tl.constexpr):
        """A stretch of one row [D] of silu(gate) · up; with dout of its gradients: the gate's into `out`, and dup."""
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at, mask = row * width + column, column < width
        g, u = _load(gate + row * gate_stride + column, mask), _load(up + row * up_stride + column, mask)
        sigmoid = tl.sigmoid(g)
        if dout is not None:
            d = _load(dout + at, mask)
            tl.store(dup + at, d * g * sigmoid, mask=mask)
            u *= d * (1.0 + g * (1.0 - sigmoid))
        else:
            u *= g
        tl.store(out + at, u * sigmoid, mask=mask)


def _blocks(x: Tensor) -> tuple[int, dict[str, int]]:
    """Tiles of a norm's rows, and a kernel's sizes and settings: 16 numbers or more a thread."""
    (rows, width), block = x.reshape(-1, x.shape[-1]).shape, triton.next_power_of_2(x.shape[-1])
    height = max(1, 2048 // block)
    sizes = {"rows": rows, "width": width, "BLOCK_R": height, "BLOCK_D": block}
    return triton.cdiv(rows, height), sizes | {"num_warps": max(4, min(16, height * block // 512))}


def _norm_triton(x: Tensor, residual: Any, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = total = x.contiguous()
    if residual is not None:
        residual = residual.contiguous()
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    y, scale = torch.empty_like(x, dtype=dtype), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    tiles, settings = _blocks(x)
    rms_norm_fwd_kernel[(tiles,)](x, residual, weight, y, total, scale, eps, **settings)
    return y, total, scale


def _norm_backward_triton(dy: Tensor, dtotal: Any, total: Tensor, weight: Tensor, scale: Tensor, trains: bool) -> Any:
    (tiles, settings), dx = _blocks(total), torch.empty_like(total)
    programs, dtotal = min(PROGRAMS, tiles), None if dtotal is None else dtotal.contiguous()
    shares = scale.new_empty(programs, len(weight)) if trains else None
    rms_norm_bwd_kernel[(programs,)](dy.contiguous(), dtotal, total, weight, scale, dx, shares, **settings)
    return dx, None if shares is None else shares.sum(0)


def _rotary_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (rows, tokens, heads, size), groups = q.shape, k.shape[2]
    found = q.new_empty(q.shape), k.new_empty(k.shape)
    h, g, half = (triton.next_power_of_2(n) for n in (heads, groups, size // 2))
    rotary_kernel[(rows * tokens,)](
        q, k, cos.contiguous(), sin.contiguous(), *found, q.stride()[:3], k.stride()[:3], tokens, heads, groups,
        size // 2, BLOCK_H=h, BLOCK_G=g, BLOCK_K=half, num_warps=max(1, min(8, h * half // 512)),
    )  # fmt: skip
    return found


def _swiglu_triton(gate: Tensor, up: Tensor, dout: Tensor | None = None) -> Any:
    if without_numbers():  # Only the sizes count.
        return gate * up if dout is None else (gate * dout, up * dout)
    found = gate.new_empty(gate.shape), None if dout is None else up.new_empty(up.shape)
    gate, up = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    dout, width = None if dout is None else dout.contiguous(), gate.shape[1]
    grid = len(gate), triton.cdiv(width, 1024)
    swiglu_kernel[grid](gate, up, dout, *found, width, gate.stride(0), up.stride(0), BLOCK=1024)
    return found[0] if dout is None else found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Any, weight: Tensor, eps: float, dtype: torch.dtype, form: Any) -> Any:
        y, total, scale = form(x, residual, weight, eps, dtype)
        ctx.save_for_backward(total, weight, scale)
        ctx.backward = _norm_backward if form is _norm else _norm_backward_triton
        return y if residual is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        refuse_create_graph("rms_norm")
        (total, weight, scale), (_, both, trains, *_) = ctx.saved_tensors, ctx.needs_input_grad
        dx, dweight = ctx.backward(dy, dtotal, total, weight, scale, trains)
        return dx, dx if both else None, dweight, None, None, None  # autograd converts each to its dtype


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotary_triton(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("rotary")
        cos, sin = ctx.saved_tensors
        return *_rotary_triton(dq, dk, cos, -sin), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu_triton(gate, up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("swiglu")
        gate, up = ctx.saved_tensors
        return _swiglu_triton(gate, up, dout)


def rms_norm(x: Tensor, weight: Tensor, eps: float, impl: str | None = None) -> Tensor:
    """w · x / √(mean(x²) + ε) over the last axis [..., D] (Zhang & Sennrich 2019); float32 until w multiplies it.

    Under autocast the result has autocast's dtype, in which the products that follow read it.
    """
    return add_rms_norm(x, None, weight, eps, impl)[0]


def add_rms_norm(
    x: Tensor, residual: Any, weight: Tensor, eps: float, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of x + residual, x + residual), for x and residual of one shape."""
    grad, autocast = torch.is_grad_enabled(), torch._C._is_any_autocast_enabled()
    if not (grad or autocast or x.is_cuda or impl) and x.dtype == weight.dtype == torch.float32 and x.numel() < SMALL:
        total = x if residual is None else x + residual  # One call gives the same bits faster, but takes more memory.
        return F.rms_norm(total, weight.shape, weight, eps), total
    dtype = autocast_dtype(x, torch.promote_types(x.dtype, weight.dtype))
    if transformed():
        total = x if residual is None else x + residual
        return naive.rms_norm(total, weight, eps).to(dtype), total
    form = _norm_triton if by_triton(impl, x, x.shape[-1] <= WIDEST) else _norm
    if not grad:
        y, total, _ = form(x, residual, weight, eps, dtype)
        return y, total
    found = _RMSNorm.apply(x, residual, weight, eps, dtype, form)
    y, total = (found, x) if residual is None else found
    return recomputable(y, lambda total, weight: form(total, None, weight, eps, dtype)[0], total, weight), total


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """x·cos + (−x₂, x₁)·sin of q [B, T, H, K] and k [B, T, G, K] (Su et al. 2021), both possibly views of one tensor.

    cos and sin [B, 1, T, K] have two equal halves and get no gradient.
    """
    if transformed() or not by_triton(impl, q):
        cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
        return naive.rotary(q, cos, sin), naive.rotary(k, cos, sin)
    return (_Rotary.apply if torch.is_grad_enabled() else _rotary_triton)(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor, impl: str | None = None) -> Tensor:
    """silu(gate) · up (Shazeer 2020); both have one shape [..., D] and one dtype, and may be views of wider rows."""
    if transformed():
        return naive.swiglu(gate, up)
    if by_triton(impl, gate) or (impl is None and gate.is_cuda and without_numbers()):
        if not torch.is_grad_enabled():
            return _swiglu_triton(gate, up)
        return recomputable(_SwiGLU.apply(gate, up), _swiglu_triton, gate, up)
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    silu = recomputable(F.silu(gate), F.silu, gate)
    return recomputable(silu * up, torch.mul, silu, up)
