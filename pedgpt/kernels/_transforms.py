"""Whether something other than eager autograd on real tensors, in the given dtype, is at work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def transformed() -> bool:
    """Under a compiler, which fuses in its own way, or torch.func, which cannot follow hand-written functions."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def autocast_dtype(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The dtype in which autocast lets products of x run, or `otherwise` where it is off or x is float64."""
    if not torch._C._is_any_autocast_enabled() or x.is_meta or x.dtype == torch.float64:
        return otherwise
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return otherwise


def without_numbers() -> bool:
    """Whether tensors have shapes only: a plan of memory runs the code that way, and no kernel may be launched."""
    compiling = torch.compiler.is_compiling()  # A compiler cannot follow the question.
    return not compiling and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def blocks_to_count(blocks: Sequence[T]) -> Sequence[T]:
    """The blocks of a loop, or only the first and the last: where only memory is counted, the others take no more."""
    return blocks[:: max(1, len(blocks) - 1)] if without_numbers() else blocks
