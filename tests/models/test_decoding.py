"""One token at a time over weights laid out for it, against the model's own whole forward pass."""

import copy
from contextlib import nullcontext

import pytest
import torch

from pedgpt.adapters import ExpertLoRALinear, LoRALinear, adapters_disabled, inject_experts, inject_lora, record_gates
from pedgpt.models import decoding, generate, generation
from pedgpt.models.decoding import DecodeStep, SharedInput, decode_step_for
from pedgpt.models.cache import KVCache

KINDS = ["llama", "qwen2", "qwen3", "baichuan-rope", "baichuan-alibi"]
ADAPTERS = {
    "none": lambda model: None,
    "experts": lambda model: inject_experts(model, rank=3, num_specific_experts=2, alpha=5),
    "lora": lambda model: inject_lora(model, rank=4, alpha=6),
    # The second of three layers that share an input, and one that has its input for itself.
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


@torch.no_grad()
def stepwise(model, tokens, prompt, documents=None):
    """Logits [B, T - prompt, V]: the prompt as the model reads it, then token by token, as `generate` decodes.

    A processor that cannot multiply bfloat16 has no decoder for it, and the model itself reads every token.
    """
    decoder, cache = decode_step_for(model, len(tokens)), KVCache(model, *tokens.shape)
    assert (decoder is None) == (model.head_weight().dtype == torch.bfloat16 and not decoding._supports_bfloat16())
    model.hidden_states(tokens[:, :prompt], documents=documents, cache=cache)
    steps = []
    for t in range(prompt, tokens.shape[1]):
        token, last = tokens[:, t : t + 1], None if documents is None else documents[:, -1:]
        if decoder is None:
            steps.append(model(token, documents=last, cache=cache)[:, 0])
        else:
            steps.append(decoder(token, cache.next_positions(1), last, cache))
    return torch.stack(steps, dim=1)


def rms(value):
    return value.double().square().mean().sqrt()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_match_float64_as_the_whole_forward_pass_does(adapted, random_tokens, kind, adapter):
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


@pytest.mark.parametrize("adapter", ["none", "experts"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_near_the_truth_as_the_whole_forward_pass(adapted, random_tokens, kind, adapter):
    model, tokens = adapted(kind, adapter).bfloat16(), random_tokens(3, 15)
    with torch.no_grad():
        found, whole = stepwise(model, tokens, 6), model(tokens)[:, 6:]
        truth = model.float()(tokens)[:, 6:]
    assert found.dtype == torch.bfloat16
    assert 0 < rms(found - truth) <= 1.1 * rms(whole - truth)


def test_biases_of_every_layer_are_added(adapted, random_tokens):
    model, tokens = adapted("llama", "experts", attention_bias=True, mlp_bias=True), random_tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(stepwise(model, tokens, 3), model(tokens)[:, 3:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapter", ["none", "experts"])
@pytest.mark.parametrize("kind", ["llama", "baichuan-alibi"])
@pytest.mark.parametrize("laid_out_from", [20, 21])
def test_generation_is_the_same_whether_or_not_weights_are_laid_out(adapted, monkeypatch, kind, adapter, laid_out_from):
    """A ragged batch against one prompt at a time, all of it decoded by the model itself."""
    model, prompts = adapted(kind, adapter), [[5], [17, 3, 99, 4, 61], [130, 0, 0, 7, 12, 55, 8, 9, 101]]
    monkeypatch.setattr(generation, "LAY_OUT_FROM", 10**9)
    expected = [generate(model, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    monkeypatch.setattr(generation, "LAY_OUT_FROM", laid_out_from)
    made = []
    monkeypatch.setattr(generation, "decode_step_for", lambda *given: made.append(decode_step_for(*given)) or made[-1])
    assert generate(model, prompts, max_new_tokens=20) == expected
    assert [type(decoder) for decoder in made] == ([DecodeStep] if laid_out_from <= 20 else [])


def test_short_answers_do_not_pay_for_the_layout(make_model, monkeypatch):
    monkeypatch.setattr(generation, "decode_step_for", None)
    model = make_model("llama")
    assert len(generate(model, [[5]], max_new_tokens=generation.LAY_OUT_FROM - 1)[0]) == generation.LAY_OUT_FROM - 1


def test_weights_are_read_anew_by_every_call(make_model):
    """No copy outlives a call, so a model that has changed is not decoded with what it was."""
    model = make_model("llama")
    before = generate(model, [[5, 6]], max_new_tokens=20)
    for parameter in model.parameters():
        parameter.data.mul_(torch.linspace(0.5, 1.5, parameter.shape[-1]))
    after = generate(model, [[5, 6]], max_new_tokens=20)
    assert after != before
    tokens = torch.tensor([[5, 6, *after[0]]])
    with torch.no_grad():
        assert model(tokens)[0, 1:-1].argmax(-1).tolist() == after[0]


def test_where_a_copy_would_not_do_there_is_none(adapted, monkeypatch):
    model = adapted("llama", "experts")
    assert isinstance(decode_step_for(model, 4), DecodeStep)
    assert decode_step_for(model, 65) is None
    assert decode_step_for(model.train(), 4) is None  # the gates are noisy
    with record_gates(model.eval()):
        assert decode_step_for(model, 4) is None  # the records would miss what it decodes
    assert decode_step_for(model.double(), 4) is None
    model.float()
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(decoding, "available_memory", lambda: 2 * size - 1)
    assert decode_step_for(model, 4) is None
    monkeypatch.setattr(decoding, "available_memory", lambda: 2 * size)
    assert decode_step_for(model, 4) is not None


def test_available_memory_is_what_the_system_says():
    lines = dict(line.split(":") for line in open("/proc/meminfo"))
    total = 1024 * int(lines["MemTotal"].split()[0])
    assert 0 < decoding.available_memory() < total


def test_layers_that_share_an_input_are_two_products_at_most(adapted):
    model = adapted("llama", "experts")
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        found = SharedInput(layers, 2)(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_models_that_the_decoder_does_not_know_are_left_alone(adapted, monkeypatch):
    mixed = adapted("llama", "none")
    attention = mixed.model.layers[1].self_attn
    attention.q_proj, attention.v_proj = LoRALinear(attention.q_proj, rank=2), LoRALinear(attention.v_proj, rank=4)
    assert decode_step_for(mixed.eval(), 2) is None  # two ranks in one product
    attention.v_proj = ExpertLoRALinear(attention.k_proj, rank=2)
    assert decode_step_for(mixed.eval(), 2) is None  # two kinds

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    other = adapted("llama", "none")
    assert isinstance(decode_step_for(other, 2), DecodeStep)
    other.model.layers[0].mlp.down_proj = Doubled(50, 48, bias=False).eval()
    assert decode_step_for(other, 2) is None

    hooked = adapted("llama", "none")
    handle = hooked.model.layers[0].register_forward_hook(lambda *_: None)
    assert decode_step_for(hooked, 2) is None
    handle.remove()
    assert isinstance(decode_step_for(hooked, 2), DecodeStep)

    half = adapted("llama", "none").bfloat16()
    monkeypatch.setattr(decoding, "_supports_bfloat16", lambda: False)  # most processors without AVX512
    assert decode_step_for(half, 2) is None
    assert len(generate(half, [[5]], max_new_tokens=20)[0]) == 20


@pytest.mark.parametrize(("limit", "expected"), [("max", 5000 * 1024), ("3000000", 2_000_000), ("900000", 0)])
def test_available_memory_respects_the_control_group(monkeypatch, limit, expected):
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n", "/sys/fs/cgroup/memory.max": f"{limit}\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
    }  # fmt: skip
    monkeypatch.setattr("pathlib.Path.exists", lambda path: str(path) in files)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: files[str(path)])
    assert decoding.available_memory() == expected
