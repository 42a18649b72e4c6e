"""Several adapters on one model: each computes what a model with it alone does, and only the active one trains."""

import copy

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from pedgpt.adapters import (
    LoRALinear,
    active_adapter,
    adapted_layers,
    adapter_names,
    adapters_disabled,
    inject_experts,
    inject_lora,
    merge_lora,
    set_adapter,
    set_noise_rows,
    unmerge_lora,
)
from pedgpt.models import load_model, load_weights, save_model

ADAPTERS = {
    "attention": (inject_lora, {"rank": 2, "alpha": 3, "target_modules": ["q_proj", "v_proj"]}),
    "wide": (inject_lora, {"rank": 5, "alpha": 7, "target_modules": ["q_proj", "*.mlp.*"], "rslora": True}),
    "experts": (inject_experts, {"rank": 3, "num_specific_experts": 2, "target_modules": "*.1.*_proj"}),
}
WALK = ["wide", "attention", None, "experts", "attention", "experts", None, "wide", "wide"]


@pytest.fixture
def attach(randomize):
    """attach(model, name) injects an adapter of ADAPTERS, with random tensors that depend on its name alone."""

    def inject(model, name):
        function, settings = ADAPTERS[name]
        function(model, name=name, **settings)
        return randomize(model, seed=len(name))

    return inject


@pytest.fixture
def make_all(make_model, attach):
    """make_all() gives a model with all adapters, and models with one each, by its name; None: the frozen base."""

    def make(family="llama", dtype=torch.float32):
        model = make_model(family).to(dtype).eval()
        alone = {None: frozen(make_model(family).to(dtype).eval())}
        for name in ADAPTERS:
            attach(model, name)
            alone[name] = attach(make_model(family).to(dtype).eval(), name)
        return model, alone

    return make


def frozen(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def assert_same(model, other, tokens):
    """Equal bits: logits in evaluation and training, tensors and what trains."""
    for mode in (False, True):
        model.train(mode), other.train(mode)
        torch.manual_seed(0)
        expected = other(tokens)
        torch.manual_seed(0)
        assert torch.equal(model(tokens), expected)
        assert all(module.training == mode for module in model.modules())
    model.eval(), other.eval()
    assert list(model.state_dict()) == list(other.state_dict())
    for name, tensor in other.state_dict().items():
        found = model.state_dict()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    trains = [[name for name, p in each.named_parameters() if p.requires_grad] for each in (model, other)]
    assert trains[0] == trains[1]
    assert {name: type(m) for name, m in model.named_modules()} == {name: type(m) for name, m in other.named_modules()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "tied"])
def test_each_adapter_computes_what_it_does_alone(make_all, tokens, family, dtype):
    model, alone = make_all(family, dtype)
    assert adapter_names(model) == list(ADAPTERS) and active_adapter(model) == "experts"
    assert len({other(tokens).double().sum().item() for other in alone.values()}) == 4  # no two agree by chance
    assert_same(model, alone["experts"], tokens)
    for name in WALK:
        set_adapter(model, name)
        assert active_adapter(model) == name and adapter_names(model) == list(ADAPTERS)
        assert_same(model, alone[name], tokens)


def test_a_switch_keeps_every_mode(make_all):
    model, _ = make_all()
    for training in (True, False):
        model.train(training)
        model.model.layers[1].mlp.up_proj.train(not training)
        for name in WALK:
            set_adapter(model, name)
            modes = {key for key, module in model.named_modules() if module.training != training}
            assert modes == {"model.layers.1.mlp.up_proj"}


def test_base_weights_stay_the_same_parameters(make_all):
    model, alone = make_all("tied")
    base = {name: model.get_parameter(name) for name in dict(alone[None].named_parameters())}
    for name in WALK:
        set_adapter(model, name)
        assert all(model.get_parameter(key) is parameter for key, parameter in base.items())
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(p, alone[None].get_parameter(key)) for key, p in base.items())


def test_training_changes_the_active_adapter_and_nothing_else(make_all, tokens):
    def adamw(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

    def step(model, optimizer):
        torch.manual_seed(3)
        model.train()(tokens).log_softmax(-1)[..., 3].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()

    model, alone = make_all()
    optimizers = {}
    for name in ADAPTERS:
        set_adapter(model, name)
        optimizers[name] = adamw(model), adamw(alone[name])
    for name in ("attention", "experts", "attention"):
        set_adapter(model, name)
        before = model(tokens)
        step(model, optimizers[name][0])
        step(alone[name], optimizers[name][1])
        assert not torch.equal(model(tokens), before)
    for name in (None, *ADAPTERS):
        set_adapter(model, name)
        assert_same(model, alone[name], tokens)


def test_switched_off_under_every_adapter(make_all, tokens):
    model, alone = make_all()
    base = alone[None](tokens)
    with adapters_disabled(model):
        for name in WALK:  # also where the adapter changes within the context
            set_adapter(model, name)
            assert torch.equal(model(tokens), base)
    for name in WALK:
        set_adapter(model, name)
        assert torch.equal(model(tokens), alone[name](tokens))


def test_weights_loaded_after_injection_reach_every_adapter(make_model, attach, tokens, tmp_path):
    base = make_model(seed=3)
    save_model(base, tmp_path)
    model = load_model(tmp_path, device="meta")
    attach(model, "attention"), attach(model, "experts")
    set_adapter(model, "attention")
    load_weights(model, tmp_path)
    for name in ("experts", "attention", None, "experts"):
        set_adapter(model, name)
        alone = copy.deepcopy(base).eval()
        assert_same(model, attach(alone, name) if name else frozen(alone), tokens)


def test_a_layer_that_waits_keeps_no_base_weights(make_all):
    """What loading replaces could be freed otherwise only with the adapter."""
    model, _ = make_all()
    layer = next(iter(adapted_layers(model).values()))
    set_adapter(model, None)
    assert layer.weight is None and layer.bias is None


@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_adapters_that_wait_follow_a_change_of_dtype(make_all, tokens, dtype, adapters):
    model, alone = make_all()
    set_adapter(model, None)
    model.to(dtype)
    for name in ADAPTERS:
        set_adapter(model, name)
        layers = adapted_layers(model).values()
        assert {p.dtype for layer in layers for p in layer.adapter_parameters().values()} == {adapters}
        assert {layer.weight.dtype for layer in layers} == {dtype}
        assert torch.equal(model(tokens), alone[name].to(dtype)(tokens))  # products run in the dtype of x anyway


def test_an_adapter_that_was_cast_with_its_model_stays_so(make_all):
    """Float32 would be as exact, but an optimizer's state would no longer fit."""
    model, _ = make_all()
    set_adapter(model, "wide")
    model.bfloat16()
    set_adapter(model, None)
    set_adapter(model, "wide")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adapters_that_wait_follow_the_model_to_the_gpu(make_all, tokens):
    model, alone = make_all()
    model.cuda()
    for name in WALK:
        set_adapter(model, name)
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        torch.testing.assert_close(model(tokens.cuda()).cpu(), alone[name](tokens), rtol=1e-3, atol=1e-3)


def test_copies_of_a_model_are_independent(make_all, tokens):
    model, alone = make_all()
    twin = copy.deepcopy(model)
    set_adapter(twin, "wide")
    assert active_adapter(model) == "experts"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name in WALK:
        set_adapter(twin, name)
        assert_same(twin, alone[name], tokens)


def test_an_adapter_can_come_while_another_or_none_is_active(make_model, attach, tokens):
    model = make_model().eval()
    attach(model, "attention")
    set_adapter(model, None)
    attach(model, "wide")
    assert active_adapter(model) == "wide"
    assert_same(model, attach(make_model().eval(), "wide"), tokens)
    set_adapter(model, "attention")
    assert_same(model, attach(make_model().eval(), "attention"), tokens)


def test_a_failed_injection_leaves_the_active_adapter(make_all, tokens):
    model, alone = make_all()
    for settings in ({"rank": 0}, {"target_modules": "query"}, {"dropout": 2.0}):
        with pytest.raises(ValueError):
            inject_lora(model, name="new", **settings)
    assert adapter_names(model) == list(ADAPTERS)
    assert_same(model, alone["experts"], tokens)


def test_a_base_that_trains_beside_the_adapter_keeps_training(make_all):
    model, _ = make_all()
    weight = model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    for name in WALK:
        set_adapter(model, name)
        assert model.model.layers[1].mlp.up_proj.weight is weight and weight.requires_grad


def test_a_bare_model_has_no_adapters(make_model, tokens):
    model = make_model().eval()
    assert adapter_names(model) == [] and active_adapter(model) is None
    set_adapter(model, None)
    with pytest.raises(ValueError, match="no adapter 'default'; the model has none; inject_lora"):
        set_adapter(model, "default")
    assert torch.equal(model(tokens), make_model().eval()(tokens))


def test_names_that_are_taken_or_unknown_are_refused(make_all, tokens):
    model, alone = make_all()
    with pytest.raises(ValueError, match="no adapter 'wied'; the model has 'attention', 'wide', 'experts'"):
        set_adapter(model, "wied")
    for inject in (inject_lora, inject_experts):
        with pytest.raises(ValueError, match=r"has adapters already under the name 'wide'.*set_adapter\(model, 'wide'"):
            inject(model, name="wide")
    assert_same(model, alone["experts"], tokens)


def test_layers_that_were_put_in_by_hand_are_not_lost(make_model):
    model = make_model()
    block = model.model.layers[0].mlp
    block.up_proj = LoRALinear(block.up_proj)
    with pytest.raises(ValueError, match="has adapters already that .*model.layers.0.mlp.up_proj"):
        inject_lora(model, target_modules="q_proj")
    assert list(adapted_layers(model)) == ["model.layers.0.mlp.up_proj"]


def test_a_model_that_fsdp_split_is_refused(make_all, make_model):
    model, _ = make_all()
    merged, _ = make_all()
    set_adapter(merged, "wide")
    merge_lora(merged)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model), fully_shard(merged)
        for change in (
            lambda: set_adapter(model, "wide"),
            lambda: set_adapter(model, None),
            lambda: inject_lora(model, name="new"),
            lambda: merge_lora(model, universal_only=True),
            lambda: unmerge_lora(merged),
        ):
            with pytest.raises(ValueError, match="FSDP2 has split the model.*before fully_shard"):
                change()
        assert active_adapter(model) == "experts"
    finally:
        distributed.destroy_process_group()


def test_a_waiting_adapter_forgets_the_noise_of_its_batch(make_model, tokens, randomize):
    model = make_model()
    inject_experts(model, name="a", target_modules="q_proj")
    randomize(model).train()
    set_noise_rows(model, 0, torch.arange(len(tokens)))
    inject_lora(model, name="b", target_modules="q_proj")
    set_noise_rows(model, 0, None)
    set_adapter(model, "a")
    assert not torch.equal(model(tokens), model(tokens))
