"""HF model folders: config.json and weights, read strictly and within their own size, written atomically."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pedgpt.files import naming_full_disk, settle, sync, write_json
from pedgpt.kernels.linear_logps import SHORTEST
from pedgpt.models.config import ModelConfig, parse_json
from pedgpt.models.transformer import Transformer
from pedgpt.models.weight_files import INDEX, READ_BYTES, WEIGHTS, WeightFile, weight_files

GENERATION = "generation_config.json"
SHARD_BYTES = 5 * 2**30
COMPARED = 2**20  # numbers of a trained tensor that are compared with those before training
_DERIVED = "rotary_emb.inv_freq"  # stored by old checkpoints, computed here
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """The model of an HF folder, in evaluation mode. No code of the checkpoint is run.

    `dtype` None keeps the stored one. Reads safetensors (one file, or shards with an index) and, where there are none,
    `pytorch_model*.bin` with `weights_only=True`. On the CPU in the stored dtype, weights stay mapped from their
    files, so loading is lazy and processes share them; otherwise they are copied piece by piece. With `device="meta"`
    only config.json is read, for `load_weights` to fill the model after adapters are attached or ranks share it.
    Raises ValueError that names the file and the keys for a missing, truncated or hostile file, for weights that are
    missing, unexpected or misshapen, and for links that leave the folder.
    """
    config = ModelConfig.from_hf(folder)
    if torch.device(device).type == "meta":
        return _empty(config, dtype or config.dtype).eval()
    files = _read_headers(Path(folder), config)
    model = _empty(config)
    _fill(model, files, dtype, device)
    return model.eval()


def load_weights(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Fill a model, which may be on the meta device and carry adapters, as `load_model` would.

    A model that `fully_shard` split over ranks gets only its own rows on each: no rank reads or holds the whole.
    Adapters are left alone. Raises ValueError as `load_model`.
    """
    _fill(model, _read_headers(Path(folder), model.config), dtype, device)


def save_model(
    model: Transformer,
    folder: str | Path,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write config.json and the weights (shards of 5 GiB with an index) so that other tools load the folder.

    `weights` replaces the model's own, for weights that come name by name from several ranks: at most one shard of
    them is held. Each file is written under a temporary name, synced, and renamed when all are there. Raises
    ValueError if adapters are attached: their weights are no part of the base layout.
    """
    weights = model.state_dict() if weights is None else weights
    _write(model.config, Path(folder), weights.items() if isinstance(weights, Mapping) else weights)


def round_weights(
    weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, *, since: str | Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield trained weights in the dtype to save; at the end, print how much of the training the rounding undid.

    This is measured against the weights in the folder `since`, from which the training began. Nothing is printed if no
    weight was rounded, or if the folder is gone.
    """
    start: dict[str, WeightFile] = {}
    with suppress(ValueError, OSError):  # the result is saved even where this cannot be measured
        start = {key: file for file in map(WeightFile, weight_files(Path(since))) for key in file.tensors}
    totals = torch.zeros(4, dtype=torch.float64)
    for name, trained in weights:
        saved = trained.to(dtype)
        if saved.dtype != trained.dtype and name in start:
            with suppress(ValueError, OSError):
                totals += _rounding(trained, saved, start[name], name)
        yield name, saved
    change, rounding, changed, undone = totals.tolist()
    if change:
        kind = str(dtype).removeprefix("torch.")
        print(
            f"saved in {kind}: rounding moved the weights by {(rounding / change) ** 0.5:.0%} of what training moved "
            f"them, and {undone / changed:.0%} of the trained numbers are saved as if untrained; "
            "--save_dtype float32 keeps them"
        )


def _rounding(trained: Tensor, saved: Tensor, file: WeightFile, key: str) -> Tensor:
    """Σ (trained − start)², Σ (saved − trained)², how many numbers changed, and how many of these are saved unchanged.

    Of a large tensor 16 blocks of rows stand for the whole.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    if file.tensors[key][0] != trained.shape:
        return totals
    height = max(1, COMPARED // 16 // trained[:1].numel())
    blocks = range(0, len(trained), max(height, len(trained) // 16))
    seen = 0
    for row in blocks:
        rows = slice(row, min(row + height, len(trained)))
        start = file.rows(key, rows.start, rows.stop).to(trained.dtype)
        seen += len(start)
        changed = trained[rows] != start
        totals[0] += (trained[rows] - start).square().sum(dtype=torch.float64)
        totals[1] += (saved[rows].to(trained.dtype) - trained[rows]).square().sum(dtype=torch.float64)
        totals[2] += changed.sum()
        totals[3] += (changed & (saved[rows] == start.to(saved.dtype))).sum()
    return totals * len(trained) / seen


def export_llama(model: Transformer, folder: str | Path) -> None:
    """Write a Baichuan 7B, which rotates, as the Llama it is: W_pack split into q, k and v, NormHead's rows normalised.

    The folder needs no vendor code: transformers, vLLM or llama.cpp load it as a Llama with equal logits. Raises
    ValueError for a model with ALiBi positions or of another family.
    """
    config = model.config
    if config.model_type != "baichuan" or config.positions != "rope":
        kind = f"{config.model_type} with {config.positions} positions"
        raise ValueError(f"only a Baichuan with rotary positions (7B) is a Llama by another name; this is {kind}")
    vendor = ("architectures", "auto_map", "tokenizer_class", "_name_or_path", "_from_model_config")
    extra = {key: value for key, value in config.extra.items() if key not in vendor}
    changes: dict[str, Any] = {"model_type": "llama", "fused_qkv": False, "normalize_head": False}
    changes |= {"tie_word_embeddings": config.tie_word_embeddings and not config.normalize_head, "extra": extra}

    def split() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in model.state_dict().items():
            if ".W_pack." in key:
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    yield key.replace("W_pack", f"{letter}_proj"), part
            else:
                yield key, model.head_weight() if key == HEAD else tensor

    _write(dataclasses.replace(config, **changes), Path(folder), split())


def model_fingerprint(folder: str | Path) -> str:
    """A short name of this model: of its config.json and its weight files, of large ones 4 KiB of each MiB."""
    folder = Path(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(64 * 2**20))
            for place in range(64 * 2**20, size, 2**20):
                handle.seek(place)
                digest.update(handle.read(4096))
    return digest.hexdigest()[:16]


def weights_fingerprint(folder: str | Path) -> str:
    """A short name of a folder's weights: a checksum of the shape and one bfloat16 row of every tensor but the head.

    It stays the same in another folder, in other files, in another dtype and with another config.json; training
    changes it.
    """
    digest = hashlib.sha256()
    found = {key: file for file in map(WeightFile, weight_files(Path(folder))) for key in file.tensors}
    for key in sorted(found):
        shape = found[key].tensors[key][0]
        if shape and key != HEAD and not key.endswith(_DERIVED):  # a tied head may be stored or not
            rows = (shape[0] // 2, shape[0] // 2 + 1) if len(shape) > 1 else (0, shape[0])
            part = found[key].rows(key, *rows).to(torch.bfloat16).contiguous()
            digest.update(f"{key} {list(shape)}".encode() + part.view(torch.int16).numpy().tobytes())
            found[key].close()
    return digest.hexdigest()[:16]


def _empty(config: ModelConfig, dtype: torch.dtype | None = None) -> Transformer:
    with torch.device("meta"):
        return Transformer(config).to(dtype)


def _read_headers(folder: Path, config: ModelConfig) -> list[WeightFile]:
    """The weight files of a folder, once every key and shape in them is what config.json asks for."""
    files = [WeightFile(file) for file in weight_files(folder)]
    stored: dict[str, WeightFile] = {}
    for file in files:
        for key in file.tensors:
            if key in stored:
                raise ValueError(f"{file.file}: holds {key}, which {stored[key].file.name} holds too")
            if not key.endswith(_DERIVED):
                stored[key] = file
    if config.num_hidden_layers > len(stored):
        raise ValueError(f"{folder}: config.json asks for {config.num_hidden_layers} layers of {len(stored)} weights")
    expected = _empty(config).state_dict()
    missing = [key for key in expected if key not in stored and not (config.tie_word_embeddings and key == HEAD)]
    unexpected = [key for key in stored if key not in expected]
    misshapen = [
        f"{stored[key].file.name}: {key} has the shape {list(stored[key].tensors[key][0])}, not {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in stored and stored[key].tensors[key][0] != tensor.shape
    ]
    if missing or unexpected or misshapen:
        raise ValueError(f"{folder}: {_describe_mismatch(missing, unexpected, misshapen)}")
    return files


def _fill(
    model: Transformer, files: Sequence[WeightFile], dtype: torch.dtype | None, device: str | torch.device
) -> None:
    tied = model.config.tie_word_embeddings
    targets = model.state_dict()
    weights: dict[str, Tensor] = {}
    places: set[int] = set()
    for file in files:
        for key in file.tensors:
            if not key.endswith(_DERIVED) and not (tied and key == HEAD):
                tensor = _read(file, key, targets[key], dtype, torch.device(device))
                # A .bin may hold one tensor under two names; unless tied, they are two parameters.
                place = 0 if _is_sharded(tensor) else tensor.data_ptr()
                weights[key] = tensor.clone() if place and place in places else tensor
                places.add(place)
        file.close()
    if tied:
        weights[HEAD] = weights[EMBEDDING]
    model.load_state_dict(weights, assign=True, strict=False)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    if model.config.normalize_head:
        _warn_of_zero_rows(model.lm_head.weight, files[0].file.parent)


def _warn_of_zero_rows(weight: Any, folder: Path) -> None:
    """Name the tokens whose row of a normalised head is zeros; of a sharded head each rank names its own."""
    start = _local_rows(weight)[0]
    local = weight.to_local() if _is_sharded(weight) else weight
    lengths = [torch.linalg.vector_norm(rows.float(), dim=-1) for rows in local.detach().split(1024)]
    if ids := [start + row for row in (torch.cat(lengths) < SHORTEST).nonzero().flatten().tolist()]:
        named = f"{', '.join(map(str, ids[:5]))}{', …' * (len(ids) > 5)} ({len(ids)} in all)"
        warnings.warn(
            f"{folder}: the rows of lm_head.weight for the tokens {named} are zeros. A normalised head gives such "
            "tokens the logit 0 and cannot train them. That is right for padding; where they are new tokens, fill "
            "their rows first, with the mean of the other rows for example",
            stacklevel=4,
        )


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing them: that takes 0.4 s and 40 MB."""
    return hasattr(tensor, "to_local")


def _read(file: WeightFile, key: str, target: Any, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """A stored tensor, or this rank's rows of it, in its final dtype and place, never with a second whole copy."""
    shape, stored = file.tensors[key]
    dtype = dtype or stored
    start, stop = _local_rows(target)
    if not _is_sharded(target) and dtype == stored and device.type == "cpu":
        return file.whole(key)
    local = torch.empty(stop - start, *shape[1:], dtype=dtype, device=device)
    step = max(1, READ_BYTES // max(1, shape[1:].numel() * stored.itemsize))
    for row in range(start, stop, step):
        end = min(row + step, stop)
        local[row - start : end - start].copy_(file.rows(key, row, end))
    if not _is_sharded(target):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def _local_rows(target: Any) -> tuple[int, int]:
    """Which rows of a tensor this rank keeps: FSDP2 splits the first dimension as `torch.chunk` does."""
    if not _is_sharded(target):
        return 0, len(target)
    mesh = target.device_mesh
    if mesh.ndim != 1 or not target.placements[0].is_shard(0):
        raise ValueError(f"weights sharded as {target.placements} cannot be loaded; expected one mesh dimension, rows")
    size = -(-len(target) // mesh.size())
    start = min(mesh.get_local_rank() * size, len(target))
    return start, min(start + size, len(target))


def _write(config: ModelConfig, folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    expected = set(_empty(config).state_dict())
    parts: list[tuple[Path, list[str]]] = []  # temporary files with what they hold
    shard: dict[str, Tensor] = {}
    size = total = 0
    dtypes = set()

    def flush() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{WEIGHTS}.{len(parts) + 1}.tmp"
        parts.append((part, list(shard)))
        with naming_full_disk(folder / WEIGHTS, total):
            save_file(shard, part, metadata={"format": "pt"})
        shard.clear()

    try:
        for key, tensor in weights:
            if key not in expected:
                raise ValueError(f"the model carries weights beside its own ({key}, …): use save_adapter for adapters")
            expected.discard(key)
            if config.tie_word_embeddings and key == HEAD:
                continue
            if size and size + tensor.nbytes > SHARD_BYTES:
                flush()
                size = 0
            shard[key] = tensor.detach().cpu().contiguous()
            size, total = size + tensor.nbytes, total + tensor.nbytes
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
        if missing := sorted(expected - ({HEAD} if config.tie_word_embeddings else set())):
            raise ValueError(f"{folder}: the weights to save lack {', '.join(missing[:5])} ({len(missing)} in all)")
        flush()
        for part, _ in parts:
            sync(part)  # every part is complete on the disk before the first one gets its name
    except BaseException:
        for part, _ in parts:
            part.unlink(missing_ok=True)
        raise
    count, live = len(parts), _live_shards(folder)
    tag = "-b" if any(not name.endswith("-b.safetensors") for name in live) else ""  # never over a live shard
    names = [f"model-{i + 1:05d}-of-{count:05d}{tag}.safetensors" for i in range(count)] if count > 1 else [WEIGHTS]
    for (part, _), name in zip(parts, names, strict=True):
        settle(part, folder / name)
    # What counts is the index where there is one: with its change, or its end, the new weights take over at once.
    if count > 1:
        weight_map = {key: name for (_, keys), name in zip(parts, names, strict=True) for key in keys}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    dtype = sorted(dtypes)[0]  # transformers reads "dtype" before the older "torch_dtype": neither may be left stale
    raw: dict[str, Any] = {**config.to_hf(), "dtype": dtype, "torch_dtype": dtype}
    write_json(folder / "config.json", raw)
    if not (folder / GENERATION).exists():
        ends = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
        write_json(folder / GENERATION, {"_from_model_config": True, **ends})
    ours = re.compile(r"model(-\d{5}-of-\d{5}(-b)?)?\.safetensors")
    for stale in {path.name for path in folder.iterdir() if ours.fullmatch(path.name)} - set(names):
        (folder / stale).unlink()


def _live_shards(folder: Path) -> set[str]:
    """The files that the folder's index names; none if it is broken."""
    with suppress(ValueError):
        if (folder / INDEX).is_file() and isinstance(named := parse_json(folder / INDEX).get("weight_map"), dict):
            return set(map(str, named.values()))
    return set()


def _describe_mismatch(missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    parts = []
    for label, keys, others in (("missing", missing, unexpected), ("unexpected", unexpected, missing)):
        if keys:
            named = []
            for key in keys[:5]:
                near = difflib.get_close_matches(key[:200], others[:1000], n=1)
                named.append(f"{key} (nearest: {near[0]})" if near else key)
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            parts.append(f"{len(keys)} {label}: {', '.join(named)}{more}")
    if misshapen:
        more = f" and {len(misshapen) - 5} more" if len(misshapen) > 5 else ""
        parts.append(f"{len(misshapen)} misshapen: {', '.join(misshapen[:5])}{more}")
    return "the weights do not fit config.json; " + "; ".join(parts)
