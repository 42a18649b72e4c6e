"""What lies between the two skinny products of a packed mixture of experts: the noisy softmax gate.

    s = x Aᵀ,  G = softmax(x W_gᵀ + ε ⊙ softplus(x W_nᵀ)),  h = c · s ⊙ [1, G_1 … G_N]

`down_gate` goes from x to h, `down_gate_backward` from dy back to d(x Pᵀ), where P stacks A, W_g and W_n. In Triton
each is one kernel: a matrix product that reads its large operand once and ends in the gate.

Letters: T tokens, D width of x, O width of y, N specific experts, r rank, R = (N+1)·r columns of s and h (universal
expert first), C = R + 2N rows of P while there is noise and R + N without. N = 0 is plain LoRA, which has no gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels._transforms import without_numbers
from pedgpt.kernels._triton import tl, triton
from pedgpt.kernels.onednn import product

# Beyond so many columns a tile no longer fits beside its operands, and cuBLAS is the better product anyway; the loops
# over experts are unrolled, so many of them take long to compile.
MAX_COLUMNS, MAX_EXPERTS = 256, 64


class Gated(NamedTuple):
    """`down_gate`'s results: h and s [T, R] in the dtype of x; gates and slope [T, N] in float32 at least.

    `slope` is ε ⊙ sigmoid(x W_nᵀ), the derivative of the noise term; None without noise. gates is None if N = 0.
    """

    h: Tensor
    s: Tensor
    gates: Tensor | None
    slope: Tensor | None


# The torch form


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


def _down_gate(
    x: Tensor, packed: Tensor, noise: Tensor | None, experts: int, rank: int, scaling: float, dropped: Tensor | None
) -> Gated:
    columns = (experts + 1) * rank
    if dropped is None:
        s, routes = product(x, packed).split((columns, len(packed) - columns), dim=-1)
    else:
        s, routes = product(dropped, packed[:columns]), product(x, packed[columns:])
    if experts == 0:
        return Gated(s * scaling, s, None, None)
    gates, slope = expert_gate(routes, noise)
    return Gated(_scaled(s, gates, scaling), s, gates, slope)


def _down_gate_backward(
    dy: Tensor, lora_B: Tensor, s: Tensor, gates: Tensor | None, slope: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    dh = product(dy, lora_B.t())
    if gates is None:
        return dh * scaling, s * scaling
    experts = gates.shape[-1]
    each = (dh.to(gates.dtype) * s).unflatten(-1, (experts + 1, -1))[:, 1:].sum(-1)
    droutes = expert_gate_backward(scaling * each, gates, slope)
    return torch.cat((_scaled(dh, gates, scaling), droutes.to(dh.dtype)), dim=-1), _scaled(s, gates, scaling)


def _scaled(s: Tensor, gates: Tensor, scaling: float) -> Tensor:
    """c · s ⊙ [1, G_1 … G_N], every weight over the r columns of its expert."""
    weights = F.pad(gates, (1, 0), value=1.0) * scaling
    return (s.unflatten(-1, (weights.shape[-1], -1)) * weights[..., None]).flatten(-2).to(s.dtype)


# The Triton form

if triton is not None:

    @triton.jit
    def _weight_of_column(gates, column, EXPERTS: tl.constexpr, RANK: tl.constexpr, EXPERT_BLOCK: tl.constexpr):
        """[1, G_1 … G_N] [BLOCK_T, columns] from gates [BLOCK_T, EXPERT_BLOCK], without the scaling."""
        weight = (column < RANK).to(tl.float32)[None, :]
        for expert in tl.static_range(EXPERTS):
            gate = tl.sum(tl.where(tl.arange(0, EXPERT_BLOCK)[None, :] == expert, gates, 0.0), axis=1)
            weight += tl.where((column // RANK == expert + 1)[None, :], gate[:, None], 0.0)
        return weight

    @triton.jit
    def down_gate_fwd_kernel(
        x, packed, noise, h, s, gates, slope, tokens, width, scaling,
        EXPERTS: tl.constexpr, RANK: tl.constexpr, NOISY: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, COLUMN_BLOCK: tl.constexpr, EXPERT_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """h, s, gates and slope of BLOCK_T tokens: x [T, D] and packed [C, D] are read once along D."""
        COLUMNS: tl.constexpr = (EXPERTS + 1) * RANK
        row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        column = tl.arange(0, COLUMN_BLOCK).to(tl.int64)
        expert = tl.arange(0, EXPERT_BLOCK).to(tl.int64)
        some_row, some_column, some_expert = row < tokens, column < COLUMNS, expert < EXPERTS
        s_tile = tl.zeros((BLOCK_T, COLUMN_BLOCK), tl.float32)
        clean = tl.zeros((BLOCK_T, EXPERT_BLOCK), tl.float32)
        spread = tl.zeros((BLOCK_T, EXPERT_BLOCK), tl.float32)
        for start in range(0, width, BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            some_k = (k < width)[None, :]
            x_tile = tl.load(x + row[:, None] * width + k[None, :], mask=some_row[:, None] & some_k, other=0.0)
            a = tl.load(packed + column[:, None] * width + k[None, :], mask=some_column[:, None] & some_k, other=0.0)
            if UPCAST:
                x_tile, a = x_tile.to(tl.float32), a.to(tl.float32)
            s_tile = tl.dot(x_tile, tl.trans(a), s_tile, input_precision="ieee")
            if EXPERTS > 0:
                w = packed + (COLUMNS + expert)[:, None] * width + k[None, :]
                w_g = tl.load(w, mask=some_expert[:, None] & some_k, other=0.0)
                if UPCAST:
                    w_g = w_g.to(tl.float32)
                clean = tl.dot(x_tile, tl.trans(w_g), clean, input_precision="ieee")
                if NOISY:
                    w_n = tl.load(w + EXPERTS * width, mask=some_expert[:, None] & some_k, other=0.0)
                    if UPCAST:
                        w_n = w_n.to(tl.float32)
                    spread = tl.dot(x_tile, tl.trans(w_n), spread, input_precision="ieee")
        s_at = row[:, None] * COLUMNS + column[None, :]
        s_mask = some_row[:, None] & some_column[None, :]
        tl.store(s + s_at, s_tile.to(s.dtype.element_ty), mask=s_mask)
        if EXPERTS > 0:
            gate_at = row[:, None] * EXPERTS + expert[None, :]
            gate_mask = some_row[:, None] & some_expert[None, :]
            if NOISY:
                epsilon = tl.load(noise + gate_at, mask=gate_mask, other=0.0)
                # log(1 + e^z) and its derivative, from e^-|z|, which cannot overflow
                decay = tl.exp(-tl.abs(spread))
                clean += epsilon * (tl.maximum(spread, 0.0) + tl.log(1.0 + decay))
                sigmoid = tl.where(spread >= 0, 1.0, decay) / (1.0 + decay)
                tl.store(slope + gate_at, epsilon * sigmoid, mask=gate_mask)
            clean = tl.where(some_expert[None, :], clean, float("-inf"))
            exponential = tl.exp(clean - tl.max(clean, axis=1)[:, None])
            gate = exponential / tl.sum(exponential, axis=1)[:, None]
            tl.store(gates + gate_at, gate, mask=gate_mask)
            s_tile *= _weight_of_column(gate, column, EXPERTS, RANK, EXPERT_BLOCK)
        tl.store(h + s_at, (scaling * s_tile).to(h.dtype.element_ty), mask=s_mask)

    @triton.jit
    def down_gate_bwd_kernel(
        dy, lora_B, s, gates, slope, ds, h, tokens, width, scaling,
        EXPERTS: tl.constexpr, RANK: tl.constexpr, NOISY: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, COLUMN_BLOCK: tl.constexpr, EXPERT_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """ds [T, C] and h [T, R] of BLOCK_T tokens: dy [T, O] and lora_B [O, R] are read once along O = width."""
        COLUMNS: tl.constexpr = (EXPERTS + 1) * RANK
        ALL: tl.constexpr = COLUMNS + EXPERTS * (2 if NOISY else 1)
        row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        column = tl.arange(0, COLUMN_BLOCK).to(tl.int64)
        expert = tl.arange(0, EXPERT_BLOCK).to(tl.int64)
        some_row, some_column, some_expert = row < tokens, column < COLUMNS, expert < EXPERTS
        dh = tl.zeros((BLOCK_T, COLUMN_BLOCK), tl.float32)
        for start in range(0, width, BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            some_k = k < width
            dy_at = dy + row[:, None] * width + k[None, :]
            dy_tile = tl.load(dy_at, mask=some_row[:, None] & some_k[None, :], other=0.0)
            b_at = lora_B + k.to(tl.int64)[:, None] * COLUMNS + column[None, :]
            b = tl.load(b_at, mask=some_k[:, None] & some_column[None, :], other=0.0)
            if UPCAST:
                dy_tile, b = dy_tile.to(tl.float32), b.to(tl.float32)
            dh = tl.dot(dy_tile, b, dh, input_precision="ieee")
        s_at = row[:, None] * COLUMNS + column[None, :]
        s_mask = some_row[:, None] & some_column[None, :]
        s_tile = tl.load(s + s_at, mask=s_mask, other=0.0).to(tl.float32)
        ds_row = ds + row[:, None] * ALL
        if EXPERTS > 0:
            gate_at = row[:, None] * EXPERTS + expert[None, :]
            gate_mask = some_row[:, None] & some_expert[None, :]
            gate = tl.load(gates + gate_at, mask=gate_mask, other=0.0)
            both = scaling * dh * s_tile
            dgate = tl.zeros((BLOCK_T, EXPERT_BLOCK), tl.float32)
            for j in tl.static_range(EXPERTS):
                one = tl.sum(tl.where((column // RANK == j + 1)[None, :], both, 0.0), axis=1)
                dgate += tl.where((expert == j)[None, :], one[:, None], 0.0)
            dclean = gate * (dgate - tl.sum(gate * dgate, axis=1)[:, None])
            droutes = ds_row + COLUMNS + expert[None, :]
            tl.store(droutes, dclean.to(ds.dtype.element_ty), mask=gate_mask)
            if NOISY:
                dspread = dclean * tl.load(slope + gate_at, mask=gate_mask, other=0.0)
                tl.store(droutes + EXPERTS, dspread.to(ds.dtype.element_ty), mask=gate_mask)
            weight = scaling * _weight_of_column(gate, column, EXPERTS, RANK, EXPERT_BLOCK)
        else:
            weight = scaling
        tl.store(ds_row + column[None, :], (dh * weight).to(ds.dtype.element_ty), mask=s_mask)
        tl.store(h + s_at, (s_tile * weight).to(h.dtype.element_ty), mask=s_mask)


def _blocks(x: Tensor, experts: int, columns: int) -> dict[str, Any]:
    """Launch settings: 64 tokens are the least that an H100's tensor cores take whole; wide tiles need more warps."""
    interpreted = type(down_gate_fwd_kernel).__name__ == "InterpretedFunction"
    return {
        "num_warps": 8 if columns > 128 else 4,
        "BLOCK_T": 64,
        "BLOCK_D": 64 if x.element_size() == 2 else 32,
        "COLUMN_BLOCK": max(16, triton.next_power_of_2(columns)),
        "EXPERT_BLOCK": max(16, triton.next_power_of_2(experts)),
        # The interpreter multiplies the bit patterns of bfloat16.
        "UPCAST": interpreted and x.dtype == torch.bfloat16,
    }


def _down_gate_triton(
    x: Tensor, packed: Tensor, noise: Tensor | None, experts: int, rank: int, scaling: float
) -> Gated:
    (tokens, width), columns = x.shape, (experts + 1) * rank
    h, s = x.new_empty(tokens, columns), x.new_empty(tokens, columns)
    gates = x.new_empty(tokens, experts, dtype=torch.float32) if experts else None
    slope = None if gates is None or noise is None else torch.empty_like(gates)
    blocks = _blocks(x, experts, columns)
    if tokens and not without_numbers():
        down_gate_fwd_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
            x, packed, noise, h, s, gates, slope, tokens, width, scaling,
            EXPERTS=experts, RANK=rank, NOISY=noise is not None, **blocks,
        )  # fmt: skip
    return Gated(h, s, gates, slope)


def _down_gate_backward_triton(
    dy: Tensor, lora_B: Tensor, s: Tensor, gates: Tensor | None, slope: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    (tokens, columns), experts = s.shape, 0 if gates is None else gates.shape[1]
    ds = s.new_empty(tokens, columns + experts * (1 if slope is None else 2))
    h = torch.empty_like(s)
    blocks = _blocks(dy, experts, columns)
    if tokens and not without_numbers():
        down_gate_bwd_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
            dy, lora_B, s, gates, slope, ds, h, tokens, dy.shape[1], scaling,
            EXPERTS=experts, RANK=columns // (experts + 1), NOISY=slope is not None, **blocks,
        )  # fmt: skip
    return ds, h


# Either


def down_gate(
    x: Tensor,
    packed: Tensor,
    noise: Tensor | None,
    *,
    experts: int,
    rank: int,
    scaling: float,
    dropped: Tensor | None = None,
    impl: str,
) -> Gated:
    """From x [T, D] and P = `packed` [C, D] to h. `noise`: ε [T, N] float32; `dropped` [T, D]: what A reads for x."""
    if impl == "triton" and dropped is None:
        noise = None if noise is None else noise.float().contiguous()
        return _down_gate_triton(x.contiguous(), packed.contiguous(), noise, experts, rank, scaling)
    return _down_gate(x, packed, noise, experts, rank, scaling, dropped)


def down_gate_backward(
    dy: Tensor,
    lora_B: Tensor,
    s: Tensor,
    gates: Tensor | None,
    slope: Tensor | None,
    *,
    scaling: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """From dy [T, O] to (d(x Pᵀ) [T, C], h [T, R]), with B [O, R] and what `down_gate` gave."""
    if impl == "triton":
        return _down_gate_backward_triton(dy.contiguous(), lora_B.contiguous(), s.contiguous(), gates, slope, scaling)
    return _down_gate_backward(dy, lora_B, s, gates, slope, scaling)


def implementation(impl: str | None, x: Tensor, columns: int, experts: int) -> str:
    """ "triton" or "torch": as asked, else Triton on CUDA where it is installed and the sizes and dtype suit it.

    Raises ValueError for another name, and where Triton is asked for and cannot be had.
    """
    if impl not in (None, "torch", "triton"):
        raise ValueError(f'impl must be "torch", "triton" or None, found {impl!r}')
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    suits = triton is not None and x.dtype in dtypes and columns <= MAX_COLUMNS and experts <= MAX_EXPERTS
    if impl == "triton" and not suits:
        raise ValueError(
            'impl="triton" needs Triton with a GPU, float32, bfloat16 or float16, at most '
            f"{MAX_COLUMNS} columns (rank × experts) and {MAX_EXPERTS} specific experts; found "
            f"{'both' if triton else 'one of the two missing'}, {x.dtype}, {columns} columns and {experts} experts"
        )
    return impl or ("triton" if suits and x.is_cuda else "torch")
