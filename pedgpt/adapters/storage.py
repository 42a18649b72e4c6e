"""Adapters on disk: PEFT's layout for LoRA, the same two files under our own type for experts, and the layout of the
published MoE-Adapter, which is read only."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pedgpt.adapters.experts import ExpertLoRALinear
from pedgpt.adapters.inject import (
    active_adapter,
    adapted_layers,
    adapter_names,
    inject_experts,
    inject_lora,
    linear_layers,
    set_adapter,
)
from pedgpt.adapters.lora import AdaptedLinear
from pedgpt.files import naming_full_disk, settle, write_json

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LORA, EXPERTS, PUBLISHED = "LORA", "PEDGPT_EXPERTS", "the published MoE-Adapter"
_PREFIX = "base_model.model."
_BASE = "pedgpt_base_weights"  # in the metadata of the weights' file, so that PEFT finds no key that it does not know
_KEYS = {
    LORA: re.compile(r"base_model\.model\.(.+)\.(lora_[AB]\.weight)"),
    EXPERTS: re.compile(r"base_model\.model\.(.+)\.((?:lora_[AB]|router|router_noise)\.weight)"),
    # The name of the adapter may follow, as in ".lora_moe_A.default".
    PUBLISHED: re.compile(r"base_model\.model\.(.+)\.(lora_moe_[AB]|lora_route\.weight|w_noise)(?:\.[^.]+)?"),
}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ROUTING = ("lora_route.weight", "w_noise")
_UNSUPPORTED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "alora_invocation_tokens", "layer_replication",
    "lora_bias", "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    base_weights: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors with every tensor of the active adapter.

    LoRA takes PEFT's layout; experts the same files with `"peft_type": "PEDGPT_EXPERTS"`. `base_model` is the name or
    folder of the base, `base_weights` the fingerprint of its weights, for `check_base`. `state_dict` replaces the
    model's own tensors, for weights gathered from several ranks. Raises ValueError, before anything is written, if the
    model has no adapters, if its layers differ in their settings, and for a tensor that is missing or not whole.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no active adapter to save; inject one or set_adapter, or unmerge_lora, first")
    first = next(iter(layers.values()))
    for name, layer in layers.items():
        if _settings(layer) != _settings(first):
            raise ValueError(
                f"{name} has {_settings(layer)}, the first layer {_settings(first)}; one adapter file holds one of them"
            )
    weights = _whole_weights(layers, state_dict)
    config: dict[str, Any] = {
        "peft_type": _kind(first),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "target_modules": sorted(layers),
        "bias": "none",
        "inference_mode": True,
    }
    if isinstance(first, ExpertLoRALinear):
        config["num_specific_experts"] = first.num_specific_experts
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}.tmp"
    try:
        with naming_full_disk(folder / WEIGHTS, sum(weight.nbytes for weight in weights.values())):
            save_file(weights, temporary, metadata={"format": "pt", **({_BASE: base_weights} if base_weights else {})})
        settle(temporary, folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(folder / CONFIG, config)


def _whole_weights(layers: Mapping[str, AdaptedLinear], state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of an adapter's file; ValueError for one that is missing or not whole."""
    weights = {}
    for name, layer in layers.items():
        for part, parameter in layer.adapter_parameters().items():
            key, weight = f"{name}.{part}", f"{part}.weight"
            if state_dict is not None and key not in state_dict:
                raise ValueError(
                    f"state_dict lacks {key}; give all of the adapter, gathered by pedgpt.training.gather_weights"
                )
            tensor = parameter if state_dict is None else state_dict[key]
            shape = _shapes(_kind(layer), layer, layer.rank, _experts(layer))[weight]
            if hasattr(tensor, "to_local") or tensor.is_meta or list(tensor.shape) != shape:
                found = list((tensor.to_local() if hasattr(tensor, "to_local") else tensor).shape)
                where = " on the meta device" if tensor.is_meta else ""
                raise ValueError(
                    f"{key}: found a part or placeholder of the shape {found}{where}, expected the whole {shape}; "
                    "gather it from all ranks with pedgpt.training.gather_weights and pass it in state_dict"
                )
            weights[f"{_PREFIX}{name}.{weight}"] = tensor.detach().cpu().contiguous()
    return weights


def load_adapter(
    model: nn.Module, folder: str | Path, *, name: str = "default", uniform_routing: bool = False
) -> list[str]:
    """Attach the adapter of `folder` to a model as `name`, fill and activate it; returns the adapted layers' names.

    The weights' keys say which layers are adapted. An adapter of that name, of the same layers, shapes and scale, is
    filled as it is. The published MoE-Adapter's layout is known by its keys; its code drops the routers when it saves,
    so its own reload routes at random. Here that is an error, unless `uniform_routing` asks for W_g = W_n = 0, equal
    gates of 1/N, wherever they are missing. Its layers compute with our gate: no noise in evaluation, float32.

    Raises ValueError, before the model is changed, for a missing or broken file, another adapter type or scale, what
    pedgpt cannot reproduce, a layer that the model lacks, and missing, unexpected or misshapen tensors.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    file, weights = _read_weights(folder)
    kind: str = config["peft_type"]
    if kind == LORA and any(_KEYS[PUBLISHED].fullmatch(key) for key in weights):
        kind = PUBLISHED
    experts = _number_of_experts(kind, config, file, weights)
    layers = linear_layers(model)
    tensors = _by_layer(file, weights, kind, layers)
    for path in _targets(config, layers):
        tensors.setdefault(path, {})
    names = [path for path in layers if path in tensors]
    shapes = {path: _shapes(kind, layers[path], config["r"], experts) for path in names}
    _check_tensors(file, tensors, shapes, uniform_routing)
    _attach_or_select(model, name, names, experts, config, folder / CONFIG)
    adapted = adapted_layers(model)
    with torch.no_grad():
        for path in names:
            own = _own_form(tensors[path]) if kind == PUBLISHED else tensors[path]
            for part, parameter in adapted[path].adapter_parameters().items():
                parameter.copy_(own[f"{part}.weight"])
    return names


def adapter_base(folder: str | Path) -> str:
    """The base model that the adapter says it was trained on; ValueError if it names none."""
    base = _read_config(Path(folder) / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{Path(folder) / CONFIG}: names no base_model_name_or_path")
    return base


def check_base(folder: str | Path, model: str | Path, weights: str) -> None:
    """Raise ValueError if an adapter was trained on other weights than those of the folder `model`.

    `weights` is their fingerprint. An adapter without a fingerprint (PEFT's, or an old one of ours) is accepted,
    with a warning if its base model has another name than `model`, or lies in another folder that is there.
    """
    folder, known = Path(folder), None
    base = _read_config(folder / CONFIG).get("base_model_name_or_path")
    with suppress(OSError, SafetensorError), safe_open(folder / WEIGHTS, "pt") as file:  # load_adapter reports these
        known = (file.metadata() or {}).get(_BASE)
    if known is None and isinstance(base, str):
        given = Path(model).resolve()
        if Path(base).name != given.name or (os.path.isdir(base) and Path(base).resolve() != given):
            warnings.warn(f"{folder} was trained on {base}; make sure that {model} is the same model", stacklevel=2)
    elif known not in (None, weights):
        raise ValueError(
            f"{folder}: this adapter was trained on other weights than those of {model}; its base model was {base} "
            f"(weights {known}, those given are {weights}). Give the model that it was trained on; or, if you know "
            "that it fits, --any_base true"
        )


def _by_layer(
    file: Path, weights: Mapping[str, Tensor], kind: str, layers: Mapping[str, nn.Linear]
) -> dict[str, dict[str, Tensor]]:
    """The tensors by layer and by the end of their key; ValueError for keys of another kind and unknown layers."""
    tensors: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for key, tensor in weights.items():
        match = _KEYS[kind].fullmatch(key)
        if match is None or match[2] in tensors.get(match[1], {}):
            unexpected.append(key)
        else:
            tensors.setdefault(match[1], {})[match[2]] = tensor
    if unexpected:
        raise ValueError(
            f"{file}: holds the unexpected {_listed(unexpected)}; pedgpt reads one adapter's matrices and no saved "
            "modules, embeddings, biases or magnitudes: train the adapter without them, or merge it with PEFT"
        )
    if not tensors:
        raise ValueError(f"{file}: holds no tensors; expected {_PREFIX}<layer>.lora_A.weight and so on")
    if absent := set(tensors) - set(layers):
        kinds = ", ".join(sorted({path.rpartition(".")[2] for path in layers}))
        raise ValueError(
            f"{file}: adapts {_listed(absent)}, which is no linear layer, or the head, of the model; it has {kinds}. "
            "Give the base model that the adapter was trained on"
        )
    return tensors


def _check_tensors(
    file: Path,
    tensors: Mapping[str, dict[str, Tensor]],
    shapes: Mapping[str, Mapping[str, list[int]]],
    uniform_routing: bool,
) -> None:
    """ValueError for what is missing or misshapen; with `uniform_routing`, zeros for missing routing matrices."""
    missing = [(path, part) for path in shapes for part in shapes[path] if part not in tensors[path]]
    routing = [item for item in missing if item[1] in _ROUTING]
    if lost := [f"{_PREFIX}{path}.{part}" for path, part in missing if part not in _ROUTING]:
        raise ValueError(f"{file}: lacks {_listed(lost)}; the file is incomplete, save or copy it again")
    if routing and not uniform_routing:
        raise ValueError(
            f"{file}: lacks the {len(routing)} routing matrices listed below. The published code drops them when it "
            "saves, so its own reload routes at random, and what the gates had learned is lost. Take them from the "
            "training run, or load with uniform_routing=True, which sets them to zero: without lora_route all experts "
            "get equal gates.\n  " + "\n  ".join(f"{_PREFIX}{path}.{part}" for path, part in routing)
        )
    for path, parts in tensors.items():
        for part, tensor in parts.items():
            if list(tensor.shape) != (shape := shapes[path][part]):
                key = f"{_PREFIX}{path}.{part}"
                raise ValueError(f"{file}: {key} has the shape {list(tensor.shape)}, the model needs {shape}")
    for path, part in routing:
        tensors[path][part] = torch.zeros(shapes[path][part])


def _attach_or_select(
    model: nn.Module, name: str, names: Sequence[str], experts: int, config: Mapping[str, Any], path: Path
) -> None:
    """Activate the adapter `name` of these layers and settings, and add it if the model has none of that name."""
    settings = {
        "peft_type": EXPERTS if experts else LORA,
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "use_rslora": config.get("use_rslora", False),
        "num_specific_experts": experts,
    }
    if name not in adapter_names(model):
        options: dict[str, Any] = {
            "rank": config["r"],
            "alpha": config["lora_alpha"],
            "dropout": config.get("lora_dropout", 0.0),
            "rslora": settings["use_rslora"],
            "target_modules": names,
            "name": name,
        }
        if experts:
            inject_experts(model, num_specific_experts=experts, **options)
        else:
            inject_lora(model, **options)
        return
    before = active_adapter(model)
    set_adapter(model, name)
    there = adapted_layers(model)
    found = _settings(next(iter(there.values()))) | {"layers": list(there)}
    for key, value in (settings | {"layers": list(names)}).items():
        if found[key] != value:
            set_adapter(model, before)
            raise ValueError(
                f"{path}: {key} is {value}, the model's adapter {name!r} has {found[key]}; load it under another name"
            )


def _kind(layer: AdaptedLinear) -> str:
    return EXPERTS if isinstance(layer, ExpertLoRALinear) else LORA


def _experts(layer: AdaptedLinear) -> int:
    return layer.num_specific_experts if isinstance(layer, ExpertLoRALinear) else 0


def _settings(layer: AdaptedLinear) -> dict[str, Any]:
    """What one adapter's layers have in common, under the names of the config."""
    settings = {"peft_type": _kind(layer), "r": layer.rank, "lora_alpha": layer.alpha, "use_rslora": layer.rslora}
    return settings | {"num_specific_experts": _experts(layer)}


def _shapes(kind: str, base: nn.Linear, rank: int, experts: int) -> dict[str, list[int]]:
    """Of one layer's tensors in a file of this kind, by the ends of their keys."""
    rows, size_in, size_out = (experts + 1) * rank, base.in_features, base.out_features
    if kind == PUBLISHED:
        return {
            "lora_moe_A": [experts + 1, size_in, rank],
            "lora_moe_B": [experts + 1, rank, size_out],
            "lora_route.weight": [experts, size_in],
            "w_noise": [size_in, experts],
        }
    shapes = {"lora_A.weight": [rows, size_in], "lora_B.weight": [size_out, rows]}
    if kind == EXPERTS:
        shapes |= {"router.weight": [experts, size_in], "router_noise.weight": [experts, size_in]}
    return shapes


def _own_form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published layer's tensors under our names and in our shapes; its expert 0 is the universal one, as ours is."""
    return {
        "lora_A.weight": rearrange(tensors["lora_moe_A"], "e d r -> (e r) d"),
        "lora_B.weight": rearrange(tensors["lora_moe_B"], "e r d -> d (e r)"),
        "router.weight": tensors["lora_route.weight"],
        "router_noise.weight": tensors["w_noise"].T,
    }


def _number_of_experts(kind: str, config: Mapping[str, Any], file: Path, weights: Mapping[str, Tensor]) -> int:
    """How many specific experts each layer has; 0 for LoRA."""
    if kind != PUBLISHED:
        return config["num_specific_experts"] if kind == EXPERTS else 0
    counts = {tensor.shape[0] for key, tensor in weights.items() if ".lora_moe_" in key and tensor.ndim == 3}
    counts |= {config["lora_nums"]} if "lora_nums" in config else set()
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            f"{file}: lora_moe_A, lora_moe_B and the config's lora_nums must agree on the number of experts, the "
            f"universal one and at least one specific; found {sorted(counts) or 'none'}"
        )
    return counts.pop() - 1


def _targets(config: Mapping[str, Any], layers: Mapping[str, nn.Linear]) -> set[str]:
    """The layers that a list of target_modules names, as PEFT reads it: a file without their weights is incomplete."""
    targets = config.get("target_modules")
    partly = any(config.get(key) is not None for key in ("exclude_modules", "layers_to_transform"))
    if partly or not isinstance(targets, list):
        return set()  # the keys alone say which
    return {path for path in layers if any(path == t or (t not in layers and path.endswith(f".{t}")) for t in targets)}


def _listed(keys: Collection[str]) -> str:
    return f"{', '.join(sorted(keys)[:5])} ({len(keys)} in all)"


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The weights' file and its tensors on the CPU; PEFT prefers safetensors to .bin, and so do we."""
    file = folder / (BIN if (folder / BIN).exists() and not (folder / WEIGHTS).exists() else WEIGHTS)
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True) if file.suffix == ".bin" else load_file(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{file}: holds more than tensors, or is damaged; only safe files are read") from None
    except Exception as error:  # a damaged .bin fails in a dozen ways
        raise ValueError(f"{file}: cannot be read, the file may be truncated ({error})") from None
    if not isinstance(weights, dict):
        raise ValueError(f"{file}: expected tensors by name, found {type(weights).__name__}")
    for key, tensor in weights.items():
        # A .bin may also hold sparse tensors, shards and tensors without values, and other things than tensors.
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
        if not (isinstance(key, str) and plain and tensor.dtype in _DTYPES):
            found = str(tensor.dtype).removeprefix("torch.") if plain else f"a special {type(tensor).__name__}"
            raise ValueError(f"{file}: {key} is {found}; expected a whole tensor of float64, 32, 16 or bfloat16")
    return file, weights


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
    if kind not in (LORA, EXPERTS):
        raise ValueError(f"{path}: peft_type {kind!r} is not supported; expected {LORA!r} or {EXPERTS!r}")
    needed = ["r", "lora_alpha"] + (["num_specific_experts"] if kind == EXPERTS else [])
    missing = [key for key in needed if config.get(key) is None]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    for key, kinds, least in (
        ("r", int, 1),
        ("num_specific_experts", int, 1),
        ("lora_nums", int, 2),
        ("lora_alpha", int | float, -(2**53)),
        ("lora_dropout", int | float, 0),
    ):
        value = config.get(key, 2)
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value < 2**53:
            bound = f" of at least {least}" if least >= 0 else ""
            raise ValueError(f"{path}: {key} must be a number{bound}, found {value!r}")
    if config.get("lora_dropout", 0) >= 1:
        raise ValueError(f"{path}: lora_dropout must be below 1, found {config['lora_dropout']}")
    if not isinstance(config.get("use_rslora", False), bool):
        raise ValueError(f"{path}: use_rslora must be true or false, found {config['use_rslora']!r}")
    targets = config.get("target_modules") or ""  # PEFT may leave it to the keys
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise ValueError(f"{path}: target_modules must be names, found {targets!r}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{path}: {key} is set; pedgpt cannot reproduce such an adapter")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {config['bias']!r}; pedgpt cannot reproduce an adapter that trained biases")
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base model's weights; "
            "convert the adapter to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    return config
