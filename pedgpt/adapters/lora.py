"""Low-rank adaptation of a linear layer (Hu et al. 2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pedgpt.kernels import lora_linear


class AdaptedLinear(nn.Linear):
    """A frozen or trainable `nn.Linear` with a low-rank addition that can be switched off.

    It takes over `base`'s own weight and bias, so the base layer's names in the state dict stay what they were.
    """

    impl: str | None = None  # of `lora_linear`: "torch", "triton", or None for what suits the device

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float, rslora: bool, hidden_size: int
    ) -> None:
        if not isinstance(base, nn.Linear) or isinstance(base, AdaptedLinear):
            raise ValueError(f"adapters go around a plain nn.Linear, found {type(base).__name__}")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, found {rank}")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be a finite number, found {alpha}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), found {dropout}")
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.base_type = base.weight, base.bias, type(base)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = dropout
        self.enabled = True
        # Adapters train in float32 over a bf16 base: at bf16 a small update would round away.
        dtype = torch.float32 if base.weight.dtype in (torch.bfloat16, torch.float16) else base.weight.dtype
        # A base on the meta device is filled later; the adapter is made now, where torch makes new tensors.
        device = None if base.weight.is_meta else base.weight.device
        self.lora_A = nn.Parameter(torch.empty(hidden_size, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, hidden_size, dtype=dtype, device=device))
        # Kaiming-uniform by the fan-in, with the slope that PEFT and nn.Linear use: bound 1/sqrt(in_features).
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's own tensors by name, everything that training changes."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def dropped(self, x: Tensor) -> Tensor | None:
        """dropout(x) for A to read while training with dropout; None where it reads x."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else None


class LoRALinear(AdaptedLinear):
    """y = W x (+ b) + (α/r) B A dropout(x), with A [r, in] Kaiming-uniform and B [out, r] zero.

    `rslora` scales by α/√r instead (Kalajdzievski 2023), which keeps the update's size independent of the rank.
    """

    def __init__(
        self, base: nn.Linear, rank: int = 8, alpha: float = 16, dropout: float = 0.0, *, rslora: bool = False
    ) -> None:
        super().__init__(base, rank, alpha, dropout, rslora, hidden_size=rank)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base_type.forward(self, x)
        y, _ = lora_linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B,
            scaling=self.scaling, dropped=self.dropped(x), impl=self.impl,
        )  # fmt: skip
        return y
