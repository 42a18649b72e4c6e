"""Every operator as its equation in plain torch. Read this file first: all other forms are judged by it.

Autograd differentiates these forms, so a compiler and torch.func can follow them. None is fast, and none saves memory.

Letters: B batch, T query tokens, S key tokens, H heads, G key-value heads, K head_dim, D hidden, V vocabulary. Of the
experts: D width of x, O width of y, U universal and N specific ones, E = U + N, r rank. Of the head: N all tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from pedgpt.kernels.attention import Layout

SHORTEST = 1e-12  # the length below which a row of a normalised head counts as zeros


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Σ_j softmax_j(q_i·k_j / √K + bias_ij) v_j over the keys that query i sees; q [B, H, T, K], k, v [B, G, S, K]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias(layout)
    return scores.masked_fill(~visible(layout)[:, None], -torch.inf).softmax(-1).to(v.dtype) @ v


def visible(layout: Layout) -> Tensor:
    """Whether query i sees key j, [B or 1, T, S]: j is not ahead, in its document, and in the trunk or its branch."""
    keys = torch.arange(layout.keys, device=layout.positions.device)
    last = layout.first + keys[None, : layout.queries, None]  # the key of the query itself
    seen = keys <= last
    if layout.documents is not None:
        seen = seen & (layout.documents[:, :, None] == layout.documents[:, None, :])
    if layout.branches is not None:
        trunk, own = layout.branches[:, None, :] == 0, layout.branches[:, :, None] == layout.branches[:, None, :]
        seen = seen & (trunk | own)
    return seen


def bias(layout: Layout) -> Tensor:
    """ALiBi (Press et al. 2022): slope · (position of key − position of query), [B, H, T, S] float32; else 0."""
    if layout.slopes is None:
        return layout.positions.new_zeros((), dtype=torch.float32)
    distance = layout.key_positions[:, None, :] - layout.positions[:, :, None]
    return layout.slopes[:, None, None] * distance[:, None]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w · x / √(mean(x²) + ε) over the last axis (Zhang & Sennrich 2019), in float32 up to the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x·cos + (−x₂, x₁)·sin (Su et al. 2021): x [B, T, H, K] turned, halves paired as HF pairs them."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer 2020)."""
    return F.silu(gate) * up


def expert_gate(
    x: Tensor, router: Tensor, router_noise: Tensor, noise: Tensor | None = None, top_k: int | None = None
) -> Tensor:
    """G(x) [..., N] = softmax(x W_gᵀ + ε ⊙ softplus(x W_nᵀ)), W_g and W_n [N, D]; without `noise` ε is 0.

    With `top_k` the routes outside the k largest are −∞; of equal routes the first are the largest.
    """
    routes = x @ router.T
    if noise is not None:
        routes = routes + noise * F.softplus(x @ router_noise.T)
    if top_k is not None:
        places = routes.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        routes = routes.masked_fill(places >= top_k, -torch.inf)
    return routes.softmax(-1)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, gates: Tensor, scaling: float,
    universal: int = 1, shared: bool = False,
) -> Tensor:  # fmt: skip
    """y = x Wᵀ (+ b) + c Σ_e w_e B_e A_e x, w = [1 … 1, G_1 … G_N] over U universal and N specific experts.

    A [E r, D], or [r, D] where it is `shared` by all; B [O, E r], gates [..., N]. Plain LoRA has gates [..., 0].
    """
    weights = F.pad(gates, (universal, 0), value=1.0)
    experts, y = weights.shape[-1], F.linear(x, weight, bias)
    of_A = [lora_A] * experts if shared else lora_A.chunk(experts)
    for e, (A, B) in enumerate(zip(of_A, lora_B.chunk(experts, dim=1), strict=True)):
        y = y + scaling * weights[..., e, None] * (x @ A.T @ B.T)
    return y


def linear_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, normalize: bool, ignore_index: int
) -> tuple[Tensor, ...]:
    """log softmax(z)[label] [N] with z = h Wᵀ, divided by ‖w‖ to `normalize`; the entropy; whether no z is larger.

    In float32 at least, and 0 where there is no label. Rows of zeros give z = 0. Only the first has a gradient.
    """
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if normalize:
        lengths = torch.linalg.vector_norm(weight.to(logits.dtype), dim=-1)
        logits = torch.where(lengths < SHORTEST, 0.0, logits / lengths.clamp(min=SHORTEST))
    log_p = logits.log_softmax(-1)
    supervised = labels != ignore_index
    logps = log_p.gather(-1, labels.where(supervised, 0)[:, None]).squeeze(-1)
    entropy, correct = -(log_p.exp() * log_p).sum(-1), (logps >= log_p.amax(-1)).to(logps.dtype)
    return tuple(torch.where(supervised, value, 0.0) for value in (logps, entropy.detach(), correct.detach()))
