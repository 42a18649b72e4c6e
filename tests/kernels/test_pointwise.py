"""RMSNorm, rotary embedding and SwiGLU against their definitions in float64, and what they keep for the backward pass.

The Triton forms run compiled where there is a GPU and under Triton's interpreter elsewhere.
"""

import pytest
import torch
from torch.autograd import gradcheck

from pedgpt.kernels import add_rms_norm, pointwise, rms_norm, rotary, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
SHAPES = [(0, 8), (1, 1), (3, 5, 8), (2, 3, 3, 24), (2, 2100), (300, 3)]  # the last for norms, which sum over rows
# Rows, tokens, heads of q and of k, head_dim.
ROTARY_SHAPES = [(0, 3, 2, 1, 4), (1, 1, 1, 1, 2), (2, 5, 3, 1, 8), (1, 7, 4, 4, 24), (2, 1, 5, 2, 64)]
needs_triton = pytest.mark.skipif(pointwise.triton is None, reason="needs Triton")
both_impls = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])


def norm_definition(x, weight):
    return (weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt(),)


def add_norm_definition(x, residual, weight):
    return *norm_definition(x + residual, weight), x + residual


def swiglu_definition(gate, up):
    return (gate / (1 + (-gate).exp()) * up,)


def rotary_definition(q, k):
    """By complex numbers: the pair (x_i, x_{i + K/2}) turns by the angle t · 10000^(−2i/K)."""
    angle = angles(q)[:, 0, :, None]
    turned = []
    for x in (q, k):
        pairs = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        turned.append(torch.cat((pairs.real, pairs.imag), -1))
    return tuple(turned)


def angles(q):
    (rows, tokens, _, size) = q.shape
    positions = torch.arange(tokens, device=q.device) + 3 * torch.arange(rows, device=q.device)[:, None]
    return positions[:, None, :, None] * 10_000.0 ** (-2 * torch.arange(size // 2, device=q.device).double() / size)


def tables(q):
    angle = torch.cat((angles(q),) * 2, -1)
    return angle.cos().to(q.dtype), angle.sin().to(q.dtype)


def norm(impl):
    return lambda x, weight: (rms_norm(x, weight, EPS, impl=impl),)


def add_norm(impl):
    return lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS, impl=impl)


def gated(impl):
    return lambda gate, up: (swiglu(gate, up, impl=impl),)


def rotated(impl):
    return lambda q, k: rotary(q, k, *tables(q), impl=impl)


def plain_norm(x, weight):
    """As autograd would do it, in the dtypes of the model."""
    wide = x.float()
    return (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype),)


def plain_add_norm(x, residual, weight):
    return *plain_norm(x + residual, weight), x + residual


def plain_swiglu(gate, up):
    return (torch.nn.functional.silu(gate) * up,)


def plain_rotary(q, k):
    cos, sin = (table.transpose(1, 2) for table in tables(q))
    halves = [x.chunk(2, -1) for x in (q, k)]
    return tuple(x * cos + torch.cat((-b, a), -1) * sin for x, (a, b) in zip((q, k), halves, strict=True))


# Of each operator: ours, as autograd would do it, the definition, and the shapes of its inputs of a shape.
OPERATORS = {
    "rms_norm": (norm, plain_norm, norm_definition, lambda shape: (shape, shape[-1:])),
    "add_rms_norm": (add_norm, plain_add_norm, add_norm_definition, lambda shape: (shape, shape, shape[-1:])),
    "swiglu": (gated, plain_swiglu, swiglu_definition, lambda shape: (shape, shape)),
    "rotary": (rotated, plain_rotary, rotary_definition, lambda s: ((*s[:3], s[4]), (*s[:2], *s[3:]))),
}
CASES = [
    (name, shape)
    for name in OPERATORS
    for shape in (ROTARY_SHAPES if name == "rotary" else SHAPES[:-1] if name == "swiglu" else SHAPES)
]
# Numbers enough for a mean error, in few of the interpreter's programs.
MANY = {"rms_norm": (64, 48), "add_rms_norm": (64, 48), "swiglu": (3, 1024), "rotary": (1, 3, 24, 13, 48)}
all_operators = pytest.mark.parametrize("name", OPERATORS)


def draw(shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for size in shapes]


def results(function, inputs, seed=1):
    """Outputs, and the gradients of Σ outputs · random numbers, rounded to the dtype of the output."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    rounded = torch.bfloat16 if inputs[0].element_size() == 2 else torch.float32
    upstream = draw([out.shape for out in outputs], rounded, seed)
    found = torch.autograd.grad(outputs, leaves, [d.to(out.dtype) for d, out in zip(upstream, outputs, strict=True)])
    return [*(out.detach() for out in outputs), *found]


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel has to write is full of NaN before."""
    for name in ("empty_like", "new_empty"):
        owner = torch if name == "empty_like" else torch.Tensor
        true = getattr(owner, name)

        def full(*arguments, _true=true, **rest):
            out = _true(*arguments, **rest)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, full)


@both_impls
@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_output_and_gradients_match_the_definition(name, shape, dtype, limit, impl, poisoned):
    if impl == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="no float64"):
            OPERATORS[name][0](impl)(*draw(OPERATORS[name][3](shape), dtype))
        return
    ours, _, definition, shapes = OPERATORS[name]
    inputs = draw(shapes(shape), dtype)
    truths = results(definition, [value.double() for value in inputs])
    if name == "rotary" and dtype == torch.float64:
        limit = 1e-13  # of the angles
    if impl == "triton":
        limit *= 1.2  # One program sums the gradient of a weight over 300 rows, one after another.
    for found, truth in zip(results(ours(impl), inputs), truths, strict=True):
        assert found.dtype == dtype and found.shape == truth.shape
        assert (found.double() - truth).norm() <= limit * max(1.0, float(truth.norm()))


@both_impls
@all_operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float64_as_autograd(name, dtype, impl, poisoned):
    ours, plain, definition, shapes = OPERATORS[name]
    # NOTE: Triton's interpreter cuts bfloat16 off where a GPU rounds it, so its errors are two to three times as large.
    slack = 3.0 if impl == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu" else 1.02
    errors = torch.zeros(2, 5)
    for seed in range(8 if impl == "torch" else 4):  # the interpreter is slow
        inputs = draw(shapes(MANY[name]), dtype, seed)
        truth = results(definition, [value.double() for value in inputs], seed=99)
        if name == "rotary":  # of tables that are rounded as the model rounds them
            truth = results(plain_rotary_in_float64(dtype), [value.double() for value in inputs], seed=99)
        mine, plains = results(ours(impl), inputs, seed=99), results(plain, inputs, seed=99)
        if impl == "torch":
            assert torch.equal(mine[0], plains[0])
        for which, found in enumerate((mine, plains)):
            for i, exact in enumerate(truth):
                errors[which, i] += (found[i].double() - exact).square().sum()
    assert (errors[0].sqrt() <= slack * errors[1].sqrt()).all()


def plain_rotary_in_float64(dtype):
    def rotate(q, k):
        cos, sin = (table.to(dtype).double().transpose(1, 2) for table in tables(q))
        halves = [x.chunk(2, -1) for x in (q, k)]
        return tuple(x * cos + torch.cat((-b, a), -1) * sin for x, (a, b) in zip((q, k), halves, strict=True))

    return rotate


@all_operators
def test_gradients_match_finite_differences(name):
    shape = (2, 2, 2, 1, 4) if name == "rotary" else (3, 2, 5)
    leaves = [value.requires_grad_() for value in draw(OPERATORS[name][3](shape), torch.float64)]
    assert gradcheck(OPERATORS[name][0]("torch"), leaves)


@both_impls
@all_operators
def test_second_derivatives_are_refused(name, impl):
    shape = (2, 3, 2, 1, 4) if name == "rotary" else (4, 6)
    leaves = [value.requires_grad_() for value in draw(OPERATORS[name][3](shape), torch.float32)]
    out = OPERATORS[name][0](impl)(*leaves)[0]
    if impl == "torch" and name in ("rotary", "swiglu"):  # these are left to autograd
        assert torch.autograd.grad(out.sum(), leaves[0], create_graph=True)[0].shape == leaves[0].shape
        return
    with pytest.raises(RuntimeError, match="is differentiable once: no create_graph=True"):
        torch.autograd.grad(out.sum(), leaves, create_graph=True)


@both_impls
@all_operators
def test_nothing_as_large_as_the_input_is_kept_but_inputs(name, impl):
    shape = (2, 8, 2, 2, 16) if name == "rotary" else (16, 32)
    inputs = [value.requires_grad_() for value in draw(OPERATORS[name][3](shape), torch.float32)]
    own, more = {value.data_ptr() for value in inputs}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: more.append(t) or t, lambda t: t):
        outputs = OPERATORS[name][0](impl)(*inputs)
    if name == "add_rms_norm":  # keeps the sum, which is an output, in place of its inputs
        own = {outputs[1].data_ptr()} | {inputs[2].data_ptr()}
    limit = 2 * 2 * 8 * 16 if name == "rotary" else 16  # rotary's tables, which all layers share
    if (name, impl) == ("swiglu", "torch"):
        limit = 16 * 32  # torch's own form keeps silu(gate), and nothing more; see test_recompute.py
    unique = {t.data_ptr(): t.numel() for t in more if t.data_ptr() not in own}
    assert sum(unique.values()) <= (4 * limit if name == "rotary" and impl == "torch" else limit)


@all_operators
def test_torch_func_and_compile_give_the_same(name):
    shape = (1, 3, 2, 1, 4) if name == "rotary" else (4, 6)
    ours, _, definition, shapes = OPERATORS[name]
    inputs, function = draw(shapes(shape), torch.float64), ours(None)
    leaf = inputs[0].clone().requires_grad_()
    expected = torch.autograd.grad(definition(leaf, *inputs[1:])[0].sum(), leaf)[0]
    found = torch.func.grad(lambda x: function(x, *inputs[1:])[0].sum())(inputs[0])
    torch.testing.assert_close(found, expected)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tuple(compiled(*inputs)), definition(*inputs))


@both_impls
def test_a_frozen_weight_gets_no_gradient_and_strides_do_not_matter(impl):
    x, weight = draw(((6, 8), (8,)), torch.float32)
    strided = x.t().contiguous().t().requires_grad_()
    rms_norm(strided, weight, EPS, impl=impl).sum().backward()
    x.requires_grad_()
    norm_definition(x, weight)[0].sum().backward()
    torch.testing.assert_close(strided.grad, x.grad)
    assert weight.grad is None
    frozen = strided.detach()
    rms_norm(frozen, weight.requires_grad_(), EPS, impl=impl).sum().backward()
    torch.testing.assert_close(weight.grad, (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()).sum(0).detach())


@both_impls
def test_parts_of_one_projection_are_read_where_they_lie(impl):
    """q, k and v side by side, gate and up side by side; gradients by heads first, as attention gives them."""
    packed = draw([(2, 5, (3 + 1 + 1) * 8)], torch.float32)[0].requires_grad_()
    q, k, _ = (part.unflatten(-1, (-1, 8)) for part in packed.split((24, 8, 8), -1))
    dq, dk = draw([(2, 3, 5, 8), (2, 1, 5, 8)], torch.float32, 2)
    upstream = [dq.transpose(1, 2), dk.transpose(1, 2)]
    (found,) = torch.autograd.grad(rotated(impl)(q, k), packed, upstream, retain_graph=True)
    (truth,) = torch.autograd.grad(rotary_definition(q, k), packed, upstream)
    torch.testing.assert_close(found, truth)

    halves = draw([(3, 5, 2 * 8)], torch.float32)[0].requires_grad_()
    found = torch.autograd.grad(swiglu(*halves.chunk(2, -1), impl=impl).square().sum(), halves)
    truth = torch.autograd.grad(swiglu_definition(*halves.chunk(2, -1))[0].square().sum(), halves)
    torch.testing.assert_close(found, truth)


@both_impls
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_under_autocast_a_norm_gives_its_dtype_and_the_residual_stream_stays(autocast, impl):
    x, weight = draw(((6, 8), (8,)), torch.float32)
    branch = x.flip(0).to(autocast)
    leaves = [t.requires_grad_() for t in (branch, x, weight)]
    with torch.autocast(DEVICE, autocast):
        alone = rms_norm(x, weight, EPS, impl=impl)
        normed, total = add_rms_norm(branch, x, weight, EPS, impl=impl)
        assert rms_norm(x.double(), weight, EPS).dtype == torch.float64
    assert (alone.dtype, normed.dtype, total.dtype) == (autocast, autocast, torch.float32)
    limit = 2**-7 if autocast == torch.bfloat16 else 2**-10
    torch.testing.assert_close(alone.float(), norm_definition(x, weight)[0], rtol=limit, atol=limit)
    torch.testing.assert_close(normed.float(), norm_definition(x + branch, weight)[0], rtol=limit, atol=limit)
    if impl == "torch":  # one rounding, of the result in float32
        assert torch.equal(alone, rms_norm(x, weight, EPS).to(autocast))
    gradients = torch.autograd.grad(normed.float().sum() + total.sum(), leaves)
    assert [g.dtype for g in gradients] == [autocast, torch.float32, torch.float32]


@both_impls
@all_operators
def test_without_gradients_no_function_of_autograd_is_called(name, impl, monkeypatch):
    monkeypatch.setattr(torch.autograd.Function, "apply", None)
    shape = (1, 3, 2, 1, 4) if name == "rotary" else (4, 6)
    ours, _, definition, shapes = OPERATORS[name]
    inputs = draw(shapes(shape), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(tuple(ours(impl)(*inputs)), tuple(t.float() for t in definition(*inputs)))


@needs_triton
def test_what_triton_cannot_take_is_named_or_left_to_torch():
    wide = torch.ones(2, pointwise.WIDEST + 1, device=DEVICE)
    with pytest.raises(ValueError, match=r"sizes that fit and no float64, found torch.float32 \[2, 8193\]"):
        rms_norm(wide, wide[0], EPS, impl="triton")
    torch.testing.assert_close(rms_norm(wide, wide[0], 0.0), wide)
    with pytest.raises(ValueError, match="impl must be"):
        swiglu(wide, wide, impl="cuda")
