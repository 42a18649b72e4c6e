"""Low-rank adaptation of a linear layer (Hu et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pedgpt.kernels import lora_linear, transformed
from pedgpt.kernels.expert_gate import ALIGNMENT

HALF = (torch.bfloat16, torch.float16)
_optimizer_steps = 0


@register_optimizer_step_post_hook
def _count_step(*_: Any) -> None:
    """NOTE: a fused optimizer changes parameters without counting up their `_version`, so steps are counted here."""
    global _optimizer_steps
    _optimizer_steps += 1


class Packed:
    """An adapter's P = [A; W_g; W_n] and B in the dtype of the computation, while its parameters stay what they are."""

    def __init__(self, P: Tensor, B: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        self.tensors = (P, B)
        self.steps = _optimizer_steps
        # An alias keeps the memory in use, so that a later tensor cannot have the same address.
        self.aliases = [parameter.detach() for parameter in parameters.values()]
        self.sources = [(name, p.data_ptr(), p._version) for name, p in parameters.items()]

    def is_current(self, parameters: Mapping[str, Tensor | None]) -> bool:
        """Whether the parameters have the memory and the values from which this was made."""
        if self.steps != _optimizer_steps:
            return False
        for name, pointer, version in self.sources:
            parameter = parameters[name]
            if parameter is None or parameter.data_ptr() != pointer or parameter._version != version:
                return False
        return True


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
        self.packed: Packed | None = None
        self.noise_stream: Any = None  # of experts: where the gate's noise comes from
        # Adapters train in float32 over a bf16 base: at bf16 a small update would round away.
        dtype = torch.float32 if base.weight.dtype in HALF else base.weight.dtype
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}  # a copy, also one on disk, has parameters of its own

    def packed_parameters(self) -> tuple[Tensor, Tensor] | None:
        """(P, B) as `pack_adapters` made them; None if the parameters have changed since, or if it was not called."""
        if self.packed is None or transformed():
            return None
        if not self.packed.is_current(self._parameters):
            self.packed = None
            return None
        return self.packed.tensors

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
        y, _, _ = lora_linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B,
            scaling=self.scaling, dropped=self.dropped(x), packed=self.packed_parameters(), impl=self.impl,
        )  # fmt: skip
        return y


@torch.inference_mode(False)
@torch.no_grad()
def pack_adapters(model: nn.Module) -> None:
    """Cast and stack the parameters of all active adapters at once, by few kernels; call it before a forward pass.

    Layers use the result until a parameter or an optimizer's step changes them, and without it stack at each call. It
    takes memory as large as the adapters in the dtype of the base. Layers that FSDP2 has split are left out.
    NOTE: a change in place through `parameter.data` is not noticed, because torch does not count it; call this again.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[AdaptedLinear]] = {}
    for layer in (module for module in model.modules() if isinstance(module, AdaptedLinear)):
        layer.packed = None
        parameters = list(layer.adapter_parameters().values())
        copied = len(parameters) > 2 or layer.lora_A.dtype != layer.weight.dtype
        if copied and all(type(p) is nn.Parameter and not p.is_meta and not p.is_inference() for p in parameters):
            groups.setdefault((layer.lora_A.device, layer.weight.dtype), []).append(layer)
    for (device, dtype), layers in groups.items():
        rows = [sum(len(p) for name, p in layer.adapter_parameters().items() if name != "lora_B") for layer in layers]
        if device.type == "cuda":
            rows = [_up_to_multiple(number, ALIGNMENT) for number in rows]
        sizes = [n for c, a in zip(rows, layers, strict=True) for n in (c * a.in_features, a.lora_B.numel())]
        # Each part begins at a multiple of 64 numbers, where a GPU can read 16 bytes at once.
        places = [_up_to_multiple(size, 64) for size in sizes]
        parts = torch.zeros(sum(places), dtype=dtype, device=device).split(places)
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        for i, layer in enumerate(layers):
            lora_A, lora_B, *routers = layer.adapter_parameters().values()
            P = parts[2 * i][: sizes[2 * i]].view(rows[i], -1)
            B = parts[2 * i + 1][: sizes[2 * i + 1]].view_as(lora_B)
            stacked = [lora_A, *routers]
            sources += [*stacked, lora_B]
            targets += [*P[: sum(map(len, stacked))].split([len(p) for p in stacked]), B]
            layer.packed = Packed(P, B, layer.adapter_parameters())
        torch._foreach_copy_(targets, sources)


@contextmanager
def temporarily(modules: Sequence[nn.Module], attribute: str, values: Sequence[Any]) -> Iterator[None]:
    """Within the context, each module has another value of an attribute."""
    before = [getattr(module, attribute) for module in modules]
    for module, value in zip(modules, values, strict=True):
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            setattr(module, attribute, value)


def _up_to_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
