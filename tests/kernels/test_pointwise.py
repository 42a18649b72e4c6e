"""RMSNorm and SwiGLU against their definitions in float64, and what they keep for the backward pass."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pedgpt.kernels import rms_norm, swiglu

EPS = 1e-5
SHAPES = [(0, 8), (1, 1), (3, 5, 8), (2, 4, 7, 24)]


def norm_definition(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def swiglu_definition(gate, up):
    return gate / (1 + (-gate).exp()) * up


def norm(x, weight):
    return rms_norm(x, weight, EPS)


def plain_norm(x, weight):
    """As autograd would do it, in the dtypes of the model."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


def draw(shape, dtype, *, weight, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape, shape[-1:]) if weight else (shape, shape)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def results(function, inputs, dout):
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


both = pytest.mark.parametrize(
    ("function", "plain", "definition", "weight"),
    [(norm, plain_norm, norm_definition, True), (swiglu, plain_swiglu, swiglu_definition, False)],
    ids=["rms_norm", "swiglu"],
)


@both
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_output_and_gradients_match_the_definition(function, plain, definition, weight, shape, dtype, limit):
    inputs, dout = draw(shape, dtype, weight=weight), draw(shape, dtype, weight=weight, seed=1)[0]
    expected = results(definition, [value.double() for value in inputs], dout.double())
    for found, truth in zip(results(function, inputs, dout), expected, strict=True):
        assert found.dtype == dtype and found.shape == truth.shape
        assert (found.double() - truth).norm() <= limit * max(1.0, float(truth.norm()))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float64_as_autograd(function, plain, definition, weight, dtype):
    ours, theirs = torch.zeros(3), torch.zeros(3)
    for seed in range(8):
        inputs, dout = draw((64, 48), dtype, weight=weight, seed=seed), draw((64, 48), dtype, weight=weight, seed=99)[0]
        truth = results(definition, [value.double() for value in inputs], dout.double())
        mine, plains = results(function, inputs, dout), results(plain, inputs, dout)
        assert torch.equal(mine[0], plains[0])
        for i, exact in enumerate(truth):
            ours[i] += (mine[i].double() - exact).square().sum()
            theirs[i] += (plains[i].double() - exact).square().sum()
    assert (ours.sqrt() <= 1.02 * theirs.sqrt()).all()


@both
def test_gradients_and_their_gradients_match_finite_differences(function, plain, definition, weight):
    leaves = [value.requires_grad_() for value in draw((3, 2, 5), torch.float64, weight=weight)]
    assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


@both
def test_nothing_as_large_as_the_input_is_kept_but_inputs(function, plain, definition, weight):
    inputs = [value.requires_grad_() for value in draw((16, 32), torch.float32, weight=weight)]
    own, more = {value.data_ptr() for value in inputs}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: more.append(t) or t, lambda t: t):
        function(*inputs)
    assert sum(t.numel() for t in more if t.data_ptr() not in own) <= 16


@both
def test_torch_func_and_compile_give_the_same(function, plain, definition, weight):
    inputs = draw((4, 6), torch.float64, weight=weight)
    expected = results(definition, inputs, torch.ones(4, 6))[1]
    torch.testing.assert_close(torch.func.grad(lambda x: function(x, inputs[1]).sum())(inputs[0]), expected)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), definition(*inputs))


def test_a_frozen_weight_gets_no_gradient_and_strides_do_not_matter():
    x, weight = draw((6, 8), torch.float64, weight=True)
    strided = x.t().contiguous().t().requires_grad_()
    norm(strided, weight).sum().backward()
    x.requires_grad_()
    norm_definition(x, weight).sum().backward()
    torch.testing.assert_close(strided.grad, x.grad)
    assert weight.grad is None
