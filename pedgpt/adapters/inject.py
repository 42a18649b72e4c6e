"""Put adapters into a model, by module name; switch between several, switch them off, merge them into the weights."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from pedgpt.adapters.experts import ExpertLoRALinear
from pedgpt.adapters.lora import HALF, LoRALinear, product_dtype, quantization_of, temporarily
from pedgpt.kernels import Linear, QuantizedLinear

ALL_LINEAR = "all-linear"
# Finds `self.layer.weight` where code computes with it, not where it slices, replaces or returns it or asks its type.
_READ = (
    r"(?<!return )(?<!isinstance\()(?<!attr\()self\.(\w+)\.weight\b"
    r"(?!\.(?:dtype|device|shape|size|ndim|data)|\[|\s*=[^=]| is )"
)
_KNOWN = (nn.Linear.forward, Linear.forward, QuantizedLinear.forward)


@dataclass
class _Adapters:
    """A model's adapters. It is no module, so what is not active is neither in the state dict nor a parameter."""

    layers: dict[str, dict[str, LoRALinear]] = field(default_factory=dict)  # adapter -> module name -> layer
    active: str | None = None
    plain: dict[str, nn.Linear] = field(default_factory=dict)  # what adapted layers stand for, without a weight
    merged: dict[str, LoRALinear] = field(default_factory=dict)  # what merged layers stand for, untouched


def inject_lora(
    model: nn.Module, *, target_modules: str | Sequence[str] = ALL_LINEAR, name: str = "default", **settings: Any
) -> list[str]:
    """Freeze the model and give every matching linear layer a LoRA; returns the names that matched.

    `target_modules` holds names or patterns (`"q_proj"`, `"*.mlp.*"`), or is "all-linear": every linear layer but the
    head. `settings` are those of `LoRALinear`: rank, alpha, dropout, rslora. The adapter gets `name` and is active from
    now on; others wait for `set_adapter`. Raises ValueError if a pattern matches nothing, or also a weight that no
    adapter can go around, the name is taken, an adapter is merged, or FSDP2 has split the model.
    """
    return inject(model, target_modules, name, LoRALinear, settings)


def inject_experts(
    model: nn.Module, *, target_modules: str | Sequence[str] = ALL_LINEAR, name: str = "default",
    num_specific_experts: int | Sequence[int] | Mapping[str, int] = 3,
    layer_type: type[ExpertLoRALinear] = ExpertLoRALinear, **settings: Any,
) -> list[str]:  # fmt: skip
    """As `inject_lora`, but with a mixture of experts: `settings` are also num_universal_experts, top_k and shared_A.

    The number of specific experts may differ between layers (MoLA, Gao et al. 2024): a list has one for each decoder
    layer, and a mapping has patterns of module names, of which the first that matches counts, as in
    `{"*.layers.[0-9].*": 2, "*": 4}`. `layer_type` is `ExpertLoRALinear` or a subclass with a gate of its own.
    """
    linears = linear_layers(model)
    if isinstance(num_specific_experts, Sequence):
        blocks = list(dict.fromkeys(m[0] for name in linears if (m := re.match(r"(?:.*?\.)?\d+\.", name))))
        if len(blocks) != (count := len(num_specific_experts)):
            raise ValueError(f"num_specific_experts has {count} numbers, but the model has {len(blocks)} blocks")
        num_specific_experts = {f"{b}*": n for b, n in zip(blocks, num_specific_experts, strict=True)}
    for pattern in num_specific_experts if isinstance(num_specific_experts, Mapping) else ():
        if not any(_matches(name, pattern) for name in linears):
            raise ValueError(f"num_specific_experts: {pattern!r} matches no linear layer")
    settings["num_specific_experts"] = num_specific_experts
    return inject(model, target_modules, name, layer_type, settings)


def inject(
    model: nn.Module, target_modules: str | Sequence[str], adapter: str, kind: type[LoRALinear],
    settings: Mapping[str, Any], fill: Callable[[str, Any], None] = lambda name, layer: None,
) -> list[str]:  # fmt: skip
    """Both of the above; `fill` gives each new layer its values, and may raise, before the model is changed."""
    record = _record(model)
    _check_can_change(model)
    if adapter in record.layers:
        taken = f"the model has adapters already under the name {adapter!r}"
        raise ValueError(f"{taken}; give another name=, or use these with set_adapter(model, {adapter!r})")
    if foreign := [name for name in adapted_layers(model) if name not in record.layers.get(record.active or "", ())]:
        raise ValueError(f"the model has adapters already that it does not know, as {foreign[0]}; load the base again")
    names, former = _targets(model, target_modules), record.active
    _activate(model, None)
    try:
        plain = {name: _linear(model, name) for name in names}
        layers = {name: kind(linear, **_own(settings, name)) for name, linear in plain.items()}
        for name, layer in layers.items():
            fill(name, layer)
    except BaseException:
        _activate(model, former)
        raise
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    record.layers[adapter] = layers
    record.plain |= plain
    _activate(model, adapter)
    return names


def _own(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of one layer, whose number of experts a table may tell."""
    table = settings.get("num_specific_experts")
    if not isinstance(table, Mapping):
        return dict(settings)
    number = table.get(name) or next((n for pattern, n in table.items() if _matches(name, pattern)), None)
    if number is None:
        raise ValueError(f'num_specific_experts has no pattern that matches {name}; add "*" for all others')
    return {**settings, "num_specific_experts": number}


def _targets(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """The linear layers that the patterns ask for, in the model's order; ValueError for what they cannot have."""
    linears, blocked, uncalled = _survey(model)
    taken = {key.split(".")[-2] for key in blocked | uncalled}  # such a last name alone would ask for these too
    kinds = sorted({".".join(n.split(".")[-2 if n.split(".")[-1] in taken else -1 :]) for n in linears})
    there = ", ".join(kinds) or "none that is plain"
    names: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {pattern} if pattern in linears else {name for name in linears if _matches(name, pattern)}
        asked = {} if pattern in linears else blocked if pattern == ALL_LINEAR else blocked | uncalled
        if left := [key for key in asked if _matches(key, pattern) or _matches(key.rpartition(".")[0], pattern)]:
            raise ValueError(
                f"target_modules: {pattern!r} also asks for {left[0]}, {asked[left[0]]} ({len(left)} such in all), but "
                "adapters go around calls of nn.Linear. Name the layers that they should go around (the model has "
                f"{there}), and all else stays frozen; or put a transposed weight, as Conv1D's, into an nn.Linear first"
            )
        if not found:
            raise ValueError(f"target_modules: {pattern!r} matches no linear layer; the model has {there}")
        if pattern == ALL_LINEAR and uncalled:
            (first, why), *_ = uncalled.items()
            warnings.warn(f"all-linear leaves out {first}, {why} ({len(uncalled)} such in all)", stacklevel=4)
        names |= found
    if not names:
        raise ValueError('target_modules is empty; name layers or give "all-linear"')
    chosen = {id(linears[name]): name for name in names}
    for other, module in _whole(model).named_modules(remove_duplicate=False):
        if (name := chosen.get(id(module), other)) != other:
            raise ValueError(f"{name} and {other} are one layer, of which one place would be adapted; leave it out")
    return [name for name in linears if name in names]


def _matches(name: str, pattern: str) -> bool:
    return pattern in (ALL_LINEAR, name) or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """What can be adapted, by module name."""
    return _survey(model)[0]


def _survey(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str], dict[str, str]]:
    """All linear layers but heads, and like weights: (what can be adapted, what cannot, what would have no effect).

    The last two say why, by the weight's name. A head is named lm_head, shares an embedding's weight, or is what
    transformers' `get_output_embeddings` gives.
    """
    outer: list[Any] = [module for module in _whole(model).modules() if isinstance(module, nn.Embedding)]
    for module in _whole(model).modules():
        with suppress(AttributeError, NotImplementedError):
            outer += cast(Any, module).get_output_embeddings().modules()  # It may give a list of heads, or None.
    kept = {id(getattr(module, "weight", None)) for module in outer}
    linears, blocked, uncalled = {}, {}, {}
    for name, module in _whole(model).named_modules():
        kind: Any = type(module)
        if isinstance(module, nn.Linear):
            if not name or name.rpartition(".")[2] == "lm_head" or id(module.weight) in kept:
                continue
            parent: Any = type(_whole(model).get_submodule(name.rpartition(".")[0]))
            if name.rpartition(".")[2] in _read_weights(parent):
                uncalled[f"{name}.weight"] = f"which {parent.__name__} reads without a call of the layer"
            elif kind.forward in _KNOWN or isinstance(module, LoRALinear):
                linears[name] = module
            else:
                blocked[f"{name}.weight"] = f"{list(module.weight.shape)} of a {kind.__name__}"
        elif not isinstance(module, nn.modules.conv._ConvNd | nn.utils.parametrize.ParametrizationList):
            own = dict(module.named_parameters(recurse=False))
            for key, parameter in own.items():
                transposed = parameter.ndim == 2 and "bias" in own and own["bias"].shape == parameter.shape[1:]
                if transposed or (parameter.ndim == 3 and min(parameter.shape) > 1):
                    blocked[f"{name}.{key}"] = f"{list(parameter.shape)} of a {kind.__name__}"
    return linears, blocked, uncalled


@functools.cache
def _read_weights(kind: Any) -> set[str]:
    """Names of child layers whose weight a module's methods read themselves, as Mamba's and torch's encoder do.

    NOTE: this looks into their source, because one method may call the layer, and another one for a GPU may not.
    """
    found = {"out_proj"} if issubclass(kind, nn.MultiheadAttention) else set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        sources = {}
        for name, method in vars(base).items():
            if inspect.isfunction(method) and not re.search("init|reset|tie|load", name):
                with suppress(OSError, TypeError, SyntaxError):  # there is none, or it was changed since
                    sources[name] = inspect.getsource(method)
        found |= {name for source in sources.values() for name in re.findall(_READ, source)}
        if "super()" not in sources.get("forward", "super()"):
            break
    return found


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every layer that carries the active adapter, by module name."""
    return {name: module for name, module in _whole(model).named_modules() if isinstance(module, LoRALinear)}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters, in the order in which they came."""
    return list(_record(model).layers)


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that the model computes with, merged or not; None where it is its base."""
    return _record(model).active


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Compute and train with the adapter `name` from now on; None: with the base alone, of which nothing trains.

    Base weights stay the parameters that they are; the adapter's tensors move to their device, and to float64 where the
    base is. Raises ValueError for an unknown name, while an adapter is merged, and for a model that FSDP2 has split.
    """
    record = _record(model)
    _check_can_change(model)
    if name is not None and name not in record.layers:
        there = ", ".join(map(repr, record.layers)) or "none; inject_lora, inject_experts or load_adapter first"
        raise ValueError(f"there is no adapter {name!r}; the model has {there}")
    _activate(model, name)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes exactly what its base does; ValueError while an adapter is merged.

    With activation checkpointing the backward pass belongs in the context too: it computes the layers again.
    """
    record = _record(model)
    if record.merged:
        raise ValueError("an adapter is merged into the weights and cannot be switched off; unmerge_lora first")
    layers = [*adapted_layers(model).values(), *(layer for group in record.layers.values() for layer in group.values())]
    with temporarily("enabled", dict.fromkeys(layers, False)):
        yield


def merge_lora(model: nn.Module, *, universal_only: bool = False) -> None:
    """Add the active LoRA to the weights: W := round(W + (α/r) B A).

    The sum is in float32 (float64 stays float64), rounded once to W's dtype, layer by layer; codes become a weight in
    the dtype of their products. The layers become plain ones again, so `save_model` writes the model; the adapted ones
    wait for `unmerge_lora`.

    Routed experts depend on the input, so no one matrix equals them. `universal_only` merges those that are always on
    and leaves the others in place, the merged ones with a B of zero; `save_adapter` then writes an adapter of the
    merged base.
    """
    _check_can_change(model)
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no active adapter to merge; inject_lora, load_adapter or set_adapter first")
    experts = [layer for layer in layers.values() if isinstance(layer, ExpertLoRALinear)]
    if experts and not universal_only:
        raise ValueError(
            "experts cannot be merged, because what they add depends on the input; merge the expert that is always on "
            "with universal_only=True"
        )
    if universal_only and not any(layer.num_universal_experts for layer in experts):
        raise ValueError("universal_only is for experts that are always on, and the active adapter has none")
    try:
        for name, layer in layers.items():
            _record(model).merged[name] = layer
            _replace(model, name, _merged(layer))
    except BaseException:  # out of memory, most of all: half a merge helps nobody
        unmerge_lora(model)
        raise


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: the layers' weights and adapters are bit for bit what they were, whatever trained since."""
    record = _record(model)
    if not record.merged:
        raise ValueError("nothing is merged; merge_lora first")
    _check_not_split(model)
    for name, layer in record.merged.items():
        current = _linear(model, name)
        # The model may have moved since. Its dtype is the adapter's only where the user changed it.
        dtype = current.weight.dtype
        layer.to(current.weight.device, None if dtype == product_dtype(layer) else dtype)
        _replace(model, name, layer.train(current.training))
    record.merged.clear()


def _whole(model: nn.Module) -> nn.Module:
    """The model itself behind torch.compile's wrapper, which renames all modules."""
    return getattr(model, "_orig_mod", model)


def _record(model: nn.Module) -> _Adapters:
    return _whole(model).__dict__.setdefault("_adapters", _Adapters())


def _check_can_change(model: nn.Module) -> None:
    if _record(model).merged:
        raise ValueError("an adapter is merged into the weights; unmerge_lora first")
    _check_not_split(model)


def _check_not_split(model: nn.Module) -> None:
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError("FSDP2 has split the model, its layers cannot be changed now; do it before fully_shard")


def _activate(model: nn.Module, adapter: str | None) -> None:
    """Put an adapter's layers where the active one's are; where it has none, plain ones."""
    record = _record(model)
    if adapter == record.active:
        return
    leaving, coming = (record.layers.get(name or "", {}) for name in (record.active, adapter))
    for name in {**leaving, **coming}:
        current, layer = _linear(model, name), coming.get(name, record.plain[name])
        if isinstance(layer, LoRALinear):
            # Over half-precision weights it keeps its dtype, and over meta weights its device.
            weight, dtype = current.weight, product_dtype(current)
            layer.to(None if weight.is_meta else weight.device, None if dtype in HALF else dtype)
        layer.weight, layer.bias = current.weight, current.bias
        if isinstance(layer, LoRALinear | QuantizedLinear):
            layer.quantization = quantization_of(current)
        _replace(model, name, layer.train(current.training))
        # Let go of the base: its parameters may be replaced meanwhile, and nobody else should keep them.
        for attribute in ("weight", "bias"):
            current.register_parameter(attribute, None)
        if isinstance(current, LoRALinear | QuantizedLinear):
            current.quantization = None
        if isinstance(current, LoRALinear):
            current.packed = current.noise_stream = None
    record.active = adapter


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = _whole(model).get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, whose hooks it takes over."""
    former = vars(_whole(model).get_submodule(name))
    vars(module).update({key: value for key, value in former.items() if "_hooks" in key})
    _whole(model).set_submodule(name, module)


@torch.no_grad()
def _merged(layer: LoRALinear) -> nn.Linear:
    """A layer over W + (α/r) B A, or for experts, over W + (α/r) Σ_u B_u A_u with the other experts left."""
    dtype, quantization = product_dtype(layer), layer.quantization
    wide = torch.promote_types(dtype, torch.float32)
    total = layer.weight.to(wide, copy=True) if quantization is None else quantization.dense(layer.weight, wide)
    for a, b in layer._experts()[: layer.num_universal_experts]:
        total.addmm_(b.to(wide), a.to(wide), alpha=layer.scaling)
    kind: Any = Linear if quantization else layer.base_type
    if layer.num_specific_experts:
        merged = copy.deepcopy(layer)  # so that training leaves the original alone
        merged.quantization, merged.base_type = None, kind
        merged.lora_B[:, : layer.num_universal_experts * layer.rank] = 0
    else:
        merged = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    merged.weight, merged.bias = nn.Parameter(total.to(dtype), requires_grad=layer.weight.requires_grad), layer.bias
    return merged.train(layer.training)
