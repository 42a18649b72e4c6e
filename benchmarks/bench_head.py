"""Head and loss, forward and backward, without the logits tensor, beside the forms that others use.

    python benchmarks/bench_head.py                                 # V = 125,696, D = 1,024, 2,048 tokens
    python benchmarks/bench_head.py --device cuda --hidden_size 5120 --tokens 8192

Rows: full logits with cross-entropy in float32; chunks of 256 tokens recomputed by activation checkpointing, of all
tokens or of those with a label; torch's own linear_cross_entropy, plain and chunked; Liger's, where it is installed and
there is a GPU; and ours. Of the tokens half or none are prompt, without a label. "frozen": only the hidden states need
a gradient, as with LoRA; "autocast": float32 weights that train under bfloat16, as in the recipes. Ratios are the time
of full logits over that of a row, from rounds in which all rows take turns. Memory is the peak of all tensors made on
the way, less the gradients that stay. Errors are relative to full logits. Each dtype has a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from profiled_memory import peak_bytes
from torch.utils.checkpoint import checkpoint

from pedgpt.losses import linear_cross_entropy, linear_sequence_logps


def full(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def checkpointed(hidden, weight, labels):
    parts = zip(hidden.split(256), labels.split(256), strict=True)
    return sum(checkpoint(full, part, weight, label, use_reentrant=False) for part, label in parts)


def checkpointed_responses(hidden, weight, labels):
    rows = labels != -100
    return checkpointed(hidden[rows], weight, labels[rows])


def torchs(hidden, weight, labels):
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum")


def torchs_chunked(hidden, weight, labels):
    options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def ours(hidden, weight, labels):
    return linear_cross_entropy(hidden[None], weight, labels[None], num_tokens=1)


def our_sequences(hidden, weight, labels):
    """As DFPO asks: four responses, each with a factor of its own."""
    logps, _ = linear_sequence_logps(hidden.unflatten(0, (4, -1)), weight, labels.unflatten(0, (4, -1)))
    return -logps.sum()


def ligers(hidden, weight, labels):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")


FORMS = {
    "full logits": full, "checkpointed chunks": checkpointed, "of responses alone": checkpointed_responses,
    "torch, one call": torchs, "torch, chunked": torchs_chunked, "Liger": ligers, "pedgpt": ours,
    "pedgpt, by sequence": our_sequences,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=125_696)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--without", nargs="*", default=[], help="rows to leave out")
    arguments = parser.parse_args()
    if arguments.dtype is None:
        for dtype in ("float32", "bfloat16"):  # the heap that one leaves would slow the other
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--dtype", dtype], check=True)
        return
    dtype = getattr(torch, arguments.dtype)
    print(f"{arguments}\n{'':43}{'error':>9}{'ms':>9}{'ratio':>8}{'MiB':>8}", flush=True)
    for masked in ("half", "none"):
        for kind in ("frozen", "trains", *(["autocast"] if dtype == torch.bfloat16 else [])):
            case = f"{masked} masked, {kind}"
            if arguments.only in case:
                compare(case, arguments, dtype, masked == "half", kind)


def compare(case: str, arguments: argparse.Namespace, dtype: torch.dtype, masked: bool, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    size = arguments.hidden_size
    hidden = torch.randn(arguments.tokens, size, generator=generator)
    weight = torch.randn(arguments.vocabulary, size, generator=generator) * size**-0.5
    labels = torch.randint(arguments.vocabulary, (arguments.tokens,), generator=generator)
    if masked:  # four rows, the first half of each a prompt
        labels.unflatten(0, (4, -1))[:, : arguments.tokens // 8] = -100
    stored = torch.float32 if kind == "autocast" else dtype
    hidden, weight = (tensor.to(arguments.device, stored) for tensor in (hidden, weight))
    labels = labels.to(arguments.device)
    hidden.requires_grad_()
    weight.requires_grad_(kind != "frozen")
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]

    def step(form):
        with torch.autocast(arguments.device, dtype, enabled=kind == "autocast"):
            loss = form(hidden, weight, labels) / 1000
        return loss.detach(), torch.autograd.grad(loss, leaves)

    def timed(form) -> float:
        began = time.perf_counter()
        step(form)
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began)

    absent = {*arguments.without, *(["Liger"] * (arguments.device != "cuda")), *(["of responses alone"] * (not masked))}
    rows, skipped = {name: form for name, form in FORMS.items() if name not in absent}, []
    expected, gradients = step(full)
    kept = sum(leaf.nbytes for leaf in leaves)
    errors, memory = {}, {}

    for name, form in list(rows.items()):
        results = []
        try:
            peak = peak_bytes(lambda form=form, results=results: results.extend(step(form)), arguments.device)
        except (ImportError, AttributeError) as error:  # of older torches
            skipped.append(f"{name}: {error}")
            del rows[name]
            continue
        memory[name] = (peak - kept) / 2**20
        pairs = [(results[0], expected), *zip(results[1], gradients, strict=True)]
        errors[name] = max(float((a - b).norm(dtype=torch.float64) / b.norm(dtype=torch.float64)) for a, b in pairs)
        del results, pairs
        if not errors[name] < (5e-5 if dtype == torch.float32 else 2e-2):
            raise SystemExit(f"{name} differs from full logits by {errors[name]:.1e}")
    del gradients
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds + 1):  # the first round warms up
        for name, form in rows.items():
            seconds[name].append(timed(form))
    base = statistics.median(seconds["full logits"][1:])
    for name in rows:
        took = statistics.median(seconds[name][1:])
        figures = f"{errors[name]:>9.0e}{took:>9,.0f}{base / took:>7.2f}x{memory[name]:>8,.0f}"
        print(f"{case:23}{name:20}{figures}", flush=True)
    print(*skipped, sep="\n", end="" if not skipped else "\n")


if __name__ == "__main__":
    main()
