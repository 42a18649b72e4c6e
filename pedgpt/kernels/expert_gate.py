"""What lies between the two skinny products of a packed mixture of experts: the noisy softmax gate.

    s = x Aᵀ,  G = softmax(x W_gᵀ + ε ⊙ softplus(x W_nᵀ)),  h = c · s ⊙ w,  w = [1 … 1, G_1 … G_N]

`down_gate` goes from x to h, `down_gate_backward` from dy back to d(x Pᵀ), where P stacks A, W_g and W_n. In Triton
each is a skinny product, split along its long axis so that every multiprocessor has work, and one pointwise kernel.

Letters: T tokens, D width of x, O width of y, U universal experts, then N specific ones, E = U + N, r rank, R = E·r
columns of h, S those of s: R, or r where all share one A. C = S + 2N rows of P, S + N without noise, S where gates are
given. P may have more rows: zeros that align its products, and routers that play no part. N = 0 is plain LoRA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels import hashing
from pedgpt.kernels._dispatch import tl, triton
from pedgpt.kernels.cpu.products import linear
from pedgpt.kernels.quantized import product_in_parts

ALIGNMENT = 16  # P gets rows of zeros up to such a number on a GPU, which then reads and writes 16 bytes at once


class Mixture(NamedTuple):
    """N specific experts of rank r, and how they are added up."""

    experts: int
    rank: int
    scaling: float
    universal: int = 1  # experts that are always on
    shared: bool = False  # all have one A
    top_k: int = 0  # so many specific experts have a weight; 0: all
    given: bool = False  # the gates come from outside


class Gated(NamedTuple):
    """`down_gate`'s results: h [T, R] and s [T, S] in the dtype of x; gates and slope [T, N] in float32 at least.

    `slope` is ε ⊙ sigmoid(x W_nᵀ), the derivative of the noise term; None without noise. gates is None if N = 0.
    `totals` [N + 2] float64: sums over tokens of the gates, of their entropy, and the number of tokens, if asked for.
    """

    h: Tensor
    s: Tensor
    gates: Tensor | None
    slope: Tensor | None
    totals: Tensor | None = None


def expert_gate(routes: Tensor, noise: Tensor | None, top_k: int = 0) -> tuple[Tensor, Tensor | None]:
    """(G, slope) [T, N] from x W_gᵀ, with noise ε [T, N] from x W_gᵀ and x W_nᵀ side by side; in float32 at least.
    Only the `top_k` largest routes count, of equal ones the first; 0: all."""
    routes, slope = routes.to(torch.promote_types(routes.dtype, torch.float32)), None
    if noise is not None:
        clean, spread = routes.chunk(2, dim=-1)
        noise = noise.to(routes.dtype)
        routes, slope = torch.addcmul(clean, noise, F.softplus(spread)), noise * spread.sigmoid()
    if 0 < top_k < routes.shape[-1]:
        others = routes.sort(dim=-1, descending=True, stable=True).indices[..., top_k:]
        routes = routes.scatter(-1, others, -torch.inf)
    return routes.softmax(-1), slope


def expert_gate_backward(dgates: Tensor, gates: Tensor, slope: Tensor | None) -> Tensor:
    """The gradient of `expert_gate`'s routes; a gate of 0, as beside the top k, gives its route a gradient of 0."""
    dclean = gates * (dgates - (gates * dgates).sum(-1, keepdim=True))
    return dclean if slope is None else torch.cat((dclean, dclean * slope), dim=-1)


def gate_totals(gates: Tensor, count: Tensor | bool = True) -> Tensor:
    """`Gated.totals` of gates [..., N]: over all tokens, or over those where `count` [...] is true."""
    parts = (gates, torch.special.entr(gates).sum(-1, keepdim=True), torch.ones_like(gates[..., :1]))
    values = torch.cat(parts, dim=-1).flatten(0, -2)
    return (values * count.reshape(-1, 1) if isinstance(count, Tensor) else values).sum(0, dtype=torch.float64)


def _weighted(s: Tensor, gates: Tensor, mixture: Mixture, added: bool = False) -> Tensor:
    """c · [w_1 s_1 … w_E s_E] side by side [T, R], or added up [T, r]."""
    weights = F.pad(gates, (mixture.universal, 0), value=1.0).mul_(mixture.scaling)[..., None]
    each = s.unflatten(-1, (-1, mixture.rank)) * weights
    return (each.sum(1) if added else each.flatten(-2)).to(s.dtype)


if triton is not None:

    @triton.jit
    def _sum_splits(at, mask, size, SPLITS: tl.constexpr):
        total = tl.load(at, mask=mask, other=0.0)
        for split in tl.static_range(1, SPLITS):
            total += tl.load(at + split * size, mask=mask, other=0.0)
        return total

    @triton.jit
    def _normal(key, rows, length, token, expert, some_token):
        """What the stream's `normal` draws for tokens [BLOCK_T] and experts [EXPERT_BLOCK], in float32."""
        row = tl.load(rows + token // length, mask=some_token, other=0)
        stream = hashing.hash_bits_triton(row + key)
        stream = hashing.hash_bits_triton(stream + (token % length).to(tl.uint64))
        bits = hashing.hash_bits_triton(stream[:, None] + expert.to(tl.uint64)[None, :])
        first = ((bits >> 32) + 1).to(tl.float64) * 2.3283064365386963e-10
        angle = (bits & 0xFFFFFFFF).to(tl.float64) * 1.4629180792671596e-09  # 2π / 2^32
        return (tl.sqrt(-2.0 * tl.log(first)) * tl.cos(angle)).to(tl.float32)

    @triton.jit(do_not_specialize=["key", "length", "tokens"])
    def gate_fwd_kernel(product, noise, rows, key, length, where, h, s, gates, slope, totals, tokens, columns, scaling,
                        EXPERTS: tl.constexpr, RANK: tl.constexpr, UNIVERSAL: tl.constexpr, SHARED: tl.constexpr,
                        TOP_K: tl.constexpr, GIVEN: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
                        RANK_BLOCK: tl.constexpr, EXPERT_BLOCK: tl.constexpr):  # fmt: skip
        """h, s, gates, slope and this program's totals of BLOCK_T tokens, from product [splits, T, columns] = x Pᵀ.

        The noise is `noise` [T, N], or the stream of `key` and `rows` [B], or none. GIVEN gates are read.
        """
        HIDDEN: tl.constexpr = (EXPERTS + UNIVERSAL) * RANK
        OF_A: tl.constexpr = RANK if SHARED else HIDDEN
        token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        some, size, expert = token < tokens, tokens.to(tl.int64) * columns, tl.arange(0, EXPERT_BLOCK)
        gate = tl.zeros((BLOCK_T, EXPERT_BLOCK), tl.float32)
        if EXPERTS > 0:
            mask = some[:, None] & (expert < EXPERTS)[None, :]
            gate_at = token[:, None] * EXPERTS + expert[None, :]
            if GIVEN:
                gate = tl.load(gates + gate_at, mask=mask, other=0.0)
            else:
                route_at = product + token[:, None] * columns + (OF_A + expert)[None, :]
                route = _sum_splits(route_at, mask, size, SPLITS)
                if slope is not None:
                    if rows is not None:
                        epsilon = _normal(key, rows, length, token, expert, some)
                    else:
                        epsilon = tl.load(noise + gate_at, mask=mask, other=0.0)
                    spread = _sum_splits(route_at + EXPERTS, mask, size, SPLITS)
                    # log(1 + e^z) and its derivative, from e^-|z|, which cannot overflow
                    decay = tl.exp(-tl.abs(spread))
                    route += epsilon * (tl.maximum(spread, 0.0) + tl.log(1.0 + decay))
                    tl.store(slope + gate_at, epsilon * tl.where(spread >= 0, 1.0, decay) / (1.0 + decay), mask=mask)
                route = tl.where((expert < EXPERTS)[None, :], route, float("-inf"))
                left = route
                for _ in range(TOP_K):  # The first of the largest goes out of `left`.
                    best = tl.argmax(left, axis=1)[:, None] == expert[None, :]
                    left = tl.where(best, float("-inf"), left)
                route = tl.where((left == float("-inf")) | (TOP_K == 0), route, float("-inf"))
                exponential = tl.exp(route - tl.max(route, axis=1)[:, None])
                gate = exponential / tl.sum(exponential, axis=1)[:, None]
                tl.store(gates + gate_at, gate, mask=mask)
            if totals is not None:
                counts = some if where is None else tl.load(where + token, mask=some, other=0) != 0
                counted = tl.where(counts[:, None], gate, 0.0)
                entropy = -counted * tl.log(tl.where(counted > 0, counted, 1.0))
                totals += tl.program_id(0) * (EXPERTS + 2)
                tl.store(totals + expert, tl.sum(counted, axis=0), mask=expert < EXPERTS)
                tl.store(totals + EXPERTS, tl.sum(tl.sum(entropy, axis=1), axis=0))
                tl.store(totals + EXPERTS + 1, tl.sum(counts.to(tl.float32), axis=0))
        for j in range(EXPERTS + UNIVERSAL):
            weight = tl.sum(tl.where((expert + UNIVERSAL == j)[None, :], gate, 0.0), axis=1)
            weight = scaling * tl.where(j < UNIVERSAL, 1.0, weight)[:, None]
            for start in range(0, RANK, RANK_BLOCK):
                inner = start + tl.arange(0, RANK_BLOCK)
                some_inner = some[:, None] & (inner < RANK)[None, :]
                column = (j * RANK + inner)[None, :]
                of_A = inner[None, :] if SHARED else column
                s_tile = _sum_splits(product + token[:, None] * columns + of_A, some_inner, size, SPLITS)
                tl.store(s + token[:, None] * OF_A + of_A, s_tile.to(s.dtype.element_ty), mask=some_inner)
                h_at = h + token[:, None] * HIDDEN + column
                tl.store(h_at, (weight * s_tile).to(h.dtype.element_ty), mask=some_inner)

    @triton.jit(do_not_specialize=["tokens"])
    def gate_bwd_kernel(product, s, gates, slope, where, dtotals, ds, h, dgates, tokens, columns, scaling,
                        EXPERTS: tl.constexpr, RANK: tl.constexpr, UNIVERSAL: tl.constexpr, SHARED: tl.constexpr,
                        SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, RANK_BLOCK: tl.constexpr,
                        EXPERT_BLOCK: tl.constexpr):  # fmt: skip
        """ds [T, columns], h [T, R] and, if gates were given, dgates of BLOCK_T tokens, from [splits, T, R] = dy B."""
        HIDDEN: tl.constexpr = (EXPERTS + UNIVERSAL) * RANK
        OF_A: tl.constexpr = RANK if SHARED else HIDDEN
        token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        some, size, expert = token < tokens, tokens.to(tl.int64) * HIDDEN, tl.arange(0, EXPERT_BLOCK)
        mask = some[:, None] & (expert < EXPERTS)[None, :]
        gate_at = token[:, None] * EXPERTS + expert[None, :]
        gate = tl.zeros((BLOCK_T, EXPERT_BLOCK), tl.float32)
        dgate = tl.zeros((BLOCK_T, EXPERT_BLOCK), tl.float32)
        if EXPERTS > 0:
            gate = tl.load(gates + gate_at, mask=mask, other=0.0)
        for start in range(0, RANK, RANK_BLOCK):
            inner = start + tl.arange(0, RANK_BLOCK)
            some_inner = some[:, None] & (inner < RANK)[None, :]
            total = tl.zeros((BLOCK_T, RANK_BLOCK), tl.float32)  # over the experts so far, if they share one A
            for j in range(EXPERTS + UNIVERSAL):
                weight = tl.sum(tl.where((expert + UNIVERSAL == j)[None, :], gate, 0.0), axis=1)
                weight = scaling * tl.where(j < UNIVERSAL, 1.0, weight)[:, None]
                column = (j * RANK + inner)[None, :]
                of_A = inner[None, :] if SHARED else column
                at = token[:, None] * HIDDEN + column
                dh = _sum_splits(product + at, some_inner, size, SPLITS)
                s_tile = tl.load(s + token[:, None] * OF_A + of_A, mask=some_inner, other=0.0).to(tl.float32)
                inner_product = tl.sum(dh * s_tile, axis=1)[:, None]
                dgate += tl.where((expert + UNIVERSAL == j)[None, :], inner_product, 0.0)
                tl.store(h + at, (weight * s_tile).to(h.dtype.element_ty), mask=some_inner)
                total = weight * dh + (total if SHARED else 0.0)
                ds_at = ds + token[:, None] * columns + of_A
                tl.store(ds_at, total.to(ds.dtype.element_ty), mask=some_inner)
        dgate *= scaling
        if dtotals is not None:
            counts = some if where is None else tl.load(where + token, mask=some, other=0) != 0
            of_totals = tl.load(dtotals + expert, mask=expert < EXPERTS, other=0.0)[None, :]
            of_totals -= tl.load(dtotals + EXPERTS) * (1.0 + tl.log(tl.where(gate > 0, gate, 1.0)))
            dgate += tl.where(counts[:, None], of_totals, 0.0)
        # What follows the columns of A: the routes', then zeros for the rows of P that played no part.
        at, used = ds + token[:, None] * columns + (OF_A + expert)[None, :], OF_A
        if dgates is not None:
            tl.store(dgates + gate_at, dgate, mask=mask)
        else:
            dclean = gate * (dgate - tl.sum(gate * dgate, axis=1)[:, None])
            tl.store(at, dclean.to(ds.dtype.element_ty), mask=mask)
            used = OF_A + EXPERTS
            if slope is not None:
                dspread = dclean * tl.load(slope + gate_at, mask=mask, other=0.0)
                tl.store(at + EXPERTS, dspread.to(ds.dtype.element_ty), mask=mask)
                used = OF_A + 2 * EXPERTS
        for start in range(used, columns, EXPERT_BLOCK):
            rest = (start + expert)[None, :]
            tl.store(ds + token[:, None] * columns + rest, 0.0, mask=some[:, None] & (rest < columns))


def _settings(product: Tensor, mixture: Mixture) -> tuple[int, dict[str, int]]:
    """(programs, settings) of the pointwise kernels, whose tiles of tokens × experts must fit into registers."""
    block = triton.next_power_of_2(max(2, mixture.experts))
    block_t = max(2, min(32, 512 // block))
    return triton.cdiv(product.shape[1], block_t), {
        "EXPERTS": mixture.experts, "RANK": mixture.rank, "UNIVERSAL": mixture.universal, "SHARED": mixture.shared,
        "RANK_BLOCK": min(64, triton.next_power_of_2(mixture.rank)), "SPLITS": len(product), "EXPERT_BLOCK": block,
        "BLOCK_T": block_t,
    }  # fmt: skip


def _gate_triton(product: Tensor, noise: Any, given: Any, mixture: Mixture, count: Any, dtype: torch.dtype) -> Gated:
    (_, tokens, columns), (programs, settings) = product.shape, _settings(product, mixture)
    experts, total = mixture.experts, mixture.experts + mixture.universal
    h, s = (product.new_empty(tokens, n * mixture.rank, dtype=dtype) for n in (total, 1 if mixture.shared else total))
    gates = product.new_empty(tokens, experts) if experts and given is None else given
    slope = None if noise is None or gates is None else torch.empty_like(gates)
    totals = product.new_empty(programs, experts + 2) if experts and count is not False else None
    source: Any = (noise.float().contiguous() if isinstance(noise, Tensor) else None, None, 0, 0)
    if noise is not None and source[0] is None:
        source = (None, noise.rows, noise.key, tokens // max(1, len(noise.rows)))
    results = h, s, gates, slope, totals, tokens, columns, mixture.scaling
    where = count if isinstance(count, Tensor) else None
    gate_fwd_kernel[(programs,)](
        product, *source, where, *results, TOP_K=mixture.top_k, GIVEN=mixture.given, **settings
    )
    return Gated(h, s, gates, slope, None if totals is None else totals.sum(0, dtype=torch.float64))


def _gate_backward_triton(
    dh: Tensor, s: Tensor, gates: Any, slope: Any, mixture: Mixture, columns: int, dtotals: Any, count: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    programs, settings = _settings(dh, mixture)
    ds, h = s.new_empty(len(s), columns), s.new_empty(dh.shape[1:])
    dgates, where = torch.empty_like(gates) if mixture.given else None, count if isinstance(count, Tensor) else None
    operands = dh, s, gates, slope, where, None if dtotals is None else dtotals.float(), ds, h, dgates
    gate_bwd_kernel[(programs,)](*operands, len(s), columns, mixture.scaling, **settings)
    return ds, h, dgates


def down_gate(
    x: Tensor, packed: Tensor, noise: Any, mixture: Mixture, *, given: Tensor | None = None,
    dropped: Tensor | None = None, count: Tensor | bool = False, impl: str,
) -> Gated:  # fmt: skip
    """From x [T, D] and P = `packed` [C, D] to h. `noise`: ε [T, N], in Triton also a stream; `given`: gates [T, N];
    `dropped` [T, D]: what A reads for x; `count`: True, or the tokens [T] of which to return the totals."""
    experts, times = mixture.experts, product_in_parts if impl == "triton" else linear
    columns = mixture.rank * (1 if mixture.shared else experts + mixture.universal)
    if impl == "torch":
        packed = packed[: columns + experts * (0 if mixture.given else 1 if noise is None else 2)]
    both = times(x, packed if dropped is None else packed[columns:])
    if dropped is not None:
        both = torch.cat((times(dropped, packed[:columns]), both), dim=-1)
    if impl == "triton":
        return _gate_triton(both, noise, given, mixture, count, x.dtype)
    s, routes = both.tensor_split([columns], dim=-1)
    if experts == 0:
        return Gated(s * mixture.scaling, s, None, None)
    gates, slope = expert_gate(routes, noise, mixture.top_k) if given is None else (given, None)
    totals = None if count is False else gate_totals(gates, count)
    return Gated(_weighted(s, gates, mixture), s, gates, slope, totals)


def down_gate_backward(
    dy: Tensor, lora_B: Tensor, s: Tensor, gates: Any, slope: Any, mixture: Mixture, *, columns: int,
    dtotals: Tensor | None = None, count: Tensor | bool = True, impl: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """From dy [T, O] and d(totals) to (d(x Pᵀ) [T, C], h [T, R], dG [T, N] of given gates), with B [O, R] and what
    `down_gate` gave. In Triton the first is [T, `columns`], for all rows of P."""
    if impl == "triton":
        dh = product_in_parts(dy, lora_B.t())
        return _gate_backward_triton(dh, s.contiguous(), gates, slope, mixture, columns, dtotals, count)
    dh = linear(dy, lora_B.t())
    if gates is None:
        return dh * mixture.scaling, s * mixture.scaling, None
    each = dh.to(gates.dtype).unflatten(-1, (-1, mixture.rank)) * s.unflatten(-1, (-1, mixture.rank))
    dgates = mixture.scaling * each[:, mixture.universal :].sum(-1)
    if dtotals is not None:
        of_gates, of_entropy = dtotals[:-2].to(gates.dtype), dtotals[-2].to(gates.dtype)
        of_totals = of_gates - of_entropy * (1 + torch.where(gates > 0, gates, 1.0).log())
        dgates = dgates + (of_totals * count[:, None] if isinstance(count, Tensor) else of_totals)
    ds, h = _weighted(dh, gates, mixture, added=mixture.shared), _weighted(s, gates, mixture)
    if mixture.given:
        return ds, h, dgates
    return torch.cat((ds, expert_gate_backward(dgates, gates, slope).to(dh.dtype)), dim=-1), h, None
