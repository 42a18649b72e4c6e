"""Packed documents on the CPU: torch's attention kernel for one document after another.

Over a mask of whole rows it would compute all T² scores (`python benchmarks/bench_attention.py` times both).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels._transforms import without_numbers

if TYPE_CHECKING:
    from pedgpt.kernels.attention import Layout

SHORTEST = 384  # For rows of fewer tokens the mask costs as little.


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor | None:
    """As `kernels.attention`; None for rows that are one document, or short, or where a document goes on later."""
    rows, heads, tokens, size = q.shape
    fits = all((len(x), *x.shape[2:]) == (rows, tokens, size) for x in (k, v))
    if layout.documents is None or tokens < SHORTEST or not rows or not fits:
        return None
    documents: list[tuple[int, Tensor | None]] = layout.once(_documents, q.dtype)
    if not documents:
        return None
    # The rows one after another, [1, H, B T, K], fall into documents.
    lengths, found = [length for length, _ in documents], []
    parts = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2).split(lengths, dim=2) for x in (q, k, v))
    settings = {"enable_gqa": heads != k.shape[1]}
    for q_part, k_part, v_part, (_, mask) in zip(*parts, documents, strict=True):
        out = F.scaled_dot_product_attention(q_part, k_part, v_part, mask, is_causal=mask is None, **settings)
        found.append(out.transpose(1, 2))
    return torch.cat(found, dim=1).view(rows, tokens, heads, size).transpose(1, 2)


def _documents(layout: Layout, dtype: torch.dtype) -> list[tuple[int, Tensor | None]]:
    """The length of every document, row by row, and the mask that it needs, if any; none if one goes on later."""
    found: list[tuple[int, Tensor | None]] = []
    for row, ids in enumerate(layout.documents if layout.documents is not None else ()):
        # Where only sizes count, take those of one document.
        starts = [] if without_numbers() else ((ids[1:] != ids[:-1]).nonzero()[:, 0] + 1).tolist()
        if starts and len(ids.unique()) <= len(starts):
            return []
        for start, stop in itertools.pairwise([0, *starts, len(ids)]):
            part = slice(row, row + 1), slice(start, stop)
            at, branches = layout.positions[part], None if layout.branches is None else layout.branches[part]
            own = type(layout)(at, at, None, None, branches, layout.slopes)
            found.append((stop - start, None if own.plain else own.mask(dtype)))
    return found
