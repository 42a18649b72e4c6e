"""Selective activation checkpointing: the backward pass computes again what is cheap, and finds the rest kept.

Inside `selective()` an operator declares `recomputable(result, function, *tensors)`. Wherever a later operator would
keep the result or a view of it for its backward pass, the graph keeps function and tensors instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from pedgpt.kernels._dispatch import transformed, without_numbers

CHECKPOINTING = ("none", "selective", "block", "offload")  # the values of the setting `activation_checkpointing`


# By the address of a storage: the result in it, which keeps the address taken, its version, and how it is computed.
_results: ContextVar[dict[int, tuple[Tensor, int, Callable[[], Tensor]]] | None] = ContextVar("results", default=None)


@contextmanager
def selective(enabled: bool = True) -> Iterator[None]:
    """In here the graph keeps no recomputable results; under a compiler or torch.func it does."""
    if not enabled or transformed():
        yield
        return
    outer = _results.set({})
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _results.reset(outer)


# NOTE: one pair of hooks for all calls, because torch.compile compiles again for every new pair.
_save_on_cpu = functools.cache(torch.autograd.graph.save_on_cpu)


def offloaded(enabled: bool = True) -> AbstractContextManager:
    """In here, what the graph keeps of a GPU's tensors waits in the host's pinned memory; on a CPU nothing changes."""
    if not enabled or transformed():
        return nullcontext()
    if without_numbers():  # A plan counts nothing of a GPU's tensors that wait in the host.
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (tensor.size(), tensor.dtype) if tensor.is_cuda else tensor,
            lambda kept: kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1]),
        )
    return _save_on_cpu(torch.cuda.is_available())


def recomputable(result: Tensor, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The result, of which the operator says that it is function(*tensors), the same bits at any time."""
    if (results := _results.get()) is not None:
        packed = [_pack(tensor) for tensor in tensors]
        # The value is computed once, and lives until the last node of the graph that kept the function is done.
        compute = functools.cache(torch.no_grad()(lambda: function(*map(_unpack, packed))))
        results[result.untyped_storage()._cdata] = result.detach(), result._version, compute
    return result


# NOTE: these hooks are functions of the module for the same reason.
def _pack(tensor: Tensor) -> tuple[Any, ...]:
    result, version, compute = (_results.get() or {}).get(tensor.untyped_storage()._cdata, (tensor, None, None))
    if tensor._version == version and tensor.dtype == result.dtype:
        return compute, tensor.size(), tensor.stride(), tensor.storage_offset()
    # NOTE: detach, because a node that keeps its own output with its history would never be freed.
    return tensor.detach(), tensor._version


def _unpack(packed: tuple[Any, ...]) -> Tensor:
    kept, *place = packed
    if not isinstance(kept, Tensor):
        return kept().as_strided(*place)
    if [kept._version] != place:
        raise RuntimeError(f"a tensor {list(kept.shape)} of the graph was modified by an inplace operation")
    return kept
