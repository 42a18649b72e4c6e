"""Read an adapter's two files, whoever published them: PEFT's LoRA, our experts, the published MoE-Adapter.

A key is `base_model.model.<layer>.<part>`. The layouts differ in the parts and their shapes: rank r, U universal and N
specific experts, E = U + N:

    LORA       lora_A.weight [r, in]     lora_B.weight [out, r]
    EXPERTS    lora_A.weight [E r, in]   lora_B.weight [out, E r]   router.weight, router_noise.weight [N, in]
               or [r, in] if shared_A                               and what a subclass names in adapter_parameters
    PUBLISHED  lora_moe_A [N+1, in, r]   lora_moe_B [N+1, r, out]   lora_route.weight [N, in], w_noise [in, N]
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from pedgpt.adapters.experts import ExpertLoRALinear
from pedgpt.adapters.inject import wrapped
from pedgpt.adapters.lora import AdaptedLinear, LoRALinear
from pedgpt.files import own_file, read_object

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LORA, EXPERTS, PUBLISHED = "LORA", "PEDGPT_EXPERTS", "the published MoE-Adapter"
PREFIX = "base_model.model."
# The keys of a config that are settings of its layers, and their names there. A LoRA has only the first four.
SETTINGS = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "top_k": "top_k",
    "num_specific_experts": "num_specific_experts", "num_universal_experts": "num_universal_experts",
    "shared_A": "shared_A",
}  # fmt: skip
# The name of the adapter may follow, as in ".lora_moe_A.default".
_KEY = re.compile(r"base_model\.model\.(.+)\.(\w+\.weight|lora_moe_[AB]|w_noise)(?:\.[^.]+)?")
_ROUTING = ("lora_route.weight", "w_noise")
_UNSUPPORTED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "alora_invocation_tokens", "layer_replication",
    "lora_bias", "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Part(NamedTuple):
    """One tensor of a layer in a file: the parameter that it fills, its shape there, and how it becomes ours."""

    parameter: str
    shape: list[int]
    pattern: str = ""


def blank(
    linears: Mapping[str, nn.Linear], kind: type[AdaptedLinear], config: Mapping[str, Any]
) -> dict[str, AdaptedLinear]:
    """The layers that a config describes, on the meta device."""
    settings = {own: config[key] for key, own in SETTINGS.items() if key in config}
    with torch.device("meta"):
        bases = {path: nn.Linear(layer.in_features, layer.out_features) for path, layer in linears.items()}
        return wrapped(bases, kind, settings)


def parts(kind: str, layer: AdaptedLinear) -> dict[str, Part]:
    """What a file of this kind holds of one layer, by the ends of the keys; expert 0 is the universal one."""
    if kind != PUBLISHED:
        return {f"{name}.weight": Part(name, list(p.shape)) for name, p in layer.adapter_parameters().items()}
    (experts, size_in), size_out = layer.adapter_parameters()["router"].shape, layer.out_features
    return {
        "lora_moe_A": Part("lora_A", [experts + 1, size_in, layer.rank], "e d r -> (e r) d"),
        "lora_moe_B": Part("lora_B", [experts + 1, layer.rank, size_out], "e r d -> d (e r)"),
        "lora_route.weight": Part("router", [experts, size_in]),
        "w_noise": Part("router_noise", [size_in, experts], "d e -> e d"),
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter that pedgpt can reproduce; ValueError for any other."""
    path = folder / CONFIG
    if own_file(folder, CONFIG) is None:
        raise ValueError(f"{path}: no such file; expected an adapter folder")
    config = read_object(folder, CONFIG)
    if (kind := config.get("peft_type")) not in (LORA, EXPERTS):
        raise ValueError(f"{path}: peft_type {kind!r} is not supported; expected {LORA!r} or {EXPERTS!r}")
    needed = ["r", "lora_alpha", "num_specific_experts"][: 3 if kind == EXPERTS else 2]
    if missing := [key for key in needed if config.get(key) is None]:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    changed = str(config.get("init_lora_weights")).lower().startswith(_CHANGED_BASE)
    odd = [key for key in _UNSUPPORTED if config.get(key)] + ["init_lora_weights"] * changed
    if odd := odd + ["bias"] * (config.get("bias", "none") != "none"):
        raise ValueError(
            f"{path}: {odd[0]} is {config[odd[0]]!r}; pedgpt cannot reproduce such an adapter. Merge it with PEFT; one "
            "that changed its base, as PiSSA does, PEFT converts with path_initial_model_for_weight_conversion"
        )
    return config


def read_tensors(
    folder: Path, config: dict[str, Any], layers: Mapping[str, nn.Linear], uniform_routing: bool,
    layer_type: type[ExpertLoRALinear],
) -> tuple[type[AdaptedLinear], dict[str, dict[str, Tensor]]]:  # fmt: skip
    """(the type of the layers; the tensors by layer and parameter, in our form).

    The number of the published layout's experts, which its shapes tell, is put into the config.

    Raises ValueError for keys that are unexpected, layers that are not in `layers`, and what is missing or misshapen;
    with `uniform_routing`, zeros stand for routing matrices that are missing.
    """
    file, weights = _read_weights(folder)
    published = config["peft_type"] == LORA and any(".lora_moe_" in key for key in weights)
    kind: str = PUBLISHED if published else config["peft_type"]
    adapter: type[AdaptedLinear] = LoRALinear if kind == LORA else layer_type
    any_layer = blank({"": nn.Linear(1, 1, device="meta")}, adapter, {"r": 1})[""]
    tensors = _by_layer(file, parts(kind, any_layer), weights, layers)
    if kind == PUBLISHED:
        experts = len(next(tensor for key, tensor in weights.items() if ".lora_moe_" in key)) - 1
        if config.get("lora_nums", experts + 1) != experts + 1 or experts < 1:
            found = f"{experts + 1}, lora_nums is {config.get('lora_nums')}"
            raise ValueError(f"{file}: expected the universal expert and at least one specific, found {found}")
        config["num_specific_experts"] = experts
    if lost := {name for name in config.get("target_modules") or () if name in layers} - tensors.keys():
        raise ValueError(f"{file}: lacks {_listed(lost)}, which target_modules names; save or copy it again")
    ours: dict[str, dict[str, Tensor]] = {}
    routing = []
    try:
        adapted = blank({path: layer for path, layer in layers.items() if path in tensors}, adapter, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None
    for path, layer in adapted.items():
        ours[path] = {}
        for end, (parameter, shape, pattern) in parts(kind, layer).items():
            key, tensor = f"{PREFIX}{path}.{end}", tensors[path].get(end)
            if tensor is None and end not in _ROUTING:
                raise ValueError(f"{file}: lacks {key}; the file is incomplete, save or copy it again")
            if tensor is None:
                routing.append(key)
                tensor = torch.zeros(shape)
            if list(tensor.shape) != shape:
                raise ValueError(f"{file}: {key} has the shape {list(tensor.shape)}, the model needs {shape}")
            ours[path][parameter] = rearrange(tensor, pattern) if pattern else tensor
    if routing and not uniform_routing:
        raise ValueError(
            f"{file}: lacks the {len(routing)} routing matrices listed below. The published code drops them when it "
            "saves, so its own reload routes at random, and what the gates had learned is lost. Take them from the "
            "training run, or load with uniform_routing=True, which sets them to zero: without lora_route all experts "
            "get equal gates.\n  " + "\n  ".join(routing)
        )
    return adapter, ours


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The weights' file and its tensors on the CPU; PEFT prefers safetensors to .bin, and so do we."""
    file = own_file(folder, WEIGHTS) or own_file(folder, BIN)
    if file is None:
        raise ValueError(f"{folder / WEIGHTS}: no such file")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True) if file.suffix == ".bin" else load_file(file)
        integers = [key for key, tensor in weights.items() if not tensor.is_floating_point()]
    except pickle.UnpicklingError:
        raise ValueError(f"{file}: holds more than tensors, or is damaged; only safe files are read") from None
    except Exception as error:  # a damaged .bin fails in a dozen ways
        raise ValueError(f"{file}: cannot be read as tensors by name, it may be truncated ({error})") from None
    if integers:
        raise ValueError(f"{file}: {integers[0]} is {weights[integers[0]].dtype}; expected floating-point numbers")
    return file, weights


def _by_layer(
    file: Path, ends: Collection[str], weights: Mapping[str, Tensor], layers: Mapping[str, nn.Linear]
) -> dict[str, dict[str, Tensor]]:
    """The tensors by layer and by the end of their key; ValueError for keys of another kind and unknown layers."""
    tensors: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for key, tensor in weights.items():
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in ends or match[2] in tensors.setdefault(match[1], {}):
            unexpected.append(key)
        else:
            tensors[match[1]][match[2]] = tensor
    if unexpected:
        raise ValueError(
            f"{file}: holds the unexpected {_listed(unexpected)}; expected {PREFIX}<layer>.lora_A.weight and so on. "
            "pedgpt reads one adapter's matrices and no saved modules, embeddings, biases or magnitudes: train the "
            "adapter without them, or merge it with PEFT"
        )
    if absent := set(tensors) - set(layers):
        kinds = ", ".join(sorted({path.rpartition(".")[2] for path in layers}))
        raise ValueError(
            f"{file}: adapts {_listed(absent)}, which is no linear layer, or the head, of the model; it has {kinds}. "
            "Give the base model that the adapter was trained on"
        )
    return tensors


def _listed(keys: Collection[str]) -> str:
    return f"{', '.join(sorted(keys)[:5])} ({len(keys)} in all)"
