"""When a run writes checkpoints, which of them stay, and how a signal ends it."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from tqdm import tqdm

from pedgpt.files import DiskFull
from pedgpt.kernels.cpu import products
from pedgpt.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import World, local, sum_over_ranks, trained

# checkpoint_every = "auto" waits _SECONDS, or _TIMES as long as writing takes (5 % of the time) if that is longer.
_SECONDS, _TIMES = 600.0, 20


@dataclass
class Checkpoints:
    """The checkpoints of one run. All ranks call the same methods."""

    settings: TrainingSettings
    model: nn.Module
    optimizer: torch.optim.Optimizer
    run: Mapping[str, Any]
    world: World
    best: float = math.inf  # the lowest held-out loss so far
    written: float = field(default_factory=time.monotonic)  # when the last one was complete
    seconds: float = 0.0  # how long that took

    def __post_init__(self) -> None:
        self.folder = Path(self.settings.output) / "checkpoints"

    def resume(self, total_steps: int) -> int:
        """Load the last checkpoint, if there is one, and return the step to go on from."""
        checkpoint, best = latest_checkpoint(self.folder), latest_checkpoint(self.folder / "best")
        if checkpoint is None:
            if self.world.is_main:  # what a run with perhaps other settings found best
                prune_checkpoints(self.folder / "best", 0)
            return 0
        if best:
            self.best = read_state(best)["loss"]
        step = load_checkpoint(checkpoint, self.model, self.optimizer, self.run, self.world)["step"]
        if self.world.is_main:
            print(f"resuming from {checkpoint} at step {step} of {total_steps}", file=sys.stderr)
        return step

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step."""
        if self.settings.checkpoint_every == "auto":
            return time.monotonic() - self.written >= max(_SECONDS, _TIMES * self.seconds)
        return bool(self.settings.checkpoint_every) and step % int(self.settings.checkpoint_every) == 0

    def save(self, step: int) -> None:
        """Write a checkpoint, if the run has any. On a full disk a warning says so, and the last good one stays."""
        require_finite(self.model, step, self.world)
        if not self.settings.checkpoint_every:
            return
        # The forms of operators on a CPU: others round differently.
        notes = {"choices": products.settle() if self.world.device.type == "cpu" else {}}
        began = time.monotonic()
        keep = self.settings.keep_checkpoints
        try:
            save_checkpoint(self.folder, step, self.model, self.optimizer, self.run, self.world, notes, keep)
        except DiskFull as error:
            if self.world.is_main:
                tqdm.write(f"warning: no checkpoint after step {step}: {error}", file=sys.stderr)
        self.written = time.monotonic()
        self.seconds = self.written - began

    def keep_best(self, step: int, loss: float) -> None:
        """Write the weights in place of the best ones so far, if this held-out loss is lower."""
        if self.settings.keep_best and loss < self.best:
            self.best = loss
            save_checkpoint(self.folder / "best", step, self.model, None, self.run, self.world, {"loss": loss}, keep=1)

    def load_best(self) -> None:
        """Make the model the best one of the run."""
        if best := latest_checkpoint(self.folder / "best"):
            step = load_checkpoint(best, self.model, None, self.run, self.world)["step"]
            if self.world.is_main:
                print(f"{self.settings.output}: the result is the model after step {step}, of the lowest held-out loss")


def require_finite(model: nn.Module, step: int, world: World) -> None:
    """ValueError, on every rank, if a weight that trains is infinite or not a number."""
    tensors = {name: local(parameter.detach()) for name, parameter in trained(model).items()}
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if sum_over_ranks([len(bad)], world)[0]:
        raise ValueError(
            f"the weights are no longer finite after step {step}{', first ' + bad[0] if bad else ''}: nothing was "
            "saved over the last good checkpoint; lower learning_rate or max_grad_norm, or use float32"
        )


@contextmanager
def noting_signals(world: World) -> Iterator[list[int]]:
    r"""In this block SIGTERM and Ctrl-C only add their number to the list: the wish to stop after this step.

    Ctrl-\ ends the run at once. What comes again is the same wish, because `timeout` and service managers send their
    signal to every process, and torchrun passes it on to those that already have it.
    """
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if world.is_main and not noted:  # A `print` here could interrupt another one.
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: the run ends after this step; Ctrl-\\ ends it at once\n".encode())
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_by_signal(noted: list[int], place: str, world: World) -> NoReturn:
    """Say how the run goes on, and end with the exit code of the signal."""
    number = signal.Signals(noted[0] if noted else signal.SIGTERM)  # Perhaps only another rank has got one.
    if world.is_main:
        how = "the same command goes on from the last checkpoint, or starts anew if there is none"
        print(f"{place}: stopped by {number.name}; {how}", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)
