"""ExpertLoRALinear against SPEC §4 written out expert by expert in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pedgpt.adapters import ExpertLoRALinear, LoRALinear, inject_experts, record_gates, set_noise_rows
from pedgpt.kernels import Linear
from pedgpt.kernels.expert_gate import expert_gate

# in, out, rank, alpha, experts, bias, shape of the input before the width
CASES = [
    (16, 24, 8, 16, 3, False, (2, 5)),
    (7, 5, 3, 16, 2, True, (3,)),
    (13, 1, 1, 0.7, 1, True, ()),
    (1, 9, 4, 5, 5, False, (2, 1, 3)),
    (5, 6, 11, 8, 3, True, (1, 1)),
    (5, 6, 2, 8, 3, True, (2, 0)),
    (5, 6, 2, 8, 3, False, (0,)),
]
SHAPES = ("size_in", "size_out", "rank", "alpha", "experts", "bias", "shape")


def make(size_in, size_out, rank, alpha, experts, bias, dtype=torch.float64, dropout=0.0):
    """A layer with random weights, and the same weights as a list of experts."""
    generator = torch.Generator().manual_seed(100 * size_in + experts)

    def random(*shape):
        return (0.25 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    base = nn.Linear(size_in, size_out, bias, dtype=dtype)
    base.weight.data = random(size_out, size_in)
    if bias:
        base.bias.data = random(size_out)
    layer = ExpertLoRALinear(base, rank, alpha, experts, dropout)
    A = [random(rank, size_in) for _ in range(experts + 1)]
    B = [random(size_out, rank) for _ in range(experts + 1)]
    layer.lora_A.data.copy_(torch.cat(A, 0))
    layer.lora_B.data.copy_(torch.cat(B, 1))
    layer.router.data.copy_(random(experts, size_in))
    layer.router_noise.data.copy_(random(experts, size_in))
    weights = [base.weight, base.bias, *A, *B, layer.router, layer.router_noise]
    W, b, *rest = [None if w is None else w.detach().clone().to(torch.float64).requires_grad_() for w in weights]
    n = experts + 1
    return layer, SimpleNamespace(W=W, b=b, A=rest[:n], B=rest[n : 2 * n], Wg=rest[-2], Wn=rest[-1], scale=alpha / rank)


def spec(x, w, noise=None, dropped=None):
    """SPEC §4, one expert after another; `dropped` is what the experts see where it is not x."""
    score = x @ w.Wg.T
    if noise is not None:
        score = score + noise * torch.log(1 + torch.exp(x @ w.Wn.T))
    gates = torch.exp(score) / torch.exp(score).sum(-1, keepdim=True)
    y = x @ w.W.T if w.b is None else x @ w.W.T + w.b
    x = x if dropped is None else dropped
    y = y + w.scale * (x @ w.A[0].T @ w.B[0].T)
    for j in range(len(w.A) - 1):
        y = y + w.scale * gates[..., j : j + 1] * (x @ w.A[j + 1].T @ w.B[j + 1].T)
    return y


def gradients(y, x, layer_or_weights):
    """Of Σ y_o · (o-dependent weight) for x and all tensors, in the oracle's order with stacked experts."""
    (y * torch.linspace(-1, 2, y.shape[-1], dtype=y.dtype)).sum().backward()
    w = layer_or_weights
    if isinstance(w, ExpertLoRALinear):
        tensors = [x, w.weight, w.bias, w.lora_A, w.lora_B, w.router, w.router_noise]
        return [None if t is None else t.grad for t in tensors]
    stacked = [torch.cat([t.grad for t in w.A], 0), torch.cat([t.grad for t in w.B], 1)]
    return [x.grad, w.W.grad, None if w.b is None else w.b.grad, *stacked, w.Wg.grad, w.Wn.grad]


def random_input(*shape, dtype=torch.float64):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize(SHAPES, CASES)
@pytest.mark.parametrize("training", [False, True])
def test_output_and_every_gradient_match_the_experts_one_by_one(
    size_in, size_out, rank, alpha, experts, bias, shape, training
):
    layer, weights = make(size_in, size_out, rank, alpha, experts, bias)
    layer.train(training)
    x = random_input(*shape, size_in)
    torch.manual_seed(11)
    y = layer(x)
    torch.manual_seed(11)
    noise = torch.randn(*shape, experts, dtype=torch.float64) if training else None
    x_truth = x.detach().clone().requires_grad_()
    truth = spec(x_truth, weights, noise)
    assert y.shape == (*shape, size_out)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    if not training:
        weights.Wn.grad = layer.router_noise.grad = torch.zeros_like(weights.Wn)  # plays no part
    for name, ours, theirs in zip(
        "x weight bias lora_A lora_B router router_noise".split(),
        gradients(y, x, layer),
        gradients(truth, x_truth, weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_router_noise_gets_no_gradient_in_evaluation():
    layer, _ = make(*CASES[0][:-1])
    layer.eval()(random_input(3, 16)).sum().backward()
    assert layer.router_noise.grad is None or not layer.router_noise.grad.any()


@pytest.mark.parametrize("training", [False, True])
def test_a_non_contiguous_input_gives_the_same(training):
    layer, weights = make(6, 4, 3, 6, 3, True)
    layer.train(training)
    set_noise_rows(layer, 0, torch.arange(5))
    x = random_input(3, 12, 5).transpose(0, 2)[:, ::2].transpose(1, 2)
    assert x.shape == (5, 3, 6) and not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=1e-13, atol=1e-13)
    if not training:
        torch.testing.assert_close(layer(x), spec(x, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("experts", [1, 3])
def test_gradcheck_in_float64(training, experts):
    layer, _ = make(3, 2, 2, 5, experts, True)
    layer.train(training)
    set_noise_rows(layer, 3, torch.tensor([9, 4]))
    names = ["weight", "bias", "lora_A", "lora_B", "router", "router_noise"]
    values = [getattr(layer, name).detach().requires_grad_() for name in names]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (random_input(2, 1, 3), *values))


@pytest.mark.parametrize("training", [False, True])
def test_bf16_is_as_close_to_float64_as_the_naive_form_in_bf16(training):
    layer, weights = make(64, 48, 5, 10, 3, True, dtype=torch.bfloat16)
    layer.train(training)
    x = random_input(3, 40, 64, dtype=torch.bfloat16)
    torch.manual_seed(4)
    y = layer(x)
    torch.manual_seed(4)
    noise = torch.randn(3, 40, 3) if training else None
    low = SimpleNamespace(**{k: _cast(v, torch.bfloat16) for k, v in vars(weights).items()})
    x_low, x_truth = (x.detach().to(dtype).requires_grad_() for dtype in (torch.bfloat16, torch.float64))
    naive = spec(x_low, low, None if noise is None else noise.bfloat16())
    truth = spec(x_truth, weights, None if noise is None else noise.double())
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.router.dtype == torch.float32

    if not training:
        for w in (weights, low):
            w.Wn.grad = torch.zeros_like(w.Wn)
        layer.router_noise.grad = torch.zeros_like(layer.router_noise)
    names = "y x weight bias lora_A lora_B router router_noise".split()
    results = zip(
        names,
        [y, *gradients(y, x, layer)],
        [naive, *gradients(naive, x_low, low)],
        [truth, *gradients(truth, x_truth, weights)],
        strict=True,
    )
    for name, ours, theirs, exact in results:
        error, budget = ((t.double() - exact).norm() / exact.norm().clamp(min=1e-30) for t in (ours, theirs))
        assert error <= 1.1 * budget + 1e-3, f"{name}: error {error:.1e}, naive form in bf16 {budget:.1e}"


def _cast(value, dtype):
    if isinstance(value, list):
        return [_cast(v, dtype) for v in value]
    return value.detach().to(dtype).requires_grad_() if isinstance(value, torch.Tensor) else value


def test_gates_of_bf16_routes_match_a_float64_softmax():
    routes = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    gates, _ = expert_gate(routes, None)
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.double(), routes.double().softmax(-1), rtol=1e-6, atol=0)


def test_autocast_runs_and_stays_near_float32():
    layer, _ = make(32, 24, 4, 8, 3, True, dtype=torch.float32)
    layer.eval()
    x = random_input(2, 6, 32, dtype=torch.float32)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 0.03


def test_no_tensor_is_as_large_as_tokens_by_experts_by_out():
    tokens, size_in, size_out, experts, rank = 64, 40, 56, 3, 2
    layer, _ = make(size_in, size_out, rank, 4, experts, True, dtype=torch.float32)
    layer.weight.requires_grad_(False)
    x = random_input(1, tokens, size_in, dtype=torch.float32)
    with Largest() as largest:
        y = layer(x)
    with Largest() as backward:
        y.square().sum().backward()
    # The largest of all is one output; a tensor [tokens, experts, out] would be three times as large.
    assert largest.numel == tokens * size_out
    assert backward.numel <= tokens * size_out

    naive_layer, weights = make(size_in, size_out, rank, 4, experts, True)
    with Largest() as naive:  # the probe sees what it looks for
        torch.stack([x.double() @ a.T @ b.T for a, b in zip(weights.A, weights.B, strict=True)], -2)
    assert naive.numel == tokens * (experts + 1) * size_out


def test_little_is_saved_for_the_backward_pass():
    tokens, width, rank, experts = 128, 64, 2, 3
    layer, _ = make(width, width, rank, 4, experts, False, dtype=torch.float32)
    layer.weight.requires_grad_(False)
    x = random_input(1, tokens, width, dtype=torch.float32)
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    saved = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    hidden = (experts + 1) * rank + 2 * experts  # what one skinny product gives a token
    weights = layer.lora_A.numel() + layer.lora_B.numel() + 2 * layer.router.numel()
    # A few copies of the hidden vector and of the gates, and the packed weights: nothing of the layer's width a token.
    assert sum(saved.values()) <= 4 * (tokens * (3 * hidden + 8 * experts) + weights) < 4 * tokens * width * 2


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_a_new_adapter_is_the_identity_bit_for_bit(dtype, training):
    base = Linear(17, 9, dtype=dtype)
    x = torch.randn(4, 17, dtype=dtype)
    assert torch.equal(ExpertLoRALinear(base).train(training)(x), base(x))


def test_a_zero_router_gives_the_mean_of_the_specific_experts():
    layer, w = make(9, 6, 2, 5, 4, True)
    layer.eval()
    layer.router.data.zero_()
    x = random_input(5, 9)
    outputs = [x @ a.T @ b.T for a, b in zip(w.A, w.B, strict=True)]
    expected = x @ w.W.T + w.b + 2.5 * (outputs[0] + torch.stack(outputs[1:]).mean(0))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_named_experts_are_the_ones_that_compute():
    layer, w = make(6, 4, 3, 6, 2, False)
    experts = [layer.universal_expert, *layer.specific_experts]
    assert len(experts) == 3
    for (a, b), true_a, true_b in zip(experts, w.A, w.B, strict=True):
        assert torch.equal(a, true_a) and torch.equal(b, true_b)


def test_initial_weights():
    layer = ExpertLoRALinear(nn.Linear(400, 30), rank=16, num_specific_experts=5)
    bound = 1 / math.sqrt(400)  # by the fan-in, not by the stacked rank
    assert layer.lora_A.shape == (96, 400) and layer.lora_B.shape == (30, 96)
    assert 0.99 * bound < layer.lora_A.abs().max() <= bound
    assert abs(layer.lora_A.std() - bound / math.sqrt(3)) < 0.01 * bound
    for zero in (layer.lora_B, layer.router, layer.router_noise):
        assert not zero.any()
    defaults = ExpertLoRALinear(nn.Linear(4, 4))
    assert (defaults.rank, defaults.num_specific_experts, defaults.scaling) == (8, 3, 2)


def test_a_new_gate_is_equal_in_evaluation_and_has_noise_of_scale_softplus_of_zero_in_training():
    layer = ExpertLoRALinear(nn.Linear(4, 4), num_specific_experts=3)
    torch.manual_seed(0)
    gates, _ = expert_gate(torch.zeros(100_000, 6), layer.train().noise(torch.zeros(100_000, 4)))
    assert torch.allclose(gates.sum(-1), torch.ones(()))
    # log G_i − log G_j = softplus(0) (ε_i − ε_j) is normal with the standard deviation √2 ln 2.
    differences = (gates[:, 0] / gates[:, 1]).log().double()
    assert abs(differences.std() / (math.sqrt(2) * math.log(2)) - 1) < 5 / math.sqrt(2 * 100_000)
    assert abs(differences.mean()) < 5 * math.sqrt(2) * math.log(2) / math.sqrt(100_000)
    assert layer.eval().noise(torch.zeros(7, 4)) is None
    assert torch.equal(expert_gate(torch.zeros(7, 3), None)[0], torch.full((7, 3), 1 / 3))


def test_noise_only_while_training():
    layer, _ = make(*CASES[0][:-1])
    x = random_input(2, 5, 16)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.allclose(layer(x), layer(x))


@pytest.mark.parametrize("dropout", [0.25, 0.9])
def test_dropout_reaches_the_experts_but_not_the_router(dropout):
    layer, weights = make(12, 8, 3, 6, 3, True, dropout=dropout)
    set_noise_rows(layer, 1, torch.tensor([0, 1]))
    x = random_input(2, 6, 12)
    torch.manual_seed(2)
    y = layer(x)
    torch.manual_seed(2)
    dropped = F.dropout(x, dropout)
    noise = layer.noise_stream.normal(torch.zeros(2, 6, 3, dtype=torch.float64))
    assert (dropped == 0).any()
    torch.testing.assert_close(y, spec(x, weights, noise, dropped), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.eval()(x), spec(x, weights), rtol=1e-12, atol=1e-12)


def test_switched_off_it_is_its_base():
    layer, _ = make(6, 4, 3, 6, 2, True)
    x = random_input(5, 6)
    base = F.linear(x, layer.weight, layer.bias)
    assert not torch.equal(layer(x), base)
    layer.enabled = False
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("number", [0, -2])
def test_without_a_specific_expert_it_is_refused(number):
    with pytest.raises(ValueError, match=f"num_specific_experts must be at least 1, found {number}"):
        ExpertLoRALinear(nn.Linear(3, 3), num_specific_experts=number)


def test_recorded_gates_match_a_hand_computation(make_model, tokens, randomize):
    model = make_model().eval()
    names = inject_experts(model, num_specific_experts=4, target_modules=["q_proj", "down_proj"])
    randomize(model)
    inputs = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
        for name in names
    ]
    with torch.no_grad(), record_gates(model) as records:
        model(tokens)
        model(tokens[:1, :3])  # a second pass, of fewer tokens
    for hook in hooks:
        hook.remove()
    assert list(records) == names and len(names) == 4
    for name in names:
        x = torch.cat([t.flatten(0, 1) for t in inputs[name]]).double()
        assert len(x) == 4 * 7 + 3
        scores = (x @ model.get_submodule(name).router.detach().double().T).exp()
        expected = (scores / scores.sum(-1, keepdim=True)).mean(0)
        mean = torch.tensor(records[name].mean(), dtype=torch.float64)
        assert abs(mean.sum() - 1) < 1e-6
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
        assert expected.std() > 0.01  # not trivially equal
    model(tokens)
    assert records[names[0]].count == 31  # nothing is recorded outside the context


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2)])
def test_gates_are_recorded_for_any_leading_shape(shape):
    layer = nn.Sequential(ExpertLoRALinear(nn.Linear(5, 2), num_specific_experts=4).eval())
    with record_gates(layer) as records:
        layer(torch.randn(*shape, 5))
    assert records["0"].count == math.prod(shape)
    assert records["0"].mean() == pytest.approx([0.25] * 4)


def test_recording_stops_when_the_context_raises_and_needs_expert_layers(make_model, tokens):
    model = make_model()
    with pytest.raises(ValueError, match="no expert layers"), record_gates(model):
        pass
    names = inject_experts(model)
    with pytest.raises(KeyError), record_gates(model) as records:
        model(tokens)
        raise KeyError
    model(tokens)
    assert records[names[0]].count == tokens.numel()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_in_bf16_it_matches_the_experts_one_by_one():
    layer, weights = make(64, 48, 5, 10, 3, True, dtype=torch.bfloat16)
    layer.cuda().eval()
    x = random_input(2, 9, 64, dtype=torch.bfloat16)
    truth = spec(x.double(), weights)
    assert (layer(x.cuda()).cpu().double() - truth).norm() / truth.norm() < 5 * 2**-9


@pytest.mark.parametrize("kind", [ExpertLoRALinear, LoRALinear])
def test_a_layer_computes_with_the_implementation_it_is_told(kind):
    pytest.importorskip("triton")
    layer = kind(Linear(20, 12)).eval()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 20)
    expected = layer(x)
    layer.impl = "triton"  # its interpreter, without a GPU
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.impl = "cuda"
    with pytest.raises(ValueError, match='impl must be "torch", "triton" or None'):
        layer(x)
