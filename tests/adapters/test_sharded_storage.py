"""Two gloo processes save the adapter of a split model: byte for byte the files of one process."""

import os
import time

import torch
import torch.distributed as dist

from pedgpt.adapters import inject_experts, inject_lora, load_adapter, save_adapter
from pedgpt.models import ModelConfig, Transformer
from pedgpt.training import World, gather_weights, shard

# One router row over two ranks leaves the second nothing; three rows, 35 and 45 divide by two neither.
CASES = {
    "one expert": (inject_experts, {"num_specific_experts": 1, "rank": 3}),
    "three experts": (inject_experts, {"num_specific_experts": 3, "rank": 5, "rslora": True}),
    "variants": (
        inject_experts,
        {"num_specific_experts": [1, 3], "rank": 3, "num_universal_experts": 2, "shared_A": True, "top_k": 1},
    ),
    "lora": (inject_lora, {"rank": 3, "dropout": 0.1}),
    "lora of rank 1": (inject_lora, {"rank": 1, "rslora": True, "target_modules": ["down_proj"]}),
}
SIZES = {
    "model_type": "llama", "vocab_size": 37, "hidden_size": 35, "intermediate_size": 45, "num_hidden_layers": 2,
    "num_attention_heads": 5, "head_dim": 8, "num_key_value_heads": 5, "max_position_embeddings": 16,
}  # fmt: skip


def make(case):
    """The tiny model with an adapter of random values, the same in every process."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_hf(SIZES))
    inject, settings = CASES[case]
    inject(model, alpha=5, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"))
    refusals = {}
    for case in CASES:
        model = make(case)
        shard(model, model.model.layers, world, torch.float32)

        def save(weights, model=model, case=case):
            save_adapter(model, f"{folder}/two/{case}", base_model="base", state_dict=dict(weights))

        gather_weights(model, world, save, trainable_only=True)
        local = {name: tensor.to_local() for name, tensor in model.state_dict().items()}
        for label, weights in (("none", None), ("dtensors", model.state_dict()), ("shards", local)):
            try:
                save_adapter(model, f"{folder}/refused", state_dict=weights)
            except ValueError as error:
                refusals[case, label] = str(error)
        try:
            load_adapter(model, f"{folder}/one/{case}")
        except ValueError as error:
            refusals[case, "load"] = str(error)
    torch.save(refusals, f"{folder}/{rank}.pt")
    while not os.path.exists(f"{folder}/{1 - rank}.pt"):  # a rank that left early would break the other's collectives
        time.sleep(0.01)
    os._exit(0)  # torch's own threads now and then abort while a spawned process winds down


def test_two_ranks_save_the_files_of_one_and_refuse_shards(tmp_path, start_ranks):
    for case in CASES:
        save_adapter(make(case), tmp_path / "one" / case, base_model="base")
    start_ranks(worker, str(tmp_path))
    for case in CASES:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "two" / case / file).read_bytes() == (tmp_path / "one" / case / file).read_bytes()
    for rank in range(2):
        refusals = torch.load(tmp_path / f"{rank}.pt")
        for case in CASES:
            for label in ("none", "dtensors", "shards"):
                message = refusals[case, label]
                assert message.startswith("model.layers.0.") and "pedgpt.training.gather_weights" in message
                assert ".lora_" in message and "expected the whole [" in message
            assert "FSDP2 has split the model" in refusals[case, "load"]
    assert not (tmp_path / "refused").exists()
