"""PEFT reads what we save, and we read what PEFT saved, with equal logits and gradients."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from pedgpt.adapters import adapted_layers, inject_experts, inject_lora, load_adapter, save_adapter
from pedgpt.models import ModelConfig, Transformer

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@pytest.fixture
def make_pair():
    """make_pair() gives transformers' Llama and ours, with the same random weights."""

    def make():
        config = LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, attn_implementation="eager",
        )  # fmt: skip
        torch.manual_seed(0)
        theirs = LlamaForCausalLM(config).eval()
        ours = Transformer(ModelConfig.from_hf(config.to_dict())).eval()
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    return make


def test_peft_does_not_mistake_experts_for_its_own(make_pair, tmp_path):
    theirs, ours = make_pair()
    inject_experts(ours)
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "PEDGPT_EXPERTS"
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(theirs, tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], "model.layers.1.mlp.down_proj"])
def test_peft_loads_what_we_save_with_equal_logits(make_pair, randomize, tokens, tmp_path, targets, rslora):
    theirs, ours = make_pair()
    inject_lora(ours, rank=3, alpha=5, dropout=0.1, rslora=rslora, target_modules=targets)
    randomize(ours)
    save_adapter(ours, tmp_path, base_model="base")
    loaded = PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), loaded(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
        with loaded.disable_adapter():
            assert (ours(tokens) - loaded(input_ids=tokens).logits).abs().max() > 0.05
    config = loaded.peft_config["default"]
    assert config.use_rslora is rslora
    assert (config.r, config.lora_alpha, config.lora_dropout, config.base_model_name_or_path) == (3, 5, 0.1, "base")


SELECTIONS = {
    "all": ({"target_modules": "all-linear"}, 14),
    "names": ({"target_modules": ["q_proj", "v_proj"]}, 4),
    "one": ({"target_modules": ["layers.0.mlp.down_proj"]}, 1),
    "regex": ({"target_modules": r".*\.(0\.self_attn\.[qk]|1\.mlp\.up)_proj"}, 3),
    "excluded": ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, 3),
    "some layers": ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, 2),
    "rslora": ({"target_modules": "all-linear", "use_rslora": True}, 14),
    "fit elsewhere": ({"target_modules": ["q_proj", "W_pack"]}, 2),
}


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_adapter_that_peft_saved_loads_with_equal_logits(
    make_pair, randomize, tokens, tmp_path, selection, safe
):
    settings, count = SELECTIONS[selection]
    theirs, ours = make_pair()
    peft = randomize(get_peft_model(theirs, LoraConfig(r=3, lora_alpha=5, **settings))).eval()
    peft.save_pretrained(tmp_path)
    if not safe:  # as older versions of PEFT saved
        torch.save(load_file(tmp_path / WEIGHTS), tmp_path / BIN)
        (tmp_path / WEIGHTS).unlink()
    assert len(load_adapter(ours, tmp_path)) == len(adapted_layers(ours)) == count
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), peft(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)


def test_peft_adapters_beyond_lora_are_refused(make_pair, tmp_path):
    for number, (settings, message) in enumerate(
        [
            ({"modules_to_save": ["lm_head"]}, "modules_to_save is "),
            ({"use_dora": True}, "use_dora is True"),
            ({"bias": "all"}, "bias is 'all'"),
            ({"target_modules": ["embed_tokens", "q_proj"]}, "unexpected .*embed_tokens"),
            ({"trainable_token_indices": [3]}, "trainable_token_indices is "),
        ]
    ):
        theirs, ours = make_pair()
        config = LoraConfig(**({"r": 3, "target_modules": ["q_proj"]} | settings))
        get_peft_model(theirs, config).save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match=message):
            load_adapter(ours, tmp_path / str(number))
        assert not adapted_layers(ours)


def test_gradients_of_a_whole_model_match_peft(make_pair, randomize, tokens, tmp_path):
    theirs, ours = make_pair()
    peft = randomize(get_peft_model(theirs, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))).eval()
    peft.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    ours(tokens).square().mean().backward()
    peft(input_ids=tokens).logits.square().mean().backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for name, p in peft.named_parameters()
        if p.requires_grad
    }
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert set(gradients) == set(expected) and len(gradients) == 28
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=1e-4, atol=1e-5)


def test_a_peft_adapter_that_changed_its_base_is_refused(make_pair, tmp_path):
    theirs, ours = make_pair()
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(theirs, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa'"):
        load_adapter(ours, tmp_path)
