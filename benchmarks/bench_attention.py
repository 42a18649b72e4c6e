"""Causal attention on the CPU beside torch's fused kernel with the mask that it needs, forward and backward.

    python benchmarks/bench_attention.py

Packed documents go one after another; a row of one document is torch's kernel on both sides. Errors are relative to
float64, the worst of output and gradients, and come before any timing. The two alternate; figures are medians over
rounds. The layout and the mask are made once, as for all layers of a model.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels import Layout, attention, naive

# rows, heads, key-value heads, tokens, head_dim, documents in a row
CASES = [
    (4, 8, 8, 512, 64, 1),
    (4, 8, 8, 512, 64, 4),
    (4, 8, 8, 512, 64, 24),
    (1, 8, 2, 2048, 64, 4),
    (1, 32, 32, 1024, 128, 4),
]
ROUNDS = 9


def main() -> None:
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print("dtype     rows, heads, kv, tokens, size, docs    error: torch   pedgpt  ms: torch   pedgpt  ratio")
    for dtype in (torch.bfloat16, torch.float32):
        for case in CASES:
            compare(dtype, case)


def compare(dtype: torch.dtype, case: tuple[int, ...]) -> None:
    rows, heads, groups, tokens, size, documents = case
    torch.manual_seed(0)
    tensors = [torch.randn(rows, tokens, n, size).transpose(1, 2).to(dtype) for n in (heads, groups, groups)]
    dout = torch.randn(rows, tokens, heads, size).transpose(1, 2).to(dtype)
    positions = torch.arange(tokens).expand(rows, -1)
    ids = None if documents == 1 else positions * documents // tokens
    layout = Layout(positions, documents=ids)
    mask = None if layout.plain else layout.mask(dtype)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, layout)

    exact = results(lambda *x: naive.attention(*x, layout), [x.double() for x in tensors], dout)
    errors = []
    for form in (torchs, ours):
        pairs = zip(results(form, tensors, dout), exact, strict=True)
        errors.append(max(float((a.double() - b).norm() / b.norm()) for a, b in pairs))
        if not errors[-1] < 1e-2:
            raise SystemExit(f"{case}: an error of {errors[-1]:.1e}")
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):  # the first round warms up
        for form, took in zip((torchs, ours), seconds, strict=True):
            began = time.perf_counter()
            results(form, tensors, dout)
            took.append(time.perf_counter() - began)
    theirs, mine = (1e3 * statistics.median(took[1:]) for took in seconds)
    figures = f"{errors[0]:>13.1e}{errors[1]:>9.1e}{theirs:>11.1f}{mine:>9.1f}{theirs / mine:>6.2f}x"
    print(f"{str(dtype)[6:]:10}{case!s:38}{figures}", flush=True)


def results(function, tensors: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


if __name__ == "__main__":
    main()
