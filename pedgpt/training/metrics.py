"""metrics.jsonl: one JSON object per optimizer step; trackers; and a watch on preference optimization."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from pedgpt.files import naming_full_disk, write_text
from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import World

# From the record of a step to a warning, if there is one.
Watch = Callable[[dict[str, Any]], str | None]
# What a tracker is given at each step, and what ends it.
Sink = tuple[Callable[[dict[str, Any]], object], Callable[[], object]]


def cut_log(path: Path, steps: int) -> dict[str, Any]:
    """Keep the lines of the first `steps` steps, and return the last of them; a run that resumes writes the others."""
    lines = path.read_text("utf-8", "replace").splitlines()[:steps] if steps and path.exists() else []
    write_text(path, "".join(f"{line}\n" for line in lines))
    return json.loads(lines[-1]) if lines else {"tokens": 0, "seconds": 0.0}


def _tensorboard(settings: TrainingSettings, first: int) -> Sink:
    """Event files in OUTPUT/tensorboard; those of steps after the checkpoint are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(f"{settings.output}/tensorboard", purge_step=first + 1)

    def write(record: dict[str, Any]) -> None:
        for name in record.keys() - {"step"}:
            writer.add_scalar(name, record[name], record["step"])

    return write, writer.close


def _wandb(settings: TrainingSettings, first: int) -> Sink:
    """A run named as the folder; what resumes from a checkpoint goes on under the id in OUTPUT/wandb_id.txt."""
    import wandb

    output = Path(settings.output)
    file = output / "wandb_id.txt"
    if not (first and file.exists()):
        write_text(file, secrets.token_hex(4))
    about = {"id": file.read_text(encoding="utf-8"), "name": output.name, "config": dataclasses.asdict(settings)}
    run = wandb.init(resume="allow", dir=str(output), **about)
    return lambda record: run.log(record, step=record["step"]), run.finish


class Report:
    """What a run tells of itself, on the main rank only: metrics.jsonl, trackers, a progress bar, warnings."""

    def __init__(self, settings: TrainingSettings, first: int, total: int, world: World, watch: Watch | None) -> None:
        output = Path(settings.output)
        self.path, self.watch, self.told = output / "metrics.jsonl", watch, world.is_main
        self.last = cut_log(self.path, first) if self.told else {}
        made = {"wandb": _wandb, "tensorboard": _tensorboard}
        self.trackers = [made[name](settings, first) for name in settings.log_to if self.told]
        often = 0.2 if sys.stderr.isatty() else 10
        bar = {"unit": "step", "desc": output.name, "dynamic_ncols": True, "mininterval": often, "file": sys.stderr}
        self.bar = tqdm(total=total, initial=first, disable=not self.told, **bar)

    def close(self) -> None:
        """End the bar and the trackers."""
        self.bar.close()
        for _, end in self.trackers:
            end()

    def write(self, record: dict[str, Any], num_tokens: int, seconds: float) -> None:
        """Tell one step everywhere; what `watch` warns of is printed above the bar."""
        if not self.told:
            return
        speed = num_tokens / seconds
        spent = {"tokens": self.last["tokens"] + num_tokens, "seconds": self.last["seconds"] + seconds}
        self.last = {**record, "tokens_per_second": speed, **spent}
        with naming_full_disk(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(self.last) + "\n")
        for tell, _ in self.trackers:
            tell(self.last)
        self.bar.set_postfix_str(f"loss {record['loss']:.4f}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update()
        if self.watch and (warning := self.watch(dict(self.last))):
            tqdm.write(f"warning: {warning}", file=sys.stderr)


class ChosenLikelihoodWatch:
    """Called with each step's record, warns once if chosen answers become less likely while the margin grows.

    That is the known failure of DPO: the rejected answers fall faster, so the loss looks well. Rewards are
    beta (log π − log reference), so both start at 0. The warning comes when in two windows of steps in a row the mean
    `rewards/chosen` is the lowest so far and the mean `rewards/margins` the highest so far, and the former lies below
    0 by more than 1 nat per answer and by more than two standard errors: single steps and rounding are noise. The
    longer the window, of at least 2 steps, the slower a fall is still seen. A resumed run watches anew.
    """

    def __init__(self, *, beta: float, mu: float, window: int = 10) -> None:
        self.beta, self.mu, self.window = float(beta), float(mu), window
        self.done = self.beta == 0  # then rewards are 0, whatever happens
        self.steps: list[tuple[float, float]] = []  # (chosen, margin) of the window that is not full yet
        self.lowest = self.highest = 0.0  # mean of chosen, of margin, over all windows
        self.bad = False  # whether the window before was one

    def __call__(self, record: Mapping[str, float]) -> str | None:
        """The warning, at the step at which it is due."""
        if self.done:
            return None
        self.steps.append((record["rewards/chosen"], record["rewards/margins"]))
        if len(self.steps) < self.window:
            return None
        chosen, margin = (fmean(values) for values in zip(*self.steps, strict=True))
        error = math.sqrt(fmean((value - chosen) ** 2 for value, _ in self.steps) / (self.window - 1))
        bad = -chosen > max(self.beta, 2 * error) and chosen < self.lowest and margin > self.highest
        self.lowest, self.highest = min(self.lowest, chosen), max(self.highest, margin)
        self.steps.clear()
        before, self.bad = self.bad, bad
        if not (before and bad):
            return None
        self.done = True
        remedy = f"raise mu (now {self.mu})" + (f" or beta (now {self.beta})" if self.mu >= 1 else "")
        return (
            f"the chosen answers become less likely while the margin grows: over the last {self.window} steps they "
            f"were {-chosen / self.beta:.2f} nats per answer less likely than under the reference, and the margin was "
            f"{margin / self.beta:.2f} nats; {remedy}"
        )
