"""pack_adapters: the same numbers by fewer copies, and never from parameters that have changed since."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pedgpt.adapters import (
    ExpertLoRALinear,
    LoRALinear,
    adapted_layers,
    inject_experts,
    inject_lora,
    merge_lora,
    pack_adapters,
    set_adapter,
    set_noise_rows,
    unmerge_lora,
)
from pedgpt.kernels import Linear, expert_gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {"experts": inject_experts, "lora": inject_lora}


@pytest.fixture(params=["experts", "lora"])
def model(request, make_model, randomize):
    """bfloat16 over float32 adapters, so that both kinds have something to cast."""
    model = make_model().to(DEVICE, torch.bfloat16)
    KINDS[request.param](model, rank=3, name="first")
    return randomize(model).train()


@pytest.fixture
def tokens(tokens):
    return tokens.to(DEVICE)


def outcome(model, tokens):
    """Output and every gradient."""
    model.zero_grad()
    if any(isinstance(layer, ExpertLoRALinear) for layer in model.modules()):
        set_noise_rows(model, 3, torch.arange(len(tokens), device=DEVICE))
    y = model(tokens)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def fresh(model, tokens):
    """The same without anything packed."""
    for layer in adapted_layers(model).values():
        layer.packed = None
    return outcome(model, tokens)


def assert_equal(found, expected):
    assert len(found) == len(expected) > 4 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def used(model):
    return [layer.packed_parameters() is not None for layer in adapted_layers(model).values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_output_and_gradients_are_those_without_packing(model, tokens, dtype, checkpointing):
    model.to(dtype) if dtype != torch.bfloat16 else None
    model.activation_checkpointing = checkpointing
    pack_adapters(model)
    packed = [layer.packed for layer in adapted_layers(model).values()]
    found = outcome(model, tokens)
    assert packed == [layer.packed for layer in adapted_layers(model).values()]  # none was thrown away on the way
    assert_equal(found, fresh(model, tokens))
    model.eval()
    with torch.no_grad():
        expected = model(tokens)
        pack_adapters(model)
        assert torch.equal(model(tokens), expected)


class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.cat.default, torch.ops.aten._to_copy.default)
        return func(*args, **(kwargs or {}))


def test_packed_layers_copy_no_parameter():
    layer = ExpertLoRALinear(nn.Linear(8, 6, dtype=torch.bfloat16), 2, 4, 3).eval().to(DEVICE)
    x = torch.randn(5, 8, dtype=torch.bfloat16, device=DEVICE)
    counts = []
    for packed in (False, True):
        if packed:
            pack_adapters(layer)
        with Copies() as copies, torch.no_grad():
            layer(x)
        counts.append(copies.count)
    assert counts[0] - counts[1] == 3  # P is stacked and cast, B is cast


def test_a_float32_lora_needs_no_copy():
    layer = LoRALinear(Linear(8, 6))
    pack_adapters(layer)
    assert layer.packed is None


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_an_optimizer_step_is_seen(model, tokens, optimizer):
    """A fused step changes no version counter."""
    steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **optimizer)
    pack_adapters(model)
    before = outcome(model, tokens)
    steps.step()
    assert not any(used(model))
    found = outcome(model, tokens)
    assert_equal(found, fresh(model, tokens))
    assert not torch.equal(found[0], before[0])


def change_in_place(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.mul_(2)


def assign_data(model):
    """Twice, so that the second tensor might lie where the first one was."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data * 2
            parameter.data = parameter.data * 2


def load(model):
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


def replace(model):
    for layer in adapted_layers(model).values():
        layer.lora_A = nn.Parameter(layer.lora_A.detach() * 2)


def cast_and_back(model):
    model.half()
    model.bfloat16()


@pytest.mark.parametrize("change", [change_in_place, assign_data, load, replace, cast_and_back])
def test_a_change_of_the_parameters_is_seen(model, tokens, change):
    pack_adapters(model)
    assert all(used(model))
    change(model)
    assert not any(used(model))
    assert_equal(outcome(model, tokens), fresh(model, tokens))


def test_packing_again_takes_what_no_counter_shows(model, tokens):
    pack_adapters(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    pack_adapters(model)
    assert all(used(model))
    assert_equal(outcome(model, tokens), fresh(model, tokens))


def test_accumulated_gradients_between_two_calls(model, tokens):
    """Two graphs at a time, of which the first belongs to an earlier packing."""

    def accumulated(pack):
        model.zero_grad()
        losses = []
        for part in tokens.chunk(2):
            pack(model)
            set_noise_rows(model, 3, torch.arange(len(part), device=DEVICE))
            losses.append(model(part).float().square().mean())
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    found = accumulated(pack_adapters)
    fresh(model, tokens)
    assert_equal(found, accumulated(lambda model: None))


def test_switched_and_merged_adapters_compute_with_their_own(model, tokens, randomize):
    inject_lora(model, rank=2, name="second")
    randomize(model, seed=9)
    pack_adapters(model)
    second = outcome(model, tokens)
    set_adapter(model, "first")
    assert not any(used(model))
    pack_adapters(model)
    first = outcome(model, tokens)
    assert_equal(first, fresh(model, tokens))
    set_adapter(model, "second")
    assert_equal(outcome(model, tokens), second)
    pack_adapters(model)
    merge_lora(model)
    pack_adapters(model)
    unmerge_lora(model)
    assert_equal(outcome(model, tokens), second)


def test_copies_do_not_take_it_along(model, tokens):
    pack_adapters(model)
    expected = outcome(model, tokens)
    size = len(pickle.dumps(model.state_dict()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.packed is None for layer in adapted_layers(twin).values())
        change_in_place(twin)
        assert not torch.equal(outcome(twin, tokens)[0], expected[0])
    assert all(used(model)) and len(pickle.dumps(model.state_dict())) == size
    assert_equal(outcome(model, tokens), expected)


def test_it_can_be_called_in_inference_mode_before_training(model, tokens):
    with torch.inference_mode():
        pack_adapters(model)
        model(tokens)
    assert all(used(model))
    assert_equal(outcome(model, tokens), fresh(model, tokens))


def test_layers_without_memory_of_their_own_are_left_out(model):
    model.to("meta")
    pack_adapters(model)
    assert not any(used(model))


@pytest.mark.skipif(expert_gate.triton is None, reason="needs Triton")
@pytest.mark.parametrize("kind", [ExpertLoRALinear, LoRALinear])
def test_the_kernels_take_packed_adapters_with_and_without_rows_of_zeros(kind):
    """On the CPU, where Triton is only interpreted, P is packed without them."""
    torch.manual_seed(0)
    layer = kind(nn.Linear(20, 12, dtype=torch.float16), 3).to(DEVICE)
    nn.init.normal_(layer.lora_B)
    layer.impl = "triton"
    set_noise_rows(layer, 0, torch.arange(2, device=DEVICE))
    x = torch.randn(2, 5, 20, dtype=torch.float16, device=DEVICE, requires_grad=True)
    names = layer.adapter_parameters()
    results = []
    for packed in (False, True):
        if packed:
            pack_adapters(layer)
            assert layer.packed is not None
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *names.values()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
