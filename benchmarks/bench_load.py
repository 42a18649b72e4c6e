"""Loading a Baichuan2-7B-shaped checkpoint: time and peak memory beside reading the same bytes with safetensors.

    python benchmarks/bench_load.py --folder /tmp/baichuan2-7b-shaped

Writes a synthetic checkpoint of 15 GB into the folder (once; delete it afterwards). Every row is a process of its own;
"read" means that each page of each tensor has been touched, so a lazily mapped file counts only once it is there.
`--num_hidden_layers 2` makes a small one for a try.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

CONFIG = {
    "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "vocab_size": 125_696, "hidden_size": 4096,
    "intermediate_size": 11_008, "num_attention_heads": 32, "max_position_embeddings": 4096,
    "model_max_length": 4096, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def make(folder: Path, layers: int) -> None:
    """Random bf16 weights, 3 GiB a file; a slice of one block of noise per tensor, as making noise takes longest."""
    from pedgpt.models import ModelConfig, Transformer, checkpoint, save_model

    config = ModelConfig.from_hf({**CONFIG, "num_hidden_layers": layers})
    with torch.device("meta"):
        model = Transformer(config)
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def weights():
        for i, (name, meta) in enumerate(model.state_dict().items()):
            if meta.ndim == 1:
                yield name, torch.ones(meta.shape, dtype=torch.bfloat16)
                continue
            repeated = noise.roll(i * 9973).repeat(-(-meta.numel() // len(noise)))
            yield name, repeated[: meta.numel()].view(meta.shape)

    checkpoint.SHARD_BYTES = 3 * 2**30
    save_model(model, folder, weights())


def touch(tensors) -> int:
    return sum(int(t.detach().reshape(-1).view(torch.uint8)[::4096].sum()) for t in tensors)


def child(kind: str, folder: Path) -> None:
    """One measured way to load; prints JSON."""
    from safetensors.torch import load_file

    from pedgpt.models import load_model

    started = time.perf_counter()
    dtype = torch.float16 if " float16" in kind else None
    if kind.startswith("safetensors"):
        held = {}
        for file in sorted(folder.glob("*.safetensors")):
            part = load_file(file)
            held |= {name: part.pop(name).to(dtype) for name in list(part)} if dtype else part
        touch(held.values())
        size, forward = sum(t.nbytes for t in held.values()), None
    else:
        model = load_model(folder, dtype=dtype)
        size = sum(p.nbytes for p in model.parameters())
        touch(model.parameters())
        forward = None
    seconds = time.perf_counter() - started
    if "forward" in kind:
        started = time.perf_counter()
        with torch.no_grad():
            logits = model(torch.arange(16)[None])
        assert logits.isfinite().all()
        forward = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory too
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    print(json.dumps({"seconds": seconds, "forward": forward, "bytes": size, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--num_hidden_layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.folder)
    if not (arguments.folder / "config.json").exists():
        print(f"writing the checkpoint into {arguments.folder} …", flush=True)
        make(arguments.folder, arguments.num_hidden_layers)

    pairs = [("safetensors bfloat16", "pedgpt bfloat16"), ("safetensors float16", "pedgpt float16")]
    kinds = [kind for pair in pairs for kind in pair]
    command = [sys.executable, __file__, "--folder", str(arguments.folder), "--child"]
    results: dict[str, list[dict]] = {kind: [] for kind in [*kinds, "pedgpt bfloat16, forward"]}
    subprocess.run([*command, kinds[0]], check=True, capture_output=True)  # the first one fills the page cache
    for _ in range(arguments.repeats):
        for kind, found in results.items():
            found.append(json.loads(subprocess.run([*command, kind], check=True, capture_output=True).stdout))
    print(f"{'':28}{'read, s':>10}{'of safetensors':>16}{'peak RSS / weights':>20}")
    for kind, found in results.items():
        seconds = statistics.median(row["seconds"] for row in found)
        peer = next((pair[0] for pair in pairs if pair[1] == kind), None)
        ratio = f"{seconds / statistics.median(row['seconds'] for row in results[peer]):.2f}x" if peer else ""
        peak = max(row["peak"] for row in found)
        note = f"  forward of 16 tokens {found[-1]['forward']:.1f} s" if found[-1]["forward"] else ""
        print(f"{kind:28}{seconds:>10.2f}{ratio:>16}{peak / found[0]['bytes']:>20.3f}{note}")
    size = results[kinds[0]][0]["bytes"] / 2**30
    print(f"weights {size:.2f} GiB, median of {arguments.repeats}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
