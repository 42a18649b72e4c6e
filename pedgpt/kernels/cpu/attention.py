"""Causal attention on the CPU: bfloat16 in products over blocks of queries, other dtypes one document after another.

torch's kernel multiplies bfloat16 in small pieces, where whole products are 1.4 to 1.75 times as fast, and with a mask
it computes all T² scores. `python benchmarks/bench_attention.py` times both forms.

Letters: B batch, H heads, G key-value heads, T tokens, S keys that a block reads, K head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels._transforms import blocks_to_count, without_numbers
from pedgpt.kernels.cpu.choice import CANDIDATES, Form, prefer
from pedgpt.kernels.cpu.products import refuse_create_graph

if TYPE_CHECKING:
    from pedgpt.kernels.attention import Layout


# Queries of a block, and numbers that the scores of a block may have: 2 MiB in float32 stay in a processor's cache.
BLOCK, SCORES = 128, 2**19
Piece = tuple[slice, slice, Tensor | None]


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor | None:
    """As `kernels.attention`, or None where torch's kernel over a dense mask does as well."""
    (rows, heads, tokens, size), groups = q.shape, k.shape[1]
    if any(
        (type(t) is not Tensor and not without_numbers()) or t.device.type != "cpu" or t.dtype != q.dtype
        for t in (q, k, v)
    ):
        return None
    if tokens < BLOCK or not k.shape == v.shape == (rows, groups, tokens, size) or not k.numel() or heads % groups:
        return None
    if q.dtype == torch.bfloat16 and prefer("attention", q.dtype, "rows"):
        return _BlockedAttention.apply(q, k, v, layout)
    return None if layout.documents is None or tokens < 2 * BLOCK else _by_documents(q, k, v, layout)


def _pieces(layout: Layout, row: int, by_document: bool) -> list[Piece]:
    """A row's queries document by document or block by block, with the keys from the first that one of them may see.

    Where causality does not say it all, [1 or H, queries, keys] is added to the scores.
    """
    ids, tokens, found = None if layout.documents is None else layout.documents[row], layout.positions.shape[1], []
    edges = [*range(0, tokens, BLOCK), tokens]
    if by_document and ids is not None:
        edges = [0, *((ids[1:] != ids[:-1]).nonzero()[:, 0] + 1).tolist(), tokens]
    for start, stop in itertools.pairwise(edges):
        first = 0 if ids is None else int(torch.isin(ids, ids[start:stop]).int().argmax())
        seen = layout.square(row, first, stop)
        added = None if seen.plain else seen.mask(torch.float32)[0, :, start - first :]
        found.append((slice(start, stop), slice(first, stop), added))
    return found


def _by_documents(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor | None:
    """By torch's kernel, one document after another; None if a document goes on after another one."""
    pieces = [piece for row in range(len(q)) for piece in layout.once(_pieces, row, True)]
    if any(queries != keys for queries, keys, _ in pieces):
        return None
    lengths = [queries.stop - queries.start for queries, _, _ in pieces]
    # The rows one after another, [1, H, B T, K], fall into documents.
    parts = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2).split(lengths, dim=2) for x in (q, k, v))
    gqa, found = q.shape[1] != k.shape[1], []
    for q_part, k_part, v_part, (_, _, added) in zip(*parts, pieces, strict=True):
        mask = None if added is None else added[None].to(q.dtype)
        out = F.scaled_dot_product_attention(q_part, k_part, v_part, mask, is_causal=mask is None, enable_gqa=gqa)
        found.append(out.transpose(1, 2))
    return torch.cat(found, dim=1).view(q.transpose(1, 2).shape).transpose(1, 2)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.layout = layout
        out = torch.empty_like(q)
        for at, _, _, _, values, p in _blocks(q, k, v, layout):
            out[at] = torch.bmm(p.bfloat16(), values).view(out[at].shape)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("attention in bfloat16 on the CPU")
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), *(torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
        for at, read, queries, keys, values, p in _blocks(q, k, v, ctx.layout):
            dout_block = dout[at].reshape(queries.shape)
            dv[read] += torch.bmm(p.bfloat16().mT, dout_block)
            dp = torch.bmm(dout_block, values.mT).float()
            # ds = p ⊙ (dp − Σ p ⊙ dp) / √K
            ds = torch._softmax_backward_data(dp, p, -1, torch.float32, grad_input=dp)
            ds = ds.mul_(q.shape[-1] ** -0.5).bfloat16()
            dq[at] = torch.bmm(ds, keys).view(q[at].shape)
            dk[read] += torch.bmm(ds.mT, queries)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _blocks(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Iterator[tuple[Any, ...]]:
    """Where a block is in q and in k; q [G, H/G · T, K], k and v [G, S, K] of it; its probabilities in float32."""
    (rows, heads, _, size), groups = q.shape, k.shape[1]
    shared = heads // groups  # heads of queries over one key-value head
    ahead = torch.full((BLOCK, BLOCK), -torch.inf, dtype=torch.float32).triu_(1)
    for row in blocks_to_count(range(rows)):
        pieces: list[Piece] = layout.once(_pieces, row, False)
        widest = max(seen.stop - seen.start for _, seen, _ in pieces)
        at_once = max(1, SCORES // (BLOCK * widest * shared))
        for group in blocks_to_count(range(0, groups, at_once)):
            some, over = slice(group, group + at_once), slice(group * shared, (group + at_once) * shared)
            keys, values = k[row, some].contiguous(), v[row, some].contiguous()
            for block, seen, added in blocks_to_count(pieces):
                queries, read = q[row, over, block].reshape(len(keys), -1, size), keys[:, seen].contiguous()
                # The scores as a sum of two bfloat16 numbers: rounded once, they would be too coarse for exp.
                high = torch.bmm(queries, read.mT)
                low = torch.baddbmm(high, queries, read.mT, beta=-1)
                scores, count = high.float().add_(low).mul_(size**-0.5), block.stop - block.start
                by_head = scores.view(-1, count, read.shape[1])
                if added is None:
                    by_head[..., -count:] += ahead[:count, :count]
                else:
                    by_head += added[over] if len(added) > 1 else added
                yield (row, over, block), (row, some, seen), queries, read, values[:, seen], scores.softmax(-1)


def _forms() -> tuple[Form, Form]:
    """Blocks and torch's kernel, forward and backward, on one causal row that stands for all."""
    from pedgpt.kernels.attention import Layout

    q, k, v = (torch.full((1, 4, 512, 64), 0.5, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    layout = Layout(*[torch.zeros(1, 512, dtype=torch.long)] * 2)

    def step(form: Callable[..., Tensor]) -> object:
        with torch.enable_grad():
            return torch.autograd.grad(form(q, k, v), (q, k, v), torch.ones_like(q))

    causal = partial(F.scaled_dot_product_attention, is_causal=True)
    return (lambda: step(lambda *x: _BlockedAttention.apply(*x, layout))), (lambda: step(causal))


CANDIDATES["attention", torch.bfloat16, "rows"] = _forms
