"""The gate, its noise and the Triton kernels around it, against their equations in float64.

The kernels run compiled where there is a GPU and under Triton's interpreter elsewhere.
"""

import math

import pytest
import torch

from pedgpt.adapters.experts import NoiseStream
from pedgpt.kernels import expert_gate as module
from pedgpt.kernels import quantized
from pedgpt.kernels.expert_gate import (
    Mixture,
    down_gate,
    down_gate_backward,
    expert_gate,
    expert_gate_backward,
    gate_totals,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(module.triton is None, reason="needs Triton")
both_impls = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
with_and_without_noise = pytest.mark.parametrize("noisy", [False, True], ids=["evaluation", "training"])

# tokens, in, out, rank, experts: tiles are 32 or 64 tokens, up to 128 columns of the product and 64 of a rank
SIZES = [
    (67, 75, 70, 5, 3),
    (35, 70, 33, 30, 4),
    (17, 33, 40, 1, 11),
    (1, 1, 1, 1, 1),
    (67, 40, 65, 9, 0),
    (5, 70, 35, 67, 2),
]


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
    forward = down_gate(x, packed, noise, Mixture(experts, rank, 1.7), impl=impl)
    ds, h, _ = down_gate_backward(
        dy, lora_B, forward.s, forward.gates, forward.slope, Mixture(experts, rank, 1.7), columns=len(packed), impl=impl
    )
    found = {**forward._asdict(), "ds": ds, "again": h}
    for name, truth in definition(x, packed, noise, dy, lora_B, rank, experts, 1.7).items():
        assert (found[name] is None) == (truth is None)
        assert truth is None or error(found[name], truth) <= 1e-6, name


@both_impls
@with_and_without_noise
def test_no_tokens_give_empty_results(noisy, impl):
    x, packed, noise, dy, lora_B = operands(0, 12, 9, 2, 3, noisy)
    forward = down_gate(x, packed, noise, Mixture(3, 2, 1.0), impl=impl)
    assert [t.shape for t in forward[:3]] == [(0, 8), (0, 8), (0, 3)] and (forward.slope is not None) == noisy
    ds, h, _ = down_gate_backward(
        dy, lora_B, forward.s, forward.gates, forward.slope, Mixture(3, 2, 1.0), columns=len(packed), impl=impl
    )
    assert ds.shape == (0, 14 if noisy else 11) and h.shape == (0, 8)


@needs_triton
@pytest.mark.parametrize(("noisy", "experts"), [(True, 3), (False, 3), (False, 0)])
def test_rows_of_p_that_play_no_part_get_a_gradient_of_zero(noisy, experts):
    """Zeros that align P, and W_n in evaluation."""
    x, packed, noise, dy, lora_B = operands(37, 20, 9, 2, experts, noisy)
    more = torch.cat((packed, torch.full((5, 20), 3.0, device=DEVICE)))
    results = []
    for rows in (packed, more):
        forward = down_gate(x, rows, noise, Mixture(experts, 2, 1.7), impl="triton")
        ds, h, _ = down_gate_backward(
            dy, lora_B, forward.s, forward.gates, forward.slope, Mixture(experts, 2, 1.7), columns=len(rows),
            impl="triton",
        )
        results.append([forward.h, ds[:, : len(packed)], h])
        assert ds.shape == (37, len(rows)) and not ds[:, len(packed) :].any()
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)


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


def skinny(x, w, splits, blocks, guarded):
    """`skinny_kernel` of all splits, added, from x [T, D] and w [C, D]; the output lies among NaN."""
    (tokens, width), columns = x.shape, len(w)
    blocks = {"BLOCK_T": 64, "BLOCK_C": 32, "BLOCK_D": 64, **blocks}
    part = math.ceil(math.ceil(width / splits) / blocks["BLOCK_D"]) * blocks["BLOCK_D"]
    out = guarded.new(splits, tokens, columns, dtype=torch.float32)
    grid = (math.ceil(columns / blocks["BLOCK_C"]), math.ceil(tokens / blocks["BLOCK_T"]), splits)
    upcast = DEVICE == "cpu" and x.dtype == torch.bfloat16
    sizes = tokens, width, columns, part, *w.stride()
    quantized.skinny_kernel[grid](x, w, *[None] * 5, out, *sizes, UPCAST=upcast, **blocks)
    return out


def launch(x, packed, noise, dy, lora_B, rank, experts, dtype, splits=1, blocks=None, margin=1 << 15):
    """All kernels' results, by name, from operands and outputs among NaN; h and s are kept in `dtype`."""
    guarded = Guarded(margin)
    tokens, columns, noisy = len(x), (experts + 1) * rank, noise is not None
    x, packed, noise, dy, lora_B = (guarded.put(t) for t in (x, packed, noise, dy, lora_B))
    h, s, again = (guarded.new(tokens, columns, dtype=dtype) for _ in range(3))
    gates = guarded.new(tokens, experts, dtype=torch.float32) if experts else None
    slope = guarded.new(tokens, experts, dtype=torch.float32) if noisy else None
    ds = guarded.new(tokens, len(packed), dtype=dtype)
    forward, backward = skinny(x, packed, splits, blocks or {}, guarded), skinny(dy, lora_B.t(), splits, {}, guarded)
    mixture = Mixture(experts, rank, 1.7)
    programs, settings = module._settings(forward, mixture)
    grid = (programs,)
    totals = guarded.new(*grid, experts + 2, dtype=torch.float32) if experts else None
    module.gate_fwd_kernel[grid](
        forward, noise, None, 0, 0, None, h, s, gates, slope, totals, tokens, len(packed), 1.7,
        TOP_K=0, GIVEN=False, **settings,
    )  # fmt: skip
    module.gate_bwd_kernel[grid](
        backward, s, gates, slope, None, None, ds, again, None, tokens, len(packed), 1.7, **settings
    )
    assert guarded.untouched()
    found = {"h": h, "s": s, "gates": gates, "slope": slope, "ds": ds, "again": again, "totals": totals}
    assert all(tensor is None or tensor.isfinite().all() for tensor in found.values())
    return found


@needs_triton
@pytest.mark.parametrize(
    ("case", "which"), [(case, which) for case in range(len(SIZES)) for which in range(3) if (case + which) % 3 != 2]
)
def test_kernels_fill_their_outputs_and_touch_nothing_beyond(case, which):
    """NaN around the operands shows in the results if it is read; outputs begin as NaN, and NaN lies around them.

    Each size with two of the divisions, with noise in every second of them.
    """
    (tokens, size_in, size_out, rank, experts), noisy = SIZES[case], (case + which) % 2 == 0 and SIZES[case][-1] > 0
    splits, blocks = [(1, {}), (2, {"BLOCK_T": 16, "BLOCK_D": 16, "BLOCK_C": 16}), (4, {"BLOCK_D": 32})][which]
    given = operands(tokens, size_in, size_out, rank, experts, noisy)
    found = launch(*given, rank, experts, torch.float32, splits, blocks)
    for name, truth in definition(*given, rank, experts, 1.7).items():
        assert truth is None or error(found[name], truth) <= 1e-6, name


@needs_triton
@pytest.mark.parametrize("case", range(len(SIZES)))
def test_kernels_in_half_precision_compute_in_float32_and_round_once(case):
    """Half-precision operands and float32 outputs: as exact as float32. Half-precision outputs: those, rounded.

    Where the kernel rounds itself, Triton's interpreter truncates bfloat16 and a GPU rounds to nearest: either is
    within one unit in the last place. Each dtype with noise and without.
    """
    (tokens, size_in, size_out, rank, experts), dtype = SIZES[case], (torch.bfloat16, torch.float16)[case // 2 % 2]
    noisy = case % 2 == 0 and experts > 0
    given = operands(tokens, size_in, size_out, rank, experts, noisy, dtype)
    exact = launch(*given, rank, experts, torch.float32, 2)
    for name, truth in definition(*given, rank, experts, 1.7).items():
        assert truth is None or error(exact[name], truth) <= 1e-6, name
    rounded = launch(*given, rank, experts, dtype, 2)
    for name in ("h", "s"):
        unit = torch.finfo(dtype).eps * exact[name].abs() + torch.finfo(dtype).smallest_normal
        assert ((rounded[name].float() - exact[name]).abs() <= unit).all(), name
        if dtype == torch.float16:
            assert torch.equal(rounded[name], exact[name].half())
    for name in ("gates", "slope"):  # they stay in float32
        assert exact[name] is None or torch.equal(rounded[name], exact[name])


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "columns", "width"),
    [(3, 5, 511), (70, 150, 511), (3, 5, 512), (3, 5, 1030), (70, 150, 1030), (3, 5, 8200)],
)
def test_a_product_split_along_its_width_matches_float64(tokens, columns, width):
    """As the operator splits it, in float16, whose products float32 holds exactly."""
    generator = torch.Generator().manual_seed(width)
    x, w = (torch.randn(rows, width, generator=generator).half().to(DEVICE) for rows in (tokens, columns))
    parts = module.product_in_parts(x, w)
    assert len(parts) == {511: 1, 512: 1, 1030: 2, 8200: 16}[width]
    assert error(parts.double().sum(0), x.double() @ w.double().T) <= 1e-6


# Noise and totals


@needs_triton
@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (7, 3), (3, 17)])
@pytest.mark.parametrize("seed", [0, -1, 2**64 - 2])
def test_the_kernel_draws_the_stream_of_the_torch_form(seed, tokens, experts):
    """From the slope: with W_n of zero it is half the noise."""
    rows = torch.tensor([0, 5, 2**40, -3, -(2**63), 2**63 - 1], device=DEVICE)
    stream = NoiseStream(seed, 11, rows)
    x = torch.ones(len(rows) * tokens, 1, device=DEVICE)
    packed = torch.zeros(experts + 1 + 2 * experts, 1, device=DEVICE)
    found = down_gate(x, packed, stream, Mixture(experts, 1, 1.0), impl="triton")
    expected = stream.normal(torch.zeros(len(rows), tokens, experts, dtype=torch.float64, device=DEVICE)).flatten(0, 1)
    torch.testing.assert_close(2 * found.slope.double(), expected, rtol=1e-6, atol=1e-7)
    gates = torch.softmax(math.log(2) * expected, -1)
    torch.testing.assert_close(found.gates.double(), gates, rtol=1e-5, atol=1e-7)


@both_impls
@pytest.mark.parametrize(
    ("tokens", "experts", "which", "noisy"),  # each pair of values
    [
        (*size, which, (i + j) % 2 == 0)
        for i, size in enumerate([(67, 3), (1, 1), (5, 17)])
        for j, which in enumerate(["all", "some", "none"])
    ],
)
def test_totals_match_sums_over_the_tokens_that_count(tokens, experts, which, noisy, impl):
    x, packed, noise, *_ = operands(tokens, 20, 9, 2, experts, noisy)
    where = torch.rand(tokens, generator=torch.Generator().manual_seed(0)).to(DEVICE) < (0.5 if which == "some" else 0)
    count = True if which == "all" else where
    settings = {"mixture": Mixture(experts, 2, 1.0), "impl": impl}
    found = down_gate(x, packed, noise, count=count, **settings)
    gates = found.gates.double()[slice(None) if which == "all" else where]
    expected = torch.cat((gates.sum(0), -(gates * gates.log()).sum()[None], gates.new_tensor([len(gates)])))
    assert found.totals.dtype == torch.float64 and found.totals.shape == (experts + 2,)
    torch.testing.assert_close(found.totals, expected, rtol=1e-6, atol=1e-6)
    assert down_gate(x, packed, noise, **settings).totals is None


def test_a_gate_of_zero_has_no_entropy():
    totals = gate_totals(torch.eye(4)[[2, 0, 1]])
    assert totals.tolist() == [1, 1, 1, 0, 0, 3]


# Only the gate


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
    forward = down_gate(x, packed, noise, Mixture(2, 1, 1.0), impl=impl)
    z = x.double()
    softplus = z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
    expected = torch.cat([torch.sigmoid(softplus), torch.sigmoid(-softplus)], 1)
    torch.testing.assert_close(forward.gates.double(), expected, rtol=1e-5, atol=1e-37)
    sigmoid = torch.exp(z.clamp(max=0)) / (1 + torch.exp(-z.abs()))
    torch.testing.assert_close(forward.slope[:, :1].double(), sigmoid, rtol=1e-6, atol=1e-37)
    assert not forward.slope[:, 1].any()
