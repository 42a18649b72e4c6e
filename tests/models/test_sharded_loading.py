"""Two gloo processes fill a split model from a folder: each reads its own rows, and together they hold the whole."""

import json
import os
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pedgpt.models import load_model, load_weights, save_model
from pedgpt.models.weight_files import Weights


def worker(rank, folder, results):
    dist.init_process_group("gloo", init_method=f"file://{results}/meeting", rank=rank, world_size=2)
    read = 0
    rows = Weights.rows

    def counted(self, key, start, stop):
        nonlocal read
        part = rows(self, key, start, stop)
        read += part.nbytes
        return part

    Weights.rows = counted
    Weights.whole = None  # a rank has no use for whole tensors
    model = load_model(folder, dtype=torch.float32, device="meta")
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    load_weights(model, folder, dtype=torch.float32)
    held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    tokens = torch.arange(12)[None]
    logits = model(tokens).detach()
    model.reshard()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens).square().mean().backward()
    optimizer.step()
    whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    torch.save({"read": read, "held": held, "logits": logits, "after": whole}, f"{results}/{rank}.pt")
    while not os.path.exists(f"{results}/{1 - rank}.pt"):  # a rank that left early would break the other's collectives
        time.sleep(0.01)
    os._exit(0)  # torch's own threads now and then abort while a spawned process winds down


@pytest.mark.parametrize(
    ("kind", "stored"),
    [("qwen2", torch.bfloat16), ("baichuan-alibi", torch.float32)],  # tied, and with a normalised head
    ids=str,
)
def test_two_ranks_fill_their_halves_and_train_as_one(make_model, tmp_path, start_ranks, kind, stored):
    save_model(make_model(kind).to(stored), tmp_path / "model")
    whole = load_model(tmp_path / "model", dtype=torch.float32)
    start_ranks(worker, str(tmp_path / "model"), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    tokens = torch.arange(12)[None]
    logits = whole(tokens)
    logits.square().mean().backward()
    torch.optim.SGD(whole.parameters(), lr=0.1).step()
    stored_bytes = sum(tensor.nbytes for tensor in load_file(tmp_path / "model" / "model.safetensors").values())
    assert sum(rank["read"] for rank in ranks) == stored_bytes
    assert sum(rank["held"] for rank in ranks) == sum(parameter.nbytes for parameter in whole.parameters())
    assert max(rank["held"] for rank in ranks) < 0.53 * sum(rank["held"] for rank in ranks)  # 131 rows are odd
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], logits.detach(), atol=1e-6, rtol=0)
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(rank["after"][name], tensor, atol=1e-6, rtol=0)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == str(stored).removeprefix("torch.")


def test_a_model_on_the_meta_device_reads_no_weights(make_model, tmp_path):
    save_model(make_model("llama").to(torch.bfloat16), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model = load_model(tmp_path, dtype=torch.bfloat16, device="meta")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    with pytest.raises(ValueError, match="no weights"):
        load_weights(model, tmp_path)
