"""GB on one card by model, stage and settings, as `--plan` counts them: the table of docs/checkpoints.md.

    python benchmarks/memory_table.py

One row of 4,096 tokens, block checkpointing, products in bfloat16. Behind each figure stands the smallest card that it
fits: of 16, 24, 48 or 80 GB, of which a tenth stays free for holes between tensors. No weights are needed.
"""

import argparse
from pathlib import Path

from check_plan import recipe

ROOT = Path(__file__).resolve().parents[1]
CARDS = (16, 24, 48, 80)
COMMON = "--row_length 4096 --micro_batch_size 1 --global_batch_size 1 --activation_checkpointing block"
MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen2.5-7b", "baichuan2_7b", "llama3.1-8b", "qwen3-8b", "baichuan2_13b")
BFLOAT16 = "--weight_dtype bfloat16 --optimizer_state bfloat16"
COLUMNS = {  # title: (recipe, flags)
    "all, float32": ("full_finetune", ""),
    "all, bfloat16": ("full_finetune", BFLOAT16),
    "DFPO, all, bfloat16": ("dfpo", BFLOAT16),
    "DFPO, LoRA": ("dfpo", "--adapter lora"),
    "DFPO, LoRA, nf4": ("dfpo", "--adapter lora --quantize nf4"),
    "experts": ("expert_finetune", ""),
    "experts, int8": ("expert_finetune", "--quantize int8"),
    "experts, nf4": ("expert_finetune", "--quantize nf4"),
}


def gigabytes(model: str, name: str, flags: str) -> float:
    """The peak of a step on one card."""
    from pedgpt.training import parse_settings
    from pedgpt.training.plan import GB, count

    module, make_batch = recipe(name)
    place = f"--model {ROOT / 'recipes/configs' / model} --plan 1 --device cuda --dtype bfloat16"
    config = parse_settings(module.Config, f"{place} {COMMON} {flags}".split())
    return sum(count(module.model_and_loss, make_batch, config).values()) / GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="only these")
    arguments = parser.parse_args()
    print(f"| GB (card) | {' | '.join(COLUMNS)} |\n|{':--|' + '--:|' * len(COLUMNS)}")
    for model in arguments.models:
        cells = []
        for name, flags in COLUMNS.values():
            found = gigabytes(model, name, flags)
            card = next((str(card) for card in CARDS if found <= 0.9 * card), "more")
            cells.append(f"{found:.1f} ({card})")
        print(f"| {model} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
