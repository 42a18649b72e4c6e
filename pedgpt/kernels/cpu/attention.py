"""Causal attention on the CPU: bfloat16 in products over blocks of queries, other dtypes one document after another.

torch's own kernel multiplies bfloat16 in small pieces; whole products by oneDNN are 1.4 to 1.75 times as fast
(`python benchmarks/bench_attention.py`, two cores), and nothing but q, k, v is kept for the backward pass. A block of
queries reads the keys from the first one that it may see. With a mask torch's kernel computes all T² scores; a causal
call for each document takes half of its time or less.

Letters: B batch, H heads, G key-value heads, T tokens, S keys that a block reads, K head_dim.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pedgpt.kernels import naive
from pedgpt.kernels.onednn import refuse_create_graph

if TYPE_CHECKING:
    from pedgpt.kernels.attention import Layout

prefer = lambda *_: True  # noqa: E731  UNTIL THE MERGE: from pedgpt.kernels.cpu.choice import prefer

# Queries of a block, and numbers that the scores of a block may have: 2 MiB in float32 stay in a processor's cache.
BLOCK, SCORES = 128, 2**19


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None) -> Tensor | None:
    """As `kernels.attention`, or None where torch's kernel over a dense mask does as well."""
    (rows, heads, tokens, size), groups = q.shape, k.shape[1]
    if any(type(t) not in (Tensor, FakeTensor) or t.device.type != "cpu" or t.dtype != q.dtype for t in (q, k, v)):
        return None
    if tokens < BLOCK or k.shape != (rows, groups, tokens, size) or v.shape != k.shape:
        return None
    if not q.numel() or not groups or heads % groups:
        return None
    if q.dtype == torch.bfloat16 and prefer("attention", q.dtype, "rows"):
        return _BlockedAttention.apply(q, k, v, layout)
    if layout is None or layout.documents is None or tokens < 2 * BLOCK:
        return None
    documents = layout.once("apart", lambda: _documents_apart(layout))
    return _by_documents(q, k, v, documents) if documents else None


def _by_documents(q: Tensor, k: Tensor, v: Tensor, documents: list[Layout]) -> Tensor:
    """Attention of all rows' documents, which lie one after another, by torch's kernel."""
    lengths = [document.positions.shape[1] for document in documents]
    parts = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2).split(lengths, dim=2) for x in (q, k, v))
    found = []
    for *operands, document in zip(*parts, documents, strict=True):
        mask, gqa = None if document.plain else document.mask(q.dtype), q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(*operands, mask, is_causal=mask is None, enable_gqa=gqa)
        found.append(out.transpose(1, 2))
    return torch.cat(found, dim=1).view(len(q), -1, *q.shape[1::2]).transpose(1, 2)


def _documents_apart(layout: Layout) -> list[Layout]:
    """A layout for each document of each row; none at all if a document goes on after another one."""
    found = []
    for row, ids in enumerate(layout.documents if layout.documents is not None else ()):
        names, lengths = ids.unique_consecutive(return_counts=True)
        if len(names.unique()) < len(names):
            return []
        ends = lengths.cumsum(0).tolist()
        found += [layout.square(row, start, stop) for start, stop in zip([0, *ends], ends)]
    return found


class _Block(NamedTuple):
    queries: slice
    keys: slice  # from the first that one of the queries may see
    penalty: Tensor | None  # added to the scores [T, S], where causality does not say it all


def _blocks(layout: Layout | None, row: int, tokens: int) -> list[_Block]:
    found = []
    for start in range(0, tokens, BLOCK):
        stop, first, penalty = min(start + BLOCK, tokens), 0, None
        if layout is not None:
            if layout.documents is not None:
                ids = layout.documents[row]
                first = int(torch.isin(ids, ids[start:stop]).int().argmax())
            seen = layout.square(row, first, stop)
            if seen.documents is not None or seen.branches is not None:
                zero = torch.zeros((), dtype=torch.float32)
                penalty = torch.where(naive.visible(seen)[0, start - first :], zero, -torch.inf)
        found.append(_Block(slice(start, stop), slice(first, stop), penalty))
    return found


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.layout = layout
        out, work = torch.empty_like(q), _Work(q, k, layout)
        for row, heads, groups in work.parts:
            keys, values = k[row, groups].contiguous(), v[row, groups].contiguous()
            for block in work.blocks[row]:
                _, p = work.probabilities(q, keys[:, block.keys].contiguous(), row, heads, block)
                found = torch.bmm(work.half(p), values[:, block.keys])
                out[row, heads, block.queries] = found.view(out[row, heads, block.queries].shape)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("attention in bfloat16 on the CPU")
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        work = _Work(q, k, ctx.layout)
        for row, heads, groups in work.parts:
            keys, values = k[row, groups].contiguous(), v[row, groups].contiguous()
            dkeys = torch.zeros(keys.shape, dtype=torch.float32)
            dvalues = torch.zeros_like(dkeys)
            for block in work.blocks[row]:
                at = row, heads, block.queries
                read = keys[:, block.keys].contiguous()  # oneDNN would copy a slice for each product
                q_block, p = work.probabilities(q, read, row, heads, block)
                dout_block = dout[at].reshape(q_block.shape)
                dvalues[:, block.keys] += torch.bmm(work.half(p).transpose(1, 2), dout_block)
                dp = torch.bmm(dout_block, values[:, block.keys].transpose(1, 2), out=work.get("half", p.shape))
                dp = work.get("scores", p.shape).copy_(dp)
                # ds = p ⊙ (dp − Σ p ⊙ dp) / √K
                ds = torch._softmax_backward_data(dp, p, -1, torch.float32, grad_input=dp)
                ds = work.half(ds.mul_(q.shape[-1] ** -0.5))
                dq[at] = torch.bmm(ds, read).view(q[at].shape)
                dkeys[:, block.keys] += torch.bmm(ds.transpose(1, 2), q_block)
            dk[row, groups], dv[row, groups] = dkeys, dvalues
        return dq, dk, dv, None


class _Work:
    """The order of work, and memory for one block, taken once: fresh pages cost more than the arithmetic on them."""

    def __init__(self, q: Tensor, k: Tensor, layout: Layout | None) -> None:
        (rows, heads, tokens, _), groups = q.shape, k.shape[1]
        self.layout = layout
        make = [functools.partial(_blocks, layout, row, tokens) for row in range(rows)]
        self.blocks = [layout.once(("blocks", row), each) if layout else each() for row, each in enumerate(make)]
        widest = max(block.keys.stop - block.keys.start for row in self.blocks for block in row)
        shared = heads // groups  # heads of queries over one key-value head
        at_once = max(1, SCORES // (BLOCK * widest * shared))
        self.parts = [
            (row, slice(group * shared, min(group + at_once, groups) * shared), slice(group, group + at_once))
            for row in range(rows)
            for group in range(0, groups, at_once)
        ]
        self.size = min(at_once, groups) * shared * BLOCK * widest
        self.ahead = torch.full((BLOCK, BLOCK), -torch.inf, dtype=torch.float32).triu_(1)
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: torch.Size) -> Tensor:
        """A buffer of this shape; bfloat16 for "half" and "low", float32 for "scores" and "p"."""
        if name not in self.buffers:
            dtype = torch.bfloat16 if name in ("half", "low") else torch.float32
            self.buffers[name] = torch.empty(self.size, dtype=dtype)
        return self.buffers[name][: math.prod(shape)].view(shape)

    def half(self, values: Tensor) -> Tensor:
        return self.get("half", values.shape).copy_(values)

    def probabilities(
        self, q: Tensor, keys: Tensor, row: int, heads: slice, block: _Block
    ) -> tuple[Tensor, Tensor]:
        """q of one block as [G, H/G · T, K], and its probabilities [G, H/G · T, S] in float32 for keys [G, S, K]."""
        q = q[row, heads, block.queries]
        (count, tokens, size), width = q.shape, keys.shape[1]
        q = q.reshape(len(keys), -1, size)
        shape, transposed = torch.Size((*q.shape[:2], width)), keys.transpose(1, 2)
        # The scores as a sum of two bfloat16 numbers: rounded once, they would be too coarse for the exponential.
        high = torch.bmm(q, transposed, out=self.get("half", shape))
        low = torch.baddbmm(high, q, transposed, beta=-1, out=self.get("low", shape))
        scores = self.get("scores", shape).copy_(high).add_(low).mul_(size**-0.5)
        by_head = scores.view(count, tokens, width)
        if block.penalty is not None:
            by_head.add_(block.penalty)
        else:
            by_head[..., width - tokens :] += self.ahead[:tokens, :tokens]
        if self.layout is not None and self.layout.slopes is not None:
            at = self.layout.positions[row]
            distance = (at[block.keys] - at[block.queries, None]).float()
            by_head.addcmul_(self.layout.slopes[heads, None, None], distance)
        return q, torch.softmax(scores, dim=-1, out=self.get("p", shape))
