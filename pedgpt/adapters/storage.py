"""Adapters on disk: PEFT's layout for LoRA, and the same two files under our own type for experts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pedgpt.adapters.experts import ExpertLoRALinear
from pedgpt.adapters.inject import adapted_layers, inject_experts, inject_lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXPERTS = "PEDGPT_EXPERTS"
_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "alora_invocation_tokens",
)  # fmt: skip


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors with every tensor that trains.

    LoRA takes PEFT's layout; experts the same files with `"peft_type": "PEDGPT_EXPERTS"`. `state_dict` replaces the
    model's own tensors, for weights gathered from several ranks. Raises ValueError if the model has no adapters.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to save; inject_lora or inject_experts first")
    weights = {
        f"{_PREFIX}{name}.{part}.weight": (state_dict[f"{name}.{part}"] if state_dict is not None else tensor)
        for name, layer in layers.items()
        for part, tensor in layer.adapter_parameters().items()
    }
    first = next(iter(layers.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": sorted(layers),
        "bias": "none",
        "inference_mode": True,
    }
    if isinstance(first, ExpertLoRALinear):
        config |= {"peft_type": EXPERTS, "num_specific_experts": first.num_specific_experts}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file({k: t.detach().cpu().contiguous() for k, t in weights.items()}, temporary, metadata={"format": "pt"})
    _commit(temporary, folder / WEIGHTS)
    temporary = folder / f".{CONFIG}.tmp"
    temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _commit(temporary, folder / CONFIG)


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Attach the adapter of `folder` to a base model and fill it; returns the names of the adapted layers.

    A model that carries adapters of the same shape and alpha already is filled as it is. Raises ValueError for a
    missing or broken file, another adapter type or alpha, a layer that the model lacks, and missing, unexpected or
    misshapen tensors.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    try:
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise ValueError(f"{folder / WEIGHTS}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS}: cannot be read, the file may be truncated ({error})") from None
    if not adapted_layers(model):
        settings: dict[str, Any] = {
            "rank": config["r"],
            "alpha": config["lora_alpha"],
            "dropout": config.get("lora_dropout", 0.0),
            "target_modules": config["target_modules"],
        }
        if config["peft_type"] == EXPERTS:
            inject_experts(model, num_specific_experts=config["num_specific_experts"], **settings)
        else:
            inject_lora(model, **settings)
    layers = adapted_layers(model)
    targets = {
        f"{_PREFIX}{name}.{part}.weight": parameter
        for name, layer in layers.items()
        for part, parameter in layer.adapter_parameters().items()
    }
    missing, unexpected = sorted(set(targets) - set(weights)), sorted(set(weights) - set(targets))
    for label, keys in (("lacks", missing), ("holds the unexpected", unexpected)):
        if keys:
            raise ValueError(f"{folder / WEIGHTS}: {label} {', '.join(keys[:5])} ({len(keys)} in all)")
    for key, parameter in targets.items():
        if weights[key].shape != parameter.shape:
            found, needed = list(weights[key].shape), list(parameter.shape)
            raise ValueError(f"{folder / WEIGHTS}: {key} has the shape {found}, the model needs {needed}")
    for name, layer in layers.items():
        if layer.alpha != config["lora_alpha"]:
            raise ValueError(f"{folder / CONFIG}: lora_alpha is {config['lora_alpha']}, {name} has alpha {layer.alpha}")
    for key, parameter in targets.items():
        parameter.data.copy_(weights[key])
    return list(layers)


def adapter_base(folder: str | Path) -> str:
    """The base model that the adapter says it was trained on; ValueError if it names none."""
    base = _read_config(Path(folder) / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{Path(folder) / CONFIG}: names no base_model_name_or_path")
    return base


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected an adapter folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}")
    kind = config.get("peft_type")
    if kind not in ("LORA", EXPERTS):
        raise ValueError(f"{path}: peft_type {kind!r} is not supported; expected 'LORA' or {EXPERTS!r}")
    needed = ["r", "lora_alpha", "target_modules"] + (["num_specific_experts"] if kind == EXPERTS else [])
    missing = [key for key in needed if config.get(key) is None]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    for key, kinds in (
        ("r", int),
        ("num_specific_experts", int),
        ("lora_alpha", int | float),
        ("lora_dropout", int | float),
    ):
        if key in config and (not isinstance(config[key], kinds) or isinstance(config[key], bool)):
            raise ValueError(f"{path}: {key} must be a number, found {config[key]!r}")
    targets = config["target_modules"]
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise ValueError(f"{path}: target_modules must be names, found {targets!r}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{path}: {key} is set; pedgpt cannot reproduce such an adapter")
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base model's weights; "
            "convert the adapter to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def _commit(temporary: Path, path: Path) -> None:
    """Sync a finished temporary file to disk and give it its name."""
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
