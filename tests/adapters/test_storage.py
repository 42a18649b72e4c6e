"""Adapters on disk: saved and loaded exactly, under names, and never half."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pedgpt.adapters import adapted_layers, inject_experts, inject_lora, load_adapter, save_adapter
from pedgpt.adapters.inject import active_adapter, adapter_names, set_adapter

INJECT = [inject_lora, inject_experts]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def test_lora_files_have_pefts_layout(make_model, tmp_path):
    model = make_model()
    inject_lora(model, rank=3, alpha=5, target_modules=["v_proj", "down_proj"])
    save_adapter(model, tmp_path, base_model="儿科/模型")
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 5, "儿科/模型")
    prefix = "base_model.model.model.layers"
    expected = {}
    for i in (0, 1):
        expected[f"{prefix}.{i}.self_attn.v_proj.lora_A.weight"] = [3, 32]
        expected[f"{prefix}.{i}.self_attn.v_proj.lora_B.weight"] = [16, 3]
        expected[f"{prefix}.{i}.mlp.down_proj.lora_A.weight"] = [3, 44]
        expected[f"{prefix}.{i}.mlp.down_proj.lora_B.weight"] = [32, 3]
    assert {name: list(t.shape) for name, t in load_file(tmp_path / WEIGHTS).items()} == expected
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "tied", "baichuan"])
@pytest.mark.parametrize("inject", INJECT)
def test_a_reload_gives_the_same_logits_bit_for_bit(make_model, randomize, tokens, tmp_path, inject, family, dtype):
    model = make_model(family).to(dtype).eval()
    settings = {"num_specific_experts": 2} if inject is inject_experts else {}
    settings["rslora"] = family == "tied"
    names = inject(model, rank=3, alpha=5, target_modules=["o_proj", "*.1.mlp.*"], **settings)
    randomize(model)
    save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]

    loaded = make_model(family).to(dtype).eval()
    assert load_adapter(loaded, tmp_path) == names
    assert torch.equal(loaded(tokens), model(tokens))
    trainable = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in model.named_parameters() if p.requires_grad]
    torch.manual_seed(0)
    trained = model.train()(tokens)
    torch.manual_seed(0)
    assert torch.equal(loaded.train()(tokens), trained)  # what only training reads came back as well


def test_given_weights_replace_the_models_own(make_model, randomize, tokens, tmp_path):
    """As a sharded run saves: the weights come gathered, in any memory layout."""
    model, other = make_model().eval(), make_model().eval()
    for m in (model, other):
        inject_experts(m)
    weights = {name: p.detach().T.contiguous().T for name, p in randomize(model).named_parameters() if p.requires_grad}
    save_adapter(other, tmp_path, state_dict=weights)
    loaded = make_model().eval()
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("inject", INJECT)
def test_weights_that_are_not_whole_are_refused_before_anything_is_written(make_model, tmp_path, inject):
    model = make_model()
    inject(model, rank=2, target_modules="q_proj")
    key = "model.layers.1.self_attn.q_proj.lora_A"
    rows = model.get_parameter(key).shape[0]
    message = rf"^{key}: found nothing or a part of it, expected the whole \[{rows}, 32\]; .*training.gather_weights"
    for broken in (
        lambda t: t.flatten(), lambda t: t[:0], lambda t: t[: rows // 2], lambda t: t.new_zeros(0),
        lambda t: t.to("meta"),
    ):  # fmt: skip
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        weights[key] = broken(weights[key])
        with pytest.raises(ValueError, match=message):
            save_adapter(model, tmp_path / "new", state_dict=weights)
    del weights[key]
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path / "new", state_dict=weights)
    # ZeRO-3 leaves empty placeholders in the model itself.
    model.get_parameter(key).data = torch.empty(0)
    with pytest.raises(ValueError, match=rf"^{key}: found nothing or a part of it"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_layers_that_do_not_share_their_settings_are_refused(make_model, tmp_path):
    model = make_model()
    inject_lora(model.model.layers[0], rank=2)
    inject_lora(model.model.layers[1], rank=3)
    with pytest.raises(ValueError, match="layers differ in their settings.*'r': 2"):
        save_adapter(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_is_not_finite_is_saved_as_it_is(make_model, tmp_path):
    model, loaded = make_model(), make_model()
    inject_lora(model, target_modules="q_proj")
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_B.data[0, :2] = torch.tensor([float("nan"), float("-inf")])
    save_adapter(model, tmp_path)
    load_adapter(loaded, tmp_path)
    found = loaded.model.layers[0].self_attn.q_proj.lora_B
    torch.testing.assert_close(found, layer.lora_B, rtol=0, atol=0, equal_nan=True)


def test_adapters_load_under_names_and_switch(make_model, randomize, tokens, tmp_path):
    expected = {}
    for seed, (name, inject, targets) in enumerate(
        [("lora", inject_lora, "q_proj"), ("experts", inject_experts, "*.mlp.*"), ("other", inject_lora, "v_proj")]
    ):
        model = make_model().eval()
        inject(model, rank=seed + 2, target_modules=targets)
        save_adapter(randomize(model, seed=seed), tmp_path / name)
        expected[name] = model(tokens)
    model = make_model().eval()
    for name, logits in expected.items():
        names = load_adapter(model, tmp_path / name, name=name)
        assert active_adapter(model) == name and names == list(adapted_layers(model))
        assert torch.equal(model(tokens), logits)
    assert adapter_names(model) == list(expected)
    for name, logits in reversed(expected.items()):
        set_adapter(model, name)
        assert torch.equal(model(tokens), logits)
    # The active one is saved.
    save_adapter(model, tmp_path / "again")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "lora" / file).read_bytes()


@pytest.mark.parametrize("inject", INJECT)
def test_a_name_that_is_taken_is_refused(make_model, randomize, tokens, tmp_path, inject):
    model = make_model().eval()
    inject(model, target_modules="q_proj", name="taken")
    save_adapter(model, tmp_path)
    inject_lora(model, target_modules="o_proj", name="active")
    expected = randomize(model)(tokens)
    with pytest.raises(ValueError, match=f"{tmp_path}: the model has adapters already under the name 'taken'"):
        load_adapter(model, tmp_path, name="taken")
    assert active_adapter(model) == "active" and torch.equal(model(tokens), expected)
    load_adapter(model, tmp_path, name="third")
    assert adapter_names(model) == ["taken", "active", "third"]


def test_a_save_that_dies_leaves_the_last_adapter(make_model, randomize, tokens, tmp_path, monkeypatch):
    model = make_model().eval()
    inject_experts(model)
    save_adapter(randomize(model), tmp_path)
    expected = model(tokens)

    def die(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match="no space"):
        save_adapter(randomize(model, seed=6), tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    loaded = make_model().eval()
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(tokens), expected)


def test_saving_a_model_without_adapters_is_refused(make_model, tmp_path):
    with pytest.raises(ValueError, match="no active adapter to save"):
        save_adapter(make_model(), tmp_path)
    assert not any(tmp_path.iterdir())
