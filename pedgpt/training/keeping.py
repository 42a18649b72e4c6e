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
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from pedgpt.files import DiskFull, disk_full, free_space, readable_size
from pedgpt.training.checkpoint import (
    all_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    remove_checkpoint,
    save_checkpoint,
)
from pedgpt.training.config import TrainingSettings, tell_torchrun
from pedgpt.training.distributed import World, sum_over_ranks, trained

# checkpoint_every = "auto" waits _SECONDS, or _TIMES as long as writing takes (5 % of the time) if that is longer.
_SECONDS, _TIMES = 600.0, 20
_BYTES_A_SECOND = 1e9  # a guess, until the first checkpoint is written
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SAME_WISH = 1.0  # seconds


class Checkpoints:
    """The checkpoints of one run. All ranks call the same methods; the main rank decides what is due and what fits.

    With `checkpoint_every = "auto"` a checkpoint never stops a run: where it does not fit, a warning says so.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        run: Mapping[str, Any],
        world: World,
        choices: Mapping[str, bool] | None = None,
    ) -> None:
        self.folder = Path(settings.output) / "checkpoints"
        self.settings, self.every, self.keep = settings, settings.checkpoint_every, settings.keep_checkpoints
        self.model, self.optimizer, self.run, self.world, self.choices = model, optimizer, run, world, choices
        parameters = trained(model).values()
        weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        self.size = 3 * weights  # with two moments of each, as AdamW has them; other optimizers have no more
        whole = all(parameter.requires_grad for parameter in model.parameters())  # else it is an adapter
        dtype = getattr(torch, settings.save_dtype or (settings.dtype if whole else "float32"))
        self.result = sum(parameter.numel() for parameter in parameters) * dtype.itemsize + weights * settings.keep_best
        self.best = math.inf  # the lowest held-out loss so far
        self.written = time.monotonic()
        self.seconds = self.size / _BYTES_A_SECOND

    def resume(self, total_steps: int) -> int:
        """Load the last checkpoint, if there is one, and return the step to go on from; check the space on the disk."""
        checkpoint = latest_checkpoint(self.folder)
        step = 0
        if checkpoint is not None:
            step = load_checkpoint(checkpoint, self.model, self.optimizer, self.run, self.world)
        if self.world.is_main:
            self._check_space(total_steps - step)
            if step:
                print(f"resuming from {checkpoint} at step {step} of {total_steps}", file=sys.stderr)
            else:  # what a run with perhaps other settings found best
                prune_checkpoints(self.folder / "best", 0)
        return step

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step."""
        if isinstance(self.every, int):
            return self.every > 0 and step % self.every == 0
        return time.monotonic() - self.written >= max(_SECONDS, _TIMES * self.seconds)

    def save(self, step: int, *, ending: bool) -> bool:
        """Write a checkpoint; false if there is none.

        One that does not fit is an error only if `checkpoint_every` is a number of steps and the run is not ending.
        Older checkpoints make room, but the last good one stays until the new one is complete.
        """
        require_finite(self.model, step, self.world)
        if not self.every:
            return False
        optional = ending or self.every == "auto"
        began = time.monotonic()
        try:
            if not sum_over_ranks([self.world.is_main and self._make_room(optional)], self.world)[0]:
                raise disk_full(self.folder, self.size)
            save_checkpoint(self.folder, step, self.model, self.optimizer, self.run, self.world, self.choices)
        except DiskFull as error:
            if not optional:
                raise
            if self.world.is_main:
                tqdm.write(f"warning: no checkpoint after step {step}: {error}", file=sys.stderr)
            return False
        finally:
            self.written = time.monotonic()
        self.seconds = self.written - began
        if self.world.is_main:
            prune_checkpoints(self.folder, self.keep)
            self._free(self.result)
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

    def _space(self) -> float:
        """Bytes free on the disk; no limit where it does not say."""
        free = free_space(self.folder)
        return math.inf if free is None else free

    def _make_room(self, optional: bool) -> bool:
        """Whether there is room for a checkpoint, once older ones are deleted."""
        usable = self._space() + (len(all_checkpoints(self.folder)) - 1) * self.size
        if optional and usable < self.result:
            return False  # the result would not fit beside it
        if usable >= self.size:
            self._free(self.size)
        return self._space() >= self.size

    def _free(self, needed: int) -> None:
        """Delete old checkpoints, never the last one, until `needed` bytes are free."""
        for checkpoint in all_checkpoints(self.folder)[:-1]:
            if self._space() < needed:
                remove_checkpoint(checkpoint)

    def _check_space(self, steps: int) -> None:
        """Warn before the training of what will not fit; DiskFull if the result or a promised checkpoint cannot fit."""
        free, existing = self._space(), len(all_checkpoints(self.folder))
        if self.every and self.seconds > 20 and "TORCHELASTIC_RUN_ID" in os.environ:
            print(
                f"note: a checkpoint takes about {self.seconds:.0f} s, and torchrun kills its processes 30 s after "
                "SIGTERM or Ctrl-C, which loses what was trained since the last one; give it --shutdown-timeout "
                f"{60 + 2 * self.seconds:.0f} (torch 2.12 and newer)",
                file=sys.stderr,
            )
        usable = free + max(0, existing - 1) * self.size
        every = self.every if isinstance(self.every, int) else 0
        needed = self.size  # beside the last one, which stays until the next is complete
        if not existing:
            needed += self.size if 2 * every <= steps else self.result
        if usable < self.result:
            raise disk_full(self.folder.parent, self.result)
        if 0 < every < steps and usable < needed:
            raise disk_full(self.folder, needed)
        room = free + existing * self.size - self.result
        if self.every and room < self.keep * self.size:
            fitting = int(room // self.size)
            kept = "there is no room for one, so a run that is killed starts anew"
            if fitting > 0:
                kept = f"only {fitting} of {self.keep} checkpoints are kept"
            space = f"{readable_size(int(free))} free, a checkpoint takes {readable_size(self.size)}"
            result = readable_size(self.result)
            print(f"warning: {self.folder.parent}: {space}, the result {result}: {kept}", file=sys.stderr)


def require_finite(model: nn.Module, step: int, world: World) -> None:
    """ValueError, on every rank, if a weight that trains is infinite or not a number."""
    tensors = {name: parameter.detach() for name, parameter in trained(model).items()}
    tensors = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    # The largest of each, infinite or not a number where one number is: exact, and at no further memory.
    largest = {name: torch.linalg.vector_norm(tensor, torch.inf) for name, tensor in tensors.items() if tensor.numel()}
    finite = torch.stack(list(largest.values())).isfinite().tolist() if largest else []
    bad = [name for name, fine in zip(largest, finite, strict=True) if not fine]
    if sum_over_ranks([len(bad)], world)[0]:
        which = f", first {bad[0]}" if bad else ""
        raise ValueError(
            f"the weights are no longer finite after step {step}{which}: nothing was saved over the last good "
            "checkpoint; lower learning_rate or max_grad_norm, or use float32"
        )


class StopRequest(ExitStack):
    """SIGTERM, Ctrl-C and a closed terminal are the wish to stop after this step; a second signal ends the run at once.

    NOTE: what comes within a second is the same wish, because `timeout` and service managers send their signal to
    every process, and torchrun passes it on to those that already have it.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.number = 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            read, write = os.pipe()
            os.set_blocking(write, False)
            self.callback(os.close, write)  # ends the thread
            self.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write))  # gets each signal Python handles
            threading.Thread(target=self._watch, args=(read,), daemon=True).start()
            for number in STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def _note(self, number: int, frame: object) -> None:
        if self.world.is_main and not self.number:  # a `print` here could interrupt another one
            name = signal.Signals(number).name
            try:
                os.write(2, f"\n{name}: the run ends after this step; a second signal ends it at once\n".encode())
            except OSError:  # the terminal is gone, so nothing can be written to it any more
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        self.number = self.number or number

    def _watch(self, pipe: int) -> None:
        """End the process at the second wish, also where it hangs in a collective and Python calls no handler."""
        first = math.inf
        while received := os.read(pipe, 1):
            if received[0] in STOPPING:
                first = min(first, time.monotonic())
                if time.monotonic() - first > _SAME_WISH:
                    os._exit(128 + received[0])
        os.close(pipe)

    def agree(self, due: bool) -> tuple[bool, int]:
        """Whether the main rank wants a checkpoint, and the signal that some rank has received, 0 if none.

        Every rank gets the same answer, at the end of the same step: else one would wait for the others for ever.
        """
        wanted, *sent = sum_over_ranks([self.world.is_main and due, *(self.number == n for n in STOPPING)], self.world)
        return bool(wanted), next((number for number, ranks in zip(STOPPING, sent, strict=True) if ranks), 0)

    def leave(self, number: int, place: str, saved: bool) -> NoReturn:
        """Say how the run goes on, and end with the exit code of the signal."""
        how = "goes on from there" if saved else "starts anew, or from the checkpoint before"
        line = f"{place}: stopped by {signal.Signals(number).name}; the same command {how}"
        tell_torchrun(line)
        if self.world.is_main:
            print(line, file=sys.stderr, flush=True)
        raise SystemExit(128 + number)
