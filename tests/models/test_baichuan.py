"""Baichuan: the 7B style against a transformers Llama of the same weights, the 13B style against float64 and Llama."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pedgpt.models import generate


def press_slopes(heads):
    """Press et al. 2022: a geometric sequence from 2^(-8/n) for a power of two, else interleaved from the next one."""
    whole = 2 ** int(np.floor(np.log2(heads)))
    slopes = (2.0 ** (-8 / whole)) ** np.arange(1, whole + 1)
    return slopes if whole == heads else np.concatenate([slopes, press_slopes(2 * whole)[::2][: heads - whole]])


def oracle(model, tokens):
    """Logits [T, V] of one row, in float64, one query and one head at a time."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    heads, eps = model.config.num_attention_heads, model.config.rms_norm_eps
    alibi = model.config.positions == "alibi"

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weights[name]

    x = weights["model.embed_tokens.weight"][tokens]
    T, D = x.shape
    K = D // heads
    slopes = press_slopes(heads) if alibi else np.zeros(heads)

    def turn(x, position):
        """Su et al. 2021 with complex numbers: the pair (x_i, x_(i + K/2)) turns by position · 10000^(-2i/K)."""
        if alibi:
            return x
        pairs = (x[: K // 2] + 1j * x[K // 2 :]) * np.exp(1j * position * 10_000.0 ** (-2 * np.arange(K // 2) / K))
        return np.concatenate([pairs.real, pairs.imag])

    for layer in range(model.config.num_hidden_layers):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        pack = weights[at + "self_attn.W_pack.weight"]
        q, k, v = (h @ pack[i * D : (i + 1) * D].T for i in range(3))
        mixed = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * K, (head + 1) * K)
            for i in range(T):
                query = turn(q[i, part], i)
                keys = [turn(k[j, part], j) for j in range(i + 1)]
                scores = [query @ key / K**0.5 - slopes[head] * (i - j) for j, key in enumerate(keys)]
                p = np.exp(np.array(scores) - max(scores))
                mixed[i, part] = p / p.sum() @ v[: i + 1, part]
        x = x + mixed @ weights[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up, down = (weights[at + f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        z = h @ gate.T
        x = x + (z / (1 + np.exp(-z)) * (h @ up.T)) @ down.T
    head_weight = weights["lm_head.weight"]
    if model.config.normalize_head:
        head_weight = head_weight / np.sqrt((head_weight**2).sum(1, keepdims=True))
    return norm(x, "model.norm.weight") @ head_weight.T


def llama_twin(model):
    """A transformers Llama with the weights of a Baichuan model of ours, W_pack split into q, k and v."""
    config = model.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
            intermediate_size=config.intermediate_size, num_attention_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads, rms_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        if "W_pack" in name:
            for letter, rows in zip("qkv", value.split(config.hidden_size), strict=True):
                state[name.replace("W_pack", f"{letter}_proj")] = rows
        else:
            state[name] = value
    twin.load_state_dict(state)
    return twin


def twin_logits(model, twin, tokens):
    """Logits of the twin, its head normalised here; ALiBi as an additive mask with the rotation switched off."""
    B, T = tokens.shape
    arguments = {}
    if model.config.positions == "alibi":
        slopes = torch.tensor(press_slopes(model.config.num_attention_heads))
        distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]
        mask = (slopes[:, None, None] * distance).masked_fill(distance > 0, -torch.inf)
        arguments = {
            "attention_mask": mask.to(twin.dtype).expand(B, -1, -1, -1),
            "position_ids": torch.zeros(B, T, dtype=torch.long),
        }
    hidden = twin.model(tokens, **arguments).last_hidden_state
    weight = twin.lm_head.weight
    if model.config.normalize_head:
        weight = (weight.float() / weight.float().square().sum(1, keepdim=True).sqrt()).to(weight.dtype)
    return hidden @ weight.T


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("kind", ["baichuan-rope", "baichuan-alibi"])
def test_logits_and_gradients_match_transformers_llama(make_model, random_tokens, kind, normalized):
    model = make_model(kind, pedgpt_norm_head=normalized)
    twin, tokens = llama_twin(model), random_tokens(2, 45)
    logits, expected = model(tokens), twin_logits(model, twin, tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)

    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (logits * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    truths = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        if "W_pack" in name:
            truth = torch.cat([truths[name.replace("W_pack", f"{letter}_proj")] for letter in "qkv"])
        else:
            truth = truths[name]
        assert truth.abs().max() > 1e-3, name
        assert (parameter.grad - truth).abs().max() <= 1e-4 * truth.abs().max(), name


@pytest.mark.parametrize("kind", ["baichuan-rope", "baichuan-alibi"])
def test_bfloat16_is_as_near_the_truth_as_transformers(make_model, random_tokens, kind):
    model = make_model(kind, hidden_size=160, num_attention_heads=5).bfloat16()
    tokens = random_tokens(2, 300, seed=3)
    twin = llama_twin(model)  # float32, with the rounded weights
    with torch.no_grad():
        truth = twin_logits(model, twin, tokens)
        rotary = twin.model.rotary_emb  # stays float32, as it does when transformers loads a bfloat16 checkpoint
        twin.model.rotary_emb = None
        twin.bfloat16()
        twin.model.rotary_emb = rotary
        theirs, logits = twin_logits(model, twin, tokens), model(tokens)
    assert logits.dtype == theirs.dtype == torch.bfloat16
    error, budget = ((value.float() - truth).square().mean().sqrt() for value in (logits, theirs))
    assert 0 < error <= 1.05 * budget


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 7, 8, 12])
def test_alibi_model_matches_float64(make_model, random_tokens, heads):
    """Numbers of heads that are no power of two, and an odd head_dim, which no rotation would allow."""
    model = make_model("baichuan-alibi", seed=heads, hidden_size=heads * 7, num_attention_heads=heads)
    tokens = random_tokens(2, 33, seed=heads)
    expected = np.stack([oracle(model, row) for row in tokens.numpy()])
    with torch.no_grad():
        error = np.abs(model(tokens).double().numpy() - expected).max()
    assert error <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_rotary_model_matches_float64(make_model, random_tokens, heads, normalized):
    """45 tokens, beyond the 32 of max_position_embeddings; Baichuan2's head and Baichuan-1's."""
    sizes = {"hidden_size": heads * 8, "num_attention_heads": heads, "pedgpt_norm_head": normalized}
    model, tokens = make_model("baichuan-rope", seed=heads, **sizes), random_tokens(1, 45, seed=heads)
    expected = oracle(model, tokens[0].numpy())
    with torch.no_grad():
        error = np.abs(model(tokens)[0].double().numpy() - expected).max()
    assert error <= 1e-5 * max(1, np.abs(expected).max())


def test_head_ignores_the_length_of_its_rows(make_model, random_tokens):
    model, tokens = make_model("baichuan-rope"), random_tokens(1, 9)
    with torch.no_grad():
        before = model(tokens)
        model.lm_head.weight *= torch.linspace(0.01, 100, 131)[:, None]
        torch.testing.assert_close(model(tokens), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_head_is_normalized_anew_on_every_forward(make_model, random_tokens, training):
    model, tokens = make_model("baichuan-alibi").train(training), random_tokens(1, 9)
    for seed in range(3):
        with torch.no_grad():
            model.lm_head.weight.add_(torch.randn(131, 40, generator=torch.Generator().manual_seed(seed)))
            weight = model.lm_head.weight.double()
            unit = weight / weight.square().sum(1, keepdim=True).sqrt()
            expected = model.hidden_states(tokens).double() @ unit.T
            assert (model(tokens).double() - expected).abs().max() < 1e-5
            assert (model.head_weight().double() - unit).abs().max() < 1e-6


def test_stored_head_is_never_changed(make_model, random_tokens):
    model, tokens = make_model("baichuan-rope"), random_tokens(2, 9)
    before = model.lm_head.weight.detach().clone()
    for mode in (True, False, True):
        model.train(mode)
        model(tokens).sum().backward()
        model.eval()
        with torch.no_grad():
            model(tokens)
        generate(model, [[1, 2]], max_new_tokens=2)
    assert torch.equal(model.lm_head.weight, before)
    assert (before.norm(dim=1) - 1).abs().max() > 0.1


def test_head_is_normalized_in_float32_under_bfloat16(make_model):
    model = make_model("baichuan-rope", hidden_size=480).bfloat16()
    weight = model.lm_head.weight.detach().double()
    unit = weight / weight.square().sum(1, keepdim=True).sqrt()
    got = model.head_weight()
    assert got.dtype == torch.bfloat16
    # One rounding to bfloat16's 8 significant bits, and no second one.
    assert ((got.double() - unit).abs() <= 2.0**-8 * 1.0001 * unit.abs()).all()


def test_other_families_use_their_head_as_it_is(make_model):
    for kind in ("llama", "qwen2", "qwen3"):
        model = make_model(kind)
        assert torch.equal(model.head_weight(), model.lm_head.weight)
