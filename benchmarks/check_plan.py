"""The memory plan against what runs really take: recipes/plan.py's total beside the peak resident size, on the CPU.

    python benchmarks/check_plan.py                                    # the demo model, all stages
    python benchmarks/check_plan.py --folder /tmp/baichuan2-7b-shaped  # and a 7B-shaped one, as bench_load.py makes it

Each run is a process of its own, with random tokens but otherwise as its recipe does it: two steps, so that the second
finds the optimizer's state. Prints predicted, measured and their ratio; exit status 1 if one is off by more than 10 %.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import torch

LAYOUT = "--batch_size 1 --generation_batch_size 1 --row_length 32 --max_new_tokens 16"
ROOT = Path(__file__).resolve().parents[1]
DEMO = [
    ("sft", ""),
    ("sft", "--activation_checkpointing block"),
    ("sft", "--micro_batch_size 8 --global_batch_size 16 --row_length 384"),
    ("sft", "--micro_batch_size 8 --global_batch_size 8 --dtype bfloat16"),
    ("sft", "--micro_batch_size 8 --global_batch_size 8 --dtype bfloat16 --activation_checkpointing block"),
    ("cpt", ""),
    ("cpt", "--micro_batch_size 16 --global_batch_size 16"),
    ("dfpo", ""),
    ("dfpo", "--activation_checkpointing block"),
    ("dfpo", "--micro_batch_size 4 --global_batch_size 4 --row_length 512"),
    ("dfpo", "--micro_batch_size 2 --lora_rank 8"),
    ("experts", ""),
    ("experts", "--activation_checkpointing block"),
    ("experts", "--micro_batch_size 6 --global_batch_size 12 --row_length 600"),
    ("experts", "--micro_batch_size 8 --global_batch_size 8 --row_length 512 --dtype bfloat16"),
    ("sft", "--micro_batch_size 8 --global_batch_size 16 --ranks 2"),
    ("experts", "--micro_batch_size 4 --global_batch_size 8 --dtype bfloat16 --ranks 2"),
    ("generate", "--batch_size 1 --generation_batch_size 16 --row_length 512"),
    ("generate", "--batch_size 1 --generation_batch_size 32 --row_length 256"),
    ("generate", "--batch_size 1 --generation_batch_size 8 --row_length 640 --dtype bfloat16"),
]
LARGE = [
    ("generate", "--batch_size 1 --generation_batch_size 4 --row_length 64 --max_new_tokens 960 --dtype bfloat16"),
    ("experts", "--micro_batch_size 1 --global_batch_size 1 --row_length 256 --dtype bfloat16"),
]


def child(plan, arguments: list[str]) -> None:
    """One run; prints the peak resident size in bytes."""
    from pedgpt import training
    from pedgpt.adapters import inject_experts, inject_lora, set_noise_rows
    from pedgpt.data import EncodedPair, collate, collate_pairs
    from pedgpt.data.examples import Example
    from pedgpt.data.packing import Row
    from pedgpt.losses import linear_cross_entropy, linear_dfpo_loss, linear_sequence_logps
    from pedgpt.models import generation, load_model, load_weights
    from pedgpt.training.distributed import autocast

    config = training.parse_settings(plan.settings_of(arguments), arguments)
    stage, dtype, world = config.planned, getattr(torch, config.dtype), training.start("cpu")
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(5, 3000, (count,), generator=generator).tolist()

    def rows(count: int) -> list[Row]:
        length, half = config.row_length, config.row_length // 2
        return [Row(tokens(length), tokens(length), [0] * half + [1] * (length - half)) for _ in range(count)]

    if stage == "generate":
        class Touched(generation.KVCache):
            """A cache whose whole memory is there at once; filling it token by token takes too long here."""

            def __init__(self, *arguments) -> None:
                super().__init__(*arguments)
                self.keys.zero_()
                self.values.zero_()

        generation.KVCache = Touched
        model = load_model(config.model, dtype=dtype)
        prompts = [tokens(config.row_length - i) for i in range(config.generation_batch_size)]
        step = generation.generate_steps(model, prompts, max_new_tokens=config.max_new_tokens)
        for _ in range(3):
            next(step)
    else:
        full = stage in ("cpt", "sft") or (stage == "dfpo" and not config.lora_rank)
        stored = torch.float32 if full else dtype
        model = load_model(config.model, dtype=stored, device="meta")
        if stage == "experts":
            inject_experts(model, rank=config.rank, num_specific_experts=config.num_specific_experts)
        elif not full:
            inject_lora(model, rank=config.lora_rank)
        model.activation_checkpointing = config.activation_checkpointing
        training.shard(model, model.model.layers, world, dtype)
        load_weights(model, config.model, dtype=stored)

        def next_token(model, batch):
            if stage == "experts":
                set_noise_rows(model, 0, batch.row_ids)
            hidden = model.hidden_states(batch.tokens, documents=batch.documents)
            normalize = model.config.normalize_head
            loss = linear_cross_entropy(hidden, model.lm_head.weight, batch.labels, num_tokens=1, normalize=normalize)
            return loss, {}

        def head(model, batch):
            hidden = model.hidden_states(batch.tokens, documents=batch.documents, branches=batch.branches)
            normalized = {"sequences": batch.sequences, "normalize": model.config.normalize_head}
            return (hidden, model.lm_head.weight, batch.labels), normalized

        def preference(model, batch):
            operands, options = head(model, batch)
            return linear_dfpo_loss(*operands, *batch.reference_logps.chunk(2), **options).loss, {}

        def pair() -> EncodedPair:  # with nothing in common
            return EncodedPair(*(Example(tokens(config.row_length), tokens(config.row_length), "") for _ in range(2)))

        held = [pair() if stage == "dfpo" else rows(1)[0] for _ in range(2 * config.global_batch_size)]

        def make(indices, ids):
            chosen = [held[i] for i in indices]
            if stage == "dfpo":
                return collate_pairs(chosen, ids, shared_prompt=config.shared_prompt)
            return collate(chosen, ids)

        if stage == "dfpo":  # the reference
            with torch.no_grad(), autocast(world, dtype):
                batch = make(range(config.micro_batch_size), range(config.micro_batch_size))
                operands, options = head(model, batch)
                linear_sequence_logps(*operands, num_sequences=len(batch.counts), **options)
        config.max_steps = 2
        batches = training.BatchPlan.from_settings(2 * config.global_batch_size, config)
        training.train(model, batches, make, preference if stage == "dfpo" else next_token, config, world)
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory too
    print("peak", 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]), flush=True)
    training.stop()
    os._exit(0)  # as run_recipe does under torchrun


def load_plan():
    import importlib.util

    spec = importlib.util.spec_from_file_location("plan", ROOT / "recipes" / "plan.py")
    sys.modules["plan"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def predicted(text: str) -> float:
    """The largest total of plan.py's table, in bytes."""
    unit = {"MiB": 2**20, "GiB": 2**30}[re.search(r"(\w+) per rank, at", text)[1]]
    totals = re.search(r"^total +(.*)$", text, re.MULTILINE)[1].replace(",", "").split()
    return max(map(float, totals)) * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a 7B-shaped checkpoint in bfloat16")
    parser.add_argument("--only", default="", help="runs whose description contains this")
    arguments, rest = parser.parse_known_args()
    if rest[:1] == ["--child"]:
        return child(load_plan(), rest[1:])

    from pedgpt.models import ModelConfig, Transformer, save_model

    off = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        base = tomllib.loads((ROOT / "recipes/configs/demo/base.toml").read_text())
        kind = {"model_type": "baichuan", "pedgpt_positions": "rope", "pedgpt_norm_head": True}
        demo = ModelConfig.from_hf({**kind, **base})
        save_model(Transformer(demo), Path(scratch) / "demo")
        runs = [("demo", Path(scratch) / "demo", *run) for run in DEMO]
        wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 8}
        save_model(Transformer(ModelConfig.from_hf({**kind, **base, **wide})), Path(scratch) / "wide")
        runs += [("demo", Path(scratch) / "wide", "generate", LAYOUT)]  # whose second copy of the weights counts
        runs += [("baichuan2_7b", arguments.folder, *run) for run in LARGE if arguments.folder]
        print(f"{'peak resident memory, MiB':106}{'plan':>10}{'measured':>10}{'ratio':>8}")
        for i, (shape, folder, stage, changed) in enumerate(runs):
            name = f"{shape} {stage} {changed.replace('--', '')}"
            if arguments.only not in name:
                continue
            file = ROOT / "recipes" / "configs" / shape / f"{'evaluate' if stage == 'generate' else stage}.toml"
            flags = ["--config", str(file), "--model", str(folder), "--output", f"{scratch}/{i}", "--device", "cpu"]
            flags += changed.split()
            run = {"capture_output": True, "text": True, "env": environment}
            plan = subprocess.run([sys.executable, str(ROOT / "recipes/plan.py"), *flags], **run)
            launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split() * ("--ranks 2" in changed)
            done = subprocess.run([sys.executable, *launch, __file__, "--child", *flags], **run)
            if plan.returncode > 1 or done.returncode:
                sys.exit(plan.stderr + done.stderr)
            want, got = predicted(plan.stdout), max(map(int, re.findall(r"peak (\d+)", done.stdout)))
            off += abs(want / got - 1) > 0.1
            print(f"{name:106}{want / 2**20:>10,.0f}{got / 2**20:>10,.0f}{want / got:>8.3f}", flush=True)
    sys.exit(f"{off} off by more than 10 %" if off else 0)


if __name__ == "__main__":
    main()
