"""Every operator as its equation in plain torch: read this first, all else is judged by it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# Experts. Letters: D width of x, O width of y, N specific experts, r rank; the universal expert comes first.


def expert_gate(x: Tensor, router: Tensor, router_noise: Tensor, noise: Tensor | None = None) -> Tensor:
    """G(x) [..., N] = softmax(x W_gᵀ + ε ⊙ softplus(x W_nᵀ)), W_g and W_n [N, D]; without `noise` ε is 0."""
    routes = x @ router.T
    if noise is not None:
        routes = routes + noise * F.softplus(x @ router_noise.T)
    return routes.softmax(-1)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, gates: Tensor, scaling: float
) -> Tensor:
    """y = x Wᵀ (+ b) + c ( B_u A_u x + Σ_j G_j B_j A_j x ), with A [(N+1) r, D], B [O, (N+1) r] and gates [..., N].

    Plain LoRA has gates [..., 0].
    """
    experts = gates.shape[-1] + 1
    y = F.linear(x, weight, bias)
    for j, (A, B) in enumerate(zip(lora_A.chunk(experts), lora_B.chunk(experts, dim=1), strict=True)):
        expert = x @ A.T @ B.T
        y = y + scaling * (expert if j == 0 else gates[..., j - 1, None] * expert)
    return y
