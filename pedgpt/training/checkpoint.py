"""Checkpoints to resume from: each rank's tensors, written aside, renamed when complete, checked when read.

A checkpoint is a folder step_N. The file of a rank holds its rows of every tensor that is split over the ranks; the
first one also holds what is not split. `state.json` says what must match on resuming, and `checksums.json` has the
SHA-256 of all these files. They are read with `weights_only=True`, so nothing in them is run as code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pedgpt.files import DiskFull, naming_full_disk, publish, sync, write_json
from pedgpt.kernels.cpu import products
from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import World, all_values, first_row, local, together, trained

_STATE, _SUMS = "state.json", "checksums.json"
_NAME = "step_" + 7 * "[0-9]"
# Settings that only say where the data and the base model lie: they may change if the fingerprint is the same.
_PLACES = {"model", "from_adapter", "corpus", "text", "general_text", "instructions", "preferences"}
_CONTENT = "rows_and_base_model"
# checkpoint_every = "auto" waits _SECONDS, or _TIMES as long as writing takes (5 % of the time) if that is longer.
_SECONDS, _TIMES = 600.0, 20


@dataclass
class Checkpoints:
    """Checkpoints of one run in a folder, of which the last `keep` stay. All ranks call the same methods.

    `run` is what must match on resuming. Without an optimizer they hold weights only.
    """

    folder: Path
    keep: int
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    run: Mapping[str, Any]
    world: World

    def __post_init__(self) -> None:
        self.run = {**self.run, **_settings(self.optimizer)}

    def save(self, step: int, **notes: Any) -> None:
        """Write `folder`/step_N with every trained tensor and the optimizer's state; `notes` go into its state.json.

        The folder gets its name only when it is complete and on disk, so that a run that dies at any moment leaves the
        one before. Each rank writes its own part.
        """
        world, target = self.world, self.folder / f"step_{step:07d}"
        temporary = target.with_name(f".{target.name}.tmp")
        elsewhere = DiskFull(f"{target}: cannot be written; another rank says why")
        with together(world, elsewhere):
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        file = temporary / f"rank_{world.rank:05d}.pt"
        part = {
            name: {key: local(value) for key, value in values.items() if world.is_main or hasattr(value, "placements")}
            for name, values in self._contents().items()
        }
        try:
            with together(world, elsewhere):
                with naming_full_disk(file), open(file, "wb") as handle:
                    torch.save(part, handle)
                sync(file)
            sums = dict(all_values((file.name, _checksum(file)), world))
            with together(world, elsewhere):
                if world.is_main:
                    write_json(temporary / _STATE, {"step": step, "run": self.run, **notes})
                    write_json(temporary / _SUMS, {**sums, _STATE: _checksum(temporary / _STATE)})
                    if target.exists():
                        _hide(target)
                    publish(temporary, target)
                    prune_checkpoints(self.folder, self.keep)
        finally:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Fill the trained tensors and the optimizer from a checkpoint; returns its state, with "step" and the notes.

        Works with another number of ranks. Raises ValueError if a file of the checkpoint is damaged, and if the run or
        the optimizer differs from what it was written with, naming each difference.
        """
        world, state = self.world, read_state(checkpoint)
        refuse_changes(state["run"], self.run, checkpoint)  # before gigabytes are read: it is the user's mistake
        contents = self._contents()
        with together(world, ValueError(f"{checkpoint}: cannot be read; another rank says why")), _naming(checkpoint):
            files = sorted(json.loads((checkpoint / _SUMS).read_bytes()).keys() - {_STATE})
            for name in files[world.rank :: world.size]:  # The ranks share the reading.
                _verify(checkpoint, name)
            parts = [torch.load(checkpoint / name, "cpu", weights_only=True, mmap=True) for name in files]
            for name, values in contents.items():
                for key, value in values.items():
                    found = [part[name][key] for part in parts if key in part[name]]
                    if isinstance(value, Tensor):
                        _fill(f"{name} {key}", value, found)
                    else:
                        (values[key],) = found
        return state

    def _contents(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps: the weights by name, and the optimizer's state of each of them."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        weights = {name: parameter.data for name, parameter in trained(self.model).items()}
        # NOTE: these are the optimizer's own dictionaries, made now if there are none yet. torch's function that loads
        # such a state would round moments to the dtype of their parameters.
        optimizer = self.optimizer
        moments: Any = get_optimizer_state_dict(self.model, optimizer)["state"] if optimizer else {}
        return {"the weights": weights, **moments}  # no parameter has a name with a space


class Keeper:
    """Decides when a run writes checkpoints, keeps its best weights apart, and goes on from what is there."""

    def __init__(
        self, settings: TrainingSettings, model: nn.Module, optimizer: torch.optim.Optimizer, run: Any, world: World
    ) -> None:
        self.settings, self.world = settings, world
        folder = Path(settings.output) / "checkpoints"
        self.last = Checkpoints(folder, settings.keep_checkpoints, model, optimizer, run, world)
        self.best = Checkpoints(folder / "best", 1, model, None, run, world)
        self.lowest = math.inf  # of the held-out losses so far
        self.written, self.seconds = time.monotonic(), 0.0  # when the last one was complete, and how long it took

    def resume(self, total_steps: int) -> int:
        """Load the last checkpoint, if there is one, and return the step to go on from."""
        last, best = latest_checkpoint(self.last.folder), latest_checkpoint(self.best.folder)
        if last is None:
            if self.world.is_main:  # It may be from a run with other settings.
                prune_checkpoints(self.best.folder, 0)
            return 0
        if best:
            self.lowest = read_state(best)["loss"]
        step = self.last.load(last)["step"]
        if self.world.is_main:
            print(f"resuming from {last} at step {step} of {total_steps}", file=sys.stderr)
        return step

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step."""
        if self.settings.checkpoint_every == "auto":
            return time.monotonic() - self.written >= max(_SECONDS, _TIMES * self.seconds)
        return bool(self.settings.checkpoint_every) and step % int(self.settings.checkpoint_every) == 0

    def save(self, step: int) -> None:
        """Write a checkpoint, if the run has any. On a full disk a warning says so, and the last good one stays."""
        if not self.settings.checkpoint_every:
            return
        began = time.monotonic()
        try:
            # A resumed run must use the same CPU operators, because others round differently.
            self.last.save(step, choices=products.settle() if self.world.device.type == "cpu" else {})
        except DiskFull as error:
            if self.world.is_main:
                tqdm.write(f"warning: no checkpoint after step {step}: {error}", file=sys.stderr)
        self.written = time.monotonic()
        self.seconds = self.written - began

    def keep_best(self, step: int, loss: float) -> None:
        """Write the weights in place of the best ones so far, if this held-out loss is lower."""
        if self.settings.keep_best and loss < self.lowest:
            self.lowest = loss
            self.best.save(step, loss=loss)

    def load_best(self) -> None:
        """Make the model the best one of the run."""
        if best := latest_checkpoint(self.best.folder):
            step = self.best.load(best)["step"]
            if self.world.is_main:
                print(f"{self.settings.output}: the result is the model after step {step}, of the lowest held-out loss")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: "step", "run" and notes. Raises ValueError if that is damaged."""
    with _naming(checkpoint):
        _verify(checkpoint, _STATE)
        return json.loads((checkpoint / _STATE).read_bytes())


def _fill(name: str, tensor: Tensor, parts: Sequence[Tensor]) -> None:
    """Fill this rank's rows of a tensor from the saved tensor, whose rows are split over `parts`."""
    mine, first, rows = local(tensor), first_row(tensor), []
    if tensor.ndim and sum(map(len, parts)) != len(tensor):
        raise ValueError(f"{name} has {len(tensor)} rows, and {sum(map(len, parts))} are saved")
    for part in parts if tensor.ndim else ():
        rows.append(part[max(first, 0) : max(first + len(mine), 0)])
        first -= len(part)
    mine.copy_(torch.cat(rows) if rows else parts[0])


def _settings(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Settings that must match on resuming: all but the schedule's learning rate."""
    groups = enumerate(optimizer.param_groups, 1) if optimizer else ()
    found = {f"{key} of group {n}": group[key] for n, group in groups for key in group.keys() - {"params", "lr"}}
    return json.loads(json.dumps({"optimizer": type(optimizer).__name__, **found}, default=repr))


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`."""
    return max(folder.glob(_NAME), default=None)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, and what an interrupted save left."""
    for path in sorted(folder.glob(_NAME), reverse=True)[keep:]:
        _hide(path)
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path)


def _hide(checkpoint: Path) -> None:
    """Take its name from a checkpoint that is to be deleted, so that no death leaves half of one under the name."""
    os.replace(checkpoint, checkpoint.with_name(f".{checkpoint.name}.old.tmp"))


def refuse_changes(saved: Mapping[str, Any], run: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError naming every setting in which the run on disk differs from this one.

    Where files lie does not matter as long as their content is the same.
    """
    moved = _PLACES if saved.get(_CONTENT) == run.get(_CONTENT) else set()
    pairs = {key: (saved.get(key), run.get(key)) for key in sorted({*saved, *run} - moved)}
    # A setting that did not exist yet was off, or empty.
    changed = [f"{key} was {was!r}, is {now!r}" for key, (was, now) in pairs.items() if (was or 0) != (now or 0)]
    if changed:
        raise ValueError(
            f"{where} belongs to a run with other settings: {'; '.join(changed)}. "
            "Go back to those, choose another --output, or delete the folder to start anew"
        )


def _verify(checkpoint: Path, name: str) -> None:
    if _checksum(checkpoint / name) != json.loads((checkpoint / _SUMS).read_bytes())[name]:
        raise OSError(f"{name} is not what was written: its checksum differs")


def _checksum(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def _naming(checkpoint: Path) -> Iterator[None]:
    """Say what to do about a checkpoint that cannot be used: damaged files raise almost anything."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{checkpoint}: cannot be read ({reason}); delete it to go on from the one before, or to start anew if "
            f"there is none: rm -r '{checkpoint}'"
        ) from None
