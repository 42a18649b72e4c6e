"""Triton where it can run: torch built for GPUs, or its interpreter (TRITON_INTERPRET=1); else both names are None.

Importing it takes 70 MB and 0.15 s, which a CPU-only installation is spared unless it has been imported already, as
benchmarks/compile_kernels.py does. It exists only for Linux.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch

from pedgpt.kernels._transforms import without_numbers

triton: Any = None
tl: Any = None
# Whether there is a GPU is not asked: that would start CUDA, which a process that forks later must not.
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
if torch.version.cuda or torch.version.hip or interpreted or "triton" in sys.modules:
    try:
        triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    except ImportError:
        pass


def by_triton(impl: str | None, x: torch.Tensor, fits: bool = True) -> bool:
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
