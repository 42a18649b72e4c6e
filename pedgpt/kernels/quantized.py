"""Frozen weights in 8 and 4 bits: linear layers that store codes of W, and compute W again for each product.

    int8   W ≈ c · s / 127            c of 8 bits; s is the largest |w| of the row
    nf4    W ≈ NF4[c] · a             c of 4 bits; a is the largest |w| of 64 numbers of a row
           a ≈ DYNAMIC[u] · n + m     u of 8 bits; m is the mean of all a, and n the largest |a − m| of 256 of them

Sources: LLM.int8() (Dettmers et al. 2022) and QLoRA (Dettmers et al. 2023), always with its second quantisation. Codes,
tables and rounding are those of bitsandbytes, so its files can be read, and ours can be read there. The mean is summed
in float64, so that its bits do not depend on the number of threads. `skinny_kernel` also multiplies plain weights, for
adapters.

Letters: T tokens, O rows and D columns of W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pedgpt.kernels._dispatch import autocast_dtype, by_triton, tl, transformed, triton, without_numbers
from pedgpt.kernels.cpu.products import linear, refuse_create_graph

BLOCK, NESTED_BLOCK = 64, 256
FEW = 16  # rows of x, as in decoding, for which a product in Triton reads the codes and never writes W
# The quantiles of a normal distribution, scaled to [-1, 1]; the first half of a byte is the earlier code.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=torch.float32)  # fmt: skip


def _dynamic_table() -> Tensor:
    """0, 1 and for i = 0 … 6 the middles of 2^i parts of [0.1, 1], times 10^(i−6) and with both signs, in order."""
    edges = [torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32) for i in range(7)]
    middles = torch.cat([10.0 ** (i - 6) * ((e[:-1] + e[1:]) / 2) for i, e in enumerate(edges)])
    return torch.cat((-middles, torch.tensor([0.0, 1.0]), middles)).sort().values


DYNAMIC = _dynamic_table()
_on_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}  # the tables
_scratch: dict[Any, Tensor] = {}  # memory for one W: by device, dtype and stream; absent while a product uses it


def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """NF4, DYNAMIC, and for every byte its two numbers of NF4, which are read as one number of 64 bits."""
    if device not in _on_device:
        with torch.inference_mode(False):
            pairs = torch.cartesian_prod(NF4, NF4).view(torch.int64).flatten()
            _on_device[device] = NF4.to(device), DYNAMIC.to(device), pairs.to(device)
    return _on_device[device]


def _nearest(blocks: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """For rows of blocks [N, K]: codes (uint8), the indices of the numbers in the table that are nearest to w / a, the
    smaller one of two that are equally near; and a [N], the largest |w| of the row."""
    largest = blocks.abs().amax(1)
    middles = (table[1:] + table[:-1]) / 2
    blocks = blocks * (1 / largest.clamp(min=1e-38))[:, None]  # rows of zeros stay zeros
    if len(table) > len(NF4):
        return torch.bucketize(blocks, middles, out_int32=True).to(torch.uint8), largest
    # These comparisons take half of the time of torch's binary search.
    return sum((blocks > middle for middle in middles), torch.zeros_like(blocks, dtype=torch.uint8)), largest


class Quantization(nn.Module):
    """What turns codes back into a weight [O, D]: `scale` of int8; `absmax`, `nested_absmax` and `offset` of nf4.

    `dtype` is that of the layer's products. It follows `to`, which leaves the float32 numbers in here as they are.
    `scale` is float32 [O]; `absmax` uint8 [O, D/64], `nested_absmax` float32 [⌈O·D/64/256⌉] and `offset` float32 [].
    """

    scale: Tensor
    absmax: nn.Parameter
    nested_absmax: Tensor
    offset: Tensor

    def __init__(self, kind: str, rows: int, columns: int, dtype: torch.dtype, device: Any = None) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype
        empty = functools.partial(torch.empty, device=device, dtype=torch.float32)
        if kind == "int8":
            self.register_buffer("scale", empty(rows))
        else:
            # It is a parameter and has rows, so that FSDP2 splits it as it splits the codes.
            absmax = empty(rows, columns // BLOCK, dtype=torch.uint8)
            self.absmax = nn.Parameter(absmax, requires_grad=False)
            self.register_buffer("nested_absmax", empty(-(-absmax.numel() // NESTED_BLOCK)))
            self.register_buffer("offset", empty(()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantization:
        """NOTE: casts see the float32 numbers as integers and leave them alone, because codes need all bits."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        def without_cast(tensor: Tensor) -> Tensor:
            return fn(tensor.view(torch.int32)).view(torch.float32) if tensor.dtype == torch.float32 else fn(tensor)

        return super()._apply(without_cast, recurse)

    @torch.no_grad()
    def quantize_(self, codes: Tensor, rows: Iterable[Tensor]) -> None:
        """Fill `codes` and all in here from blocks of rows [r, D] of W in their order, whatever their sizes."""
        found, first = [], 0
        for part in rows:
            blocks = part.to(codes.device, torch.float32)
            target, first = codes[first : first + len(part)], first + len(part)
            if self.kind == "int8":
                largest = blocks.abs().amax(1)
                target.copy_((blocks * (127 / largest.clamp(min=1e-36))[:, None]).round_())
            else:
                nearest, largest = _nearest(blocks.reshape(-1, BLOCK), _tables(codes.device)[0])
                target.copy_((nearest[:, ::2] << 4 | nearest[:, 1::2]).view_as(target))
            found.append(largest)
        largest = torch.cat(found)
        if self.kind == "int8":
            self.scale.copy_(largest)
            return
        self.offset.copy_(largest.mean(dtype=torch.float64))
        groups = F.pad(largest - self.offset, (0, -len(largest) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        nearest, nested = _nearest(groups, _tables(codes.device)[1])
        self.nested_absmax.copy_(nested)
        self.absmax.copy_(nearest.flatten()[: len(largest)].view_as(self.absmax))

    @torch.no_grad()
    def dense(self, codes: Tensor, dtype: torch.dtype, out: Tensor | None = None, impl: str | None = None) -> Tensor:
        """W [O, D] of its codes: computed in float32 and rounded once to `dtype`; into `out`, if it is given."""
        shape = Quantized(codes, self).shape
        if transformed():
            return self._values(codes, self._scales()).to(dtype)
        out = codes.new_empty(shape, dtype=dtype) if out is None else out
        if codes.is_meta or without_numbers():
            return out
        if by_triton(impl, out):
            grid = triton.cdiv(shape[1], BLOCK), triton.cdiv(shape[0], 64)
            dense_kernel[grid](*Quantized(codes, self).operands(), out, *shape, BLOCK_O=64, enable_fp_fusion=False)
            return out
        scales = self._scales()
        # On the CPU the intermediate numbers stay in the cache; on a GPU every step is a launch.
        step = max(1, (2**18 if codes.device.type == "cpu" else 2**24) // max(1, shape[1]))
        for rows in zip(*(tensor.split(step) for tensor in (codes, scales, out)), strict=True):
            self._values(*rows)
        return out

    def _scales(self) -> Tensor:
        """What multiplies the numbers of the codes, in float32: [O, 1], or [O, D / 64] for nf4."""
        if self.kind == "int8":
            return self.scale[:, None]
        nested = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: self.absmax.numel()].view_as(self.absmax)
        return _tables(self.absmax.device)[1][self.absmax.long()] * nested + self.offset

    def _values(self, codes: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows of W from those of the codes and scales, in float32 or into `out`."""
        if self.kind == "int8":
            return torch.mul(codes.float().mul_(scales), 1 / 127, out=out)
        # NOTE: `index_select` takes a third of the time of an index in brackets.
        pairs = _tables(codes.device)[2].index_select(0, codes.flatten().int())
        numbers = pairs.view(torch.float32).view(*scales.shape, BLOCK)
        return torch.mul(numbers, scales[..., None], out=None if out is None else out.view(numbers.shape)).flatten(1)


class Quantized(NamedTuple):
    """The codes of a frozen weight [O, D] and what they leave out, to be multiplied like a weight."""

    codes: Tensor
    quantization: Quantization

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns * (1 if self.quantization.kind == "int8" else 2)

    def operands(self) -> tuple[Tensor | None, ...]:
        """What the Triton kernels read."""
        codes, quantization = self.codes.contiguous(), self.quantization
        if quantization.kind == "int8":
            return codes, quantization.scale, None, None, None, None
        tables = _tables(codes.device)[:2]
        return codes, quantization.absmax, quantization.nested_absmax, quantization.offset, *tables


if triton is not None:

    @triton.jit
    def _weight_tile(codes, scale, nested, offset, nf4, dynamic, row, start, rows, columns):
        """W[row, start … start + 63] in float32. Beyond W the last row or column is repeated; the caller masks it."""
        row = tl.minimum(row, rows - 1).to(tl.int64)
        k = tl.minimum(start + tl.arange(0, 64), columns - 1)
        if nf4 is None:
            codes += row[:, None] * columns + k[None, :]
            tile = tl.load(codes).to(tl.float32) * tl.load(scale + row)[:, None] * (1 / 127)
        else:
            block = row * (columns // 64) + start // 64
            factor = tl.load(dynamic + tl.load(scale + block)) * tl.load(nested + block // 256) + tl.load(offset)
            byte = tl.load(codes + row[:, None] * (columns // 2) + (k // 2)[None, :]).to(tl.int32)
            tile = tl.load(nf4 + ((byte >> (4 - 4 * (k % 2))[None, :]) & 15)) * factor[:, None]
        return tile

    @triton.jit
    def dense_kernel(codes, scale, nested, offset, nf4, dynamic, out, rows, columns, BLOCK_O: tl.constexpr):
        """W, of which each program writes BLOCK_O rows of 64 columns."""
        row = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        start = tl.program_id(0) * 64
        tile = _weight_tile(codes, scale, nested, offset, nf4, dynamic, row, start, rows, columns)
        k = start + tl.arange(0, 64)
        out += row.to(tl.int64)[:, None] * columns + k[None, :]
        tl.store(out, tile.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (k < columns)[None, :])

    # NOTE: `tokens` is not specialized, because Triton makes a constant of a 1, and a constant has no `.to`.
    @triton.jit(do_not_specialize=["tokens"])
    def skinny_kernel(x, w, scale, nested, offset, nf4, dynamic, out, tokens, width, columns, part, stride_column,
                      stride_k, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
                      BLOCK_D: tl.constexpr):  # fmt: skip
        """out [splits, T, C] float32 from x [T, D] and w [C, D] in any strides, or its codes; each sums `part` of D."""
        column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        row = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        split = tl.program_id(2)
        some_row, some_column = (row < tokens)[:, None], (column < columns)[None, :]
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for start in range(split * part, tl.minimum((split + 1) * part, width), BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            some_k = k < width
            x_tile = tl.load(x + row[:, None] * width + k[None, :], mask=some_row & some_k[None, :], other=0.0)
            if scale is None:
                w_at = w + k.to(tl.int64)[:, None] * stride_k + column.to(tl.int64)[None, :] * stride_column
                w_tile = tl.load(w_at, mask=some_k[:, None] & some_column, other=0.0)
            else:  # rounded as `dense` rounds it
                w_tile = _weight_tile(w, scale, nested, offset, nf4, dynamic, column, start, columns, width)
                w_tile = tl.trans(w_tile.to(x_tile.dtype))
            if UPCAST:
                x_tile, w_tile = x_tile.to(tl.float32), w_tile.to(tl.float32)
            total = tl.dot(x_tile, w_tile, total, input_precision="ieee")
        out += (split * tokens.to(tl.int64) + row)[:, None] * columns + column[None, :]
        tl.store(out, total, mask=some_row & some_column)


def _in_parts(x: Tensor, weight: Any, splits: int, block_t: int, block_c: int, num_warps: int = 4) -> Tensor:
    """Sums [splits, T, C] in float32 whose total is x Wᵀ, for W [C, D] or its codes."""
    operands: tuple[Any, ...] = (weight, *[None] * 5) if isinstance(weight, Tensor) else weight.operands()
    (tokens, width), columns = x.shape, weight.shape[0]
    out = x.new_empty(splits, tokens, columns, dtype=torch.float32)
    # The interpreter multiplies the bit patterns of bfloat16.
    upcast = type(skinny_kernel).__name__ == "InterpretedFunction" and x.dtype == torch.bfloat16
    skinny_kernel[(triton.cdiv(columns, block_c), triton.cdiv(tokens, block_t), splits)](
        x.contiguous(), *operands, out, tokens, width, columns, triton.cdiv(triton.cdiv(width, splits), 64) * 64,
        *operands[0].stride(), UPCAST=upcast, BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_D=64, num_warps=num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def product_in_parts(x: Tensor, w: Tensor) -> Tensor:
    """Sums [splits, T, C] in float32 whose total is x wᵀ. In float32 the product is cuBLAS's, which splits as well."""
    if x.dtype == torch.float32 or not x.numel():
        return (x @ w.t()).float()[None]
    block_t, block_c = 64 if len(x) < 8192 else 128, min(128, max(16, triton.next_power_of_2(len(w))))
    # About 256 programs keep an H100's 132 multiprocessors busy, and each should sum 512 numbers at least. A power of
    # two, because the kernels that follow are compiled for it.
    splits = triton.next_power_of_2(max(1, min(256 // triton.cdiv(len(x), block_t), x.shape[1] // 512, 16)))
    return _in_parts(x, w, splits, block_t, block_c, block_t // 16)


def few_rows(x: Tensor, weight: Tensor | Quantized, impl: str) -> Tensor | None:
    """x Wᵀ [T, O] in float32, by Triton from the codes; None for a plain weight, more rows, or another `impl`."""
    if isinstance(weight, Tensor) or impl != "triton" or not 0 < len(x) <= FEW:
        return None
    block = 32 if x.element_size() == 2 else 16  # in float32 more would not fit into the registers
    # About 1,024 programs, so that the whole device reads at once, and each sums 512 numbers of a row at least.
    splits = max(1, min(1024 // triton.cdiv(weight.shape[0], block), x.shape[1] // 512, 16))
    return _in_parts(x, weight, splits, FEW, block).sum(0)


@contextmanager
def multiplicand(weight: Tensor | Quantized, dtype: torch.dtype, impl: str) -> Iterator[Tensor]:
    """W [O, D] in `dtype`, to be used only within the context: the next product overwrites it.

    NOTE: a CUDA graph keeps addresses, so while one is recorded W has memory of its own.
    """
    if isinstance(weight, Tensor):
        yield weight.to(dtype)
        return
    (codes, quantization), (rows, columns) = weight, weight.shape
    on_gpu, scratch = codes.is_cuda and not without_numbers(), _scratch
    if codes.is_meta or (on_gpu and torch.cuda.is_current_stream_capturing()):
        yield quantization.dense(codes, dtype, impl=impl)
        return
    if without_numbers():  # A plan has tensors of its own, which no later one may meet.
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        scratch = vars(mode).setdefault("scratch", {})
    key = codes.device, dtype, torch.cuda.current_stream(codes.device).cuda_stream if on_gpu else 0
    if (memory := scratch.pop(key, None)) is None or memory.numel() < rows * columns:
        del memory
        with torch.inference_mode(False):
            memory = codes.new_empty(rows * columns, dtype=dtype)
    yield quantization.dense(codes, dtype, memory[: rows * columns].view(rows, columns), impl)
    scratch[key] = memory


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantized, bias: Tensor | None, impl: str) -> Tensor:
        ctx.weight, ctx.impl = weight, impl
        if (y := few_rows(x, weight, impl)) is not None:
            return (y if bias is None else y.add_(bias)).to(x.dtype)
        with multiplicand(weight, x.dtype, impl) as dense:
            return linear(x, dense, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("QuantizedLinear")
        of_x, _, of_bias, _ = ctx.needs_input_grad
        dx = None
        if of_x:
            with multiplicand(ctx.weight, dy.dtype, ctx.impl) as dense:
                dx = linear(dy, dense.t())
        return dx, None, dy.sum(0) if of_bias else None, None


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ (+ b) over codes of W, which are frozen: `weight` is int8 [O, D], or for nf4 uint8 [O, D / 2].

    It takes the place of `base`, whose bias it takes over; the codes are empty. Differentiable once, in x and b.
    Products are made in the dtype of x, or in autocast's. Raises ValueError for nf4 if D is no multiple of 64.
    """

    impl: str | None = None  # "torch", "triton", or None for what suits the device

    def __init__(self, base: nn.Linear, kind: str) -> None:
        rows, columns = base.weight.shape
        if kind == "nf4" and columns % BLOCK:
            raise ValueError(f"nf4 needs in_features that {BLOCK} divides, found {columns}; take int8")
        super().__init__(columns, rows, bias=False, device="meta")
        width, stored = (columns, torch.int8) if kind == "int8" else (columns // 2, torch.uint8)
        self.weight = nn.Parameter(base.weight.new_empty(rows, width, dtype=stored), requires_grad=False)
        self.bias = base.bias
        self.quantization = Quantization(kind, rows, columns, base.weight.dtype, base.weight.device)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x, x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if transformed():
            return F.linear(x.to(dtype), self.quantization.dense(self.weight, dtype), bias)
        impl = "triton" if by_triton(self.impl, x) else "torch"
        weight = Quantized(self.weight, self.quantization)
        y = _QuantizedLinear.apply(x.to(dtype).reshape(-1, x.shape[-1]), weight, bias, impl)
        return y.view(*x.shape[:-1], self.out_features)


def parameter_count(model: nn.Module) -> int:
    """How many weights a model has; codes of 4 bits count as two a byte, and what scales them does not count."""
    found = [(name, p.numel() * (2 if p.dtype == torch.uint8 else 1)) for name, p in model.named_parameters()]
    return sum(count for name, count in found if not name.endswith("quantization.absmax"))
