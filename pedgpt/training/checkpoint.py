"""Checkpoints to resume from: torch.distributed.checkpoint, written aside, renamed when complete, checked when read.

A checkpoint is a folder step_N with one `.distcp` file a rank, their index `.metadata`, `state.json` with what must
match on resuming, and `checksums.json` with the size and the CRC-32 of each of them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from pedgpt.files import DiskFull, naming_full_disk, publish, write_json
from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import World, all_values, barrier, together, trained

_STATE, _INDEX, _SUMS = "state.json", ".metadata", "checksums.json"
# Settings that only say where the data and the base model lie: they may change if the fingerprint is the same.
_PLACES = {"model", "from_adapter", "corpus", "text", "general_text", "instructions", "preferences"}
_CONTENT = "rows_and_base_model"


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    run: Mapping[str, Any],
    world: World,
    choices: Mapping[str, bool] | None = None,
) -> None:
    """Write `folder`/step_N with every trained tensor, the optimizer's state and `run`, what must match on resuming.

    `choices` is kept beside it, for `run_choices`. Without an optimizer the checkpoint holds weights only.
    The folder gets its name only when it is complete and on disk, so that a run that dies at any moment leaves the one
    before. Called on all ranks; each writes its own part.
    """
    target = folder / f"step_{step:07d}"
    temporary = folder / f".{target.name}.tmp"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier(world)
    tensors, places = _contents(model, optimizer)
    numbers = {name: values[key] for name, (values, key) in places.items()}
    state = {"step": step, "run": run, "choices": choices or {}, "optimizer": _settings(optimizer), "numbers": numbers}
    try:
        with _plain_errors():
            dcp.save(tensors, checkpoint_id=temporary, storage_writer=_Writer(temporary), no_dist=world.size == 1)
        written = {file.name: _checksum(file) for file in temporary.glob(f"__{world.rank}_*")}
        sums = {name: pair for files in all_values(written, world) for name, pair in files.items()}
        with together(world, DiskFull(f"{target}: cannot be written; the first rank says why")):
            if world.is_main:
                write_json(temporary / _STATE, state)
                write_json(temporary / _SUMS, sums | {name: _checksum(temporary / name) for name in (_INDEX, _STATE)})
                remove_checkpoint(target)
                publish(temporary, target)
    finally:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, run: Mapping[str, Any], world: World
) -> int:
    """Fill the model's trained tensors and the optimizer from a checkpoint; returns the step to go on from.

    Works with another number of ranks. Raises ValueError if a file of the checkpoint is damaged, and if `run` or the
    optimizer differs from what the checkpoint was written with, naming each difference.
    """
    state = _verify(checkpoint, run, optimizer, world)
    tensors, places = _contents(model, optimizer)
    with _naming(checkpoint), _plain_errors():
        # NOTE: this fills the optimizer too, because the tensors and the dictionaries are its own;
        # `set_optimizer_state_dict` would round moments to the dtype of their parameters.
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=world.size == 1)
        for name, (values, key) in places.items():
            values[key] = state["numbers"][name]
    return state["step"]


def _contents(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, tuple[dict[str, Any], str]]]:
    """The tensors of a checkpoint, and where the optimizer has anything else: DCP would pickle it."""
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.data for name, parameter in trained(model).items()}
    places = {}
    moments: Any = get_optimizer_state_dict(model, optimizer)["state"] if optimizer else {}  # made if there is none yet
    for name, values in moments.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                places[f"{name}.{key}"] = values, key
    return tensors, places


def _settings(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What makes an optimizer another one; the learning rate is set by the schedule."""
    groups = enumerate(optimizer.param_groups, 1) if optimizer else ()
    found = {f"{key} of group {n}": group[key] for n, group in groups for key in group.keys() - {"params", "lr"}}
    return json.loads(json.dumps({"optimizer": type(optimizer).__name__, **found}, default=repr))


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`."""
    return max(all_checkpoints(folder), default=None)


def all_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, the last one last."""
    return sorted(folder.glob("step_" + 7 * "[0-9]"))


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, and what an interrupted save left."""
    for path in all_checkpoints(folder)[::-1][keep:]:
        remove_checkpoint(path)
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint so that no death in between leaves half of one under its name."""
    if checkpoint.exists():
        away = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
        shutil.rmtree(away, ignore_errors=True)
        os.replace(checkpoint, away)
        shutil.rmtree(away)


def refuse_changes(saved: Mapping[str, Any], run: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError naming every setting in which the run on disk differs from this one.

    Where files lie does not matter as long as their content is the same.
    """
    moved = _PLACES if saved.get(_CONTENT) == run.get(_CONTENT) else set()
    changed = []
    for key in sorted({*saved, *run} - moved):
        # A setting that did not exist yet had its default, or was off, or empty.
        was, now = saved.get(key, getattr(TrainingSettings, key, None)), run.get(key)
        if (was or False) != (now or False):
            changed.append(f"{key} was {was!r}, is {now!r}")
    if changed:
        raise ValueError(
            f"{where} belongs to a run with other settings: {'; '.join(changed)}. "
            "Go back to those, choose another --output, or delete the folder to start anew"
        )


def _verify(
    checkpoint: Path, run: Mapping[str, Any], optimizer: torch.optim.Optimizer | None, world: World
) -> dict[str, Any]:
    """Check that every byte of a checkpoint is what was written; returns its state. The ranks share the reading."""
    with _naming(checkpoint):
        sums = json.loads((checkpoint / _SUMS).read_bytes())
        _check_sum(checkpoint, _STATE, sums)
        state = json.loads((checkpoint / _STATE).read_bytes())
        saved = {**state["run"], **state["optimizer"]}
    # Before gigabytes are read: other settings are the user's mistake.
    refuse_changes(saved, {**run, **_settings(optimizer)}, checkpoint)
    with together(world, ValueError(f"{checkpoint}: cannot be read; another rank says why")), _naming(checkpoint):
        files = sorted({*sums, _INDEX} - {_STATE})  # in the same order on every rank
        for name in files[world.rank :: world.size]:
            _check_sum(checkpoint, name, sums)
        index = _Index(io.BytesIO((checkpoint / _INDEX).read_bytes())).load()
        for name, stored in index.state_dict_metadata.items():
            if not isinstance(stored, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} is no tensor, so DCP would unpickle it, which runs code")
    return state


def _check_sum(checkpoint: Path, name: str, sums: Mapping[str, list[int]]) -> None:
    if _checksum(checkpoint / name) != sums[name]:
        raise OSError(f"{name} is not what was written: its size or checksum differs")


def _checksum(path: Path) -> list[int]:
    """[size, CRC-32] of a file."""
    size = checksum = 0
    with open(path, "rb") as handle:
        while block := handle.read(2**20):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


@contextmanager
def _naming(checkpoint: Path) -> Iterator[None]:
    """Say what to do about a checkpoint that cannot be used: damaged JSON and pickles raise almost anything."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{checkpoint}: cannot be read ({reason}); delete it to go on from the one before, or to start anew if "
            f"there is none: rm -r '{checkpoint}'"
        ) from None


@contextmanager
def _plain_errors() -> Iterator[None]:
    """DCP hides the cause in a table of all ranks; and it warns that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except dcp.CheckpointException as error:  # on every rank
            raise next(iter(error.failures.values()))[0] from None


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which reports a full disk: torch's error speaks only of a wrong position in the file."""

    def write_data(self, *args: Any) -> Any:
        with naming_full_disk(str(self.path)):
            return super().write_data(*args)


class _Index(pickle.Unpickler):
    """Reads DCP's index, and makes nothing but what such an index is made of."""

    allowed = {
        "torch.distributed.checkpoint.metadata": "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties"
        " ChunkStorageMetadata MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch": "Size float64 float32 bfloat16 float16 int64 int32 int16 int8 uint8 bool",
        "torch.serialization": "_get_layout",
        "pathlib": "PosixPath",
        "pathlib._local": "PosixPath",
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self.allowed.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which is not allowed")
