"""Selective activation checkpointing: the backward pass computes again what is cheap, and finds the rest kept.

Inside `selective()` an operator declares `recomputable(result, function, *tensors)`. Wherever a later operator would
keep the result or a view of it for its backward pass, the graph keeps this rule instead, and the tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pedgpt.kernels._transforms import transformed

CHECKPOINTING = ("none", "selective", "block")  # the values of the setting `activation_checkpointing`


class _Rule:
    """A tensor as function(*tensors), computed once; its value lives as long as any node that kept the rule."""

    def __init__(self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> None:
        self.function, self.packed = function, [_pack(tensor) for tensor in tensors]
        self.value: Tensor | None = None

    def compute(self) -> Tensor:
        if self.value is None:
            with torch.no_grad():
                self.value = self.function(*map(_unpack, self.packed))
        return self.value


class _Scope(threading.local):
    # By the address of a storage: the result in it, which keeps the address from being given away, and its version.
    rules: dict[int, tuple[Tensor, int, _Rule]] | None = None


_scope = _Scope()


@contextmanager
def selective(enabled: bool = True) -> Iterator[None]:
    """In here the graph keeps rules instead of recomputable results, but not under a compiler or torch.func."""
    if not enabled or transformed():
        yield
        return
    outer, _scope.rules = _scope.rules, {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _scope.rules = outer


def recomputable(result: Tensor, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The result, of which the operator says that it is function(*tensors), the same bits at any time."""
    if _scope.rules is not None:
        rule = _Rule(function, tensors)
        _scope.rules[result.untyped_storage()._cdata] = result.detach(), result._version, rule
    return result


# NOTE: these hooks are functions of the module, because torch.compile compiles again for every new pair of hooks.


def _pack(tensor: Tensor) -> tuple[Any, ...]:
    result, version, rule = (_scope.rules or {}).get(tensor.untyped_storage()._cdata, (tensor, None, None))
    if tensor._version == version and tensor.dtype == result.dtype:
        return rule, tensor.size(), tensor.stride(), tensor.storage_offset()
    # NOTE: detach, because a node that keeps its own output with its history would never be freed.
    return tensor.detach(), tensor._version


def _unpack(packed: tuple[Any, ...]) -> Tensor:
    kept, *place = packed
    if isinstance(kept, _Rule):
        return kept.compute().as_strided(*place)
    if [kept._version] != place:
        raise RuntimeError(f"a tensor {list(kept.shape)} of the graph was modified by an inplace operation")
    return kept
