"""Variants of the experts on disk: what is loaded computes what was saved, and older files stay readable."""

import json

import pytest
import torch
from torch import nn

from pedgpt.adapters import ExpertLoRALinear, adapted_layers, inject_experts, load_adapter, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VARIANTS = {
    "default": {},
    "top 1": {"top_k": 1},
    "shared A": {"shared_A": True},
    "none universal": {"num_universal_experts": 0},
    "two universal": {"num_universal_experts": 2},
    "one expert": {"num_universal_experts": 0, "num_specific_experts": 1, "shared_A": True},
    "by block": {"num_specific_experts": [1, 3]},
    "by name": {"num_specific_experts": {"*.mlp.*": 4, "q_proj": 2, "*": 3}},
    "all": {"top_k": 2, "shared_A": True, "num_universal_experts": 2, "num_specific_experts": {"*.0.*": 2, "*": 5}},
}


class Sigmoid(ExpertLoRALinear):
    """G = σ(v ⊙ (x W_gᵀ) + b), with parameters of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shift = nn.Parameter(self.router.new_zeros(len(self.router)))
        self.stretch = nn.Parameter(self.router.new_ones(1, len(self.router)))

    def adapter_parameters(self):
        return {**super().adapter_parameters(), "shift": self.shift, "stretch": self.stretch}

    def gates(self, x):
        return torch.sigmoid(self.stretch * nn.functional.linear(x, self.router.to(x.dtype)) + self.shift)


@pytest.mark.parametrize("layer_type", [ExpertLoRALinear, Sigmoid])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reload_gives_the_same_logits_bit_for_bit(
    make_model, randomize, tokens, tmp_path, variant, dtype, layer_type
):
    model, loaded = (make_model().to(dtype).eval() for _ in range(2))
    settings = {"rank": 3, "target_modules": ["q_proj", "*.mlp.*"], "layer_type": layer_type, **VARIANTS[variant]}
    names = inject_experts(model, **settings)
    save_adapter(randomize(model), tmp_path)
    assert load_adapter(loaded, tmp_path, layer_type=layer_type) == names
    assert torch.equal(loaded(tokens), model(tokens))
    before, after = ([(type(m), *vars_of(m)) for m in adapted_layers(each).values()] for each in (model, loaded))
    assert before == after
    torch.manual_seed(0)
    trained = model.train()(tokens)
    torch.manual_seed(0)
    assert torch.equal(loaded.train()(tokens), trained)


def vars_of(layer):
    names = "rank num_specific_experts num_universal_experts top_k shared_A scaling training".split()
    return [getattr(layer, name) for name in names]


def test_the_config_names_what_differs(make_model, tmp_path):
    model = make_model()
    inject_experts(model, target_modules=["o_proj"], num_specific_experts={"*.0.*": 2, "*": 5}, top_k=2, shared_A=True)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["num_specific_experts"] == {f"model.layers.{i}.self_attn.o_proj": n for i, n in enumerate((2, 5))}
    found = [config[key] for key in ("peft_type", "top_k", "shared_A", "num_universal_experts")]
    assert found == ["PEDGPT_EXPERTS", 2, True, 1] and "layer_type" not in config


def test_files_from_before_the_variants_load(make_model, randomize, tokens, tmp_path):
    """Their config has none of the variants' keys, and no null."""
    model, loaded = make_model().eval(), make_model().eval()
    inject_experts(model, rank=2)
    save_adapter(randomize(model), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for key in ("num_universal_experts", "top_k", "shared_A"):
        del config[key]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_universal_experts": 0}, r"has the shape \[8, 32\]; the model and adapter_config.json need \[6, 32\]"),
        ({"shared_A": True}, r"has the shape \[8, 32\]; the model and adapter_config.json need \[2, 32\]"),
        ({"num_universal_experts": -1}, "num_universal_experts must be at least 0, found -1"),
        ({"top_k": 4}, "top_k must be in 1 to num_specific_experts, 3, found 4"),
        ({"num_specific_experts": {"model.layers.0.self_attn.q_proj": 3}}, "no pattern that matches model.layers.1"),
        ({"num_specific_experts": {"*": 0}}, "num_specific_experts must be at least 1, found 0"),
        ({"layer_type": "Sigmoid"}, "holds layers of type Sigmoid; give load_adapter that class as layer_type"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(make_model, tokens, tmp_path, changes, message):
    model = make_model()
    inject_experts(model, rank=2, target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | changes))
    base = make_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(base, tmp_path)
    assert not adapted_layers(base)


def test_another_type_of_layer_is_refused(make_model, tmp_path):
    model = make_model()
    inject_experts(model, rank=2, target_modules=["q_proj"], layer_type=Sigmoid)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="holds layers of type Sigmoid"):
        load_adapter(make_model(), tmp_path)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([2, 3, 4], "has 3 numbers, but the model has 2 blocks"),
        ({"*.layer.*": 2, "*": 3}, r"'\*.layer.\*' matches no linear layer"),
        ({"*.0.*": 2}, r"no pattern that matches model.layers.1.*; add \"\*\" for all others"),
        ([2, 0], "must be at least 1, found 0"),
    ],
)
def test_numbers_by_layer_that_do_not_fit_are_refused(make_model, numbers, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        inject_experts(model, num_specific_experts=numbers)
    assert not adapted_layers(model)


def test_numbers_by_block_and_by_pattern(make_model):
    def numbers(given, **settings):
        model = make_model()
        inject_experts(model, num_specific_experts=given, **settings)
        return {name: layer.num_specific_experts for name, layer in adapted_layers(model).items()}

    found = numbers([4, 2])
    assert {n for name, n in found.items() if ".0." in name} == {4}
    assert {n for name, n in found.items() if ".1." in name} == {2}
    assert found == numbers({"*.0.*": 4, "*": 2})
    assert set(numbers([4, 2], target_modules="*.1.*").values()) == {2}
    assert numbers({"q_proj": 1, "*.self_attn.*": 2, "*": 3}) == {
        name: 1 if name.endswith("q_proj") else 2 if "self_attn" in name else 3 for name in found
    }
