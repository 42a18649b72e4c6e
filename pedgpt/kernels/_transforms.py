"""Whether something other than eager autograd is at work."""

from __future__ import annotations

import torch


def transformed() -> bool:
    """Under a compiler, which fuses in its own way, or torch.func, which cannot follow hand-written functions."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
