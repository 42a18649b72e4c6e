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
from pedgpt.adapters.lora import LoRALinear
from pedgpt.adapters.published import CONFIG, EXPERTS, LORA, PREFIX, SETTINGS, WEIGHTS, fill, read_adapter, read_config
from pedgpt.files import atomic_write, write_json

# In the metadata of the weights' file, so that PEFT finds no key that it does not know.
_BASE, _FORMAT = "pedgpt_base_weights", "pedgpt_base_format"


def save_adapter(
    model: nn.Module, folder: str | Path, *, base_model: str | None = None, base_weights: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write adapter_config.json and adapter_model.safetensors with every tensor of the active adapter.

    `base_model` is the name or folder of the base, `base_weights` the fingerprint of its weights, for `check_base`; the
    format of a quantised base is stored with it. `state_dict` replaces the model's own tensors, for weights gathered
    from several ranks. Raises ValueError, before anything is written, if the model has no adapters, if its layers
    differ in more settings than their number of experts, and for a tensor that is missing or not whole.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no active adapter to save; inject one or set_adapter, or unmerge_lora, first")
    first = next(iter(layers.values()))
    settings = _settings(first)
    if any(_settings(layer) != settings for layer in layers.values()):
        raise ValueError(f"the layers differ in their settings; one file holds those of the first, {settings}")
    numbers = {name: layer.num_specific_experts for name, layer in layers.items()}
    if number := first.num_specific_experts:
        settings["num_specific_experts"] = number if set(numbers.values()) == {number} else numbers
    weights = {}
    for path, layer in layers.items():
        for parameter, own in layer.adapter_parameters().items():
            tensor = own if state_dict is None else state_dict.get(f"{path}.{parameter}")
            whole = tensor is not None and tensor.shape == own.shape and tensor.numel() and not tensor.is_meta
            if tensor is None or not whole or hasattr(tensor, "to_local"):
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
    known = {_BASE: base_weights, _FORMAT: first.quantization and first.quantization.kind}
    content = save(weights, {"format": "pt"} | {key: value for key, value in known.items() if value})
    with atomic_write(folder / WEIGHTS, "wb", size=len(content)) as file:
        file.write(content)
    write_json(folder / CONFIG, config)


def _settings(layer: LoRALinear) -> dict[str, Any]:
    """What one adapter's layers have in common, under the names of the config."""
    found = {key: vars(layer)[own] for key, own in SETTINGS.items() if own in vars(layer)}
    kind = EXPERTS if found.pop("num_specific_experts", 0) else LORA
    own_type = {} if type(layer) in (ExpertLoRALinear, LoRALinear) else {"layer_type": type(layer).__name__}
    return {"peft_type": kind} | own_type | found


def load_adapter(
    model: nn.Module, folder: str | Path, *, name: str = "default", uniform_routing: bool = False,
    layer_type: type[ExpertLoRALinear] = ExpertLoRALinear,
) -> list[str]:  # fmt: skip
    """Attach the adapter of `folder` to a model as `name`, fill and activate it; returns the adapted layers' names.

    The weights' keys say which layers are adapted, and whose layout they are in. Routing matrices that another code did
    not save are an error, unless `uniform_routing` asks for W_g = W_n = 0, equal gates of 1/N, in their place. Experts
    with a gate of their own need its `layer_type`, as `inject_experts` does.

    Raises ValueError, before the model is changed, for a missing or broken file, what pedgpt cannot reproduce, a name
    that is taken, a layer that the model lacks, and missing, unexpected or misshapen tensors.
    """
    config = read_config(folder := Path(folder))
    saved = config.get("layer_type", ExpertLoRALinear.__name__)
    if config["peft_type"] == EXPERTS and saved != layer_type.__name__:
        raise ValueError(f"{folder}: holds layers of type {saved}; give load_adapter that class as layer_type")
    lora, settings, tensors = read_adapter(folder, linear_layers(model), uniform_routing)
    try:
        return inject(
            model, list(tensors), name, LoRALinear if lora else layer_type, settings,
            lambda path, layer: fill(path, layer.adapter_parameters(), tensors[path]),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None


def experts_from_adapters(
    model: nn.Module, folders: Sequence[str | Path], *, name: str = "default", **settings: Any
) -> list[str]:
    """Make trained LoRAs of equal rank the specific experts of a new mixture; returns the adapted layers' names.

    With all of a token's weight on expert j, the model computes what LoRA j does; until the routers are trained, each
    has the weight 1/N. `settings` are those of `inject_experts`, but by default no expert is universal. Raises
    ValueError as `load_adapter` does, and for folders that hold no LoRAs of one rank.
    """
    linears = linear_layers(model)
    loras = [read_adapter(Path(folder), linears) for folder in folders]
    kinds = [f"{LORA if lora else EXPERTS} of rank {own['rank']}" for lora, own, _ in loras]
    if len(set(kinds)) != 1 or not loras[0][0] or settings.get("shared_A"):
        there = ", ".join(kinds) or "none"
        raise ValueError(f"experts need LoRAs of one rank, each with an A of its own; found {there}")
    settings = loras[0][1] | {"num_universal_experts": 0} | settings | {"num_specific_experts": len(loras)}
    kind = settings.pop("layer_type", ExpertLoRALinear)

    def fill_experts(path: str, layer: Any) -> None:
        for (_, own, tensors), (a, b) in zip(loras, layer.specific_experts, strict=True):
            if path in tensors:
                fill(path, {"lora_A": a, "lora_B": b}, tensors[path])
                b.detach().mul_(own["alpha"] / own["rank"] ** (0.5 if own.get("rslora") else 1) / layer.scaling)

    paths = [path for path in linears if any(path in tensors for _, _, tensors in loras)]
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
