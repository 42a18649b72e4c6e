"""Adapters merged into the weights: rounded once, measured honestly, and undone to the bit."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import pedgpt.adapters.inject as inject_module
from pedgpt.adapters import (
    ExpertLoRALinear,
    LoRALinear,
    active_adapter,
    adapted_layers,
    adapter_names,
    adapters_disabled,
    inject_experts,
    inject_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from pedgpt.models import ModelConfig, Transformer, load_model, save_model


@pytest.fixture
def adapted(make_model, randomize):
    """adapted(inject, ...) gives a random model with a random adapter, in evaluation."""

    def make(inject=inject_lora, dtype=torch.float32, family="llama", **settings):
        model = make_model(family).to(dtype).eval()
        inject(model, **{"rank": 3, "alpha": 5, **settings})
        return randomize(model)

    return make


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(model, state):
    found = model.state_dict()
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def make_pair(folder, dtype, **settings):
    """PEFT's Llama with a random LoRA, and ours with the same."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).to(dtype).eval()
    ours = Transformer(ModelConfig.from_hf(config.to_dict())).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    peft = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=5, **settings))
    generator = torch.Generator().manual_seed(5)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(folder)
    load_adapter(ours, folder)
    return peft, ours


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_merged_weights_match_peft(tokens, tmp_path, targets):
    peft, ours = make_pair(tmp_path, torch.float32, target_modules=targets)
    merge_lora(ours)
    expected = peft.merge_and_unload()
    found, state = ours.state_dict(), expected.state_dict()
    assert set(found) == set(state)
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), expected(tokens).logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_are_no_further_from_the_truth_than_pefts(tmp_path):
    peft, ours = make_pair(tmp_path, torch.bfloat16, target_modules="all-linear")
    truth = {
        name: layer.weight.double() + 5 / 3 * layer.lora_B.double() @ layer.lora_A.double()
        for name, layer in adapted_layers(ours).items()
    }
    assert len(truth) == 14 and {layer.lora_A.dtype for layer in adapted_layers(ours).values()} == {torch.float32}
    merge_lora(ours)
    theirs = peft.merge_and_unload()
    for name, exact in truth.items():
        weight, other = ours.get_submodule(name).weight, theirs.get_submodule(name).weight
        assert weight.dtype == other.dtype == torch.bfloat16
        errors = [(each.double() - exact).abs() for each in (weight, other)]
        assert errors[0].sum() <= 1.001 * errors[1].sum() and errors[0].max() <= 1.001 * errors[1].max()
        assert (errors[0] <= exact.abs() * 2**-8 * 1.001).all()  # half a unit in the last place: one rounding


@pytest.mark.parametrize("rslora", [False, True])
def test_float64_stays_float64(adapted, tokens, rslora):
    model = adapted(dtype=torch.float64, rslora=rslora)
    scaling = 5 / (3**0.5 if rslora else 3)
    expected = {
        name: layer.weight + scaling * layer.lora_B @ layer.lora_A for name, layer in adapted_layers(model).items()
    }
    logits = model(tokens)
    merge_lora(model)
    torch.testing.assert_close(model(tokens), logits, rtol=1e-5, atol=1e-5)  # norms and rope compute in float32
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(name).weight, weight.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("family", ["llama", "tied", "baichuan"])
def test_layers_become_plain_and_the_model_saves_as_its_base(adapted, make_model, tokens, tmp_path, family):
    model, base = adapted(family=family, dropout=0.1), make_model(family)
    names = list(adapted_layers(model))
    merge_lora(model)
    assert not adapted_layers(model) and not any(p.requires_grad for p in model.parameters())
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(model.state_dict()[name], tensor)}
    assert changed == {f"{name}.weight" for name in names}
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))


def test_every_mode_stays(adapted):
    model = adapted(dropout=0.5)
    model.train()
    model.model.norm.eval()
    model.model.layers[1].mlp.up_proj.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    merge_lora(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    unmerge_lora(model)
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inject", [inject_lora, inject_experts])
def test_unmerge_gives_back_every_bit(adapted, tokens, inject, dtype):
    model = adapted(inject, dtype)
    state, parameters, logits = snapshot(model), dict(model.named_parameters()), model(tokens)
    for _ in range(2):
        merge_lora(model, universal_only=inject is inject_experts)
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, state["model.layers.0.mlp.up_proj.weight"])
        with torch.no_grad():  # what happens to the merged weights is forgotten
            for layer in (model.model.layers[0].mlp.up_proj, model.model.layers[1].self_attn.q_proj):
                for parameter in layer.parameters():
                    parameter.add_(1)
        unmerge_lora(model)
        assert_equal(model, state)
        assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
        assert torch.equal(model(tokens), logits)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in state if "lora_" in name or "router" in name
    }


def test_mapped_weights_stay_mapped(adapted, make_model, tmp_path):
    """Merging copies them, but what unmerge gives back is still the file's own memory."""
    save_model(make_model(), tmp_path)
    model = load_model(tmp_path)
    inject_lora(model)
    places = {name: layer.weight.data_ptr() for name, layer in adapted_layers(model).items()}
    merge_lora(model)
    unmerge_lora(model)
    assert {name: layer.weight.data_ptr() for name, layer in adapted_layers(model).items()} == places


def test_the_universal_expert_alone_matches_its_matrix(adapted, make_model, tokens):
    """W takes it up; the others go on as they were, so logits stay but for rounding."""
    model = adapted(inject_experts, dtype=torch.float64)
    layers, logits = adapted_layers(model), model(tokens)
    before = {name: copy.deepcopy(layer) for name, layer in layers.items()}
    merge_lora(model, universal_only=True)
    torch.testing.assert_close(model(tokens), logits, rtol=1e-5, atol=1e-5)
    assert list(adapted_layers(model)) == list(layers)
    x = torch.randn(6, 32, dtype=torch.float64)
    for name, layer in adapted_layers(model).items():
        old = before[name]
        assert type(layer) is ExpertLoRALinear and layer is not layers[name]
        weight = old.weight + 5 / 3 * old.lora_B[:, :3] @ old.lora_A[:3]
        torch.testing.assert_close(layer.weight, weight, rtol=1e-14, atol=1e-14)
        assert not layer.lora_B[:, :3].any() and torch.equal(layer.lora_B[:, 3:], old.lora_B[:, 3:])
        for part in ("lora_A", "router", "router_noise"):
            assert torch.equal(getattr(layer, part), getattr(old, part))
        assert [p.requires_grad for p in layer.parameters()] == [p.requires_grad for p in old.parameters()]
        if layer.in_features == 32:
            torch.testing.assert_close(layer(x), old(x), rtol=1e-12, atol=1e-12)


def test_a_partly_merged_adapter_fits_the_merged_base(adapted, make_model, tokens, tmp_path):
    model = adapted(inject_experts)
    merge_lora(model, universal_only=True)
    save_adapter(model, tmp_path)
    base = make_model().eval()
    base.load_state_dict({name: model.state_dict()[name] for name in base.state_dict()})
    load_adapter(base, tmp_path)
    assert torch.equal(base(tokens), model(tokens))


@pytest.mark.parametrize("inject", [inject_lora, inject_experts])
def test_a_trainable_base_stays_trainable(make_model, inject):
    model = make_model()
    inject(model, target_modules=["q_proj", "v_proj"])
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    merge_lora(model, universal_only=inject is inject_experts)
    weights = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("weight")}
    assert weights == {"model.layers.0.self_attn.q_proj.weight"}


def test_frozen_experts_stay_frozen(adapted):
    model = adapted(inject_experts).requires_grad_(False)
    merge_lora(model, universal_only=True)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("inject", [inject_lora, inject_experts])
def test_unmerge_keeps_the_mode_that_the_model_is_in(adapted, inject):
    model = adapted(inject)
    merge_lora(model, universal_only=inject is inject_experts)
    model.train()
    unmerge_lora(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("inject", [inject_lora, inject_experts])
def test_unmerge_follows_a_model_that_was_cast(adapted, tokens, inject):
    model, other = adapted(inject), adapted(inject)
    merge_lora(model, universal_only=inject is inject_experts)
    model.double()
    unmerge_lora(model)
    assert_equal(model, snapshot(other.double()))
    assert torch.equal(model(tokens), other(tokens))


def test_copies_of_a_merged_model_are_independent(adapted, tokens):
    model = adapted()
    logits = model(tokens)
    merge_lora(model)
    merged = snapshot(model)
    twin = copy.deepcopy(model)
    unmerge_lora(twin)
    assert torch.equal(twin(tokens), logits) and not adapted_layers(model)
    assert_equal(model, merged)
    unmerge_lora(model)
    assert torch.equal(model(tokens), logits)


def test_the_active_of_several_adapters_is_merged(adapted, randomize, tokens):
    model = adapted()
    first = model(tokens)
    inject_experts(model, name="experts", rank=2)
    second = randomize(model, seed=8)(tokens)
    set_adapter(model, "default")
    merge_lora(model)
    assert active_adapter(model) == "default" and adapter_names(model) == ["default", "experts"]
    torch.testing.assert_close(model(tokens), first, rtol=1e-4, atol=1e-4)
    unmerge_lora(model)
    assert torch.equal(model(tokens), first) and active_adapter(model) == "default"
    set_adapter(model, "experts")
    assert torch.equal(model(tokens), second)


def test_layers_that_were_put_in_by_hand_merge_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), LoRALinear(nn.Linear(5, 4), rank=2, alpha=3))
    nn.init.normal_(model[2].lora_B)
    layer, x = model[2], torch.randn(3, 6)
    expected = model(x)
    merge_lora(model)
    assert type(model[2]) is nn.Linear and model[2].bias is layer.bias
    torch.testing.assert_close(model(x), expected)
    unmerge_lora(model)
    assert model[2] is layer and torch.equal(model(x), expected)


@pytest.mark.parametrize("inject", [inject_lora, inject_experts])
def test_while_merged_all_else_waits(adapted, inject):
    model = adapted(inject)
    inject_lora(model, name="other", rank=2)
    set_adapter(model, "default")
    merge_lora(model, universal_only=inject is inject_experts)
    state = snapshot(model)
    for change in (
        lambda: set_adapter(model, "other"),
        lambda: set_adapter(model, None),
        lambda: inject_lora(model, name="new"),
        lambda: inject_experts(model),
        lambda: merge_lora(model),
        lambda: merge_lora(model, universal_only=True),
        lambda: adapters_disabled(model).__enter__(),
    ):
        with pytest.raises(ValueError, match="merged into the weights.*unmerge_lora first"):
            change()
    assert_equal(model, state)
    unmerge_lora(model)
    with pytest.raises(ValueError, match="nothing is merged; merge_lora first"):
        unmerge_lora(model)


def test_what_cannot_be_merged_is_refused_and_left_alone(adapted, make_model, tokens):
    with pytest.raises(ValueError, match="no active adapter to merge; inject_lora, load_adapter or set_adapter"):
        merge_lora(make_model())
    experts, lora = adapted(inject_experts), adapted()
    logits = experts(tokens), lora(tokens)
    with pytest.raises(ValueError, match="depends on the input.*universal_only=True"):
        merge_lora(experts)
    with pytest.raises(ValueError, match="universal_only is for experts"):
        merge_lora(lora, universal_only=True)
    assert torch.equal(experts(tokens), logits[0]) and torch.equal(lora(tokens), logits[1])
    set_adapter(lora, None)
    with pytest.raises(ValueError, match="no active adapter to merge"):
        merge_lora(lora)


def test_a_merge_that_fails_half_way_is_undone(adapted, tokens, monkeypatch):
    model = adapted()
    layers, logits = adapted_layers(model), model(tokens)
    original, calls = inject_module._merged, []

    def run_out_of_memory(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return original(*arguments)

    monkeypatch.setattr(inject_module, "_merged", run_out_of_memory)
    with pytest.raises(MemoryError):
        merge_lora(model)
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert torch.equal(model(tokens), logits)
    merge_lora(model)
    torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-4)
