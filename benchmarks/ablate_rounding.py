"""Stage 1 of the demo with all numbers in bfloat16, rounded stochastically or to the nearest, against float32.

    make demo && python benchmarks/ablate_rounding.py --run runs/demo

Every arm starts from the demo's random model and sees the same rows for 500 steps of 384 tokens, with stage 1's
settings and a tenth of its learning rate: at 0.003, which only so small a model takes, most steps are larger than the
distance between two numbers of bfloat16. In bfloat16 are the weights, the gradients, both moments of AdamW and the
computation. Prints a Markdown table of the loss at the end, on held-out rows and as the mean of the last 50 steps:
means and 95 % intervals (Student's t over seeds) above the float32 run of the same seed. Finished runs are kept.
`--workers 2` runs two at a time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ablate_experts import ROOT, STUDENT, recipe

BFLOAT16 = {"dtype": "bfloat16", "weight_dtype": "bfloat16", "optimizer_state": "bfloat16"}
ARMS = {"float32": {}, "bfloat16, rounded stochastically": BFLOAT16, "bfloat16, rounded to the nearest": BFLOAT16}


def train(run: Path, output: Path, arm: str, seed: int, steps: int, rate: float) -> None:
    import torch

    from pedgpt import training
    from pedgpt.files import read_toml
    from pedgpt.kernels import optimizer

    stage, loop = recipe("continued_pretrain"), training.train
    if arm.endswith("nearest"):
        optimizer._store = lambda target, value, random: target.copy_(value)
    values = {**read_toml(ROOT / "recipes/configs/demo/cpt.toml"), **ARMS[arm], "seed": seed, "device": "cpu"}
    values |= {"model": str(run / "base"), "corpus": str(run / "corpus"), "output": str(output), "max_steps": steps}
    values |= {
        "learning_rate": rate,
        "row_length": 192,
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "evaluate_every": 0,
    }
    config = stage.Config(**values)

    def checked(model, *rest, **named):
        found = {parameter.dtype for parameter in model.parameters()}
        assert found == {getattr(torch, config.weight_dtype)}, f"weights in {found} are not what this arm says"
        loop(model, *rest, **named)

    training.train = checked
    stage.main(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--output", type=Path, default=Path("runs/ablate_rounding"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        given = arguments.arm, arguments.seed, arguments.steps, arguments.learning_rate
        return train(arguments.run, arguments.output, *given)
    if arguments.seeds not in STUDENT:
        sys.exit(f"--seeds must be in 2 to 10, found {arguments.seeds}")

    def losses(job):
        arm, seed = job
        output = arguments.output / f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}"
        if not (output / "done.json").exists():
            command = [sys.executable, __file__, "--run", arguments.run, "--output", output]
            command += ["--arm", arm, "--seed", str(seed), "--steps", str(arguments.steps)]
            command += ["--learning_rate", str(arguments.learning_rate)]
            done = subprocess.run(command, capture_output=True, env={**os.environ, **alone})
            if done.returncode:
                sys.exit(done.stderr.decode())
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        heldout, trained = steps[-1]["eval_loss"], statistics.mean(step["loss"] for step in steps[-50:])
        print(f"{arm}, seed {seed}: {heldout:.4f}, {steps[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
        return heldout, trained

    alone = {"OMP_NUM_THREADS": "1"} if arguments.workers > 1 else {}
    jobs = [(arm, seed) for seed in range(arguments.seeds) for arm in ARMS]
    with ThreadPoolExecutor(arguments.workers) as pool:
        found = dict(zip(jobs, pool.map(losses, jobs), strict=True))

    def interval(values: list[float]) -> str:
        half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
        return f"{statistics.mean(values):.3f} ± {half:.3f}"

    print("| | held-out loss | above float32, % | training loss | above float32, % |\n|:--|--:|--:|--:|--:|")
    for arm in ARMS:
        cells = []
        for kind in (0, 1):
            pairs = [(found[arm, seed][kind], found["float32", seed][kind]) for seed in range(arguments.seeds)]
            cells += [interval([loss for loss, _ in pairs]), interval([100 * (a / b - 1) for a, b in pairs])]
        print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
