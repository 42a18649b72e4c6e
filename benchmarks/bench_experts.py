"""The expert layer beside its frozen base and the other ways to compute it, in one run.

    python benchmarks/bench_experts.py                    # both dtypes, all shapes and ranks: 12 minutes on two cores
    python benchmarks/bench_experts.py --ranks 16 --csv experts.csv
    python benchmarks/bench_experts.py --device cuda      # 8,192 tokens in bfloat16, under 8 minutes
    python benchmarks/bench_experts.py --variants --ranks 16 --dtypes float32    # variants beside the default layer

Forms: `base` is the frozen nn.Linear alone and what all times are multiples of; `published` PediatricsGPT's layer,
written here from its definition (every expert's output is materialised, noise in every forward, softmax in float16);
`loop` one expert after another; `PEFT LoRA` ungated, of the same total rank; `torch` and `triton` are pedgpt's two
forms (Triton on CUDA only). `base, oneDNN` is the base as pedgpt's own models compute it in float32 on the CPU. All but
PEFT LoRA are first compared with float64 on 64 tokens, output and every gradient.

Four experts (one universal) of rank r, training noise on, weights of the base frozen, x with gradient. In bfloat16 the
peers' adapters are bfloat16, their fastest setting; pedgpt's are float32. Rounds alternate between the forms; a figure
is the median over rounds of the ratio to the base of the same round. The floor is 1 + 1.5·E·r·(1/in + 1/out),
the arithmetic that the experts add at least. Memory is the peak of tensors in forward and backward beside x, dy and the
parameters; `kept` what stays for the backward pass beside x and the parameters, in bytes a token.

`--variants` compares layers of four experts each with the default one, after each was compared with a loop in float64;
its ratios are to the default of the same round (median), and between the fastest of all rounds.
"""

import argparse
import copy
import csv
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from profiled_memory import kept_bytes, peak_bytes
from torch import Tensor, nn

from pedgpt.adapters import ExpertLoRALinear, balance_loss, record_gates
from pedgpt.kernels import linear, lora_linear

SHAPES = [(5120, 5120), (5120, 13696), (13696, 5120)]
EXPERTS, SCALING = 4, 2.0
COLUMNS = (
    "device", "dtype", "in", "out", "rank", "form", "forward_ms", "backward_ms", "both_ms", "forward", "backward",
    "both", "over_floor", "peak_mib", "kept_bytes_a_token",
)  # fmt: skip


@dataclass
class Weights:
    """W [out, in], A [E, r, in], B [E, out, r], W_g and W_n [E-1, in]."""

    W: Tensor
    A: Tensor
    B: Tensor
    Wg: Tensor
    Wn: Tensor

    def to(self, dtype: torch.dtype) -> "Weights":
        return Weights(*(t.detach().to(dtype).requires_grad_(i > 0) for i, t in enumerate(vars(self).values())))

    def packed(self) -> list[Tensor]:
        """lora_A, lora_B, router, router_noise in float32, as pedgpt's layers hold them."""
        A, B = self.A.flatten(0, 1), self.B.transpose(0, 1).flatten(1)
        return [t.detach().float().contiguous().requires_grad_() for t in (A, B, self.Wg, self.Wn)]


def published(x: Tensor, w: Weights, noise: Tensor) -> Tensor:
    """[1, T, in] → [1, T, out] by the published layer's own steps."""
    y = F.linear(x, w.W)
    routes = F.linear(x, w.Wg) + noise.to(x.dtype) * F.softplus(F.linear(x, w.Wn))
    gates = F.softmax(routes, dim=-1, dtype=torch.float16).to(y.dtype)
    hidden = torch.einsum("bnd,erd->bner", x, w.A)
    every = torch.einsum("bner,eor->bneo", hidden, w.B) * SCALING
    every = every.clone()
    weighted = torch.cat((every[:, :, :1], every[:, :, 1:] * gates.unsqueeze(-1)), dim=2)
    y += weighted.sum(dim=2)
    return y


def loop(x: Tensor, w: Weights, noise: Tensor) -> Tensor:
    """One expert after another, nothing fused; in float64 it is the truth."""
    scores = F.linear(x, w.Wg) + noise.to(x.dtype) * F.softplus(F.linear(x, w.Wn))
    gates = scores.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).to(x.dtype)
    y = F.linear(x, w.W) + SCALING * F.linear(F.linear(x, w.A[0]), w.B[0])
    for j in range(1, EXPERTS):
        y = y + SCALING * gates[..., j - 1 : j] * F.linear(F.linear(x, w.A[j]), w.B[j])
    return y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=0, help="1,024 on the CPU, 8,192 on CUDA")
    parser.add_argument("--dtypes", nargs="+", default=[], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--shapes", nargs="+", type=int, default=[0, 1, 2], help="indices of " + repr(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", default="")
    parser.add_argument("--variants", action="store_true")
    arguments = parser.parse_args()
    on_cuda = arguments.device == "cuda"
    tokens = arguments.tokens or (8192 if on_cuda else 1024)
    rows: list[dict[str, object]] = []
    for dtype in arguments.dtypes or (["bfloat16"] if on_cuda else ["bfloat16", "float32"]):
        for size_in, size_out in (SHAPES[i] for i in arguments.shapes):
            for rank in arguments.ranks:
                form = compare_variants if arguments.variants else compare
                rows += form(arguments, getattr(torch, dtype), tokens, size_in, size_out, rank)
    if arguments.csv:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def compare(arguments, dtype: torch.dtype, tokens: int, size_in: int, size_out: int, rank: int) -> list[dict]:
    device = arguments.device
    torch.manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=device)).to(dtype)

    weights = Weights(
        random(size_out, size_in, scale=size_in**-0.5), random(EXPERTS, rank, size_in, scale=size_in**-0.5),
        random(EXPERTS, size_out, rank, scale=0.1), random(EXPERTS - 1, size_in, scale=size_in**-0.5),
        random(EXPERTS - 1, size_in, scale=size_in**-0.5),
    )  # fmt: skip
    x, dy = random(1, tokens, size_in).requires_grad_(), random(1, tokens, size_out)
    check(weights, x[:, :64], dy[:, :64], rank)

    def epsilon(x: Tensor) -> Tensor:
        return torch.randn(*x.shape[:-1], EXPERTS - 1, device=x.device)

    plain, own = weights.to(dtype), weights.packed()
    peft = peft_layer(weights, rank)
    forms: dict[str, Callable[[Tensor], Tensor]] = {"base": lambda x: F.linear(x, plain.W)}
    if device == "cpu" and dtype == torch.float32:
        forms["base, oneDNN"] = lambda x: linear(x, plain.W)
    forms |= {
        "published": lambda x: published(x, plain, epsilon(x)),
        "loop": lambda x: loop(x, plain, epsilon(x)),
        "PEFT LoRA": peft,
    }
    for impl in ["torch"] + ["triton"] * (device == "cuda"):
        forms[impl] = lambda x, impl=impl: ours(x, plain.W, own, epsilon(x), impl)

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(arguments.rounds + 1):  # the first round warms up
        for name, form in forms.items():
            seconds[name].append(timed(form, x, dy, repeats=10 if device == "cuda" else 1))
    own_tensors = [x, dy, *vars(plain).values(), *own, *peft.parameters()]
    rows = []
    print(f"\n{device}, {dtype_name(dtype)}, {tokens:,} tokens, {size_in} -> {size_out}, 4 experts of rank {rank}")
    heads = {"forward": 9, "backward": 10, "both": 7, "over floor": 12, "ms": 9, "peak MiB": 10, "kept B/token": 14}
    print(" " * 16 + "".join(f"{head:>{width}}" for head, width in heads.items()))
    floor = 1 + 1.5 * EXPERTS * rank * (1 / size_in + 1 / size_out)
    for name, form in forms.items():
        mine, base = seconds[name][1:], seconds["base"][1:]
        total = [a + b for a, b in mine]
        parts = [
            statistics.median(a / b for a, b in zip(values, others, strict=True))
            for values, others in (
                ([m[0] for m in mine], [b[0] for b in base]),
                ([m[1] for m in mine], [b[1] for b in base]),
                (total, [a + b for a, b in base]),
            )
        ]
        peak = peak_bytes(lambda form=form: both(form, x, dy), device) / 2**20
        kept = kept_bytes(lambda form=form: form(x), own_tensors) / tokens
        forward_ms, backward_ms = (1e3 * statistics.median(values) for values in zip(*mine, strict=True))
        both_ms = 1e3 * statistics.median(total)
        over_floor = parts[2] / (1.0 if name.startswith("base") else floor)
        print(
            f"  {name:14}{parts[0]:>8.2f}x{parts[1]:>9.2f}x{parts[2]:>6.2f}x{over_floor:>11.2f}x{both_ms:>9.2f}"
            f"{peak:>10.1f}{kept:>14,.0f}",
            flush=True,
        )
        values = (
            device, dtype_name(dtype), size_in, size_out, rank, name, forward_ms, backward_ms, both_ms, *parts,
            over_floor, peak, kept,
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


class OwnGate(ExpertLoRALinear):
    """The default gate's equation, written in torch by a user."""

    def gates(self, x: Tensor) -> Tensor:
        return F.linear(x, self.router.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)


VARIANTS: dict[str, tuple[dict, type[ExpertLoRALinear], bool]] = {  # settings, type of the layer, with balance loss
    "default": ({}, ExpertLoRALinear, False),
    "top 1": ({"top_k": 1}, ExpertLoRALinear, False),
    "top 2": ({"top_k": 2}, ExpertLoRALinear, False),
    "one A": ({"shared_A": True}, ExpertLoRALinear, False),
    "none universal": ({"num_universal_experts": 0, "num_specific_experts": 4}, ExpertLoRALinear, False),
    "two universal": ({"num_universal_experts": 2, "num_specific_experts": 2}, ExpertLoRALinear, False),
    "balance loss": ({}, ExpertLoRALinear, True),
    "own gate": ({}, OwnGate, False),
    "one A, top 1": ({"shared_A": True, "top_k": 1}, ExpertLoRALinear, False),
}


def named_experts(layer: ExpertLoRALinear, x: Tensor) -> Tensor:
    """An expert at a time, in evaluation."""
    scores = F.linear(x, layer.router)
    if layer.top_k is not None:
        scores = scores.masked_fill(scores < scores.topk(layer.top_k, -1).values[..., -1:], -torch.inf)
    weights = [1.0] * layer.num_universal_experts + list(scores.softmax(-1).unsqueeze(-1).unbind(-2))
    y = F.linear(x, layer.weight)
    for weight, (A, B) in zip(weights, [*layer.universal_experts, *layer.specific_experts], strict=True):
        y = y + layer.scaling * weight * F.linear(F.linear(x, A), B)
    return y


def compare_variants(arguments, dtype: torch.dtype, tokens: int, size_in: int, size_out: int, rank: int) -> list[dict]:
    device = arguments.device
    torch.manual_seed(0)
    base = nn.Linear(size_in, size_out, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(1, tokens, size_in, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(1, tokens, size_out, device=device, dtype=dtype)
    layers: dict[str, tuple[nn.Module, bool]] = {}
    for name, (settings, kind, balanced) in VARIANTS.items():
        layer = kind(base, rank, SCALING * rank, **settings)
        for parameter in layer.adapter_parameters().values():
            nn.init.normal_(parameter, std=size_in**-0.5)
        exact, few = copy.deepcopy(layer).double().eval(), x[:, :64].detach().double()
        if not torch.allclose(exact(few), named_experts(exact, few), rtol=1e-10, atol=1e-10):
            raise SystemExit(f"{name}: not what a loop over its experts computes in float64")

        layers[name] = nn.Sequential(layer), balanced

    def step(name: str) -> float:
        layer, balanced = layers[name]
        x.grad, started = None, now(x)
        if balanced:
            with record_gates(layer) as records:
                y = layer(x)
            torch.autograd.backward([y, balance_loss(records)], [dy, None])
        else:
            layer(x).backward(dy)
        return now(x) - started

    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(arguments.rounds + 1):  # the first round warms up
        for name in list(layers)[:: 1 if turn % 2 else -1]:
            seconds[name].append(min(step(name) for _ in range(10 if device == "cuda" else 2)))
    where = f"{device if device == 'cuda' else processor()}, {dtype_name(dtype)}, {tokens:,} tokens"
    print(f"\n{where}, {size_in} -> {size_out}, four experts of rank {rank}")
    print(f"{'':16}  median ratio   ratio of fastest       ms")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values[1:], seconds["default"][1:], strict=True))
        fastest = min(values[1:]) / min(seconds["default"][1:])
        print(f"  {name:16}{ratio:>7.3f}x{fastest:>18.3f}x{1e3 * min(values[1:]):>9.2f}", flush=True)
    return []


def ours(x: Tensor, W: Tensor, own: list[Tensor], noise: Tensor, impl: str) -> Tensor:
    A, B, router, router_noise = own
    settings = {"scaling": SCALING, "router": router, "router_noise": router_noise, "noise": noise, "impl": impl}
    return lora_linear(x, W, None, A, B, **settings)[0]


def peft_layer(weights: Weights, rank: int) -> nn.Module:
    """PEFT's LoRA of rank E·r around the frozen base, adapters in the base's dtype."""
    size_out, size_in = weights.W.shape
    base = nn.Linear(size_in, size_out, bias=False, device=weights.W.device, dtype=weights.W.dtype)
    base.weight.data = weights.W
    config = LoraConfig(r=EXPERTS * rank, lora_alpha=2 * EXPERTS * rank, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(weights.A.flatten(0, 1))
    layer.lora_B["default"].weight.data.copy_(weights.B.transpose(0, 1).flatten(1))
    return layer


def both(form: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> None:
    x.grad = None
    form(x).backward(dy)
    x.grad = None


def timed(form: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, repeats: int) -> tuple[float, float]:
    """Seconds of (forward, backward), the fastest of `repeats`."""
    best = [float("inf")] * 2
    for _ in range(repeats):
        x.grad = None
        started = now(x)
        y = form(x)
        middle = now(x)
        y.backward(dy)
        ended = now(x)
        best = [min(best[0], middle - started), min(best[1], ended - middle)]
    return best[0], best[1]


def now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def check(weights: Weights, x: Tensor, dy: Tensor, rank: int) -> None:
    """Stop unless output and gradients of every form are within rounding of float64's."""
    noise = torch.randn(1, x.shape[1], EXPERTS - 1, device=x.device)

    def results(form, w: Weights, tensors: list[Tensor], x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = form(x, w)
        return [y, *torch.autograd.grad(y, [x, *tensors], dy.to(y.dtype))]

    exact = weights.to(torch.float64)
    truth = results(lambda x, w: loop(x, w, noise), exact, [exact.A, exact.B, exact.Wg, exact.Wn], x.double())
    limit = 1e-5 if x.dtype == torch.float32 else 3e-2
    for name, form in (("published", published), ("loop", loop)):
        own = weights.to(x.dtype)
        found = results(lambda x, w, form=form: form(x, w, noise), own, [own.A, own.B, own.Wg, own.Wn], x)
        # float16's softmax is part of the published form, in any dtype.
        refuse(name, found, truth, max(limit, 3e-3) if name == "published" else limit)
    for impl in ["torch"] + ["triton"] * x.is_cuda:
        packed = weights.packed()
        found = results(lambda x, w, p=packed, i=impl: ours(x, weights.W, p, noise, i), weights, packed, x)
        found[2] = found[2].view_as(truth[2])
        found[3] = found[3].unflatten(1, (EXPERTS, rank)).transpose(0, 1)
        refuse(impl, found, truth, limit)


def refuse(name: str, found: list[Tensor], truth: list[Tensor], limit: float) -> None:
    for what, a, b in zip("y x A B W_g W_n".split(), found, truth, strict=True):
        error = float((a.detach().double() - b.detach()).norm() / b.detach().norm())
        if not error <= limit:
            raise SystemExit(f"{name}: {what} is {error:.1e} away from float64, allowed is {limit:.0e}")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].split(": ")[1] if names else platform.processor()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
