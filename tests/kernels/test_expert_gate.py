"""The gate and the two Triton kernels around it, against their equations in float64.

The kernels run compiled where there is a GPU and under Triton's interpreter elsewhere.
"""

import math

import pytest
import torch

from pedgpt.kernels import expert_gate as module
from pedgpt.kernels.expert_gate import down_gate, down_gate_backward, expert_gate, expert_gate_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(module.triton is None, reason="needs Triton")
both_impls = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
with_and_without_noise = pytest.mark.parametrize("noisy", [False, True], ids=["evaluation", "training"])

# tokens, in, out, rank, experts
SIZES = [(131, 75, 70, 5, 3), (37, 100, 33, 30, 5), (17, 33, 40, 1, 40), (1, 1, 1, 1, 1), (67, 40, 65, 9, 0)]


def operands(tokens, size_in, size_out, rank, experts, noisy, dtype=torch.float32, seed=0):
    """x, P, ε, dy and B of one dtype, but ε float32."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0, dtype=dtype):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).to(DEVICE)

    columns = (experts + 1) * rank
    return (
        random(tokens, size_in),
        random(columns + experts * (1 + noisy), size_in, scale=size_in**-0.5),
        random(tokens, experts, dtype=torch.float32) if noisy else None,
        random(tokens, size_out),
        random(size_out, columns, scale=size_out**-0.5),
    )


def definition(x, packed, noise, dy, lora_B, rank, experts, scaling):
    """h, s, gates, slope and d(x Pᵀ) of the docstring's equations in float64, the last by autograd."""
    x, packed, dy, lora_B = (t.double() for t in (x, packed, dy, lora_B))
    columns = (experts + 1) * rank
    product = (x @ packed.T).requires_grad_()
    parts = [product[:, j * rank : (j + 1) * rank] for j in range(experts + 1)]
    gates = slope = None
    if experts:
        score = product[:, columns : columns + experts]
        if noise is not None:
            spread = product[:, columns + experts :]
            score = score + noise.double() * torch.logaddexp(spread, torch.zeros_like(spread))
            slope = noise.double() / (1 + torch.exp(-spread))
        gates = torch.exp(score - torch.logsumexp(score, -1, keepdim=True))
        parts = [parts[0], *(gates[:, j, None] * parts[j + 1] for j in range(experts))]
    h = scaling * torch.cat(parts, -1)
    (dproduct,) = torch.autograd.grad(h, product, dy @ lora_B)
    return {"h": h, "s": product[:, :columns], "gates": gates, "slope": slope, "ds": dproduct, "again": h}


def error(found, truth):
    """Relative, in the Frobenius norm; absolute where the truth is zero but for its own rounding."""
    norm = truth.norm().item()
    return (found.double() - truth).norm().item() / (norm if norm > 1e-12 else 1.0)


@both_impls
@with_and_without_noise
@pytest.mark.parametrize(("tokens", "size_in", "size_out", "rank", "experts"), SIZES)
def test_both_directions_match_the_equations_in_float64(tokens, size_in, size_out, rank, experts, noisy, impl):
    noisy = noisy and experts > 0
    x, packed, noise, dy, lora_B = operands(tokens, size_in, size_out, rank, experts, noisy)
    forward = down_gate(x, packed, noise, experts=experts, rank=rank, scaling=1.7, impl=impl)
    ds, h = down_gate_backward(dy, lora_B, forward.s, forward.gates, forward.slope, scaling=1.7, impl=impl)
    found = {**forward._asdict(), "ds": ds, "again": h}
    for name, truth in definition(x, packed, noise, dy, lora_B, rank, experts, 1.7).items():
        assert (found[name] is None) == (truth is None)
        assert truth is None or error(found[name], truth) <= 1e-6, name


@both_impls
@with_and_without_noise
def test_no_tokens_give_empty_results(noisy, impl):
    x, packed, noise, dy, lora_B = operands(0, 12, 9, 2, 3, noisy)
    forward = down_gate(x, packed, noise, experts=3, rank=2, scaling=1.0, impl=impl)
    assert [t.shape for t in forward[:3]] == [(0, 8), (0, 8), (0, 3)] and (forward.slope is not None) == noisy
    ds, h = down_gate_backward(dy, lora_B, forward.s, forward.gates, forward.slope, scaling=1.0, impl=impl)
    assert ds.shape == (0, 14 if noisy else 11) and h.shape == (0, 8)


class Guarded:
    """Tensors in the midst of a sea of NaN."""

    def __init__(self, margin):
        self.margin, self.seas = margin, []

    def put(self, tensor):
        """A contiguous copy with NaN on either side."""
        if tensor is None:
            return None
        sea = torch.full((tensor.numel() + 2 * self.margin,), torch.nan, dtype=tensor.dtype, device=tensor.device)
        middle = sea[self.margin : self.margin + tensor.numel()].view(tensor.shape)
        middle.copy_(tensor)
        self.seas.append(sea)
        return middle

    def new(self, *shape, dtype):
        """An output, NaN itself until it is written."""
        return self.put(torch.full(shape, torch.nan, dtype=dtype, device=DEVICE))

    def untouched(self):
        return all(sea[: self.margin].isnan().all() and sea[-self.margin :].isnan().all() for sea in self.seas)


def launch(x, packed, noise, dy, lora_B, rank, experts, blocks, dtype, margin=1 << 15):
    """The two kernels' results, by name, from operands and outputs among NaN; h and s are kept in `dtype`."""
    guarded = Guarded(margin)
    (tokens, size_in), columns, noisy = x.shape, (experts + 1) * rank, noise is not None
    x, packed, noise, dy, lora_B = (guarded.put(t) for t in (x, packed, noise, dy, lora_B))
    h, s, again = (guarded.new(tokens, columns, dtype=dtype) for _ in range(3))
    gates = guarded.new(tokens, experts, dtype=torch.float32) if experts else None
    slope = guarded.new(tokens, experts, dtype=torch.float32) if noisy else None
    ds = guarded.new(tokens, columns + experts * (1 + noisy), dtype=dtype)
    grid = (math.ceil(tokens / blocks["BLOCK_T"]),)
    sizes = {"EXPERTS": experts, "RANK": rank, "NOISY": noisy, **blocks}
    module.down_gate_fwd_kernel[grid](x, packed, noise, h, s, gates, slope, tokens, size_in, 1.7, **sizes)
    module.down_gate_bwd_kernel[grid](dy, lora_B, s, gates, slope, ds, again, tokens, dy.shape[1], 1.7, **sizes)
    assert guarded.untouched()
    return {"h": h, "s": s, "gates": gates, "slope": slope, "ds": ds, "again": again}


@needs_triton
@with_and_without_noise
@pytest.mark.parametrize("blocks", [{}, {"BLOCK_T": 16, "BLOCK_D": 16}, {"BLOCK_T": 32, "BLOCK_D": 128}])
@pytest.mark.parametrize(("tokens", "size_in", "size_out", "rank", "experts"), SIZES)
def test_kernels_fill_their_outputs_and_touch_nothing_beyond(tokens, size_in, size_out, rank, experts, blocks, noisy):
    """NaN around the operands shows in the results if it is read; outputs begin as NaN, and NaN lies around them."""
    noisy = noisy and experts > 0
    given = operands(tokens, size_in, size_out, rank, experts, noisy)
    blocks = {**module._blocks(given[0], experts, (experts + 1) * rank), **blocks}
    found = launch(*given, rank, experts, blocks, torch.float32)
    for name, truth in definition(*given, rank, experts, 1.7).items():
        assert truth is None or error(found[name], truth) <= 1e-6, name


@needs_triton
@with_and_without_noise
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "size_in", "size_out", "rank", "experts"), SIZES)
def test_kernels_in_half_precision_compute_in_float32_and_round_once(
    tokens, size_in, size_out, rank, experts, dtype, noisy
):
    """Half-precision operands and float32 outputs: as exact as float32. Half-precision outputs: those, rounded.

    Where the kernel rounds itself, Triton's interpreter truncates bfloat16 and a GPU rounds to nearest: either is
    within one unit in the last place.
    """
    noisy = noisy and experts > 0
    given = operands(tokens, size_in, size_out, rank, experts, noisy, dtype)
    blocks = module._blocks(given[0], experts, (experts + 1) * rank)
    exact = launch(*given, rank, experts, blocks, torch.float32)
    for name, truth in definition(*given, rank, experts, 1.7).items():
        assert truth is None or error(exact[name], truth) <= 1e-6, name
    rounded = launch(*given, rank, experts, blocks, dtype)
    for name in ("h", "s"):
        unit = torch.finfo(dtype).eps * exact[name].abs() + torch.finfo(dtype).smallest_normal
        assert ((rounded[name].float() - exact[name]).abs() <= unit).all(), name
        if dtype == torch.float16:
            assert torch.equal(rounded[name], exact[name].half())
    for name in ("gates", "slope"):  # they stay in float32
        assert exact[name] is None or torch.equal(rounded[name], exact[name])


# The gate alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [1, 2, 7])
@with_and_without_noise
def test_gates_and_their_gradient_match_a_float64_softmax(noisy, experts, dtype):
    generator = torch.Generator().manual_seed(experts)
    routes = (3 * torch.randn(50, experts * (1 + noisy), generator=generator)).to(dtype)
    noise = torch.randn(50, experts, generator=generator) if noisy else None
    dgates = torch.randn(50, experts, generator=generator)
    leaf = routes.double().requires_grad_()
    score = leaf[:, :experts]
    if noisy:
        score = score + noise.double() * torch.log(1 + torch.exp(leaf[:, experts:]))
    truth = torch.exp(score) / torch.exp(score).sum(-1, keepdim=True)
    gates, slope = expert_gate(routes, noise)
    assert gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(gates.double(), truth, rtol=2e-6, atol=0)
    (expected,) = torch.autograd.grad(truth, leaf, dgates.double())
    found = expert_gate_backward(dgates.to(gates.dtype), gates, slope)
    assert error(found, expected) <= 1e-6


@both_impls
def test_the_noise_scale_neither_overflows_nor_loses_its_tail(impl):
    """softplus and its slope over the whole range, at noise of one against a route of zero."""
    spread = torch.tensor([-1e30, -1e4, -200, -87, -30, -17, -5, -1e-3, 0, 1e-3, 5, 15, 19.9, 20.1, 30, 87, 200, 1e4])
    x = spread[:, None].to(DEVICE)
    noise = torch.tensor([[1.0, 0.0]], device=DEVICE).repeat(len(x), 1)
    packed = torch.tensor([[0.0], [0], [0], [0], [0], [1], [1]], device=DEVICE)  # A, W_g and W_n
    forward = down_gate(x, packed, noise, experts=2, rank=1, scaling=1.0, impl=impl)
    z = x.double()
    softplus = z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
    expected = torch.cat([torch.sigmoid(softplus), torch.sigmoid(-softplus)], 1)
    torch.testing.assert_close(forward.gates.double(), expected, rtol=1e-5, atol=1e-37)
    sigmoid = torch.exp(z.clamp(max=0)) / (1 + torch.exp(-z.abs()))
    torch.testing.assert_close(forward.slope[:, :1].double(), sigmoid, rtol=1e-6, atol=1e-37)
    assert not forward.slope[:, 1].any()
