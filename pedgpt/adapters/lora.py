"""Low-rank adaptation of a linear layer (Hu et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pedgpt.kernels import Quantization, Quantized, QuantizedLinear, lora_linear, transformed
from pedgpt.kernels._dispatch import without_numbers
from pedgpt.kernels.expert_gate import ALIGNMENT

HALF = (torch.bfloat16, torch.float16)
_optimizer_steps = 0


@register_optimizer_step_post_hook
def _count_step(*_: Any) -> None:
    """NOTE: a fused optimizer changes parameters without counting up their `_version`, so steps are counted here."""
    global _optimizer_steps
    _optimizer_steps += 1


class Packed(NamedTuple):
    """An adapter's P = [A; W_g; W_n] and B in the dtype of the computation, while its parameters stay what they are."""

    tensors: tuple[Tensor, Tensor]
    made_from: list[Any]
    aliases: list[Tensor]  # of the parameters: they keep the memory in use, so that no later tensor has its address


def _state(parameters: Mapping[str, Tensor]) -> list[Any]:
    """What changes with the memory or the values of parameters."""
    planned = without_numbers()
    return [_optimizer_steps, *((0 if planned else p.data_ptr(), p._version) for p in parameters.values())]


class LoRALinear(nn.Linear):
    """y = W x (+ b) + (α/r) B A dropout(x), with A [r, in] Kaiming-uniform and B [out, r] zero.

    `rslora` scales by α/√r instead (Kalajdzievski 2023), which keeps the update's size independent of the rank. The
    layer takes over `base`'s own weight, bias and quantization, so their names in the state dict stay the same.
    """

    num_universal_experts, num_specific_experts, shared_A = 1, 0, False  # a LoRA is one expert that is always on
    quantization: Quantization | None
    impl: str | None = None  # of `lora_linear`: "torch", "triton", or None for what suits the device

    def __init__(
        self, base: nn.Linear, rank: int = 8, alpha: float = 16, dropout: float = 0.0, *, rslora: bool = False,
        _copies: tuple[int, int] = (1, 1),  # how many experts share the rows of A, and the columns of B
    ) -> None:  # fmt: skip
        if not isinstance(base, nn.Linear) or isinstance(base, LoRALinear):
            raise ValueError(f"adapters go around a plain nn.Linear, found {type(base).__name__}")
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, found {rank}")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be a finite number, found {alpha}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), found {dropout}")
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.base_type = base.weight, base.bias, type(base)
        self.register_module("quantization", quantization_of(base))
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = dropout
        self.enabled = True
        self.packed: Packed | None = None
        self.gate_record: Any = None  # of experts: what their gates are added to
        self.noise_stream: Any = None  # of experts: where the gate's noise comes from
        # Adapters train in float32 over a bf16 base: at bf16 a small update would round away.
        dtype = torch.promote_types(product_dtype(base), torch.float32)
        # A base on the meta device is filled later; the adapter is made now, where torch makes new tensors.
        device = None if base.weight.is_meta else base.weight.device
        self.lora_A = nn.Parameter(torch.empty(_copies[0] * rank, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, _copies[1] * rank, dtype=dtype, device=device))
        # Kaiming-uniform by the fan-in, with the slope that PEFT and nn.Linear use: bound 1/sqrt(in_features).
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's own tensors by name, everything that training changes."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def _experts(self) -> list[tuple[Tensor, Tensor]]:
        """(A [r, in], B [out, r]) of each expert, those that are always on first."""
        of_B = self.lora_B.split(self.rank, dim=1)
        of_A = [self.lora_A] * len(of_B) if self.shared_A else self.lora_A.split(self.rank)
        return list(zip(of_A, of_B, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}  # a copy, also one on disk, has parameters of its own

    def packed_parameters(self) -> tuple[Tensor, Tensor] | None:
        """(P, B) as `pack_adapters` made them; None if the parameters have changed since, or if it was not called."""
        if self.packed is None or transformed() or self.packed.made_from != _state(self.adapter_parameters()):
            return None
        return self.packed.tensors

    def _routing(self, x: Tensor) -> dict[str, Any]:
        """What `lora_linear` is told of experts beside their matrices."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base_type.forward(self, x)
        routing = self._routing(x)
        y, gates, totals = lora_linear(
            x, self.weight if self.quantization is None else Quantized(self.weight, self.quantization), self.bias,
            self.lora_A, self.lora_B, scaling=self.scaling, packed=self.packed_parameters(), impl=self.impl,
            dropped=F.dropout(x, self.dropout) if self.dropout and self.training else None, **routing,
        )  # fmt: skip
        if totals is not None:
            self.gate_record.add(totals, gates)
        return y


def quantization_of(layer: nn.Linear) -> Quantization | None:
    """What a layer over codes, adapted or not, needs beside them; None for a layer over a plain weight."""
    return layer.quantization if isinstance(layer, QuantizedLinear | LoRALinear) else None


def product_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype in which a layer multiplies an x of the same dtype; codes do not tell it."""
    quantization = quantization_of(layer)
    return layer.weight.dtype if quantization is None else quantization.dtype


@torch.inference_mode(False)
@torch.no_grad()
def pack_adapters(model: nn.Module) -> None:
    """Cast and stack the parameters of all active adapters at once, by few kernels; call it before a forward pass.

    Layers use the result until a parameter or an optimizer's step changes them, and without it stack at each call. It
    takes memory as large as the adapters in the dtype of the base. Layers that FSDP2 has split are left out.
    NOTE: a change in place through `parameter.data` is not noticed, because torch does not count it; call this again.
    """
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    for layer in (module for module in model.modules() if isinstance(module, LoRALinear)):
        layer.packed = None
        parameters, dtype = layer.adapter_parameters(), product_dtype(layer)
        lora_A, lora_B, own = layer.lora_A, layer.lora_B, list(parameters.values())
        routers = [parameters[name] for name in ("router", "router_noise") if name in parameters]
        plain = all(type(p) is nn.Parameter or (without_numbers() and not hasattr(p, "to_local")) for p in own)
        if (routers or lora_A.dtype != dtype) and plain and not any(p.is_meta or p.is_inference() for p in own):
            lengths = [len(p) for p in (lora_A, *routers)]
            rows = -(-sum(lengths) // ALIGNMENT) * ALIGNMENT if lora_A.is_cuda else sum(lengths)
            P, B = lora_A.new_zeros(rows, layer.in_features, dtype=dtype), torch.empty_like(lora_B, dtype=dtype)
            sources += [lora_A, *routers, lora_B]
            targets += [*P[: sum(lengths)].split(lengths), B]
            layer.packed = Packed((P, B), _state(parameters), [p.detach() for p in own])
    if targets:
        torch._foreach_copy_(targets, sources)


@contextmanager
def temporarily(attribute: str, values: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Within the context, each module has another value of an attribute."""
    before = {module: getattr(module, attribute) for module in values}
    for module, value in values.items():
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, value in before.items():
            setattr(module, attribute, value)
