"""What loading costs in memory, measured from outside on a checkpoint that outweighs the libraries' own noise."""

import re
from pathlib import Path

import pytest
import torch

from pedgpt.models import ModelConfig, Transformer, checkpoint, load_model, save_model


def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def load_measured(rank, folder, dtype, result):
    """The bytes of the weights, and by how many the peak of memory has grown when all have been read."""
    before = peak()
    model = load_model(folder, dtype=dtype)
    for parameter in model.parameters():
        parameter.detach().flatten()[::512].sum()  # a number of every page
    Path(result).write_text(f"{sum(p.nbytes for p in model.parameters())} {peak() - before}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """300 MB of bfloat16, as three safetensors shards and as one .bin file."""
    shards, single = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("bin")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = ModelConfig.from_hf({"model_type": "llama", "vocab_size": 32_000, **sizes})
    with torch.device("meta"):
        model = Transformer(config)
    weights = {name: torch.full(t.shape, 0.5, dtype=torch.bfloat16) for name, t in model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", 120 * 2**20)
        save_model(model, shards, weights)
    (single / "config.json").write_bytes((shards / "config.json").read_bytes())
    torch.save(weights, single / "pytorch_model.bin")
    return {"safetensors": shards, "bin": single}


@pytest.mark.parametrize(("stored", "dtype"), [("safetensors", torch.float16), ("bin", torch.bfloat16)])
def test_peak_is_the_weights_themselves_whatever_their_dtype(folders, tmp_path, start_ranks, stored, dtype):
    start_ranks(load_measured, str(folders[stored]), dtype, str(tmp_path / "result"), ranks=1)
    weights, grown = map(int, (tmp_path / "result").read_text().split())
    assert weights == 2 * 166_212_608
    # The mapping of up to 64 MiB and the libraries' own pages come on top: 5 % of a model of 2 GB or more.
    assert 0.9 * weights < grown < weights + 100 * 2**20
