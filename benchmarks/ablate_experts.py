"""Stage 4 with five seeds: the variants of experts against one LoRA, against all parameters, and their number.

    make demo && python benchmarks/ablate_experts.py --run runs/demo

Every arm starts from the run's model of stage 3 and sees the same rows for as many steps. What the paper reports:
experts beat one LoRA of equal rank and full fine-tuning, three specific experts are best, and the universal one helps.
The variants (docs/experts.md) have as many trainable parameters as the paper's form, up to 1.4 %, by their rank.
All is measured on held-out rows. Prints a Markdown table of means and 95 % intervals (Student's t over seeds); a star
marks what differs from the first arm: the interval of the difference, seed by seed, excludes 0. `--plot FILE` draws it.
The last column is the log-probability per token (nats) of the answers that the held-out preference pairs prefer.
Finished runs are kept. `--workers 2` runs two arms at a time. `--cost` measures instead what a training step of each
arm takes, as a multiple of the first arm's step in the same round, and its tensors beside weights and AdamW's state.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %
ARMS = {  # name: settings beside the demo's; the experts' rank is 16 where nothing else is said
    "3 experts and the universal one": {},
    "LoRA, rank 66": {"adapter": "lora", "rank": 66, "alpha": 132},
    "top-1 of 3 experts and the universal one": {"top_k": 1},
    "3 experts with a shared A and the universal one": {"shared_A": True, "rank": 23, "alpha": 46},
    "4 experts, none universal": {"num_specific_experts": 4, "num_universal_experts": 0},
    "2 experts and two universal ones": {"num_specific_experts": 2, "num_universal_experts": 2},
    "2 experts in the first half, 4 in the second": {"num_specific_experts": {"*.layers.[01].*": 2, "*": 4}},
    "3 experts and the universal one, balance 0.01": {"balance": 0.01},
    "all parameters": {"adapter": "none", "learning_rate": 5e-4},
    "LoRA, rank 16": {"adapter": "lora"},
    "LoRA, rank 64": {"adapter": "lora", "rank": 64, "alpha": 128},
    "1 expert and the universal one": {"num_specific_experts": 1},
    "2 experts and the universal one": {"num_specific_experts": 2},
    "4 experts and the universal one": {"num_specific_experts": 4},
    "5 experts and the universal one": {"num_specific_experts": 5},
}
TEXTS = ("instructions", "general_medical_text", "general_text")
COLUMNS = ("trainable", "ROUGE-L", *(f"perplexity of {name}".replace("_", " ") for name in TEXTS), "preferred answers")


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"recipes/{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_of(run: Path, arm: str, seed: int, output: Path):
    """The settings of stage 4 for one arm."""
    from pedgpt.files import read_toml

    settings = {**read_toml(ROOT / "recipes/configs/demo/experts.toml"), **ARMS[arm]}
    if settings.get("adapter") in ("lora", "none"):
        del settings["num_specific_experts"]
    if settings.get("adapter") == "none":
        del settings["rank"], settings["alpha"]
    rows = [run / "corpus/train/tasks", run / "corpus/train/generalist/general_medical"]
    settings |= {"seed": seed, "evaluate_every": 0, "device": "cpu", "model": str(run / "dfpo/model")}
    settings |= {"instructions": [str(path) for path in rows if path.exists()], "output": str(output)}
    return recipe("expert_finetune").Config(**settings)


def train_and_evaluate(run: Path, output: Path, arm: str, seed: int) -> None:
    from pedgpt.files import read_toml

    evaluate, settings = recipe("evaluate"), settings_of(run, arm, seed, output)
    recipe("expert_finetune").main(settings)
    trained = "model" if settings.adapter == "none" else "adapter"
    system = {"model": str(run / "dfpo/model"), trained: str(output / trained)}
    settings = read_toml(ROOT / "recipes/configs/demo/evaluate.toml") | {"heldout": str(run / "corpus/heldout")}
    evaluate.main(evaluate.Config(**settings, **system, output=str(output / "evaluation.json"), device="cpu"))


def cost(run: Path, arms: list[str], rounds: int = 16) -> None:
    """Print what a step of each arm takes: full rows, of which half carries loss; forward, backward and update."""
    from bench_operators import processor
    from profiled_memory import peak_bytes

    from pedgpt import stage, training
    from pedgpt.data import full_rows
    from pedgpt.losses import IGNORE_INDEX
    from pedgpt.training import loop
    from pedgpt.training.optim import build_optimizer

    world, steps = training.start("cpu"), {}
    for arm in arms:
        settings = settings_of(run, arm, 0, Path("unused"))
        model, loss = recipe("expert_finetune").model_and_loss(settings, world)
        stage.fill(model, settings, world)
        batch, optimizer = full_rows(settings, settings.micro_batch_size), build_optimizer(model, settings)
        batch.labels[:, ::2] = IGNORE_INDEX
        given = model.train(), optimizer, [batch], loss, settings, world
        steps[arm] = lambda given=given: loop._step(*given)
        steps[arm]()
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in random.sample(arms, len(arms)):
            started = time.perf_counter()
            steps[arm]()
            seconds[arm].append(time.perf_counter() - started)
    print(f"{processor()}\n\n| | time of a step, median and quartiles | memory, MiB |\n|:--|--:|--:|")
    for arm in arms:
        ratios = [a / b for a, b in zip(seconds[arm], seconds[arms[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {arm} | {middle:.2f}× ({low:.2f} to {high:.2f}) | {peak_bytes(steps[arm]) / 2**20:.0f} |")


def scores(evaluation: Path) -> list[float]:
    """What `COLUMNS` names after the first; NaN for what the corpus has no rows of."""
    found = json.loads(evaluation.read_text(encoding="utf-8"))
    rouge = np.mean([task["rouge-l"] for task in found["tasks"].values()] or np.nan)
    preferred = (found["preference"] or {}).get("chosen_logp_per_token", float("nan"))
    return [rouge, *(found["perplexity"].get(name, float("nan")) for name in TEXTS), preferred]


def draw(path: Path, before: list[float], means: dict[str, list[tuple[float, float]]]) -> None:
    """Every column's means with unpaired intervals, a row for each arm; a line marks the model before stage 4."""
    from matplotlib.figure import Figure

    shown = [column for column, value in enumerate(before) if value == value]
    figure = Figure(figsize=(3.5 + 2.6 * len(shown), 1.2 + 0.32 * len(means)), layout="constrained")
    places = range(len(means))[::-1]
    for axes, column in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        values, halves = zip(*(row[column] for row in means.values()), strict=True)
        axes.axvline(before[column], color="#9AA1AB", linestyle="--", label="before stage 4")
        axes.errorbar(values, places, xerr=halves, fmt="o", color="#2F6DB5", capsize=3)
        axes.set_title(COLUMNS[column + 1], fontsize=9)
        axes.set_yticks(places, means)
        axes.set_ylim(-0.5, len(means) - 0.5)
        axes.grid(axis="x", color="#E7EAEE")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", frameon=False)
    figure.savefig(path, dpi=110)


def trainable(output: Path) -> int:
    from safetensors import safe_open

    (path,) = [*output.glob("adapter/*.safetensors"), *output.glob("model/*.safetensors")]
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--output", type=Path, default=Path("runs/ablate_experts"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these")
    parser.add_argument("--plot", type=Path, help="a PNG file")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        return train_and_evaluate(arguments.run, arguments.output, arguments.arm, arguments.seed)
    if arguments.cost:
        return cost(arguments.run, arguments.arms)
    if arguments.seeds not in STUDENT:
        sys.exit(f"--seeds must be in 2 to 10, found {arguments.seeds}")

    def work(job):
        arm, seed = job
        output = arguments.output / f"{arm.replace(' ', '_')}_{seed}"
        if not (output / "evaluation.json").exists():
            command = [sys.executable, __file__, "--run", arguments.run, "--output", output]
            command += ["--arm", arm, "--seed", str(seed)]
            done = subprocess.run(command, capture_output=True, env={**os.environ, **alone})
            if done.returncode:
                sys.exit(done.stderr.decode())
        print(f"{arm}, seed {seed}: done", file=sys.stderr, flush=True)
        if json.loads((output / "evaluation.json").read_text(encoding="utf-8"))["model"] != str(model):
            sys.exit(f"{output} was not trained from {model}; give another --output")
        return arm, [trainable(output), *scores(output / "evaluation.json")]

    model, arms = arguments.run / "dfpo/model", list(dict.fromkeys(arguments.arms))
    if not (stage_3 := arguments.run / "evaluation/dfpo.json").exists():
        sys.exit(f"{stage_3}: no such file; --run needs a finished demo with held-out rows")
    before, means = scores(stage_3), {}
    alone = {"OMP_NUM_THREADS": "1"} if arguments.workers > 1 else {}
    jobs = [(arm, seed) for arm in arms for seed in range(arguments.seeds)]
    rows: dict[str, list[list[float]]] = {}
    with ThreadPoolExecutor(arguments.workers) as pool:
        for arm, row in pool.map(work, jobs):
            rows.setdefault(arm, []).append(row)
    print(f"| | {' | '.join(COLUMNS)} |\n|{':--|' + '--:|' * len(COLUMNS)}")
    print(f"| before stage 4 | – | {' | '.join('–' if value != value else f'{value:.2f}' for value in before)} |")
    factor = STUDENT[arguments.seeds] / arguments.seeds**0.5
    for arm, found in rows.items():
        columns = np.array(found)[:, 1:]
        means[arm] = list(zip(columns.mean(0), factor * columns.std(0, ddof=1), strict=True))
        paired = columns - np.array(rows[arms[0]])[:, 1:]
        stars = np.where(abs(paired.mean(0)) > factor * paired.std(0, ddof=1), "*", "")
        cells = [f"{value:.2f} ± {half:.2f}{star}" for (value, half), star in zip(means[arm], stars, strict=True)]
        cells = ["–" if first != first else cell for first, cell in zip(before, cells, strict=True)]
        print(f"| {arm} | {found[0][0]:,} | {' | '.join(cells)} |")
    if arguments.plot:
        draw(arguments.plot, before, means)


if __name__ == "__main__":
    main()
