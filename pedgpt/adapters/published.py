"""Read an adapter's two files, whoever published them: PEFT's LoRA, our experts, the published MoE-Adapter.

A key is `base_model.model.<layer>.<part>`. The layouts differ in the parts and their shapes: rank r, N specific
experts beside the universal one:

    LORA       lora_A.weight [r, in]        lora_B.weight [out, r]
    EXPERTS    lora_A.weight [(N+1)r, in]   lora_B.weight [out, (N+1)r]   router.weight, router_noise.weight [N, in]
    PUBLISHED  lora_moe_A [N+1, in, r]      lora_moe_B [N+1, r, out]      lora_route.weight [N, in], w_noise [in, N]
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

from pedgpt.files import own_file, read_object

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LORA, EXPERTS, PUBLISHED = "LORA", "PEDGPT_EXPERTS", "the published MoE-Adapter"
PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(.+)\.((?:lora_[AB]|router|router_noise)\.weight)")
# The name of the adapter may follow, as in ".lora_moe_A.default".
_PUBLISHED_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_moe_[AB]|lora_route\.weight|w_noise)(?:\.[^.]+)?")
_ROUTING = ("lora_route.weight", "w_noise")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NUMBERS: dict[str, tuple[Any, int]] = {  # of the config, with their types and least values
    "r": (int, 1), "num_specific_experts": (int, 1), "lora_nums": (int, 2), "lora_alpha": (int | float, -(2**53)),
    "lora_dropout": (int | float, 0),
}  # fmt: skip
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


def parts(kind: str, layer: nn.Linear, rank: int, experts: int) -> dict[str, Part]:
    """What a file of this kind holds of one layer, by the ends of the keys; expert 0 is the universal one."""
    rows, size_in, size_out = (experts + 1) * rank, layer.in_features, layer.out_features
    if kind == PUBLISHED:
        return {
            "lora_moe_A": Part("lora_A", [experts + 1, size_in, rank], "e d r -> (e r) d"),
            "lora_moe_B": Part("lora_B", [experts + 1, rank, size_out], "e r d -> d (e r)"),
            "lora_route.weight": Part("router", [experts, size_in]),
            "w_noise": Part("router_noise", [size_in, experts], "d e -> e d"),
        }
    shapes = {"lora_A": [rows, size_in], "lora_B": [size_out, rows]}
    if kind == EXPERTS:
        shapes |= {"router": [experts, size_in], "router_noise": [experts, size_in]}
    return {f"{name}.weight": Part(name, shape) for name, shape in shapes.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter that pedgpt can reproduce; ValueError for any other, and for broken ones."""
    path = folder / CONFIG
    if own_file(folder, CONFIG) is None:
        raise ValueError(f"{path}: no such file; expected an adapter folder")
    config = read_object(folder, CONFIG)
    if (kind := config.get("peft_type")) not in (LORA, EXPERTS):
        raise ValueError(f"{path}: peft_type {kind!r} is not supported; expected {LORA!r} or {EXPERTS!r}")
    needed = ["r", "lora_alpha", "num_specific_experts"][: 3 if kind == EXPERTS else 2]
    if missing := [key for key in needed if config.get(key) is None]:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    for key, (kinds, least) in _NUMBERS.items():
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
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGED_BASE):
        raise ValueError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base model's weights; "
            "convert the adapter to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def read_tensors(
    folder: Path, config: Mapping[str, Any], layers: Mapping[str, nn.Linear], uniform_routing: bool
) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """(number of specific experts, 0 for LoRA; the tensors by layer and parameter, in our form).

    Raises ValueError for keys that are unexpected, layers that are not in `layers`, and what is missing or misshapen;
    with `uniform_routing`, zeros stand for routing matrices that are missing.
    """
    file, weights = _read_weights(folder)
    kind: str = config["peft_type"]
    if kind == LORA and any(_PUBLISHED_KEY.fullmatch(key) for key in weights):
        kind = PUBLISHED
    experts = config["num_specific_experts"] if kind == EXPERTS else 0
    if kind == PUBLISHED:
        experts = _published_experts(file, config, weights)
    tensors = _by_layer(file, kind, weights, layers)
    for path in _targets(config, layers):
        tensors.setdefault(path, {})
    wanted = {path: parts(kind, layers[path], config["r"], experts) for path in layers if path in tensors}
    missing = [(path, end) for path in wanted for end in wanted[path] if end not in tensors[path]]
    routing = [f"{PREFIX}{path}.{end}" for path, end in missing if end in _ROUTING]
    if lost := [f"{PREFIX}{path}.{end}" for path, end in missing if end not in _ROUTING]:
        raise ValueError(f"{file}: lacks {_listed(lost)}; the file is incomplete, save or copy it again")
    if routing and not uniform_routing:
        raise ValueError(
            f"{file}: lacks the {len(routing)} routing matrices listed below. The published code drops them when it "
            "saves, so its own reload routes at random, and what the gates had learned is lost. Take them from the "
            "training run, or load with uniform_routing=True, which sets them to zero: without lora_route all experts "
            "get equal gates.\n  " + "\n  ".join(routing)
        )
    found: dict[str, dict[str, Tensor]] = {path: {} for path in wanted}
    for path, ends in wanted.items():
        for end, (parameter, shape, pattern) in ends.items():
            tensor = tensors[path][end] if end in tensors[path] else torch.zeros(shape)
            if list(tensor.shape) != shape:
                key = f"{PREFIX}{path}.{end}"
                raise ValueError(f"{file}: {key} has the shape {list(tensor.shape)}, the model needs {shape}")
            found[path][parameter] = rearrange(tensor, pattern) if pattern else tensor
    return experts, found


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The weights' file and its tensors on the CPU; PEFT prefers safetensors to .bin, and so do we."""
    file = own_file(folder, WEIGHTS) or own_file(folder, BIN)
    if file is None:
        raise ValueError(f"{folder / WEIGHTS}: no such file")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True) if file.suffix == ".bin" else load_file(file)
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


def _published_experts(file: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> int:
    counts = {tensor.shape[0] for key, tensor in weights.items() if ".lora_moe_" in key and tensor.ndim == 3}
    counts |= {config["lora_nums"]} if "lora_nums" in config else set()
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            f"{file}: lora_moe_A, lora_moe_B and the config's lora_nums must agree on the number of experts, the "
            f"universal one and at least one specific; found {sorted(counts) or 'none'}"
        )
    return counts.pop() - 1


def _by_layer(
    file: Path, kind: str, weights: Mapping[str, Tensor], layers: Mapping[str, nn.Linear]
) -> dict[str, dict[str, Tensor]]:
    """The tensors by layer and by the end of their key; ValueError for keys of another kind and unknown layers."""
    tensors: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for key, tensor in weights.items():
        match = (_PUBLISHED_KEY if kind == PUBLISHED else _KEY).fullmatch(key)
        foreign = kind == LORA and ".router" in key
        if match is None or foreign or match[2] in tensors.get(match[1], {}):
            unexpected.append(key)
        else:
            tensors.setdefault(match[1], {})[match[2]] = tensor
    if unexpected:
        raise ValueError(
            f"{file}: holds the unexpected {_listed(unexpected)}; pedgpt reads one adapter's matrices and no saved "
            "modules, embeddings, biases or magnitudes: train the adapter without them, or merge it with PEFT"
        )
    if not tensors:
        raise ValueError(f"{file}: holds no tensors; expected {PREFIX}<layer>.lora_A.weight and so on")
    if absent := set(tensors) - set(layers):
        kinds = ", ".join(sorted({path.rpartition(".")[2] for path in layers}))
        raise ValueError(
            f"{file}: adapts {_listed(absent)}, which is no linear layer, or the head, of the model; it has {kinds}. "
            "Give the base model that the adapter was trained on"
        )
    return tensors


def _targets(config: Mapping[str, Any], layers: Mapping[str, nn.Linear]) -> set[str]:
    """The layers that a list of target_modules names, as PEFT reads it: a file without their weights is incomplete."""
    targets = config.get("target_modules")
    partly = any(config.get(key) is not None for key in ("exclude_modules", "layers_to_transform"))
    if partly or not isinstance(targets, list):
        return set()  # the keys alone say which
    return {path for path in layers if any(path == t or (t not in layers and path.endswith(f".{t}")) for t in targets)}


def _listed(keys: Collection[str]) -> str:
    return f"{', '.join(sorted(keys)[:5])} ({len(keys)} in all)"
