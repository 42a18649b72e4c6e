"""Llama, Qwen2 and Qwen3 against transformers, plus what every model must refuse."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pedgpt.models import ModelConfig, Transformer, generate, load_model, save_model

SIZES = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 32,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA, MISTRAL, QWEN2, QWEN3 = (
    (LlamaForCausalLM, LlamaConfig), (MistralForCausalLM, MistralConfig), (Qwen2ForCausalLM, Qwen2Config),
    (Qwen3ForCausalLM, Qwen3Config),
)  # fmt: skip
CASES = {
    "llama": (LLAMA, {}),
    "llama-gqa-biases-eps": (
        LLAMA,
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.05},
    ),
    "llama-head_dim-mqa": (LLAMA, {"head_dim": 10, "num_key_value_heads": 1}),
    "llama-tied": (LLAMA, {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "llama-rope-llama3": (LLAMA, {"rope_parameters": LLAMA3, "num_key_value_heads": 2}),
    "llama-rope-linear": (LLAMA, {"rope_parameters": LINEAR}),
    "mistral-swish": (
        MISTRAL,
        {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 10, "hidden_act": "swish"},
    ),
    "qwen2-yarn-unused-window": (
        QWEN2,
        {"num_key_value_heads": 2, "rope_parameters": YARN, "use_sliding_window": True, "sliding_window": 3,
         "max_window_layers": 2},
    ),
    "qwen3-yarn-attention_factor": (
        QWEN3,
        {"num_key_value_heads": 3, "head_dim": 16,
         "rope_parameters": {**YARN, "attention_factor": 1.4, "beta_fast": 2.0, "beta_slow": 0.3}},
    ),
    "qwen2": (QWEN2, {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied": (QWEN2, {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "qwen3": (QWEN3, {"num_key_value_heads": 3, "head_dim": 16}),
    "qwen3-tied-biases": (
        QWEN3,
        {"num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True, "attention_bias": True},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory, randomize):
    """(transformers' model, ours loaded from what it saved, the folder)."""
    (model_class, config_class), settings = CASES[request.param]
    theirs = randomize(model_class(config_class(**SIZES, **settings))).eval()
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), folder


# 50 tokens lie beyond the 32 of max_position_embeddings and the 24 of llama3's original window.
@pytest.mark.parametrize("shape", [(2, 50), (3, 1), (1, 2)], ids=str)
def test_logits_match_transformers(pair, random_tokens, shape):
    theirs, ours, _ = pair
    tokens = random_tokens(*shape)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert expected.std() > 0.5  # the tolerance means something
    logits = ours(tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_greedy_answers_match_transformers(pair, random_tokens):
    theirs, ours, _ = pair
    prompt = random_tokens(1, 20)
    (answer,) = generate(ours, prompt.tolist(), max_new_tokens=20)
    with torch.no_grad():
        likeliest = theirs(torch.cat((prompt, torch.tensor([answer])), dim=1)).logits[0, 19:-1].argmax(-1)
    assert answer == likeliest.tolist() and len(answer) == 20


def test_gradients_match_transformers(pair, random_tokens):
    theirs, ours, _ = pair
    tokens = random_tokens(2, 50)
    cotangent = torch.randn(2, 50, 131, generator=torch.Generator().manual_seed(1))
    for model in (theirs, ours):
        model.zero_grad()
    (theirs(tokens).logits * cotangent).sum().backward()
    (ours(tokens) * cotangent).sum().backward()
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        truth = expected[name].grad
        assert truth.abs().max() > 1e-3, name
        assert (parameter.grad - truth).abs().max() <= 1e-4 * truth.abs().max(), name


def test_bfloat16_is_as_near_the_truth_as_transformers(pair, random_tokens):
    _, _, folder = pair
    tokens = random_tokens(2, 50)
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ours = load_model(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs = rounded(tokens).logits
        truth = rounded.float()(tokens).logits  # the same rounded weights, computed in float32
        logits = ours(tokens)
    assert logits.dtype == theirs.dtype == torch.bfloat16
    error, budget = ((value.float() - truth).square().mean().sqrt() for value in (logits, theirs))
    assert 0 < error <= 1.02 * budget


def test_saved_folder_gives_equal_logits_in_transformers(pair, random_tokens, tmp_path):
    _, ours, _ = pair
    save_model(ours, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    tokens = random_tokens(2, 50)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens).logits, ours(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_model_made_from_scratch_loads_in_transformers(make_model, random_tokens, tmp_path, kind):
    ours = make_model(kind)
    save_model(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-5, rtol=0)


OLD_SPELLINGS = {
    "type": {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 300.0},
    "rope_type": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_theta": 300},
    "llama3": {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}, "rope_theta": 500.0},
    "theta-only": {"rope_scaling": None, "rope_theta": 777.0},
}


@pytest.mark.parametrize("spelling", OLD_SPELLINGS)
def test_older_rope_spelling_matches_transformers(randomize, random_tokens, tmp_path, spelling):
    old = OLD_SPELLINGS[spelling]
    new = {"rope_type": "default", **(old["rope_scaling"] or {}), "rope_theta": float(old["rope_theta"])}
    if "type" in new:
        new["rope_type"] = new.pop("type")
    theirs = randomize(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=new))).eval()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, **old}))
    tokens = random_tokens(2, 50)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def test_explicit_positions_match_transformers(pair, random_tokens):
    theirs, ours, _ = pair
    tokens = random_tokens(2, 12)
    positions = torch.stack([torch.arange(12) * 3 + 5, torch.tensor([0, 1, 2, 3, 0, 1, 2, 2, 40, 41, 9, 8])])
    with torch.no_grad():
        mask = torch.ones(2, 1, 12, 12).tril().log()  # or transformers would read packed documents from the restarts
        expected = theirs(tokens, position_ids=positions, attention_mask=mask).logits
        torch.testing.assert_close(ours(tokens, positions=positions), expected, atol=1e-5, rtol=0)
        assert (ours(tokens) - expected).abs().max() > 0.05


def test_hidden_states_times_head_are_the_logits(make_model, random_tokens):
    for kind in ("llama", "qwen2", "baichuan-rope", "baichuan-alibi"):
        model, tokens = make_model(kind), random_tokens(2, 7)
        hidden = model.hidden_states(tokens)
        assert hidden.shape == (2, 7, model.config.hidden_size)
        torch.testing.assert_close(hidden @ model.head_weight().T, model(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "baichuan-alibi"])
@pytest.mark.parametrize("packed", [False, True])
def test_activation_checkpointing_gives_equal_gradients(make_model, random_tokens, kind, packed):
    model, tokens = make_model(kind).train(), random_tokens(2, 17)
    documents = torch.tensor([[0] * 5 + [1] * 12, [0] * 1 + [3] * 9 + [2] * 7]) if packed else None
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for how in ("none", "block"):
        model.activation_checkpointing = how
        model.zero_grad()
        model(tokens, documents=documents).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert len(calls) == 1 + 2  # the second pass computes the block again
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_tied_head_stays_one_parameter(make_model, tmp_path):
    model = make_model("qwen2")
    save_model(model, tmp_path)
    for tied in (model, load_model(tmp_path)):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
        assert "lm_head.weight" not in dict(tied.named_parameters())


def test_initial_weights_have_the_spread_that_the_config_asks_for(raw_config):
    config = ModelConfig.from_hf(raw_config("llama", attention_bias=True, initializer_range=0.07, vocab_size=5000))
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.07, rel=0.1), name


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        (torch.zeros(5, dtype=torch.long), {}, r"tokens must have the shape \[batch, tokens\], found \[5\]"),
        (torch.zeros(1, 5, dtype=torch.long), {"documents": torch.zeros(5)}, r"documents has the shape \[5\]"),
        (torch.zeros(2, 5, dtype=torch.long), {"positions": torch.zeros(1, 5)}, r"positions has the shape \[1, 5\]"),
    ],
)
def test_wrong_shapes_are_errors(make_model, tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model("llama")(tokens, **arguments)


@pytest.mark.parametrize("kind", ["llama", "baichuan-alibi"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_empty_input_gives_empty_logits(make_model, kind, shape):
    tokens = torch.zeros(shape, dtype=torch.long)
    assert make_model(kind)(tokens).shape == (*shape, 131)
    assert make_model(kind)(tokens, documents=tokens).shape == (*shape, 131)
