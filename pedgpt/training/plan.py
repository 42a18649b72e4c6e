"""How much memory a training step needs, without taking any: the recipe's own code runs on tensors without numbers.

    python recipes/dfpo.py --config recipes/configs/qwen3-8b/dfpo.toml --model recipes/configs/qwen3-8b --plan 8x80

torch's FakeTensorMode gives tensors a shape and no memory. A fake process group stands for the other cards, so FSDP2
splits the model as usual. `Counter` adds each storage when an operation makes it, and takes it off when it is freed.
Nothing here describes a model, an optimizer or a loss.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections import Counter as Sums
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pedgpt.kernels.quantized import parameter_count
from pedgpt.training import loop
from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import World, local, stop, trained
from pedgpt.training.optim import build_optimizer

GB = 10**9
# A CUDA context with cuBLAS and its workspaces: assumed, not measured.
LIBRARIES = 600 * 2**20
ACTIVATIONS, EXCHANGED = "activations, logits", "exchanged by the cards"
PARTS = ("weights", "gradients", "AdamW's state", EXCHANGED, ACTIVATIONS, "libraries")
S = TypeVar("S", bound=TrainingSettings)
Build = Callable[[S, World], tuple[nn.Module, loop.LossFunction]]
MakeBatch = Callable[[S, int], Any]  # a batch of so many full rows
aten = torch.ops.aten


@dataclass(eq=False)
class Held:
    """A storage of so many bytes. What it is part of may become known after it has been counted."""

    size: int
    part: str = ACTIVATIONS


class Counter(TorchDispatchMode):
    """Counts the storages that are alive: `events` has each that comes, with 1, or goes, with -1."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.alive: dict[int, tuple[Any, Held]] = {}  # by address: a weak reference to the storage, and what it holds
        self.events: list[tuple[Held, int]] = []
        self.peak = (0, 0)  # the highest total, and the number of events at that time

    def __torch_dispatch__(self, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor repeats the call on this rank's own tensors, and that call is counted.
        if function is torch.ops.prim.device.default:  # asked so often that it would take most of the time
            return torch.device("cpu")
        answer = ANSWERS.get(function)
        result = answer(*args) if answer else function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.alive:
                self.add(value.untyped_storage())
        if function.namespace in ("fsdp", "c10d"):
            self.claim(tree_leaves((args, kwargs, result)), EXCHANGED)
        return result

    def add(self, storage: Any, part: str = ACTIVATIONS) -> None:
        """Count the storage from here on, with the size that it has now."""
        key = storage._cdata
        self.remove(key)
        held = Held(storage.nbytes(), part)
        self.alive[key] = weakref.ref(storage, lambda _: self.remove(key)), held
        self.events.append((held, 1))
        self.total += held.size
        if self.total > self.peak[0]:
            self.begin()

    def begin(self) -> None:
        """Take what is alive for the peak, whatever was before."""
        self.peak = self.total, len(self.events)

    def remove(self, key: int) -> None:
        """Count the storage with this address no more, if it was counted."""
        if found := self.alive.pop(key, None):
            self.events.append((found[1], -1))
            self.total -= found[1].size

    def claim(self, values: Iterable[Any], part: str) -> None:
        """Give the tensors among these to `part`, in the peak before, too; only activations are still exchanged."""
        for value in values:
            if isinstance(value, Tensor) and (found := self.alive.get(local(value).untyped_storage()._cdata)):
                if part != EXCHANGED or found[1].part == ACTIVATIONS:
                    found[1].part = part

    def parts(self) -> dict[str, int]:
        """Bytes by part at the peak."""
        sums = Sums[str]()
        for held, sign in self.events[: self.peak[1]]:
            sums[held.part] += sign * held.size
        return dict(+sums)


# Tensors without numbers cannot say what is in them. What code asks of them is answered as in a step that goes well:
# every token is supervised, no check finds anything wrong, and numbers are finite.


def _indexed(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    if any(index is not None and index.dtype == torch.bool for index in indices):
        return x.new_empty(0, *x.shape[len(indices) :])
    return aten.index.Tensor(x, indices)


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: lambda x: x.new_empty(x.numel(), x.ndim, dtype=torch.int64),
    aten.index.Tensor: _indexed,
    aten._local_scalar_dense.default: lambda x: 0 if x.dtype == torch.bool else 1,
}


@contextmanager
def counting(*, on_gpu: bool = False) -> Iterator[Counter]:
    """In here tensors have shapes only, and the counter counts what the code would hold on a CPU or on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # they take 100 MB

    counter, resize = Counter(), torch.UntypedStorage.resize_

    def resized(storage: Any, size: int) -> Any:  # FSDP2 frees gathered weights and makes room for them in this way
        found = resize(storage, size)
        counter.add(storage, EXCHANGED)
        return found

    # NOTE: Code is only told that it is on a GPU, because tensors that claim a GPU need torch built with CUDA.
    told = patch.object(FakeTensor, "is_cuda", property(lambda _: True)) if on_gpu else nullcontext()
    with FakeTensorMode(), patch.object(torch.UntypedStorage, "resize_", resized), told, counter:
        yield counter


def on_shapes(model: nn.Module) -> None:
    """Replace what is on the meta device by fake tensors of the same shape, which the counter sees."""
    made: dict[Tensor, Tensor] = {}  # a tied parameter stays one
    for name, old in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if old not in made:
            made[old] = torch.empty(local(old).shape, dtype=old.dtype)
            if isinstance(old, DTensor):
                sizes: Any = {"shape": old.shape, "stride": old.stride()}
                made[old] = DTensor.from_local(made[old], old.device_mesh, old.placements, run_check=False, **sizes)
            if isinstance(old, nn.Parameter):
                made[old] = nn.Parameter(made[old], old.requires_grad)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, made[old])


@contextmanager
def processes(count: int) -> Iterator[World]:
    """Pretend to be rank 0 of `count` processes; the others do not exist."""
    if count > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield World(0, count, torch.device("cpu"))
    finally:
        stop()


def count(build: Build, make_batch: MakeBatch, settings: S) -> dict[str, int]:
    """Bytes by part at the peak of a step, on each of the cards of `settings.plan`.

    It is a step of the training loop that finds the optimizer's state there, and where it accumulates, the gradients of
    an earlier micro-batch.
    """
    ranks, _ = cards(settings.plan)
    with processes(ranks) as world:
        with torch.device("meta"):
            model, loss_function = build(settings, world)
        with counting(on_gpu=settings.device != "cpu") as counter:
            on_shapes(model)
            counter.claim((*model.parameters(), *model.buffers()), "weights")
            optimizer = build_optimizer(model, settings)
            parameters = list(trained(model).values())
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            # NOTE: DTensor tries each kind of operation once on whole tensors, which must not be counted later.
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rows = -(-settings.global_batch_size // ranks)
            if rows <= settings.micro_batch_size:
                optimizer.zero_grad(set_to_none=True)
            elif settings.accumulate_in_float32:
                loop.widen_gradients(model)

            def before_update(*_: Any) -> None:
                counter.claim((parameter.grad for parameter in parameters), "gradients")
                counter.claim(tree_leaves(list(optimizer.state.values())), "AdamW's state")

            optimizer.register_step_pre_hook(before_update)
            batch = make_batch(settings, min(rows, settings.micro_batch_size))
            counter.begin()
            loop._step(model.train(), optimizer, [batch], loss_function, settings, world)
    return {**counter.parts(), "libraries": LIBRARIES}


def print_plan(settings: S, build: Build, make_batch: MakeBatch) -> None:
    """Print what a step holds on each card of `settings.plan`, and the cheapest change that would make it fit.

    `build` makes the model, split over the ranks and on the meta device, and its loss; `make_batch` a batch of so many
    rows. Raises SystemExit with the code 1 if it does not fit.
    """
    _, size = cards(settings.plan)
    with torch.device("meta"):
        model, _ = build(settings, World(0, 1, torch.device("cpu")))
    everything, some = parameter_count(model), sum(parameter.numel() for parameter in trained(model).values())
    print(f"{everything:,} parameters, {some:,} train ({some / everything:.2%}); {settings.dtype}\n")
    parts = count(build, make_batch, settings)
    total = sum(parts.values())
    for part in PARTS:
        if part in parts:
            print(f"{part:<26}{parts[part] / GB:>10.2f} GB")
    print(f"{'total':<26}{total / GB:>10.2f} GB\n")
    if total <= size * GB:
        print(f"fits: {total / GB:.2f} of {size:g} GB")
        return
    print(f"does not fit: {total / GB:.2f} of {size:g} GB; the cheapest change that makes it", flush=True)
    changed: Any = settings
    for change in _changes(settings, saving_activations=total - parts.get(ACTIVATIONS, 0) < size * GB):
        if _try(settings, change, total, build, make_batch)[1] <= size * GB:
            raise SystemExit(1)
    print("one after another", flush=True)
    for change in _changes(settings):
        changed, total = _try(changed, change, total, build, make_batch)
        if total <= size * GB:
            break
    print("all of these together do" if total <= size * GB else "even together they are not enough")
    raise SystemExit(1)


def _try(old: Any, change: dict[str, Any], total: int, build: Build, make_batch: MakeBatch) -> tuple[Any, int]:
    """The settings after a change and the bytes that they take, printed; the old ones if it saves nothing."""
    new = {name: value for name, value in change.items() if getattr(old, name) != value}
    changed, held = dataclasses.replace(old, **new), total
    with suppress(ValueError):  # The model cannot be changed so: its folder is quantised already, for example.
        held = sum(count(build, make_batch, changed).values()) if new else total
    if held > 0.995 * total:
        return old, total
    fits = "  fits" if held <= cards(old.plan)[1] * GB else ""
    print(f"  {' '.join(f'--{name} {value}' for name, value in new.items()):<68}{held / GB:>8.2f} GB{fits}", flush=True)
    return changed, held


def _changes(settings: Any, saving_activations: bool = True) -> Iterator[dict[str, Any]]:
    """Changes that take less memory, the cheapest first."""
    if saving_activations:  # These cost time only.
        yield {"micro_batch_size": 1}
        yield from ({"activation_checkpointing": name} for name in ("selective", "block", "offload"))
    short, weights, state = {"dtype": "bfloat16"}, {"weight_dtype": "bfloat16"}, {"optimizer_state": "bfloat16"}
    yield short
    if settings.adapter == "none":
        yield from (short | weights, short | weights | state)
    else:
        yield from ({"quantize": name} for name in ("int8", "nf4"))
    yield {"row_length": max(1, settings.row_length // 2)}
    if settings.adapter == "none":
        yield from ({"adapter": "lora", "quantize": name, **short} for name in ("none", "int8", "nf4"))


def cards(plan: str) -> tuple[int, float]:
    """The number of cards and the GB of each: "24" is (1, 24.0), and "8x80" is (8, 80.0)."""
    found = re.fullmatch(r"(?:([1-9]\d{0,4})x)?(\d{1,6}(?:\.\d+)?)", plan)
    if not found:
        raise ValueError(f'plan must be the size of a card in GB, as "24", or also their number, as "8x80": {plan!r}')
    return int(found[1] or 1), float(found[2])
