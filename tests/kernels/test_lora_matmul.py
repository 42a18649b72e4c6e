"""lora_linear against SPEC §4 written out expert by expert in float64, the published form, PEFT and F.linear.

Triton's kernels run compiled where there is a GPU and under its interpreter elsewhere.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pedgpt.adapters import ExpertLoRALinear, LoRALinear, set_noise_rows
from pedgpt.kernels import expert_gate, linear, lora_linear, naive
from pedgpt.kernels._dispatch import by_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(expert_gate.triton is None, reason="needs Triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
both_impls = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
with_and_without_noise = pytest.mark.parametrize("noisy", [False, True], ids=["evaluation", "training"])

# in, out, rank, experts, bias, shape of the input before the width
CASES = [
    (75, 70, 5, 3, True, (67,)),  # blocks are 64 tokens by 64 of the width: both go beyond one
    (100, 65, 30, 5, False, (70,)),  # 190 columns: blocks of 128
    (40, 33, 1, 18, True, (9,)),
    (7, 5, 3, 2, True, (2, 3, 4)),
    (13, 1, 1, 1, False, (67,)),
    (1, 9, 4, 5, True, (3, 2)),
    (34, 6, 11, 3, False, ()),
    (34, 6, 2, 3, True, (1,)),
    (5, 6, 2, 3, True, (2, 0)),
    (75, 70, 5, 0, False, (67,)),
    (33, 40, 200, 0, True, (2, 35)),
    (7, 5, 1, 0, True, ()),
    (5, 6, 2, 0, False, (0,)),
]
SHAPES = ("size_in", "size_out", "rank", "experts", "bias", "shape")
PARAMETERS = ("weight", "bias", "lora_A", "lora_B", "router", "router_noise")


def draw(size_in, size_out, rank, experts, bias, shape, noisy=False, dropout=False, seed=0, dtype=torch.float32):
    """Random operands of lora_linear, and dy, all of one dtype, with every term of the layer of the same order."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).to(DEVICE)

    columns = (experts + 1) * rank
    values = {
        "x": random(*shape, size_in),
        "weight": random(size_out, size_in, scale=size_in**-0.5),
        "bias": random(size_out) if bias else None,
        "lora_A": random(columns, size_in, scale=size_in**-0.5),
        "lora_B": random(size_out, columns, scale=columns**-0.5),
        "router": random(experts, size_in, scale=size_in**-0.5) if experts else None,
        "router_noise": random(experts, size_in, scale=size_in**-0.5) if experts else None,
        "noise": random(*shape, experts) if experts and noisy else None,
        "dropped": random(*shape, size_in) if dropout else None,
    }
    return values, random(*shape, size_out)


def definition(x, weight, bias, lora_A, lora_B, router, router_noise, noise, dropped, scaling):
    """SPEC §4, one expert after another."""
    experts = 0 if router is None else len(router)
    rank = len(lora_A) // (experts + 1)
    A = [lora_A[j * rank : (j + 1) * rank] for j in range(experts + 1)]
    B = [lora_B[:, j * rank : (j + 1) * rank] for j in range(experts + 1)]
    seen = x if dropped is None else dropped
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    y = y + scaling * (seen @ A[0].T @ B[0].T)
    if experts:
        score = x @ router.T
        if noise is not None:
            spread = x @ router_noise.T
            score = score + noise * torch.logaddexp(spread, torch.zeros_like(spread))
        weights = torch.exp(score - score.amax(-1, keepdim=True).detach())
        weights = weights / weights.sum(-1, keepdim=True)
        for j in range(experts):
            y = y + scaling * weights[..., j, None] * (seen @ A[j + 1].T @ B[j + 1].T)
    return y


def published(x, weight, bias, lora_A, lora_B, router, router_noise, noise, dropped, scaling):
    """The published code's layer: all in the dtype of x, softmax in float16; [tokens, experts, out] exists."""
    experts, rank = len(router) + 1, len(lora_A) // (len(router) + 1)
    A = lora_A.view(experts, rank, -1).transpose(1, 2)
    B = lora_B.view(-1, experts, rank).permute(1, 2, 0)
    routes = x @ router.T
    if noise is not None:
        routes = routes + noise * F.softplus(x @ router_noise.T)
    gates = F.softmax(routes, dim=-1, dtype=torch.float16).to(x.dtype)
    hidden = torch.einsum("nd,edr->ner", x, A)
    out = torch.einsum("ner,ero->neo", hidden, B) * scaling
    specific = out[:, 1:].clone() * gates[..., None]
    return F.linear(x, weight, bias) + torch.cat((out[:, :1], specific), dim=1).sum(1)


def ours(impl):
    def form(x, weight, bias, lora_A, lora_B, router, router_noise, noise, dropped, scaling):
        y, gates, _ = lora_linear(
            x, weight, bias, lora_A, lora_B,
            scaling=scaling, router=router, router_noise=router_noise, noise=noise, dropped=dropped, impl=impl,
        )  # fmt: skip
        assert (gates is None) == (router is None)
        assert gates is None or (not gates.requires_grad and gates.dtype == torch.promote_types(x.dtype, torch.float32))
        return y

    return form


def output_and_gradients(form, values, dy, dtype=None, scaling=1.7):
    """y and the gradient of every operand but noise, by name; zero where an operand plays no part."""
    leaves = {
        name: None if value is None else value.detach().to(dtype or value.dtype).requires_grad_(name != "noise")
        for name, value in values.items()
    }
    y = form(**leaves, scaling=scaling)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype), allow_unused=True)
    results = {"y": y.detach()}
    for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
        results[name] = torch.zeros_like(leaf) if gradient is None else gradient
        assert results[name].shape == leaf.shape and results[name].dtype == leaf.dtype
    return results


def error(found, truth):
    """Relative, in the Frobenius norm; absolute where the truth is zero but for its own rounding."""
    norm = truth.norm().item()
    return (found.double() - truth).norm().item() / (norm if norm > 1e-12 else 1.0)


def truth_of(values, dy, **settings):
    return output_and_gradients(definition, values, dy, torch.float64, **settings)


# Accuracy


def naive_form(x, weight, bias, lora_A, lora_B, router, router_noise, noise, dropped, scaling):
    gates = x.new_empty(*x.shape[:-1], 0) if router is None else naive.expert_gate(x, router, router_noise, noise)
    return naive.lora_linear(x, weight, bias, lora_A, lora_B, gates, scaling)


@with_and_without_noise
@pytest.mark.parametrize(SHAPES, CASES)
def test_the_naive_form_matches_the_definition(size_in, size_out, rank, experts, bias, shape, noisy):
    values, dy = draw(size_in, size_out, rank, experts, bias, shape, noisy, dtype=torch.float64)
    found = output_and_gradients(naive_form, values, dy)
    for name, truth in truth_of(values, dy).items():
        assert error(found[name], truth) <= 1e-13, name


@both_impls
@with_and_without_noise
@pytest.mark.parametrize("number", range(len(CASES)))
def test_float32_output_and_every_gradient_match_the_experts_one_by_one(number, noisy, impl):
    """With dropout in every second of them; plain LoRA has no noise."""
    (size_in, size_out, rank, experts, bias, shape), dropout = CASES[number], (number + noisy) % 2 == 1
    values, dy = draw(size_in, size_out, rank, experts, bias, shape, noisy, dropout)
    results = output_and_gradients(ours(impl), values, dy)
    assert results["y"].shape == (*shape, size_out)
    for name, truth in truth_of(values, dy).items():
        assert error(results[name], truth) <= 1e-6, name


def strided(tensor):
    """The same values, with no stride of one and a gap after every element."""
    wide = torch.full((*tensor.shape[::-1], 2), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = wide[..., 0].permute(*range(tensor.ndim)[::-1])
    view.copy_(tensor)
    assert view.numel() < 2 or not view.is_contiguous()
    return view


@both_impls
@pytest.mark.parametrize(
    ("name", "experts", "shape"),
    [
        (name, experts, shape)
        for name in ("x", "dropped", "dy")
        for experts, shape in ((3, (70,)), (3, (5, 14)), (0, ()), (0, (70,)))
    ]
    + [("noise", 3, shape) for shape in ((), (70,), (5, 14))]
    + [(name, 3, (5, 14)) for name in PARAMETERS]  # whose strides do not depend on the tokens' shape
    + [(name, 0, (70,)) for name in PARAMETERS[:4]],
)
def test_a_non_contiguous_operand_gives_the_same(name, shape, experts, impl):
    values, dy = draw(35, 22, 3, experts, True, shape, noisy=True, dropout=name == "dropped")
    expected = truth_of(values, dy)
    if name == "dy":
        dy = strided(dy)
    else:
        values[name] = strided(values[name])
    results = output_and_gradients(ours(impl), values, dy)
    for key, truth in expected.items():
        assert error(results[key], truth) <= 1e-6, key


@both_impls
@pytest.mark.parametrize("experts", [0, 3])
def test_expanded_operands_and_gradient_give_the_same(experts, impl):
    """y.sum() sends back one number with strides of zero; a broadcast x and bias have them too."""
    values, dy = draw(35, 22, 3, experts, True, (7, 10), noisy=True)
    dy = dy[:1, :1, :1].expand_as(dy)
    values["x"], values["bias"] = values["x"][:1].expand(7, -1, -1), values["bias"][:1].expand(22)
    results = output_and_gradients(ours(impl), values, dy)
    for key, truth in truth_of(values, dy).items():
        assert error(results[key], truth) <= 1e-6, key


@pytest.fixture
def rounded_to_nearest(monkeypatch):
    """Triton's kernels with stores that round as a GPU does.

    The interpreter truncates float32 to bfloat16 in a store. So the kernels write float32 here, and torch rounds it.
    """
    if torch.cuda.is_available() or expert_gate.triton is None:
        return

    forward, backward = expert_gate._gate_triton, expert_gate._gate_backward_triton

    def rounded_forward(*args):
        gated = forward(*args[:-1], torch.float32)
        return gated._replace(h=gated.h.to(args[-1]), s=gated.s.to(args[-1]))

    def rounded_backward(dh, s, *args):
        ds, h, dgates = backward(dh, s.float(), *args)
        return ds.to(s.dtype), h.to(s.dtype), dgates

    monkeypatch.setattr(expert_gate, "_gate_triton", rounded_forward)
    monkeypatch.setattr(expert_gate, "_gate_backward_triton", rounded_backward)


def mean_errors(form, shapes, noisy, dtype, scaling=2.0):
    """Of the output and each gradient against float64 on the same values, averaged over three draws."""
    errors = []
    for seed in range(3):
        values, dy = draw(*shapes, noisy, seed=seed, dtype=dtype)
        results = output_and_gradients(form, values, dy, scaling=scaling)
        truth = truth_of(values, dy, scaling=scaling)
        errors.append({name: error(results[name], truth[name]) for name in truth})
    return {name: sum(e[name] for e in errors) / 3 for name in errors[0]}


@both_impls
@pytest.mark.parametrize(
    ("dtype", "noisy", "bias"),  # each pair of values
    [
        (torch.bfloat16, False, False), (torch.bfloat16, True, True),
        (torch.float16, False, True), (torch.float16, True, False),
    ],
)  # fmt: skip
def test_half_precision_is_as_close_to_float64_as_the_published_form(dtype, noisy, bias, impl, rounded_to_nearest):
    """With a budget of 5 % and 1e-4: roundings differ by chance."""
    shapes = (96, 130, 8, 3, bias, (75,))
    budget = mean_errors(published, shapes, noisy, dtype)
    for name, found in mean_errors(ours(impl), shapes, noisy, dtype).items():
        assert found <= 1.05 * budget[name] + 1e-4, f"{name}: {found:.2e}, the published form {budget[name]:.2e}"


@both_impls
@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, True), (torch.float16, False)])
def test_plain_lora_in_half_precision_is_as_close_to_float64_as_peft(dtype, bias, impl, rounded_to_nearest):
    """PEFT with the adapter in the same dtype; with a budget of 5 % and 1e-4, since roundings differ by chance."""
    shapes = (96, 130, 8, 0, bias, (75,))
    budget = mean_errors(peft_form, shapes, False, dtype)
    for name, found in mean_errors(ours(impl), shapes, False, dtype).items():
        assert found <= 1.05 * budget[name] + 1e-4, f"{name}: {found:.2e}, PEFT {budget[name]:.2e}"


def peft_form(x, weight, bias, lora_A, lora_B, router, router_noise, noise, dropped, scaling):
    """PEFT's own layer around the operands."""
    base = nn.Linear(*weight.shape[::-1], bias is not None, device=DEVICE, dtype=weight.dtype)
    config = LoraConfig(r=len(lora_A), lora_alpha=scaling * len(lora_A), target_modules=["0"])
    layer = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]
    names = {"base_layer.weight": weight, "lora_A.default.weight": lora_A, "lora_B.default.weight": lora_B}
    if bias is not None:
        names["base_layer.bias"] = bias
    return torch.func.functional_call(layer, names, (x,), strict=True)


@both_impls
@pytest.mark.parametrize("bias", [False, True])
def test_one_expert_without_a_gate_matches_peft_in_float32(bias, impl):
    check_against_peft(bias, torch.float32, impl)


@pytest.mark.parametrize("bias", [False, True])
def test_one_expert_without_a_gate_matches_peft_in_float64(bias):
    check_against_peft(bias, torch.float64, "torch")


def check_against_peft(bias, dtype, impl):
    values, dy = draw(40, 27, 5, 0, bias, (2, 3, 11), dtype=dtype)
    expected = output_and_gradients(peft_form, values, dy)
    for name, found in output_and_gradients(ours(impl), values, dy).items():
        assert error(found, expected[name].double()) <= (1e-6 if dtype == torch.float32 else 1e-14), name


@both_impls
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("experts", [1, 4])
def test_equal_gates_give_the_mean_of_the_experts(experts, bias, impl):
    values, dy = draw(23, 37, 3, experts, bias, (21,), noisy=True)
    values["router"] = values["router"][:1].expand(experts, -1)
    values["router_noise"] = values["router_noise"][:1].expand(experts, -1)
    values["noise"] = values["noise"][:, :1].expand(-1, experts)
    y, gates, _ = lora_linear(
        values["x"], values["weight"], values["bias"], values["lora_A"], values["lora_B"], scaling=2.0, impl=impl,
        router=values["router"], router_noise=values["router_noise"], noise=values["noise"].contiguous(),
    )  # fmt: skip
    torch.testing.assert_close(gates, torch.full_like(gates, 1 / experts))
    x, W, b, A, B = (None if values[k] is None else values[k].double() for k in ("x", *PARAMETERS[:4]))
    each = [x @ a.T @ b.T for a, b in zip(A.split(3, 0), B.split(3, 1), strict=True)]
    expected = x @ W.T + (0 if b is None else b) + 2 * (each[0] + torch.stack(each[1:]).mean(0))
    assert error(y, expected) <= 1e-6


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # from switching oneDNN
@both_impls
@pytest.mark.parametrize(
    ("shape", "bias", "experts", "dtype", "onednn"),  # every second combination
    [
        (*case, dtype, (i + j) % 2 == 1)
        for i, case in enumerate([((), False, 0), ((), True, 3), ((2, 3, 5), False, 3), ((2, 3, 5), True, 0)])
        for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
    ],
)
def test_with_b_of_zero_it_is_the_base_layer_bit_for_bit(shape, bias, experts, dtype, onednn, impl):
    """Which is F.linear, and in float32 on the CPU, where oneDNN is used, `pedgpt.kernels.cpu.products`.

    On a GPU but for a rounding: cuBLAS may choose another kernel where it accumulates.
    """
    by_onednn = onednn and DEVICE == "cpu" and dtype == torch.float32
    if onednn != by_onednn and DEVICE == "cuda":
        pytest.skip("oneDNN is for the CPU")
    values, dy = draw(77, 50, 4, experts, bias, shape, noisy=True, dtype=dtype)
    values["lora_B"].zero_()
    x = values["x"].detach().requires_grad_()
    with torch.backends.mkldnn.flags(enabled=onednn, allow_tf32=False):
        base = (linear if by_onednn else F.linear)(x, values["weight"], values["bias"])
        expected = [base, *torch.autograd.grad(base, x, dy)]
        results = output_and_gradients(ours(impl), values, dy)
    for found, wanted in zip((results["y"], results["x"]), expected, strict=True):
        if DEVICE == "cpu":
            assert torch.equal(found, wanted)
        else:
            assert error(found, wanted.double()) <= torch.finfo(dtype).eps
    assert not results["lora_A"].any()


@pytest.mark.parametrize(
    ("experts", "noisy", "dropout", "train_base"),
    [
        (0, False, False, False), (0, False, True, True), (1, False, False, True), (1, True, True, False),
        (3, False, True, True), (3, False, False, False), (3, True, False, True), (3, True, True, False),
    ],
)  # fmt: skip
def test_gradcheck_in_float64(experts, noisy, dropout, train_base):
    values, _ = draw(3, 2, 2, experts, True, (2, 2), noisy, dropout, dtype=torch.float64)
    fixed = {"noise"} if train_base else {"noise", "weight", "bias"}
    values = {name: value if value is None else value.cpu() for name, value in values.items()}
    names = [name for name, value in values.items() if value is not None and name not in fixed]

    def function(*leaves):
        return ours("torch")(**{**values, **dict(zip(names, leaves, strict=True))}, scaling=1.7)

    assert torch.autograd.gradcheck(function, [values[name].requires_grad_() for name in names])


@both_impls
@pytest.mark.parametrize("wanted", ["x", *PARAMETERS, "dropped"])
def test_a_single_operand_that_needs_a_gradient_gets_the_same_one(wanted, impl):
    values, dy = draw(12, 9, 2, 3, True, (8,), noisy=True, dropout=wanted == "dropped")
    leaves = {name: value if name != wanted else value.requires_grad_() for name, value in values.items()}
    ours(impl)(**leaves, scaling=1.7).backward(dy)
    assert error(leaves[wanted].grad, truth_of(values, dy)[wanted]) <= 1e-6
    assert all(leaf is None or leaf.grad is None for name, leaf in leaves.items() if name != wanted)


# Extremes


@both_impls
@pytest.mark.parametrize("size", [80.0, 1e4])
def test_extreme_routes_give_finite_gates_and_gradients(size, impl):
    """Every combination of ±size for three routes and three noise scales, which must not overflow in the softplus.

    Every fifth of them in the slow interpreter, in which all of any four that stand together occur.
    """
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 6)
    if impl == "triton" and DEVICE == "cpu":
        signs = signs[::5]
        assert all(len(signs[:, i : i + 4].unique(dim=0)) == 3**4 for i in range(3))
    values, dy = draw(6, 5, 2, 3, True, (len(signs),), noisy=True)
    values["x"] = signs.to(DEVICE)
    values["router"] = size * torch.eye(3, 6, device=DEVICE)
    values["router_noise"] = size * torch.eye(6, device=DEVICE)[3:]
    values["noise"] = values["noise"].sign() / 4  # a power of two: the routes are exact
    results = output_and_gradients(ours(impl), values, dy)
    # A float32 near `size` is right to half of size · 2^-23, and so is the logarithm of a gate.
    for name, truth in truth_of(values, dy).items():
        assert results[name].isfinite().all(), name
        assert error(results[name], truth) <= size * 2**-23, name


@needs_triton
def test_triton_routes_that_overflow_float16_give_finite_gates():
    values, dy = draw(6, 5, 2, 3, True, (4,), noisy=True, dtype=torch.float16)
    values["x"].fill_(1000)
    values["router"].copy_(torch.tensor([100.0, -100, 90])[:, None].expand(3, 6))
    results = output_and_gradients(ours("triton"), values, dy)
    assert results["y"].isfinite().all() and results["router"].isfinite().all()


# Memory


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that Python allocates without filling it holds NaN; collects them."""
    made = []

    def poison(function):
        def allocate(*args, **kwargs):
            tensor = function(*args, **kwargs)
            made.append(tensor)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocate

    def start():
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
        return made

    return start


@both_impls
@pytest.mark.parametrize(
    (*SHAPES, "noisy", "dtype"),
    [
        *((*CASES[0], True, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        (*CASES[0], False, torch.bfloat16),
        (*CASES[5], True, torch.float16),
        (*CASES[9], False, torch.float32),
        (*CASES[9], False, torch.bfloat16),
    ],
)
def test_memory_poisoned_with_nan_changes_nothing(
    size_in, size_out, rank, experts, bias, shape, noisy, dtype, impl, poisoned
):
    values, dy = draw(size_in, size_out, rank, experts, bias, shape, noisy, dtype=dtype)
    expected = output_and_gradients(ours(impl), values, dy)
    made = poisoned()
    results = output_and_gradients(ours(impl), values, dy)
    assert impl == "torch" or len(made) >= 4  # h, s, ds and h again: the poison reached the kernels
    for name, value in expected.items():
        assert results[name].isfinite().all() and torch.equal(results[name], value), name


class Allocations(TorchDispatchMode):
    """Notes the largest tensor that any operation makes; a view of what it was given is none."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in self.tensors((args, kwargs or {}))}
        for tensor in self.tensors(out):
            if tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
        return out

    @classmethod
    def tensors(cls, tree):
        return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def largest_tensors(form, values, dy, train_base):
    """Elements of the largest tensor that forward and backward make."""
    fixed = {"noise"} if train_base else {"noise", "weight", "bias"}
    leaves = {n: v if v is None or n in fixed else v.detach().requires_grad_() for n, v in values.items()}
    with Allocations() as forward:
        y = form(**leaves, scaling=1.7)
    with Allocations() as backward:
        y.backward(dy)
    return forward.largest, backward.largest


@both_impls
@pytest.mark.parametrize(
    ("tokens", "size_in", "size_out", "dtype", "train_base"),
    [
        (130, 40, 120, torch.float32, True), (130, 40, 120, torch.bfloat16, False),
        (130, 120, 40, torch.float32, False), (130, 120, 40, torch.bfloat16, True),
        (20, 40, 120, torch.float32, False), (20, 40, 120, torch.bfloat16, True),
    ],
)  # fmt: skip
def test_no_tensor_is_as_large_as_tokens_by_experts_by_out(tokens, size_in, size_out, train_base, dtype, impl):
    """The largest is one output, one input or, where the base trains, its gradient."""
    experts, rank = 4, 2
    values, dy = draw(size_in, size_out, rank, experts, True, (tokens,), noisy=True, dtype=dtype)
    forward, backward = largest_tensors(ours(impl), values, dy, train_base)
    packed = ((experts + 1) * rank + 2 * experts) * size_in  # P, which with 20 tokens is as large as the input
    assert forward <= max(tokens * size_out, packed)
    assert backward <= max(tokens * size_out, tokens * size_in, packed, size_out * size_in if train_base else 0)
    seen, _ = largest_tensors(published, values, dy, train_base)
    assert seen == tokens * (experts + 1) * size_out > max(forward, backward)  # the probe sees what it looks for


def saved_bytes(function, *inputs):
    """Bytes that autograd keeps for the backward pass beyond `inputs`, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in inputs}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


@both_impls
@pytest.mark.parametrize(
    ("dtype", "limit", "train_base", "tokens"),
    [
        (torch.bfloat16, 256, False, 16), (torch.bfloat16, 256, True, 100), (torch.float16, 256, False, 100),
        (torch.float16, 256, True, 16), (torch.float32, 304, False, 16), (torch.float32, 304, True, 100),
    ],
)  # fmt: skip
def test_little_is_saved_for_the_backward_pass(dtype, limit, train_base, tokens, impl):
    """Per token: s with the routes beside it, and gates and slope in float32. With 16 tokens any copy of a parameter
    would go beyond the limit."""
    values, _ = draw(160, 128, 16, 3, True, (2, tokens // 2), noisy=True, dtype=dtype)
    adapters = PARAMETERS[2:]
    for name in ("x", *adapters, *(PARAMETERS[:2] if train_base else ())):
        # Adapters train in float32 over a base in half precision.
        values[name] = (values[name].float() if name in adapters else values[name]).requires_grad_()
    inputs = [value for name, value in values.items() if name != "noise"]
    inputs = [value for value in inputs if value is not None]
    saved = saved_bytes(lambda: ours(impl)(**values, scaling=1.7), *inputs)
    assert 0 < saved <= limit * tokens
    assert saved_bytes(lambda: values["x"] * values["x"].detach().clone(), *inputs) > 256 * tokens  # the probe sees


# With the rest of PyTorch


def stack(seed=0, dtype=torch.float32, layers=3, width=24):
    """Expert layers with tanh between, every parameter of the adapters at random."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(ExpertLoRALinear(nn.Linear(width, width, i % 2 == 0), rank=3, num_specific_experts=2) for i in range(layers)),
    ).to(DEVICE, dtype)
    for layer in model:
        for parameter in layer.adapter_parameters().values():
            nn.init.normal_(parameter, std=width**-0.5)
    return model


@pytest.mark.parametrize("noise", ["rows", "random"])
def test_activation_checkpointing_draws_the_same_noise_again(noise):
    model = stack()
    if noise == "rows":
        set_noise_rows(model, 5, torch.tensor([3, 8], device=DEVICE))
    x = torch.randn(2, 7, 24, device=DEVICE, requires_grad=True)
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        h = x
        for layer in model:
            h = checkpoint(lambda h, f=layer: f(h).tanh(), h, use_reentrant=False) if recompute else layer(h).tanh()
        if noise == "rows":
            torch.manual_seed(99)  # whatever the generator holds
        results.append([h, *torch.autograd.grad(h.square().sum(), [x, *model.parameters()])])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)
    assert all(gradient.any() for gradient in results[0])


@both_impls
@pytest.mark.parametrize(
    ("experts", "inside", "dtype"),  # each pair of values
    [(0, False, torch.bfloat16), (0, True, torch.float16), (3, False, torch.float16), (3, True, torch.bfloat16)],
)
def test_autocast_matches_the_casts_by_hand(experts, inside, dtype, impl):
    values, dy = draw(20, 14, 3, experts, True, (2, 9), noisy=True, dropout=True)
    if impl == "triton":
        values["dropped"] = None
    low = ("x", "weight", "bias", "dropped")

    def by_hand(**leaves):
        return ours(impl)(**{n: v.to(dtype) if n in low and v is not None else v for n, v in leaves.items()})

    def automatic(**leaves):
        with torch.autocast(DEVICE, dtype):
            return ours(impl)(**leaves)

    expected = output_and_gradients(by_hand, values, dy)
    if inside:
        with torch.autocast(DEVICE, dtype):
            results = output_and_gradients(ours(impl), values, dy)
    else:
        results = output_and_gradients(automatic, values, dy)
    assert results["y"].dtype == dtype and results["lora_A"].dtype == results["x"].dtype == torch.float32
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def test_compiled_without_a_graph_break_it_gives_the_same():
    """aot_eager traces forward and backward as torch.compile does, and needs no C++ compiler."""
    torch.manual_seed(0)
    model = nn.Sequential(
        ExpertLoRALinear(nn.Linear(12, 10), rank=2, num_specific_experts=3),
        LoRALinear(nn.Linear(10, 7, bias=False), rank=3, dropout=0.2),
        ExpertLoRALinear(nn.Linear(7, 5), rank=2, num_specific_experts=2, dropout=0.1),
    ).to(DEVICE)
    for layer in model:
        for parameter in layer.adapter_parameters().values():
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 6, 12, device=DEVICE, requires_grad=True)
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)  # noise and dropout
        y = function(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for eager, compiled in zip(*results, strict=True):
        assert eager.any() and error(compiled, eager.double()) <= 1e-5


# Errors


def fits(**changes):
    """Operands that fit each other, with some replaced."""
    values, _ = draw(6, 4, 2, 3, True, (2, 5), noisy=True)
    return {**values, **changes}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 5, 7)),
        ("x", ()),
        ("bias", (5,)),
        ("bias", (1,)),
        ("lora_A", (8, 7)),
        ("lora_A", (8,)),
        ("lora_B", (4, 7)),
        ("lora_B", (5, 8)),
        ("router", (3, 7)),
        ("router", (3, 6, 1)),
        ("router_noise", (2, 6)),
        ("router_noise", (3, 7)),
        ("noise", (2, 5, 4)),
        ("noise", (10, 3)),
        ("noise", (1, 5, 3)),
        ("dropped", (2, 4, 6)),
        ("dropped", (10, 6)),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_by_name(name, shape):
    values = fits(**{name: torch.zeros(shape, device=DEVICE)})
    with pytest.raises(ValueError, match=rf"^{name} must have the shape \[.*\], found {re.escape(str(list(shape)))}$"):
        ours("torch")(**values, scaling=1.0)


@pytest.mark.parametrize("rows", [0, 7])
def test_rows_that_the_experts_cannot_share_are_refused(rows):
    values = fits(lora_A=torch.zeros(rows, 6, device=DEVICE), lora_B=torch.zeros(4, rows, device=DEVICE))
    with pytest.raises(ValueError, match=f"lora_A has {rows} rows, which 4 experts cannot share"):
        ours("torch")(**values, scaling=1.0)


def test_noise_that_nothing_scales_is_refused():
    with pytest.raises(ValueError, match="noise needs router_noise"):
        ours("torch")(**fits(router_noise=None), scaling=1.0)
    with pytest.raises(ValueError, match="noise must have the shape"):
        ours("torch")(**fits(router=None, router_noise=None), scaling=1.0)


@pytest.mark.parametrize("impl", ["cuda", "", "Triton"])
def test_an_unknown_implementation_is_refused(impl):
    with pytest.raises(ValueError, match=f'impl must be "torch", "triton" or None, found \'{impl}\''):
        ours(impl)(**fits(), scaling=1.0)


def test_triton_where_it_cannot_be_had_is_refused(monkeypatch):
    double = {name: value.double() for name, value in fits().items() if value is not None}
    with pytest.raises(ValueError, match=r"no float64, found torch.float64"):
        ours("triton")(**double, dropped=None, scaling=1.0)
    monkeypatch.setattr("pedgpt.kernels._dispatch.triton", None)
    with pytest.raises(ValueError, match="found no Triton"):
        ours("triton")(**fits(), scaling=1.0)
    ours(None)(**fits(), scaling=1.0)


@needs_triton
@pytest.mark.parametrize(("rank", "experts"), [(70, 5), (2, 65), (600, 0)])
def test_triton_has_no_most_columns_or_experts(rank, experts):
    values, dy = draw(33, 20, rank, experts, False, (3,), noisy=True)
    results = output_and_gradients(ours("triton"), values, dy)
    for name, truth in truth_of(values, dy).items():
        assert error(results[name], truth) <= 1e-6, name


def test_gradients_of_gradients_are_refused_rather_than_wrong():
    values, dy = draw(6, 4, 2, 3, True, (5,))
    x = values.pop("x").requires_grad_()
    y = ours("torch")(x, **values, scaling=1.0)
    for given in (dy, dy.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="lora_linear is differentiable once"):
            torch.autograd.grad(y, x, given, create_graph=True, retain_graph=True)


# On a GPU


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_on_cuda_triton_is_the_default_and_float64_falls_back():
    x = torch.empty(1, device="cuda")
    assert by_triton(None, x) and not by_triton(None, x.double()) and not by_triton(None, x.cpu())


@pytest.mark.gpu
@needs_cuda
@both_impls
def test_on_cuda_rows_beyond_two_to_the_31_elements_match_the_same_rows_alone(impl):
    """8.6 GB in y and dy."""
    tokens, size_out = 2**16 + 40, 2**15
    assert tokens * size_out > 2**31
    values, _ = draw(16, 1, 4, 3, False, (tokens,), noisy=True, dtype=torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    values["weight"], values["lora_B"], dy = (
        torch.randn(rows, columns, generator=generator, dtype=torch.bfloat16, device="cuda") / 4
        for rows, columns in ((size_out, 16), (size_out, 16), (tokens, size_out))
    )
    whole = output_and_gradients(ours(impl), values, dy)
    last = {n: v[-40:] if n in ("x", "noise") else v for n, v in values.items()}
    few = output_and_gradients(ours(impl), last, dy[-40:])
    for name in ("y", "x"):
        assert error(whole[name][-40:], few[name].double()) <= 2**-8
    assert math.isfinite(whole["lora_B"].float().norm().item())
