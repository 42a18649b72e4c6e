"""HF model folders: config.json and weights, read strictly and within their own size, written atomically."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pedgpt.files import naming_full_disk, settle, sync, write_json
from pedgpt.kernels.linear_logps import SHORTEST
from pedgpt.kernels.quantized import Quantization, QuantizedLinear
from pedgpt.models import quantized
from pedgpt.models.config import ModelConfig
from pedgpt.models.quantized import PART, stored_format, stored_key, weight_key
from pedgpt.models.transformer import Transformer
from pedgpt.models.weight_files import HEAD, INDEX, READ_BYTES, WEIGHTS, Weights, weight_files

GENERATION = "generation_config.json"
SHARD_BYTES = 5 * 2**30
COMPARED = 2**20  # numbers of a trained tensor that are compared with those before training
QUANTIZED_BYTES = 2**19  # that a CPU quantises at once: larger pieces leave freed memory in the heap while loading
NamedTensors = Iterable[tuple[str, Tensor]]


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", quantize: str = "none"
) -> Transformer:
    """The model of an HF folder (safetensors, or else .bin), in evaluation mode; no code of the checkpoint is run.

    `dtype` None keeps the stored one: on the CPU, weights then stay mapped from their files, so loading is lazy and
    processes share them; otherwise they are copied piece by piece. `quantize` "int8" or "nf4" stores the blocks' linear
    layers in 8 or 4 bits, row block by row block while they are read; a folder in one of these formats stays in it, as
    `save_model` writes it. With `device="meta"` only config.json is read, for `load_weights` to fill the model later.
    Raises ValueError that names the file and the keys that are at fault.
    """
    config = ModelConfig.from_hf(folder)
    if quantize not in ("none", stored := stored_format(config.quantization_config)):
        if quantize not in quantized.SETTINGS or stored != "none":
            expected = "none, int8 or nf4" if stored == "none" else f"none, because {folder} is stored in {stored}"
            raise ValueError(f"quantize is {quantize!r}, expected {expected}")
        config = replace(config, quantization_config=quantized.SETTINGS[quantize])
    model = _empty(config, dtype)
    if torch.device(device).type != "meta":
        load_weights(model, folder, dtype=dtype, device=device)
    return model.eval()


def weights_format(folder: str | Path, quantize: str = "none") -> str:
    """In which format the weights of a folder are used, if they are loaded with `quantize`: none, int8 or nf4."""
    stored = stored_format(ModelConfig.from_hf(folder).quantization_config)
    return quantize if stored == "none" else stored


def load_weights(
    model: Transformer, folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> None:
    """Fill a model as `load_model` would. It may be on the meta device; the adapters that it carries stay as they are.

    A model that `fully_shard` split over ranks gets only its own rows on each: no rank holds the whole, and none reads
    it but to quantise it.
    """
    stored, empty = Weights(Path(folder)), _empty(model.config)
    tied, weights, places = model.config.tie_word_embeddings, {}, {0}
    for key, tensor in _read_all(stored, empty, model.state_dict(), dtype, torch.device(device)):
        # A .bin may hold one tensor under two names; unless tied, they are two parameters.
        place = _local(tensor)[0].data_ptr()
        weights[key] = tensor.clone() if place in places else tensor
        places.add(place)
    model.load_state_dict(weights, assign=True, strict=False)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    for module in model.modules():
        if isinstance(module, Quantization):
            module.dtype = model.lm_head.weight.dtype
    if not model.config.normalize_head:
        return
    head, first = _local(model.lm_head.weight.detach())  # of a sharded head each rank names its own rows
    lengths = torch.linalg.vector_norm(head, dim=-1).float()  # summed in float32, without a copy of the head
    if ids := [first + row for row in (lengths < SHORTEST).nonzero().flatten().tolist()]:
        named = f"{', '.join(map(str, ids[:5]))}{', …' * (len(ids) > 5)} ({len(ids)} in all)"
        told = f"{folder}: the rows of lm_head.weight for the tokens {named} are zeros, which a normalised head cannot "
        warnings.warn(f"{told}train. Fill those of new tokens, with the mean of the others for example", stacklevel=2)


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
    if isinstance(weights, Mapping):  # which layers are quantised, merging may have changed
        config, weights = replace(config, quantization_config=quantized.settings_of(weights)), weights.items()
    parts: dict[Path, dict[str, torch.dtype]] = {}  # temporary files with what they hold
    with ExitStack() as leftovers:
        for shard in _shards(config, weights):
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
    raw = {**config.to_hf(), "dtype": dtype, "torch_dtype": dtype}
    if config.quantization_config:
        raw["quantization_config"]["bnb_4bit_compute_dtype"] = dtype
    write_json(folder / "config.json", raw)
    if not (folder / GENERATION).exists():
        ends = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
        write_json(folder / GENERATION, {"_from_model_config": True, **ends})
    for path in list(folder.iterdir()):
        if re.fullmatch(r"model(-\d{5}-of-\d{5}(-b)?)?\.safetensors", path.name) and path.name not in names:
            path.unlink()


def _shards(config: ModelConfig, weights: NamedTensors) -> Iterator[dict[str, Tensor]]:
    """A model's weights in parts of SHARD_BYTES; ValueError for one that is not the model's, or that is missing.

    The tensors of a quantised layer are in one part, because other libraries read a layer from one file.
    """
    shapes, tied, dtype = _empty(config).state_dict(), config.tie_word_embeddings, torch.float32
    expected = set(shapes)
    shard: dict[str, Tensor] = {}  # which the caller empties
    for key, tensor in weights:
        if key not in expected:
            raise ValueError(f"the model carries weights beside its own ({key}, …): use save_adapter for adapters")
        expected.discard(key)
        layer, _, part = key.rpartition(PART)
        dtype = tensor.dtype if tensor.is_floating_point() and not layer else dtype
        if not (tied and key == HEAD):
            size = sum(other.nbytes for other in shard.values()) + tensor.nbytes
            if shard and size > SHARD_BYTES and not layer:
                yield shard
            shard |= quantized.pack(key, tensor.detach().cpu().contiguous(), shapes, dtype)
    if missing := sorted(expected - ({HEAD} if tied else set())):
        raise ValueError(f"the weights to save lack {', '.join(missing[:5])} ({len(missing)} in all)")
    yield shard


def round_weights(weights: NamedTensors, dtype: torch.dtype, *, since: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield trained weights in the dtype to save; at the end, print how much of the training the rounding undid.

    It is measured against the folder `since`, from which the training began, in a sample of the rows of large tensors.
    """
    start, moved, lost = None, 0.0, 0.0
    with suppress(ValueError, OSError):  # the result is saved even where this cannot be measured
        start = Weights(Path(since))
    for name, trained in weights:
        saved = trained.to(dtype)
        if start and saved.dtype != trained.dtype and name in start.tensors:
            step = max(1, min(len(trained), trained.numel() // COMPARED))
            with suppress(ValueError, OSError, RuntimeError):  # RuntimeError where the shapes differ
                before, after, rounded = (x[::step].double() for x in (start.whole(name), trained, saved))
                moved += step * (after - before).square().sum().item()
                lost += step * (rounded - after).square().sum().item()
        yield name, saved
    if moved:
        kind, share = str(dtype).removeprefix("torch."), (lost / moved) ** 0.5
        told = f"saved in {kind}: rounding moved the weights by {share:.0%} of what training moved them"
        print(f"{told}; --save_dtype float32 keeps them")


def _empty(config: ModelConfig, dtype: torch.dtype | None = None) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    if config.quantization_config:
        quantized.quantize_layers(model, config.quantization_config)
    return model


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


def _read_all(
    stored: Weights, empty: Transformer, targets: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device
) -> NamedTensors:
    """All tensors of a model, each in its final dtype and place; ValueError unless the stored ones are the model's."""
    shapes, tied = empty.state_dict(), empty.config.tie_word_embeddings and HEAD
    expected: dict[str, Tensor] = {}  # in the layout of the files
    to_quantize = {}
    for name, layer in empty.named_modules():
        found = stored.tensors.get(key := f"{name}.weight")
        if isinstance(layer, QuantizedLinear) and found is not None and found.is_floating_point():
            to_quantize[key], expected[key] = layer, found.new_empty(layer.out_features, layer.in_features)
    others = [key for key in shapes if weight_key(key) not in to_quantize]
    for key in others:
        expected |= quantized.pack(key, shapes[key], shapes, torch.float32)
    if tied and HEAD not in stored.tensors:
        del expected[HEAD]
    missing = [key for key in expected if key not in stored.tensors]
    unexpected = [key for key in stored.tensors if key not in expected]
    misshapen = [
        f"{stored.files[key].name}: {key} has the shape {_shape(tensor)}, not {_shape(expected[key])}"
        for key, tensor in stored.tensors.items()
        if _shape(tensor) != _shape(expected.get(key, tensor)) and not key.endswith(quantized.STATE)
    ]
    told = _told("missing", missing, unexpected) + _told("unexpected", unexpected, missing)
    if told := told + _told("misshapen", misshapen, ()):
        raise ValueError(f"{stored.folder}: the weights do not fit config.json; {'; '.join(told)}")
    for key, tensor in expected.items():
        fixed = not tensor.is_meta and not key.endswith(quantized.STATE)  # a table, or the order of the codes
        if fixed and not torch.allclose(stored.whole(key).to(tensor.dtype), tensor, rtol=0, atol=1e-6):
            raise ValueError(f"{stored.files[key]}: {key} is not what bitsandbytes writes; {quantized.INSTEAD}")
    keys = [key for key in [*others, *to_quantize] if key != tied]
    for key in sorted(keys, key=lambda key: stored.files[stored_key(key)]):
        if key in to_quantize:
            parts = dict(_quantize(stored, key, to_quantize[key], targets, device))
        elif key.endswith(f"{PART}offset"):
            parts = {key: quantized.stored_offset(stored, key, shapes[weight_key(key)]).to(device)}
        else:
            parts = {key: _read(stored, key, targets[key], dtype, device)}
        floats = [tensor for name, tensor in parts.items() if PART in name and tensor.is_floating_point()]
        if not all(tensor.isfinite().all() for tensor in floats):
            raise ValueError(f"{stored.files[stored_key(key)]}: {stored_key(key)} holds numbers that are not finite")
        yield from parts.items()


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}" + f" in {tensor.dtype}" * (not tensor.is_floating_point())


def _quantize(
    stored: Weights, key: str, layer: QuantizedLinear, targets: Mapping[str, Tensor], device: torch.device
) -> NamedTensors:
    """The tensors in 8 or 4 bits of a weight that is stored plain; each rank reads all rows and keeps its own."""
    codes, quantization = torch.empty_like(layer.weight, device=device), copy.deepcopy(layer.quantization)
    most = QUANTIZED_BYTES if device.type == "cpu" else 32 * QUANTIZED_BYTES
    step = max(1, most // stored.tensors[key][:1].nbytes)
    rows = (stored.rows(key, row, row + step).to(device) for row in range(0, len(codes), step))
    quantization.to_empty(device=device).quantize_(codes, rows)
    for part, whole in {"": codes, **quantization.state_dict()}.items():
        name = key.removesuffix(".weight") + PART + part if part else key
        local, first = _local(targets[name])
        if local is not targets[name]:
            own = torch.empty_like(targets[name], device=device)
            _local(own)[0].copy_(whole[first : first + len(local)])
            whole = own
        yield name, whole


def _read(stored: Weights, key: str, target: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """A stored tensor, or this rank's rows of it, in its final dtype and place, never with a second whole copy.

    Several rows of bitsandbytes' flat tensors are one row of the target.
    """
    source = stored.tensors[name := stored_key(key)]
    dtype, many = dtype or source.dtype, len(source) // len(target)
    if PART in key or not source.is_floating_point():
        dtype = target.dtype
    if _local(target)[0] is target and dtype == source.dtype and device.type == "cpu":
        return stored.whole(name).reshape(target.shape)
    tensor = torch.empty_like(target, dtype=dtype, device=device)
    local, first = _local(tensor)
    step = max(1, READ_BYTES // max(1, many * source[:1].nbytes))
    for row in range(0, len(local), step):
        part, start = local[row : row + step], many * (first + row)
        part.copy_(stored.rows(name, start, start + many * len(part)).reshape(part.shape))
    return tensor
