"""Activation checkpointing: the same bits as without it, fewer bytes, and errors that name the choices."""

import os
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pedgpt.adapters import inject_experts, inject_lora
from pedgpt.models import ModelConfig, Transformer
from pedgpt.models.transformer import Block

KINDS = ["llama", "qwen2", "qwen3", "baichuan-rope", "baichuan-alibi"]
ADAPTERS = {
    "full": None,
    "experts": lambda model: inject_experts(model, rank=2),
    "LoRA with dropout": lambda model: inject_lora(model, rank=2, dropout=0.3),
}
# The dtype of the weights, and that of autocast.
DTYPES = {
    "float32": (torch.float32, None), "autocast": (torch.float32, torch.bfloat16), "bfloat16": (torch.bfloat16, None)
}  # fmt: skip


# Every kind with every adapter, and each of both with every dtype; attention over blocks needs 128 tokens.
CASES = [(kind, adapter, [*DTYPES][(i + j) % 3], tokens) for i, kind in enumerate(KINDS)
         for j, adapter in enumerate(ADAPTERS) for tokens in (1, 150) if tokens > 1 or i % 3 == j]  # fmt: skip


@pytest.mark.parametrize(("kind", "adapter", "dtypes", "tokens"), CASES)
def test_gradients_are_the_same_bits(make_model, random_tokens, randomize, kind, adapter, dtypes, tokens):
    weights, autocast = DTYPES[dtypes]
    model = make_model(kind, max_position_embeddings=256).train()
    if ADAPTERS[adapter]:
        ADAPTERS[adapter](model)
        randomize(model, 1)
    model.to(weights)
    rows = random_tokens(2, tokens)
    documents = (torch.arange(tokens) // 60).expand(2, -1)
    found = {}
    for model.activation_checkpointing in ("none", "selective", "block"):
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(rows, documents=documents).float().square().mean()
        loss.backward()
        found[model.activation_checkpointing] = {
            "loss": loss.detach(),
            **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        }
    assert len(found["none"]) == 1 + sum(p.requires_grad for p in model.parameters())
    for how in ("selective", "block"):
        assert [n for n, value in found["none"].items() if not torch.equal(value, found[how][n])] == []


SIZES = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip


def split_worker(rank, results):
    """Gradients of one rank's tokens under FSDP2, whose weights are freed and gathered again between the passes."""
    dist.init_process_group("gloo", init_method=f"file://{results}/meeting", rank=rank, world_size=2)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for low in (torch.float32, torch.bfloat16):
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        for how in ("none", "selective", "block"):
            torch.manual_seed(0)
            model = Transformer(ModelConfig.from_hf(SIZES)).train()
            model.activation_checkpointing = how
            for block in model.model.layers:
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            for _ in range(2):
                model(torch.arange(16)[None] + rank).float().square().mean().backward()
            found[str(low), how] = [p.grad.full_tensor() for p in model.parameters()]
    torch.save(found, f"{results}/{rank}.pt")
    while not os.path.exists(f"{results}/{1 - rank}.pt"):  # a rank that left early would break the other's collectives
        time.sleep(0.01)
    os._exit(0)  # torch's own threads now and then abort while a spawned process winds down


def test_gradients_are_the_same_bits_where_two_ranks_share_the_weights(start_ranks, tmp_path):
    start_ranks(split_worker, str(tmp_path))
    found = torch.load(tmp_path / "0.pt")
    for low in ("torch.float32", "torch.bfloat16"):
        for how in ("selective", "block"):
            assert all(map(torch.equal, found[low, "none"], found[low, how])), (low, how)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made in here that are still alive, the model's left out."""

    def __init__(self, model):
        super().__init__()
        self.sizes, self.known = {}, {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes and storage._cdata not in self.known:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        return result


@pytest.mark.parametrize("dtypes", DTYPES)
def test_what_a_block_keeps_is_what_is_dear(dtypes):
    """Of a block: "selective" saves the results of two norms, of SwiGLU, and of the silu in it."""
    weights, autocast = DTYPES[dtypes]
    model = Transformer(ModelConfig.from_hf(SIZES)).to(weights).train()
    tokens = torch.arange(2 * 16).view(2, 16)
    held = {}
    for model.activation_checkpointing in ("none", "selective", "block"):
        for layers in (2, 3):
            model.model.layers, whole = model.model.layers[:layers], model.model.layers
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=bool(autocast)), LiveBytes(model) as live:
                out = model.hidden_states(tokens)
                held[model.activation_checkpointing, layers] = sum(live.sizes.values())
            model.model.layers = whole
            del out
    block = {how: held[how, 3] - held[how, 2] for how in ("none", "selective", "block")}
    if autocast:  # until it ends, it holds a copy of each weight, which is no activation
        copies = 2 * sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
        block = {how: held - copies for how, held in block.items()}
    product, stream = (autocast or weights).itemsize, weights.itemsize
    assert block["none"] - block["selective"] == 2 * 16 * product * (64 + 64 + 160 + 160)
    assert block["block"] == 2 * 16 * stream * 64


def test_selective_computes_no_block_twice_and_block_each(make_model, random_tokens, monkeypatch):
    calls, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    model = make_model("llama")
    for model.activation_checkpointing, expected in (("none", 2), ("selective", 2), ("block", 4)):
        calls.clear()
        model(random_tokens(1, 5)).sum().backward()
        assert len(calls) == expected
        with torch.no_grad():
            model(random_tokens(1, 5))
        assert len(calls) == expected + 2


@pytest.mark.parametrize("how", [True, False, None, "full", "Block"])
def test_another_word_is_an_error_that_names_the_four(make_model, how):
    model = make_model("llama")
    with pytest.raises(ValueError, match=f"must be one of none, selective, block, offload, found {how!r}"):
        model.activation_checkpointing = how
    assert model.activation_checkpointing == "none"
