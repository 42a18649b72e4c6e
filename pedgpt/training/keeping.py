"""When a run writes checkpoints, which of them stay, and how a signal ends it."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from tqdm import tqdm

from pedgpt.files import DiskFull
from pedgpt.kernels.cpu import products
from pedgpt.training.checkpoint import Checkpoints, latest_checkpoint, prune_checkpoints, read_state
from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import World

# checkpoint_every = "auto" waits _SECONDS, or _TIMES as long as writing takes (5 % of the time) if that is longer.
_SECONDS, _TIMES = 600.0, 20


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
            if self.world.is_main:  # what a run with perhaps other settings found best
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
            # The forms of operators on a CPU belong to the run, because others round differently.
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
