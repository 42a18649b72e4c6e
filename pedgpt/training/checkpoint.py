"""Checkpoints to resume from: torch.distributed.checkpoint, written aside, renamed when complete, checked when read.

A checkpoint is a folder step_N with one `.distcp` file a rank, their index `.metadata`, `state.json` with what must
match on resuming, and `checksums.json` with the size and the CRC-32 of each of them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import re
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
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pedgpt.files import DiskFull, naming_full_disk, publish, write_json
from pedgpt.training.distributed import World, barrier, sum_over_ranks

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE, _INDEX, _SUMS = "state.json", ".metadata", "checksums.json"
# Settings that name the data and the base model, whose content the fingerprint in `_CONTENT` proves.
_PLACES = {"model", "corpus", "text", "general_text", "instructions", "preferences"}
_CONTENT = "rows_and_base_model"


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Mapping[str, Any],
    world: World,
    choices: Mapping[str, bool] | None = None,
) -> None:
    """Write `folder`/step_N with every trained tensor, its AdamW moments and `run`, what must match on resuming.

    `choices` is kept beside it, for `run_choices`.
    The folder gets its name only when it is complete and on disk, so that a run that dies at any moment leaves the one
    before. Called on all ranks; each writes its own part.
    """
    target = folder / f"step_{step:07d}"
    temporary = folder / f".{target.name}.tmp"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier(world)
    tensors, size = _tensors(model, optimizer), checkpoint_size(model)
    fault: OSError | None = None
    try:
        with _quiet():
            writer = _Writer(target, temporary, size)
            dcp.save(tensors, checkpoint_id=temporary, storage_writer=writer, no_dist=world.size == 1)
        sums = [0.0] * (2 * world.size)  # each rank reads what it wrote
        for file in temporary.glob(f"__{world.rank}_*"):
            sums[2 * world.rank : 2 * world.rank + 2] = _checksum(file)
        sums = sum_over_ranks(sums, world)
        if world.is_main:
            try:
                _complete(temporary, target, {"step": step, "run": run, "choices": dict(choices or {})}, sums)
            except OSError as error:
                fault = error
    except dcp.CheckpointException as error:  # on every rank
        cause = next(iter(error.failures.values()))[0]
        raise cause if isinstance(cause, DiskFull) else OSError(f"{target}: {_reason(cause)}") from None
    finally:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    if sum_over_ranks([fault is not None], world)[0]:
        raise fault or DiskFull(f"{target}: cannot be written; the first rank says why")


def _complete(temporary: Path, target: Path, state: Mapping[str, Any], sums: list[float]) -> None:
    """Add the state and the checksums to what the ranks wrote, and give the folder its name."""
    with naming_full_disk(target, 2**12):
        write_json(temporary / _STATE, state)
        pairs = zip(map(int, sums[::2]), map(int, sums[1::2]), strict=True)
        # A rank that holds nothing wrote no file.
        found = {f"__{rank}_0.distcp": list(pair) for rank, pair in enumerate(pairs) if pair[0]}
        found |= {name: _checksum(temporary / name) for name in (_INDEX, _STATE)}
        write_json(temporary / _SUMS, found)
        _remove(target)
        publish(temporary, target)


def checkpoint_size(model: nn.Module) -> int:
    """Bytes that a checkpoint takes on the disk, over all ranks: weights and moments of what trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(parameter.numel() * parameter.element_size() for parameter in trained) * (1 + len(_MOMENTS))


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`."""
    return max(all_checkpoints(folder), default=None)


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: Mapping[str, Any], world: World
) -> int:
    """Fill the model's trained tensors and the optimizer from a checkpoint; returns the step to go on from.

    Works with another number of ranks. Raises ValueError if a file of the checkpoint is damaged, and if `run` differs
    from what the checkpoint was written with, naming each difference.
    """
    step, sizes = _verify(checkpoint, run, world)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in _MOMENTS}
            optimizer.state[parameter]["step"] = torch.tensor(float(step), device=parameter.device)
    try:
        with _quiet():
            reader = _SafeReader(checkpoint, sizes)
            dcp.load(_tensors(model, optimizer), storage_reader=reader, no_dist=world.size == 1)
    except (OSError, pickle.UnpicklingError) as error:
        raise _damaged(checkpoint, error) from None
    except dcp.CheckpointException as error:
        raise _damaged(checkpoint, next(iter(error.failures.values()))[0]) from None
    return step


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, and what an interrupted save left."""
    complete = all_checkpoints(folder)
    for path in complete[: max(0, len(complete) - keep)]:
        _remove(path)
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that no death in between leaves half of one under its name."""
    if checkpoint.exists():
        away = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
        shutil.rmtree(away, ignore_errors=True)
        os.replace(checkpoint, away)
        shutil.rmtree(away)


def _verify(checkpoint: Path, run: Mapping[str, Any], world: World) -> tuple[int, dict[str, int]]:
    """Check that every byte of a checkpoint is what was written; returns its step, and its files with their sizes.

    The ranks share the reading, and raise ValueError together if one of them finds damage.
    """
    fault: ValueError | None = None
    step, sizes = 0, {}
    try:
        if checkpoint.is_symlink():
            raise OSError("it is a link")
        if not (checkpoint / _SUMS).exists():
            raise OSError(f"it has no {_SUMS}: damaged, or of an older version of pedgpt, with which it can go on")
        sums = json.loads(_plain(checkpoint, _SUMS).read_bytes())
        sizes = {str(name): int(size) for name, (size, _) in sums.items()}
        state = json.loads(_plain(checkpoint, _STATE).read_bytes())
        step = int(state["step"])
        if checkpoint.name != f"step_{step:07d}":
            raise OSError(f"{_STATE} is of step {step}")
        names = [_STATE, *sorted({*sums, _INDEX} - {_STATE})]  # in the same order on every rank
        for number, name in enumerate(names):
            path = _plain(checkpoint, name)
            if (number == 0 or number % world.size == world.rank) and _checksum(path) != sums[name]:
                raise OSError(f"{name} is not what was written: its size or checksum differs")
            if number == 0:  # before gigabytes are read: other settings are the user's mistake
                refuse_changes(state["run"], run, checkpoint)
    except _Changed as error:
        fault = error
    except Exception as error:  # damaged JSON raises almost anything
        fault = _damaged(checkpoint, error)
    if sum_over_ranks([fault is not None], world)[0]:
        raise fault or ValueError(f"{checkpoint}: cannot be read; another rank says why")
    return step, sizes


def _plain(checkpoint: Path, name: str) -> Path:
    """The path of a checkpoint's file; OSError if it lies elsewhere or is a link or a pipe, which may never end."""
    path = checkpoint / name
    if Path(name).name != name or path.is_symlink() or not path.is_file():
        raise OSError(f"{name} is missing, or is no plain file")
    return path


def _checksum(path: Path) -> list[int]:
    """[size, CRC-32] of a file."""
    size = checksum = 0
    buffer = memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            size, checksum = size + count, zlib.crc32(buffer[:count], checksum)
    return [size, checksum]


def _damaged(checkpoint: Path, cause: BaseException) -> ValueError:
    """The error that says what to do about a checkpoint that cannot be used."""
    before = [path.name for path in all_checkpoints(checkpoint.parent) if path.name < checkpoint.name]
    remedy = f"to go on from the one before, {before[-1]}" if before else "to start anew, as there is none before it"
    return ValueError(f"{checkpoint}: cannot be read ({_reason(cause)}); delete it {remedy}: rm -r '{checkpoint}'")


def _reason(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


class _Changed(ValueError):
    """The run on disk has other settings."""


def refuse_changes(saved: Mapping[str, Any], run: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError naming every setting in which the run on disk differs from this one.

    Where files lie does not matter as long as their content is the same.
    """
    moved = _PLACES if saved.get(_CONTENT) == run.get(_CONTENT) else set()
    changed = [
        f"{key} was {saved.get(key)!r}, is {run.get(key)!r}"
        for key in sorted({*saved, *run} - moved)
        if (saved.get(key) or False) != (run.get(key) or False)  # a setting that did not exist yet was off, or empty
    ]
    if changed:
        raise _Changed(
            f"{where} belongs to a run with other settings: {'; '.join(changed)}. "
            "Go back to those, choose another --output, or delete the folder to start anew"
        )


def all_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, the last one last."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{7}", path.name))


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds, all of it tensors: DCP pickles anything else."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.data
            for moment in _MOMENTS:
                tensors[f"optimizer.{name}.{moment}"] = optimizer.state[parameter][moment]
    return tensors


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which reports a full disk: torch's error speaks only of a wrong position in the file."""

    def __init__(self, target: Path, folder: Path, size: int) -> None:
        super().__init__(folder)
        self.target, self.size = target, size

    def write_data(self, *args: Any) -> Any:
        with naming_full_disk(self.target, self.size):
            return super().write_data(*args)


class _SafeReader(dcp.FileSystemReader):
    """DCP's reader, whose pickled index may name only DCP's record types and bytes inside the checkpoint's files."""

    def __init__(self, checkpoint: Path, sizes: Mapping[str, int]) -> None:
        super().__init__(checkpoint)
        content = (checkpoint / _INDEX).read_bytes()
        try:
            for opcode, argument, _ in pickletools.genops(content):
                # A short index can ask for a memo of 2^32 entries.
                if "PUT" in opcode.name and int(argument or 0) > len(content):
                    raise pickle.UnpicklingError(f"the index of the checkpoint asks for {argument} entries of memory")
            index = _MetadataUnpickler(io.BytesIO(content)).load()
            if not isinstance(index, Metadata):
                raise pickle.UnpicklingError(f"the index of the checkpoint holds a {type(index).__name__}")
            for name, stored in index.state_dict_metadata.items():
                # DCP would unpickle what is no tensor, which runs code, and would not fill a tensor without chunks.
                whole = isinstance(stored, TensorStorageMetadata) and stored.size.numel() == sum(
                    chunk.sizes.numel() for chunk in stored.chunks
                )
                if not whole:
                    raise pickle.UnpicklingError(f"the index of the checkpoint holds no whole tensor {name!r}")
            for place in index.storage_data.values():
                inside = 0 <= place.offset <= place.offset + place.length <= sizes.get(place.relative_path, -1)
                if not inside or place.transform_descriptors:
                    raise pickle.UnpicklingError(f"the index names bytes outside its files, in {place.relative_path!r}")
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # a broken pickle raises almost anything
            raise pickle.UnpicklingError(f"the index of the checkpoint is broken: {error}") from None
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.index.storage_meta = self.index.storage_meta or dcp.metadata.StorageMeta()
        self.index.storage_meta.load_id = self.load_id
        return self.index


class _MetadataUnpickler(pickle.Unpickler):
    _allowed = {
        "torch": {"Size", "device"},
        "torch.serialization": {"_get_layout"},
        "torch._utils": {"_rebuild_device_mesh"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
        "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        # Only the classes that the module defines: what it imports, such as `dataclass`, can be made to run code.
        found = getattr(dcp.metadata, name, None) if module == dcp.metadata.__name__ else None
        record = isinstance(found, type) and found.__module__ == module
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if record or dtype or name in self._allowed.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index of the checkpoint names {module}.{name}, which is not allowed")


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
