"""Adapters of other mixtures compute what their own code computes; what pedgpt cannot represent is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pedgpt.adapters import (
    ExpertLoRALinear,
    adapted_layers,
    experts_from_adapters,
    inject_experts,
    load_adapter,
    merge_lora,
    save_adapter,
)

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CASES = json.loads(Path(__file__).with_name("other_codes.json").read_text("utf-8"))
PATHS = {"HydraLoRA": "model.layers.0.q_proj", "MOLA": "model.layers.0.mlp.up_proj"}
PATHS["LORAMOE"] = PATHS["MOLA"]


class Model(nn.Module):
    """One linear layer under the name that it has in a model."""

    def __init__(self, path, weight):
        super().__init__()
        *parents, child = path.split(".")
        place = self
        for name in parents:
            setattr(place, name, nn.Module())
            place = getattr(place, name)
        setattr(place, child, nn.Linear(*weight.T.shape, bias=False))
        getattr(place, child).weight = nn.Parameter(weight)


def write(folder, name, change=None, **settings):
    """Their folder, and a model with their base weight."""
    found = CASES[name]
    tensors = {key: torch.tensor(value) for key, value in found["tensors"].items()}
    if change is not None:
        change(tensors)
    (folder / CONFIG).write_text(json.dumps(found["config"] | settings), encoding="utf-8")
    torch.save(tensors, folder / BIN)
    return Model(PATHS[name], torch.tensor(found["base"])).eval()


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_its_own_code_does(tmp_path, name):
    model = write(tmp_path, name)
    assert load_adapter(model, tmp_path) == [PATHS[name]]
    layer = model.get_submodule(PATHS[name])
    assert (layer.num_universal_experts, layer.shared_A) == (0, name == "HydraLoRA")
    assert layer.top_k == (2 if name == "MOLA" else None)
    x, expected = (torch.tensor(CASES[name][key]) for key in "xy")
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert (layer(x) - nn.functional.linear(x, layer.weight)).abs().max() > 0.1
    save_adapter(model, tmp_path / "ours")
    again = write(tmp_path, name)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again.get_submodule(PATHS[name])(x), layer(x))


HYDRA = f"base_model.model.{PATHS['HydraLoRA']}."
MOLA = "mola.layers.0.mlp.up_proj."
BROKEN = [
    ("HydraLoRA", lambda t: t.pop(HYDRA + "lora_B1.weight"), {}, r"q_proj.lora_B.* \[6, 4\]; .* need \[6, 6\]"),
    ("HydraLoRA", lambda t: t.pop(HYDRA + "lora_A.weight"), {}, f"lacks {HYDRA}lora_A.weight; the file is incomplete"),
    ("HydraLoRA", lambda t: t.pop(HYDRA + "lora_route.weight"), {}, f"routes at random.*\n  {HYDRA}lora_route.weight"),
    ("HydraLoRA", lambda t: t.update({HYDRA + "lora_A0.weight": torch.ones(2, 8)}), {}, "unexpected .*lora_A0.weight"),
    ("HydraLoRA", lambda t: t.update({HYDRA + "lora_B2.weight": torch.ones(5, 2)}), {}, "does not become lora_B"),
    ("MOLA", lambda t: t.update({MOLA + "lora_A.weight": torch.ones(2, 8)}), {}, "unexpected mola.*up_proj.lora_A"),
    ("MOLA", lambda t: t.update({MOLA + "moe_gate.weight": torch.ones(2, 8)}), {}, r"router.* \[2, 8\]; .*\[3, 8\]"),
    ("MOLA", None, {"top_k": 4}, "top_k must be in 1 to num_specific_experts, 3, found 4"),
    ("LORAMOE", None, {"use_dora": True}, "use_dora is True"),
    ("MOLA", None, {"peft_type": "MIXLORA"}, "MixLoRA runs the whole feed-forward block once for each .*nonlinearity"),
]


@pytest.mark.parametrize(("name", "change", "settings", "message"), BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path, name, change, settings, message):
    model = write(tmp_path, name, change, **settings)
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        load_adapter(model, tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and not adapted_layers(model)


def loras(tmp_path, make, settings):
    """PEFT's folders of random LoRAs on models that `make` gives, and each one's logits of `tokens`."""
    folders = []
    for seed, each in enumerate(settings):
        model = get_peft_model(make(), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"], **each}))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    return folders


def make_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


UNEQUAL = [{"lora_alpha": 3}, {"lora_alpha": 5, "use_rslora": True}, {"lora_alpha": 8, "target_modules": ["q_proj"]}]


class OneHot(ExpertLoRALinear):
    chosen = 0

    def gates(self, x):
        return torch.eye(self.num_specific_experts)[self.chosen].expand(*x.shape[:-1], -1)


@pytest.mark.parametrize("universal", [0, 1])
def test_with_all_weight_on_one_expert_the_mixture_is_that_lora(tmp_path, tokens, universal):
    folders, model = loras(tmp_path, make_llama, UNEQUAL), make_llama()
    names = experts_from_adapters(model, folders, layer_type=OneHot, num_universal_experts=universal)
    assert len(names) == 4 and names == list(adapted_layers(model))
    with torch.no_grad():
        for OneHot.chosen, folder in enumerate(folders):
            expected = PeftModel.from_pretrained(make_llama(), folder).eval()(tokens).logits
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
            assert (expected - make_llama()(tokens).logits).abs().max() > 0.01


def test_untrained_routers_weigh_all_loras_equally_and_then_train(tmp_path, tokens):
    model = make_llama()
    experts_from_adapters(model, loras(tmp_path, make_llama, UNEQUAL))
    truth = make_llama()
    for number in range(len(UNEQUAL)):
        tuned = PeftModel.from_pretrained(make_llama(), tmp_path / str(number)).merge_and_unload()
        for name in adapted_layers(model):
            change = tuned.get_submodule(name).weight - make_llama().get_submodule(name).weight
            truth.get_submodule(name).weight.data += change / len(UNEQUAL)
    torch.testing.assert_close(model(tokens).logits, truth(tokens).logits, rtol=1e-4, atol=1e-4)
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(layer.router.grad.any() for layer in adapted_layers(model).values())


def test_one_lora_as_an_expert_is_that_lora_and_as_the_universal_one_merges_back(tmp_path, tokens):
    """Dense to experts and back, where that is exact: one expert has all the weight, whatever its router says."""
    (folder,) = loras(tmp_path, make_llama, [{"lora_alpha": 3}])
    model, merged = make_llama(), make_llama()
    load_adapter(merged, folder)
    expected = merged(tokens).logits
    experts_from_adapters(model, [folder])
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-6, atol=1e-6)
    experts = make_llama()
    inject_experts(experts, rank=2, alpha=3, target_modules=["q_proj", "up_proj"])
    for name, layer in adapted_layers(experts).items():
        for to, parameter in zip(layer.universal_expert, ("lora_A", "lora_B"), strict=True):
            to.data.copy_(getattr(merged.get_submodule(name), parameter))
    torch.testing.assert_close(experts(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    merge_lora(merged), merge_lora(experts, universal_only=True)
    for name in adapted_layers(experts):
        assert torch.equal(experts.get_submodule(name).weight, merged.get_submodule(name).weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([{"r": 2}, {"r": 3}], "LoRAs of one rank, .*; found LORA of rank 2, LORA of rank 3"),
        ([], "found none"),
    ],
)
def test_what_makes_no_mixture_is_refused(tmp_path, settings, message):
    model = make_llama()
    with pytest.raises(ValueError, match=message):
        experts_from_adapters(model, loras(tmp_path, make_llama, settings))
    (folder,) = loras(tmp_path, make_llama, [{}])
    inject_experts(model, rank=2, name="experts")
    save_adapter(model, tmp_path / "experts")
    for folders, options in (([folder, tmp_path / "experts"], {}), ([folder] * 2, {"shared_A": True})):
        with pytest.raises(ValueError, match="each with an A of its own"):
            experts_from_adapters(model, folders, name="mixture", **options)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.* shape \[2, 32\]; the model and .* need \[4, 32\]"):
        experts_from_adapters(model, [folder], rank=4, name="mixture")


class Arrow(ExpertLoRALinear):
    """PEFT's Arrow: gates by the similarity of a token to each LoRA's first singular direction in the input's space."""

    temperature, chosen = 1.0, 2

    def gates(self, x):
        directions = [torch.linalg.svd(b @ a)[2][0] for a, b in self.specific_experts]
        similar = (x @ torch.stack(directions).T).abs()
        others = similar < similar.topk(self.chosen).values[..., -1:]
        return (similar / self.temperature).masked_fill(others, float("-inf")).softmax(-1)


def test_arrow_routing_of_several_loras_matches_peft(tmp_path, tokens):
    from peft import ArrowConfig
    from peft.tuners.lora import arrow

    folders = loras(tmp_path, make_llama, [{"lora_alpha": 4, "target_modules": ["up_proj"]}] * 3)
    create = arrow.create_arrow_model
    theirs = create(make_llama(), [str(f) for f in folders], ArrowConfig(top_k=2, router_temperature=1.0, rng_seed=1))
    for module in theirs.modules():  # their power iteration stops after 15 steps
        if hasattr(module, "top_right_singular_vec_from_BA"):
            find = type(module).top_right_singular_vec_from_BA
            module.top_right_singular_vec_from_BA = lambda A, B, find=find, m=module: find(m, A, B, iters=2_000)
            module._protos_ready = False
    model = make_llama()
    experts_from_adapters(model, folders, layer_type=Arrow)
    with torch.no_grad():
        expected, base = theirs.eval()(tokens).logits, make_llama()(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - base).abs().max() > 0.01


def test_a_mixture_of_loras_is_saved_as_experts(tmp_path, tokens):
    model, again = make_llama(), make_llama()
    experts_from_adapters(model, loras(tmp_path, make_llama, UNEQUAL), top_k=2)
    save_adapter(model, tmp_path / "mixture")
    load_adapter(again, tmp_path / "mixture")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert (tmp_path / "mixture" / WEIGHTS).is_file()
