"""Stage 4 over a base in 8 and 4 bits beside one in bfloat16: held-out loss at the end, with three seeds.

    make demo && python benchmarks/ablate_quantized.py --run runs/demo
    python benchmarks/ablate_quantized.py --run runs/demo --large

Every arm starts from the demo's model of stage 3 and sees the same rows for as many steps, in bfloat16. With `--large`
the base has 150 million parameters, which stage 2 trains for 40 steps first, and an arm trains for 20 steps. Prints a
Markdown table: the held-out loss, and by how much it is above that of the same seed over the bfloat16 base, as means
and 95 % intervals (Student's t over seeds). Finished runs are kept.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %
ARMS = ("none", "int8", "nf4")
LARGE = {"hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 16}
FEW = {"max_steps": 20, "global_batch_size": 2, "micro_batch_size": 2, "row_length": 256}


def call(recipe: str, **settings: object) -> None:
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    done = subprocess.run([sys.executable, ROOT / "recipes" / f"{recipe}.py", *flags], capture_output=True)
    if done.returncode:
        sys.exit(done.stderr.decode())


def large_base(run: Path, output: Path, rows: dict) -> Path:
    """A model of 150 million parameters that has learnt from the conversations for 40 steps."""
    demo = ROOT / "recipes/configs/demo"
    if not (output / "base").exists():
        corpus = run / "corpus/train"
        sources = {"text": [corpus / "text"], "instructions": rows["instructions"]}
        call("init_model", config=demo / "base.toml", output=output / "base", **sources, **LARGE)
    steps = {**FEW, "max_steps": 40, "learning_rate": 5e-4, "dtype": "bfloat16", "seed": 0}
    call("full_finetune", config=demo / "sft.toml", model=output / "base", output=output / "sft", **rows, **steps)
    return output / "sft/model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--output", type=Path, default=Path("runs/ablate_quantized"))
    parser.add_argument("--seeds", type=int, default=3, choices=STUDENT)
    parser.add_argument("--large", action="store_true", help="a base of 150 million parameters")
    arguments = parser.parse_args()
    output = arguments.output / ("large" if arguments.large else "demo")
    train, held = (arguments.run / "corpus" / name for name in ("train", "heldout"))
    rows = {"instructions": [train / "tasks", train / "generalist/general_medical"]}
    rows["heldout_instructions"] = [held / "tasks"]
    rows["on_long_row"] = rows["on_bad_row"] = "skip"
    model = large_base(arguments.run, output, rows) if arguments.large else arguments.run / "dfpo/model"
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(arguments.seeds):
        for arm in ARMS:
            folder = output / f"{arm}_{seed}"
            settings = {"config": ROOT / "recipes/configs/demo/experts.toml", "model": model, "output": folder}
            settings |= {"dtype": "bfloat16", "quantize": arm, "seed": seed, "evaluate_every": 0, **rows}
            call("expert_finetune", **settings, **({**FEW, "rank": 8, "alpha": 16} if arguments.large else {}))
            last = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
            losses[arm].append(json.loads(last)["eval_loss"])
            print(f"{arm}, seed {seed}: {losses[arm][-1]:.4f}", file=sys.stderr, flush=True)

    def mean(values: list[float], digits: int) -> str:
        half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
        return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"

    print("| base | held-out loss | above bfloat16, % |\n|:--|--:|--:|")
    for arm, found in losses.items():
        above = [100 * (loss / base - 1) for loss, base in zip(found, losses["none"], strict=True)]
        print(f"| {'bfloat16' if arm == 'none' else arm} | {mean(found, 4)} | {mean(above, 2)} |")


if __name__ == "__main__":
    main()
