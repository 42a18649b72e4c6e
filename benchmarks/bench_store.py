"""Fine-tuning on many conversations: the memory of each rank, and the time to the first step, new and begun again.

    python benchmarks/bench_store.py --conversations 925000 --ranks 2

The conversations are synthetic (random words, 110 tokens each), the model is tiny, so that the data is what is seen.
Beside the number asked for it measures 2,000 conversations: what every run takes. Linux only: it reads /proc.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPECIAL = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]


def make_data(folder: Path, counts: list[int]) -> None:
    """Files of synthetic conversations, and a model of one layer with a tokenizer of 6,000 tokens."""
    from pedgpt.data import train_tokenizer
    from pedgpt.models import ModelConfig, Transformer, save_model

    draw = random.Random(0)
    words = ["".join(chr(0x4E00 + draw.randrange(2000)) for _ in range(2)) for _ in range(3000)]
    for count in counts:
        with open(folder / f"{count}.jsonl", "w", encoding="utf-8") as file:
            for i in range(count):
                question, answer = "".join(draw.choices(words, k=15)), "".join(draw.choices(words, k=40 + i % 80))
                file.write(f'{{"question": "合成{i}{question}", "answer": "{answer}"}}\n')
    texts = ["".join(draw.choices(words, k=200)) for _ in range(400)]
    tokenizer = train_tokenizer(texts, vocab_size=6000, special_tokens=SPECIAL)
    config = ModelConfig(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
    )  # fmt: skip
    save_model(Transformer(config), folder / "model")
    tokenizer.save(folder / "model")


def first_step(folder: Path, count: int, ranks: int) -> tuple[float, list[int]]:
    """Seconds to the first step, and each rank's peak MiB by then; the run is stopped, and leaves its tokens."""
    log = folder / f"run_{count}" / "metrics.jsonl"
    log.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(ROOT / "recipes" / "full_finetune.py"),
        "--model", str(folder / "model"), "--output", str(log.parent), "--instructions", str(folder / f"{count}.jsonl"),
        "--global_batch_size", str(ranks), "--device", "cpu", "--max_steps", "100000", "--checkpoint_every", "0",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (log.exists() and log.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before its first step")
        time.sleep(0.05)
    took = time.perf_counter() - began
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = [re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{worker}/status").read_text()) for worker in workers]
    process.terminate()
    process.wait()
    return took, [int(match[1]) // 1024 for match in found if match]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_data(Path(name), counts := [2000, arguments.conversations])
        for count, how in ((counts[0], "new"), (counts[1], "new"), (counts[1], "begun again")):
            took, peaks = first_step(Path(name), count, arguments.ranks)
            print(f"{count:,} conversations, {how}: first step after {took:.1f} s, peak MiB of each rank {peaks}")
