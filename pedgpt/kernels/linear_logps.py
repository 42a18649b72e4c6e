"""Hidden states × head → log p(label) of every token, over chunks of tokens: never a [tokens, vocabulary] tensor.

    z = h Wᵀ,  log p = z[label] − log Σ exp z,  d log p / dz = onehot(label) − softmax z

The gradient of log p is formed from a chunk's logits while they exist. The backward pass only scales it, because the
caller's gradient is one factor per token (SPEC §3). So a frozen head takes two matrix products. A head that trains
takes three if all tokens share one factor, as in a mean (`linear_nll`). With a factor per token (`linear_token_logps`)
the backward pass computes the logits again, except the last chunk's. `normalize` divides by the length of the head's
rows without a copy (Baichuan2's NormHead). A row of zeros has no direction: its logit is 0 and it gets no gradient.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pedgpt.kernels import naive
from pedgpt.kernels._dispatch import autocast_dtype, by_triton, tl, transformed, triton, without_numbers
from pedgpt.kernels.cpu.products import linear, refuse_create_graph
from pedgpt.kernels.naive import SHORTEST

# Float32 logits in a chunk (half precision: twice as many): 64 MiB on the CPU, 512 MiB on a GPU. For V 125,696 that is
# n = 2,135 tokens: adding to the head's gradient (8 V D bytes) then takes 1/8 of the products' time (6 n V D FLOP).
CHUNK, CHUNK_CUDA = 2**24, 2**27
# Softmax (BLOCK) and the head's gradient on the CPU (SLICE) take so many numbers at a time, to stay in the cache. On a
# GPU only a normalised head is read in slices (SLICE_CUDA).
BLOCK, SLICE, SLICE_CUDA = 2**19, 2**21, 2**25


class TokenLogps(NamedTuple):
    """Three tensors [N], in float32 or wider, 0 for a token without a label. Only `logps` is differentiable.

    `entropy` of the predicted distribution, in nats; `correct` is 1 where no token is more probable than the label.
    """

    logps: Tensor
    entropy: Tensor
    correct: Tensor


def _softmax(logits: Tensor, labels: Tensor, inverse: Tensor | None, factors: Tensor | None, stats: Tensor) -> None:
    """log p, entropy and correctness of logits [N, V] into stats [3, N].

    `inverse` [V] scales the logits first. With `factors` [N] the logits turn into factor · d log p / d logits.
    """
    height = max(1, BLOCK // logits.shape[1])
    memory = torch.empty(2, min(height, len(logits)), logits.shape[1], dtype=stats.dtype, device=logits.device)
    for start in _blocks(range(0, len(logits), height)):
        rows = slice(start, start + height)
        label = labels[rows, None]
        z, p = memory[:, : len(label)]
        scaled = logits[rows] if inverse is None else torch.mul(logits[rows], inverse, out=z)
        torch.sub(scaled, scaled.amax(-1, keepdim=True).to(z.dtype), out=z)
        chosen = z.gather(1, label).squeeze(1)
        total = torch.exp(z, out=p).sum(-1)
        stats[0, rows] = chosen - total.log()
        stats[1, rows] = total.log() - z.mul_(p).sum(-1) / total
        stats[2, rows] = chosen >= 0
        if factors is not None:
            p.scatter_add_(1, label, -total[:, None])
            if inverse is not None:
                p.mul_(inverse)
            torch.mul(p, (-factors[rows] / total)[:, None], out=logits[rows])


if triton is not None:

    @triton.jit
    def _load_row(at, column, vocabulary, inverse):
        """A stretch of logits in float32, with what scaled them."""
        mask, scale = column < vocabulary, 1.0
        if inverse is not None:
            scale = tl.load(inverse + column, mask=mask, other=1.0)
        return tl.load(at + column, mask=mask, other=-float("inf")).to(tl.float32) * scale, scale

    @triton.jit
    def linear_logps_fwd_kernel(logits, labels, inverse, factors, stats, stride, vocabulary, BLOCK_V: tl.constexpr):
        """One row [V] of the logits: read once for its maximum, sum and entropy, once more to become the gradient."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * vocabulary
        label = tl.load(labels + row)
        chosen = _load_row(logits, label, vocabulary, inverse)[0]
        high, total, weighted = -float("inf"), 0.0, 0.0  # max z, Σ exp(z − high), Σ (z − high) exp(z − high)
        for start in range(0, vocabulary, BLOCK_V):
            z = _load_row(logits, start + tl.arange(0, BLOCK_V), vocabulary, inverse)[0]
            above = tl.maximum(high, tl.max(z, axis=0))
            e = tl.exp(z - above)
            weighted += total * tl.where(total > 0, high - above, 0.0)
            weighted = weighted * tl.exp(high - above) + tl.sum(e * tl.where(e > 0, z - above, 0.0), axis=0)
            total = total * tl.exp(high - above) + tl.sum(e, axis=0)
            high = above
        tl.store(stats + row, chosen - high - tl.log(total))
        tl.store(stats + stride + row, tl.log(total) - weighted / total)
        tl.store(stats + 2 * stride + row, (chosen >= high).to(tl.float32))
        if factors is not None:
            factor = tl.load(factors + row)
            for start in range(0, vocabulary, BLOCK_V):
                column = start + tl.arange(0, BLOCK_V)
                z, scale = _load_row(logits, column, vocabulary, inverse)
                gradient = factor * scale * ((column == label) - tl.exp(z - high) / total)
                tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < vocabulary)


def _softmax_triton(logits: Tensor, labels: Tensor, inverse: Any, factors: Any, stats: Tensor) -> None:
    labels, factors = labels.contiguous(), None if factors is None else factors.contiguous()
    given = logits, labels, inverse, factors, stats, stats.stride(0), logits.shape[1]
    block = min(4096, triton.next_power_of_2(logits.shape[1]))
    linear_logps_fwd_kernel[(len(logits),)](*given, BLOCK_V=block, num_warps=8)


def _blocks(blocks: Any) -> Any:
    """The blocks of a loop, or only the first and the last: where only memory is counted, the others take no more."""
    return blocks[:: max(1, len(blocks) - 1)] if without_numbers() else blocks


class _Head:
    """The output matrix [V, D] in the products' dtype, with the sizes of its chunks and slices."""

    last: Tensor | None = None  # the logits of the last chunk, which are used again

    def __init__(self, weight: Tensor, dtype: torch.dtype, normalize: bool, softmax: Any) -> None:
        self.given = weight.detach()
        self.weight = self.given.to(dtype)
        self.wide = torch.promote_types(dtype, torch.float32)
        self.softmax = softmax
        self.on_cpu = weight.device.type == "cpu" and not weight.is_cuda
        logits = (CHUNK if self.on_cpu else CHUNK_CUDA) * 4 // self.weight.element_size()
        # NOTE: never more than 8,192 tokens, because some libraries lose digits in a longer sum of products.
        self.chunk = min(2**13, max(1, logits // max(1, len(weight))))
        height = max(1, (SLICE if self.on_cpu else SLICE_CUDA) // max(1, weight.shape[1]))
        self.slices = [slice(start, start + height) for start in range(0, len(weight), height)]
        self.inverse: Tensor | None = None  # 1/‖w‖ [V]
        if normalize:
            parts = (self.given[rows].to(self.wide) for rows in self.slices)
            lengths = torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in parts])
            # Gradients in the products' dtype are multiplied by 1/‖w‖, so float16 needs a smaller limit on it.
            shortest = 2**-14 if dtype == torch.float16 else SHORTEST
            self.inverse = lengths.clamp(min=shortest).reciprocal().masked_fill_(lengths < SHORTEST, 0)

    def gradients(
        self, hidden: Tensor, labels: Tensor, factors: Tensor, of_hidden: bool, of_weight: bool
    ) -> tuple[Any, ...]:
        """(log p, entropy and correctness [3, N], d hidden, d weight): the gradients of Σ factors · log p, or None.

        If no gradient is wanted, the last chunk's logits stay as `last`; else they are used up, which saves a product.
        """
        dhidden, wanted = torch.empty_like(hidden) if of_hidden else None, of_hidden or of_weight
        hidden, factors = hidden.to(self.weight.dtype), factors.to(self.wide)
        stats = hidden.new_empty(3, len(labels), dtype=self.wide)
        # Slices of nearly equal length that cover the tokens; without tokens, one empty slice.
        tokens, count = len(labels), max(1, math.ceil(len(labels) / self.chunk))
        chunks = [slice(i * tokens // count, (i + 1) * tokens // count) for i in range(count)]
        dweight = None
        if of_weight:
            # float32 if chunks are summed or the head is normalised, or if float16 could underflow before it is scaled.
            done = count == 1 and self.inverse is None and self.given.dtype in (hidden.dtype, self.wide)
            dtype = self.given.dtype if done and self.given.dtype != torch.float16 else self.wide
            dweight = torch.empty(self.given.shape, dtype=dtype, device=hidden.device)
        logits: Any = None
        for rows in _blocks(chunks[::-1] if wanted else chunks):
            logits, self.last = self.last, None  # Drop the previous chunk's logits before the next are made.
            logits = linear(hidden[rows], self.weight) if logits is None else logits
            self.softmax(logits, labels[rows], self.inverse, factors[rows] if wanted else None, stats[:, rows])
            if dhidden is not None:
                dhidden[rows] = linear(logits, self.weight.t())
            if dweight is not None:
                self._add_product(dweight, logits, hidden[rows], first=rows is chunks[-1])
        self.last = None if wanted else logits
        if dweight is not None and self.inverse is not None:
            # d ŵ / ‖w‖, where ŵ = w/‖w‖, becomes d w in place: its component along w is subtracted.
            for rows in _blocks(self.slices):
                part, unit = dweight[rows], self.given[rows] * self.inverse[rows, None]
                part.sub_(unit * (unit * part).sum(-1, keepdim=True))
        return stats, dhidden, dweight

    def _add_product(self, dweight: Tensor, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
        """Onto dweight, or into it if `first`, the product dlogitsᵀ hidden, summed in the dtype of dweight."""
        if not self.on_cpu:
            wider = () if dweight.dtype == dlogits.dtype else (dweight.dtype,)
            add = torch.ops.aten.addmm.dtype_out if wider else torch.addmm
            add(dweight, dlogits.t(), hidden, *wider, beta=0 if first else 1, out=dweight)
            return
        for rows in _blocks(self.slices):
            left, right = dlogits[:, rows].t(), hidden
            if dweight.dtype not in (left.dtype, self.given.dtype):  # Not under autocast, whose own products round too.
                left, right = left.to(dweight.dtype), right.to(dweight.dtype)
            # NOTE: no addmm_, because MKL loses digits when it adds a product to what is already in memory.
            dweight[rows] = left @ right if first else dweight[rows].add_(left @ right)


class _LinearLogps(torch.autograd.Function):
    """With `count`, forward makes the gradient of −Σ log p / count; with None, backward gets one factor per token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, count: Any, grad: bool, *settings: Any
    ) -> tuple[Tensor, ...]:
        # `grad` says whether gradients are enabled, which in here they never are.
        of_hidden, of_weight = (grad and needed for needed in ctx.needs_input_grad[:2])
        ctx.again, ctx.settings, ctx.dtype = count is None and of_weight, settings, weight.dtype
        factors = torch.ones(labels.shape, dtype=torch.float64, device=hidden.device)
        if count is not None:  # In float16 1/count could underflow, so backward divides, after the loss scaler.
            factors /= -1 if settings[0] == torch.float16 else -count
        ctx.expected = None if count is None else factors[:1].to(torch.promote_types(settings[0], torch.float32))
        head, wanted = _Head(weight, *settings), (False, False) if ctx.again else (of_hidden, of_weight)
        stats, *ctx.gradients = head.gradients(hidden, labels, factors, *wanted)
        ctx.last = head.last if ctx.again else None
        ctx.save_for_backward(*((hidden, weight, labels) if ctx.again else ()))
        logps, entropy, correct = stats[0], stats[1], stats[2]
        ctx.mark_non_differentiable(entropy, correct)
        return logps, entropy, correct

    @staticmethod
    def backward(ctx: Any, dlogps: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("linear_token_logps" if ctx.expected is None else "linear_nll")
        if ctx.again:
            hidden, weight, labels = ctx.saved_tensors
            head = _Head(weight, *ctx.settings)
            head.last, ctx.last = ctx.last, None
            _, dhidden, dweight = head.gradients(hidden, labels, dlogps, ctx.needs_input_grad[0], True)
            return dhidden, dweight, *[None] * 6  # autograd converts each to its dtype
        if ctx.gradients is None:
            raise RuntimeError("linear_nll runs backward once: its gradients were scaled in place and given away")
        dhidden, dweight = ctx.gradients
        if ctx.expected is None:  # A copy, because a retained graph may run backward again.
            return dhidden * dlogps[:, None], *[None] * 7
        # The factors of a mean are equal, so the first stands for all; the sum of none is 0, where there is no label.
        factor, ctx.gradients = (dlogps[:1] / ctx.expected).sum(), None
        if dhidden is not None:
            dhidden.mul_(factor)
        if dweight is not None and dweight.is_cuda and dweight.dtype != ctx.dtype:
            # NOTE: one pass on a GPU only, because on a CPU `out` of another dtype makes a second copy in float32.
            dweight = torch.mul(dweight, factor, out=dweight.new_empty(dweight.shape, dtype=ctx.dtype))
        elif dweight is not None:
            dweight.mul_(factor)
        return dhidden, dweight, *[None] * 6


def unit_rows(weight: Tensor) -> Tensor:
    """The rows w/‖w‖ of a normalised head [V, D]; a row of zeros stays as it is, and gets no gradient."""
    lengths = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return torch.where(lengths < SHORTEST, 0.0, weight / lengths.clamp(min=SHORTEST))


def linear_token_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, *,
    normalize: bool = False, ignore_index: int = -100, impl: str | None = None,
) -> TokenLogps:  # fmt: skip
    """log softmax(hidden Wᵀ)[label] of hidden [N, D], weight [V, D] and labels [N]; differentiable once.

    Tokens labelled `ignore_index` are left out of every product. Products are in the dtype of `hidden` and `weight`,
    or autocast's, the softmax in float32 at least. `impl` "torch" or "triton" chooses the softmax's form; None takes
    Triton on CUDA. Under a compiler or torch.func the logits are made as a whole. Raises ValueError for shapes, dtypes
    or labels that do not fit.
    """
    found, rows = _supervised(hidden, weight, labels, None, normalize, ignore_index, impl)
    if rows is not None:
        found = tuple(value.new_zeros(len(labels)).index_copy(0, rows, value) for value in found)
    return TokenLogps(*found)


def linear_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, count: int | Tensor = 1, *,
    normalize: bool = False, ignore_index: int = -100, impl: str | None = None,
) -> TokenLogps:  # fmt: skip
    """(−Σ log p, Σ entropy, Σ correct) / count over the tokens of `linear_token_logps`, as three scalars.

    Forward already makes the gradients, so logits are computed once even if the head trains, and backward runs once.
    """
    found, _ = _supervised(hidden, weight, labels, count, normalize, ignore_index, impl)
    logp, entropy, correct = (value.sum() / count for value in found)
    return TokenLogps(-logp, entropy, correct)


def _supervised(
    hidden: Tensor, weight: Tensor, labels: Tensor, count: Any, normalize: bool, ignore_index: int, impl: str | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The three results for tokens with a label, and which tokens these are; None if the results are of all."""
    if transformed():
        return naive.linear_logps(hidden, weight, labels, normalize, ignore_index), None
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (hidden, weight, labels))
        raise ValueError(f"expected hidden [N, D], weight [V, D] and labels [N], found {shapes}")
    dtype = autocast_dtype(hidden, hidden.dtype)
    if hidden.dtype != weight.dtype and not (torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64):
        raise ValueError(f"hidden is {dtype} and weight {weight.dtype}: convert one of them, or use autocast")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are token ids in int64, found {labels.dtype}")
    supervised = labels != ignore_index
    if (wrong := labels[supervised & ((labels < 0) | (labels >= len(weight)))]).numel():
        raise ValueError(f"label {wrong[0].item()} is outside of the vocabulary of {len(weight)}")
    rows = supervised.nonzero().squeeze(1)
    if not (every := len(rows) == len(labels)):
        hidden, labels = hidden[rows], labels[rows]
    settings = dtype, normalize, _softmax_triton if by_triton(impl, hidden) else _softmax
    found = _LinearLogps.apply(hidden, weight, labels, count, torch.is_grad_enabled(), *settings)
    return found, None if every else rows
