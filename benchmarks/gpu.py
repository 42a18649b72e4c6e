"""Every GPU claim, measured in groups of at most four minutes: correctness first, then ours, the peers and the limit.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py tests limits attention layers head --output runs/gpu
    python benchmarks/gpu.py all --output runs/gpu      each group in a process of its own
    python benchmarks/gpu.py --table --output runs/gpu  everything measured so far, as Markdown
    python benchmarks/gpu.py all --tiny                 the same code with toy sizes, also on a CPU: does it still run?

Results go to results.jsonl and results.csv in the output folder. A case whose results are there is skipped, so a run
that was cut short goes on with the same command. What is not installed (PEFT, Liger, TRL) is skipped with a line.

Training steps are those of the recipes: `main` of each script runs as it stands, on rows read from disk. Only three
things are replaced: weights are random instead of read, fingerprints of weights are constants, and nothing is saved at
the end. Rates are the ones in the recipe's own metrics.jsonl, medians over the steps after the third. The peers get
the same rows. "limit" is what the products take at the rate that cuBLAS reaches on this card, or what reading the
weights takes at the rate of a copy; both are measured first.
"""

import argparse
import csv
import gc
import importlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.bfloat16
VOCABULARY, LENGTH = 125_696, 4096
tiny = False


class Skipped(Exception):
    """A case that cannot run here, with the reason."""


class Results:
    """What has been measured: one JSON object a line, and the same as a table."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.table = folder / "results.jsonl", folder / "results.csv"
        lines = self.file.read_text("utf-8").splitlines() if self.file.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def add(self, group: str, case: str, form: str, **figures: Any) -> None:
        """Keep and print one row."""
        card = torch.cuda.get_device_name() if CUDA else "CPU"
        row = {"group": group, "case": case, "form": form, **figures, "card": card, "torch": torch.__version__}
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with self.table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        shown = "  ".join(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in figures.items())  # fmt: skip
        print(f"  {case:44} {form:34} {shown}", flush=True)

    def done(self, group: str, case: str, form: str = "") -> bool:
        """Whether the case has been measured, with this form or with any."""
        key = (group, case, form) if form else (group, case)
        return any((row["group"], row["case"], row["form"])[: len(key)] == key for row in self.rows)

    def limit(self, name: str) -> float | None:
        """The rate of cuBLAS in FLOP/s ("products") or of a copy in bytes/s ("memory"), where it has been measured."""
        return next((row["rate"] for row in self.rows if row["case"] == name), None)

    def markdown(self) -> str:
        lines = []
        for group in dict.fromkeys(row["group"] for row in self.rows):
            rows = [{k: v for k, v in row.items() if k != "group"} for row in self.rows if row["group"] == group]
            names = list(dict.fromkeys(name for row in rows for name in row if name not in ("card", "torch")))
            lines += ["", f"**{group}** ({rows[0]['card']}, torch {rows[0]['torch']})", ""]
            lines += ["| " + " | ".join(names) + " |", "|" + " :-- |" * len(names)]
            for row in rows:
                cells = (f"{v:,.4g}" if isinstance(v := row.get(name, ""), float) else str(v) for name in names)
                lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


# Measuring


def seconds_of(call: Callable[[], object], repeats: int = 20) -> float:
    """Seconds of a call on the device: a captured CUDA graph, replayed, so that Python's own time is left out."""
    if not CUDA:
        call()
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
        replay: Callable[[], object] = graph.replay
    except RuntimeError:  # what waits for the device, as a count of labels does, is timed by events instead
        replay = call
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return statistics.median(times)


def both(form: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(form(*leaves), [leaf for leaf in leaves if leaf.requires_grad], dy)


@contextmanager
def fresh_memory() -> Iterator[None]:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def peak_gib() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if CUDA else 0.0


def optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skipped(f"{name} is not installed ({error})") from None


def relative(found: Tensor, truth: Tensor) -> float:
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm())


def require(error: float, limit: float, what: str) -> None:
    """Correctness comes before any timing."""
    if not error <= limit:
        raise AssertionError(f"{what}: the relative error is {error:.1e}, allowed is {limit:.0e}")


# Groups: functions of the results, each a list of cases


def tests(results: Results) -> None:
    """The tests marked gpu, and the kernels' tests, which take the GPU where there is one."""
    where = ["tests/kernels", "tests/adapters/test_noise.py", "tests/adapters/test_experts.py", "tests/models"]
    for case, arguments in (("marked gpu", ["-m", "gpu", "tests"]), ("kernels on the device", where)):
        if results.done("tests", case) or tiny:
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=235)
        last = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
        results.add("tests", case, "pytest", outcome=last, seconds=time.perf_counter() - began)
        if done.returncode not in (0, 5):
            print(done.stdout[-6000:])


def limits(results: Results) -> None:
    """What this card reaches: bfloat16 products by cuBLAS, and a copy of a large tensor."""
    size = 256 if tiny else 8192
    if not results.done("limits", "products"):
        a, b = (torch.randn(size, size, device=DEVICE, dtype=HALF) for _ in range(2))
        results.add("limits", "products", "cuBLAS", rate=2 * size**3 / seconds_of(lambda: a @ b))
    if not results.done("limits", "memory"):
        source = torch.empty(2**20 if tiny else 2**31, device=DEVICE, dtype=torch.uint8)
        target = torch.empty_like(source)
        results.add("limits", "memory", "copy", rate=2 * source.numel() / seconds_of(lambda: target.copy_(source)))


def attention(results: Results) -> None:
    """8 documents packed into one row: dense mask, flash without documents, varlen flash, and ours."""
    for heads, alibi in ((2 if tiny else 32, False), (3 if tiny else 40, True)):
        attention_case(results, heads, 32 if tiny else 128, 256 if tiny else LENGTH, alibi)


def attention_case(results: Results, heads: int, size: int, length: int, alibi: bool) -> None:
    from pedgpt.kernels.attention import Layout
    from pedgpt.kernels.attention import attention as ours
    from pedgpt.models.positions import alibi_slopes

    case = f"{heads} heads of {size}, {'ALiBi' if alibi else 'RoPE'}"
    if results.done("attention", case):
        return
    torch.manual_seed(0)
    ends = torch.linspace(0, length, 9).long()
    index = torch.arange(length, device=DEVICE)
    documents = torch.bucketize(index, ends[1:].to(DEVICE), right=True)
    positions = (index - ends.to(DEVICE)[documents])[None]
    slopes = alibi_slopes(heads, DEVICE) if alibi else None
    layout = Layout(positions, documents=documents[None], slopes=slopes)
    q, k, v = (torch.randn(1, heads, length, size, device=DEVICE, dtype=HALF, requires_grad=True) for _ in "qkv")
    dout = torch.randn_like(q)
    seen = (index[None] <= index[:, None]) & (documents[None] == documents[:, None])
    bias = 0.0 if slopes is None else slopes[:, None, None] * (index[None] - index[:, None])
    mask = (torch.zeros(1, heads, length, length, device=DEVICE) + bias).masked_fill_(~seen, -torch.inf).to(HALF)
    forms: dict[str, Callable[..., Tensor]] = {
        "dense mask": partial(F.scaled_dot_product_attention, attn_mask=mask),
        "causal, no documents": partial(F.scaled_dot_product_attention, is_causal=True),
        "pedgpt": lambda q, k, v: ours(q, k, v, layout),
    }
    if not alibi and CUDA:
        forms["varlen flash"] = varlen(ends)
    exact = forms["dense mask"](q, k, v)
    for name, form in forms.items():
        began = time.perf_counter()
        step = both(form, [q, k, v], dout)
        step()
        first = time.perf_counter() - began
        if name not in ("dense mask", "causal, no documents"):
            require(relative(form(q, k, v), exact), 2e-2, f"{case}, {name}")
        forward = 1e3 * seconds_of(partial(form, q, k, v))
        results.add("attention", case, name, forward_ms=forward, both_ms=1e3 * seconds_of(step), first_call_s=first)


def varlen(ends: Tensor) -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = ends.int().to(DEVICE), int(ends.diff().max())
    causal = {"is_causal": True} if "is_causal" in inspect.signature(varlen_attn).parameters else {
        "window_size": (-1, 0)
    }  # fmt: skip

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (part[0].transpose(0, 1).contiguous() for part in (q, k, v))
        return varlen_attn(*flat, offsets, offsets, longest, longest, **causal).transpose(0, 1)[None]

    return form


def layers(results: Results) -> None:
    """An expert layer over its frozen linear layer, and PEFT's LoRA of the same total rank, noise as in training."""
    for size_in, size_out in [(64, 96)] if tiny else [(5120, 5120), (5120, 13696), (13696, 5120)]:
        layer_case(results, 64 if tiny else 8192, size_in, size_out, 4 if tiny else 16)


def layer_case(results: Results, tokens: int, size_in: int, size_out: int, rank: int) -> None:
    from bench_experts import EXPERTS, SCALING, Weights, loop, peft_layer

    from pedgpt.adapters import ExpertLoRALinear, pack_adapters, set_noise_rows

    case = f"{tokens} tokens, {size_in} to {size_out}, rank {rank}"
    if results.done("layers", case):
        return
    torch.manual_seed(0)

    def drawn(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(*shape, device=DEVICE)).to(HALF)

    weights = Weights(
        drawn(size_out, size_in, scale=size_in**-0.5), drawn(EXPERTS, rank, size_in, scale=size_in**-0.5),
        drawn(EXPERTS, size_out, rank, scale=0.1), drawn(EXPERTS - 1, size_in, scale=size_in**-0.5),
        drawn(EXPERTS - 1, size_in, scale=size_in**-0.5),
    )  # fmt: skip
    base = nn.Linear(size_in, size_out, bias=False, device="meta")
    base.weight = nn.Parameter(weights.W, requires_grad=False)
    layer = ExpertLoRALinear(base, rank, SCALING * rank, EXPERTS - 1).train()
    for parameter, value in zip(layer.adapter_parameters().values(), weights.packed(), strict=True):
        parameter.data = value.data
    set_noise_rows(layer, 1, torch.arange(1, device=DEVICE))
    pack_adapters(layer)
    x, dy = (drawn(1, tokens, size, scale=1.0) for size in (size_in, size_out))
    x.requires_grad_()
    noise = layer.noise_stream.normal(torch.empty(1, 64, EXPERTS - 1, device=DEVICE, dtype=torch.float64))
    exact = loop(x[:, :64].double(), weights.to(torch.float64), noise)
    require(relative(layer(x[:, :64]), exact), 1e-2, case)
    forms: dict[str, Callable[[Tensor], Tensor]] = {"frozen linear": nn.Sequential(base), "pedgpt experts": layer}
    try:
        forms["PEFT LoRA"] = peft_layer(weights, rank)
    except ImportError as error:
        print(f"  {case}: PEFT is left out ({error})")
    times = {}
    for name, form in forms.items():
        trained = [parameter for parameter in form.parameters() if parameter.requires_grad]
        times[name] = seconds_of(lambda form=form, to=[x, *trained]: torch.autograd.grad(form(x), to, dy))
    floor = 1 + 1.5 * EXPERTS * rank * (1 / size_in + 1 / size_out)
    for name, took in times.items():
        ratio = took / times["frozen linear"]
        results.add("layers", case, name, both_ms=1e3 * took, over_linear=ratio, arithmetic_floor=floor)


def head(results: Results) -> None:
    """Head and loss, half or none of the tokens masked, frozen or training, beside full logits and Liger."""
    for trains in (False, True):
        for masked in (0.5, 0.0):
            head_case(results, trains, masked, *((64, 32, 500) if tiny else (8192, 5120, VOCABULARY)))


def head_case(results: Results, trains: bool, masked: float, tokens: int, width: int, vocabulary: int) -> None:
    from bench_head import FORMS

    case = f"{'trains' if trains else 'frozen'}, {masked:.0%} masked"
    if results.done("head", case):
        return
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE, dtype=HALF, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=DEVICE) / width**0.5).to(HALF).requires_grad_(trains)
    labels = torch.randint(vocabulary, (tokens,), device=DEVICE)
    labels[: int(masked * tokens)] = -100
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    exact = None
    for name in ("full logits", "Liger", "pedgpt", "pedgpt, by sequence"):
        step = lambda form=FORMS[name]: torch.autograd.grad(form(hidden, weight, labels), leaves)  # noqa: E731
        with fresh_memory():
            try:
                found = step()[0]
            except ImportError as error:
                print(f"  {case}: {name} is left out ({error})")
                continue
            exact = found if exact is None else exact
            require(relative(found, exact), 3e-2, f"{case}, {name}")
            del found
            results.add("head", case, name, both_ms=1e3 * seconds_of(step, 5), peak_gib=peak_gib())


def groups() -> dict[str, Callable[[Results], None]]:
    """All groups by name, in the order in which `all` runs them."""
    from gpu_steps import decoding, dfpo, full, full_7b, memory, recipes, stage4, stage4_13b, stage4_peers

    steps = (stage4, stage4_peers, stage4_13b, memory, full, full_7b, dfpo, decoding, recipes)
    return {group.__name__: group for group in (tests, limits, attention, layers, head, *steps)}


def main() -> None:
    global tiny
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--list", action="store_true", help="the groups, with what each measures")
    parser.add_argument("--table", action="store_true", help="print what has been measured as Markdown")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any machine")
    arguments = parser.parse_args()
    tiny, known = arguments.tiny, groups()
    if unknown := {*arguments.groups} - {*known, "all"}:
        parser.error(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(known)} and all")
    if arguments.list or not (arguments.groups or arguments.table):
        print(*(f"{name:14} {group.__doc__}" for name, group in known.items()), sep="\n")
        return
    results = Results(arguments.output)
    if arguments.table:
        print(results.markdown())
        return
    if not CUDA and not tiny:
        raise SystemExit("torch sees no CUDA device; --tiny runs the same code with toy sizes on the CPU")
    if "all" in arguments.groups:
        command = [sys.executable, __file__, "--output", str(arguments.output), *["--tiny"] * tiny]
        failed = [name for name in known if subprocess.run([*command, name]).returncode]
        raise SystemExit(f"failed: {', '.join(failed)}" if failed else None)
    for name in arguments.groups:
        began = time.perf_counter()
        print(f"{name}: {known[name].__doc__}", flush=True)
        known[name](results)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    importlib.import_module("gpu").main()  # not as __main__: gpu_steps.py imports this module by its name
