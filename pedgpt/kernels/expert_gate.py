"""What lies between the two skinny products of a packed mixture of experts: the noisy softmax gate.

    s = x Aᵀ,  G = softmax(x W_gᵀ + ε ⊙ softplus(x W_nᵀ)),  h = c · s ⊙ [1, G_1 … G_N]

`down_gate` goes from x to h, `down_gate_backward` from dy back to d(x Pᵀ), where P stacks A, W_g and W_n. In Triton
each is a skinny product, split along its long axis so that every multiprocessor has work, and one pointwise kernel.

Letters: T tokens, D width of x, O width of y, N specific experts, r rank, R = (N+1)·r columns of s and h (universal
expert first), C = R + 2N rows of P, or R + N without noise. P may have more rows: zeros that align its products, and
W_n where there is no noise. N = 0 is plain LoRA, which has no gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels._dispatch import tl, triton
from pedgpt.kernels.cpu.products import product

if triton is not None:
    from pedgpt.kernels.hashing import hash_bits_triton

ALIGNMENT = 16  # P gets rows of zeros up to such a number on a GPU, which then reads and writes 16 bytes at once


class Gated(NamedTuple):
    """`down_gate`'s results: h and s [T, R] in the dtype of x; gates and slope [T, N] in float32 at least.

    `slope` is ε ⊙ sigmoid(x W_nᵀ), the derivative of the noise term; None without noise. gates is None if N = 0.
    `totals` [N + 2] float64: sums over tokens of the gates, of their entropy, and the number of tokens, if asked for.
    """

    h: Tensor
    s: Tensor
    gates: Tensor | None
    slope: Tensor | None
    totals: Tensor | None = None


def expert_gate(routes: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(G, slope) [T, N] from x W_gᵀ, with noise ε [T, N] from x W_gᵀ and x W_nᵀ side by side; in float32 at least."""
    routes = routes.to(torch.promote_types(routes.dtype, torch.float32))
    if noise is None:
        return routes.softmax(-1), None
    clean, spread = routes.chunk(2, dim=-1)
    noise = noise.to(routes.dtype)
    return torch.addcmul(clean, noise, F.softplus(spread)).softmax(-1), noise * spread.sigmoid()


def expert_gate_backward(dgates: Tensor, gates: Tensor, slope: Tensor | None) -> Tensor:
    """The gradient of `expert_gate`'s routes."""
    dclean = gates * (dgates - (gates * dgates).sum(-1, keepdim=True))
    return dclean if slope is None else torch.cat((dclean, dclean * slope), dim=-1)


def gate_totals(gates: Tensor, count: Tensor | bool = True) -> Tensor:
    """`Gated.totals` of gates [..., N]: over all tokens, or over those where `count` [...] is true."""
    parts = (gates, torch.special.entr(gates).sum(-1, keepdim=True), torch.ones_like(gates[..., :1]))
    values = torch.cat(parts, dim=-1).flatten(0, -2)
    return (values * count.reshape(-1, 1) if isinstance(count, Tensor) else values).sum(0, dtype=torch.float64)


def _scaled(s: Tensor, gates: Tensor, scaling: float) -> Tensor:
    """c · s ⊙ [1, G_1 … G_N], every weight over the r columns of its expert."""
    weights = F.pad(gates, (1, 0), value=1.0).mul_(scaling)[..., None]
    (tokens, columns), experts = s.shape, weights.shape[1]
    return (s.view(tokens, experts, columns // experts) * weights).flatten(-2).to(s.dtype)


if triton is not None:
    # NOTE: a number of tokens of 1 must stay a number of the kernel, because a constant has no `.to`.
    @triton.jit(do_not_specialize=["tokens"])
    def skinny_kernel(x, w, out, tokens, width, columns, part, stride_column, stride_k, UPCAST: tl.constexpr,
                      BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
        """out [splits, T, C] float32 from x [T, D] and w [C, D] of any strides: each program sums `part` of D."""
        column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        row = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        split = tl.program_id(2)
        some_row, some_column = (row < tokens)[:, None], (column < columns)[None, :]
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for start in range(split * part, (split + 1) * part, BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            some_k = k < width
            x_tile = tl.load(x + row[:, None] * width + k[None, :], mask=some_row & some_k[None, :], other=0.0)
            w_at = w + k.to(tl.int64)[:, None] * stride_k + column.to(tl.int64)[None, :] * stride_column
            w_tile = tl.load(w_at, mask=some_k[:, None] & some_column, other=0.0)
            if UPCAST:
                x_tile, w_tile = x_tile.to(tl.float32), w_tile.to(tl.float32)
            total = tl.dot(x_tile, w_tile, total, input_precision="ieee")
        out += (split * tokens.to(tl.int64) + row)[:, None] * columns + column[None, :]
        tl.store(out, total, mask=some_row & some_column)

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
        stream = hash_bits_triton(row + key)
        stream = hash_bits_triton(stream + (token % length).to(tl.uint64))
        bits = hash_bits_triton(stream[:, None] + expert.to(tl.uint64)[None, :])
        first = ((bits >> 32) + 1).to(tl.float64) * 2.3283064365386963e-10
        angle = (bits & 0xFFFFFFFF).to(tl.float64) * 1.4629180792671596e-09  # 2π / 2^32
        return (tl.sqrt(-2.0 * tl.log(first)) * tl.cos(angle)).to(tl.float32)

    @triton.jit(do_not_specialize=["key", "length", "tokens"])
    def gate_fwd_kernel(product, noise, rows, key, length, where, h, s, gates, slope, totals, tokens, columns, scaling,
                        EXPERTS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
                        RANK_BLOCK: tl.constexpr, EXPERT_BLOCK: tl.constexpr):  # fmt: skip
        """h, s, gates, slope and this program's totals of BLOCK_T tokens, from product [splits, T, columns] = x Pᵀ.

        The noise is `noise` [T, N], or the stream of `key` and `rows` [B], or none if both are None.
        """
        HIDDEN: tl.constexpr = (EXPERTS + 1) * RANK
        token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        some, size, expert = token < tokens, tokens.to(tl.int64) * columns, tl.arange(0, EXPERT_BLOCK)
        gate = tl.zeros((BLOCK_T, EXPERT_BLOCK), tl.float32)
        if EXPERTS > 0:
            mask = some[:, None] & (expert < EXPERTS)[None, :]
            route_at = product + token[:, None] * columns + (HIDDEN + expert)[None, :]
            gate_at = token[:, None] * EXPERTS + expert[None, :]
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
            exponential = tl.exp(route - tl.max(route, axis=1)[:, None])
            gate = exponential / tl.sum(exponential, axis=1)[:, None]
            tl.store(gates + gate_at, gate, mask=mask)
            if totals is not None:
                counts = some
                if where is not None:
                    counts = some & (tl.load(where + token, mask=some, other=0) != 0)
                counted = tl.where(counts[:, None], gate, 0.0)
                entropy = -counted * tl.log(tl.where(counted > 0, counted, 1.0))
                totals += tl.program_id(0) * (EXPERTS + 2)
                tl.store(totals + expert, tl.sum(counted, axis=0), mask=expert < EXPERTS)
                tl.store(totals + EXPERTS, tl.sum(tl.sum(entropy, axis=1), axis=0))
                tl.store(totals + EXPERTS + 1, tl.sum(counts.to(tl.float32), axis=0))
        for j in range(EXPERTS + 1):
            weight = tl.sum(tl.where((expert + 1 == j)[None, :], gate, 0.0), axis=1)
            weight = scaling * tl.where(j == 0, 1.0, weight)[:, None]
            for start in range(0, RANK, RANK_BLOCK):
                inner = start + tl.arange(0, RANK_BLOCK)
                some_inner = some[:, None] & (inner < RANK)[None, :]
                column = (j * RANK + inner)[None, :]
                s_tile = _sum_splits(product + token[:, None] * columns + column, some_inner, size, SPLITS)
                at = token[:, None] * HIDDEN + column
                tl.store(s + at, s_tile.to(s.dtype.element_ty), mask=some_inner)
                tl.store(h + at, (weight * s_tile).to(h.dtype.element_ty), mask=some_inner)

    @triton.jit(do_not_specialize=["tokens"])
    def gate_bwd_kernel(product, s, gates, slope, ds, h, tokens, columns, scaling,
                        EXPERTS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
                        RANK_BLOCK: tl.constexpr, EXPERT_BLOCK: tl.constexpr):  # fmt: skip
        """ds [T, columns] and h [T, R] of BLOCK_T tokens, from product [splits, T, R] = dy B."""
        HIDDEN: tl.constexpr = (EXPERTS + 1) * RANK
        token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        some, size, expert = token < tokens, tokens.to(tl.int64) * HIDDEN, tl.arange(0, EXPERT_BLOCK)
        mask = some[:, None] & (expert < EXPERTS)[None, :]
        gate_at = token[:, None] * EXPERTS + expert[None, :]
        gate = tl.zeros((BLOCK_T, EXPERT_BLOCK), tl.float32)
        dgate = tl.zeros((BLOCK_T, EXPERT_BLOCK), tl.float32)
        if EXPERTS > 0:
            gate = tl.load(gates + gate_at, mask=mask, other=0.0)
        for j in range(EXPERTS + 1):
            weight = tl.sum(tl.where((expert + 1 == j)[None, :], gate, 0.0), axis=1)
            weight = scaling * tl.where(j == 0, 1.0, weight)[:, None]
            inner_product = tl.zeros((BLOCK_T,), tl.float32)
            for start in range(0, RANK, RANK_BLOCK):
                inner = start + tl.arange(0, RANK_BLOCK)
                some_inner = some[:, None] & (inner < RANK)[None, :]
                column = (j * RANK + inner)[None, :]
                at = token[:, None] * HIDDEN + column
                dh = _sum_splits(product + at, some_inner, size, SPLITS)
                s_tile = tl.load(s + at, mask=some_inner, other=0.0).to(tl.float32)
                inner_product += tl.sum(dh * s_tile, axis=1)
                ds_at = ds + token[:, None] * columns + column
                tl.store(ds_at, (weight * dh).to(ds.dtype.element_ty), mask=some_inner)
                tl.store(h + at, (weight * s_tile).to(h.dtype.element_ty), mask=some_inner)
            dgate += tl.where((expert + 1 == j)[None, :], scaling * inner_product[:, None], 0.0)
        # What follows the columns of A: the routes', then zeros for the rows of P that played no part.
        at = ds + token[:, None] * columns + (HIDDEN + expert)[None, :]
        dclean = gate * (dgate - tl.sum(gate * dgate, axis=1)[:, None])
        tl.store(at, dclean.to(ds.dtype.element_ty), mask=mask)
        used = EXPERTS
        if slope is not None:
            dspread = dclean * tl.load(slope + gate_at, mask=mask, other=0.0)
            tl.store(at + EXPERTS, dspread.to(ds.dtype.element_ty), mask=mask)
            used = 2 * EXPERTS
        for start in range(HIDDEN + used, columns, EXPERT_BLOCK):
            rest = (start + expert)[None, :]
            tl.store(ds + token[:, None] * columns + rest, 0.0, mask=some[:, None] & (rest < columns))


def _skinny(x: Tensor, w: Tensor) -> Tensor:
    """Sums [splits, T, C] in float32 whose total is x wᵀ. In float32 the product is cuBLAS's, which splits as well."""
    if x.dtype == torch.float32 or not x.numel():
        return (x @ w.t()).float()[None]
    (tokens, width), columns = x.shape, len(w)
    block_t, block_c = 64 if tokens < 8192 else 128, min(128, max(16, triton.next_power_of_2(columns)))
    blocks = triton.cdiv(tokens, block_t)
    # About 256 programs keep an H100's 132 multiprocessors busy, and each should sum 512 numbers at least. A power of
    # two, because the kernels that follow are compiled for it.
    splits = triton.next_power_of_2(max(1, min(256 // blocks, width // 512, 16)))
    out = x.new_empty(splits, tokens, columns, dtype=torch.float32)
    # The interpreter multiplies the bit patterns of bfloat16.
    upcast = type(skinny_kernel).__name__ == "InterpretedFunction" and x.dtype == torch.bfloat16
    skinny_kernel[(triton.cdiv(columns, block_c), blocks, splits)](
        x.contiguous(), w, out, tokens, width, columns, triton.cdiv(triton.cdiv(width, splits), 64) * 64, *w.stride(),
        UPCAST=upcast, BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_D=64, num_warps=block_t // 16, num_stages=3,
    )  # fmt: skip
    return out


def _settings(product: Tensor, experts: int, rank: int) -> tuple[int, dict[str, int]]:
    """(programs, settings) of the pointwise kernels, whose tiles of tokens × experts must fit into registers."""
    block = triton.next_power_of_2(max(2, experts))
    block_t = max(2, min(32, 512 // block))
    return triton.cdiv(product.shape[1], block_t), {
        "EXPERTS": experts, "RANK": rank, "SPLITS": len(product), "EXPERT_BLOCK": block, "BLOCK_T": block_t,
        "RANK_BLOCK": min(64, triton.next_power_of_2(rank)),
    }  # fmt: skip


def _gate_triton(
    product: Tensor, noise: Any, experts: int, rank: int, scaling: float, count: Any, dtype: torch.dtype
) -> Gated:  # fmt: skip
    (_, tokens, columns), (programs, settings) = product.shape, _settings(product, experts, rank)
    h, s = (product.new_empty(tokens, (experts + 1) * rank, dtype=dtype) for _ in range(2))
    gates = product.new_empty(tokens, experts) if experts else None
    slope = None if noise is None or gates is None else torch.empty_like(gates)
    totals = product.new_empty(programs, experts + 2) if experts and count is not False else None
    source: Any = (noise.float().contiguous() if isinstance(noise, Tensor) else None, None, 0, 0)
    if noise is not None and source[0] is None:
        source = (None, noise.rows, noise.key, tokens // max(1, len(noise.rows)))
    results = h, s, gates, slope, totals, tokens, columns, scaling
    gate_fwd_kernel[(programs,)](product, *source, count if isinstance(count, Tensor) else None, *results, **settings)
    return Gated(h, s, gates, slope, None if totals is None else totals.sum(0, dtype=torch.float64))


def _gate_backward_triton(dh: Tensor, s: Tensor, gates: Any, slope: Any, scaling: float, columns: int) -> Any:
    experts = 0 if gates is None else gates.shape[1]
    programs, settings = _settings(dh, experts, s.shape[1] // (experts + 1))
    ds, h = s.new_empty(len(s), columns), torch.empty_like(s)
    gate_bwd_kernel[(programs,)](dh, s, gates, slope, ds, h, len(s), columns, scaling, **settings)
    return ds, h


def down_gate(
    x: Tensor, packed: Tensor, noise: Any, *, experts: int, rank: int, scaling: float,
    dropped: Tensor | None = None, count: Tensor | bool = False, impl: str,
) -> Gated:  # fmt: skip
    """From x [T, D] and P = `packed` [C, D] to h. `noise`: ε [T, N], in Triton also a stream; `dropped` [T, D]: what A
    reads for x; `count`: True, or the tokens [T] of which to return the totals."""
    times, columns = _skinny if impl == "triton" else product, (experts + 1) * rank
    if impl == "torch":
        packed = packed[: columns + experts * (1 if noise is None else 2)]
    both = times(x, packed if dropped is None else packed[columns:])
    if dropped is not None:
        both = torch.cat((times(dropped, packed[:columns]), both), dim=-1)
    if impl == "triton":
        return _gate_triton(both, noise, experts, rank, scaling, count, x.dtype)
    s, routes = both.tensor_split([columns], dim=-1)
    if experts == 0:
        return Gated(s * scaling, s, None, None)
    gates, slope = expert_gate(routes, noise)
    return Gated(_scaled(s, gates, scaling), s, gates, slope, None if count is False else gate_totals(gates, count))


def down_gate_backward(
    dy: Tensor, lora_B: Tensor, s: Tensor, gates: Any, slope: Any, *, scaling: float, columns: int, impl: str
) -> tuple[Tensor, Tensor]:
    """From dy [T, O] to (d(x Pᵀ) [T, C], h [T, R]), with B [O, R] and what `down_gate` gave.

    In Triton the first is [T, `columns`], for all rows of P.
    """
    if impl == "triton":
        return _gate_backward_triton(_skinny(dy, lora_B.t()), s.contiguous(), gates, slope, scaling, columns)
    dh = product(dy, lora_B.t())
    if gates is None:
        return dh * scaling, s * scaling
    each = (dh.to(gates.dtype) * s).unflatten(-1, (gates.shape[-1] + 1, -1))[:, 1:].sum(-1)
    droutes = expert_gate_backward(scaling * each, gates, slope)
    return torch.cat((_scaled(dh, gates, scaling), droutes.to(dh.dtype)), dim=-1), _scaled(s, gates, scaling)
