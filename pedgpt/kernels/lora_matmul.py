"""A linear layer with LoRA or a mixture of experts, as one operator with its own backward pass.

    P = [A; W_g; W_n]                    one skinny product x Pᵀ reads x once
    y = h Bᵀ + x Wᵀ (+ b)                the second product is accumulated onto the first
    ds, h from dy;  dB = dyᵀ h;  dP = dsᵀ x;  dx = ds P + dy W

Kept for the backward pass beside x and the parameters: s (in half precision; in float32 it is computed again), gates
and slope. Letters as in expert_gate.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pedgpt.kernels.cpu.products import product, refuse_create_graph, sum_of_products
from pedgpt.kernels.expert_gate import down_gate, down_gate_backward, implementation


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        router: Tensor | None,
        router_noise: Tensor | None,
        noise: Tensor | None,
        dropped: Tensor | None,
        scaling: float,
        impl: str,
    ) -> tuple[Tensor, Tensor | None]:
        experts = 0 if router is None else len(router)
        packed = _pack(lora_A, router, router_noise, x.dtype)
        h, s, gates, slope = down_gate(
            x, packed, noise,
            experts=experts, rank=len(lora_A) // (experts + 1), scaling=scaling, dropped=dropped, impl=impl,
        )  # fmt: skip
        y = sum_of_products(x, weight, h, lora_B.to(x.dtype), bias)
        ctx.save_for_backward(
            x, weight, lora_A, lora_B, router, router_noise, s if s.element_size() == 2 else None, gates, slope, dropped
        )
        ctx.scaling, ctx.impl = scaling, impl
        ctx.set_materialize_grads(False)  # gates never have one
        if gates is not None:
            ctx.mark_non_differentiable(gates)
        return y, gates

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_create_graph("lora_linear")
        if dy is None:
            return (None,) * 11
        x, weight, lora_A, lora_B, router, router_noise, s, gates, slope, dropped = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_router, needs_noise, _, needs_dropped = (
            ctx.needs_input_grad[:9]
        )
        packed, dy = _pack(lora_A, router, router_noise, x.dtype), dy.contiguous()
        if s is None:
            s = product(x if dropped is None else dropped, packed[: len(lora_A)])
        ds, h = down_gate_backward(dy, lora_B.to(x.dtype), s, gates, slope, scaling=ctx.scaling, impl=ctx.impl)
        dx = dweight = dbias = dA = dB = drouter = dnoise = ddropped = None
        columns = slice(len(lora_A) if dropped is not None else 0, None)  # of ds that x itself gave
        if needs_x:
            dx = sum_of_products(dy, weight.t(), ds[:, columns], packed[columns].t())
        if needs_dropped:
            ddropped = product(ds[:, : len(lora_A)], packed[: len(lora_A)].t())
        if needs_weight:
            dweight = product(dy.t(), x.t())
        if needs_bias:
            dbias = dy.sum(0)
        if needs_B:
            dB = (dy.t() @ h).to(lora_B.dtype)
        if needs_A or needs_router or needs_noise:
            dpacked = product(ds[:, columns].t(), x.t()).to(lora_A.dtype)
            if dropped is not None:
                dpacked = torch.cat((product(ds[:, : len(lora_A)].t(), dropped.t()).to(lora_A.dtype), dpacked))
            dA = dpacked[: len(lora_A)]
            if router is not None:
                drouter = dpacked[len(lora_A) :][: len(router)]
            if router_noise is not None:
                dnoise = dpacked[len(dpacked) - len(router_noise) :]
        return dx, dweight, dbias, dA, dB, drouter, dnoise, None, ddropped, None, None


def _pack(lora_A: Tensor, router: Tensor | None, router_noise: Tensor | None, dtype: torch.dtype) -> Tensor:
    """P [C, D]. It is cheap, so the backward pass makes it again."""
    parts = [part for part in (lora_A, router, router_noise) if part is not None]
    return (torch.cat(parts) if len(parts) > 1 else lora_A).to(dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    router: Tensor | None = None,
    router_noise: Tensor | None = None,
    noise: Tensor | None = None,
    dropped: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y [..., O], gates [..., N] in float32 or None) of a linear layer with N gated experts, or with plain LoRA.

        y = x Wᵀ (+ b) + c ( B_u A_u x + Σ_j G(x)_j B_j A_j x ),  G(x) = softmax(x W_gᵀ + ε ⊙ softplus(x W_nᵀ))

    x [..., D], weight [O, D], bias [O]; lora_A [R, D] and lora_B [O, R], the universal expert's r rows first, then
    those of each specific one; `router` W_g and `router_noise` W_n [N, D]; `noise` ε [..., N], None in evaluation;
    c = `scaling`. Without a router it is LoRA of rank R. `dropped` [..., D] is what A reads instead of x: LoRA dropout,
    which costs a second copy of x and a product more, on the torch form. All parameters may have their own dtypes;
    products are made in the dtype of x, or in autocast's, gates in float32. Differentiable once, in all but `noise`;
    gates carry no gradient. `impl`: "torch", "triton", or None for Triton on CUDA and torch elsewhere.
    Raises ValueError for shapes that do not fit.
    """
    _check(x, weight, bias, lora_A, lora_B, router, router_noise, noise, dropped)
    dtype = x.dtype
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])

    bias = None if bias is None else bias.to(dtype)
    dropped = None if dropped is None else dropped.to(dtype)
    y, gates = _LoRALinear.apply(
        rows(x.to(dtype)), weight.to(dtype), bias, lora_A, lora_B, router, None if noise is None else router_noise,
        rows(noise), rows(dropped), scaling,
        implementation(impl, x, len(lora_A), 0 if router is None else len(router)),
    )  # fmt: skip
    leading = x.shape[:-1]
    return y.view(*leading, len(weight)), None if gates is None else gates.view(*leading, gates.shape[-1])


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router: Tensor | None,
    router_noise: Tensor | None,
    noise: Tensor | None,
    dropped: Tensor | None,
) -> None:
    if weight.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"weight must be [out, in] and x floating, found {list(weight.shape)} and {x.dtype}")
    size_out, size_in = weight.shape
    experts = 0 if router is None else len(router)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "x": (x, (*x.shape[:-1], size_in)),
        "bias": (bias, (size_out,)),
        "lora_A": (lora_A, (len(lora_A), size_in)),
        "lora_B": (lora_B, (size_out, len(lora_A))),
        "router": (router, (experts, size_in)),
        "router_noise": (router_noise, (experts, size_in)),
        "noise": (noise, (*x.shape[:-1], experts)),
        "dropped": (dropped, tuple(x.shape)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, found {list(tensor.shape)}")
    if len(lora_A) % (experts + 1) or not len(lora_A):
        raise ValueError(f"lora_A has {len(lora_A)} rows, which {experts + 1} experts cannot share")
    if router is not None and not experts:
        raise ValueError("router has no rows; leave it out for plain LoRA")
    if noise is not None and router_noise is None:
        raise ValueError("noise needs router_noise, which scales it")
