"""When a run writes checkpoints, how many of them the disk holds, and how a signal ends it."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import nn
from tqdm import tqdm

from pedgpt.files import DiskFull
from pedgpt.training.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import World, local, sum_over_ranks, trained

# checkpoint_every = "auto" waits _SECONDS, or _TIMES as long as writing takes (5 % of the time) if that is longer.
_SECONDS, _TIMES = 600.0, 20
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Checkpoints:
    """The checkpoints of one run. All ranks call the same methods; the main rank decides what is due."""

    settings: TrainingSettings
    model: nn.Module
    optimizer: torch.optim.Optimizer
    run: Mapping[str, Any]
    world: World
    choices: Mapping[str, bool] | None
    best: float = math.inf  # the lowest held-out loss so far
    written: float = field(default_factory=time.monotonic)  # when the last one was complete
    seconds: float = 0.0  # how long that took

    def __post_init__(self) -> None:
        self.folder, self.every = Path(self.settings.output) / "checkpoints", self.settings.checkpoint_every

    def resume(self, total_steps: int) -> int:
        """Load the last checkpoint, if there is one, and return the step to go on from."""
        checkpoint = latest_checkpoint(self.folder)
        if checkpoint is None:
            if self.world.is_main:  # what a run with perhaps other settings found best
                prune_checkpoints(self.folder / "best", 0)
            return 0
        step = load_checkpoint(checkpoint, self.model, self.optimizer, self.run, self.world)
        if self.world.is_main:
            print(f"resuming from {checkpoint} at step {step} of {total_steps}", file=sys.stderr)
        return step

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step."""
        if isinstance(self.every, int):
            return self.every > 0 and step % self.every == 0
        return time.monotonic() - self.written >= max(_SECONDS, _TIMES * self.seconds)

    def save(self, step: int, *, ending: bool) -> bool:
        """Write a checkpoint; false if there is none.

        A full disk is an error only if `checkpoint_every` is a number of steps and the run is not ending; else a
        warning says so. The last good checkpoint stays until the new one is complete.
        """
        require_finite(self.model, step, self.world)
        if not self.every:
            return False
        began = time.monotonic()
        try:
            save_checkpoint(self.folder, step, self.model, self.optimizer, self.run, self.world, self.choices)
        except DiskFull as error:
            if not ending and self.every != "auto":
                raise
            if self.world.is_main:
                tqdm.write(f"warning: no checkpoint after step {step}: {error}", file=sys.stderr)
            return False
        finally:
            self.written = time.monotonic()
            self.seconds = self.written - began
        if self.world.is_main:
            prune_checkpoints(self.folder, self.settings.keep_checkpoints)
        return True

    def keep_best(self, step: int, loss: float) -> None:
        """Write the weights in place of the best ones so far, if this held-out loss is lower."""
        if self.settings.keep_best and loss < self.best:
            self.best = loss
            save_checkpoint(self.folder / "best", step, self.model, None, self.run, self.world)
            if self.world.is_main:
                prune_checkpoints(self.folder / "best", 1)

    def load_best(self) -> None:
        """Make the model the best one of the run."""
        if best := latest_checkpoint(self.folder / "best"):
            step = load_checkpoint(best, self.model, None, self.run, self.world)
            if self.world.is_main:
                print(f"{self.settings.output}: the result is the model after step {step}, of the lowest held-out loss")


def require_finite(model: nn.Module, step: int, world: World) -> None:
    """ValueError, on every rank, if a weight that trains is infinite or not a number."""
    tensors = {name: local(parameter.detach()) for name, parameter in trained(model).items()}
    # The largest of each, infinite or not a number where one number is: exact, and at no further memory.
    largest = {name: torch.linalg.vector_norm(tensor, torch.inf) for name, tensor in tensors.items() if tensor.numel()}
    bad = [name for name, number in largest.items() if not number.isfinite()]
    if sum_over_ranks([len(bad)], world)[0]:
        raise ValueError(
            f"the weights are no longer finite after step {step}{', first ' + bad[0] if bad else ''}: nothing was "
            "saved over the last good checkpoint; lower learning_rate or max_grad_norm, or use float32"
        )


class StopRequest(ExitStack):
    r"""SIGTERM, Ctrl-C and a closed terminal are the wish to stop after this step; Ctrl-\ ends the run at once.

    NOTE: what comes again is the same wish, because `timeout` and service managers send their signal to every process,
    and torchrun passes it on to those that already have it.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.number = 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def _note(self, number: int, frame: object) -> None:
        if self.world.is_main and not self.number:  # a `print` here could interrupt another one
            name = signal.Signals(number).name
            try:
                os.write(2, f"\n{name}: the run ends after this step; Ctrl-\\ ends it at once\n".encode())
            except OSError:  # the terminal is gone, so nothing can be written to it any more
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        self.number = self.number or number

    def agree(self, due: bool) -> tuple[bool, int]:
        """Whether the main rank wants a checkpoint, and the signal that some rank has received, 0 if none.

        Every rank gets the same answer, at the end of the same step: else one would wait for the others for ever.
        """
        wanted, *sent = sum_over_ranks([self.world.is_main and due, *(self.number == n for n in STOPPING)], self.world)
        return bool(wanted), next((number for number, ranks in zip(STOPPING, sent, strict=True) if ranks), 0)

    def leave(self, number: int, place: str, saved: bool) -> NoReturn:
        """Say how the run goes on, and end with the exit code of the signal."""
        how = "goes on from there" if saved else "starts anew, or from the checkpoint before"
        if self.world.is_main:
            line = f"{place}: stopped by {signal.Signals(number).name}; the same command {how}"
            print(line, file=sys.stderr, flush=True)
        raise SystemExit(128 + number)
