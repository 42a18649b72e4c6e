"""Put adapters into a model, by module name, and switch them off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from pedgpt.adapters.experts import ExpertLoRALinear
from pedgpt.adapters.lora import AdaptedLinear, LoRALinear

ALL_LINEAR = "all-linear"


def inject_lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
) -> list[str]:
    """Freeze the model and give every matching linear layer a LoRA; returns the names that matched.

    `target_modules` holds names or patterns (`"q_proj"`, `"*.mlp.*"`), or is "all-linear": every linear layer but the
    head. Raises ValueError if one matches nothing or the model has adapters already.
    """
    return _inject(model, target_modules, lambda base: LoRALinear(base, rank, alpha, dropout))


def inject_experts(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16,
    num_specific_experts: int = 3,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
) -> list[str]:
    """Freeze the model and give every matching linear layer a mixture of experts; otherwise as `inject_lora`."""
    return _inject(
        model, target_modules, lambda base: ExpertLoRALinear(base, rank, alpha, num_specific_experts, dropout)
    )


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes exactly what its base does."""
    layers = list(adapted_layers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Every layer that carries an adapter, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def _inject(
    model: nn.Module, target_modules: str | Sequence[str], wrap: Callable[[nn.Linear], AdaptedLinear]
) -> list[str]:
    if adapted_layers(model):
        raise ValueError("the model has adapters already; load the base model again to attach others")
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head"
    }
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    names: set[str] = set()
    for pattern in patterns:
        found = {name for name in linears if _matches(name, pattern)}
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(f"target_modules: {pattern!r} matches no linear layer; the model has {', '.join(kinds)}")
        names |= found
    if not names:
        raise ValueError('target_modules is empty; name layers or give "all-linear"')
    wrapped = {name: wrap(linear) for name, linear in linears.items() if name in names}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in wrapped.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return list(wrapped)


def _matches(name: str, pattern: str) -> bool:
    if pattern == ALL_LINEAR:
        return True
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)
