"""LoRALinear against PEFT's LoRA and against its equation in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from pedgpt.adapters import LoRALinear
from pedgpt.kernels import Linear

# in, out, rank, alpha, bias, shape of the input before the width
CASES = [
    (32, 48, 8, 16, False, (2, 5)),
    (7, 5, 3, 16, True, (3,)),
    (13, 1, 1, 0.7, True, ()),
    (1, 9, 4, 5, False, (2, 1, 3)),
    (5, 6, 11, 8, True, (0, 4)),
]


def peft_twin(base, rank, alpha, dropout=0.0):
    """PEFT's layer around a copy of `base`."""
    copy = nn.Linear(base.in_features, base.out_features, base.bias is not None, dtype=base.weight.dtype)
    copy.load_state_dict(base.state_dict())
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["0"])
    return get_peft_model(nn.Sequential(copy), config).base_model.model[0]


def pair(size_in, size_out, rank, alpha, bias, dropout=0.0):
    """Our layer and PEFT's in float64, with the same random weights."""
    torch.manual_seed(size_in)
    base = nn.Linear(size_in, size_out, bias, dtype=torch.float64)
    theirs = peft_twin(base, rank, alpha, dropout)
    ours = LoRALinear(base, rank, alpha, dropout)
    for mine, peft in ((ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)):
        weight = torch.randn_like(mine)
        mine.data.copy_(weight)
        peft["default"].weight.data = weight.clone()
    return ours, theirs


@pytest.mark.parametrize(("size_in", "size_out", "rank", "alpha", "bias", "shape"), CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lora_linear_matches_peft(size_in, size_out, rank, alpha, bias, shape, dropout):
    ours, theirs = pair(size_in, size_out, rank, alpha, bias, dropout)
    results = []
    for layer, a, b in (
        (ours, ours.lora_A, ours.lora_B),
        (theirs, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight),
    ):
        torch.manual_seed(3)
        x = torch.randn(*shape, size_in, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(7)  # the same dropout mask for both
        y = layer(x)
        (y * torch.linspace(-1, 2, size_out, dtype=torch.float64)).sum().backward()
        results.append([y.detach(), x.grad, a.grad, b.grad])
    assert results[0][0].shape == (*shape, size_out)
    for mine, peft in zip(*results, strict=True):
        torch.testing.assert_close(mine, peft, rtol=1e-12, atol=1e-12)


def test_lora_linear_matches_its_equation():
    ours, _ = pair(6, 4, 3, 5, True)
    x = torch.randn(9, 12, dtype=torch.float64)[:, ::2]  # not contiguous
    expected = x @ ours.weight.T + ours.bias + 5 / 3 * (x @ ours.lora_A.T @ ours.lora_B.T)
    torch.testing.assert_close(ours(x), expected, rtol=1e-13, atol=1e-13)


def test_gradcheck_in_float64():
    ours, _ = pair(5, 4, 2, 3, True)
    names = ["weight", "bias", "lora_A", "lora_B"]
    values = [getattr(ours, name).detach().requires_grad_() for name in names]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def function(x, *values):
        return torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_is_the_identity_bit_for_bit(dtype):
    base = Linear(17, 9, dtype=dtype)
    x = torch.randn(4, 17, dtype=dtype)
    assert torch.equal(LoRALinear(base)(x), base(x))


def test_adapters_of_a_bf16_base_train_in_float32_and_match_float64():
    torch.manual_seed(0)
    base = nn.Linear(33, 20, dtype=torch.bfloat16)
    layer = LoRALinear(base, rank=4, alpha=8)
    layer.lora_B.data.normal_()
    x = torch.randn(50, 33, dtype=torch.bfloat16)
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {layer.lora_A.grad.dtype, layer.lora_B.grad.dtype} == {torch.float32}
    w, b, a, lora_b, x64 = (t.detach().double() for t in (layer.weight, layer.bias, layer.lora_A, layer.lora_B, x))
    truth = F.linear(x64, w, b) + 2 * x64 @ a.T @ lora_b.T
    # Five roundings to bf16 (2⁻⁹ each) on the way.
    assert (y.double() - truth).norm() / truth.norm() < 5 * 2**-9


def test_initial_weights():
    layer = LoRALinear(nn.Linear(400, 30), rank=64)
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < layer.lora_A.abs().max() <= bound
    assert abs(layer.lora_A.std() - bound / math.sqrt(3)) < 0.01 * bound  # of the uniform distribution
    assert not layer.lora_B.any()


def test_dropout_only_while_training():
    layer = LoRALinear(nn.Linear(20, 4), dropout=0.5)
    layer.lora_B.data.normal_()
    x = torch.randn(6, 20)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_the_mode_of_the_base_carries_over():
    assert LoRALinear(nn.Linear(3, 3)).training
    assert not LoRALinear(nn.Linear(3, 3).eval()).training


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank"), ({"rank": -1}, "rank"), ({"dropout": 1.0}, "dropout"), ({"dropout": -0.1}, "dropout")],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"{message} must be .*found {list(settings.values())[0]}"):
        LoRALinear(nn.Linear(3, 3), **settings)
