"""A linear layer with LoRA or a mixture of experts, as one operator with its own backward pass.

    P = [A; W_g; W_n]                    one skinny product x Pᵀ reads x once
    y = h Bᵀ + x Wᵀ (+ b)                the second product is accumulated onto the first
    ds, h from dy;  dB = dyᵀ h;  dP = dsᵀ x;  dx = ds P + dy W

Kept for the backward pass beside x and the parameters: s, gates and slope. Letters as in expert_gate.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pedgpt.kernels._dispatch import autocast_dtype, by_triton, transformed, without_numbers
from pedgpt.kernels.cpu.products import linear, refuse_create_graph, sum_of_products
from pedgpt.kernels.expert_gate import ALIGNMENT, Gated, Mixture, down_gate, down_gate_backward
from pedgpt.kernels.quantized import Quantized, few_rows, multiplicand


def _forward(*operands: Any) -> tuple[Tensor, Gated]:
    x, weight, bias, lora_A, lora_B, router, router_noise, dropped, given, P, B, noise, count, mixture, impl = operands
    if P is None:
        P, B = _pack(lora_A, lora_B, router, router_noise, x.dtype, impl)
    gated = down_gate(x, P, noise, mixture, given=given, dropped=dropped, count=count, impl=impl)
    if (y := few_rows(x, weight, impl)) is not None:
        return y.add_(linear(gated.h, B, bias)).to(x.dtype), gated
    with multiplicand(weight, x.dtype, impl) as W:
        return sum_of_products(x, W, gated.h, B, bias), gated


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y, (_, s, gates, slope, totals) = _forward(*operands)
        x, weight, _, *others, _, P, B, _, ctx.count, ctx.mixture, ctx.impl = operands
        ctx.codes = weight if isinstance(weight, Quantized) else None
        ctx.save_for_backward(x, None if ctx.codes else weight, *others, P, B, s, gates, slope)
        ctx.set_materialize_grads(False)  # gates never have one, and totals rarely
        ctx.mark_non_differentiable(*([] if gates is None or ctx.mixture.given else [gates]))
        return y, None if ctx.mixture.given else gates, totals

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None, dtotals: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_create_graph("lora_linear")
        x, weight, lora_A, lora_B, router, router_noise, dropped, P, B, s, gates, slope = ctx.saved_tensors
        if dy is None and dtotals is None:
            return (None,) * 15
        dy = x.new_zeros(len(x), len(lora_B)) if dy is None else dy.contiguous()
        of_x, of_weight, of_bias, of_A, of_B, of_router, of_noise, of_dropped, *_ = ctx.needs_input_grad
        if P is None:
            P, B = _pack(lora_A, lora_B, router, router_noise, x.dtype, ctx.impl)
        columns, totals = lora_A.shape[0], {"dtotals": dtotals, "count": ctx.count}
        ds, h, dgates = down_gate_backward(dy, B, s, gates, slope, ctx.mixture, columns=len(P), **totals, impl=ctx.impl)
        P = P[: ds.shape[1]]
        own = slice(0 if dropped is None else columns, None)  # the columns of ds that x itself gave
        dx = None
        if of_x:
            with multiplicand(ctx.codes or weight, dy.dtype, ctx.impl) as W:
                dx = sum_of_products(dy, W.t(), ds[:, own], P[own].t())
        ddropped = linear(ds[:, :columns], P[:columns].t()) if of_dropped else None
        dweight = dy.t() @ x if of_weight else None
        dB = (dy.t() @ h).to(lora_B.dtype) if of_B else None
        dA = drouter = dnoise = None
        if of_A or of_router or of_noise:
            dP = (ds[:, own].t() @ x).to(lora_A.dtype)
            if dropped is not None:
                dP = torch.cat(((ds[:, :columns].t() @ dropped).to(lora_A.dtype), dP))
            dA, experts = dP[:columns], 0 if router is None else len(router)
            drouter = dP[columns:][:experts] if experts else None
            dnoise = None if router_noise is None else dP[columns + experts :][:experts]
        return dx, dweight, dy.sum(0) if of_bias else None, dA, dB, drouter, dnoise, ddropped, dgates, *[None] * 6


def _pack(
    lora_A: Tensor, lora_B: Tensor, router: Tensor | None, router_noise: Tensor | None, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    """(P, B) in the dtype of the products. They are cheap, so the backward pass makes them again."""
    parts = [part for part in (lora_A, router, router_noise) if part is not None]
    if impl == "triton" and (rest := -sum(map(len, parts)) % ALIGNMENT):
        parts.append(lora_A.new_zeros(rest, lora_A.shape[1]))
    return (torch.cat(parts) if len(parts) > 1 else lora_A).to(dtype), lora_B.to(dtype)


def lora_linear(
    x: Tensor, weight: Tensor | Quantized, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, *, scaling: float,
    router: Tensor | None = None, router_noise: Tensor | None = None, noise: Any = None, gates: Tensor | None = None,
    universal: int = 1, top_k: int | None = None, dropped: Tensor | None = None, count: Tensor | bool = False,
    packed: tuple[Tensor, Tensor] | None = None, impl: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(y [..., O], gates [..., N], totals [N + 2]) of a linear layer with N gated experts; without gates, plain LoRA.

        y = x Wᵀ (+ b) + c Σ_e w_e B_e A_e x,  w = [1 … 1, G_1 … G_N],  G(x) = softmax(x W_gᵀ + ε ⊙ softplus(x W_nᵀ))

    x [..., D], weight [O, D] or `Quantized`, bias [O]; lora_A [R, D] and lora_B [O, R], r rows for each of E = U + N
    experts, the U = `universal` ones first, or one A [r, D] for all; `router` W_g and `router_noise` W_n [N, D];
    `noise` ε [..., N], None in evaluation, or a stream for x [B, T, D], which draws ε from its `key` and `rows` [B] or
    by `normal`; of the routes only the `top_k` largest count; c = `scaling`. `gates` [..., N] take the place of G(x).
    Without either it is LoRA of rank R. `dropped` [..., D] is what A reads instead of x: LoRA dropout, which costs a
    second copy of x and a product more. `count` [...] (bool) or True asks for `totals`, sums in float64 over those
    tokens or over all: of the gates, of their entropy, and the number of tokens. `packed`: (P, B) as `pack_adapters`
    makes them, used if in the products' dtype.

    All parameters may have their own dtypes; products are made in the dtype of x, or in autocast's, gates in float32.
    Differentiable once, in all but `noise`; totals have a gradient, returned gates none. `impl`: "torch", "triton", or
    None for Triton on CUDA and torch elsewhere. Raises ValueError for shapes that do not fit.
    """
    mixture = _mixture(x, weight, bias, lora_A, lora_B, router, router_noise, noise, gates, universal, dropped, count)
    mixture, experts = mixture._replace(scaling=scaling, top_k=top_k or 0), mixture.experts
    dtype, leading = autocast_dtype(x, x.dtype), x.shape[:-1]
    wide = torch.promote_types(dtype, torch.float32)
    impl = "triton" if by_triton(impl, x) else "torch"
    if impl == "torch" and router is not None and noise is not None and not isinstance(noise, Tensor):
        like = x.new_empty(*leading, len(router), dtype=wide)
        noise = like if without_numbers() else noise.normal(like)  # Drawing it is most operations of a plan.
    if isinstance(weight, Tensor):
        weight = weight.to(dtype)
    elif transformed():  # A compiler fuses what computes W with other operations.
        weight = weight.quantization.dense(weight.codes, dtype)
    operands = (
        x.to(dtype).reshape(-1, x.shape[-1]), weight, None if bias is None else bias.to(dtype),
        lora_A, lora_B, router, None if noise is None else router_noise,
        None if dropped is None else dropped.to(dtype).reshape(-1, x.shape[-1]),
        None if gates is None else gates.to(wide).reshape(-1, experts).contiguous(),
        *(packed if packed is not None and packed[0].dtype == dtype else (None, None)),
        noise.reshape(-1, noise.shape[-1]) if isinstance(noise, Tensor) else noise,
        count.reshape(-1) if isinstance(count, Tensor) else count, mixture, impl,
    )  # fmt: skip
    if torch.is_grad_enabled():
        y, found, totals = _LoRALinear.apply(*operands)
    else:
        y, (_, _, found, _, totals) = _forward(*operands)
    return y.view(*leading, weight.shape[0]), gates if found is None else found.view(*leading, experts), totals


def _mixture(
    x: Tensor, weight: Tensor | Quantized, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, router: Tensor | None,
    router_noise: Tensor | None, noise: Any, gates: Tensor | None, universal: int, dropped: Tensor | None,
    count: Tensor | bool,
) -> Mixture:  # fmt: skip
    """The sizes that the shapes tell; ValueError if they do not fit."""
    if len(weight.shape) != 2 or not x.is_floating_point():
        raise ValueError(f"weight must be [out, in] and x floating, found {list(weight.shape)} and {x.dtype}")
    (size_out, size_in), leading, columns = weight.shape, x.shape[:-1], len(lora_A)
    experts = gates.shape[-1] if gates is not None else 0 if router is None else len(router)
    total = universal + experts
    shared = lora_B.shape[1:] == (columns * total,)
    shapes = {
        "x": (x, (*leading, size_in)), "bias": (bias, (size_out,)), "dropped": (dropped, x.shape),
        "lora_A": (lora_A, (columns, size_in)), "lora_B": (lora_B, (size_out, columns * (total if shared else 1))),
        "router": (router, (experts, size_in)), "router_noise": (router_noise, (experts, size_in)),
        "noise": (noise, (*leading, experts)) if isinstance(noise, Tensor | None) else (noise.rows, leading[:-1]),
        "count": (count if isinstance(count, Tensor) else None, leading), "gates": (gates, (*leading, experts)),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, found {list(tensor.shape)}")
    if not columns or total < 1 or (columns % total and not shared):
        raise ValueError(f"lora_A has {columns} rows, which {total} experts cannot share")
    if router is not None and (gates is not None or not experts):
        raise ValueError("router has no rows, or there are gates beside it; leave it out")
    if noise is not None and router_noise is None:
        raise ValueError("noise needs router_noise, which scales it")
    return Mixture(experts, lora_B.shape[1] // total, 1.0, universal, shared, given=gates is not None)
