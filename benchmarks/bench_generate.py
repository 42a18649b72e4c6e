"""Greedy decoding beside transformers' generate: the same weights, prompts and number of tokens, in one run.

    python benchmarks/bench_generate.py

A Llama of 33M parameters (hidden 512, 8 layers, vocabulary 8,000), prompts of 32 tokens, 64 new ones. Times are of
whole calls, our laying out of the weights included; the two alternate, and medians are compared. In float32 the tokens
must be equal before anything is timed; in bfloat16, where each rounds in its own places, the share that is is printed.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pedgpt.adapters import inject_experts, pack_adapters
from pedgpt.models import generate, load_model

PROMPT, NEW = 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        max_position_embeddings=2048,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(shape).save_pretrained(folder)
        print("tokens/s, and the time with experts (rank 8, 3 specific) over that of the base")
        print(f"{'':10}{'batch':>6}{'transformers':>14}{'pedgpt':>8}{'ratio':>7}{'experts: MLP':>14}{'all linear':>12}")
        for dtype in (torch.float32, torch.bfloat16):
            for batch in (1, 8):
                compare(folder, dtype, batch, arguments.repeats)


def compare(folder: str, dtype: torch.dtype, batch: int, repeats: int) -> None:
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ours = load_model(folder, dtype=dtype)
    mlp = with_experts(folder, dtype, ["gate_proj", "up_proj", "down_proj"])
    linear = with_experts(folder, dtype, ["all-linear"])
    tokens = torch.randint(5, 8000, (batch, PROMPT))
    mask = torch.ones_like(tokens)

    def run_theirs():
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        return theirs.generate(tokens, attention_mask=mask, **settings)[:, PROMPT:].tolist()

    def run(model):
        return generate(model, tokens.tolist(), max_new_tokens=NEW)

    expected, found = run_theirs(), run(ours)
    equal = sum(a == b for row, other in zip(expected, found, strict=True) for a, b in zip(row, other, strict=True))
    if dtype == torch.float32 and equal != batch * NEW:
        raise SystemExit(f"the answers differ: {equal} of {batch * NEW} tokens are equal")
    calls = (run_theirs, lambda: run(ours), lambda: run(mlp), lambda: run(linear))
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):  # the first round warms up
        for call, found in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            found.append(time.perf_counter() - started)
    theirs_s, ours_s, mlp_s, linear_s = (statistics.median(values[1:]) for values in seconds)
    count = batch * NEW
    print(
        f"{str(dtype).removeprefix('torch.'):10}{batch:>6}{count / theirs_s:>14.0f}{count / ours_s:>8.0f}"
        f"{theirs_s / ours_s:>6.2f}x{mlp_s / ours_s:>13.2f}x{linear_s / ours_s:>11.2f}x"
        f"  ({equal / count:.0%} of the tokens equal)",
        flush=True,
    )


def with_experts(folder: str, dtype: torch.dtype, targets: list[str]) -> torch.nn.Module:
    """The same model with experts that have learnt something."""
    model = load_model(folder, dtype=dtype)
    inject_experts(model, rank=8, num_specific_experts=3, target_modules=targets)
    for name, parameter in model.named_parameters():
        if "lora" in name or "router" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    pack_adapters(model)
    return model.eval()


if __name__ == "__main__":
    main()
