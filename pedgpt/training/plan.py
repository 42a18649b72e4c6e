"""What a step holds in memory, counted without taking any: the code runs on tensors that have shapes and no numbers.

    with counting() as counter:
        model = on_shapes(model)  # from the meta device
        counter.claim(model.parameters(), "weights")
        counter.at("forward", "activations")  # the moment that begins, and the part that new tensors belong to
        hidden = model(tokens)
    counter.peaks["forward"].parts  # bytes by part, when their sum was largest: {"weights": 4096, "activations": 512}

torch's FakeTensorMode runs the model's own code, and a dispatch mode above it counts each storage from the operation
that makes it until nothing refers to it any more. So this file describes no model.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pedgpt.training import loop
from pedgpt.training.config import TrainingSettings
from pedgpt.training.distributed import World
from pedgpt.training.optim import build_optimizer

aten = torch.ops.aten


@dataclass(frozen=True)
class Peak:
    """Bytes by part when most was held, and how many of them were in small storages that come and go."""

    parts: dict[str, int]
    small: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def grown(self, before: Peak, times: int) -> Peak:
        """What this peak becomes if it grows `times` more by what it grew since `before`."""
        parts = {name: size + times * (size - before.parts.get(name, 0)) for name, size in self.parts.items()}
        return Peak(parts, self.small + times * (self.small - before.small))


class Counter(TorchDispatchMode):
    """Counts the storages that are alive, by part, and keeps the peak of each moment.

    `peaks[moment].small` counts storages below `small` bytes, except in the parts that are `lasting`.
    """

    def __init__(self, lasting: Collection[str] = (), small: int = 0) -> None:
        super().__init__()
        self.lasting, self.limit = lasting, small
        self.peaks: dict[str, Peak] = {}
        self.moment, self.part = "", ""
        self.parts: dict[str, int] = defaultdict(int)
        self.total = self.small = self.highest = 0
        self.alive: dict[int, tuple[Any, int, str]] = {}  # by address: a weak reference to the storage, bytes, part

    def at(self, moment: str, part: str, **held: int) -> None:
        """From here on peaks are those of `moment`, or of none if it is empty, and new tensors belong to `part`.

        `held`: bytes of parts that no operation makes, from here on.
        """
        self.moment, self.part = "", part
        for name, size in held.items():
            self.hold(name, size)
        self.moment = moment
        self.highest = self.peaks[moment].total if moment in self.peaks else -1
        self._change("", 0, 0)

    def claim(self, tensors: Iterable[Tensor], part: str) -> None:
        """From here on these tensors belong to `part`; if it is empty, they are not counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._remove(storage._cdata)
            self._add(storage, part)

    def hold(self, part: str, size: int) -> None:
        """Count `size` bytes as this part, which no operation makes."""
        self._change(part, size - self.parts[part], self.limit)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:  # asked so often that it would take most of the time
            return torch.device("cpu")
        answer = ANSWERS.get(function)
        result = answer(*args) if answer else function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.alive:
                    self._add(storage, self._part_of(function, args))
        return result

    def _part_of(self, function: Any, args: Any) -> str:
        if function is aten._to_copy.default:  # autocast casts weights, and may keep the copies
            source = self.alive.get(args[0].untyped_storage()._cdata)
            return "copies" if source and source[2] == "weights" else self.part
        return self.part

    def _add(self, storage: Any, part: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.alive[key] = weakref.ref(storage, lambda _: self._remove(key)), size, part
        self._change(part, size, size)

    def _remove(self, key: int) -> None:
        if found := self.alive.pop(key, None):
            _, size, part = found
            self._change(part, -size, size)

    def _change(self, part: str, difference: int, size: int) -> None:
        if part:
            self.parts[part] += difference
            self.total += difference
            self.small += difference * (size < self.limit and part not in self.lasting)
        if self.moment and self.total > self.highest:
            self.highest = self.total
            self.peaks[self.moment] = Peak(dict(self.parts), self.small)


# Tensors without numbers cannot say what is in them. What code asks of them is answered as in a step that goes well:
# every token is supervised, no check finds anything wrong, and numbers are finite.


def _all_places(x: Tensor) -> Tensor:
    return x.new_empty(x.numel(), x.ndim, dtype=torch.int64)


def _indexed(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    if any(index is not None and index.dtype == torch.bool for index in indices):
        return x.new_empty(0, *x.shape[len(indices) :])
    return aten.index.Tensor(x, indices)


def _number(x: Tensor) -> Any:
    return {torch.bool: getattr(x, "holds_everywhere", False)}.get(x.dtype, 1.0 if x.is_floating_point() else 1)


def _everywhere(x: Tensor, *arguments: Any) -> Tensor:
    found = aten.any.default(x)
    found.holds_everywhere = True
    return found


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: _all_places,
    aten.index.Tensor: _indexed,
    aten._local_scalar_dense.default: _number,
    aten.all.default: _everywhere,
}


@contextmanager
def counting(*, on_gpu: bool = False, lasting: Collection[str] = (), small: int = 0) -> Iterator[Counter]:
    """In here tensors have shapes only, and the counter counts them, as on a CPU or as on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # they take 100 MB

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        if on_gpu:
            # NOTE: Code is only told that it is on a GPU, because tensors that claim a GPU need torch built with CUDA.
            stack.enter_context(patch.object(FakeTensor, "is_cuda", property(lambda _: True)))
        yield stack.enter_context(Counter(lasting, small))


def on_shapes(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The same model with parameters of which only the shapes exist, in `dtype` or their own; it was on meta before."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, old in model.named_parameters(remove_duplicate=False):
        if old not in made:
            made[old] = nn.Parameter(torch.empty(old.shape, dtype=dtype or old.dtype), old.requires_grad)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, made[old])
    return model


def count_step(
    counter: Counter,
    model: nn.Module,
    blocks: Sequence[nn.Module],
    ends: tuple[nn.Module, nn.Module],
    make_batch: Callable[[], Any],
    loss_function: loop.LossFunction,
    settings: TrainingSettings,
    ranks: int = 1,
    accumulates: bool = False,
) -> None:
    """One step of the training loop, which finds the optimizer's state there, on one of `ranks` that share a model.

    `model` comes from the meta device. A forward pass begins with the first of `ends`, and the loss follows the last. A
    step that `accumulates` also finds the gradients of an earlier micro-batch there.

    The moments are "masks" (all up to the first block, which makes them), "forward" (the last block), "loss", "its
    gradient", the backward pass of the "last block" and of the "first block", and "update". If blocks are alike, the
    peak of each moment grows in proportion to their number. The blocks between take no more than the last or the first,
    because in the backward pass what was kept becomes less and gradients become more, both at a constant rate.
    """
    counter.at("", "optimizer")
    share = _Shards(counter, model, blocks, ends[0], settings, ranks)
    optimizer = build_optimizer(nn.ParameterList(share.rows.values()), settings)
    for rows in share.rows.values():
        if rows.requires_grad:
            rows.grad = torch.empty_like(rows)
            counter.claim([rows.grad], "gradients")
    optimizer.step()
    if not accumulates:
        optimizer.zero_grad(set_to_none=True)

    def before_update(*_: Any) -> None:
        share.end_backward()
        counter.at("update", "optimizer", **dict.fromkeys(share.forward, 0))

    _name_moments(counter, share, blocks, ends)

    def loss_and_metrics(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = loss_function(model, batch)
        loss.register_hook(lambda gradient: counter.at("its gradient", "head"))
        return loss, metrics

    optimizer.register_step_pre_hook(before_update)
    counter.at("", "activations")
    world = World(0, 1, torch.device("cpu"))
    loop._step(model.train(), optimizer, [make_batch()], loss_and_metrics, settings, world)
    counter.at("", "")


def _name_moments(
    counter: Counter, share: _Shards, blocks: Sequence[nn.Module], ends: tuple[nn.Module, nn.Module]
) -> None:
    """Hooks that tell the counter which moment of the step begins."""

    def begins(module: nn.Module, moment: str, part: str, **held: int) -> None:
        """The moment begins when the gradient of what this module gives arrives."""

        def after(module: nn.Module, arguments: Any, hidden: Tensor) -> None:
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: counter.at(moment, part, **held))

        module.register_forward_hook(after)

    _once_before(ends[0], lambda: counter.at("masks", "activations", **share.forward))
    if len(blocks) > 1:
        _once_before(blocks[1], lambda: counter.at("", "activations"))
    _once_before(blocks[-1], lambda: counter.at("forward", "activations"))
    for block in blocks[-2:-1]:
        begins(block, "", "activations")
    begins(blocks[0], "first block", "activations")
    begins(ends[1], "last block" if len(blocks) > 1 else "first block", "activations", **share.backward)
    ends[1].register_forward_hook(lambda *_: counter.at("loss", "head"))


def _once_before(module: nn.Module, call: Callable[[], None]) -> None:
    """Call it before this module's next forward pass, and not again when the backward pass computes it again."""

    def before(*_: Any) -> None:
        handle.remove()
        call()

    handle = module.register_forward_pre_hook(before)


class _Shards:
    """One rank's rows of each parameter, and what FSDP2 gathers and reduces beside them.

    The root's own parameters are gathered throughout, and each block's beside those of the next. The backward pass
    holds gathered blocks in two buffers and a half-done third, and gradients leave in float32. On one rank the rows are
    the parameters themselves, and nothing is gathered.
    """

    def __init__(
        self,
        counter: Counter,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        first: nn.Module,
        settings: TrainingSettings,
        ranks: int,
    ) -> None:
        dtype = getattr(torch, settings.dtype)
        stored = [parameter.dtype for parameter in model.parameters()]
        gathered = list(on_shapes(model, dtype if ranks > 1 else None).parameters())
        self.counter, self.forward, self.backward = counter, dict[str, int](), dict[str, int]()
        self.rows: dict[nn.Parameter, nn.Parameter] = {parameter: parameter for parameter in gathered}
        self.root: set[nn.Parameter] = set()  # their gradients leave together, at the end
        if ranks > 1:
            for parameter, own in zip(gathered, stored, strict=True):
                rows = torch.empty(math.ceil(len(parameter) / ranks), *parameter.shape[1:], dtype=own)
                self.rows[parameter] = nn.Parameter(rows, parameter.requires_grad)
            inner = {parameter for block in blocks for parameter in block.parameters()}
            self.root = set(gathered) - inner
            root, block = (sum(p.nbytes for p in group) for group in (self.root, blocks[0].parameters()))
            leaving = 1 + 4 // dtype.itemsize
            trains = all(parameter.requires_grad for parameter in blocks[0].parameters())
            self.forward = {"gathered": root + 2 * block}
            self.backward = {"gathered": root + (3 + leaving * trains) * block}
        counter.claim(self.rows, "")
        counter.claim(self.rows.values(), "weights")
        for parameter in gathered:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._came)
        if ranks > 1:
            for parameter in first.parameters():  # the last to get its gradient
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda _: counter.hold("gathered", leaving * root))

    def _came(self, parameter: nn.Parameter) -> None:
        if self.rows[parameter] is parameter or parameter in self.root:
            self.counter.claim([parameter.grad], "gradients")  # type: ignore[list-item]
        else:
            self._reduce(parameter)

    def _reduce(self, parameter: nn.Parameter) -> None:
        """What is left of a gradient is this rank's rows of it."""
        rows = self.rows[parameter]
        if rows.grad is None:
            rows.grad = torch.empty_like(rows)
            self.counter.claim([rows.grad], "gradients")
        parameter.grad = None

    def end_backward(self) -> None:
        for parameter in self.root:
            if parameter.requires_grad:
                self._reduce(parameter)
