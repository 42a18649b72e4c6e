"""The one training loop. It is given a model, a plan of batches and a loss; it knows nothing of stages."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pedgpt.files import sync, write_json
from pedgpt.training.batches import BatchPlan
from pedgpt.training.checkpoint import latest_checkpoint, refuse_changes
from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import World, all_values, autocast, barrier, local, reshard, sum_over_ranks, trained
from pedgpt.training.keeping import Checkpoints, StopRequest
from pedgpt.training.metrics import Report
from pedgpt.training.optim import build_optimizer, learning_rate

# Settings that change neither the data nor the weights, so a run may be resumed with others; held-out files too.
_FREE = {
    "output", "micro_batch_size", "activation_checkpointing", "evaluate_every", "checkpoint_every", "keep_checkpoints",
    "device", "reference_logps", "shared_prompt", "log_to", "plan",
}  # fmt: skip


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
    watch: Callable[[dict[str, float]], str | None] | None = None,
    choices: Mapping[str, bool] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Train what is not frozen, from the last checkpoint in `settings.output` if there is one.

    Each step's gradient is Σ loss / Σ weight over the whole global batch, so it does not depend on the number of ranks
    or of accumulation steps. `fingerprint` names the training data; a checkpoint of other data or settings is refused.
    Writes a line per step to metrics.jsonl; the main rank gives it to `watch`, and shows the text that this returns as
    a warning. `choices`, from `run_choices`, go into the checkpoints. The settings set the learning rate of any
    `optimizer`; None is AdamW. With `keep_best` the model ends as the best evaluation found it. SIGTERM and Ctrl-C end
    the run after the step, by SystemExit(128 + signal). Raises ValueError for numbers that are not finite.
    """
    if settings.keep_best and evaluate is None:
        raise ValueError("keep_best needs rows to evaluate on; give held-out files")
    reshard(model)
    optimizer = optimizer or build_optimizer(model, settings)
    run = describe_run(settings, plan, fingerprint)
    del run["save_dtype"]  # only the result is written in it, so until then a run may go on with another one
    checkpoints = Checkpoints(settings, model, optimizer, run, world, choices)
    first, total, sent = checkpoints.resume(plan.total_steps), plan.total_steps, 0
    model.train()
    with StopRequest(world) as stop:
        with closing(Report(settings, run, first, total, world, watch)) as report:
            checkpoints.best = all_values(report.log and report.log.best, world)[0]
            for step in range(first, total):
                began = time.perf_counter()
                rate = _prepare(step, plan, optimizer, settings, world)
                batches = [make_batch(rows, ids) for rows, ids in plan.micro_batches(step, world.rank, world.size)]
                metrics, num_tokens, norm = _step(model, optimizer, batches, loss_function, settings, world)
                record = {"step": step + 1, **metrics, "learning_rate": rate, "grad_norm": norm}
                record |= report.spent(num_tokens, time.perf_counter() - began)
                last, every = step + 1 == total, settings.evaluate_every
                if evaluate and (last or (every and (step + 1) % every == 0)):
                    record |= {f"eval_{name}": value for name, value in evaluate().items()}
                    model.train()
                    reshard(model)
                    checkpoints.keep_best(step + 1, record.get("eval_loss", math.inf))
                report.write(record)
                due, sent = stop.agree(checkpoints.due(step + 1))
                if due or last or sent:
                    if report.log:
                        sync(report.log.path)  # a checkpoint's steps are in the log, whatever happens
                    saved = checkpoints.save(step + 1, ending=bool(last or sent))
                if sent:
                    break
        if sent:
            stop.leave(sent, f"{settings.output}: step {step + 1} of {total}", saved)
    checkpoints.load_best()
    model.eval()


def evaluation(
    model: nn.Module, heldout: Any, loss_function: LossFunction, settings: TrainingSettings, world: World
) -> Callable[[], dict[str, float]] | None:
    """`mean_loss` over held-out rows, which have a length and `batch`, as `train` takes it; None without rows."""
    if not len(heldout):
        return None
    return lambda: mean_loss(model, len(heldout), heldout.batch, loss_function, settings, world)


def mean_loss(
    model: nn.Module,
    num_rows: int,
    make_batch: MakeBatch,
    loss_function: LossFunction,
    settings: TrainingSettings,
    world: World,
) -> dict[str, float]:
    """The loss and its metrics over all held-out rows, in evaluation mode, without gradients."""
    training = model.training
    model.eval()
    sums: dict[str, Any] = {}
    weight = 0
    with torch.no_grad():
        # Every rank makes the same number of forward passes, perhaps empty ones: sharded weights are gathered together.
        width = settings.micro_batch_size * world.size
        for start in range(0, num_rows, width):
            rows = list(range(start, min(start + width, num_rows)))[world.rank :: world.size]
            batch = make_batch(rows, rows)
            with autocast(world, getattr(torch, settings.dtype)):
                _add(sums, *loss_function(model, batch.to(world.device)))
            weight += batch.weight
    model.train(training)
    return _means(sums, weight, world)


def describe_run(settings: TrainingSettings, plan: BatchPlan, fingerprint: str) -> dict[str, Any]:
    """What must be equal for a run to be resumed or counted as done."""
    values = dataclasses.asdict(settings).items()
    chosen = {name: value for name, value in values if name not in _FREE and not name.startswith("heldout")}
    return {**chosen, "total_steps": plan.total_steps, "rows_and_base_model": fingerprint}


def run_date(output: str | Path, world: World) -> str:
    """The day for chat templates that write one, like "2026-03-31", fixed for the whole run.

    It is the day of the run in `output` if that is finished or has a checkpoint, else today. The main rank decides
    for all ranks, because midnight may pass while they start.
    """
    found = _remembered(Path(output)).get("template_date") or date.today().isoformat()
    return all_values(found, world)[0]


def run_choices(
    output: str | Path,
    world: World,
    settle: Callable[[], dict[str, bool]],
    use: Callable[[dict[str, bool]], None],
) -> dict[str, bool]:
    """Which form of each operator this run computes with on the CPU, for `train`; called before any forward pass.

    They are those of the last checkpoint in `output`, because other forms round differently, and the rest is settled by
    the main rank for all ranks. On a GPU there is nothing to choose.
    """
    if world.device.type != "cpu":
        return {}
    use({})  # raises on every rank what it may raise
    if world.is_main:
        use(_remembered(Path(output)).get("choices") or {})
    found = all_values(settle() if world.is_main else {}, world)[0]
    use(found)
    return found


def _remembered(output: Path) -> dict[str, Any]:
    """What a finished run, or its last checkpoint, says of it; a fault in these files is told where all is read."""
    with suppress(Exception):
        if (done := output / "done.json").is_file():
            return dict(json.loads(done.read_bytes()))
        state = json.loads(((latest_checkpoint(output / "checkpoints") or output) / "state.json").read_bytes())
        return {**state["run"], "choices": state.get("choices")}
    return {}


def is_finished(settings: TrainingSettings, plan: BatchPlan, fingerprint: str, world: World) -> bool:
    """Whether `settings.output` holds this very run, complete, and say so; ValueError if it holds another one."""
    path = Path(settings.output) / "done.json"
    if not path.exists():
        return False
    try:
        saved = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it to train again") from None
    saved.pop("result", None)  # a list of files, from older versions
    refuse_changes(saved, describe_run(settings, plan, fingerprint), path.parent)
    if world.is_main:
        _tidy(path.parent)
        print(f"{settings.output}: finished already")
    return True


def finish(settings: TrainingSettings, plan: BatchPlan, fingerprint: str, world: World) -> None:
    """Mark the run complete, once its result is saved, and delete the checkpoints that it no longer needs."""
    if world.is_main:
        output = Path(settings.output)
        write_json(output / "done.json", describe_run(settings, plan, fingerprint))
        _tidy(output)
    barrier(world)


def _tidy(output: Path) -> None:
    """Delete what a finished run no longer needs, and what a process that was killed left half written."""
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    for file in (*output.glob(".*.tmp"), *output.glob("*/.*.tmp")):
        if file.is_file():
            file.unlink()


def _prepare(
    step: int, plan: BatchPlan, optimizer: torch.optim.Optimizer, settings: TrainingSettings, world: World
) -> float:
    """Seed what is random from the step alone, so that a resumed run repeats it; set and return the learning rate."""
    torch.manual_seed(settings.seed + 1_000_003 * (step * world.size + world.rank + 1))
    rate = learning_rate(step, plan.total_steps, settings)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


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
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
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
