"""Whether something other than eager autograd in the given dtype is at work."""

from __future__ import annotations

import torch
from torch import Tensor


def transformed() -> bool:
    """Under a compiler, which fuses in its own way, or torch.func, which cannot follow hand-written functions."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def autocast_dtype(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The dtype in which autocast lets products of x run, or `otherwise` where it is off or x is float64."""
    if not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return otherwise
