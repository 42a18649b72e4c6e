"""Read an adapter's two files, whoever wrote them, in the form that our layers compute with.

Rank r, U universal and N specific experts, E = U + N. A key is `base_model.model.<layer>.<end>`, or in MoE-PEFT
`mola.<layer>.<end>`; `*` numbers the experts:

    LoRA          lora_A.weight [r, in]        lora_B.weight [out, r]
    our experts   lora_A.weight [E r, in]      lora_B.weight [out, E r]   router.weight, router_noise.weight [N, in]
                  or [r, in] if shared_A                                  and what a subclass has beside them
    MoE-Adapter   lora_moe_A [E, in, r]        lora_moe_B [E, r, out]     lora_route.weight [N, in], w_noise [in, N]
    HydraLoRA     lora_A.weight [r, in]        lora_B*.weight [out, r]    lora_route.weight [N, in]
    MoE-PEFT      experts.*.lora_A.weight      experts.*.lora_B.weight    moe_gate.weight [N, in]

The MoE-Adapter is PediatricsGPT's published code, with one universal expert. The last two have none, and no noise.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from pedgpt.files import own_file, read_object

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LORA, EXPERTS = "LORA", "PEDGPT_EXPERTS"
PREFIX = "base_model.model."
# The keys of a config that are settings of its layers, and their names there. A LoRA has only the first four.
SETTINGS = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "top_k": "top_k",
    "num_specific_experts": "num_specific_experts", "num_universal_experts": "num_universal_experts",
    "shared_A": "shared_A",
}  # fmt: skip
# The name of the adapter may follow. The empty group at the end stands for the expert's number where there is none.
_KEY = r"(?:base_model\.model\.|\w+\.(?=layers\.))(.+)\.%s(?:\.[^.]+)?()"
_UNSUPPORTED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "alora_invocation_tokens", "layer_replication",
    "lora_bias", "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


AS_IT_IS = "1 ... -> ..."  # from a list of one tensor
# By a piece of a key that no other layout has: the ends of its keys, with the parameter that each fills and how the
# list of its tensors becomes one; and the settings that all its layers have in common.
_FOREIGN: dict[str, tuple[dict[str, tuple[str, str]], dict[str, Any]]] = {
    ".lora_moe_A": ({
        "lora_moe_A": ("lora_A", "1 e i r -> (e r) i"), "lora_moe_B": ("lora_B", "1 e r o -> o (e r)"),
        "lora_route.weight": ("router", AS_IT_IS), "w_noise": ("router_noise", "1 i n -> n i"),
    }, {"num_universal_experts": 1}),
    ".lora_B0.": ({
        "lora_A.weight": ("lora_A", AS_IT_IS), "lora_B*.weight": ("lora_B", "e o r -> o (e r)"),
        "lora_route.weight": ("router", AS_IT_IS),
    }, {"num_universal_experts": 0, "shared_A": True}),
    ".moe_gate.": ({
        "experts.*.lora_A.weight": ("lora_A", "e r i -> (e r) i"),
        "experts.*.lora_B.weight": ("lora_B", "e o r -> o (e r)"),
        "moe_gate.weight": ("router", AS_IT_IS),
    }, {"num_universal_experts": 0}),
}  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter that pedgpt can reproduce; ValueError for any other."""
    path, config = folder / CONFIG, read_object(folder, CONFIG)
    if not config:
        raise ValueError(f"{path}: no such file, or an empty one; expected an adapter folder")
    kind, known = config.get("peft_type"), (LORA, EXPERTS, "MOLA", "LORAMOE")
    if kind == "MIXLORA":
        raise ValueError(
            f"{path}: MixLoRA runs the whole feed-forward block once for each chosen expert and mixes the results. "
            "Between its layers stands a nonlinearity, so no mixture in each linear layer equals it; of MoE-PEFT's "
            "adapters, pedgpt reads MOLA and LORAMOE"
        )
    if kind not in known:
        raise ValueError(f"{path}: peft_type {kind!r} is not supported; expected one of {', '.join(known)}")
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


def read_adapter(
    folder: Path, linears: Mapping[str, nn.Linear], uniform_routing: bool = False
) -> tuple[bool, dict[str, Any], dict[str, dict[str, Tensor]]]:
    """(whether it is a LoRA; its layers' settings; its tensors by layer and parameter) of an adapter for these layers.

    Raises ValueError for keys that are unexpected, layers that are not in `linears`, and what another's layout lacks;
    with `uniform_routing`, zeros stand for routing matrices that are missing.
    """
    config = read_config(folder)
    file, weights = _read_weights(folder)
    names = {key.split(".")[-2] for key in weights if "." in key}
    names = {"lora_A", "lora_B"} if config["peft_type"] == LORA else names
    ours: Any = {f"{name}.weight": (name, AS_IT_IS) for name in names}, {}
    ends, common = next((found for mark, found in _FOREIGN.items() if any(mark in key for key in weights)), ours)
    read, missing = _by_layer(file, weights, ends, linears), []
    tensors = {path: read[path] for path in linears if path in read}
    if common:
        count = config.get("lora_nums", config.get("num_experts"))
        if not isinstance(count, int) or count < 1:
            raise ValueError(
                f"{folder / CONFIG}: expected the number of experts as lora_nums or num_experts, found {count!r}"
            )
        experts = count - common["num_universal_experts"]
        config |= common | {"peft_type": EXPERTS, "num_specific_experts": experts}
        for path, found in tensors.items():
            routers = {end: name for end, (name, _) in ends.items() if "router" in name}
            missing += [f"{PREFIX}{path}.{end}" for end, name in routers.items() if name not in found]
            zeros = torch.zeros(experts, linears[path].in_features)
            tensors[path] = {"router": zeros, "router_noise": zeros, **found}
    if missing and not uniform_routing:
        raise ValueError(
            f"{file}: lacks the {len(missing)} routing matrices listed below. The published code drops them when it "
            "saves, so its own reload routes at random, and what the gates had learned is lost. Take them from the "
            "training run, or load with uniform_routing=True, which sets them to zero: without lora_route all experts "
            "get equal gates.\n  " + "\n  ".join(missing)
        )
    if lost := {name for name in config.get("target_modules") or () if name in linears} - tensors.keys():
        raise ValueError(f"{file}: lacks {_listed(lost)}, which target_modules names; save or copy it again")
    settings = {own: config[key] for key, own in SETTINGS.items() if key in config}
    return config["peft_type"] == LORA, settings, tensors


@torch.no_grad()
def fill(path: str, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy a layer's tensors into its parameters; ValueError for one that is missing, unexpected or misshapen."""
    for name in {**parameters, **tensors}:
        key, tensor = f"{PREFIX}{path}.{name}.weight", tensors.get(name)
        if name not in parameters:
            raise ValueError(f"holds the unexpected {key}")
        if tensor is None:
            raise ValueError(f"lacks {key}; the file is incomplete, save or copy it again")
        if tensor.shape != parameters[name].shape:
            shapes = f"{list(tensor.shape)}; the model and {CONFIG} need {list(parameters[name].shape)}"
            raise ValueError(f"{key} has the shape {shapes}")
        parameters[name].copy_(tensor)


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
    file: Path, weights: Mapping[str, Tensor], ends: Mapping[str, tuple[str, str]], linears: Mapping[str, nn.Linear]
) -> dict[str, dict[str, Tensor]]:
    """The tensors by layer and parameter, in our form; ValueError for keys of another kind and unknown layers."""
    found: dict[tuple[str, str], dict[int, Tensor]] = {}  # (layer, end) -> number of the expert -> tensor
    unexpected = []
    for key, tensor in weights.items():
        matches = ((end, re.fullmatch(_KEY % re.escape(end).replace(r"\*", r"(\d+)"), key)) for end in ends)
        end, match = next(((end, match) for end, match in matches if match), ("", None))
        path = match and ("" if key.startswith(PREFIX) else "model.") + match[1]
        number = int(match[2] or 0) if match else 0
        if path is None or number in found.setdefault((path, end), {}):
            unexpected.append(key)
        else:
            found[path, end][number] = tensor
    tensors: dict[str, dict[str, Tensor]] = {}
    for (path, end), experts in found.items():
        parameter, pattern = ends[end]
        try:
            tensors.setdefault(path, {})[parameter] = rearrange([experts[n] for n in sorted(experts)], pattern)
        except RuntimeError as error:
            raise ValueError(f"{file}: {path}.{end} does not become {parameter} ({error})") from None
    absent = {path for path, of_layer in tensors.items() if path not in linears and "lora_A" in of_layer}
    unexpected += [f"{PREFIX}{path}.{end}" for path, end in found if path not in linears and path not in absent]
    if unexpected:
        raise ValueError(
            f"{file}: holds the unexpected {_listed(unexpected)}; expected {PREFIX}<layer>.lora_A.weight and so on. "
            "pedgpt reads one adapter's matrices and no saved modules, embeddings, biases or magnitudes: train the "
            "adapter without them, or merge it with PEFT"
        )
    if absent:
        kinds = ", ".join(sorted({path.rpartition(".")[2] for path in linears}))
        raise ValueError(
            f"{file}: adapts {_listed(absent)}, which is the head, or no layer of the model that can be adapted; it "
            f"has {kinds}. Give the base model that the adapter was trained on"
        )
    return tensors


def _listed(keys: Collection[str]) -> str:
    return f"{', '.join(sorted(keys)[:5])} ({len(keys)} in all)"
