"""What the instruction share does in stage 1: text only, instructions only and three mixtures, with five seeds.

    make demo && python benchmarks/ablate_hybrid.py --run runs/demo

Per seed and share the demo's untrained model is pre-trained on as many tokens as in the demo, and then fine-tuned as in
stage 2, always with the same rows in the same order. All is measured on held-out rows, whose diseases no training row
is about: perplexities after stage 1, answers after stage 2. Prints a Markdown table of means and 95 % intervals
(Student's t over seeds). Finished runs are kept.
"""

import argparse
import statistics
import sys
from pathlib import Path

from ablate_mu import ROOT, STUDENT, call, evaluated

SHARES = {"text only": 0.0, "25 % instructions": 0.25, "50 %": 0.5, "75 %": 0.75, "instructions only": 1.0}
TEXTS = {
    "pediatric text": "pediatric_text", "instructions": "instructions", "general medical text": "general_medical_text",
    "general text": "general_text",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--output", type=Path, default=Path("runs/ablate_hybrid"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.seeds not in STUDENT:
        sys.exit(f"--seeds must be in 2 to 10, found {arguments.seeds}")
    corpus, configs = arguments.run / "corpus", ROOT / "recipes/configs/demo"
    found: dict[str, list[list[float]]] = {name: [] for name in SHARES}
    for seed in range(arguments.seeds):
        for name, share in SHARES.items():
            cpt, sft = (arguments.output / f"{stage}_{seed}_{share:g}" for stage in ("cpt", "sft"))
            call(
                "continued_pretrain", "--config", configs / "cpt.toml", "--model", arguments.run / "base",
                "--output", cpt, "--corpus", corpus, "--instruction_share", share, "--seed", seed,
            )  # fmt: skip
            call(
                "full_finetune", "--config", configs / "sft.toml", "--model", cpt / "model", "--output", sft,
                "--instructions", corpus / "train/generalist", corpus / "train/tasks_sample", "--seed", seed,
            )  # fmt: skip
            read = evaluated(cpt, cpt / "model", arguments.run, "--limit", 1)["perplexity"]
            told = evaluated(sft, sft / "model", arguments.run)
            answers = [statistics.mean(task[key] for task in told["tasks"].values()) for key in ("rouge-l", "gleu")]
            found[name].append([*(read[key] for key in TEXTS.values()), *answers, told["perplexity"]["instructions"]])
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    columns = [*TEXTS, "ROUGE-L after SFT", "GLEU after SFT", "instructions after SFT"]
    print(f"| | {' | '.join(columns)} |\n|{':--|' + '--:|' * len(columns)}")
    for name, rows in found.items():
        cells = []
        for column in zip(*rows, strict=True):
            half = STUDENT[len(rows)] * statistics.stdev(column) / len(rows) ** 0.5
            cells.append(f"{statistics.mean(column):,.2f} ± {half:,.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
