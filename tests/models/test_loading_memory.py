"""What loading costs in memory, measured from outside on a checkpoint that outweighs the libraries' own noise."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pedgpt.models import ModelConfig, Transformer, checkpoint, save_model

SCRIPT = """
import re, sys, torch
from pedgpt.models import load_model

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = peak()
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
touched = sum(float(p.detach().flatten()[::512].sum()) for p in model.parameters())  # a number of every page
print(sum(p.nbytes for p in model.parameters()), peak() - before)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """300 MB of bfloat16, as three safetensors shards and as one .bin file."""
    shards, single = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("bin")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = ModelConfig.from_hf({"model_type": "llama", "vocab_size": 32_000, **sizes})
    with torch.device("meta"):
        names = Transformer(config).state_dict()
    weights = {name: torch.full(tensor.shape, 0.5, dtype=torch.bfloat16) for name, tensor in names.items()}
    model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", 120 * 2**20)
        save_model(model, shards)
    save_model(model, single)
    torch.save(load_file(single / "model.safetensors"), single / "pytorch_model.bin")
    (single / "model.safetensors").unlink()
    return {"safetensors": shards, "bin": single}


@pytest.mark.parametrize(
    ("stored", "dtype"), [("safetensors", "float16"), ("bin", "bfloat16")]
)
def test_peak_is_the_weights_themselves_whatever_their_dtype(folders, stored, dtype):
    command = [sys.executable, "-c", SCRIPT, str(folders[stored]), dtype]
    weights, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert weights == {"float32": 4}.get(dtype, 2) * 166_212_608
    # The mapping of up to 64 MiB and the libraries' own pages come on top: 5 % of a model of 2 GB or more.
    assert 0.9 * weights < peak < weights + 100 * 2**20
