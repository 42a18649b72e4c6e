"""The one training loop. It is given a model, a plan of batches and a loss; it knows nothing of stages."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pedgpt.files import read_object, write_json
from pedgpt.kernels.cpu import products
from pedgpt.training.batches import BatchPlan
from pedgpt.training.checkpoint import Keeper, latest_checkpoint, refuse_changes
from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import World, all_values, autocast, local, reshard, sum_over_ranks, together, trained
from pedgpt.training.metrics import Report, Watch
from pedgpt.training.optim import build_optimizer, learning_rate

# Settings that change neither the data nor the weights, so a run may be resumed with others; held-out files too.
_FREE = {
    "output", "micro_batch_size", "activation_checkpointing", "evaluate_every", "checkpoint_every", "keep_checkpoints",
    "device", "reference_logps", "shared_prompt", "log_to", "plan",
}  # fmt: skip
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# From rows and their ids to a batch, which has `weight` in the loss, `num_tokens` and `to(device)`; empty lists give a
# batch of weight 0.
MakeBatch = Callable[[list[int], list[int]], Any]
# From model and batch to the loss and the metrics, all *summed* over what `batch.weight` counts.
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]


def train(
    model: nn.Module,
    plan: BatchPlan,
    make_batch: MakeBatch,
    loss_function: LossFunction,
    settings: TrainingSettings,
    world: World,
    *,
    evaluate: Callable[[], dict[str, float]] | None = None,
    fingerprint: str = "",
    watch: Watch | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Train what is not frozen, from the last checkpoint in `settings.output` if there is one.

    Each step's gradient is Σ loss / Σ weight over the whole global batch, so it does not depend on the number of ranks
    or of accumulation steps. `fingerprint` names the training data; a checkpoint of other data or settings is refused.
    Writes a line per step to metrics.jsonl; the main rank gives it to `watch`, and shows the text that this returns as
    a warning. The settings set the learning rate of any `optimizer`; None is AdamW. With `keep_best` the model ends as
    the best evaluation found it. SIGTERM and Ctrl-C end the run after the step, by SystemExit(128 + signal). Raises
    ValueError for numbers that are not finite.
    """
    if settings.keep_best and evaluate is None:
        raise ValueError("keep_best needs rows to evaluate on; give held-out files")
    reshard(model)
    optimizer = optimizer or build_optimizer(model, settings)
    run = describe_run(settings, plan, fingerprint)
    del run["save_dtype"]  # only the result is written in it, so until then a run may go on with another one
    keeper = Keeper(settings, model, optimizer, run, world)
    first, total, stopped = keeper.resume(plan.total_steps), plan.total_steps, 0.0
    model.train()
    with noting_signals(world) as noted:
        with closing(Report(settings, first, total, world, watch)) as report:
            for step in range(first, total):
                began, last, every = time.perf_counter(), step + 1 == total, settings.evaluate_every
                # What is random depends on the step alone, so that a resumed run repeats it.
                torch.manual_seed(settings.seed + 1_000_003 * (step * world.size + world.rank + 1))
                rate = learning_rate(step, total, settings)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batches = [make_batch(rows, ids) for rows, ids in plan.micro_batches(step, world.rank, world.size)]
                metrics, num_tokens, norm = _step(model, optimizer, batches, loss_function, settings, world)
                spent = time.perf_counter() - began
                record = {"step": step + 1, **metrics, "learning_rate": rate, "grad_norm": norm}
                if evaluate and (last or (every and (step + 1) % every == 0)):
                    record |= {f"eval_{name}": value for name, value in evaluate().items()}
                    model.train()
                    reshard(model)
                    keeper.keep_best(step + 1, record.get("eval_loss", math.inf))
                report.write(record, num_tokens, spent)
                # Every rank gets the same answer: else one would wait for the others for ever.
                due, stopped = sum_over_ranks([world.is_main and keeper.due(step + 1), len(noted)], world)
                if due or last or stopped:
                    keeper.save(step + 1)
                if stopped:
                    break
        if stopped:
            end_by_signal(noted, f"{settings.output}: step {step + 1} of {total}", world)
    keeper.load_best()
    model.eval()


@contextmanager
def noting_signals(world: World) -> Iterator[list[int]]:
    r"""In this block SIGTERM, Ctrl-C and a closed terminal only add their number to the list: the wish to stop soon.

    Ctrl-\ ends the run at once. What comes again is the same wish, because `timeout` and service managers send their
    signal to every process, and torchrun passes it on to those that already have it.
    """
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if world.is_main and not noted:  # A `print` here could interrupt another one.
            name = signal.Signals(number).name
            try:
                os.write(2, f"\n{name}: the run ends after this step; Ctrl-\\ ends it at once\n".encode())
            except OSError:  # the terminal is gone, so nothing can be written to it any more
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        noted.append(number)

    heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
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


def evaluation(
    model: nn.Module, heldout: Any, loss_function: LossFunction, settings: TrainingSettings, world: World
) -> Callable[[], dict[str, float]] | None:
    """What computes the loss and its metrics over held-out rows, in evaluation mode; None if there are no rows.

    `heldout` has a length and `batch`, as `train` takes it.
    """

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        training = model.training
        model.eval()
        sums: dict[str, Any] = {}
        weight = 0
        # Every rank makes the same number of forward passes, perhaps empty ones: sharded weights are gathered together.
        width = settings.micro_batch_size * world.size
        for start in range(0, len(heldout), width):
            rows = list(range(start, min(start + width, len(heldout))))[world.rank :: world.size]
            batch = heldout.batch(rows, rows)
            with autocast(world, getattr(torch, settings.dtype)):
                _add(sums, *loss_function(model, batch.to(world.device)))
            weight += batch.weight
        model.train(training)
        return _means(sums, weight, world)

    return evaluate if len(heldout) else None


def describe_run(settings: TrainingSettings, plan: BatchPlan, fingerprint: str) -> dict[str, Any]:
    """What must be equal for a run to be resumed or counted as done."""
    values = dataclasses.asdict(settings).items()
    chosen = {name: value for name, value in values if name not in _FREE and not name.startswith("heldout")}
    return {**chosen, "total_steps": plan.total_steps, "rows_and_base_model": fingerprint}


def settle_run(output: str | Path, world: World) -> str:
    """Decide what holds for a whole run, before it reads its data; returns the day for chat templates that write one.

    The day is like "2026-03-31". On a CPU it is also decided which form of each operator the run computes with, because
    other forms round differently. What the finished run in `output`, or its last checkpoint, was computed with counts;
    the rest the main rank decides for all ranks, because midnight may pass while they start.
    """
    found: dict[str, Any] = {}
    with suppress(Exception):  # A fault in these files is told where all is read.
        checkpoint = latest_checkpoint(Path(output) / "checkpoints")
        state = json.loads((checkpoint / "state.json").read_bytes()) if checkpoint else {"run": {}, "choices": {}}
        found = {"choices": state["choices"], **state["run"], **read_object(Path(output), "done.json")}
    products.use(found.get("choices") or {})
    choices = products.settle() if world.device.type == "cpu" and world.is_main else {}
    day, choices = all_values((found.get("template_date") or date.today().isoformat(), choices), world)[0]
    products.use(choices)
    return day


def is_finished(settings: TrainingSettings, plan: BatchPlan, fingerprint: str, world: World) -> bool:
    """Whether `settings.output` holds this very run, complete, and say so; ValueError if it holds another one."""
    output = Path(settings.output)
    if not (saved := read_object(output, "done.json")):
        return False
    refuse_changes(saved, describe_run(settings, plan, fingerprint), output)
    if world.is_main:
        _tidy(output)
        print(f"{settings.output}: finished already")
    return True


def finish(settings: TrainingSettings, plan: BatchPlan, fingerprint: str, world: World) -> None:
    """Mark the run complete, once its result is saved, and delete the checkpoints that it no longer needs."""
    output = Path(settings.output)
    with together(world, OSError(f"{output}: cannot be written; the first rank says why")):
        if world.is_main:
            write_json(output / "done.json", describe_run(settings, plan, fingerprint))
            _tidy(output)


def _tidy(output: Path) -> None:
    """Delete what a finished run no longer needs, and what a process that was killed left half written."""
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    for file in output.rglob(".*.tmp"):
        file.unlink()


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    loss_function: LossFunction,
    settings: TrainingSettings,
    world: World,
) -> tuple[dict[str, float], int, float]:
    """One update; returns the metrics, the tokens and the gradient norm of the whole global batch."""
    mine = sum(batch.weight for batch in batches)
    weight, num_tokens = sum_over_ranks([mine, sum(batch.num_tokens for batch in batches)], world)
    sums: dict[str, Any] = {}
    for batch in batches:
        with autocast(world, getattr(torch, settings.dtype)):
            loss, metrics = loss_function(model, batch.to(world.device))
        # FSDP averages gradients over ranks; the sum is wanted.
        (loss * (world.size / max(weight, 1))).backward()
        _add(sums, loss, metrics)
        del loss  # and its graph, before the next one is made
        if settings.accumulate_in_float32 and len(batches) > 1:
            widen_gradients(model)
    means = _means(sums, mine, world)
    grad_norm = _clip(list(trained(model).values()), settings.max_grad_norm or float("inf"), world)
    for name, number in (("loss", means["loss"]), ("gradient's norm", grad_norm)):
        if not math.isfinite(number):
            raise ValueError(f"the {name} became {number}; lower learning_rate or max_grad_norm, or use float32")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means, int(num_tokens), grad_norm


def _clip(parameters: list[nn.Parameter], most: float, world: World) -> float:
    """Scale the gradients so that their norm is at most `most`; returns the norm that they had."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        norm = nn.utils.clip_grad_norm_(parameters, most)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    # torch would round each norm to bfloat16, so that the number of ranks decided how far gradients are clipped.
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32).double() for gradient in gradients]
    found = math.sqrt(sum_over_ranks([float(torch.stack(norms).square().sum())], world)[0])
    torch._foreach_mul_(gradients, min(1.0, most / (found + 1e-6)))
    return found


def widen_gradients(model: nn.Module) -> None:
    """Make gradients float32, so that those of further micro-batches are added to them in float32."""
    for parameter in trained(model).values():
        if parameter.grad is not None and parameter.grad.dtype != torch.float32:
            parameter.grad_dtype = None  # the gradient may have any dtype
            parameter.grad = parameter.grad.float()


def _add(sums: dict[str, Any], loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
    for name, value in {"loss": loss, **metrics}.items():
        sums[name] = sums.get(name, 0.0) + value.detach().double()


def _means(sums: Mapping[str, Tensor], weight: int, world: World) -> dict[str, float]:
    """The sums of all ranks over their weight, in one transfer from the device: each would wait for it."""
    scalars = [value.to(world.device) for value in sums.values()]
    *totals, weight_of_all = sum_over_ranks([*(torch.stack(scalars).tolist() if scalars else ()), weight], world)
    return {name: total / max(weight_of_all, 1) for name, total in zip(sums, totals, strict=True)}
