"""Attention on the CPU by torch's kernel, which is called for each document, and for each half of some documents.

Called once for whole rows with a mask, the kernel would compute all T² scores; here it computes fewer
(`python benchmarks/bench_attention.py` times both ways).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels._dispatch import without_numbers

SHORTEST = 384  # Rows of fewer tokens go to one call with a mask, because splitting them gains no time.
LONGEST = 512  # torch's kernel skips keys only in blocks of 512, so longer documents skip some without halves.


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> Tensor | None:
    """`kernels.attention`, or None: too few tokens, shapes that differ, no documents, or a document in two pieces."""
    rows, heads, tokens, size = q.shape
    fits = k.shape == v.shape == (rows, k.shape[1], tokens, size) and heads % k.shape[1] == 0
    if tokens < SHORTEST or not rows or not fits:
        return None
    if layout is None:
        return _attention(q, k, v)
    if layout.documents is None or not (documents := layout.once(_documents, q.dtype)):
        return None
    # Join the rows into one row, [1, H, B T, K], and cut it into documents.
    lengths, masks = zip(*documents, strict=True)
    parts = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2).split(lengths, dim=2) for x in (q, k, v))
    found = [_attention(*part).transpose(1, 2) for part in zip(*parts, masks, strict=True)]
    return torch.cat(found, dim=1).view(rows, tokens, heads, size).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention within one document; without a mask it is causal."""
    (_, heads, tokens, size), groups = q.shape, k.shape[1]
    attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=heads != groups)
    # Heads of a few numbers gain nothing from halves.
    if mask is not None or not SHORTEST <= tokens <= LONGEST or size < 16 or without_numbers():
        return attend(q, k, v, mask, is_causal=mask is None)
    # The first half of the queries sees half of the keys, so that a quarter of the scores is not computed.
    half = tokens // 2
    early = attend(q[:, :, :half], k[:, :, :half], v[:, :, :half], is_causal=True)
    late = attend(q[:, :, half:], k, v, q.new_full((tokens - half, tokens), -torch.inf).triu_(half + 1))
    # The result lies in memory as [B, T, H, K], like that of torch's kernel.
    return torch.cat((early.transpose(1, 2), late.transpose(1, 2)), dim=1).transpose(1, 2)


def _documents(layout: Any, dtype: torch.dtype) -> list[tuple[int, Tensor | None]]:
    """(length, mask or None) of every document, row by row; an empty list if a document comes back after another."""
    found: list[tuple[int, Tensor | None]] = []
    for row, ids in enumerate(layout.documents):
        # Tensors without numbers have no ids to compare, so each row counts as one document.
        starts = [] if without_numbers() else ((ids[1:] != ids[:-1]).nonzero()[:, 0] + 1).tolist()
        if starts and len(ids.unique()) <= len(starts):
            return []
        for start, stop in itertools.pairwise([0, *starts, len(ids)]):
            part = slice(row, row + 1), slice(start, stop)
            at, branches = layout.positions[part], None if layout.branches is None else layout.branches[part]
            own = type(layout)(at, branches=branches, slopes=layout.slopes)
            found.append((stop - start, None if own.plain else own.mask(dtype)))
    return found
