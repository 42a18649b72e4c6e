"""What an operator asks before it chooses its form: whether it is traced, autocast, only counted, or fit for Triton.

`triton` and `tl` are None where torch is not built for GPUs and Triton's interpreter is off (TRITON_INTERPRET=1).
Importing them takes 70 MB and 0.15 s, which a CPU-only installation is spared unless it has been imported already, as
benchmarks/compile_kernels.py does. Triton exists only for Linux.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = None
# Whether there is a GPU is not asked: that would start CUDA, which a process that forks later must not.
if torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1" or "triton" in sys.modules:
    with suppress(ImportError):
        triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")


def transformed() -> bool:
    """Under a compiler, which fuses in its own way, or torch.func, which cannot follow hand-written functions."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def autocast_dtype(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The dtype in which autocast lets products of x run, or `otherwise` where it is off or x is float64."""
    if not torch._C._is_any_autocast_enabled() or x.is_meta or x.dtype == torch.float64:
        return otherwise
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else otherwise


def without_numbers() -> bool:
    """Whether tensors have shapes only: a plan of memory runs the code that way, and no kernel may be launched."""
    compiling = torch.compiler.is_compiling()  # A compiler cannot follow the question.
    return not compiling and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def by_triton(impl: str | None, x: Tensor, fits: bool = True) -> bool:
    """Whether x goes to a Triton kernel: as `impl`, "torch" or "triton", asks; for None if it is on CUDA and fits.

    Raises ValueError for another name, and where Triton is asked for and cannot be had.
    """
    if impl is None and (not x.is_cuda or without_numbers()):
        return False
    if impl not in (None, "torch", "triton"):
        raise ValueError(f'impl must be "torch", "triton" or None, found {impl!r}')
    suits = triton is not None and fits and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if impl == "triton" and not suits:
        found = "no Triton" if triton is None else f"{x.dtype} {list(x.shape)}"
        raise ValueError(f'impl="triton" needs Triton with a GPU, sizes that fit and no float64, found {found}')
    return suits and impl != "torch"
