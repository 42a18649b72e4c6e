"""One process or many: start, shard with FSDP2, sum over ranks, gather for saving."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

# Takes the name and the content of each weight, one after the other.
Write = Callable[[Iterator[tuple[str, Tensor]]], object]


@dataclass(frozen=True)
class World:
    """This process among all: its number, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0


def start(device: str = "auto") -> World:
    """Join the processes that torchrun started (nccl on CUDA, gloo on CPU), or stand alone."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda", found {device!r}')
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device; use --device cpu or auto")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_cuda else torch.device("cpu")
    if "RANK" not in os.environ:
        return World(0, 1, target)
    if on_cuda:
        torch.cuda.set_device(target)
    if not dist.is_initialized():
        # NOTE: the store still holds the addresses of the processes that torchrun has replaced, and a process that
        # comes before the others would connect to those; so each restart gets names of its own.
        store, rank, size = next(rendezvous("env://"))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size)
    return World(dist.get_rank(), dist.get_world_size(), target)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, blocks: Iterable[nn.Module], world: World, dtype: torch.dtype) -> nn.Module:
    """Put the model on this rank's device, split over all ranks with FSDP2: each block, then the root with the rest.

    Weights on the meta device stay there, to be filled once they are split. Gathered weights are in `dtype`; gradients
    are reduced in float32. `model.hidden_states`, if there is one, gathers the root's weights as `model.forward` does:
    a loss may use the head's after it.
    """
    if world.size == 1:
        return model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(world.device))
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)  # moves the block to the device, and keeps this rank's part
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if hasattr(model, "hidden_states"):
        register_fsdp_forward_method(model, "hidden_states")
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be split."""
    # NOTE: DTensor and FSDPModule are recognised by their attributes, because importing the classes takes a second.
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def first_row(tensor: Any) -> int:
    """Where in the whole tensor this rank's rows begin; FSDP2 splits rows as `torch.chunk` does."""
    if not hasattr(tensor, "placements"):
        return 0
    assert [place.is_shard(0) for place in tensor.placements] == [True]
    mesh, rows = tensor.device_mesh, len(tensor)
    return min(rows, mesh.get_local_rank() * -(-rows // mesh.size()))


def reshard(model: Any) -> None:
    """Make `model.parameters()` the sharded ones again: a forward without a backward leaves the root's gathered."""
    if hasattr(model, "reshard"):
        model.reshard()


def autocast(world: World, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; nothing to do in float32."""
    return torch.autocast(world.device.type, dtype=dtype, enabled=dtype != torch.float32)


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Element-wise sums in float64, the same on every rank."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return total.tolist()


def all_values(value: Any, world: World) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def together(world: World, otherwise: Exception) -> Iterator[None]:
    """Raise on every rank if the block fails on one, there its own error: who went on would wait for it for ever."""
    fault = None
    try:
        yield
    except Exception as error:
        fault = error
    if sum_over_ranks([fault is not None], world)[0]:
        raise fault or otherwise


def run_on_main(steps: Iterator[int], world: World) -> None:
    """Exhaust `steps` on the main rank, with a bar of what each has done; the others wait, as a collective is short.

    Raises what the first rank raises there, and ValueError on the other ranks.
    """
    elsewhere = ValueError("the first rank met a mistake in the data, and says which")
    show = {"desc": "tokens", "unit": " documents", "delay": 5.0, "mininterval": 1.0, "file": sys.stderr}
    with tqdm(disable=not world.is_main, **show) as bar:
        done = 1.0
        while done:
            with together(world, elsewhere):
                done = next(steps, 0) if world.is_main else 0
            bar.update(done)
            (done,) = sum_over_ranks([done], world)


def gather_weights(
    model: nn.Module, world: World, write: Write, *, trainable_only: bool = False, dtype: torch.dtype | None = None
) -> None:
    """Call `write` on the main rank with (name, whole tensor on the CPU), one at a time; called on all ranks."""

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in (trained(model) if trainable_only else model.state_dict()).items():
            part = tensor.detach()
            whole = part.full_tensor() if hasattr(part, "full_tensor") else part
            yield name, whole.to(device="cpu", dtype=dtype or whole.dtype)

    if world.is_main:
        write(gathered())
    else:
        for _ in gathered():
            pass
