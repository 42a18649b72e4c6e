"""Where a token stands: rotary embedding with its scalings, and ALiBi.

Letters: B batch, T tokens, H heads, K head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rope_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None, device: torch.device | None = None
) -> Tensor:
    """Angular frequencies f_i = θ^(−2i/K) in radians per position, [K/2] float32, scaled as the checkpoint asks.

    "linear" divides all by `factor`. "llama3" keeps wavelengths λ = 2π/f shorter than original/high, divides those
    longer than original/low by `factor`, and interpolates between: s = (original/λ − low)/(high − low),
    f' = (1 − s) f/factor + s f.
    """
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # original / wavelength
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def rope_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position × frequency, each [B, 1, T, K], computed in float32 and rounded to `dtype`."""
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, K] (Su et al. 2021), halves paired as HF pairs them: x·cos + (−x₂, x₁)·sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """ALiBi's slopes (Press et al. 2022), [H] float32.

    With m the largest power of two ≤ H: 2^(−8(i+1)/m) for i < m, then 2^(−4(2j+1)/m) for the heads that remain.
    """
    m = 1 << (num_heads.bit_length() - 1)
    exponents = [-8 * (i + 1) / m for i in range(m)] + [-4 * (2 * j + 1) / m for j in range(num_heads - m)]
    return torch.tensor([2.0**e for e in exponents], dtype=torch.float32, device=device)
