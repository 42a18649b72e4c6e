"""What the four stages share: the model with what trains in it, split over the ranks, and the result on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pedgpt.adapters import (
    ExpertLoRALinear,
    adapted_layers,
    adapter_fingerprint,
    balance_loss,
    check_base,
    gate_metrics,
    inject_experts,
    inject_lora,
    load_adapter,
    pack_adapters,
    record_gates,
    save_adapter,
    set_noise_rows,
)
from pedgpt.kernels.quantized import QuantizedLinear, parameter_count
from pedgpt.losses import IGNORE_INDEX
from pedgpt.models import (
    Transformer,
    load_model,
    load_weights,
    model_fingerprint,
    round_weights,
    save_model,
    weights_fingerprint,
    weights_format,
)
from pedgpt.training import TrainingSettings, World, gather_weights, shard
from pedgpt.training.loop import LossFunction

# These settings make a new adapter. One that training goes on from brings its own.
_OF_EXPERTS = ("num_specific_experts", "num_universal_experts", "top_k", "shared_A")
_OF_ADAPTERS = ("rank", "alpha", "rslora", "dropout", "target_modules", *_OF_EXPERTS)


@dataclass(kw_only=True)
class StageSettings(TrainingSettings):
    """A stage trains all parameters of a model, or an adapter while the model is frozen."""

    model: str  # folder of the model to start from
    row_length: int = 4096  # tokens in a row
    adapter: Literal["none", "lora", "experts"] = "none"  # what trains: all parameters (none), a LoRA or experts
    from_adapter: str = ""  # folder of such an adapter of the model, to go on from
    any_base: bool = False  # go on from it although it was trained on another model
    rank: int = 8  # of the LoRA, or of each expert
    alpha: float = 16.0  # the adapter is scaled by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank) instead
    num_specific_experts: int | dict = 3  # behind the gate; or by layers, as { "*.layers.[0-9].*" = 2, "*" = 4 }
    num_universal_experts: int = 1  # always on, beside those
    top_k: int = 0  # specific experts of a token that have a weight; 0: all
    shared_A: bool = False  # all experts of a layer have one A
    balance: float = 0.0  # weight, in the loss, of how unequal the experts' shares of a micro-batch are; 0: none
    dropout: float = 0.0  # on the adapter's input
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])  # names or patterns of linear layers
    quantize: Literal["none", "int8", "nf4"] = "none"  # the frozen linear layers in 8 bits, in 4 bits, or as they are
    quantized_copy: str = ""  # folder that keeps the quantised model, so that further runs need not make it

    def check(self) -> None:
        super().check()
        names = ("from_adapter", "any_base", *_OF_ADAPTERS, "balance", "quantize")
        changed = [name for name in names if getattr(self, name) != self._default(name)]
        if self.adapter == "none" and changed:
            raise ValueError(f"{changed[0]} is set, but all parameters train; give --adapter lora or experts")
        if self.adapter == "lora" and (wrong := [name for name in changed if name in (*_OF_EXPERTS, "balance")]):
            raise ValueError(f"{wrong[0]} is set, but a LoRA has none; give --adapter experts")
        if self.balance < 0:
            raise ValueError(f"balance must not be negative, found {self.balance}")
        if self.quantized_copy and self.quantize == "none":
            raise ValueError("quantized_copy is set, but nothing is quantised; give --quantize int8 or nf4")

    def _default(self, name: str) -> Any:
        (found,) = [f for f in dataclasses.fields(self) if f.name == name]
        return found.default if found.default is not dataclasses.MISSING else found.default_factory()  # type: ignore

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the model's weights: `weight_dtype` if they train, that of the computation if they are frozen."""
        return getattr(torch, self.weight_dtype if self.adapter == "none" else self.dtype)


@functools.cache
def _base_weights(folder: str) -> str:
    """The fingerprint, kept from before training, because the folder may be gone when the result is saved."""
    return weights_fingerprint(folder)


def build(config: Any, world: World) -> Transformer:
    """The model on the meta device, with its adapter, split over the ranks; `fill` gives it the model's weights."""
    model = load_model(config.model, dtype=config.stored_dtype, device="meta", quantize=config.quantize)
    model.config.check_length(config.row_length)
    if config.adapter == "none" and any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(f"{config.model} is quantised, so its weights cannot train; give --adapter lora or experts")
    if config.adapter != "none":
        _add_adapter(model, config, told=world.is_main and not config.plan)
    model.activation_checkpointing = config.activation_checkpointing
    try:
        shard(model, model.model.layers, world, getattr(torch, config.dtype))
    except RuntimeError as error:  # An older FSDP2 wants gradients of all parameters, and codes have none.
        if "floating point" not in str(error):
            raise
        found = f"torch {torch.__version__} cannot split a quantised model over ranks"
        raise ValueError(f"{found}; update torch, train on one process, or give --quantize none") from None
    return model


def _add_adapter(model: nn.Module, config: Any, told: bool) -> None:
    """Freeze the model and give it a new adapter, or the one to go on from; say so if it is to be `told`."""
    if config.from_adapter:
        if not (config.any_base or config.plan):
            kind = weights_format(config.model, config.quantize)
            check_base(config.from_adapter, config.model, _base_weights(config.model), kind)
        names = load_adapter(model, config.from_adapter)
        layers = list(adapted_layers(model).values())
        kind = "experts" if isinstance(layers[0], ExpertLoRALinear) else "lora"
        if kind != config.adapter:
            way = f"give --adapter {kind}" + ", or merge it with merge_lora.py first" * (kind == "lora")
            raise ValueError(f"{config.from_adapter} holds {kind}, but adapter is {config.adapter}; {way}")
        for name in _OF_ADAPTERS:
            found = {getattr(layer, name, None) for layer in layers}
            own: Any = names if name == "target_modules" else found.pop() if len(found) == 1 else "several numbers"
            if (asked := getattr(config, name)) not in (config._default(name), own):
                there = "others" if name == "target_modules" else own
                raise ValueError(f"{name} is {asked}, but {config.from_adapter} has {there}; leave out {name}")
    else:
        torch.manual_seed(config.seed)
        settings = {name: getattr(config, name) for name in _OF_ADAPTERS if name not in _OF_EXPERTS}
        if config.adapter == "experts":
            settings |= {name: getattr(config, name) for name in _OF_EXPERTS} | {"top_k": config.top_k or None}
        names = (inject_lora if config.adapter == "lora" else inject_experts)(model, **settings)
    if told:
        trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        share = trains / parameter_count(model)
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        title = {"lora": "LoRA", "experts": "experts"}[config.adapter]
        print(f"{title} on {len(names)} layers ({kinds}), {trains:,} trainable parameters ({share:.2%})")


def fill(model: Transformer, config: Any, world: World) -> None:
    """Read the model's weights; each rank keeps its own part. Frozen ones are quantised on the way, if asked for."""
    copy = config.quantized_copy or None
    load_weights(model, config.model, dtype=config.stored_dtype, device=world.device, quantized_copy=copy)


def gated(loss_function: LossFunction, config: Any) -> LossFunction:
    """The loss for any model: where it has experts, the row decides the gates' noise, and metrics tell their weights.

    The noise does not depend on ranks or accumulation. The gates' means are over the tokens that carry loss.
    """

    def with_gates(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if config.adapter != "none":
            pack_adapters(model)
        if config.adapter != "experts":
            return loss_function(model, batch)
        set_noise_rows(model, config.seed, batch.row_ids)
        with record_gates(model, where=batch.labels != IGNORE_INDEX) as gates:
            loss, metrics = loss_function(model, batch)
        metrics = gate_metrics(gates, batch.weight) | metrics
        if config.balance and model.training:
            balance = balance_loss(gates) * batch.weight
            loss, metrics["gates/balance"] = loss + (config.balance * balance).to(loss.dtype), balance.detach()
        return loss, metrics

    return with_gates


def origin(config: Any) -> str:
    """A short name of the weights that training starts from."""
    found = model_fingerprint(config.model)
    _base_weights.cache_clear()  # A folder that was written again has other weights.
    if config.adapter != "none":
        _base_weights(config.model)
    if not config.from_adapter:
        return found
    return f"{found}+{adapter_fingerprint(config.from_adapter)}"


def save_result(model: Transformer, config: Any, world: World, save_tokenizer: Callable[[Path], None]) -> None:
    """Write the trained model to OUTPUT/model, or the adapter to OUTPUT/adapter, with its tokenizer and chat format."""
    whole = config.adapter == "none"
    folder = Path(config.output) / ("model" if whole else "adapter")

    def write(weights: Any) -> None:
        if whole:
            rounded = round_weights(weights, getattr(torch, config.save_dtype or config.dtype), since=config.model)
            save_model(model, folder, rounded)
        else:
            base = {"base_model": config.model, "base_weights": _base_weights(config.model)}
            save_adapter(model, folder, **base, state_dict=dict(weights))
        save_tokenizer(folder)

    dtype = None if whole else getattr(torch, config.save_dtype or "float32")
    gather_weights(model, world, write, trainable_only=not whole, dtype=dtype)
