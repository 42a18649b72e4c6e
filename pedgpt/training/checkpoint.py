"""Checkpoints to resume from: torch.distributed.checkpoint, written aside, renamed when complete."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata

from pedgpt.files import sync
from pedgpt.training.distributed import World, barrier

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE = "state.json"


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, run: Mapping[str, Any], world: World
) -> None:
    """Write `folder`/step_N with every trained tensor, its AdamW moments and `run`, what must match on resuming.

    The folder gets its name only when it is complete and on disk, so that a run that dies at any moment leaves the one
    before. Called on all ranks; each writes its own part.
    """
    target = folder / f"step_{step:07d}"
    temporary = folder / f".{target.name}.tmp"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier(world)
    with _quiet():
        dcp.save(_tensors(model, optimizer), checkpoint_id=temporary, no_dist=world.size == 1)
    if world.is_main:
        state = temporary / _STATE
        state.write_text(json.dumps({"step": step, "run": run}, indent=2, ensure_ascii=False), encoding="utf-8")
        for path in (state, temporary):
            sync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        sync(folder)
    barrier(world)


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`."""
    return max(_complete(folder), default=None)


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: Mapping[str, Any], world: World
) -> int:
    """Fill the model's trained tensors and the optimizer from a checkpoint; returns the step to go on from.

    Works with another number of ranks. Raises ValueError if `run` differs from what the checkpoint was written with,
    naming each difference.
    """
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        saved, step = state["run"], int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / _STATE}: cannot be read ({error})") from None
    refuse_changes(saved, run, checkpoint)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in _MOMENTS}
            optimizer.state[parameter]["step"] = torch.tensor(float(step), device=parameter.device)
    try:
        with _quiet():
            dcp.load(_tensors(model, optimizer), storage_reader=_SafeReader(checkpoint), no_dist=world.size == 1)
    except (OSError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        reason = str(cause).partition("\n")[0] or type(cause).__name__
        raise ValueError(f"{checkpoint}: cannot be read, delete it to go on from the one before ({reason})") from None
    return step


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, and what an interrupted save left."""
    complete = sorted(_complete(folder))
    for path in [*complete[: max(0, len(complete) - keep)], *folder.glob(".step_*.tmp")]:
        shutil.rmtree(path)


def refuse_changes(saved: Mapping[str, Any], run: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError naming every setting in which the run on disk differs from this one."""
    changed = [
        f"{key} was {saved.get(key)!r}, is {run.get(key)!r}"
        for key in sorted({*saved, *run})
        if (saved.get(key) or False) != (run.get(key) or False)  # a switch that did not exist yet was off
    ]
    if changed:
        raise ValueError(
            f"{where} belongs to a run with other settings: {'; '.join(changed)}. "
            "Go back to those, choose another --output, or delete the folder to start anew"
        )


def _complete(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{7}", path.name)]


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds, all of it tensors: DCP pickles anything else."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.data
            for moment in _MOMENTS:
                tensors[f"optimizer.{name}.{moment}"] = optimizer.state[parameter][moment]
    return tensors


class _SafeReader(dcp.FileSystemReader):
    """DCP's reader, but its pickled index may name DCP's own record types only, never code to run."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        with open(checkpoint / ".metadata", "rb") as handle:
            try:
                index = _MetadataUnpickler(handle).load()
            except pickle.UnpicklingError:
                raise
            except Exception as error:  # a broken pickle raises almost anything
                raise pickle.UnpicklingError(f"the index of the checkpoint is broken: {error}") from None
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"the index of the checkpoint holds a {type(index).__name__}")
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
