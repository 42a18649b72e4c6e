"""Triton where it can run: with a GPU, or in its interpreter (TRITON_INTERPRET=1); else both names are None.

Importing it takes 70 MB and 0.15 s, which a process without a GPU is spared. It exists for Linux alone.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

triton: Any = None
tl: Any = None
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    try:
        triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    except ImportError:
        pass
