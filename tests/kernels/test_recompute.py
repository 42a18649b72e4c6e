"""Rules in place of tensors: what a graph keeps, when it computes it again, and that gradients are the same bits."""

import gc
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from pedgpt.kernels import recompute, rms_norm, swiglu
from pedgpt.kernels.recompute import recomputable, selective
from pedgpt.models import ModelConfig, Transformer


@pytest.fixture
def calls():
    return []


@pytest.fixture
def double(calls):
    """double(x): 2 x, which a scope computes again; each call of its rule is noted."""

    def again(x):
        calls.append(1)
        return 2 * x

    return lambda x: recomputable(2 * x, again, x)


def leaf(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def gradients(function, *leaves, on=True):
    with selective(on):
        out = function(*leaves)
    return torch.autograd.grad(out.sum(), leaves)


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y * y,
        lambda y: (y.view(-1).sin() * y.flatten(0, 1).flatten().cos()).sum() + y[1:, ::2].exp().sum(),
        lambda y: y.t() @ y.chunk(2, 0)[0].new_ones(len(y), 2) + (y.t() ** 2)[:, :2],
        lambda y: y.as_strided((2, 2), (1, 3), 1) ** 3,
        lambda y: y.expand(2, *y.shape) ** 2,
    ],
)
def test_views_get_the_same_gradient_and_the_rule_runs_once(use, double, calls):
    x = leaf(4, 6)
    expected = gradients(lambda x: use(2 * x), x, on=False)
    assert torch.equal(gradients(lambda x: use(double(x)), x)[0], expected[0])
    assert len(calls) == 1


def test_outside_of_a_scope_nothing_is_computed_again(double, calls):
    x = leaf(3)
    y = double(x)
    with selective():
        z = y * y  # made before the scope began
    with selective(False):
        z = z + double(x).square()
    (z + double(x).square()).sum().backward()
    assert not calls and torch.equal(x.grad, 24 * x)


def test_scopes_nest_and_end_even_by_an_error(double, calls):
    x = leaf(3)
    with selective():
        outer = double(x)
        with pytest.raises(ZeroDivisionError), selective():
            inner = double(x)
            1 / 0  # noqa: B018
        with selective():
            kept = outer.square()  # by a scope that does not know the rule
        again = outer.square() + double(x).square()
    late = inner.square()
    (kept + again + late).sum().backward()
    assert len(calls) == 2 and torch.equal(x.grad, 4 * 8 * x)


def test_the_result_is_freed_and_computed_for_all_who_need_it_until_the_last_is_done(double, calls):
    x = leaf(64)
    with selective():
        y = double(x)
        z = y.sin() + y.cos() + y.exp()
    result = weakref.ref(y.untyped_storage())
    del y
    assert result() is None and not calls
    z.sum().backward(retain_graph=True)
    assert len(calls) == 1
    z.sum().backward()
    assert len(calls) == 1
    expected = 2 * 2 * ((2 * x).cos() - (2 * x).sin() + (2 * x).exp())
    torch.testing.assert_close(x.grad, expected)


def test_a_graph_without_a_backward_pass_leaves_nothing(double):
    x = leaf(64)
    with selective():
        z = double(x).exp().exp()  # exp keeps its own output
    gone = weakref.ref(z.untyped_storage())
    del z
    gc.collect()
    assert gone() is None


def test_an_address_that_is_given_away_again_is_not_confused(double, calls):
    x = leaf(1000)
    with selective():
        out = sum(double(x).sum() for _ in range(5))  # each result dies at once, and its memory may serve the next
        out = out + sum((x + i).square().sum() for i in range(5))
    out.backward()
    assert not calls
    torch.testing.assert_close(x.grad, 10.0 + sum(2 * (x + i) for i in range(5)))


def test_in_place_changes_are_noticed_or_harmless(double, calls):
    x = leaf(5)
    with selective():
        y = double(x).mul_(3)  # before it is kept: kept as it is
        z = y * y
    z.sum().backward()
    assert not calls
    torch.testing.assert_close(x.grad, 72 * x)

    x = leaf(5)
    with selective():
        y = double(x)
        z = y * y
        y.detach().zero_()  # after: without a rule an error, with it the value from before
    z.sum().backward()
    torch.testing.assert_close(x.grad, 8 * x)

    x = leaf(5)
    for change in (lambda x, y: x.zero_(), lambda x, y: y.zero_()):
        inner = x + 0
        with selective():
            z = double(inner) ** 2  # keeps the rule, and with it `inner`
            y = x * 1
            z = z + y * y  # keeps y as it is
        change(inner.detach(), y.detach())
        with pytest.raises(RuntimeError, match=r"\[5\] of the graph was modified by an inplace operation"):
            z.sum().backward()


def test_second_derivatives_are_those_without_it(double):
    x = leaf(2, 3)
    found = []
    for on in (False, True):
        with selective(on):
            y = (double(x) ** 3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        found.append((first.detach(), *torch.autograd.grad((first**2).sum(), x)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_outer_checkpoint_may_hold_a_scope(double, reentrant):
    x = leaf(2, 3)

    def inside(x):
        with selective():
            return double(x.sin()) ** 2

    checkpoint(inside, x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(x.grad, 8 * x.sin() * x.cos())


def test_torch_func_and_a_compiler_see_no_difference(double):
    x = leaf(2, 3).detach()

    def function(x):
        with selective():
            return (double(x) ** 2).sum()

    torch.testing.assert_close(torch.func.grad(function)(x), 8 * x)
    torch.testing.assert_close(torch.func.vmap(function)(x), (4 * x * x).sum(1))
    y = x.clone().requires_grad_()
    torch.compile(lambda x: rms_norm(x, x[0], 1e-5), backend="aot_eager", fullgraph=True)(y).sum().backward()
    with selective():
        other = x.clone().requires_grad_()
        rms_norm(other, other[0], 1e-5).sum().backward()
    torch.testing.assert_close(other.grad, y.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_swiglu_give_the_same_bits_and_free_their_results(dtype):
    x, weight = leaf(7, 8).to(dtype).detach().requires_grad_(), leaf(8, seed=1).to(dtype).detach().requires_grad_()
    up, down = (leaf(8, 8, seed=s).to(dtype).detach().requires_grad_() for s in (2, 3))

    def block(x, weight, up, down):
        normed = rms_norm(x, weight, 1e-5)
        inner = swiglu(normed @ up, normed @ down)
        results.extend(weakref.ref(t.untyped_storage()) for t in (normed, inner))
        return inner @ down

    found = []
    for on in (False, True):
        results = []
        with selective(on):
            out = block(x, weight, up, down)
        assert [result() is None for result in results] == [on, on]
        found.append(torch.autograd.grad(out.float().square().sum(), (x, weight, up, down)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("how", ["selective", "checkpoint"])
def test_a_compiled_function_is_compiled_once_whatever_hooks_a_step_has(how):
    """As FlexAttention is called: in every block of every step, inside a scope or checkpoint of the block's own."""
    count, results = CompileCounterWithBackend("aot_eager"), []
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: (x @ w).sin().exp(), backend=count, fullgraph=True)
    for hooked in (False, True):
        weight = leaf(6, 6, seed=1)
        for step in range(3):
            hidden = leaf(4, 6, seed=step) * 1
            for _ in range(3):
                normed = hidden / 7
                if hooked and how == "checkpoint":
                    hidden = checkpoint(compiled, normed, weight, use_reentrant=False)
                else:
                    with selective(hooked):
                        hidden = compiled(recomputable(normed, lambda x: x / 7, hidden), weight)
            hidden.sum().backward()
        results.append(weight.grad)
        assert count.frame_count == 1
    assert torch.equal(*results)


def test_only_block_inputs_are_offloaded_and_gradients_stay(monkeypatch):
    """On a CPU nothing is copied, so torch's two hooks are replaced by some that count and copy."""
    config = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 2}
    model, tokens = Transformer(ModelConfig.from_hf(config)), torch.arange(14).view(2, 7)
    there, back = [], []

    def to_host(tensor):
        there.append(tuple(tensor.shape))
        return tensor.clone()

    def from_host(tensor):
        back.append(tuple(tensor.shape))
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(to_host, from_host)
    monkeypatch.setattr(recompute, "_save_on_cpu", lambda pin_memory: hooks)
    gradients = []
    for model.activation_checkpointing in ("none", "block", "offload"):
        model.zero_grad()
        model(tokens).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    large = [shape for shape in there if shape != (0,)]
    assert large == [(2, 7, 16)] * 3 and back.count((2, 7, 16)) == 3
    for others in gradients[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(others, gradients[0], strict=True))


def test_a_plan_does_not_count_what_a_gpu_offloads():
    from pedgpt.training.plan import counting, on_shapes

    config = {"model_type": "llama", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_hidden_layers": 4, "num_attention_heads": 2}
    held = {}
    for gpu in (True, False):
        for how in ("block", "offload"):
            with torch.device("meta"):
                model = Transformer(ModelConfig.from_hf(config))
            model.activation_checkpointing = how
            with counting(on_gpu=gpu) as counter:
                on_shapes(model)
                states = model.hidden_states(torch.zeros(1, 100, dtype=torch.int64))
                held[gpu, how] = counter.total
                states.sum().backward()
    inputs = 100 * 64 * 4  # bytes of one block's input
    assert held[True, "block"] - held[True, "offload"] >= 3 * inputs
    assert held[False, "block"] == held[False, "offload"]
