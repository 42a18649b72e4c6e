"""What `--plan` says beside what a step really takes on this CPU, for all stages.

    python benchmarks/check_plan.py
    python benchmarks/check_plan.py --billion

The second command takes a model of a billion parameters, up to 18 GB of memory and ten minutes. Each run is a process
of its own: the recipe's model and loss, random weights, two steps of the training loop, so that the second finds the
optimizer's state. Measured is how much larger the process's peak of resident memory is than before the model came, when
Python, torch and a step of a toy model had taken theirs. Planned is the total without the libraries. The system maps
each tensor by itself (MALLOC_MMAP_THRESHOLD_), because glibc's heap keeps what was freed: for a model as small as the
first one up to a quarter of the whole, which says nothing of a card. Prints both, their ratio, and the bytes that were
measured for each parameter; exit status 1 if a plan is off by more than 10 %, or by 5 % for a billion parameters.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "model_type": "qwen3", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "head_dim": 64,
    "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 6, "max_position_embeddings": 2048,
}  # fmt: skip
BILLION = {
    **SHAPE, "vocab_size": 32_768, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
    "num_attention_heads": 16, "num_hidden_layers": 18,
}  # fmt: skip
TOY = {**SHAPE, "vocab_size": 64, "num_hidden_layers": 1}
COMMON = "--device cpu --row_length 256 --micro_batch_size 4 --global_batch_size 4 --max_steps 2 --checkpoint_every 0"
RUNS = [
    ("full_finetune", ""),
    ("full_finetune", "--activation_checkpointing block"),
    ("full_finetune", "--activation_checkpointing selective"),
    ("full_finetune", "--dtype bfloat16"),
    ("full_finetune", "--dtype bfloat16 --activation_checkpointing block"),
    ("full_finetune", "--micro_batch_size 2"),
    ("full_finetune", "--micro_batch_size 1 --row_length 768"),
    ("continued_pretrain", "--micro_batch_size 8 --global_batch_size 8 --row_length 128"),
    ("dfpo", "--micro_batch_size 2"),
    ("dfpo", "--activation_checkpointing block --global_batch_size 2"),
    ("dfpo", "--shared_prompt false --global_batch_size 2 --dtype bfloat16"),
    ("dfpo", "--adapter lora --global_batch_size 2"),
    ("expert_finetune", ""),
    ("expert_finetune", "--activation_checkpointing block"),
    ("expert_finetune", "--activation_checkpointing selective --dropout 0.1"),
    ("expert_finetune", "--dtype bfloat16 --row_length 512"),
    ("expert_finetune", "--dtype bfloat16 --row_length 2048 --activation_checkpointing block"),
    ("full_finetune", "--dtype bfloat16 --weight_dtype bfloat16 --optimizer_state bfloat16"),
    ("continued_pretrain", "--dtype bfloat16 --row_length 512 --adapter lora --quantize int8"),
    ("expert_finetune", "--dtype bfloat16 --row_length 2048 --activation_checkpointing block --quantize nf4"),
    ("full_finetune", "--plan 2x1 --global_batch_size 8"),
    ("full_finetune", "--plan 2x1 --global_batch_size 8 --row_length 512 --dtype bfloat16"),
    ("expert_finetune", "--plan 2x1 --global_batch_size 8 --row_length 512 --dtype bfloat16"),
]
BF16 = "--row_length 128 --micro_batch_size 1 --global_batch_size 1 --activation_checkpointing block --dtype bfloat16"
OF_A_BILLION = [
    ("full_finetune", BF16.replace("--dtype bfloat16", "")),
    ("full_finetune", f"{BF16} --weight_dtype bfloat16"),
    ("full_finetune", f"{BF16} --weight_dtype bfloat16 --optimizer_state bfloat16"),
    ("dfpo", f"{BF16} --adapter lora --quantize int8"),
    ("expert_finetune", BF16),
    ("expert_finetune", f"{BF16} --quantize int8"),
    ("expert_finetune", f"{BF16} --quantize nf4"),
]


def recipe(name: str):
    from pedgpt.data import full_pairs, full_rows

    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, full_pairs if name == "dfpo" else full_rows


def resident(peak: bool = False) -> int:
    """Bytes of this process that are in memory, now or at most; getrusage would count the parent's memory, too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status)[1])


def child(name: str, flags: list[str]) -> None:
    """Print what one run takes, in bytes."""
    from pedgpt import stage, training
    from pedgpt.models import ModelConfig, Transformer, save_model

    module, make_batch = recipe(name)
    config = training.parse_settings(module.Config, flags)
    config.plan = config.template_date = ""
    world = training.start("cpu")
    toy = Path(config.output) / "toy"
    if world.is_main:
        save_model(Transformer(ModelConfig.from_hf(TOY)), toy)
    training.distributed.all_values(None, world)  # wait for the first rank

    def train(settings) -> None:
        model, loss_function = module.model_and_loss(settings, world)
        stage.fill(model, settings, world)
        plan = training.BatchPlan.from_settings(2 * settings.global_batch_size, settings)

        def rows(indices, ids):
            return make_batch(settings, len(indices))

        training.train(model, plan, rows, loss_function, settings, world)

    train(replace(config, model=str(toy), row_length=16, output=f"{config.output}/toy"))
    before = resident()
    train(config)
    print("took", resident(peak=True) - before, flush=True)
    training.stop()
    os._exit(0)  # as run_recipe does under torchrun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose description contains this")
    parser.add_argument("--billion", action="store_true", help="a model of a billion parameters")
    arguments, rest = parser.parse_known_args()
    if rest[:1] == ["--child"]:
        return child(rest[1], rest[2:])

    from pedgpt.models import ModelConfig, Transformer, save_model
    from pedgpt.training import parse_settings
    from pedgpt.training.plan import LIBRARIES, cards, count

    off, allowed = 0, 0.05 if arguments.billion else 0.1
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as scratch:
        model = Transformer(ModelConfig.from_hf(BILLION if arguments.billion else SHAPE))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        save_model(model, scratch)
        del model
        print(f"{'taken at most by a step, MiB':128}{'planned':>10}{'measured':>10}{'ratio':>8}{'a parameter':>12}")
        for i, (name, changed) in enumerate(OF_A_BILLION if arguments.billion else RUNS):
            title = f"{name} {changed.replace('--', '')}"
            if arguments.only not in title:
                continue
            flags = f"--plan 1 --model {scratch} --output {scratch}/{i} {COMMON} {changed}".split()
            module, make_batch = recipe(name)
            config = parse_settings(module.Config, flags)
            ranks, _ = cards(config.plan)
            planned = sum(count(module.model_and_loss, make_batch, config).values()) - LIBRARIES
            launch = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split() * (ranks > 1)
            command = [sys.executable, *launch, __file__, "--child", name, *flags]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr)
            took = max(map(int, re.findall(r"took (\d+)", done.stdout)))
            off += abs(planned / took - 1) > allowed
            figures = f"{planned / 2**20:>10,.0f}{took / 2**20:>10,.0f}{planned / took:>8.3f}{took / parameters:>12.2f}"
            print(f"{title:128}{figures}", flush=True)
    sys.exit(f"{off} off by more than {allowed:.0%}" if off else 0)


if __name__ == "__main__":
    main()
