"""Adapters over a base in 8 or 4 bits: attached, switched off, exchanged, merged and saved as over a plain one."""

import copy
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from pedgpt.adapters import (
    ExpertLoRALinear,
    adapted_layers,
    adapters_disabled,
    inject_experts,
    inject_lora,
    load_adapter,
    merge_lora,
    pack_adapters,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from pedgpt.kernels import Linear, QuantizedLinear
from pedgpt.models import ModelConfig, Transformer

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "model_type": "qwen2",
}  # fmt: skip
both_kinds = pytest.mark.parametrize("kind", ["int8", "nf4"])
both_adapters = pytest.mark.parametrize("inject", [inject_lora, inject_experts])


@pytest.fixture
def base():
    """base(kind, dtype) gives a random model whose blocks are quantised."""

    def make(kind, dtype=torch.float32):
        torch.manual_seed(0)
        model = Transformer(ModelConfig.from_hf(SIZES)).to(dtype).eval()
        for name, layer in list(model.model.layers.named_modules()):
            if isinstance(layer, nn.Linear):
                quantized = QuantizedLinear(layer, kind)
                quantized.quantization.quantize_(quantized.weight, layer.weight.detach().split(7))
                model.model.layers.set_submodule(name, quantized)
        return model.requires_grad_(False)

    return make


@pytest.fixture
def adapted(base, randomize):
    def make(kind, inject, dtype=torch.float32, **settings):
        model = base(kind, dtype)
        inject(model, **{"rank": 3, "alpha": 5, **settings})
        return randomize(model, scale=0.1)

    return make


@pytest.fixture
def dense():
    """dense(model) gives a copy whose quantised layers are plain ones over what their codes stand for, in float64."""

    def make(model):
        model = copy.deepcopy(model)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantizedLinear):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                plain.weight = nn.Parameter(layer.quantization.dense(layer.weight, torch.float32), requires_grad=False)
                plain.bias = layer.bias
                model.set_submodule(name, plain)
        return model.double().eval()

    return make


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, expected):
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def gradients(model, tokens, rank=3):
    loss = model(tokens).double().square().mean()
    names = [name for name, p in model.named_parameters() if p.requires_grad and not name.endswith("router_noise")]
    return dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(name) for name in names]), strict=True))


@both_adapters
@both_kinds
def test_logits_and_gradients_match_float64_over_the_dense_weights(base, dense, randomize, tokens, kind, inject):
    model = base(kind)
    wide = dense(model)
    for each in (model, wide):
        inject(each, rank=3, alpha=5)
        randomize(each, scale=0.1)
    found, truth = model(tokens).double(), wide(tokens)
    assert (found - truth).norm() <= 2e-6 * truth.norm()
    others = gradients(wide, tokens)
    for name, gradient in gradients(model, tokens).items():
        assert (gradient.double() - others[name]).norm() <= 1e-5 * others[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_adapters
@both_kinds
def test_adapters_train_in_float32_and_the_base_stays_what_it_was(base, tokens, kind, inject, dtype):
    model = base(kind, dtype)
    before, logits = state(model), model(tokens)
    inject(model, rank=3)
    assert len(adapted_layers(model)) == 14 and torch.equal(model(tokens), logits)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):
        pack_adapters(model)
        packed = [layer.packed_parameters() for layer in adapted_layers(model).values()]
        assert all((p is not None and p[0].dtype == dtype) or inject is inject_lora for p in packed)
        model(tokens).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert not torch.equal(model(tokens), logits)
    with adapters_disabled(model):
        assert torch.equal(model(tokens), logits)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    set_adapter(model, None)
    assert_same(model, before)
    assert {type(module) for module in model.modules()} == {type(module) for module in base(kind).modules()}
    assert torch.equal(model(tokens), logits)


@both_kinds
def test_several_adapters_take_turns(adapted, randomize, tokens, kind):
    model = adapted(kind, inject_lora)
    first = model(tokens)
    inject_experts(model, name="experts", rank=2)
    second = randomize(model, seed=8)(tokens)
    for name, logits in (("default", first), ("experts", second), ("default", first)):
        set_adapter(model, name)
        assert torch.equal(model(tokens), logits)
    waiting = model._adapters.layers["experts"].values()
    assert all(layer.weight is layer.quantization is None for layer in waiting)  # they keep no codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_kinds
def test_merging_gives_plain_layers_rounded_once(adapted, dense, tokens, kind, dtype):
    model = adapted(kind, inject_lora, dtype)
    before, logits = state(model), model(tokens)
    expected = {
        name: layer.quantization.dense(layer.weight, torch.float32).double()
        + 5 / 3 * layer.lora_B.double() @ layer.lora_A.double()
        for name, layer in adapted_layers(model).items()
    }
    merge_lora(model)
    size = logits.abs().max()
    torch.testing.assert_close(model(tokens) / size, logits / size, rtol=0, atol=32 * torch.finfo(dtype).eps)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    for name, exact in expected.items():
        layer = model.get_submodule(name)
        assert type(layer) is Linear and layer.weight.dtype == dtype and not layer.weight.requires_grad
        half = torch.finfo(dtype).eps / 2
        assert ((layer.weight.double() - exact).abs() <= half * exact.abs() + 2e-7).all()
    assert list(model.state_dict()) == list(Transformer(ModelConfig.from_hf(SIZES)).state_dict())
    unmerge_lora(model)
    assert_same(model, before)
    assert torch.equal(model(tokens), logits)


@both_kinds
def test_the_universal_expert_merges_and_comes_back(adapted, tokens, kind):
    model = adapted(kind, inject_experts)
    before, logits = state(model), model(tokens)
    for _ in range(2):
        merge_lora(model, universal_only=True)
        layer = model.model.layers[0].mlp.up_proj
        assert type(layer) is ExpertLoRALinear and layer.weight.dtype == torch.float32 and layer.quantization is None
        torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-4)
        copy.deepcopy(model)(tokens)
        unmerge_lora(model)
        assert_same(model, before)
        assert torch.equal(model(tokens), logits)


@both_adapters
@both_kinds
def test_unmerge_follows_a_model_that_was_cast(adapted, tokens, kind, inject):
    model, other = adapted(kind, inject), adapted(kind, inject)
    merge_lora(model, universal_only=inject is inject_experts)
    model.double()
    unmerge_lora(model)
    assert_same(model, state(other.double()))
    assert torch.equal(model(tokens), other(tokens))
    assert model.model.layers[0].mlp.up_proj.lora_A.dtype == torch.float64


@both_adapters
@both_kinds
def test_copies_and_files_compute_the_same(adapted, base, tokens, tmp_path, kind, inject):
    model = adapted(kind, inject, torch.bfloat16)
    logits = model(tokens)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens), logits)
    save_adapter(model, tmp_path)
    other = base(kind, torch.bfloat16)
    load_adapter(other, tmp_path)
    assert torch.equal(other(tokens), logits)


@both_kinds
def test_adapters_over_an_empty_base_are_filled_with_it(base, tokens, kind):
    """As stage 4 loads: the model on the meta device, then adapters, then weights."""
    full = base(kind, torch.bfloat16)
    empty = base(kind, torch.bfloat16).to("meta")
    inject_lora(empty, rank=3)
    empty.load_state_dict(full.state_dict(), assign=True, strict=False)
    assert {p.dtype for p in empty.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(empty(tokens), full(tokens))


def two_layers(kind):
    """An odd number of rows in the second, so that two ranks hold unequal parts."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for size_in, size_out in ((64, 192), (192, 65)):
        layer = nn.Linear(size_in, size_out, dtype=torch.bfloat16)
        quantized = QuantizedLinear(layer, kind)
        quantized.quantization.quantize_(quantized.weight, layer.weight.detach().split(7))
        model.append(nn.Sequential(quantized, nn.Tanh()))
    inject_experts(model, rank=3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for kind in ("int8", "nf4"):
        split, whole = two_layers(kind), two_layers(kind)
        for block in split:
            fully_shard(block, mp_policy=policy)
        fully_shard(split, mp_policy=policy)
        rows = [block[0].weight.to_local().shape[0] for block in split]
        assert rows == ([96, 33] if rank == 0 else [96, 32]) and split[1][0].weight.dtype == whole[1][0].weight.dtype
        x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        for _ in range(2):  # the second pass gathers again what the first let go
            outputs = [model(x) for model in (split, whole)]
            assert torch.equal(*outputs)
            for y in outputs:
                y.float().square().mean().backward()
        for (name, parameter), other in zip(split.named_parameters(), whole.parameters(), strict=True):
            if other.grad is not None:
                assert torch.equal(parameter.grad.full_tensor(), other.grad), name
    Path(folder, str(rank)).touch()
    while not Path(folder, str(1 - rank)).exists():  # a rank that left early would break the other's collectives
        time.sleep(0.01)
    os._exit(0)  # torch's own threads now and then abort while a spawned process winds down


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_that_split_the_codes_compute_as_one(tmp_path, start_ranks):
    start_ranks(worker, str(tmp_path))
