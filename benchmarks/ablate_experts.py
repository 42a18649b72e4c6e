"""Stage 4 on the sample corpus, with five seeds: experts against a LoRA, against all parameters, and their number.

    make demo && python benchmarks/ablate_experts.py --run runs/demo

Every arm starts from the demo's model of stage 3 and sees the same rows for as many steps. What the paper reports:
experts beat one LoRA of equal rank and full fine-tuning, three specific experts are best, and the universal one helps.
All is measured on held-out rows. Prints a Markdown table of means and 95 % intervals (Student's t over seeds).
Finished runs are kept. `--workers 2` runs two arms at a time.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %
ARMS = {  # name: (kind, settings)
    "3 experts and the universal one": ("experts", {"num_specific_experts": 3}),
    "LoRA, rank 64": ("lora", {"rank": 64, "alpha": 128}),
    "3 experts, none universal": ("no universal", {"num_specific_experts": 3}),
    "all parameters": ("full", {"learning_rate": 5e-4}),
    "LoRA, rank 16": ("lora", {"rank": 16}),
    "1 expert and the universal one": ("experts", {"num_specific_experts": 1}),
    "5 experts and the universal one": ("experts", {"num_specific_experts": 5}),
    "2 experts and the universal one": ("experts", {"num_specific_experts": 2}),
    "4 experts and the universal one": ("experts", {"num_specific_experts": 4}),
}
COLUMNS = ("trainable", "ROUGE-L", "perplexity of instructions", "of general medical text", "of general text")


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"recipes/{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lora_instead(stage) -> None:
    """Let the recipe of stage 4 train a plain LoRA: no gate, no noise."""
    from pedgpt.adapters import inject_lora

    def inject(model, *, num_specific_experts, **settings):
        return inject_lora(model, **settings)

    class Gates:
        def __enter__(self):
            return {}

        def __exit__(self, *_):
            pass

    stage.inject_experts, stage.record_gates = inject, lambda *_, **__: Gates()
    stage.gate_metrics, stage.set_noise_rows = lambda _: {}, lambda *_: None


def without_universal(stage) -> None:
    """Keep the universal expert's B at zero, where it starts, so that it adds nothing."""
    from pedgpt.adapters import ExpertLoRALinear

    real = stage.inject_experts

    def inject(model, **settings):
        names = real(model, **settings)
        for layer in model.modules():
            if isinstance(layer, ExpertLoRALinear):
                layer.lora_B.register_hook(lambda grad, rank=layer.rank: _zeroed(grad, rank))
        return names

    stage.inject_experts = inject


def _zeroed(grad, rank):
    grad = grad.clone()
    grad[:, :rank] = 0
    return grad


def train_and_evaluate(run: Path, output: Path, arm: str, seed: int) -> None:
    kind, settings = ARMS[arm]
    stage = recipe("full_finetune" if kind == "full" else "expert_finetune")
    {"lora": lora_instead, "no universal": without_universal}.get(kind, lambda _: None)(stage)
    from pedgpt.files import read_toml

    common = read_toml(ROOT / "recipes/configs/demo/experts.toml")
    known = {name for name in stage.Config.__dataclass_fields__}
    rows = [str(run / "corpus/train" / name) for name in ("tasks", "generalist/general_medical")]
    values = {**common, **settings, "instructions": rows, "model": str(run / "dfpo/model"), "output": str(output)}
    values |= {"seed": seed, "evaluate_every": 0, "device": "cpu"}
    stage.main(stage.Config(**{name: value for name, value in values.items() if name in known}))
    evaluate = recipe("evaluate")
    model = {"model": str(output / "model")} if kind == "full" else {"adapter": str(output / "adapter")}
    settings = read_toml(ROOT / "recipes/configs/demo/evaluate.toml")
    evaluate.main(
        evaluate.Config(
            **settings, **{"model": str(run / "dfpo/model"), **model}, heldout=str(run / "corpus/heldout"),
            output=str(output / "evaluation.json"), device="cpu",
        )
    )  # fmt: skip


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
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        return train_and_evaluate(arguments.run, arguments.output, arguments.arm, arguments.seed)
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
        found = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
        rouge = statistics.mean(task["rouge-l"] for task in found["tasks"].values())
        losses = [found["perplexity"][name] for name in ("instructions", "general_medical_text", "general_text")]
        return arm, [trainable(output), rouge, *losses]

    alone = {"OMP_NUM_THREADS": "1"} if arguments.workers > 1 else {}
    jobs = [(arm, seed) for arm in arguments.arms for seed in range(arguments.seeds)]
    rows: dict[str, list[list[float]]] = {}
    with ThreadPoolExecutor(arguments.workers) as pool:
        for arm, row in pool.map(work, jobs):
            rows.setdefault(arm, []).append(row)
    print(f"| | {' | '.join(COLUMNS)} |\n|{':--|' + '--:|' * len(COLUMNS)}")
    for arm, found in rows.items():
        cells = [f"{found[0][0]:,}"]
        for column in list(zip(*found, strict=True))[1:]:
            half = STUDENT[len(found)] * statistics.stdev(column) / len(found) ** 0.5
            cells.append(f"{statistics.mean(column):.2f} ± {half:.2f}")
        print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
