"""Random bits that are a function of a counter: SplitMix64 (Steele et al. 2014), in Python, torch and Triton.

Whoever asks for the bits of one place gets the same ones, however the places are spread over ranks and batches.
"""

from __future__ import annotations

from typing import Any

from pedgpt.kernels._dispatch import tl, triton


def hash_bits(x: Any) -> Any:
    """64 bits of an int, as an int64, or of each number of an int64 tensor, whose products wrap modulo 2^64."""
    wrapped = signed if isinstance(x, int) else lambda x: x
    x = wrapped(x + signed(0x9E3779B97F4A7C15))
    x = wrapped((x ^ shift_right(x, 30)) * signed(0xBF58476D1CE4E5B9))
    x = wrapped((x ^ shift_right(x, 27)) * signed(0x94D049BB133111EB))
    return x ^ shift_right(x, 31)


def shift_right(x: Any, bits: int, width: int = 64) -> Any:
    """x >> bits on the 64 bits, or so many, as they stand; torch's own shift repeats the sign."""
    return (x >> bits) & ((1 << (width - bits)) - 1)


def signed(x: int) -> int:
    """The int64 with the low 64 bits of x."""
    return (x + 2**63) % 2**64 - 2**63


if triton is not None:

    @triton.jit
    def hash_bits_triton(x):
        """`hash_bits`, as uint64, of numbers in int64 or uint64."""
        x = x.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        return x ^ (x >> 31)
