"""Adapters on disk: exact, readable by PEFT and from PEFT, and every broken file is refused by name."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import pedgpt.adapters.storage as storage
from pedgpt.adapters import adapted_layers, inject_experts, inject_lora, load_adapter, save_adapter
from pedgpt.adapters.inject import active_adapter, adapter_names, set_adapter
from pedgpt.models import ModelConfig, Transformer

INJECT = [inject_lora, inject_experts]
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_fills_float32(make_model, randomize, tmp_path, dtype):
    model, loaded = make_model(), make_model().to(dtype)
    inject_lora(model, target_modules="q_proj")
    save_adapter(randomize(model), tmp_path)
    set_weights(lambda w: w.update({key: tensor.to(dtype) for key, tensor in w.items()}))(tmp_path)
    load_adapter(loaded, tmp_path)
    for name, layer in adapted_layers(loaded).items():
        expected = model.get_submodule(name).lora_A
        assert layer.lora_A.dtype == torch.float32 and torch.equal(layer.lora_A, expected.to(dtype).float())


def test_peft_adapters_beyond_lora_are_refused(make_pair, tmp_path):
    for number, (settings, message) in enumerate(
        [
            ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
            ({"use_dora": True}, "use_dora is set"),
            ({"bias": "all"}, "bias is 'all'"),
            ({"target_modules": ["embed_tokens", "q_proj"]}, "unexpected .*embed_tokens"),
            ({"trainable_token_indices": [3]}, "trainable_token_indices is set"),
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


def test_peft_does_not_mistake_experts_for_its_own(make_pair, tmp_path):
    theirs, ours = make_pair()
    inject_experts(ours)
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "PEDGPT_EXPERTS"
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(theirs, tmp_path)


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


@pytest.mark.parametrize("inject", INJECT)
def test_a_model_that_has_adapters_already_is_filled(make_model, randomize, tokens, tmp_path, inject):
    model = make_model().eval()
    inject(model)
    save_adapter(randomize(model), tmp_path)
    expected = model(tokens)
    assert not torch.allclose(randomize(model, seed=6)(tokens), expected)
    assert load_adapter(model, tmp_path) == list(adapted_layers(model))
    assert torch.equal(model(tokens), expected)


def test_given_weights_replace_the_models_own(make_model, randomize, tokens, tmp_path):
    """As a sharded run saves: the weights come gathered, in any memory layout."""
    model, other = make_model().eval(), make_model().eval()
    for m in (model, other):
        inject_experts(m)
    weights = {name: p.detach().T.contiguous().T for name, p in randomize(model).named_parameters() if p.requires_grad}
    save_adapter(other, tmp_path, state_dict=weights)
    load_adapter(other, tmp_path)
    assert torch.equal(other(tokens), model(tokens))


@pytest.mark.parametrize("inject", INJECT)
def test_weights_that_are_not_whole_are_refused_before_anything_is_written(make_model, tmp_path, inject):
    model = make_model()
    inject(model, rank=2, target_modules="q_proj")
    key = "model.layers.1.self_attn.q_proj.lora_A"
    rows = model.get_parameter(key).shape[0]
    for broken, found in (
        (lambda t: t.flatten(), rf"\[{32 * rows}\]"),
        (lambda t: t[:0], r"\[0, 32\]"),
        (lambda t: t[: rows // 2], rf"\[{rows // 2}, 32\]"),
        (lambda t: t.new_zeros(0), r"\[0\]"),
        (lambda t: t.to("meta"), rf"\[{rows}, 32\] on the meta device"),
    ):
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        weights[key] = broken(weights[key])
        message = rf"^{key}: found .*{found}, expected the whole \[{rows}, 32\]; .*pedgpt.training.gather_weights"
        with pytest.raises(ValueError, match=message):
            save_adapter(model, tmp_path / "new", state_dict=weights)
    del weights[key]
    with pytest.raises(ValueError, match=f"state_dict lacks {key}; .*gather_weights"):
        save_adapter(model, tmp_path / "new", state_dict=weights)
    # ZeRO-3 leaves empty placeholders in the model itself.
    model.get_parameter(key).data = torch.empty(0)
    with pytest.raises(ValueError, match=rf"^{key}: found .*\[0\], expected"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_layers_that_do_not_share_their_settings_are_refused(make_model, tmp_path):
    model = make_model()
    inject_lora(model.model.layers[0], rank=2)
    inject_lora(model.model.layers[1], rank=3)
    with pytest.raises(ValueError, match="model.layers.1.self_attn.q_proj has .*'r': 3.*the first layer .*'r': 2"):
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
    # The active one is saved, and a name that is there is filled and becomes active.
    save_adapter(model, tmp_path / "again")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "lora" / file).read_bytes()
    set_adapter(model, "other")
    randomize(model, seed=9)
    set_adapter(model, "lora")
    load_adapter(model, tmp_path / "other", name="other")
    assert active_adapter(model) == "other" and torch.equal(model(tokens), expected["other"])


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("lora_alpha", {"alpha": 3}),
        ("use_rslora", {"rslora": True}),
        ("r", {"rank": 4}),
        ("layers", {"target_modules": ["q_proj", "v_proj"]}),
    ],
)
@pytest.mark.parametrize("inject", INJECT)
def test_a_name_that_is_there_with_other_settings_is_refused(
    make_model, randomize, tokens, tmp_path, inject, key, settings
):
    model, other = make_model().eval(), make_model()
    inject(other, **{"target_modules": "q_proj"} | settings)
    save_adapter(other, tmp_path)
    inject(model, target_modules="q_proj", name="taken")
    inject_lora(model, target_modules="o_proj", name="active")
    expected = randomize(model)(tokens)
    with pytest.raises(ValueError, match=f"{CONFIG}: {key} is .*, the model's adapter 'taken' has .*another name"):
        load_adapter(model, tmp_path, name="taken")
    assert active_adapter(model) == "active" and torch.equal(model(tokens), expected)
    load_adapter(model, tmp_path, name="third")
    assert adapter_names(model) == ["taken", "active", "third"]


def test_a_save_that_dies_leaves_the_last_adapter(make_model, randomize, tokens, tmp_path, monkeypatch):
    model = make_model().eval()
    inject_experts(model)
    save_adapter(randomize(model), tmp_path)
    expected = model(tokens)

    def die(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(storage, "save_file", die)
    with pytest.raises(OSError, match="no space"):
        save_adapter(randomize(model, seed=6), tmp_path)
    load_adapter(model, tmp_path)
    assert torch.equal(model(tokens), expected)


def test_saving_a_model_without_adapters_is_refused(make_model, tmp_path):
    with pytest.raises(ValueError, match="no active adapter to save"):
        save_adapter(make_model(), tmp_path)
    assert not any(tmp_path.iterdir())


def set_config(**changes):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def set_weights(function):
    def change(folder):
        weights = load_file(folder / WEIGHTS)
        function(weights)
        save_file(weights, folder / WEIGHTS)

    return change


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
ROUTER = A.replace("lora_A", "router")


def truncate(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])


def rename(old, new):
    def change(weights):
        for key in [key for key in weights if old in key]:
            weights[key.replace(old, new)] = weights.pop(key)

    return change


def add(key):
    return set_weights(lambda weights: weights.update({key: weights[A].clone()}))


def take_layer(weights):
    for key in [key for key in weights if key.startswith(A.removesuffix("lora_A.weight"))]:
        del weights[key]


BROKEN = {
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG}: no such file"),
    "broken config": (lambda f: (f / CONFIG).write_text('{"r": '), f"{CONFIG}: not valid JSON"),
    "config not UTF-8": (lambda f: (f / CONFIG).write_bytes(b'{"r": "\xff"}'), f"{CONFIG}: not valid JSON"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), f"{CONFIG}: expected a JSON object, found list"),
    "other type": (set_config(peft_type="IA3"), "peft_type 'IA3' is not supported"),
    "no type": (set_config(peft_type=None), "peft_type None is not supported"),
    "no rank": (set_config(r=None), f"{CONFIG}: lacks r$"),
    "no rank, no alpha": (set_config(r=None, lora_alpha=None), "lacks r, lora_alpha"),
    "rank of zero": (set_config(r=0), "r must be a number of at least 1, found 0"),
    "rank is no integer": (set_config(r=2.0), "r must be a number of at least 1, found 2.0"),
    "alpha is no number": (set_config(lora_alpha=float("nan")), "lora_alpha must be a number, found nan"),
    "all dropped": (set_config(lora_dropout=1), "lora_dropout must be below 1, found 1"),
    "scale unclear": (set_config(use_rslora="yes"), "use_rslora must be true or false, found 'yes'"),
    "dora": (set_config(use_dora=True), "use_dora is set"),
    "biases": (set_config(bias="all"), "bias is 'all'"),
    "lora biases": (set_config(lora_bias=True), "lora_bias is set"),
    "layers repeated": (set_config(layer_replication=[[0, 2], [1, 2]]), "layer_replication is set"),
    "targets are numbers": (set_config(target_modules=[1]), r"target_modules must be names, found \[1\]"),
    "saved modules": (set_config(modules_to_save=["lm_head"]), "modules_to_save is set"),
    "ranks by pattern": (set_config(rank_pattern={"q_proj": 4}), "rank_pattern is set"),
    "alphas by pattern": (set_config(alpha_pattern={"q_proj": 4}), "alpha_pattern is set"),
    "activated lora": (set_config(alora_invocation_tokens=[1]), "alora_invocation_tokens is set"),
    "pissa": (set_config(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4' changes the base"),
    "olora": (set_config(init_lora_weights="olora"), "init_lora_weights 'olora' changes the base"),
    "layer not there": (
        set_weights(rename(".q_proj.", ".W_pack.")),
        r"adapts .*0.self_attn.W_pack.* \(2 in all\).*it has down_proj, gate",
    ),
    "the head": (
        set_weights(rename("model.layers.1.self_attn.q_proj", "lm_head")),
        r"adapts lm_head \(1 in all\), .* or the head",
    ),
    "other rank": (set_config(r=5), r"has the shape \[.*\], the model needs \["),
    "more layers": (set_config(target_modules=["q_proj", "v_proj"]), r"lacks .*v_proj.*in all\)"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
    "truncated": (truncate, f"{WEIGHTS}: cannot be read, the file may be truncated"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: cannot be read"),
    "missing tensor": (set_weights(lambda w: w.pop(A)), rf"{WEIGHTS}: lacks {A} \(1 in all\)"),
    "missing layer": (set_weights(take_layer), rf"lacks .*{A}"),
    "no tensors": (set_weights(lambda w: w.clear()), "holds no tensors"),
    "integers": (set_weights(lambda w: w.update({A: w[A].to(torch.int8)})), f"{A} is int8; expected a whole tensor"),
    **{
        f"beyond LoRA: {key}": (add(key), rf"holds the unexpected {key} \(1 in all\)")
        for key in (
            "base_model.model.lm_head.weight",
            "base_model.model.model.embed_tokens.weight",
            A.replace("lora_A.weight", "lora_magnitude_vector"),
            A.replace("lora_A.weight", "lora_B.bias"),
            A.replace("lora_A.weight", "base_layer.bias"),
            A.replace("lora_A.weight", "lora_A.other.weight"),
        )
    },
    "misshapen tensor": (set_weights(lambda w: w.update({A: w[A][:, 1:].clone()})), rf"{A} has the shape \[\d+, 31\]"),
}
BROKEN_EXPERTS = {
    "no number": (set_config(num_specific_experts=None), "lacks num_specific_experts"),
    "other number": (set_config(num_specific_experts=2), r"has the shape \[.*\], the model needs \["),
    "taken for LoRA": (set_config(peft_type="LORA"), "holds the unexpected .*router"),
    "missing router": (set_weights(lambda w: w.pop(ROUTER)), rf"lacks {ROUTER} \(1 in all\)"),
}
CASES = [(inject, name) for inject in INJECT for name in BROKEN] + [(inject_experts, name) for name in BROKEN_EXPERTS]


@pytest.mark.parametrize(("inject", "name"), CASES)
def test_a_broken_adapter_is_refused(make_model, tmp_path, inject, name):
    breaks, message = (BROKEN | BROKEN_EXPERTS)[name]
    model = make_model()
    inject(model, rank=2, target_modules="q_proj")
    save_adapter(model, tmp_path)
    load_adapter(make_model(), tmp_path)
    breaks(tmp_path)
    base = make_model()
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(base, tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert not adapted_layers(base) and all(p.requires_grad for p in base.parameters())


def test_a_refused_adapter_changes_no_tensor_of_an_adapted_model(make_model, randomize, tokens, tmp_path):
    model = make_model().eval()
    inject_lora(model)
    save_adapter(randomize(model), tmp_path)
    set_weights(lambda w: w.update({A: w[A][:, 1:].clone()}))(tmp_path)
    expected = randomize(model, seed=6)(tokens)
    with pytest.raises(ValueError, match="has the shape"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("inject", INJECT)
def test_an_adapted_model_with_another_scale_is_refused(make_model, tmp_path, inject):
    model, other = make_model(), make_model()
    inject(model, alpha=16)
    save_adapter(model, tmp_path)
    inject(other, alpha=8)
    with pytest.raises(ValueError, match="lora_alpha is 16, .*'default' has 8; load it under another name"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize(("first", "second"), [INJECT, INJECT[::-1]])
def test_the_other_kind_of_adapter_does_not_fit_an_adapted_model(make_model, tmp_path, first, second):
    model, other = make_model(), make_model()
    first(model)
    save_adapter(model, tmp_path)
    second(other)
    with pytest.raises(ValueError, match="peft_type is .*, the model's adapter 'default' has "):
        load_adapter(other, tmp_path)


def test_a_peft_adapter_that_changed_its_base_is_refused(make_pair, tmp_path):
    theirs, ours = make_pair()
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(theirs, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'pissa' changes the base model's weights"):
        load_adapter(ours, tmp_path)
