"""The published MoE-Adapter's layout: what its files hold computes as SPEC §4 says, and what they lack is named."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from pedgpt.adapters import ExpertLoRALinear, adapted_layers, inject_experts, load_adapter, save_adapter

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LAYERS = ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
PREFIX = "base_model.model."
ALPHA, RANK = 5, 3


@pytest.fixture
def write(tmp_path, make_model):
    """write(...) makes a published adapter with random weights; returns its folder and float64 tensors by key."""

    def make(experts=4, without=(), name="", file=WEIGHTS, dtype=torch.float32, **settings):
        generator = torch.Generator().manual_seed(experts)
        model, tensors = make_model(), {}
        for layer in LAYERS:
            size_out, size_in = model.get_submodule(layer).weight.shape
            for part, shape in (
                ("lora_moe_A" + name, (experts, size_in, RANK)),
                ("lora_moe_B" + name, (experts, RANK, size_out)),
                ("lora_route.weight", (experts - 1, size_in)),
                ("w_noise", (size_in, experts - 1)),
            ):
                tensors[f"{PREFIX}{layer}.{part}"] = 0.3 * torch.randn(shape, generator=generator)
        config = {
            "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_nums": experts, "lora_dropout": 0.1,
            "target_modules": ["down_proj", "v_proj"], "layers_to_transform": None, "bias": "none",
            "exclude_modules": ["model.layers.1.self_attn.v_proj"], "use_rslora": False, "use_dora": False,
        }  # fmt: skip
        (tmp_path / CONFIG).write_text(json.dumps(config | settings), encoding="utf-8")
        saved = {k: t.to(dtype) for k, t in tensors.items() if not k.endswith(tuple(without))}
        (torch.save if file == BIN else save_file)(saved, tmp_path / file)
        return tmp_path, {key: tensor.to(dtype).double() for key, tensor in tensors.items()}

    return make


def definition(x, W, A, B, Wg, scale):
    """SPEC §4 in float64 on the published tensors: every expert's output, weighted, x [tokens, in]."""
    outputs = torch.einsum("td,edr,erf->tef", x, A, B)
    score = torch.exp(x @ Wg.T)
    weights = torch.cat((torch.ones(len(x), 1, dtype=x.dtype), score / score.sum(-1, keepdim=True)), -1)
    return x @ W.T + scale * torch.einsum("te,tef->tf", weights, outputs)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("file", [WEIGHTS, BIN])
@pytest.mark.parametrize("name", ["", ".default"])
@pytest.mark.parametrize("experts", [2, 4])
def test_every_layer_matches_the_definition_in_float64(make_model, write, experts, name, file, rslora):
    folder, tensors = write(experts, name=name, file=file, use_rslora=rslora)
    model = make_model().double().eval()
    assert load_adapter(model, folder) == LAYERS == list(adapted_layers(model))
    for path in LAYERS:
        layer = model.get_submodule(path)
        assert isinstance(layer, ExpertLoRALinear) and layer.dropout == 0.1
        x = torch.randn(11, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        A, B, Wg, Wn = (
            tensors[f"{PREFIX}{path}.{part}"]
            for part in ("lora_moe_A" + name, "lora_moe_B" + name, "lora_route.weight", "w_noise")
        )
        scale = ALPHA / (math.sqrt(RANK) if rslora else RANK)
        expected = definition(x, layer.weight, A, B, Wg, scale)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        universal, specific = layer.universal_expert, layer.specific_experts
        assert torch.equal(universal[0], A[0].T) and torch.equal(universal[1], B[0].T)
        assert torch.equal(specific[-1][0], A[-1].T) and torch.equal(specific[-1][1], B[-1].T)
        # Of the noise, only training reads the matrix.
        torch.manual_seed(4)
        noise = torch.randn(11, experts - 1, dtype=torch.float64)
        gates = torch.softmax(x @ Wg.T + noise * torch.log1p(torch.exp(x @ Wn)), -1)
        outputs = torch.einsum("td,edr,erf->tef", x, A, B)
        noisy = x @ layer.weight.T + scale * (outputs[:, 0] + (gates[..., None] * outputs[:, 1:]).sum(1))
        layer.train().dropout = 0.0
        torch.manual_seed(4)
        torch.testing.assert_close(layer(x), noisy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("without", [["lora_route.weight", "w_noise"], ["lora_route.weight"], ["w_noise"]])
def test_every_missing_routing_matrix_is_named(make_model, write, without):
    folder, _ = write(without=without)
    model = make_model()
    with pytest.raises(ValueError, match="routes at random") as error:
        load_adapter(model, folder)
    message = str(error.value)
    expected = [f"{PREFIX}{layer}.{part}" for layer in LAYERS for part in ("lora_route.weight", "w_noise")]
    expected = [key for key in expected if key.endswith(tuple(without))]
    assert [line.strip() for line in message.splitlines()[1:]] == expected
    assert message.startswith(f"{folder / WEIGHTS}: lacks the {len(expected)} routing matrices")
    assert "uniform_routing=True" in message
    assert not adapted_layers(model) and all(p.requires_grad for p in model.parameters())


def test_uniform_routing_gives_equal_gates_where_the_router_is_missing(make_model, write):
    folder, tensors = write(without=[f"{layer}.lora_route.weight" for layer in LAYERS[:1]] + ["w_noise"])
    model = make_model().double().eval()
    load_adapter(model, folder, uniform_routing=True)
    for path in LAYERS:
        layer = model.get_submodule(path)
        assert not layer.router_noise.any()
        x = torch.randn(5, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        A, B, Wg = (tensors[f"{PREFIX}{path}.{part}"] for part in ("lora_moe_A", "lora_moe_B", "lora_route.weight"))
        if path == LAYERS[0]:
            outputs = torch.einsum("td,edr,erf->tef", x, A, B)
            expected = x @ layer.weight.T + ALPHA / RANK * (outputs[:, 0] + outputs[:, 1:].mean(1))
        else:  # its router is there and stays
            expected = definition(x, layer.weight, A, B, Wg, ALPHA / RANK)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_uniform_routing_changes_nothing_where_nothing_is_missing(make_model, write, tokens):
    folder, _ = write()
    model, other = make_model().eval(), make_model().eval()
    load_adapter(model, folder)
    load_adapter(other, folder, uniform_routing=True)
    assert torch.equal(model(tokens), other(tokens))


def test_uniform_routing_is_not_for_our_own_files(make_model, tmp_path):
    model = make_model()
    inject_experts(model, target_modules="q_proj")
    save_adapter(model, tmp_path)
    kept = {f"{PREFIX}{n}.weight": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    save_file({key: t for key, t in kept.items() if ".0.self_attn.q_proj.router." not in key}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="lacks .*0.self_attn.q_proj.router.weight"):
        load_adapter(make_model(), tmp_path, uniform_routing=True)


def test_half_precision_imports_exactly_and_is_saved_in_our_own_layout(make_model, write, tokens, tmp_path):
    folder, tensors = write(dtype=torch.float16)
    model, again = make_model().eval(), make_model().eval()
    load_adapter(model, folder, name="published")
    layer = model.get_submodule(LAYERS[0])
    assert layer.lora_A.dtype == torch.float32
    assert torch.equal(layer.router.double(), tensors[f"{PREFIX}{LAYERS[0]}.lora_route.weight"])
    save_adapter(model, tmp_path / "own")
    assert json.loads((tmp_path / "own" / CONFIG).read_text())["peft_type"] == "PEDGPT_EXPERTS"
    load_adapter(again, tmp_path / "own")
    assert torch.equal(again(tokens), model(tokens))


class Evil:
    def __reduce__(self):
        return print, ("ran",)


KEY = f"{PREFIX}{LAYERS[0]}."
BROKEN = {
    "other number of experts": ({"lora_nums": 3}, None, r"v_proj.lora_A.* \[12, 32\]; .* need \[9, 32\]"),
    "universal alone": ({"experts": 1}, None, "num_specific_experts must be at least 1, found 0"),
    "other rank": ({"r": 2}, None, r"v_proj.lora_A.* \[12, 32\]; .* need \[8, 32\]"),
    "transposed": (
        {},
        lambda t: t.update({KEY + "w_noise": t[KEY + "w_noise"].T}),
        r"router_noise.weight has the shape \[32, 3\]; the model and adapter_config.json need \[3, 32\]",
    ),
    "no B": ({}, lambda t: t.pop(KEY + "lora_moe_B"), f"lacks {KEY}lora_B.weight; the file is incomplete"),
    "two adapters": (
        {},
        lambda t: t.update({KEY + "lora_moe_A.b": t[KEY + "lora_moe_A"]}),
        rf"unexpected {KEY}lora_moe_A.b",
    ),
    "saved head": ({}, lambda t: t.update({PREFIX + "lm_head.weight": torch.ones(2)}), "unexpected .*lm_head.weight"),
    "plain LoRA beside": (
        {},
        lambda t: t.update({KEY + "lora_A.weight": torch.ones(3, 32)}),
        rf"unexpected {KEY}lora_A.weight",
    ),
    "other model": ({}, lambda t: t.update({PREFIX + "x.lora_moe_A": torch.ones(4, 32, 3)}), r"adapts x \(1 in all\)"),
    "code": ({}, lambda t: t.update({KEY + "w_noise": Evil()}), "holds more than tensors, or is damaged"),
    "integers": ({}, lambda t: t.update({KEY + "w_noise": torch.ones(32, 3, dtype=int)}), "w_noise is torch.int64"),
    "no tensor": ({}, lambda t: t.update({"epoch": 3}), "cannot be read as tensors by name"),
    "dora": ({"use_dora": True}, None, "use_dora is True"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name_and_changes_nothing(make_model, write, capsys, name):
    settings, change, message = BROKEN[name]
    folder, tensors = write(file=BIN, **settings)
    if change is not None:
        tensors = {key: tensor.float() for key, tensor in tensors.items()}
        change(tensors)
        torch.save(tensors, folder / BIN)
    model = make_model()
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, folder, uniform_routing=True)
    assert str(error.value).startswith(str(folder)) and not adapted_layers(model)
    assert "ran" not in capsys.readouterr().out


def test_a_bin_file_that_cannot_be_read_is_named(make_model, write):
    folder, _ = write(file=BIN)
    data, model = (folder / BIN).read_bytes(), make_model()
    torch.save([torch.ones(2)], folder / BIN)
    with pytest.raises(ValueError, match=f"^{folder / BIN}: cannot be read as tensors by name"):
        load_adapter(model, folder)
    torch.save({"x": torch.ones(2)}, folder / BIN, _use_new_zipfile_serialization=False)
    old = (folder / BIN).read_bytes()
    cuts = [file[: len(file) * part // 8] for file in (data, old) for part in range(8)]
    for content in [b"version https://git-lfs", *cuts]:
        (folder / BIN).write_bytes(content)
        with pytest.raises(ValueError, match=f"^{folder / BIN}: "):
            load_adapter(model, folder)
    assert not adapted_layers(model)
