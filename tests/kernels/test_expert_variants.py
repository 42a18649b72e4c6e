"""The variants of the experts, and all their combinations, against a loop over tokens and experts with autograd.

Triton's kernels run compiled where there is a GPU and under its interpreter elsewhere.
"""

import itertools

import pytest
import torch

from pedgpt.kernels import expert_gate as module
from pedgpt.kernels import lora_linear, naive

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(module.triton is None, reason="needs Triton")
both_impls = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])

# U universal experts, one A for all, k, gates from outside; with N = 3. Given gates have no k.
MODES = [(None, False), (1, False), (2, False), (3, False), (None, True)]
COMBINATIONS = [(*each, *mode) for each in itertools.product((0, 1, 2, 4), (False, True)) for mode in MODES]
COMBINED = ("universal", "shared", "top_k", "given")
# With noise and dropout or without: half of the combinations, in which each pair of values occurs.
PAIRS = [
    (universal, (i + j) % 2 == 1, *mode, (i // 2 + j) % 2 == 1)
    for i, universal in enumerate((0, 1, 2, 4))
    for j, mode in enumerate(MODES)
]
# in, out, rank, experts, bias, shape: more than one tile of tokens and of a rank; one and no token
SIZES = [
    (13, 9, 3, 3, True, (2, 5)),
    (40, 21, 5, 5, False, (67,)),
    (6, 7, 70, 2, True, (3,)),
    (9, 5, 1, 1, False, (1,)),
    (5, 4, 2, 17, True, ()),
    (5, 6, 2, 3, True, (2, 0)),
]


def draw(size_in, size_out, rank, experts, bias, shape, universal, shared, given, dtype, noisy=True, seed=0):
    """Operands of `lora_linear`, with noise and dropout if it is `noisy`, which tokens count, and gradients to send."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).to(DEVICE)

    columns = (experts + universal) * rank
    values = {
        "x": random(*shape, size_in),
        "weight": random(size_out, size_in, scale=size_in**-0.5),
        "bias": random(size_out) if bias else None,
        "lora_A": random(rank if shared else columns, size_in, scale=size_in**-0.5),
        "lora_B": random(size_out, columns, scale=columns**-0.5),
        "router": None if given else random(experts, size_in, scale=size_in**-0.5),
        "router_noise": None if given else random(experts, size_in, scale=size_in**-0.5),
        "gates": random(*shape, experts).float().sigmoid().to(dtype) if given else None,
        "noise": random(*shape, experts) if noisy and not given else None,
        "dropped": random(*shape, size_in) if noisy else None,
    }
    count = torch.rand(shape, generator=generator).to(DEVICE) < 0.6 if noisy else True
    dtotals = torch.randn(experts + 2, generator=generator, dtype=torch.float64).to(DEVICE)
    return values, count, random(*shape, size_out), dtotals


def largest(scores, k):
    """Which of a token's scores are the k largest, the first of equal ones; by Python's own sort."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    rows, places = scores.detach().reshape(-1, scores.shape[-1]), kept.view(-1, scores.shape[-1])
    for row, place in zip(rows.tolist(), places, strict=True):
        for j in sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))[:k]:
            place[j] = True
    return kept


def loop(
    x, weight, bias, lora_A, lora_B, router, router_noise, gates, noise, dropped, universal, shared, top_k, scaling,
    count, kept=None,
):  # fmt: skip
    """(y, gates, totals), one expert after another; `kept` says which gates count where rounding may choose others."""
    experts = len(router) if gates is None else gates.shape[-1]
    rank = lora_B.shape[1] // (experts + universal)
    if gates is None:
        score = x @ router.T
        if noise is not None:
            score = score + noise * torch.log1p(torch.exp(x @ router_noise.T))
        weights = torch.exp(score)
        if top_k is not None:
            weights = torch.where(largest(score, top_k) if kept is None else kept, weights, 0.0)
        gates = weights / weights.sum(-1, keepdim=True)
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    dropped = x if dropped is None else dropped
    for e in range(universal + experts):
        rows = slice(0, rank) if shared else slice(e * rank, (e + 1) * rank)
        expert = dropped @ lora_A[rows].T @ lora_B[:, e * rank : (e + 1) * rank].T
        y = y + scaling * (expert if e < universal else gates[..., e - universal, None] * expert)
    return y, gates, totals_of(gates, count)


def totals_of(gates, count):
    count = torch.ones_like(gates[..., 0], dtype=torch.bool) if count is True else count
    sums = [(gates[..., j] * count).sum() for j in range(gates.shape[-1])]
    logarithms = torch.log(torch.where(gates > 0, gates, 1.0))
    return torch.stack([*sums, -(gates * logarithms * count[..., None]).sum(), count.sum().to(gates)])


def results_of(form, values, dy, dtotals, dtype, **settings):
    """y, gates, totals and the gradient of every operand but the noise, by name."""
    leaves = {
        name: None if value is None else value.detach().to(dtype or value.dtype).requires_grad_(name != "noise")
        for name, value in values.items()
    }
    y, gates, totals = form(**leaves, **settings)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    outputs, gradients = ([y, totals], [dy.to(y.dtype), dtotals.to(totals.dtype)])
    found = torch.autograd.grad(outputs, list(wanted.values()), gradients, allow_unused=True)
    results = {"y": y.detach(), "gates": gates.detach(), "totals": totals.detach()}
    for (name, leaf), gradient in zip(wanted.items(), found, strict=True):
        results["d" + name] = torch.zeros_like(leaf) if gradient is None else gradient
        assert results["d" + name].shape == leaf.shape and results["d" + name].dtype == leaf.dtype
    return results


def ours(impl):
    def form(shared, **operands):  # that A is shared is seen from the shapes
        return lora_linear(**operands, impl=impl)

    return form


def error(found, truth):
    norm = truth.norm().item()
    return (found.double() - truth).norm().item() / (norm if norm > 1e-12 else 1.0)


def check(sizes, universal, shared, top_k, given, dtype, impl, bound, noisy=True):
    values, count, dy, dtotals = draw(*sizes, universal, shared, given, dtype, noisy)
    settings = {"universal": universal, "shared": shared, "top_k": top_k, "scaling": 1.7, "count": count}
    found = results_of(ours(impl), values, dy, dtotals, None, **settings)
    kept = found["gates"] > 0 if dtype == torch.bfloat16 else None
    truth = results_of(loop, values, dy, dtotals, torch.float64, **settings, kept=kept)
    assert found["totals"].dtype == torch.float64
    for name, exact in truth.items():
        assert error(found[name], exact) <= bound, f"{name}: {error(found[name], exact):.1e}"
    return found


@pytest.mark.parametrize("noisy", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(COMBINED, COMBINATIONS)
def test_float64_matches_the_loop(universal, shared, top_k, given, noisy):
    check(SIZES[0], universal, shared, top_k, given, torch.float64, "torch", 1e-12, noisy)


@both_impls
@pytest.mark.parametrize((*COMBINED, "noisy"), PAIRS)
def test_float32_matches_the_loop(universal, shared, top_k, given, noisy, impl):
    check(SIZES[0], universal, shared, top_k, given, torch.float32, impl, 1e-6, noisy)


@both_impls
@pytest.mark.parametrize(
    ("sizes", *COMBINED),  # each size with scores and with given gates
    [
        (size, *combined)
        for i, size in enumerate(SIZES)
        for combined in (
            [(0, False, 1, False), (2, True, 1, False)][i % 2], [(2, True, None, True), (3, False, None, True)][i % 2],
        )
    ],
)  # fmt: skip
def test_odd_sizes_match_the_loop(universal, shared, top_k, given, sizes, impl):
    found = check(sizes, universal, shared, top_k, given, torch.float32, impl, 2e-6)
    assert found["y"].shape == (*sizes[-1], sizes[1])
    if impl == "torch":
        check(sizes, universal, shared, top_k, given, torch.float64, impl, 1e-12)


@both_impls
@pytest.mark.parametrize(COMBINED, [each[:4] for each in PAIRS[::2]])
def test_bfloat16_is_near_the_loop_in_float64(universal, shared, top_k, given, impl):
    """Of the same chosen experts. An operand is right to 2^-9, and Triton's interpreter truncates where it stores."""
    check((40, 21, 5, 3, True, (67,)), universal, shared, top_k, given, torch.bfloat16, impl, 3 * 2**-8)


@pytest.mark.parametrize(COMBINED, [each[:4] for each in PAIRS])
def test_the_naive_form_matches_the_loop(universal, shared, top_k, given):
    def form(x, router, router_noise, gates, noise, top_k, dropped, count, **operands):
        if gates is None:
            gates = naive.expert_gate(x, router, router_noise, noise, top_k)
        y = naive.lora_linear(x, **operands, gates=gates)
        return y, gates, totals_of(gates, count)

    values, count, dy, dtotals = draw(*SIZES[0], universal, shared, given, torch.float64)
    values["dropped"] = None  # the naive form has no dropout
    settings = {"universal": universal, "shared": shared, "top_k": top_k, "scaling": 1.7, "count": count}
    found = results_of(form, values, dy, dtotals, None, **settings)
    truth = results_of(loop, values, dy, dtotals, torch.float64, **settings)
    for name, exact in truth.items():
        assert error(found[name], exact) <= 1e-12, name


@both_impls
@pytest.mark.parametrize("k", [1, 2, 3])
def test_of_equal_routes_the_first_are_kept(k, impl):
    values, *_ = draw(*SIZES[0], 1, False, False, torch.float32)
    values["router"] = values["router"][:1].expand(3, -1)
    values["noise"] = values["router_noise"] = None
    _, gates, _ = lora_linear(**values, scaling=1.0, top_k=k, impl=impl)
    expected = torch.tensor([1 / k] * k + [0] * (3 - k), device=DEVICE)
    torch.testing.assert_close(gates, expected.expand_as(gates))


@both_impls
def test_a_gate_of_zero_leaves_its_expert_and_its_route_without_a_gradient(impl):
    values, count, dy, dtotals = draw(*SIZES[0], 1, False, False, torch.float32)
    values["router"][0] = 100 * values["x"].flatten(0, -2).mean(0)
    values["x"] = values["x"][:1, :1].expand(2, 5, -1)
    values["noise"] = values["router_noise"] = None
    found = results_of(ours(impl), values, dy, dtotals, None, shared=False, scaling=1.7, top_k=1, count=count)
    chosen = found["gates"].flatten(0, -2)[0].bool()
    assert int(chosen.sum()) == 1 and set(found["gates"].unique().tolist()) == {0, 1}
    others = found["dlora_B"].unflatten(1, (4, 3))[:, 1:][:, ~chosen]
    assert not others.any() and not found["drouter"].any() and found["dlora_B"].any()


@both_impls
@pytest.mark.parametrize("universal", [0, 2])
def test_the_totals_have_a_gradient_without_y(universal, impl):
    """As a layer's has whose output nobody uses."""
    values, count, _, dtotals = draw(*SIZES[0], universal, True, False, torch.float32)
    settings = {"universal": universal, "shared": True, "top_k": 2, "scaling": 1.7, "count": count}
    results = []
    for form, dtype in ((ours(impl), torch.float32), (loop, torch.float64)):
        leaves = {n: v if v is None else v.to(dtype, copy=True).requires_grad_(n != "noise") for n, v in values.items()}
        *_, totals = form(**leaves, **settings)
        wanted = [leaves[name] for name in ("router", "router_noise", "x")]
        results.append(torch.autograd.grad(totals, wanted, dtotals))
    for found, truth in zip(*results, strict=True):
        assert truth.any() and error(found, truth) <= 1e-6


def test_what_does_not_fit_is_refused():
    values, *_ = draw(*SIZES[0], 1, False, True, torch.float32)
    for changes, message in (
        ({"gates": values["gates"][:1]}, r"gates must have the shape \[2, 5, 3\], found \[1, 5, 3\]"),
        ({"router": values["x"].new_zeros(3, 13)}, "router has no rows, or there are gates beside it"),
        ({"lora_A": values["lora_A"][:4]}, r"lora_B must have the shape \[9, 4\], found \[9, 12\]"),
        ({"universal": 2}, "lora_A has 12 rows, which 5 experts cannot share"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_linear(**{**values, **changes}, scaling=1.0)
