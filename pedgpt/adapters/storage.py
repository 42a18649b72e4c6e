"""Save and load adapters: a LoRA in PEFT's layout, experts in the same two files under a type of our own."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pedgpt.adapters.experts import ExpertLoRALinear
from pedgpt.adapters.inject import adapted_layers, inject, linear_layers
from pedgpt.adapters.lora import AdaptedLinear, LoRALinear
from pedgpt.adapters.published import CONFIG, EXPERTS, LORA, PREFIX, SETTINGS, WEIGHTS, fill, read_adapter, read_config
from pedgpt.files import atomic_write, write_json

# In the metadata of the weights' file, so that PEFT finds no key that it does not know.
_BASE, _FORMAT = "pedgpt_base_weights", "pedgpt_base_format"


def save_adapter(
    model: nn.Module, folder: str | Path, *, base_model: str | None = None, base_weights: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write adapter_config.json and adapter_model.safetensors with every tensor of the active adapter.

    LoRA takes PEFT's layout; experts the same files with `"peft_type": "PEDGPT_EXPERTS"`, and the name of a subclass as
    `layer_type`. Their number may differ between layers. `base_model` is the name or
    folder of the base, `base_weights` the fingerprint of its weights, for `check_base`; the format of a quantised base
    is stored with it. `state_dict` replaces the model's own tensors, for weights gathered from several ranks. Raises
    ValueError, before anything is written, if the model has no adapters, if its layers differ in their settings, and
    for a tensor that is missing or not whole.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no active adapter to save; inject one or set_adapter, or unmerge_lora, first")
    first = next(iter(layers.values()))
    settings = _settings(first)
    if any(_settings(layer) != settings for layer in layers.values()):
        raise ValueError(f"the layers differ in their settings; one file holds those of the first, {settings}")
    numbers = {n: layer.num_specific_experts for n, layer in layers.items() if isinstance(layer, ExpertLoRALinear)}
    if numbers:
        same = len(set(numbers.values())) == 1
        settings["num_specific_experts"] = next(iter(numbers.values())) if same else numbers
    weights = {}
    for path, layer in layers.items():
        for parameter, own in layer.adapter_parameters().items():
            tensor = own if state_dict is None else state_dict.get(f"{path}.{parameter}")
            whole = tensor is not None and tensor.shape == own.shape and tensor.numel()
            if not whole or tensor is None or tensor.is_meta or hasattr(tensor, "to_local"):
                raise ValueError(
                    f"{path}.{parameter}: found nothing or a part of it, expected the whole {list(own.shape)}; gather "
                    "it from all ranks with pedgpt.training.gather_weights and pass it in state_dict"
                )
            weights[f"{PREFIX}{path}.{parameter}.weight"] = tensor.detach().cpu().contiguous()
    config = settings | {
        "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "target_modules": sorted(layers),
        "bias": "none", "inference_mode": True,
    }  # fmt: skip
    folder = Path(folder)
    quantization = getattr(first, "quantization", None)
    known = {_BASE: base_weights, _FORMAT: quantization and quantization.kind}
    content = save(weights, {"format": "pt"} | {key: value for key, value in known.items() if value})
    with atomic_write(folder / WEIGHTS, "wb", size=len(content)) as file:
        file.write(content)
    write_json(folder / CONFIG, config)


def _settings(layer: AdaptedLinear) -> dict[str, Any]:
    """What one adapter's layers have in common, under the names of the config."""
    found = {key: getattr(layer, own) for key, own in SETTINGS.items() if hasattr(layer, own)}
    kind = EXPERTS if found.pop("num_specific_experts", 0) else LORA
    own_type = {} if type(layer) in (ExpertLoRALinear, LoRALinear) else {"layer_type": type(layer).__name__}
    return {"peft_type": kind} | own_type | found


def load_adapter(
    model: nn.Module, folder: str | Path, *, name: str = "default", uniform_routing: bool = False,
    layer_type: type[ExpertLoRALinear] = ExpertLoRALinear,
) -> list[str]:  # fmt: skip
    """Attach the adapter of `folder` to a model as `name`, fill and activate it; returns the adapted layers' names.

    The weights' keys say which layers are adapted. The published MoE-Adapter's layout is known by its keys; its code
    drops the routers when it saves, so its own reload routes at random. Here that is an error, unless `uniform_routing`
    asks for W_g = W_n = 0, equal gates of 1/N, wherever they are missing. Its layers compute with our gate: no noise in
    evaluation, float32. Experts with a gate of their own need its `layer_type`, as `inject_experts` does.

    Raises ValueError, before the model is changed, for a missing or broken file, what pedgpt cannot reproduce, a name
    that is taken, a layer that the model lacks, and missing, unexpected or misshapen tensors.
    """
    folder = Path(folder)
    config = read_config(folder)
    saved = config.get("layer_type", ExpertLoRALinear.__name__)
    if config["peft_type"] == EXPERTS and saved != layer_type.__name__:
        raise ValueError(f"{folder}: holds layers of type {saved}; give load_adapter that class as layer_type")
    config, tensors = read_adapter(folder, linear_layers(model), uniform_routing)
    settings = {own: config[key] for key, own in SETTINGS.items() if key in config}
    kind = LoRALinear if config["peft_type"] == LORA else layer_type

    def fill_all(layers: Mapping[str, AdaptedLinear]) -> None:
        for path, layer in layers.items():
            fill(path, layer.adapter_parameters(), tensors[path])

    try:
        return inject(model, list(tensors), name, kind, settings, fill_all)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None


def experts_from_adapters(
    model: nn.Module, folders: Sequence[str | Path], *, name: str = "default", **settings: Any
) -> list[str]:
    """Make trained LoRAs of equal rank the specific experts of a new mixture; returns the adapted layers' names.

    With all of a token's weight on expert j, the model computes what LoRA j does. Routers start at zero, so until they
    are trained each has the weight 1/N. `settings` are those of the layer class. By default no expert is universal; a
    new universal one changes nothing before it is trained. Where a LoRA leaves a layer alone, its expert's B is
    zero. Raises ValueError as `load_adapter` does, and for folders that hold no LoRAs of one rank.
    """
    linears = linear_layers(model)
    loras = [read_adapter(Path(folder), linears) for folder in folders]
    kinds = [f"{config['peft_type']} of rank {config['r']}" for config, _ in loras]
    if len(set(kinds)) != 1 or not kinds[0].startswith(f"{LORA} ") or settings.get("shared_A"):
        there = ", ".join(kinds) or "none"
        raise ValueError(f"experts need LoRAs of one rank, each with an A of its own; found {there}")
    common = {own: loras[0][0][key] for key, own in SETTINGS.items() if key in loras[0][0]}
    settings = common | {"num_universal_experts": 0} | settings | {"num_specific_experts": len(loras)}
    kind = settings.pop("layer_type", ExpertLoRALinear)

    def fill_experts(layers: Mapping[str, Any]) -> None:
        for number, (config, tensors) in enumerate(loras):
            scaling = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
            for path, found in tensors.items():
                a, b = layers[path].specific_experts[number]
                factors = {"lora_B": scaling / layers[path].scaling}
                scaled = {name: tensor * factors.get(name, 1) for name, tensor in found.items()}
                fill(path, {"lora_A": a, "lora_B": b}, scaled)

    paths = [path for path in linears if any(path in tensors for _, tensors in loras)]
    return inject(model, paths, name, kind, settings, fill_experts)


def adapter_base(folder: str | Path) -> str:
    """The base model that the adapter says it was trained on; ValueError if it names none."""
    base = read_config(Path(folder)).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{Path(folder) / CONFIG}: names no base_model_name_or_path")
    return base


def adapter_fingerprint(folder: str | Path) -> str:
    """A short name of an adapter's files."""
    files = sorted(Path(folder).glob("adapter_*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def check_base(folder: str | Path, model: str | Path, weights: str, quantize: str = "none") -> None:
    """Raise ValueError if an adapter was trained on other weights than those of the folder `model`.

    `weights` is their fingerprint, and `quantize` says in which format they are used; another one than that of the
    training is a warning. An adapter without a fingerprint (PEFT's, or an old one of ours) is accepted,
    with a warning if its base model has another name than `model`, or lies in another folder that is there.
    """
    folder, known, trained = Path(folder), None, "none"
    base = read_config(folder).get("base_model_name_or_path")
    with suppress(OSError, SafetensorError), safe_open(folder / WEIGHTS, "pt") as file:  # load_adapter reports these
        known, trained = (file.metadata() or {}).get(_BASE), (file.metadata() or {}).get(_FORMAT, "none")
    if trained != quantize:
        kinds = {"none": "unquantised weights"}
        warnings.warn(
            f"{folder} was trained on {kinds.get(trained, trained)}, and is used with {kinds.get(quantize, quantize)}: "
            f"its answers may differ; --quantize {trained} gives those of the training",
            stacklevel=2,
        )
    if known is None and isinstance(base, str):
        given = Path(model).resolve()
        if Path(base).name != given.name or (os.path.isdir(base) and Path(base).resolve() != given):
            warnings.warn(f"{folder} was trained on {base}; make sure that {model} is the same model", stacklevel=2)
    elif known not in (None, weights):
        raise ValueError(
            f"{folder}: this adapter was trained on other weights than those of {model}; its base model was {base} "
            f"(weights {known}, not {weights}). Give that model; or, if you know that it fits, --any_base true"
        )
