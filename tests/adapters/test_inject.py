"""Which layers get adapters, what trains then, and that switching them off gives the base back."""

import warnings

import pytest
import torch
from torch import nn

from pedgpt.adapters import (
    ExpertLoRALinear,
    LoRALinear,
    adapted_layers,
    adapter_names,
    adapters_disabled,
    inject_experts,
    inject_lora,
    load_adapter,
    save_adapter,
    set_adapter,
)
from pedgpt.models import ModelConfig, Transformer

INJECT = {inject_lora: LoRALinear, inject_experts: ExpertLoRALinear}
BLOCK = {
    "llama": [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")],
    "baichuan": ["self_attn.W_pack", "self_attn.o_proj"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")],
}
BLOCK["tied"] = BLOCK["llama"]


def names(*parts, layers=(0, 1)):
    return [f"model.layers.{i}.{part}" for i in layers for part in parts]


@pytest.mark.parametrize("inject", INJECT)
@pytest.mark.parametrize("family", BLOCK)
def test_all_linear_takes_every_linear_layer_but_the_head(make_model, inject, family):
    model = make_model(family)
    head = model.lm_head
    assert inject(model) == names(*BLOCK[family]) == list(adapted_layers(model))
    assert {type(layer) for layer in adapted_layers(model).values()} == {INJECT[inject]}
    assert model.lm_head is head and type(head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family == "tied")


PATTERNS = [
    ("q_proj", names("self_attn.q_proj")),
    (["v_proj", "q_proj", "q_proj"], names("self_attn.q_proj", "self_attn.v_proj")),
    ("*.mlp.*", names("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    (
        ("*.1.mlp.*", "0.self_attn.o_proj"),
        ["model.layers.0.self_attn.o_proj", *names("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", layers=[1])],
    ),
    ("model.layers.1.mlp.up_proj", names("mlp.up_proj", layers=[1])),
    ("*[qk]_proj", names("self_attn.q_proj", "self_attn.k_proj")),
]


@pytest.mark.parametrize(("patterns", "expected"), PATTERNS)
@pytest.mark.parametrize("inject", INJECT)
def test_names_and_patterns(make_model, inject, patterns, expected):
    model = make_model()
    assert inject(model, target_modules=patterns) == expected
    assert list(adapted_layers(model)) == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("query", "'query' matches no linear layer; the model has .*down_proj.*q_proj"),
        ("proj", "'proj' matches no"),
        (["q_proj", "W_pack"], "'W_pack' matches no"),
        ("lm_head", "'lm_head' matches no"),
        ("embed_tokens", "'embed_tokens' matches no"),
        ([], "target_modules is empty"),
    ],
)
@pytest.mark.parametrize("inject", INJECT)
def test_a_pattern_that_matches_nothing_is_refused_and_leaves_the_model_alone(make_model, inject, patterns, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        inject(model, target_modules=patterns)
    assert not adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("settings", [{"rank": 0}, {"dropout": 2.0}])
@pytest.mark.parametrize("inject", INJECT)
def test_bad_settings_leave_the_model_alone(make_model, inject, settings):
    model = make_model()
    with pytest.raises(ValueError):
        inject(model, **settings)
    assert not adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("second", INJECT)
@pytest.mark.parametrize("first", INJECT)
def test_a_second_injection_is_refused(make_model, first, second):
    model = make_model()
    matched = first(model, target_modules="q_proj")
    with pytest.raises(ValueError, match="has adapters already.*give another name="):
        second(model, target_modules="v_proj")
    assert list(adapted_layers(model)) == matched


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("inject", INJECT)
def test_settings_reach_every_layer(make_model, inject, rslora):
    model = make_model()
    inject(model, rank=4, alpha=6, dropout=0.1, rslora=rslora)
    found = {(layer.rank, layer.alpha, layer.dropout, layer.rslora, layer.scaling)
             for layer in adapted_layers(model).values()}  # fmt: skip
    assert found == {(4, 6, 0.1, rslora, 3 if rslora else 1.5)}


@pytest.mark.parametrize("inject", INJECT)
@pytest.mark.parametrize("family", BLOCK)
def test_training_changes_the_adapters_and_nothing_else(make_model, tokens, inject, family):
    model = make_model(family)
    base = {name: p.clone() for name, p in model.named_parameters()}
    inject(model, rank=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(before) - adapters == set(base)  # the base keeps its names
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):  # B is zero at first, so A and the router move from the second step on
        model(tokens).log_softmax(-1)[..., 3].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == adapters
    for name, weight in base.items():
        assert torch.equal(model.get_parameter(name), weight)


@pytest.mark.parametrize("inject", INJECT)
@pytest.mark.parametrize("family", BLOCK)
def test_switched_off_the_model_is_its_base_bit_for_bit(make_model, tokens, randomize, inject, family):
    base, model = make_model(family).eval(), make_model(family).eval()
    inject(model)
    assert torch.equal(model(tokens), base(tokens))  # new adapters are the identity
    randomize(model)
    adapted = model(tokens)
    assert not torch.allclose(adapted, base(tokens))
    with adapters_disabled(model):
        assert torch.equal(model(tokens), base(tokens))
        with adapters_disabled(model):
            pass
        assert torch.equal(model(tokens), base(tokens))  # the inner context gives back what it found
    assert torch.equal(model(tokens), adapted)
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert torch.equal(model(tokens), adapted)


@pytest.mark.parametrize("inject", INJECT)
def test_the_adapted_model_matches_a_base_with_merged_weights(make_model, tokens, randomize, inject):
    """With equal gates, the mixture is one fixed matrix W + α/r (B_u A_u + mean_j B_j A_j)."""
    base, model = make_model().double().eval(), make_model().double().eval()
    matched = inject(model, rank=3, alpha=7)
    randomize(model)
    for name in matched:
        layer = model.get_submodule(name)
        products = [layer.lora_B[:, i : i + 3] @ layer.lora_A[i : i + 3] for i in range(0, len(layer.lora_A), 3)]
        if inject is inject_experts:
            layer.router.data.zero_()
            products = [products[0] + torch.stack(products[1:]).mean(0)]
        base.get_submodule(name).weight.data += 7 / 3 * products[0].detach()
    # RMSNorm and rope compute in float32.
    torch.testing.assert_close(model(tokens), base(tokens), rtol=1e-5, atol=1e-5)


def test_rank_8_on_all_of_baichuan2_7b_trains_about_0_95_percent():
    config = ModelConfig.from_hf(
        {
            "model_type": "baichuan",
            "vocab_size": 125_696,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "model_max_length": 4096,
        }
    )
    with torch.device("meta"):
        model = Transformer(config)
        base = sum(p.numel() for p in model.parameters())
        assert base == 7_505_973_248  # the published size
        assert len(inject_experts(model, rank=8, num_specific_experts=3)) == 32 * 5
    assert all(p.is_meta for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # The five layers of a block, by the sums of their widths; W_g and W_n have 3 rows each.
    inputs, outputs = 4 * 4096 + 11_008, 5 * 4096 + 2 * 11_008
    assert trainable == 32 * (4 * 8 * (inputs + outputs) + 2 * 3 * inputs)
    assert 0.0095 < trainable / (base + trainable) < 0.0105


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize("inject", INJECT)
def test_layers_that_are_more_than_linear_are_never_left_out_silently(inject):
    model = nn.Sequential(nn.Linear(8, 8), Tripled(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    read = "which .* reads without a call of the layer"  # torch's encoder, where nothing trains, in one operator
    for targets, why in {
        "all-linear": r"1.weight, \[8, 8\] of a Tripled \(1 such in all", "1": r"1.weight, \[8, 8\] of a Tripled",
        "linear1": f"2.linear1.weight, {read}", "*.out_proj": f"2.self_attn.out_proj.weight, {read}",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"also asks for {why}.*the model has 0\\)"):
            inject(model, target_modules=targets)
    assert inject(model, target_modules="0") == ["0"]
    assert state.keys() < model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


class OwnEncoder(nn.TransformerEncoderLayer):
    def forward(self, x, **masks):
        return x + self.linear2(self.linear1(super().forward(x)))


class Caller(nn.Module):
    """What is no use of a weight in the place of a call."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        nn.init.trunc_normal_(
            self.proj.weight,
            std=0.02,
        )

    def forward(self, x):
        if isinstance(self.proj.weight, torch.Tensor) and self.proj.weight.dtype != x.dtype:
            x = x.to(self.proj.weight.dtype)
        return self.proj(x)


class Reader(Caller):
    def forward(self, x):
        return nn.functional.linear(x, weight=self.proj.weight, bias=self.proj.bias)


@pytest.mark.parametrize(
    ("make", "taken", "left"),
    [
        (lambda: OwnAttention(8, 2), [], ["out_proj"]),
        (lambda: OwnEncoder(8, 2, 16), [], ["self_attn.out_proj", "linear1", "linear2"]),
        (lambda: nn.TransformerDecoderLayer(8, 2, 16), ["linear1", "linear2"], ["self_attn.out_proj"]),
        (Caller, ["proj"], []),
        (Reader, [], ["proj"]),
    ],
)
def test_a_weight_that_is_read_without_a_call_is_left_out_with_a_warning(make, taken, left):
    model = nn.ModuleDict({"a": make(), "out_proj": nn.Linear(8, 8)})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert inject_lora(model) == [*(f"a.{name}" for name in taken), "out_proj"]
    assert len(found) == (1 if left else 0) and all(w.filename == __file__ for w in found)
    for name in left:
        with pytest.raises(ValueError, match=f"also asks for a.{name}.weight, which"):
            inject_lora(model, target_modules=f"a.{name}", name="other")
    assert inject_lora(model, target_modules="out_proj", name="one") == ["out_proj"]  # the whole name means that layer


def test_layers_without_a_source_are_as_they_seem():
    scope = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.proj.weight.T", scope)
    model = scope["Made"]()
    model.proj, model.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)
    with pytest.warns(UserWarning, match="leaves out attention.out_proj.weight, which MultiheadAttention reads"):
        assert inject_lora(model) == ["proj"]


@pytest.mark.parametrize("wrap", [lambda head: head, lambda head: nn.ModuleList([head])], ids=["layer", "list"])
def test_a_head_of_a_model_within_another_stays_out(wrap):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scores = nn.Linear(8, 8), wrap(nn.Linear(8, 20))

        def get_output_embeddings(self):
            return self.scores

    assert inject_lora(nn.ModuleDict({"inner": Inner()})) == ["inner.body"]


@pytest.mark.parametrize("inject", INJECT)
def test_a_lone_layer_cannot_be_adapted_in_place(inject):
    with pytest.raises(ValueError, match="matches no linear layer"):
        inject(nn.Linear(4, 4))


def test_a_full_name_means_that_layer_alone():
    model = nn.ModuleDict({"q": nn.Linear(3, 3), "copy": nn.ModuleDict({"q": nn.Linear(3, 3)})})
    assert inject_lora(model, target_modules=["q"]) == ["q"]


@pytest.mark.parametrize("inject", INJECT)
def test_hooks_stay_where_they_were(make_model, tokens, inject):
    model, calls = make_model(), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append("after"))
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda *_: calls.append("before"))
    inject(model)
    model(tokens)
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 2.0}, "rank must be a"), ({"rank": True}, "rank must be a"), ({"alpha": float("nan")}, "alpha must")],
)
@pytest.mark.parametrize("inject", INJECT)
def test_settings_that_are_no_numbers_of_their_kind_are_refused(make_model, inject, settings, message):
    with pytest.raises(ValueError, match=message):
        inject(make_model(), **settings)


@pytest.mark.parametrize("base", [nn.Embedding(3, 3), LoRALinear(nn.Linear(3, 3))])
@pytest.mark.parametrize("layer", INJECT.values())
def test_only_plain_linear_layers_are_wrapped(layer, base):
    with pytest.raises(ValueError, match=f"plain nn.Linear, found {type(base).__name__}"):
        layer(base)


def test_a_compiled_model_is_the_model_itself(make_model, tmp_path):
    model = make_model()
    compiled = torch.compile(model)
    names = inject_lora(compiled, target_modules="q_proj")
    assert names == list(adapted_layers(model)) == list(adapted_layers(compiled))
    assert adapter_names(compiled) == ["default"] == adapter_names(model)
    save_adapter(compiled, tmp_path)
    fresh = make_model()
    assert load_adapter(fresh, tmp_path) == names
    set_adapter(compiled, None)
    assert not adapted_layers(model)


@pytest.mark.parametrize("inject", INJECT)
def test_a_layer_under_two_names_is_refused(inject):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.append(model[0])
    with pytest.raises(ValueError, match="0 and 2 are one layer"):
        inject(model)
    assert inject(model, target_modules="1") == ["1"]
