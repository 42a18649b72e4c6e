"""Files of an adapter that something changed: what is still one is read, every broken one is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pedgpt.adapters import adapted_layers, inject_experts, inject_lora, load_adapter, save_adapter

INJECT = [inject_lora, inject_experts]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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
    "rank of zero": (set_config(r=0), "rank must be a whole number of at least 1, found 0"),
    "rank is no integer": (set_config(r=2.0), "rank must be a whole number of at least 1, found 2.0"),
    "alpha is no number": (set_config(lora_alpha=float("nan")), "alpha must be a finite number, found nan"),
    "all dropped": (set_config(lora_dropout=1), r"dropout must be in \[0, 1\), found 1"),
    "dora": (set_config(use_dora=True), "use_dora is True"),
    "biases": (set_config(bias="all"), "bias is 'all'"),
    "lora biases": (set_config(lora_bias=True), "lora_bias is True"),
    "layers repeated": (set_config(layer_replication=[[0, 2], [1, 2]]), r"layer_replication is \[\[0"),
    "saved modules": (set_config(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head"),
    "ranks by pattern": (set_config(rank_pattern={"q_proj": 4}), "rank_pattern is {'q_proj"),
    "alphas by pattern": (set_config(alpha_pattern={"q_proj": 4}), "alpha_pattern is {'q_proj"),
    "activated lora": (set_config(alora_invocation_tokens=[1]), r"alora_invocation_tokens is \[1"),
    "pissa": (set_config(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'.*path_initial"),
    "olora": (set_config(init_lora_weights="olora"), "init_lora_weights is 'olora'"),
    "layer not there": (
        set_weights(rename(".q_proj.", ".W_pack.")),
        r"adapts .*0.self_attn.W_pack.* \(2 in all\).*it has down_proj, gate",
    ),
    "the head": (
        set_weights(rename("model.layers.1.self_attn.q_proj", "lm_head")),
        r"adapts lm_head \(1 in all\), which is the head",
    ),
    "other rank": (set_config(r=5), r"has the shape \[.*\]; the model and .* need \["),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
    "truncated": (truncate, f"{WEIGHTS}: cannot be read as tensors by name, it may be truncated"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: cannot be read"),
    "missing tensor": (set_weights(lambda w: w.pop(A)), f"lacks {A}; the file is incomplete"),
    "missing layer": (set_weights(take_layer), r"lacks .*1.self_attn.q_proj \(1 in all\), which target_modules"),
    "no tensors": (set_weights(lambda w: w.clear()), r"lacks .*q_proj \(2 in all\)"),
    "integers": (set_weights(lambda w: w.update({A: w[A].to(torch.int8)})), f"{A} is torch.int8; expected"),
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
    "other number": (set_config(num_specific_experts=2), r"has the shape \[.*\]; the model and .* need \["),
    "taken for LoRA": (set_config(peft_type="LORA"), "holds the unexpected .*router"),
    "missing router": (set_weights(lambda w: w.pop(ROUTER)), f"lacks {ROUTER}; the file is incomplete"),
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
        load_adapter(model, tmp_path, name="other")
    assert torch.equal(model(tokens), expected)


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
