"""The memory formulas against what autograd keeps, tensor by tensor, and what modules and caches really hold."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pedgpt.models import ModelConfig, Transformer, memory
from pedgpt.models.cache import KVCache

BASE = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 6, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip
CONFIGS = {
    "baichuan2 7b": {"model_type": "baichuan", "fused_qkv": True, "normalize_head": True},
    "baichuan2 13b": {"model_type": "baichuan", "fused_qkv": True, "normalize_head": True, "positions": "alibi"},
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "llama, tied, biases": {
        "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "attention_output_bias": True,
        "mlp_bias": True,
    },
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 3, "attention_bias": True, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12, "qk_norm": True},
}  # fmt: skip
FLOAT, BFLOAT = torch.float32, torch.bfloat16


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request) -> ModelConfig:
    return ModelConfig(**{**BASE, **request.param})


def kept_by_autograd(model: Transformer, compute: torch.dtype, documents: bool, length: int) -> int:
    """Bytes of the unique storages that the graph of `hidden_states` keeps, the model's own left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that its address stays its own
        return tensor

    tokens = torch.arange(2 * length).view(2, length) % 131
    apart = torch.arange(2 * length).view(2, length) // 24
    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", BFLOAT, enabled=compute == BFLOAT):
        hidden = model.hidden_states(tokens, documents=apart if documents else None)
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in found.values())


def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = Transformer(config)
    named = dict(model.named_parameters())
    counts = memory.parameter_counts(config)
    assert sum(counts.values()) == sum(p.numel() for p in named.values())
    for part, key in (("attention", "self_attn"), ("mlp", ".mlp.")):
        assert counts[part] == sum(p.numel() for name, p in named.items() if key in name)
    for name, (rows, out) in memory.linear_shapes(config).items():
        assert {p.shape for key, p in named.items() if key.endswith(f"{name}.weight")} == {(out, rows)}


def test_parameters_of_the_published_models():
    shape = {"model_type": "baichuan", "vocab_size": 125_696, "num_attention_heads": 32}
    seven = ModelConfig.from_hf({**shape, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32})
    assert sum(memory.parameter_counts(seven).values()) == 7_505_973_248  # as its model card says


@pytest.mark.parametrize("length", [16, 127, 150])  # bfloat16 on the CPU has attention of its own from 128 on
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(("stream", "compute"), [(FLOAT, FLOAT), (FLOAT, BFLOAT), (BFLOAT, BFLOAT)])
def test_saved_activations_are_what_autograd_keeps(config, stream, compute, documents, length):
    model = Transformer(config).to(stream)
    run = memory.Pass(2, length, stream, compute, documents=documents)
    expected = sum(memory.saved(config, run))
    if stream != compute:  # autocast's copies of weights and biases, which the plan counts apart
        expected += sum(2 * p.numel() for name, p in model.named_parameters() if "proj.w" in name or "W_pack.w" in name)
    assert kept_by_autograd(model, compute, documents, length) == expected


def test_a_gpu_keeps_attentions_own_output():
    config = ModelConfig(**{**BASE, **CONFIGS["llama"]})
    run = memory.Pass(2, 150, BFLOAT, BFLOAT, trains=False, adapted=["q_proj"])
    more = sum(memory.saved_by_block(config, replace(run, on_cuda=True))) - sum(memory.saved_by_block(config, run))
    assert more == 2 * 300 * 48 + 4 * 300 * 6  # output, log-sum-exp


def test_checkpointing_keeps_the_input_of_every_block(config):
    run = memory.Pass(2, 16)
    inputs = 3 * 4 * 2 * 16 * 48
    assert sum(memory.saved_by_checkpointing(config, run)) == sum(memory.saved_once(config, run)) + inputs


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_cache_is_as_large_as_said(config, dtype):
    cache = KVCache(Transformer(config).to(dtype), 3, 20)
    held = (cache.keys, cache.values, cache.positions, cache.documents)
    assert memory.cache_bytes(config, 3, 20, dtype) == sum(tensor.nbytes for tensor in held)
