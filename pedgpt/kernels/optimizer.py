"""AdamW whose weights and moments may be bfloat16: it computes in float32 and rounds what it stores stochastically.

A step of training often changes a weight by less than half of the distance to the next number of bfloat16: rounding to
the nearest number loses it. Stochastic rounding goes up with the probability of the part that is cut off, so that its
expectation is the number itself (Zamirai et al. 2020): add 16 random bits below the 16 that stay, and cut.

The random bits are a function of a key and of the number's place in the whole tensor, however it is split over ranks.
The torch and the Triton form give the same bits, so they use only operations that IEEE 754 rounds correctly: sums,
products, quotients and roots, none of them fused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pedgpt.kernels import hashing
from pedgpt.kernels._dispatch import by_triton, tl, triton, without_numbers
from pedgpt.kernels.hashing import hash_bits, shift_right, signed

# Numbers of a tensor that share a key. The torch form takes as many at a time: they stay in the cache, and torch starts
# no threads for so few, which would wait for each other after every operation.
PART = 2**15
LARGEST = torch.finfo(torch.bfloat16).max  # Beyond it there is only infinity, so what lies there is cut, not rounded.


def _random(offsets: Tensor, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three numbers of 16 random bits, in int32, for each offset in one part: a 32-bit hash (Wellons 2018) of it."""
    low, high = (signed(bits << 32) >> 32 for bits in (key, key >> 32))
    x = (offsets * high).add_(low)
    x = x.bitwise_xor_(shift_right(x, 16, 32)).mul_(0x7FEB352D)
    x = x.bitwise_xor_(shift_right(x, 15, 32)).mul_(0x846CA68B - 2**32)
    first = shift_right(x, 16, 32)
    x ^= first
    return first, x & 0xFFFF, shift_right(x.mul_(0x9E3779B1 - 2**32), 16, 32)


def _store(target: Tensor, value: Tensor, random: Tensor) -> None:
    """Write float32 numbers, which this overwrites, into `target`; if that is bfloat16, round them stochastically."""
    if target.dtype == torch.bfloat16:
        if not torch.linalg.vector_norm(value) < LARGEST:  # Rare: rounding such a number up would give infinity.
            random = random * (value.abs() <= LARGEST)
        value.view(torch.int32).add_(random).bitwise_and_(-(2**16))
    target.copy_(value)


def _adamw(tensors: tuple[Tensor, ...], key: int, first: int, scalars: tuple[float, ...]) -> None:
    """The torch form, part by part, in 2 MB of memory."""
    decay, beta1, rest1, beta2, rest2, rate, correction, eps = scalars
    offsets = torch.arange(PART, dtype=torch.int32, device=tensors[0].device)
    last = first + len(tensors[0])
    for part in range(first // PART, -(-last // PART)):
        begin, end = max(first, part * PART), min(last, (part + 1) * PART)
        stored = [tensor[begin - first : end - first] for tensor in tensors]
        g, w, m, v = (torch.empty(end - begin, device=x.device).copy_(x) for x in stored)
        m.mul_(beta1).add_(g * rest1)
        v.mul_(beta2).add_(g.mul_(g).mul_(rest2))
        scale = torch.rsqrt(v, out=g).reciprocal_().mul_(correction).add_(eps)
        w.mul_(decay).addcdiv_(m, scale, value=-rate)  # -rate · m is rounded before it is divided
        random = _random(offsets[begin - part * PART : end - part * PART], hash_bits(signed(key + part)))
        for target, value, bits in zip(stored[1:], (w, m, v), random, strict=True):
            _store(target, value, bits)


if triton is not None:

    @triton.jit
    def _load(at, mask):
        value = tl.load(at, mask=mask, other=0.0)
        if at.dtype.element_ty == tl.bfloat16:
            # NOTE: by its bits, because Triton's interpreter takes numbers below the smallest normal one for 0.
            value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        return value

    @triton.jit
    def _store_triton(at, value, random, mask, LARGEST: tl.constexpr):
        if at.dtype.element_ty == tl.bfloat16:
            bits = value.to(tl.uint32, bitcast=True) + tl.where(tl.abs(value) <= LARGEST, random, 0)
            value = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        tl.store(at, value, mask=mask)

    @triton.jit(do_not_specialize=["key"])
    def adamw_kernel(grad, weight, exp_avg, exp_avg_sq, key, first, size, decay, beta1, rest1, beta2, rest2, rate,
                     correction, eps, PART: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """BLOCK numbers, which lie in one part of the whole tensor; `first` is the place there of this rank's first."""
        start = (tl.program_id(0).to(tl.int64) + first // BLOCK) * BLOCK
        at = start - first + tl.arange(0, BLOCK)
        mask = (at >= 0) & (at < size)
        key = hashing.hash_bits_triton(key + start // PART)
        x = (start % PART + tl.arange(0, BLOCK)).to(tl.uint32) * (key >> 32).to(tl.uint32) + key.to(tl.uint32)
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x ^= x >> 16
        g = _load(grad + at, mask)
        w = _load(weight + at, mask)
        m = _load(exp_avg + at, mask) * beta1 + g * rest1
        v = _load(exp_avg_sq + at, mask) * beta2 + g * g * rest2
        w = w * decay - tl.div_rn(m * rate, tl.div_rn(1.0, tl.div_rn(1.0, tl.sqrt_rn(v))) * correction + eps)
        _store_triton(weight + at, w, x >> 16, mask, LARGEST)
        _store_triton(exp_avg + at, m, x & 0xFFFF, mask, LARGEST)
        _store_triton(exp_avg_sq + at, v, (x * 0x9E3779B1) >> 16, mask, LARGEST)


def adamw_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, key: int, first: int = 0, impl: str | None = None,
) -> None:  # fmt: skip
    """One step of AdamW (Loshchilov & Hutter 2019) in place, with bias correction and decoupled weight decay.

        m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,  w ← (1 − lr λ) w − lr m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)

    The tensors have one shape and are contiguous, each in float32 or bfloat16; those in bfloat16 are rounded
    stochastically. `step` t counts from 1. `key`, any int, must differ between steps and tensors. The tensors may be a
    rank's part of larger ones: `first` is the place there of their first number.
    """
    if not weight.numel() or without_numbers():
        return
    (beta1, beta2), size, key = betas, weight.numel(), hash_bits(signed(key))
    correction = (1 - beta2**step) ** -0.5
    scalars = 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), correction, eps
    tensors = grad.reshape(-1), *(tensor.detach().view(-1) for tensor in (weight, exp_avg, exp_avg_sq))
    if not by_triton(impl, weight):
        return _adamw(tensors, key, first, scalars)
    grid, settings = (triton.cdiv(first % 1024 + size, 1024),), {"PART": PART, "LARGEST": LARGEST, "BLOCK": 1024}
    adamw_kernel[grid](*tensors, key, first, size, *scalars, **settings, enable_fp_fusion=False)
