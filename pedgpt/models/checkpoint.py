"""HF model folders: config.json and safetensors weights, read strictly and written atomically."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pedgpt.models.config import ModelConfig
from pedgpt.models.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")  # stored by old checkpoints, computed here


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """The model of an HF folder, in evaluation mode. No code of the checkpoint is run.

    `dtype` None keeps the stored one. Reads safetensors (one file, or shards with an index) and, where there are none,
    `pytorch_model*.bin` with `weights_only=True`. Raises ValueError that names the file and the keys for a missing or
    truncated file and for missing, unexpected or misshapen weights.
    """
    folder = Path(folder)
    config = ModelConfig.from_hf(folder)
    with torch.device("meta"):
        model = Transformer(config)
    expected = model.state_dict()
    tied = config.tie_word_embeddings
    weights: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for file, key, tensor in _read_weights(folder):
        if _DERIVED.search(key):
            continue
        if key not in expected:
            unexpected.append(key)
            continue
        if tensor.shape != expected[key].shape:
            found, needed = list(tensor.shape), list(expected[key].shape)
            raise ValueError(f"{file}: {key} has the shape {found}, but config.json asks for {needed}")
        weights[key] = tensor.to(device=device, dtype=dtype or tensor.dtype)
    if tied:
        weights.setdefault("lm_head.weight", weights.get("model.embed_tokens.weight", expected["lm_head.weight"]))
    missing = [key for key in expected if key not in weights]
    if missing or unexpected:
        raise ValueError(f"{folder}: {_describe_mismatch(missing, unexpected)}")
    model.load_state_dict(weights, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def save_model(model: Transformer, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write config.json and the weights (shards of 5 GiB with an index) so that other tools load the folder.

    `state_dict` replaces the model's own, for weights gathered from several ranks. Each file is written under a
    temporary name, synced and renamed. Raises ValueError if adapters are attached: their weights are no part of the
    base layout.
    """
    folder = Path(folder)
    weights = dict(state_dict if state_dict is not None else model.state_dict())
    with torch.device("meta"):
        expected = Transformer(model.config).state_dict()
    extra = sorted(set(weights) - set(expected))
    if extra:
        raise ValueError(f"the model carries weights beside its own ({extra[0]}, …): use save_adapter for adapters")
    if missing := sorted(set(expected) - set(weights)):
        raise ValueError(f"{folder}: the weights to save lack {', '.join(missing[:5])} ({len(missing)} in all)")
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    folder.mkdir(parents=True, exist_ok=True)

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in weights.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    names = [WEIGHTS] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        temporary = folder / f".{name}.tmp"
        save_file(shard, temporary, metadata={"format": "pt"})
        _commit(temporary, folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in weights.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}
    dtype = sorted(dtypes)[0]  # transformers reads "dtype" before the older "torch_dtype": neither may be left stale
    _write_json(folder / "config.json", {**model.config.to_hf(), "dtype": dtype, "torch_dtype": dtype})
    for stale in {*folder.glob("model*.safetensors"), folder / INDEX} - {folder / name for name in names}:
        if not (stale.name == INDEX and len(shards) > 1):
            stale.unlink(missing_ok=True)


def model_fingerprint(folder: str | Path) -> str:
    """A short name of exactly this model: of its config.json, and of each weight file's size, head and tail."""
    folder = Path(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in _weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(2**20))
            handle.seek(max(0, size - 2**20))
            digest.update(handle.read())
    return digest.hexdigest()[:16]


def _read_weights(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, key, tensor) of every stored weight, one file open at a time."""
    for file in _weight_files(folder):
        try:
            if file.suffix == ".bin":
                for key, tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=True).items():
                    yield file, key, tensor
                continue
            with safe_open(file, framework="pt") as reader:
                for key in reader.keys():  # noqa: SIM118  (a reader, not a dict)
                    yield file, key, reader.get_tensor(key)
        except pickle.UnpicklingError:
            raise ValueError(f"{file}: holds more than weights, or is damaged; only safe files are read") from None
        except (SafetensorError, OSError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file}: cannot be read as weights, the file may be truncated ({error})") from None


def _weight_files(folder: Path) -> list[Path]:
    for index_name, single in ((INDEX, WEIGHTS), ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        index = folder / index_name
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                names = sorted(set(weight_map.values()))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{index}: not an index with a weight_map") from None
            for name in names:
                if not isinstance(name, str) or Path(name).name != name:
                    raise ValueError(f"{index}: weight_map names {name!r}, which is not a file of this folder")
                if not (folder / name).is_file():
                    raise ValueError(f"{folder / name}: no such file, though {index.name} names it")
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise ValueError(f"{folder}: no weights; expected {WEIGHTS}, {INDEX} or pytorch_model.bin")


def _describe_mismatch(missing: list[str], unexpected: list[str]) -> str:
    parts = []
    for label, keys, others in (("missing", missing, unexpected), ("unexpected", unexpected, missing)):
        if keys:
            named = []
            for key in keys[:5]:
                near = difflib.get_close_matches(key, others, n=1)
                named.append(f"{key} (nearest: {near[0]})" if near else key)
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            parts.append(f"{len(keys)} {label}: {', '.join(named)}{more}")
    return "the weights do not fit config.json; " + "; ".join(parts)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _commit(temporary, path)


def _commit(temporary: Path, path: Path) -> None:
    """Sync a finished temporary file to disk and give it its name."""
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
