"""Where a token stands: rotary embedding with its scalings, and ALiBi.

Letters: B batch, T tokens, H heads, K head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pedgpt.models.config import ModelConfig


def rotary_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for positions [B, T], each [B, 1, T, K], computed in float32 and rounded to `dtype` at the end.

    YaRN multiplies both by 0.1 ln(factor) + 1 unless the checkpoint says otherwise.
    """
    scaling, factor = config.rope_scaling, 1.0
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, scaling, positions.device)
    angles = positions[:, None, :, None].float() * torch.cat((frequencies, frequencies))
    if scaling is not None and scaling["rope_type"] == "yarn":
        growth = 0.1 * math.log(max(1, scaling["factor"]))
        above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
        factor = (above * growth + 1) / (below * growth + 1) if above and below else growth + 1
        factor = scaling["attention_factor"] if scaling.get("attention_factor") is not None else factor
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rope_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None, device: torch.device | None = None
) -> Tensor:
    """Angular frequencies f_i = θ^(−2i/K) in radians per position, [K/2] float32, scaled as the checkpoint asks.

    "linear" divides all by `factor`. "llama3" keeps wavelengths λ = 2π/f shorter than original/high, divides those
    longer than original/low by `factor`, and interpolates between: s = (original/λ − low)/(high − low),
    f' = (1 − s) f/factor + s f. "yarn" (Peng et al. 2023) keeps what turns more than `beta_fast` times over the
    original length, divides by `factor` what turns less than `beta_slow` times, and ramps between their dimensions.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    original = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        divided = 1 - ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    else:
        first, last = (
            head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
        )
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        index = torch.arange(head_dim // 2, device=device).float()
        divided = ((index - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return frequencies / scaling["factor"] * divided + frequencies * (1 - divided)


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """ALiBi's slopes (Press et al. 2022), [H] float32.

    With m the largest power of two ≤ H: 2^(−8(i+1)/m) for i < m, then 2^(−4(2j+1)/m) for the heads that remain.
    """
    m = 1 << (num_heads.bit_length() - 1)
    i = torch.arange(num_heads, dtype=torch.float64, device=device)  # made there, so that a CUDA graph can hold it
    return torch.where(i < m, -8 * (i + 1) / m, -4 * (2 * (i - m) + 1) / m).exp2().float()


def document_positions(tokens: Tensor, documents: Tensor | None, branches: Tensor | None = None) -> Tensor:
    """Positions [B, T] that count from 0 and restart wherever `documents` changes, in each branch after the trunk."""
    index = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    starts = torch.zeros_like(index)
    if documents is not None:
        starts[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], index[:, 1:], 0)
        starts = starts.cummax(dim=1).values
    if branches is None:
        return index - starts
    forks = starts.clone()  # where the run that a token belongs to begins
    forks[:, 1:] = torch.where(branches[:, 1:] != branches[:, :-1], index[:, 1:], starts[:, 1:])
    # Where its document's trunk ends: at its own start if it has none, for an earlier document's lies before that.
    ends = torch.where(branches == 0, index + 1, starts).cummax(dim=1).values
    trunk = torch.where(branches == 0, 0, ends - starts)
    return index - forks.cummax(dim=1).values + trunk
