"""Every operator of pedgpt on the CPU beside torch's own form of it, in one run: nothing may be slower.

    python benchmarks/bench_operators.py            # under 6 minutes on two cores
    python benchmarks/bench_operators.py --quick    # one minute, coarser
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/bench_operators.py

First the results and gradients of both forms are compared, then the two take turns. A row shows the median time of
each, the ratio torch / ours, and the quartiles of the rounds' ratios. The ratio is of the medians or of the fastest
rounds, whichever is higher, because other processes only make a round longer. A row under 0.97 is measured once more,
for three times as long; the command ends with 1 if one stays there. Which form the probe chose on this processor is
printed first: where that is torch's, a ratio is about 1. Operators that compute again in the backward pass what they do
not keep are judged by both passes together, beside torch's form that keeps it.

Sizes are (tokens, hidden, intermediate, vocabulary). "forward" and "decoding" are without gradients, all else is a
forward and a backward pass. Decoding goes through weights of 32 MiB, as a model's come from memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels import attention, linear, linear_nll, lora_linear, rms_norm, rotary, swiglu
from pedgpt.kernels.attention import Layout
from pedgpt.kernels.cpu import products
from pedgpt.kernels.cpu.products import PackedWeights

SIZES = {"small": (256, 256, 704, 2000), "medium": (512, 512, 1408, 8000), "large": (1024, 2048, 5504, 16000)}
HEADS, EXPERTS, RANK, LIMIT = 8, 3, 16, 0.97
HALF = torch.bfloat16
Form = Callable[[], list[Tensor]]


@dataclass
class Case:
    """Two forms that give the same tensors, up to a relative error."""

    name: str
    size: str
    ours: Form
    torchs: Form
    error: float = 1e-5


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype)


def both_ways(function: Callable[..., Tensor], *leaves: Tensor, dy: Tensor) -> Form:
    """The result of `function` and the gradients of all leaves."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)

    def form() -> list[Tensor]:
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    return form


def without_gradients(function: Callable[[], Tensor]) -> Form:
    def form() -> list[Tensor]:
        with torch.no_grad():
            return [function()]

    return form


def linear_cases(size: str, tokens: int, hidden: int, wide: int) -> Iterator[Case]:
    x, dy, weight = random(tokens, hidden), random(tokens, wide), random(wide, hidden, scale=hidden**-0.5)
    forms = {"pedgpt": linear, "torch": F.linear}
    yield Case("linear forward", size, *(without_gradients(lambda f=f: f(x, weight)) for f in forms.values()))
    leaves = (x, weight)
    yield Case("linear", size, *(both_ways(f, *leaves, dy=dy) for f in forms.values()))
    frozen = (both_ways(lambda x, f=f: f(x, weight), x, dy=dy) for f in forms.values())
    yield Case("linear, frozen weight", size, *frozen)
    # As in a model, whose weights no cache holds.
    weights = [weight.clone() for _ in range(2**23 // weight.numel() + 1)]
    for rows in (1, 8):
        few, packed = x[:rows].contiguous(), PackedWeights(weights, rows)

        def each(form: Callable[..., Tensor], few: Tensor = few) -> Tensor:
            return torch.stack([form(few, weight) for weight in weights])

        ours, plain = (without_gradients(lambda f=f, each=each: each(f)) for f in forms.values())
        with packed:  # as generation does for all products of a step
            yield Case(f"decoding, {rows} rows", size, ours, plain)


def pointwise_cases(size: str, tokens: int, hidden: int, wide: int, dtype: torch.dtype) -> Iterator[Case]:
    x, dy, weight = (random(*shape, dtype=dtype) for shape in ((tokens, hidden), (tokens, hidden), (hidden,)))
    gate, up, dout = (random(tokens, wide, dtype=dtype) for _ in range(3))
    error, bits = (1e-5, "") if dtype == torch.float32 else (1e-2, " bf16")

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        if dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], weight, 1e-6)
        wide = x.float()  # transformers rounds before the weight, as `rms_norm` does, and torch's operator after it
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, 1e-6)

    yield Case(f"rms_norm{bits}", size, *(both_ways(f, x, weight, dy=dy) for f in (ours, norm)), error)
    forms = (without_gradients(lambda f=f: f(x, weight)) for f in (ours, norm))
    yield Case(f"rms_norm{bits} forward", size, *forms, error)
    forms = (both_ways(f, gate, up, dy=dout) for f in (swiglu, lambda gate, up: F.silu(gate) * up))
    yield Case(f"swiglu{bits}", size, *forms, error)


def rotary_cases(size: str, tokens: int, hidden: int, dtype: torch.dtype) -> Iterator[Case]:
    q, k, dy, angle = (random(1, tokens, HEADS, hidden // HEADS) for _ in range(4))
    q, k, dy = (x.to(dtype) for x in (q, k, dy))
    half = angle[:, :, 0, : hidden // HEADS // 2]
    cos, sin = (table(torch.cat((half, half), -1)).to(dtype) for table in (torch.cos, torch.sin))
    tables = cos[:, None], sin[:, None]

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return torch.stack(rotary(q, k, *tables))

    def torchs(q: Tensor, k: Tensor) -> Tensor:
        """As transformers writes it."""
        c, s = cos.unsqueeze(2), sin.unsqueeze(2)
        turned = [torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) for x in (q, k)]
        return torch.stack([x * c + y * s for x, y in zip((q, k), turned, strict=True)])

    error, bits = (1e-5, "") if dtype == torch.float32 else (1e-2, " bf16")
    forms = (both_ways(f, q, k, dy=torch.stack((dy, dy))) for f in (ours, torchs))
    yield Case(f"rotary{bits}", size, *forms, error)
    forms = (without_gradients(lambda f=f: f(q, k)) for f in (ours, torchs))
    yield Case(f"rotary{bits} forward", size, *forms, error)


def attention_cases(size: str, tokens: int, hidden: int, dtype: torch.dtype) -> Iterator[Case]:
    q, k, v, dy = (random(1, HEADS, tokens, hidden // HEADS, dtype=dtype) for _ in range(4))
    error, bits = (1e-5, "") if dtype == torch.float32 else (2e-2, " bf16")
    forms = (attention, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    yield Case(f"attention{bits}", size, *(both_ways(f, q, k, v, dy=dy) for f in forms), error)
    documents = (torch.arange(tokens) * 4 // tokens)[None]
    positions = torch.arange(tokens)[None] % (tokens // 4)
    seen = (documents[:, :, None] == documents[:, None]).tril()[:, None]
    layout = Layout(positions, documents=documents)  # and `seen`: made once for all layers of a model

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, layout)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    forms = (both_ways(f, q, k, v, dy=dy) for f in (packed, masked))
    yield Case(f"attention{bits}, 4 documents", size, *forms, error)


def head_cases(size: str, tokens: int, hidden: int, vocabulary: int) -> Iterator[Case]:
    states, head, one = random(tokens, hidden), random(vocabulary, hidden, scale=hidden**-0.5), torch.ones(())
    every = torch.randint(vocabulary, (tokens,))

    def chunked(states: Tensor, head: Tensor = head) -> Tensor:
        return linear_nll(states, head, every, tokens).logps

    def whole(states: Tensor, head: Tensor = head) -> Tensor:
        """With the entropy and the accuracy, which `linear_nll` gives too."""
        logits = F.linear(states, head)
        loss = F.cross_entropy(logits, every)
        with torch.no_grad():
            logps = logits.log_softmax(-1)
            -(logps.exp() * logps).sum(-1).mean(), (logits.argmax(-1) == every).float().mean()
        return loss

    yield Case("linear_nll, frozen head", size, *(both_ways(f, states, dy=one) for f in (chunked, whole)))
    yield Case("linear_nll, head that trains", size, *(both_ways(f, states, head, dy=one) for f in (chunked, whole)))


def adapter_cases(size: str, tokens: int, hidden: int, wide: int) -> Iterator[Case]:
    columns = (EXPERTS + 1) * RANK
    x, dy, weight = random(tokens, hidden), random(tokens, wide), random(wide, hidden, scale=hidden**-0.5)
    A, B = random(columns, hidden, scale=hidden**-0.5), random(wide, columns)
    router, spread = random(EXPERTS, hidden, scale=hidden**-0.5), random(EXPERTS, hidden, scale=hidden**-0.5)
    noise = random(tokens, EXPERTS)

    def ours(x: Tensor, A: Tensor, B: Tensor, router: Tensor | None = None, spread: Tensor | None = None) -> Tensor:
        drawn = None if router is None else noise
        return lora_linear(x, weight, None, A, B, scaling=2.0, router=router, router_noise=spread, noise=drawn)[0]

    def lora(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(x, weight) + 2.0 * F.linear(F.linear(x, A), B)

    def experts(x: Tensor, A: Tensor, B: Tensor, router: Tensor, spread: Tensor) -> Tensor:
        gates = (F.linear(x, router) + noise * F.softplus(F.linear(x, spread))).softmax(-1)
        weights = F.pad(gates, (1, 0), value=1.0).repeat_interleave(RANK, -1)
        return F.linear(x, weight) + 2.0 * F.linear(F.linear(x, A) * weights, B)

    yield Case("lora_linear, LoRA", size, *(both_ways(f, x, A, B, dy=dy) for f in (ours, lora)))
    leaves = (x, A, B, router, spread)
    yield Case("lora_linear, experts", size, *(both_ways(f, *leaves, dy=dy) for f in (ours, experts)))


def cases(size: str) -> Iterator[Case]:
    torch.manual_seed(0)
    tokens, hidden, wide, vocabulary = SIZES[size]
    yield from linear_cases(size, tokens, hidden, wide)
    for dtype in (torch.float32, HALF):
        yield from pointwise_cases(size, tokens, hidden, wide, dtype)
        yield from rotary_cases(size, tokens, hidden, dtype)
        yield from attention_cases(size, tokens, hidden, dtype)
    yield from head_cases(size, tokens, hidden, vocabulary)
    yield from adapter_cases(size, tokens, hidden, wide)


def check(case: Case) -> None:
    for ours, torchs in zip(case.ours(), case.torchs(), strict=True):
        error = float((ours.double() - torchs.double()).norm() / torchs.double().norm())
        if not error <= case.error:
            raise SystemExit(f"{case.name}, {case.size}: the forms differ by {error:.1e}, allowed is {case.error:.0e}")


def measure(case: Case, seconds: float) -> tuple[float, float, float, float, float]:
    """Median seconds of ours and of torch's, the ratio, and the quartiles of the rounds' ratios."""
    found: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    case.torchs()
    repeats = max(1, int(0.005 / (time.perf_counter() - began)))  # within a round
    until = time.perf_counter() + seconds
    while len(found[0]) < 5 or (time.perf_counter() < until and len(found[0]) < 100):
        for form, times in zip((case.ours, case.torchs), found, strict=True):
            began = time.perf_counter()
            for _ in range(repeats):
                form()
            times.append((time.perf_counter() - began) / repeats)
    ours, torchs = (statistics.median(times) for times in found)
    ratios = statistics.quantiles((b / a for a, b in zip(*found, strict=True)), n=4)
    return ours, torchs, max(torchs / ours, min(found[1]) / min(found[0])), ratios[0], ratios[2]


def processor() -> str:
    """The name of the processor and what it and torch can do."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in lines.items()}
    flags = " ".join(flag for flag in found.get("flags", "").split() if flag.startswith(("avx", "amx")))
    return f"{found.get('model name', 'unknown')} ({flags})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, without the large sizes' precision")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    chosen = products.settle()
    took = time.perf_counter() - began
    print(f"{processor()}\ntorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, ", end="")
    print(f"{arguments.threads} threads; the probe took {took:.1f} s and chose")
    for name, ours in chosen.items():
        print(f"  {name:28}{'oneDNN' if ours else 'torch'}")
    print(f"\n{'':32}{'size':8}{'ours ms':>10}{'torch ms':>10}{'ratio':>8}   quartiles", flush=True)
    slow, seconds = [], 0.25 if arguments.quick else 2.0
    for size in arguments.sizes:
        for case in cases(size):
            if arguments.only not in case.name:
                continue
            check(case)
            row, again = measure(case, seconds), ""
            if row[2] < LIMIT:
                row, again = measure(case, 3 * seconds), "  measured again"
            ours, torchs, ratio, low, high = row
            if ratio < LIMIT:
                slow.append(f"{case.name}, {case.size}: {ratio:.2f}")
                again = "  SLOWER"
            print(
                f"{case.name:32}{case.size:8}{1e3 * ours:>10.3f}{1e3 * torchs:>10.3f}{ratio:>7.2f}x"
                f"   {low:.2f} to {high:.2f}{again}",
                flush=True,
            )
    print(f"\n{time.perf_counter() - began:.0f} s; ", end="")
    if slow:
        raise SystemExit("slower than torch: " + "; ".join(slow))
    print(f"nothing is slower than {LIMIT} of torch's speed")


if __name__ == "__main__":
    main()
