"""What the four stages share: the model with what trains in it, split over the ranks; the run; the result on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pedgpt import adapters, models, training
from pedgpt.data import ChatFormat, PackedRows, packed_chats
from pedgpt.kernels.quantized import QuantizedLinear, parameter_count
from pedgpt.losses import IGNORE_INDEX
from pedgpt.training import World
from pedgpt.training.loop import LossFunction

# These settings make a new adapter. One that training goes on from brings its own.
_OF_EXPERTS = ("num_specific_experts", "num_universal_experts", "top_k", "shared_A")
_OF_ADAPTERS = ("rank", "alpha", "rslora", "dropout", "target_modules", *_OF_EXPERTS)
ModelAndLoss = Callable[[Any, World], tuple[models.Transformer, LossFunction]]
SaveTokenizer = Callable[[Path], None]


@dataclass(kw_only=True)
class StageSettings(training.TrainingSettings):
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
    top_k: int = 0  # specific experts of a token that have a weight; 0: all; with 1 the router does not learn
    shared_A: bool = False  # all experts of a layer have one A
    balance: float = 0.0  # weight, in the loss, of how unequal the experts' shares of a micro-batch are; 0: none
    dropout: float = 0.0  # on the adapter's input
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])  # names or patterns of linear layers
    quantize: Literal["none", "int8", "nf4"] = "none"  # the frozen linear layers in 8 bits, in 4 bits, or as they are

    def check(self) -> None:
        super().check()
        changed = self.changed("from_adapter", "any_base", *_OF_ADAPTERS, "balance", "quantize")
        if self.adapter == "none" and changed:
            raise ValueError(f"{changed[0]} is set, but all parameters train; give --adapter lora or experts")
        if self.adapter == "lora" and (wrong := [name for name in changed if name in (*_OF_EXPERTS, "balance")]):
            raise ValueError(f"{wrong[0]} is set, but a LoRA has none; give --adapter experts")
        if self.balance < 0:
            raise ValueError(f"balance must not be negative, found {self.balance}")

    def changed(self, *names: str) -> list[str]:
        """Those of these settings that are not what they are by default."""
        defaults = {"target_modules": ["all-linear"], **vars(StageSettings)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    @property
    def stored_dtype(self) -> torch.dtype:
        """The weights' dtype: `weight_dtype` if they train, the computation's `dtype` if they are frozen."""
        return getattr(torch, self.weight_dtype if self.adapter == "none" else self.dtype)


def build(config: Any, world: World) -> models.Transformer:
    """The model on the meta device, with its adapter, split over the ranks; `fill` gives it the model's weights."""
    model = models.load_model(config.model, dtype=config.stored_dtype, device="meta", quantize=config.quantize)
    model.config.check_length(config.row_length)
    if config.adapter == "none" and any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(f"{config.model} is quantised, so its weights cannot train; give --adapter lora or experts")
    if config.adapter != "none":
        _add_adapter(model, config, told=world.is_main and not config.plan)
    model.activation_checkpointing = config.activation_checkpointing
    training.shard(model, model.model.layers, world, getattr(torch, config.dtype))
    return model


def _add_adapter(model: nn.Module, config: Any, told: bool) -> None:
    """Freeze the model and give it a new adapter, or the one to go on from; say so if it is to be `told`."""
    lora = config.adapter == "lora"
    if folder := config.from_adapter:
        names = adapters.load_adapter(model, folder)
        layers: list[Any] = list(adapters.adapted_layers(model).values())
        if lora == isinstance(layers[0], adapters.ExpertLoRALinear):
            kind, merged = ("experts", "") if lora else ("lora", ", or merge it with merge_lora.py first")
            raise ValueError(f"{folder} holds {kind}, but adapter is {config.adapter}; give --adapter {kind}{merged}")
        for name in config.changed(*_OF_ADAPTERS):
            found = [names] if name == "target_modules" else list({getattr(layer, name) for layer in layers})
            if found != [asked := getattr(config, name)]:
                there = f"{found[0]!s:.80}" if len(found) == 1 else "several numbers"
                raise ValueError(f"{name} is {asked}, but {folder} has {there}; leave out {name}")
    else:
        torch.manual_seed(config.seed)
        settings = {name: getattr(config, name) for name in _OF_ADAPTERS if not (lora and name in _OF_EXPERTS)}
        if not lora:
            settings["top_k"] = config.top_k or None
        names = (adapters.inject_lora if lora else adapters.inject_experts)(model, **settings)
    if told:
        trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        share = trains / parameter_count(model)
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        title = "LoRA" if lora else "experts"
        print(f"{title} on {len(names)} layers ({kinds}), {trains:,} trainable parameters ({share:.2%})")


def fill(model: models.Transformer, config: Any, world: World) -> None:
    """Read the model's weights; each rank keeps its own part. Frozen ones are quantised on the way, if asked for."""
    models.load_weights(model, config.model, dtype=config.stored_dtype, device=world.device)


def gated(loss_function: LossFunction, config: Any) -> LossFunction:
    """Wrap a loss: for experts, each row seeds the gates' noise, and the metrics report the mean gates.

    The noise does not depend on ranks or accumulation. The gates' means are over the tokens that carry loss.
    """

    def with_gates(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if config.adapter != "none":
            adapters.pack_adapters(model)
        if config.adapter != "experts":
            return loss_function(model, batch)
        adapters.set_noise_rows(model, config.seed, batch.row_ids)
        with adapters.record_gates(model, where=batch.labels != IGNORE_INDEX) as gates:
            loss, metrics = loss_function(model, batch)
        metrics = adapters.gate_metrics(gates, batch.weight) | metrics
        if config.balance and model.training:
            balance = adapters.balance_loss(gates) * batch.weight
            loss, metrics["gates/balance"] = loss + (config.balance * balance).to(loss.dtype), balance.detach()
        return loss, metrics

    return with_gates


def chat_rows(config: Any, world: World) -> tuple[ChatFormat, PackedRows, PackedRows]:
    """The chat format, and the conversations to train on and those held out: token ids on disk, packed into rows.

    The first rank makes the token ids, and all ranks map them.
    """
    today = training.settle_run(config.output, world)
    chat = config.load_chat(config.template_date or today, models.ModelConfig.from_hf)
    files = {"train": config.instructions, "heldout": config.heldout_instructions}
    rows, heldout = packed_chats(config, chat, lambda steps: training.run_on_main(steps, world), **files)
    return chat, rows, heldout


def train(
    config: Any, world: World, rows: Any, heldout: Any, model_and_loss: ModelAndLoss, save_tokenizer: SaveTokenizer,
    *, about: Iterable[str], prepare: Callable[[models.Transformer, str], None] | None = None, **options: Any,
) -> None:  # fmt: skip
    """Train on `rows`, evaluate on `heldout`, and write the result; nothing is done in a run that is finished already.

    `rows` have a length, `batch` and `fingerprint`. The main rank prints `about` first. `prepare` is called with the
    model as it comes in and its short name; `options` are those of `training.train`. The result is the trained model in
    OUTPUT/model, or the adapter in OUTPUT/adapter, with the tokenizer.
    """
    plan, whole = training.BatchPlan.from_settings(len(rows), config), config.adapter == "none"
    name = models.model_fingerprint(config.model)
    name += f"+{adapters.adapter_fingerprint(config.from_adapter)}" if config.from_adapter else ""
    data = f"{rows.fingerprint} on {name}"
    if training.is_finished(config, plan, data, world):
        return
    if world.is_main:
        print(*about, sep="\n")
    base = "" if whole else models.weights_fingerprint(config.model)  # the folder may be gone when the result is saved
    if config.from_adapter and not config.any_base:
        kind = models.weights_format(config.model, config.quantize)
        adapters.check_base(config.from_adapter, config.model, base, kind)

    model, loss_function = model_and_loss(config, world)
    fill(model, config, world)
    if prepare:
        prepare(model, name)

    evaluate = training.evaluation(model, heldout, loss_function, config, world)
    run = {"evaluate": evaluate, "fingerprint": data, **options}
    training.train(model, plan, rows.batch, loss_function, config, world, **run)

    folder = Path(config.output) / ("model" if whole else "adapter")

    def write(weights: Any) -> None:
        if whole:
            dtype = getattr(torch, config.save_dtype or config.dtype)
            models.save_model(model, folder, models.round_weights(weights, dtype, since=config.model))
        else:
            about_base = {"base_model": config.model, "base_weights": base}
            adapters.save_adapter(model, folder, **about_base, state_dict=dict(weights))
        save_tokenizer(folder)

    dtype = None if whole else getattr(torch, config.save_dtype or "float32")
    training.gather_weights(model, world, write, trainable_only=not whole, dtype=dtype)
    training.finish(config, plan, data, world)
