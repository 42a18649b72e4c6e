"""metrics.jsonl: one JSON object per optimizer step; trackers; and a watch on preference optimization."""

from __future__ import annotations

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

# What a tracker is given at each step, and what ends it.
Tracker = tuple[Callable[[dict[str, Any]], object], Callable[[], object]]


class MetricsLog:
    """Appends to a file of one JSON line per step; on resuming, lines after the checkpoint's step are dropped.

    Raises ValueError naming the file and the line if one of a step before the checkpoint is damaged.
    """

    def __init__(self, path: Path, after_step: int = 0) -> None:
        self.path = path
        self.tokens, self.seconds = 0, 0.0  # spent so far
        self.best = math.inf  # the lowest held-out loss so far
        kept = []
        for number, line in enumerate(path.read_bytes().splitlines()[:after_step] if path.exists() else (), 1):
            try:
                record = json.loads(line)
                if record["step"] <= after_step:
                    kept.append(json.dumps(record) + "\n")
                    self.tokens, self.seconds = record["tokens"], record["seconds"]
                    self.best = min(self.best, record.get("eval_loss", math.inf))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}:{number}: not the record of a step ({error}); delete the line to go on without it"
                ) from None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append one step."""
        with naming_full_disk(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")


def _tensorboard(output: Path, after_step: int, settings: Mapping[str, Any]) -> Tracker:
    """Event files in `output`/tensorboard; those of steps after the checkpoint are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output / "tensorboard"), purge_step=after_step + 1)

    def write(record: dict[str, Any]) -> None:
        for name in record.keys() - {"step"}:
            writer.add_scalar(name, record[name], record["step"])

    return write, writer.close


def _wandb(output: Path, after_step: int, settings: Mapping[str, Any]) -> Tracker:
    """A run named as the folder; what resumes from a checkpoint goes on under the id in `output`/wandb_id.txt."""
    import wandb

    file = output / "wandb_id.txt"
    if not (after_step and file.exists()):
        write_text(file, secrets.token_hex(4))
    name = file.read_text(encoding="utf-8")
    run = wandb.init(id=name, resume="allow", name=output.name, dir=str(output), config=dict(settings))
    return lambda record: run.log(record, step=record["step"]), run.finish


_TRACKERS = {"wandb": _wandb, "tensorboard": _tensorboard}


class Report:
    """What a run tells of itself, on the main rank only: metrics.jsonl, trackers, a progress bar, warnings."""

    def __init__(
        self,
        settings: TrainingSettings,
        run: Mapping[str, Any],
        first: int,
        total: int,
        world: World,
        watch: Callable[[dict[str, float]], str | None] | None,
    ) -> None:
        output, self.watch = Path(settings.output), watch
        self.log = MetricsLog(output / "metrics.jsonl", after_step=first) if world.is_main else None
        self.tokens, self.seconds = (self.log.tokens, self.log.seconds) if self.log else (0, 0.0)
        self.trackers = [_TRACKERS[name](output, first, run) for name in settings.log_to if world.is_main]
        interactive = sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=first, unit="step", desc=output.name, disable=not world.is_main,
            dynamic_ncols=interactive, mininterval=0.2 if interactive else 10, file=sys.stderr,
        )  # fmt: skip

    def close(self) -> None:
        """End the bar and the trackers."""
        self.bar.close()
        for _tell, end in self.trackers:
            end()

    def spent(self, num_tokens: int, seconds: float) -> dict[str, float]:
        """The entries of a record that say what the step and the run so far have taken."""
        self.tokens, self.seconds = self.tokens + num_tokens, self.seconds + seconds
        return {"tokens": self.tokens, "tokens_per_second": num_tokens / seconds, "seconds": self.seconds}

    def write(self, record: dict[str, Any]) -> None:
        """Tell one step everywhere; what `watch` warns of is printed above the bar."""
        if self.log is None:
            return
        self.log.write(record)
        for tell, _ in self.trackers:
            tell(record)
        speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        self.bar.set_postfix_str(f"loss {record['loss']:.4f}, {speed}", refresh=False)
        self.bar.update()
        if self.watch and (warning := self.watch(record)):
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
        self.before: tuple[float, float] | None = None  # means of the window before, if it was a bad one

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
        before, self.before = self.before, (chosen, margin) if bad else None
        if before is None or not bad:
            return None
        self.done = True
        was, now = ([reward / self.beta for reward in means] for means in (before, (chosen, margin)))
        remedy = f"raise mu (now {self.mu})" + (f" or beta (now {self.beta})" if self.mu >= 1 else "")
        return (
            f"the chosen answers become less likely while the margin grows: over the last {self.window} steps they "
            f"were {-now[0]:.2f} nats per answer less likely than under the reference ({-was[0]:.2f} over the "
            f"{self.window} before), the margin was {now[1]:.2f} nats ({was[1]:.2f} before); {remedy}"
        )
