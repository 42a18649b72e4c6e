"""What DFPO brings on the sample corpus: μ = 0 (DPO), 0.1 and 1, and SFT on the chosen answers; five seeds.

    make demo && python benchmarks/ablate_mu.py --run runs/demo

Per seed stage 2 is trained anew from the demo's stage 1, then stage 3 with each μ from that model, and instead of it
SFT on the chosen answers of the same pairs, as many steps at the same rate. The runs of a seed share the file of
reference log-probabilities. All is measured on held-out rows: which answer of a pair the policy
prefers, how far the log-probabilities of both answers drift from the reference, and the answers that are generated.
Prints a Markdown table of means and 95 % intervals (Student's t over seeds). Finished runs are kept.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %
MUS = (0.0, 0.1, 1.0)
SHARED = ("max_steps", "global_batch_size", "micro_batch_size", "learning_rate", "warmup_ratio")  # with stage 3
COLUMNS = (
    "preferred by reward, %", "preferred by likelihood, %", "chosen drift, nats/token", "rejected drift, nats/token",
    "ROUGE-L", "GLEU", "Distinct-2",
)  # fmt: skip


def call(recipe: str, *arguments: object) -> None:
    command = [sys.executable, ROOT / "recipes" / f"{recipe}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr.decode())


def evaluated(folder: Path, model: Path, run: Path, *arguments: object) -> dict:
    output = folder / "evaluation.json"
    if not output.exists():
        settings = ["--config", ROOT / "recipes/configs/demo/evaluate.toml", "--heldout", run / "corpus/heldout"]
        call("evaluate", *settings, "--model", model, "--output", output, *arguments)
    return json.loads(output.read_text(encoding="utf-8"))


def chosen_answers(preferences: Path, path: Path) -> Path:
    """The pairs' chosen answers as conversations."""
    rows = [json.loads(line) for file in sorted(preferences.glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    talks = [{"messages": [*row["prompt"], {"role": "assistant", "content": row["chosen"]}]} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(talk, ensure_ascii=False) + "\n" for talk in talks), encoding="utf-8")
    return path


def scores(before: dict, after: dict) -> list[float]:
    preference, reference, tasks = after["preference"], before["preference"], after["tasks"].values()
    drifts = [preference[name] - reference[name] for name in ("chosen_logp_per_token", "rejected_logp_per_token")]
    answers = [statistics.mean(task[name] for task in tasks) for name in ("rouge-l", "gleu", "distinct-2")]
    accuracies = [preference["reward_accuracy"], preference["likelihood_accuracy"]]
    return [*(100 * (value or 0) for value in accuracies), *drifts, *answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--output", type=Path, default=Path("runs/ablate_mu"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.seeds not in STUDENT:
        sys.exit(f"--seeds must be in 2 to 10, found {arguments.seeds}")
    train, configs = arguments.run / "corpus/train", ROOT / "recipes/configs/demo"
    found: dict[str, list[list[float]]] = {"after stage 2": [], **{f"μ = {mu:g}": [] for mu in MUS}}
    found["SFT on the chosen answers"] = []
    for seed in range(arguments.seeds):
        sft = arguments.output / f"sft_{seed}"
        call(
            "full_finetune", "--config", configs / "sft.toml", "--model", arguments.run / "cpt/model", "--output", sft,
            "--instructions", train / "generalist", train / "tasks_sample", "--seed", seed,
        )  # fmt: skip
        before = evaluated(sft, sft / "model", arguments.run)
        found["after stage 2"].append(scores(before, before))
        for mu in MUS:
            dfpo = arguments.output / f"dfpo_{seed}_{mu:g}"
            call(
                "dfpo", "--config", configs / "dfpo.toml", "--model", sft / "model", "--output", dfpo, "--mu", mu,
                "--preferences", train / "preferences", "--seed", seed, "--reference_logps",
                arguments.output / f"reference_{seed}.safetensors",
            )  # fmt: skip
            after = evaluated(dfpo, dfpo / "model", arguments.run, "--reference", sft / "model")
            found[f"μ = {mu:g}"].append(scores(before, after))
        sft_chosen = arguments.output / f"chosen_{seed}"
        stage = tomllib.loads((configs / "dfpo.toml").read_text(encoding="utf-8"))
        call(
            "full_finetune", "--config", configs / "sft.toml", "--model", sft / "model", "--output", sft_chosen,
            "--instructions", chosen_answers(train / "preferences", arguments.output / "chosen.jsonl"), "--seed", seed,
            *(f"--{name}={stage[name]}" for name in SHARED),
        )  # fmt: skip
        after = evaluated(sft_chosen, sft_chosen / "model", arguments.run, "--reference", sft / "model")
        found["SFT on the chosen answers"].append(scores(before, after))
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    print(f"| | {' | '.join(COLUMNS)} |\n|{':--|' + '--:|' * len(COLUMNS)}")
    for name, rows in found.items():
        cells = []
        for column in zip(*rows, strict=True):
            half = STUDENT[len(rows)] * statistics.stdev(column) / len(rows) ** 0.5
            cells.append(f"{statistics.mean(column):.2f} ± {half:.2f}")
        if name == "after stage 2":
            cells[0], cells[2:4] = "–", ["–", "–"]  # it is the reference
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
