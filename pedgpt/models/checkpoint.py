"""HF model folders: config.json and weights, read strictly and within their own size, written atomically."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pedgpt.files import naming_full_disk, settle, sync, write_json
from pedgpt.kernels.linear_logps import SHORTEST
from pedgpt.models.config import ModelConfig
from pedgpt.models.transformer import Transformer
from pedgpt.models.weight_files import HEAD, INDEX, READ_BYTES, WEIGHTS, Weights, weight_files

GENERATION = "generation_config.json"
SHARD_BYTES = 5 * 2**30
COMPARED = 2**20  # numbers of a trained tensor that are compared with those before training
NamedTensors = Iterable[tuple[str, Tensor]]


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """The model of an HF folder (safetensors, or else .bin), in evaluation mode; no code of the checkpoint is run.

    `dtype` None keeps the stored one: on the CPU, weights then stay mapped from their files, so loading is lazy and
    processes share them; otherwise they are copied piece by piece. With `device="meta"` only config.json is read, for
    `load_weights` to fill the model later. Raises ValueError that names the file and the keys that are at fault.
    """
    model = _empty(ModelConfig.from_hf(folder)).eval()
    if torch.device(device).type == "meta":
        return model.to(dtype)
    load_weights(model, folder, dtype=dtype, device=device)
    return model


def load_weights(
    model: Transformer, folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> None:
    """Fill a model as `load_model` would. It may be on the meta device; the adapters that it carries stay as they are.

    A model that `fully_shard` split over ranks gets only its own rows on each: no rank reads or holds the whole.
    """
    stored, expected = Weights(Path(folder)), _empty(model.config).state_dict()
    if (tied := model.config.tie_word_embeddings) and HEAD not in stored.tensors:
        del expected[HEAD]
    missing = [key for key in expected if key not in stored.tensors]
    unexpected = [key for key in stored.tensors if key not in expected]
    misshapen = [
        f"{stored.files[key].name}: {key} has the shape {list(tensor.shape)}, not {list(expected[key].shape)}"
        for key, tensor in stored.tensors.items()
        if tensor.shape != expected.get(key, tensor).shape
    ]
    told = _told("missing", missing, unexpected) + _told("unexpected", unexpected, missing)
    if told := told + _told("misshapen", misshapen, ()):
        raise ValueError(f"{folder}: the weights do not fit config.json; {'; '.join(told)}")
    weights, targets, places = {}, model.state_dict(), {0}
    for key in [key for key in stored.tensors if not (tied and key == HEAD)]:
        weights[key] = _read(stored, key, targets[key], dtype, torch.device(device))
        # A .bin may hold one tensor under two names; unless tied, they are two parameters.
        if (place := _local(weights[key])[0].data_ptr()) in places:
            weights[key] = weights[key].clone()
        places.add(place)
    model.load_state_dict(weights, assign=True, strict=False)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    if not model.config.normalize_head:
        return
    head, first = _local(model.lm_head.weight.detach())  # of a sharded head each rank names its own rows
    lengths = torch.cat([torch.linalg.vector_norm(rows.float(), dim=-1) for rows in head.split(1024)])
    if ids := [first + row for row in (lengths < SHORTEST).nonzero().flatten().tolist()]:
        named = f"{', '.join(map(str, ids[:5]))}{', …' * (len(ids) > 5)} ({len(ids)} in all)"
        warnings.warn(
            f"{folder}: the rows of lm_head.weight for the tokens {named} are zeros. A normalised head gives them the "
            "logit 0 and cannot train them. Fill those of new tokens, with the mean of the other rows for example",
            stacklevel=2,
        )


def save_model(
    model: Transformer, folder: str | Path, weights: Mapping[str, Tensor] | NamedTensors | None = None,
    config: ModelConfig | None = None,
) -> None:  # fmt: skip
    """Write config.json and the weights (shards of 5 GiB with an index) so that other tools load the folder.

    `weights` and `config` replace the model's own; of weights that come name by name, at most one shard is held. Each
    file is written under a temporary name, synced, and renamed when all are there. Raises ValueError for adapters.
    """
    config, folder, total = config or model.config, Path(folder), 0
    weights = model.state_dict() if weights is None else weights
    parts: dict[Path, dict[str, torch.dtype]] = {}  # temporary files with what they hold
    with ExitStack() as leftovers:
        for shard in _shards(config, weights.items() if isinstance(weights, Mapping) else weights):
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f".{WEIGHTS}.{len(parts) + 1}.tmp"
            leftovers.callback(part.unlink, missing_ok=True)
            parts[part] = {key: tensor.dtype for key, tensor in shard.items()}
            total += sum(tensor.nbytes for tensor in shard.values())
            with naming_full_disk(folder / WEIGHTS, total):
                save_file(shard, part, metadata={"format": "pt"})
                sync(part)  # every part is complete on the disk before the first one gets its name
            shard.clear()
        count = len(parts)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [WEIGHTS]
        with suppress(ValueError):  # a broken folder may be saved over
            if count > 1 and any(file.name in names for file in weight_files(folder)):  # never over a live shard
                names = [name.replace(".", "-b.") for name in names]
        for part, name in zip(parts, names, strict=True):
            settle(part, folder / name)
    # What counts is the index where there is one: with its change, or its end, the new weights take over at once.
    if count > 1:
        weight_map = {key: name for keys, name in zip(parts.values(), names, strict=True) for key in keys}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    dtype = min(str(dtype).removeprefix("torch.") for kept in parts.values() for dtype in kept.values())
    # transformers reads "dtype" before the older "torch_dtype": neither may be left stale.
    write_json(folder / "config.json", raw := {**config.to_hf(), "dtype": dtype, "torch_dtype": dtype})
    if not (folder / GENERATION).exists():
        ends = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
        write_json(folder / GENERATION, {"_from_model_config": True, **ends})
    for path in list(folder.iterdir()):
        if re.fullmatch(r"model(-\d{5}-of-\d{5}(-b)?)?\.safetensors", path.name) and path.name not in names:
            path.unlink()


def _shards(config: ModelConfig, weights: NamedTensors) -> Iterator[dict[str, Tensor]]:
    """A model's weights in parts of SHARD_BYTES; ValueError for one that is not the model's, or that is missing."""
    expected, tied = set(_empty(config).state_dict()), config.tie_word_embeddings
    shard: dict[str, Tensor] = {}  # which the caller empties
    for key, tensor in weights:
        if key not in expected:
            raise ValueError(f"the model carries weights beside its own ({key}, …): use save_adapter for adapters")
        expected.discard(key)
        if not (tied and key == HEAD):
            if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > SHARD_BYTES:
                yield shard
            shard[key] = tensor.detach().cpu().contiguous()
    if missing := sorted(expected - ({HEAD} if tied else set())):
        raise ValueError(f"the weights to save lack {', '.join(missing[:5])} ({len(missing)} in all)")
    yield shard


def round_weights(weights: NamedTensors, dtype: torch.dtype, *, since: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield trained weights in the dtype to save; at the end, print how much of the training the rounding undid.

    It is measured against the folder `since`, from which the training began, in a sample of the rows of large tensors.
    """
    start, totals = None, torch.zeros(4, dtype=torch.float64)
    with suppress(ValueError, OSError):  # the result is saved even where this cannot be measured
        start = Weights(Path(since))
    for name, trained in weights:
        saved, stored = trained.to(dtype), start.tensors.get(name) if start else None
        if start and stored is not None and stored.shape == trained.shape and saved.dtype != trained.dtype:
            step = max(1, min(len(trained), trained.numel() // COMPARED))
            with suppress(ValueError, OSError):
                before, after, rounded = (x[::step].to(trained.dtype) for x in (start.whole(name), trained, saved))
                changed = after != before
                undone = changed & (rounded == before.to(dtype).to(trained.dtype))
                parts = (after - before).square(), (rounded - after).square(), changed, undone
                totals += step * torch.stack([part.sum(dtype=torch.float64) for part in parts])
        yield name, saved
    moved, lost, changed, undone = totals.tolist()
    if moved:
        share, kind = (lost / moved) ** 0.5, str(dtype).removeprefix("torch.")
        print(
            f"saved in {kind}: rounding moved the weights by {share:.0%} of what training moved them, and "
            f"{undone / changed:.0%} of the trained numbers are saved as if untrained; --save_dtype float32 keeps them"
        )


def _empty(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def _told(what: str, keys: Sequence[str], others: Sequence[str]) -> list[str]:
    """How many keys of a kind there are, with the names of five and for each the nearest of the `others`."""
    near = [difflib.get_close_matches(key[:200], others[:1000], n=1) for key in keys[:5]]
    named = [f"{key} (nearest: {names[0]})" if names else key for key, names in zip(keys, near, strict=False)]
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return [f"{len(keys)} {what}: {', '.join(named)}{more}"] if keys else []


def _local(tensor: Any) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, and the number of its first row: FSDP2 splits rows as `torch.chunk` does."""
    if not hasattr(tensor, "to_local"):  # it is no DTensor; importing that class takes 0.4 s and 40 MB
        return tensor, 0
    mesh = tensor.device_mesh
    assert mesh.ndim == 1 and tensor.placements[0].is_shard(0), "expected rows split over one mesh dimension"
    return tensor.to_local(), mesh.get_local_rank() * -(-len(tensor) // mesh.size())


def _read(stored: Weights, key: str, target: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """A stored tensor, or this rank's rows of it, in its final dtype and place, never with a second whole copy."""
    dtype = dtype or stored.tensors[key].dtype
    if _local(target)[0] is target and dtype == stored.tensors[key].dtype and device.type == "cpu":
        return stored.whole(key)
    tensor = torch.empty_like(target, dtype=dtype, device=device)
    local, first = _local(tensor)
    step = max(1, READ_BYTES // max(1, stored.tensors[key][:1].nbytes))
    for row in range(0, len(local), step):
        part = local[row : row + step]
        part.copy_(stored.rows(key, first + row, first + row + len(part)))
    return tensor
