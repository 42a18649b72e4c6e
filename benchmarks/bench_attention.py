"""Causal attention in bfloat16 on the CPU beside torch's fused kernel, forward and backward, in one run.

    python benchmarks/bench_attention.py

Errors are relative to float64, the worst of output and gradients, and come before any timing. The two alternate;
figures are medians over rounds.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels import attention

# rows, heads, key-value heads, tokens, head_dim, documents in a row
CASES = [(4, 8, 8, 512, 64, 1), (4, 8, 8, 512, 64, 4), (1, 8, 2, 2048, 64, 4), (1, 32, 32, 1024, 128, 4)]
ROUNDS = 9


def torchs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def results(function, tensors: list[Tensor], mask: Tensor | None, dout: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def main() -> None:
    print("rows, heads, kv, tokens, size, docs    error: torch   pedgpt  ms: torch   pedgpt  ratio")
    for case in CASES:
        rows, heads, groups, tokens, size, documents = case
        torch.manual_seed(0)
        q, k, v, dout = (
            torch.randn(rows, tokens, n, size).transpose(1, 2).bfloat16() for n in (heads, groups, groups, heads)
        )
        document = torch.arange(tokens) * documents // tokens
        same = document[:, None] == document
        mask = None if documents == 1 else (same & torch.ones_like(same).tril()).expand(rows, 1, tokens, tokens)
        exact = results(torchs, [t.double() for t in (q, k, v)], mask, dout)
        errors = []
        for form in (torchs, attention):
            found = results(form, [q, k, v], mask, dout)
            pairs = zip(found, exact, strict=True)
            errors.append(max(float((a.double() - b).norm() / b.norm()) for a, b in pairs))
            if not errors[-1] < 1e-2:
                raise SystemExit(f"{case}: an error of {errors[-1]:.1e}")
        seconds: list[list[float]] = [[], []]
        for _ in range(ROUNDS + 1):  # the first round warms up
            for form, took in zip((torchs, attention), seconds, strict=True):
                began = time.perf_counter()
                results(form, [q, k, v], mask, dout)
                took.append(time.perf_counter() - began)
        theirs, ours = (1e3 * statistics.median(took[1:]) for took in seconds)
        figures = f"{errors[0]:>13.1e}{errors[1]:>9.1e}{theirs:>11.1f}{ours:>9.1f}{theirs / ours:>6.2f}x"
        print(f"{case!s:38}{figures}", flush=True)


if __name__ == "__main__":
    main()
