"""Models in 8 and 4 bits as bitsandbytes stores them: its settings in config.json, and its tensors of a layer X.

    int8    X.weight int8 [O, D], X.SCB float32 [O] and X.weight_format, which is 0 for rows
    nf4     X.weight uint8 [O D/2, 1], X.weight.absmax uint8 [O D/64], X.weight.nested_absmax float32 [⌈O D/64/256⌉],
            two tables, and X.weight.quant_state.bitsandbytes__nf4: JSON as bytes, with the shape and the offset

Source: `QuantState.as_dict` and `Linear8bitLt._save_to_state_dict` of bitsandbytes 0.50.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from pedgpt.kernels.quantized import DYNAMIC, NF4, QuantizedLinear
from pedgpt.models.weight_files import Weights

PART = ".quantization."  # between a layer's name and the name of a tensor of its Quantization
STATE = "quant_state.bitsandbytes__nf4"
TABLES = {"quant_map": NF4, "nested_quant_map": DYNAMIC}
STATED = {"quant_type": "nf4", "blocksize": 64, "nested_blocksize": 256, "nested_dtype": "float32"}
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": False},
    "nf4": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8",
    },
}  # fmt: skip
_MATRIX = r"model\.layers\..*\.weight"
CODES = {torch.int8: "int8", torch.uint8: "nf4"}
PLAIN = "llm_int8_skip_modules"  # the key for the layers that are not quantised, in 4 bits too
INSTEAD = 'load the model that it was made from, with quantize="nf4" or "int8"'


def stored_format(found: Any) -> str:
    """The format that a quantization_config tells, or "none"; ValueError for what cannot be read without rounding."""
    if not found:
        return "none"
    told = {"bnb_4bit_quant_storage": "uint8", **found} if isinstance(found, Mapping) else {"quant_method": found}
    kind = "int8" if told.get("load_in_8bit") is True else "nf4"
    for key, value in SETTINGS[kind].items():
        if told.get(key) != value:
            problem = f"quantization_config: {key} is {told.get(key)!r}, and only {value!r} is supported"
            raise ValueError(f"config.json: {problem}; {INSTEAD}")
    if not isinstance(names := told.get(PLAIN) or [], list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config.json: quantization_config: {PLAIN} must be a list of names, found {names!r}")
    return kind


def settings_of(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The quantization_config that tells which layers of a state dict are quantised, and how; None if none is."""
    matrices = {key: tensor.dtype for key, tensor in weights.items() if re.fullmatch(_MATRIX, key) and tensor.ndim == 2}
    plain = [key.removesuffix(".weight") for key, dtype in matrices.items() if dtype not in CODES]
    kind = next((CODES[dtype] for dtype in matrices.values() if dtype in CODES), None)
    return None if kind is None else {**SETTINGS[kind], PLAIN: ["lm_head", *plain]}


def quantize_layers(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Put empty quantised layers in the place of those that a quantization_config does not leave plain."""
    kind, plain = stored_format(settings), [*(settings.get(PLAIN) or ()), "lm_head"]
    for name, layer in list(model.named_modules()):
        # As transformers reads these names: as whole parts from the start, or as the end of a name.
        kept = any(f"{name}.".startswith(f"{key}.") or name.endswith(key) for key in plain)
        if isinstance(layer, nn.Linear) and not kept:
            model.set_submodule(name, QuantizedLinear(layer, kind))


def weight_key(key: str) -> str:
    """The key of the weight to which a tensor of a model belongs; its own if it is of no Quantization."""
    return f"{key.rpartition(PART)[0]}.weight" if PART in key else key


def stored_key(key: str) -> str:
    """Where bitsandbytes stores a tensor of a model."""
    layer, _, part = key.rpartition(PART)
    stored = {"scale": f"{layer}.SCB", "offset": f"{layer}.weight.{STATE}"}
    return stored.get(part, f"{layer}.weight.{part}") if layer else key


def pack(key: str, tensor: Tensor, shapes: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A tensor of a model as bitsandbytes stores it; `shapes` are the model's, `dtype` is what it computes in."""
    layer, _, part = key.rpartition(PART)
    if not layer:
        return {key: tensor.view(-1, 1) if tensor.dtype == torch.uint8 else tensor}
    parts = {stored_key(key): tensor.flatten()}
    if part == "scale":
        parts[f"{layer}.weight_format"] = torch.zeros((), dtype=torch.uint8)
    elif part == "offset":
        rows, half = shapes[weight_key(key)].shape
        told = {**STATED, "dtype": str(dtype).removeprefix("torch."), "shape": [rows, 2 * half]}
        text = json.dumps({**told, "nested_offset": 0.0 if tensor.is_meta else tensor.item()})
        parts = {f"{layer}.weight.{name}": table.clone() for name, table in TABLES.items()}
        parts[stored_key(key)] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return parts


def stored_offset(stored: Weights, key: str, codes: Tensor) -> Tensor:
    """The mean of a layer's absmax; ValueError unless what is stored with it is what pedgpt computes with."""
    rows, half = codes.shape
    told, wanted, name = {}, {**STATED, "shape": [rows, 2 * half]}, stored_key(key)
    with suppress(ValueError, TypeError, RecursionError):
        told = json.loads(bytes(stored.rows(name, 0, 4096).tolist()))
    offset = told.get("nested_offset") if isinstance(told, dict) else None
    if not isinstance(offset, float) or any(told.get(item) != value for item, value in wanted.items()):
        raise ValueError(f"{stored.files[name]}: {name} must tell {wanted} and a nested_offset; {INSTEAD}")
    return torch.tensor(offset)
