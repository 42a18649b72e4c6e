"""Triton where it can run: torch built for GPUs, or its interpreter (TRITON_INTERPRET=1); else both names are None.

Importing it takes 70 MB and 0.15 s, which a CPU-only installation is spared. It exists for Linux alone.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

triton: Any = None
tl: Any = None
# Whether there is a GPU is not asked: that would start CUDA, which a process that forks later must not.
if torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1":
    try:
        triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    except ImportError:
        pass
