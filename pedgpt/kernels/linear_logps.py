"""Hidden states × head → log p(label) of every token, over chunks of tokens: never a [tokens, vocabulary] tensor.

    z = h Wᵀ,  log p = z[label] − log Σ exp z,  d log p / dz = onehot(label) − softmax z

The gradient of log p needs nothing from above but a factor, so it is formed from a chunk's logits while they are there
and scaled in the backward pass (SPEC §3). A frozen head takes two matrix products that way, for any factor a token. A
head that trains takes three if one factor holds for all tokens, as in a mean (`linear_nll`); with a factor a token
(`linear_token_logps`) logits are computed again, all but the last chunk's. With `normalize` the head's rows count as of
unit length (Baichuan2's NormHead) without being copied: z = (h Wᵀ) / ‖w‖. A row of zeros has no direction: its logit
is 0 and it gets no gradient, because a division by a small ε would multiply that by 1/ε.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pedgpt.kernels import naive
from pedgpt.kernels._transforms import autocast_dtype, blocks_to_count, transformed
from pedgpt.kernels._triton import by_triton, tl, triton
from pedgpt.kernels.cpu.products import product, refuse_create_graph
from pedgpt.kernels.naive import SHORTEST

# Logits of a chunk in float32, and twice as many in half precision: 64 MiB on the CPU, 512 MiB on a GPU. For V 125,696
# that is n = 2,135 tokens: adding to the head's gradient, 8 V D bytes, takes an eighth of the products, 6 n V D FLOP.
CHUNK, CHUNK_CUDA = 2**24, 2**27
# Numbers at a time of a chunk's softmax on the CPU, and of its product for the head's gradient: they stay in a
# processor's cache. On a GPU that product is one, and only what a normalised head needs goes by (larger) slices.
BLOCK, SLICE, SLICE_CUDA = 2**19, 2**21, 2**25


class TokenLogps(NamedTuple):
    """Of each token [N], in float32 at least; 0 where there is no label. Only `logps` is differentiable.

    `entropy` of the predicted distribution, in nats; `correct` is 1 where no token is more probable than the label.
    """

    logps: Tensor
    entropy: Tensor
    correct: Tensor


# Softmax of a chunk: the torch form


def _softmax(logits: Tensor, labels: Tensor, inverse: Tensor | None, factors: Tensor | None, stats: Tensor) -> None:
    """log p, entropy and correctness of logits [N, V] into stats [3, N].

    `inverse` [V] scales the logits first. With `factors` [N] the logits turn into factor · d log p / d logits.
    """
    height = max(1, BLOCK // logits.shape[1])
    memory = torch.empty(2, min(height, len(logits)), logits.shape[1], dtype=stats.dtype, device=logits.device)
    for start in blocks_to_count(range(0, len(logits), height)):
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


# The Triton form

if triton is not None:

    @triton.jit
    def linear_logps_fwd_kernel(logits, labels, inverse, factors, stats, tokens, vocabulary, BLOCK_V: tl.constexpr):
        """One row [V] of the logits: read once for its maximum, sum and entropy, once more to become the gradient."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * vocabulary
        label = tl.load(labels + row)
        chosen = tl.load(logits + label).to(tl.float32)
        if inverse is not None:
            chosen *= tl.load(inverse + label)
        high, total, weighted = -float("inf"), 0.0, 0.0  # max z, Σ exp(z − high), Σ (z − high) exp(z − high)
        for start in range(0, vocabulary, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
            if inverse is not None:
                z *= tl.load(inverse + column, mask=column < vocabulary, other=1.0)
            above = tl.maximum(high, tl.max(z, axis=0))
            e = tl.exp(z - above)
            weighted += total * tl.where(total > 0, high - above, 0.0)
            weighted = weighted * tl.exp(high - above) + tl.sum(e * tl.where(e > 0, z - above, 0.0), axis=0)
            total = total * tl.exp(high - above) + tl.sum(e, axis=0)
            high = above
        tl.store(stats + row, chosen - high - tl.log(total))
        tl.store(stats + tokens + row, tl.log(total) - weighted / total)
        tl.store(stats + 2 * tokens + row, (chosen >= high).to(tl.float32))
        if factors is not None:
            factor = tl.load(factors + row)
            for start in range(0, vocabulary, BLOCK_V):
                column = start + tl.arange(0, BLOCK_V)
                z = tl.load(logits + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
                scale = 1.0
                if inverse is not None:
                    scale = tl.load(inverse + column, mask=column < vocabulary, other=1.0)
                gradient = factor * scale * ((column == label) - tl.exp(z * scale - high) / total)
                tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < vocabulary)


def _softmax_triton(logits: Tensor, labels: Tensor, inverse: Any, factors: Any, stats: Tensor) -> None:
    labels, factors = labels.contiguous(), None if factors is None else factors.contiguous()
    found = torch.empty(stats.shape, dtype=torch.float32, device=stats.device)
    block = min(4096, triton.next_power_of_2(logits.shape[1]))
    given = logits, labels, inverse, factors, found, *logits.shape
    linear_logps_fwd_kernel[(len(logits),)](*given, BLOCK_V=block, num_warps=8)
    stats.copy_(found)


# Chunks of tokens, each multiplied by the head, differentiated and forgotten


class _Head:
    """The output matrix [V, D] as the products see it."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, normalize: bool, softmax: Any) -> None:
        self.given = weight.detach()
        self.weight = self.given.to(dtype)
        self.wide = torch.promote_types(dtype, torch.float32)
        self.softmax = softmax
        self.on_cpu = weight.device.type == "cpu"
        logits = (CHUNK if self.on_cpu else CHUNK_CUDA) * 4 // self.weight.element_size()
        # NOTE: never more than 8,192 tokens, because some libraries lose digits in a longer sum of products.
        self.chunk = min(2**13, max(1, logits // max(1, len(weight))))
        height = max(1, (SLICE if self.on_cpu else SLICE_CUDA) // max(1, weight.shape[1]))
        self.slices = [slice(start, start + height) for start in range(0, len(weight), height)]
        self.inverse: Tensor | None = None  # 1/‖w‖ [V]
        if normalize:
            parts = (self.given[rows].to(self.wide) for rows in self.slices)
            lengths = torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in parts])
            # The gradient of the logits is multiplied by it, in the products' dtype: it must not overflow there.
            shortest = 2**-14 if dtype == torch.float16 else SHORTEST
            self.inverse = lengths.clamp(min=shortest).reciprocal().masked_fill_(lengths < SHORTEST, 0)

    def chunks(self, tokens: int) -> list[slice]:
        """Parts as equal as they can be; one, empty, of no tokens."""
        count = max(1, math.ceil(tokens / self.chunk))
        return [slice(i * tokens // count, (i + 1) * tokens // count) for i in range(count)]

    def gradients(
        self, hidden: Tensor, labels: Tensor, factors: Tensor, last: Tensor | None = None, *,
        of_hidden: bool = False, of_weight: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        """log p, entropy and correctness [3, N], the gradients of Σ factors · log p, and else the last chunk's logits.

        These may be given back as `last`, to be overwritten.
        """
        dhidden = torch.empty_like(hidden) if of_hidden else None
        hidden, factors = hidden.to(self.weight.dtype), factors.to(self.wide)
        stats = hidden.new_empty(3, len(labels), dtype=self.wide)
        chunks = self.chunks(len(labels))
        dweight = None
        if of_weight:
            # In float32 while it is a sum over chunks, to be projected, or waits for a factor in float16's short range.
            done = len(chunks) == 1 and self.inverse is None and self.given.dtype in (hidden.dtype, self.wide)
            dtype = self.given.dtype if done and self.given.dtype != torch.float16 else self.wide
            dweight = torch.empty(self.given.shape, dtype=dtype, device=hidden.device)
        logits: Any = None
        for rows in blocks_to_count(chunks[::-1] if of_hidden or of_weight else chunks):
            logits, last = last, None  # The chunk before is freed before this one is made.
            logits = product(hidden[rows], self.weight) if logits is None else logits
            wanted = factors[rows] if of_hidden or of_weight else None
            self.softmax(logits, labels[rows], self.inverse, wanted, stats[:, rows])
            if dhidden is not None:
                dhidden[rows] = product(logits, self.weight.t())
            if dweight is not None:
                self._add_product(dweight, logits, hidden[rows], first=rows is chunks[-1])
        if of_hidden or of_weight:
            logits = None
        if dweight is not None and self.inverse is not None:
            self._project(dweight, self.inverse)
        return stats, dhidden, dweight, logits

    def _add_product(self, dweight: Tensor, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
        """Onto dweight, or into it if `first`, the product dlogitsᵀ hidden, summed in the dtype of dweight."""
        if not self.on_cpu:
            wider = () if dweight.dtype == dlogits.dtype else (dweight.dtype,)
            add = torch.ops.aten.addmm.dtype_out if wider else torch.addmm
            add(dweight, dlogits.t(), hidden, *wider, beta=0 if first else 1, out=dweight)
            return
        for rows in blocks_to_count(self.slices):
            left, right = dlogits[:, rows].t(), hidden
            if dweight.dtype not in (left.dtype, self.given.dtype):  # autocast rounds, as it does its own products
                left, right = left.to(dweight.dtype), right.to(dweight.dtype)
            # NOTE: a sum of products, because MKL loses digits where it adds a product to what is there.
            dweight[rows] = left @ right if first else dweight[rows].add_(left @ right)

    def _project(self, dweight: Tensor, inverse: Tensor) -> None:
        """From the gradient of ŵ = w/‖w‖, divided by ‖w‖, to that of w: what is along w goes."""
        for rows in blocks_to_count(self.slices):
            part, unit = dweight[rows], self.given[rows] * inverse[rows, None]
            part.sub_(unit * (unit * part).sum(-1, keepdim=True))


class _LinearLogps(torch.autograd.Function):
    """`count`: Σ log p / -count is what the caller derives, so the gradient comes at once; None: any factors follow."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, count: Any, grad: bool, *head: Any) -> Any:
        of_hidden, of_weight = (grad and needed for needed in ctx.needs_input_grad[:2])
        again = count is None and of_weight
        factors = torch.ones(labels.shape, dtype=torch.float64, device=hidden.device)
        if count is not None:  # In float16's short range 1/count has to wait for the factor of a loss scaler.
            factors /= -1 if head[0] == torch.float16 else -count
        needed: Any = {"of_hidden": of_hidden and not again, "of_weight": of_weight and not again}
        stats, *ctx.gradients, last = _Head(weight, *head).gradients(hidden, labels, factors, **needed)
        ctx.head, ctx.last, ctx.dtype = head, last if again else None, weight.dtype
        ctx.expected = None if count is None else factors[:1].to(stats.dtype)
        ctx.save_for_backward(*((hidden, weight, labels) if again else ()))
        logps, entropy, correct = stats[0], stats[1], stats[2]
        ctx.mark_non_differentiable(entropy, correct)
        return logps, entropy, correct

    @staticmethod
    def backward(ctx: Any, dlogps: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("linear_token_logps" if ctx.expected is None else "linear_nll")
        if saved := ctx.saved_tensors:
            (hidden, weight, labels), last, ctx.last = saved, ctx.last, None
            needed: Any = {"of_hidden": ctx.needs_input_grad[0], "of_weight": True}
            _, dhidden, dweight, _ = _Head(weight, *ctx.head).gradients(hidden, labels, dlogps, last, **needed)
            return dhidden, dweight.to(weight.dtype), *[None] * 6
        if ctx.gradients is None:
            raise RuntimeError("linear_nll runs backward once: its gradients were scaled in place and given away")
        dhidden, dweight = ctx.gradients
        if ctx.expected is None:
            return (dhidden * dlogps[:, None]).to(dhidden.dtype), *[None] * 7
        factor, ctx.gradients = (dlogps[:1] / ctx.expected).sum(), None
        if dhidden is not None:
            dhidden.mul_(factor)
        if dweight is not None and dweight.is_cuda and dweight.dtype != ctx.dtype:
            # One pass over the gradient on a GPU; a CPU would take as many as below, and a second copy in float32.
            dweight = torch.mul(dweight, factor, out=dweight.new_empty(dweight.shape, dtype=ctx.dtype))
        elif dweight is not None:
            dweight = dweight.mul_(factor).to(ctx.dtype)
        return dhidden, dweight, *[None] * 6


# What the library calls


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
    if transformed():
        return TokenLogps(*naive.linear_logps(hidden, weight, labels, normalize, ignore_index))
    kept, rows, *head = _prepare(hidden, weight, labels, normalize, ignore_index, impl)
    found = _LinearLogps.apply(kept, weight, labels[rows], None, torch.is_grad_enabled(), *head)
    if isinstance(rows, slice):
        return TokenLogps(*found)
    return TokenLogps(*(value.new_zeros(len(labels)).index_copy(0, rows, value) for value in found))


def linear_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, count: int | Tensor = 1, *,
    normalize: bool = False, ignore_index: int = -100, impl: str | None = None,
) -> TokenLogps:  # fmt: skip
    """Sums of `linear_token_logps` over its tokens, divided by `count`, the first with its sign changed; scalars.

    Its gradient comes with it, in one pass over the head even if that trains; so the backward pass runs once.
    """
    if transformed():
        found = naive.linear_logps(hidden, weight, labels, normalize, ignore_index)
    else:
        kept, rows, *head = _prepare(hidden, weight, labels, normalize, ignore_index, impl)
        found = _LinearLogps.apply(kept, weight, labels[rows], count, torch.is_grad_enabled(), *head)
    logp, entropy, correct = (value.sum() / count for value in found)
    return TokenLogps(-logp, entropy, correct)


def _prepare(
    hidden: Tensor, weight: Tensor, labels: Tensor, normalize: bool, ignore_index: int, impl: str | None
) -> tuple[Any, ...]:
    """The supervised tokens' hidden states, which tokens these are, and `_Head`'s arguments."""
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
    softmax = _softmax_triton if by_triton(impl, hidden) else _softmax
    found = supervised.nonzero().squeeze(1)
    rows = slice(None) if len(found) == len(labels) else found
    return hidden[rows], rows, dtype, normalize, softmax
