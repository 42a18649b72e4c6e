"""Decoding over weights laid out for few rows, against the model's own whole forward pass."""

import copy
import gc
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from pedgpt.adapters import ExpertLoRALinear, adapters_disabled, inject_experts, inject_lora, record_gates
from pedgpt.kernels import linear, lora_linear
from pedgpt.kernels.cpu import products as packed
from pedgpt.kernels.cpu.products import PackedWeights
from pedgpt.models import generate, generate_steps, generation
from pedgpt.models.cache import KVCache

KINDS = ["llama", "qwen2", "qwen3", "baichuan-rope", "baichuan-alibi"]
PROMPTS = [[5], [17, 3, 99, 4, 61], [130, 0, 0, 7, 12, 55, 8, 9, 101]]
ADAPTERS = {
    "none": lambda model: None,
    "experts": lambda model: inject_experts(model, rank=3, num_specific_experts=2, alpha=5),
    "lora": lambda model: inject_lora(model, rank=4, alpha=6),
    "lora-some": lambda model: inject_lora(model, rank=2, target_modules=["up_proj", "o_proj"]),
    "experts-some": lambda model: inject_experts(model, rank=2, target_modules=["gate_proj", "down_proj"]),
}


@pytest.fixture
def adapted(make_model):
    """adapted(kind, adapter, **changes): a tiny model with adapters that matter, in evaluation mode."""

    def make(kind, adapter, **changes):
        model = make_model(kind, **changes)
        ADAPTERS[adapter](model)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name or "router" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        return model.eval()

    return make


@pytest.fixture(autouse=True)
def small_weights_are_laid_out(monkeypatch):
    monkeypatch.setattr(packed, "LEAST", 1)
    monkeypatch.setattr(packed, "CACHED", 1)


@pytest.fixture
def laid_out(monkeypatch):
    """Every PackedWeights that generation makes, in order."""
    made = []

    class Seen(PackedWeights):
        def __init__(self, weights, rows):
            super().__init__(weights, rows)
            made.append(self)

    monkeypatch.setattr(generation, "PackedWeights", Seen)
    return made


@torch.no_grad()
def stepwise(model, tokens, prompt):
    """Logits [B, T - prompt, V], as `generate` computes them for the tokens that follow the first `prompt`."""
    cache = KVCache(model, *tokens.shape)
    reader = generation._read(model, tokens[:, :prompt].tolist(), cache, for_many=True)
    next(reader)
    return torch.stack([reader.send(column.tolist()) for column in tokens[:, prompt:].unbind(1)], dim=1)


@torch.no_grad()
def greedy(model, prompt, answer):
    """The likeliest token at each place of an answer, from prompt and answer at once: a greedy answer itself."""
    return model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1].argmax(-1).tolist()


def rms(value):
    return value.double().square().mean().sqrt()


# Every kind with experts, and every adapter with projections apart and in one (baichuan).
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [*((kind, "experts") for kind in KINDS), ("qwen2", "lora"), ("baichuan-rope", "lora"), ("llama", "none"),
     ("baichuan-alibi", "none"), ("qwen3", "lora-some"), ("baichuan-rope", "lora-some"), ("llama", "experts-some"),
     ("baichuan-alibi", "experts-some")],
)  # fmt: skip
def test_logits_match_float64_as_the_whole_forward_pass_does(adapted, random_tokens, laid_out, kind, adapter):
    model, tokens = adapted(kind, adapter), random_tokens(1 if "some" in adapter else 3, 15)
    precise = copy.deepcopy(model).double()
    for disabled in [False] if adapter == "none" else [False, True]:
        with torch.no_grad(), adapters_disabled(model), adapters_disabled(precise):
            base = precise(tokens)[:, 6:]
        switched = (adapters_disabled(m) if disabled else nullcontext() for m in (model, precise))
        with torch.no_grad(), next(switched), next(switched):
            truth, whole, found = precise(tokens)[:, 6:], model(tokens)[:, 6:], stepwise(model, tokens, 6)
        assert rms(found - truth) <= 2 * rms(whole - truth) + 1e-7
        assert (rms(truth - base) > 0.1) == (adapter != "none" and not disabled)
    copies = 2 * (5 if "baichuan" in kind else 7) + 1
    assert [len(weights.copies) for weights in laid_out] == [copies] * len(laid_out)


@pytest.mark.parametrize("adapter", ["none", "experts"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_near_the_truth_as_the_whole_forward_pass(adapted, random_tokens, laid_out, kind, adapter):
    model, tokens = adapted(kind, adapter).bfloat16(), random_tokens(3, 15)
    with torch.no_grad():
        found, whole = stepwise(model, tokens, 6), model(tokens)[:, 6:]
        truth = model.float()(tokens)[:, 6:]
    assert found.dtype == torch.bfloat16
    assert 0 < rms(found - truth) <= 1.1 * rms(whole - truth)
    assert bool(laid_out[0].copies) == packed.BFLOAT16


WITHOUT_ONEDNN = """
import types
import torch

torch.ops.mkldnn = types.SimpleNamespace()
from pedgpt.adapters import inject_experts
from pedgpt.models import ModelConfig, Transformer, generate

model = Transformer(ModelConfig(**CONFIG))
inject_experts(model, rank=2)
model.to(torch.DTYPE)(torch.zeros(1, 5, dtype=torch.long)).sum().backward()
assert len(generate(model.eval(), [[5], [6, 7]], max_new_tokens=9)[1]) == 9
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_torch_that_was_built_without_onednn_trains_and_decodes(dtype, make_model):
    code = WITHOUT_ONEDNN.replace("CONFIG", repr(vars(make_model("llama").config))).replace("DTYPE", dtype)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_biases_of_every_layer_are_added(adapted, random_tokens):
    model, tokens = adapted("llama", "experts", attention_bias=True, mlp_bias=True), random_tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(stepwise(model, tokens, 3), model(tokens)[:, 3:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapter", ["none", "experts"])
@pytest.mark.parametrize("kind", ["llama", "baichuan-alibi"])
def test_generation_is_the_same_whether_or_not_weights_are_laid_out(adapted, monkeypatch, laid_out, kind, adapter):
    """A ragged batch against one prompt at a time; short answers do not pay for the layout."""
    model = adapted(kind, adapter)
    monkeypatch.setattr(generation, "LAY_OUT_FROM", 21)
    expected = [generate(model, [prompt], max_new_tokens=20)[0] for prompt in PROMPTS]
    assert [len(weights.copies) for weights in laid_out] == [0, 0, 0]
    monkeypatch.setattr(generation, "LAY_OUT_FROM", 20)
    assert generate(model, PROMPTS, max_new_tokens=20) == expected
    assert len(laid_out[-1].copies) > 10


def test_weights_are_read_anew_by_every_call(make_model):
    """No copy outlives a call, so a model that has changed is not decoded with what it was."""
    model = make_model("llama")
    before = generate(model, [[5, 6], [8]], max_new_tokens=20)
    for parameter in model.parameters():
        parameter.data.mul_(torch.linspace(0.5, 1.5, parameter.shape[-1]))
    after = generate(model, [[5, 6], [8]], max_new_tokens=20)
    assert after != before and [len(answer) for answer in after] == [20, 20]
    assert after == [greedy(model, [5, 6], after[0]), greedy(model, [8], after[1])]


@pytest.mark.parametrize("how", ["ended", "closed", "failed"])
def test_copies_are_read_within_a_step_only_and_go_with_the_call(make_model, laid_out, how):
    model = make_model("llama")
    steps = generate_steps(model, [[5, 6], [7]], max_new_tokens=20)
    next(steps)
    for _ in range(2):
        next(steps)
        assert not packed._ACTIVE.copies
    assert laid_out[0].copies
    alive = weakref.ref(laid_out.pop())
    if how == "ended":
        list(steps)
    elif how == "closed":
        steps.close()
    else:
        with torch.no_grad():
            model.model.norm.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="not finite"):
            next(steps)
    del steps
    gc.collect()
    assert alive() is None and not packed._ACTIVE.copies


def test_where_a_copy_would_not_do_there_is_none(make_model, monkeypatch):
    model = make_model("llama")
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(PackedWeights(weights, 1).copies) == len(PackedWeights(weights, 64).copies) == len(weights)
    assert not PackedWeights(weights, 65).copies
    with monkeypatch.context() as patch:  # One row of a model that a cache holds gains nothing.
        patch.setattr(packed, "CACHED", sum(weight.numel() for weight in weights) + 1)
        assert not PackedWeights(weights, 1).copies and PackedWeights(weights, 2).copies
    assert not PackedWeights([weight.double() for weight in weights], 2).copies
    assert not PackedWeights([weight.t() for weight in weights], 2).copies
    assert not PackedWeights([weight.to("meta") for weight in weights], 2).copies
    size = sum(weight.nbytes for weight in weights)
    monkeypatch.setattr(packed, "available_memory", lambda: 2 * size - 1)
    assert not PackedWeights(weights, 2).copies
    monkeypatch.setattr(packed, "available_memory", lambda: 2 * size)
    assert len(PackedWeights([*weights, *weights], 2).copies) == len(weights)  # tied ones count once
    monkeypatch.setattr(packed, "BFLOAT16", False)  # most without AVX-512
    half = model.bfloat16()
    assert not PackedWeights([m.weight for m in half.modules() if isinstance(m, nn.Linear)], 1).copies
    assert len(generate(half, [[5]], max_new_tokens=20)[0]) == 20


def test_products_read_the_copy_of_their_own_matrix_only():
    """The copies are of other numbers here, which shows who reads them."""
    generator = torch.Generator().manual_seed(0)
    weight, other, x = (torch.randn(24, 24, generator=generator) for _ in range(3))
    copies = PackedWeights([weight], 4)
    (key,) = copies.copies
    copies.copies[key] = weight, torch.ops.mkldnn._reorder_linear_weight(other, 4)
    A, B, bias = torch.randn(3, 24, generator=generator), torch.randn(24, 3, generator=generator), x[0].clone()
    with copies:
        with torch.no_grad():
            torch.testing.assert_close(linear(x[:5], weight, bias), x[:5] @ other.t() + bias)
            torch.testing.assert_close(linear(x.view(2, 3, 4, 24), weight), (x @ other.t()).view(2, 3, 4, 24))
            y, *_ = lora_linear(x[:5], weight, None, A, B, scaling=2.0)
            torch.testing.assert_close(y, x[:5] @ (other + 2 * B @ A).t(), atol=1e-4, rtol=0)
            for w in (weight.t(), weight.clone(), weight[:12]):
                torch.testing.assert_close(linear(x[:5], w), x[:5] @ w.t(), atol=1e-5, rtol=0)
            many = x.repeat(3, 1)
            torch.testing.assert_close(linear(many, weight), many @ weight.t(), atol=1e-5, rtol=0)
            with torch.autocast("cpu", torch.bfloat16):
                assert linear(x, weight).dtype == torch.bfloat16
        leaf = x[:5].clone().requires_grad_()
        linear(leaf, weight).sum().backward()  # a copy has no gradients
        torch.testing.assert_close(leaf.grad, weight.sum(0).expand(5, -1), atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(linear(x[:5], weight), x[:5] @ weight.t(), atol=1e-5, rtol=0)


class TopOne(ExpertLoRALinear):
    """Only the expert with the largest gate speaks."""

    def forward(self, x):
        gates = (x.float() @ self.router.float().t()).softmax(-1)
        gates = torch.where(gates == gates.amax(-1, keepdim=True), 1.0, 0.0)
        A, B = self.universal_expert
        y = nn.functional.linear(x, self.weight, self.bias) + self.scaling * x @ A.t() @ B.t()
        for j, (A, B) in enumerate(self.specific_experts):
            y = y + self.scaling * gates[..., j, None] * (x @ A.t() @ B.t())
        return y


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class GELU(nn.Module):
    """Two matrices, no gate, and none of the names that the decoder's own MLP has."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.rise = nn.Parameter(torch.randn(70, 48, generator=generator) / 7)
        self.fall = nn.Parameter(torch.randn(48, 70, generator=generator) / 8)

    def forward(self, x):
        return linear(nn.functional.gelu(linear(x, self.rise)), self.fall)


def change_gates(model):
    for module in model.modules():
        if isinstance(module, ExpertLoRALinear):
            module.__class__ = TopOne


def change_mlp(model):
    for block in model.model.layers:
        block.mlp = GELU().eval()


def change_down(model):
    for block in model.model.layers:
        doubled = Doubled(50, 48, bias=False).eval()
        doubled.weight = block.mlp.down_proj.weight
        block.mlp.down_proj = doubled


def change_norm(model):
    for block in model.model.layers:
        block.post_attention_layernorm = nn.LayerNorm(48).eval()


@pytest.mark.parametrize(
    ("change", "adapter"),
    [(change_gates, "experts"), (change_mlp, "none"), (change_down, "none"), (change_norm, "none")],
)
def test_an_unknown_gate_or_module_is_computed_by_its_own_forward(adapted, change, adapter):
    model = adapted("llama", adapter)
    known = generate(model, PROMPTS, max_new_tokens=24)
    change(model)
    found = generate(model, PROMPTS, max_new_tokens=24)
    assert found == [greedy(model, *one) for one in zip(PROMPTS, found, strict=True)] != known
    assert [len(answer) for answer in found] == [24] * 3
    assert [generate(model, [prompt], max_new_tokens=24)[0] for prompt in PROMPTS] == found


def test_hooks_and_gate_records_see_every_token(adapted):
    model, seen = adapted("llama", "experts"), []
    handle = model.model.layers[0].register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    with record_gates(model) as records:
        generate(model, [[5, 6, 7]], max_new_tokens=20)
    handle.remove()
    assert seen == [3] + [1] * 19
    assert {record.count for record in records.values()} == {22}


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(48)], ids=["own", "LayerNorm"])
def test_hooks_on_a_norm_see_one_tensor(make_model, random_tokens, norm):
    """They may replace it, too: here by half of it."""
    model, tokens, seen = make_model("llama"), random_tokens(2, 7), []
    block = model.model.layers[0]
    block.post_attention_layernorm = norm or block.post_attention_layernorm
    with torch.no_grad():
        before = model(tokens)
        handles = [
            block.post_attention_layernorm.register_forward_pre_hook(lambda module, given: seen.extend(given)),
            block.post_attention_layernorm.register_forward_hook(lambda module, given, out: seen.append(out)),
        ]
        assert torch.equal(model(tokens), before)
        assert [value.shape for value in seen] == [(2, 7, 48)] * 2
        handles.append(block.post_attention_layernorm.register_forward_hook(lambda module, given, out: out / 2))
        halved = model(tokens)
        for handle in handles:
            handle.remove()
        for projection in (block.mlp.gate_proj, block.mlp.up_proj):
            projection.weight.div_(2)
        torch.testing.assert_close(halved, model(tokens), atol=1e-5, rtol=0)
