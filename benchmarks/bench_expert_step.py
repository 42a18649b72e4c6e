"""A whole stage-4 step beside transformers + PEFT LoRA of the same total rank, on the same weights, in one run.

    python benchmarks/bench_expert_step.py
    python benchmarks/bench_expert_step.py --checkpointing selective      here norms and SwiGLU are computed again

A Llama of 33M parameters (hidden 512, 8 layers, vocabulary 8,000) with adapters on gate, up and down: three specific
experts and a universal one of rank 16 here, LoRA of rank 64 there. 4 rows of 512 tokens, every one supervised; a step
is forward, backward and AdamW, and here the statistics of the gates. The first losses must be equal before anything is
timed; the two alternate, and medians are compared. bfloat16 means frozen weights in bfloat16, adapters in float32 and
autocast, on both sides. Each dtype has a process of its own, as a training run has: what another left of the heap
decides how often memory is fetched anew. Peak memory is that of tensors beside weights and optimizer, as torch's
profiler counts allocations.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from profiled_memory import peak_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from pedgpt.adapters import gate_metrics, inject_experts, pack_adapters, record_gates
from pedgpt.kernels.recompute import CHECKPOINTING
from pedgpt.losses import linear_cross_entropy
from pedgpt.models import load_model

ROWS, LENGTH, TARGETS = 4, 512, ["gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="one alone; without it, each in a process")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="none", help="of pedgpt; PEFT keeps all")
    arguments = parser.parse_args()
    if not arguments.dtype:
        print("           tokens/s: PEFT  pedgpt  ratio  peak MiB: PEFT  pedgpt  ratio", flush=True)
        for dtype in ("float32", "bfloat16"):
            subprocess.run([sys.executable, *sys.argv, "--dtype", dtype], check=True)
        return
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        max_position_embeddings=2048,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(shape).save_pretrained(folder)
        compare(folder, getattr(torch, arguments.dtype), arguments.repeats, arguments.checkpointing)


def compare(folder: str, dtype: torch.dtype, repeats: int, checkpointing: str) -> None:
    tokens = torch.randint(5, 8000, (ROWS, LENGTH + 1))
    steps = [peft_step(folder, dtype, tokens), our_step(folder, dtype, tokens, checkpointing)]
    theirs, ours = (step() for step in steps)
    if abs(theirs - ours) > (1e-5 if dtype == torch.float32 else 1e-2) * theirs:
        raise SystemExit(f"the first losses differ: {theirs:.6f} and {ours:.6f}")
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats + 1):  # the first round warms up
        for step, found in zip(steps, seconds, strict=True):
            began = time.perf_counter()
            step()
            found.append(time.perf_counter() - began)
    theirs_s, ours_s = (statistics.median(values[1:]) for values in seconds)
    ratios = sorted(a / b for a, b in zip(seconds[0][1:], seconds[1][1:], strict=True))
    theirs_peak, ours_peak = (peak_bytes(step) / 2**20 for step in steps)
    count = ROWS * LENGTH
    print(
        f"{str(dtype).removeprefix('torch.'):10}{count / theirs_s:>15,.0f}{count / ours_s:>8,.0f}"
        f"{theirs_s / ours_s:>6.2f}x{theirs_peak:>16,.0f}{ours_peak:>8,.0f}{ours_peak / theirs_peak:>6.2f}x"
        f"  (ratios of the rounds {ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


def make_step(model, forward_loss, dtype):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
            loss = forward_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def peft_step(folder: str, dtype: torch.dtype, tokens: torch.Tensor):
    base = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=64, lora_alpha=128, target_modules=TARGETS)).train()
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return make_step(
        model, lambda: model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss, dtype
    )


def our_step(folder: str, dtype: torch.dtype, tokens: torch.Tensor, checkpointing: str):
    model = load_model(folder, dtype=dtype)
    model.activation_checkpointing = checkpointing
    inject_experts(model, rank=16, alpha=32, num_specific_experts=3, target_modules=TARGETS)
    model.train()
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def forward_loss():
        pack_adapters(model)  # as the recipe does
        with record_gates(model, where=labels >= 0) as gates:  # as the recipe does
            hidden = model.hidden_states(inputs)
        gate_metrics(gates)
        return linear_cross_entropy(hidden, model.lm_head.weight, labels)

    return make_step(model, forward_loss, dtype)


if __name__ == "__main__":
    main()
