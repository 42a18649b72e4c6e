"""linear, Linear and the bare products against float64, and against F.linear and nn.Linear in all that is not speed."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from pedgpt.kernels import Linear, linear
from pedgpt.kernels.cpu import products as products_module
from pedgpt.kernels.cpu.products import sum_of_products

BUDGET = 1e-6  # relative, in float32; found are at most 3e-7
switches_onednn = pytest.mark.filterwarnings("ignore:TF32 acceleration")


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def operands(shape=(5, 6), size_out=4, bias=True, dtype=torch.float32):
    """x, W, b and dy, with a mean of one."""
    shapes = shape, (size_out, shape[-1]), (size_out,), (*shape[:-1], size_out)
    x, weight, b, dy = (1 + draw(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))  # no sum of these cancels
    return x, weight, b if bias else None, dy


def definition(x, weight, bias=None):
    y = (x[..., None, :] * weight).sum(-1)
    return y if bias is None else y + bias


def output_and_gradients(function, x, weight, bias, dy, dtype=None):
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(y, wanted, dy.to(y.dtype))
    for leaf, gradient in zip(wanted, gradients, strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
    return [y.detach(), *gradients]


def check(found, truth):
    for mine, true in zip(found, truth, strict=True):
        assert mine.shape == true.shape and mine.dtype == torch.float32
        assert (mine.double() - true).norm() <= BUDGET * true.norm()


def check_against_float64(x, weight, bias, dy):
    found = output_and_gradients(linear, x, weight, bias, dy)
    check(found, output_and_gradients(definition, x, weight, bias, dy, torch.float64))


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(autouse=True)
def small_products_are_onednns(monkeypatch):
    monkeypatch.setattr(products_module, "FEWEST_ROWS", 0)
    monkeypatch.setattr(products_module, "FEWEST", 0)


@pytest.fixture
def products(monkeypatch):
    """How often oneDNN was called: without it a test of this file would test F.linear against itself."""
    calls = []

    by_onednn = products_module._onednn

    def counted(*args):
        calls.append(args)
        return by_onednn(*args)

    monkeypatch.setattr(products_module, "_onednn", counted)
    return calls


# Layouts


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def sliced(tensor):
    """Columns out of wider rows that are NaN elsewhere."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
    wide[..., 2:-1] = tensor
    return wide[..., 2:-1]


def strided(tensor):
    """No stride of one, the axes reversed, NaN after every number."""
    wide = torch.full((*tensor.shape[::-1], 2), torch.nan, dtype=tensor.dtype)
    view = wide[..., 0].permute(*range(tensor.ndim)[::-1])
    return view.copy_(tensor)


def offset(tensor):
    """Memory that starts four bytes off any alignment."""
    return torch.cat((torch.full((1,), torch.nan, dtype=tensor.dtype), tensor.flatten()))[1:].view(tensor.shape)


def expanded(tensor):
    """One row, or one number, for all."""
    return tensor[:1].expand_as(tensor)


def one_number(tensor):
    """As y.sum() sends back."""
    return tensor.flatten()[0].expand_as(tensor)


def negated(tensor):
    """Lazily: the memory holds the opposite."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


LAYOUTS = [transposed, sliced, strided, offset, expanded, one_number, negated]
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size_out", [1, 2, 33, 70])
@pytest.mark.parametrize(
    "shape", [(7,), (1,), (1, 1), (5, 1), (1, 9), (131, 75), (2, 3, 17), (2, 1, 3, 40), (3, 2, 2, 1)], ids=str
)
def test_output_and_gradients_match_float64(shape, size_out, bias, products):
    check_against_float64(*operands(shape, size_out, bias))
    assert len(products) == 2


@by_layout
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 4, 7), (2, 2, 3, 7), (1, 7), (5, 1)], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["x", "weight", "bias", "dy"])
def test_any_layout_matches_float64(which, shape, layout, products):
    values = list(operands(shape))
    values[which] = layout(values[which])
    check_against_float64(*values)
    assert len(products) == 2


@by_layout
def test_all_operands_in_one_layout_match_float64(layout, products):
    check_against_float64(*map(layout, operands((2, 9, 7), 5)))
    assert len(products) == 2


def test_overlapping_rows_match_float64(products):
    """A moving window over a signal."""
    signal = draw(12)
    for stride in (1, 2):
        x = signal.as_strided((5, 4), (stride, 1))
        check_against_float64(x, *operands((5, 4), 3)[1:])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (5, 0), (0,), (0, 0)], ids=str)
def test_nothing_to_multiply_gives_what_f_linear_gives(shape, bias):
    values = operands(shape, 4, bias)
    assert equal(output_and_gradients(linear, *values), output_and_gradients(F.linear, *values))


def test_no_outputs_give_what_f_linear_gives():
    values = operands((5, 6), 0)
    assert equal(output_and_gradients(linear, *values), output_and_gradients(F.linear, *values))


def test_nan_and_infinity_stay_in_their_row():
    x, weight, bias, _ = operands((5, 6))
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    y, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert y[[0, 2, 4]].isfinite().all()


def test_operands_are_left_as_they_were():
    values = [strided(t) for t in operands((5, 6))]
    before = [t.clone() for t in values]
    output_and_gradients(linear, *values)
    assert equal(values, before)


# Bare products


@pytest.mark.parametrize(("left", "right"), list(itertools.product([None, *LAYOUTS], repeat=2)))
def test_products_in_any_strides_match_float64(left, right):
    x, weight = (t if layout is None else layout(t) for t, layout in ((draw(9, 7), left), (draw(5, 7), right)))
    bias, h, up = draw(5, seed=2), draw(9, 2, seed=3), draw(5, 2, seed=4)
    truth = definition(x.double(), weight.double())
    check([linear(x, weight)], [truth])
    check([linear(x, weight, bias)], [truth + bias])
    check([linear(x, weight, strided(bias))], [truth + bias])
    check([linear(x, weight, bias[:1].expand(5))], [truth + bias[:1]])
    second = definition(h.double(), up.double())
    check([sum_of_products(x, weight, h, up)], [truth + second])
    check([sum_of_products(x, weight, sliced(h), transposed(up), bias)], [truth + second + bias])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_products_of_other_types_are_torchs(dtype):
    x, weight, bias, _ = operands((9, 7), 5, dtype=dtype)
    h, up = draw(9, 2, dtype=dtype), draw(5, 2, dtype=dtype)
    assert torch.equal(linear(x, weight), x @ weight.t())
    assert torch.equal(linear(x, weight, bias), torch.addmm(bias, x, weight.t()))
    large, small = (x, weight), (h, up)
    first, second = (small, large) if dtype.itemsize == 2 else (large, small)
    expected = torch.addmm(torch.addmm(bias, first[0], first[1].t()), second[0], second[1].t())
    assert torch.equal(sum_of_products(*large, *small, bias), expected)


@pytest.mark.parametrize("shapes", [((0, 7), (5, 7)), ((9, 0), (5, 0)), ((9, 7), (0, 7))], ids=str)
def test_products_with_an_empty_operand_are_torchs(shapes):
    x, weight = (draw(*shape) for shape in shapes)
    bias, h, up = draw(len(weight)), draw(len(x), 2), draw(len(weight), 2)
    assert torch.equal(linear(x, weight), x @ weight.t())
    assert torch.equal(linear(x, weight, bias), torch.addmm(bias, x, weight.t()))
    assert torch.equal(sum_of_products(x, weight, h, up, bias), torch.addmm(bias.expand(len(h), -1), h, up.t()))


# Where F.linear is used


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_other_types_equal_f_linear(dtype):
    values = operands((3, 5, 6), dtype=dtype)
    assert equal(output_and_gradients(linear, *values), output_and_gradients(F.linear, *values))


def test_integers_equal_f_linear():
    x, weight = torch.arange(12).view(3, 4), torch.arange(8).view(2, 4)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast_equals_f_linear(stored, dtype):
    values = operands((3, 5, 6), dtype=stored)

    def under_autocast(function):
        def call(*args):
            with torch.autocast("cpu", dtype):
                y = function(*args)
            assert y.dtype == dtype
            return y

        return output_and_gradients(call, *values)

    assert equal(under_autocast(linear), under_autocast(F.linear))


@pytest.mark.parametrize("shape", [(7,), (131, 75), (2, 3, 17)], ids=str)
def test_where_torchs_products_are_preferred_it_equals_f_linear(shape, products, monkeypatch):
    monkeypatch.setenv("PEDGPT_CPU", "never")
    products_module.use({})
    values = operands(shape, 66)
    assert equal(output_and_gradients(linear, *values), output_and_gradients(F.linear, *values)) and not products
    monkeypatch.undo()
    products_module.use({})


@switches_onednn
def test_without_onednn_it_equals_f_linear(products):
    values = operands((40, 75), 66)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=False):
        assert equal(output_and_gradients(linear, *values), output_and_gradients(F.linear, *values)) and not products


def test_meta_tensors_give_shapes_alone():
    x, weight, bias, dy = (t.to("meta") for t in operands((3, 5, 6)))
    results = output_and_gradients(linear, x, weight, bias, dy)
    assert [(r.device.type, r.shape) for r in results] == [("meta", t.shape) for t in (dy, x, weight, bias)]


def test_fake_tensors_give_what_f_linear_gives():
    with torch._subclasses.FakeTensorMode():
        x, weight = torch.empty(2, 5, 6, requires_grad=True), torch.empty(4, 6, requires_grad=True)
        y = linear(x, weight)
        y.sum().backward()
    assert type(y).__name__ == "FakeTensor" and y.shape == (2, 5, 4)
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape


class Named(torch.Tensor):
    """A subclass that does nothing but last."""


def test_subclasses_last_as_in_f_linear():
    x, weight, bias, _ = operands()
    for function in (linear, F.linear):
        assert type(function(x.as_subclass(Named), weight, bias)) is Named
        assert type(function(x, nn.Parameter(weight.as_subclass(Named)), bias)) is Named
        assert type(function(x, nn.Parameter(weight), nn.Parameter(bias))) is torch.Tensor


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_a_sparse_weight_equals_f_linear(layout):
    x, weight, _, _ = operands()
    weight = weight.relu().to_sparse(layout=layout)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


# Errors


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((5, 6), (4, 7), None),
        ((5, 6), (4, 6, 1), None),
        ((6,), (2, 4, 6), None),
        ((), (4, 1), None),
        ((5, 1), (), None),
        ((5, 6), (4, 6), (5,)),
        ((5, 6), (4, 6), (3,)),
        ((2, 5, 6), (4, 6), (7,)),
        ((5, 6), (6,), (1,)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_raise_f_linears_error(x, weight, bias):
    values = [None if shape is None else torch.ones(shape) for shape in (x, weight, bias)]
    with pytest.raises(Exception) as expected:  # noqa: B017 - whatever torch says
        F.linear(*values)
    with pytest.raises(expected.type) as found:
        linear(*values)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.float64),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, None),
        (torch.float64, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_types_that_do_not_fit_raise_f_linears_error(dtypes):
    values = [None if dtype is None else t.to(dtype) for t, dtype in zip(operands()[:3], dtypes, strict=True)]
    with pytest.raises(RuntimeError) as expected:
        F.linear(*values)
    with pytest.raises(RuntimeError) as found:
        linear(*values)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("shape", [(), (1,), (1, 4), (5, 4)], ids=str)
def test_a_bias_that_is_broadcast_equals_f_linear(shape):
    x, weight, _, dy = operands((5, 6))
    check(
        output_and_gradients(linear, x, weight, draw(*shape), dy),
        [t.double() for t in output_and_gradients(F.linear, x, weight, draw(*shape), dy)],
    )


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)], ids=str)
def test_a_single_row_of_weight_gives_one_number_as_f_linear(shape):
    x, weight = draw(*shape), draw(6)
    dy = draw(*shape[:-1])
    expected = [t.double() for t in output_and_gradients(F.linear, x, weight, None, dy)]
    check(output_and_gradients(linear, x, weight, None, dy), expected)


# What is kept for the backward pass, and what is computed there


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_what_the_gradients_need_is_kept_and_computed(frozen, products):
    *leaves, dy = operands((2, 5, 6))
    x, weight, bias = leaves
    for leaf, still in zip(leaves, frozen, strict=True):
        leaf.requires_grad_(not still)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(x, weight, bias)
    needed = {t.data_ptr() for t, unless in ((x, frozen[1]), (weight, frozen[0])) if not unless}
    assert {t.data_ptr() for t in kept} == needed and len(kept) == len(needed)
    assert y.requires_grad == (not all(frozen))
    if y.requires_grad:
        y.backward(dy)
    assert len(products) == 1 + (not frozen[0])
    truth = output_and_gradients(definition, x, weight, bias, dy, torch.float64)
    for leaf, still, true in zip(leaves, frozen, truth[1:], strict=True):
        assert (leaf.grad is None) == still
        if not still:
            check([leaf.grad], [true])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(mode):
    values = [t.requires_grad_() for t in operands()[:3]]
    kept = []
    with mode(), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(*values)
    assert not y.requires_grad and y.grad_fn is None and not kept
    check([y], [definition(*(t.detach().double() for t in values))])


def test_a_changed_operand_is_noticed_as_in_f_linear():
    for function in (linear, F.linear):
        x, weight, bias, dy = operands()
        y = function(x, weight.requires_grad_(), bias)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(dy)


def test_the_output_may_be_changed_in_place():
    x, weight, bias, dy = operands((2, 5, 6))
    results = output_and_gradients(lambda *args: linear(*args).mul_(2), x, weight, bias, dy)
    truth = output_and_gradients(lambda *args: 2 * definition(*args), x, weight, bias, dy, torch.float64)
    check(results, truth)


def test_gradients_accumulate_and_hooks_run_once():
    layer, seen = Linear(6, 4), []
    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    x = draw(5, 6)
    for _ in range(2):
        layer(x).sum().backward()
    assert len(seen) == 4
    expected = 2 * x.sum(0, dtype=torch.float64).expand(4, 6)
    check([layer.weight.grad, layer.bias.grad], [expected, torch.full((4,), 10.0, dtype=torch.float64)])


def gradient_penalty(function, x, weight, dtype, by_grad):
    """dW of W² + (∂ Σ y / ∂x)²; the first term keeps autograd from noticing where the path of the second is cut."""
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
    y = function(x, weight)
    (dx,) = torch.autograd.grad(y.pow(3).sum() if by_grad else y.sum(), x, create_graph=True)
    loss = dx.square().sum() + weight.square().sum()
    if by_grad:
        return torch.autograd.grad(loss, weight)
    loss.backward()
    return (weight.grad,)



@pytest.mark.parametrize("by_grad", [False, True], ids=["constant dy", "autograd.grad"])
def test_a_penalty_on_the_gradient_matches_float64_or_is_refused(by_grad):
    x, weight, _, _ = operands()
    truth = gradient_penalty(definition, x, weight, torch.float64, by_grad)
    try:
        found = gradient_penalty(linear, x, weight, torch.float32, by_grad)
    except RuntimeError:
        return
    check(found, truth)


# The layer


def pair(bias=True):
    """nn.Linear and ours with the same weights."""
    torch.manual_seed(3)
    theirs = nn.Linear(6, 4, bias)
    torch.manual_seed(3)
    return theirs, Linear(6, 4, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_nn_linear_in_all_but_its_forward(bias):
    theirs, ours = pair(bias)
    assert isinstance(ours, nn.Linear) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert equal(ours.state_dict().values(), theirs.state_dict().values())  # the same draw
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is Linear and equal(copied.parameters(), ours.parameters())
        assert all(a is not b for a, b in zip(copied.parameters(), ours.parameters(), strict=True))
    swapped = Linear(6, 4, bias, dtype=torch.bfloat16)
    swapped.load_state_dict(theirs.state_dict())
    assert {p.dtype for p in swapped.parameters()} == {torch.bfloat16}
    theirs.load_state_dict(ours.state_dict())
    x = draw(2, 5, 6)
    y = ours(x)
    check([y], [definition(x.double(), *(p.detach().double() for p in ours.parameters()))])
    torch.testing.assert_close(y, theirs(x))


def test_functional_call_uses_the_given_weights():
    _, layer = pair()
    x, weight, bias, dy = operands()
    results = output_and_gradients(
        lambda x, weight, bias: torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,)),
        x, weight, bias, dy,
    )  # fmt: skip
    check(results, output_and_gradients(definition, x, weight, bias, dy, torch.float64))
    assert layer.weight.grad is None


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_of_torch_func_match_float64(transform):
    _, layer = pair()
    x, weight, bias = draw(5, 6), *(p.detach().double() for p in layer.parameters())
    if transform == "grad":
        found, truth = torch.func.grad(lambda x: layer(x).sum())(x), weight.sum(0).expand(5, 6)
    elif transform == "vmap":
        found, truth = torch.func.vmap(layer)(x), definition(x.double(), weight, bias)
    else:
        found, truth = torch.func.jvp(layer, (x,), (x,))[1], definition(x.double(), weight)
    check([found.detach()], [truth])


def test_a_shared_weight_gets_both_gradients():
    embedding, head = nn.Embedding(9, 6), Linear(6, 9, bias=False)
    head.weight = embedding.weight
    tokens, dy = torch.tensor([3, 1, 3]), draw(3, 9)
    (found,) = torch.autograd.grad(head(embedding(tokens)), embedding.weight, dy)
    leaf = embedding.weight.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(definition(leaf[tokens], leaf), leaf, dy.double())
    check([found], [truth])


def test_one_weight_applied_twice_gets_both_gradients():
    x, weight, _, dy = operands((5, 6), 6)

    def twice(function):
        return lambda x, weight, bias: function(function(x, weight), weight)

    found = output_and_gradients(twice(linear), x, weight, None, dy)
    check(found, output_and_gradients(twice(definition), x, weight, None, dy, torch.float64))


def test_compiled_without_a_graph_break_it_gives_the_same():
    """aot_eager traces forward and backward as torch.compile does, and needs no C++ compiler."""
    torch._dynamo.reset()
    _, layer = pair()
    x, results = draw(2, 5, 6).requires_grad_(), []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = function(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    check(results[1], [t.double() for t in results[0]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(reentrant):
    _, layer = pair()
    x = draw(5, 6).requires_grad_()
    results = []
    for function in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        x.grad = None
        function(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    assert equal(*results)


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # whose output is a view, as that of `linear` is
def test_under_fully_shard_it_trains_as_alone(mesh, products):
    _, alone = pair()
    sharded = copy.deepcopy(alone)
    fully_shard(sharded, mesh=mesh)
    x, results = draw(5, 6), []
    for layer in (alone, sharded):
        layer(x).square().sum().backward()
        results.append([getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in layer.parameters()])
    assert equal(*results)
    assert len(products) == 2  # the forward passes


def test_distributed_tensors_equal_f_linear(mesh):
    """Tensor parallelism hands DTensors to the layer."""
    x, weight, bias, dy = (distribute_tensor(t, mesh) for t in operands())
    found = output_and_gradients(linear, x, weight, bias, dy)
    expected = output_and_gradients(F.linear, x, weight, bias, dy)
    check([t.full_tensor() for t in found], [t.full_tensor().double() for t in expected])
