"""Log-probabilities from hidden states and the head, against their definition in float64.

The kernel runs compiled where there is a GPU and under Triton's interpreter elsewhere.
"""

import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pedgpt.kernels import linear_logps as module
from pedgpt.kernels import linear_nll, linear_token_logps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
needs_triton = pytest.mark.skipif(module.triton is None, reason="needs Triton")
both_impls = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
both_heads = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "NormHead"])
frozen_or_not = pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
both_operators = pytest.mark.parametrize("operator", [linear_token_logps, linear_nll])
OPERATORS, CHUNKS = (linear_token_logps, linear_nll), ("one chunk", "many chunks")


def half(*settings):
    """Every second combination of settings of two values each: any choice of all but one of them is in it."""
    places = itertools.product((0, 1), repeat=len(settings))
    return [tuple(s[i] for s, i in zip(settings, each, strict=True)) for each in places if sum(each) % 2 == 0]


# tokens, hidden, vocabulary
SIZES = [(9, 8, 13), (1, 5, 7), (11, 3, 129), (6, 4, 1), (0, 4, 5)]


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """As much as fits at once, or 1 to 6 tokens a chunk, a row a block, and a few of the head's rows a slice."""
    if request.param == "many chunks":
        small(monkeypatch)
    return request.param


def small(monkeypatch, chunk=40, block=25, slice_=30):
    for name, value in (("CHUNK", chunk), ("CHUNK_CUDA", chunk), ("BLOCK", block)):
        monkeypatch.setattr(module, name, value)
    for name in ("SLICE", "SLICE_CUDA"):
        monkeypatch.setattr(module, name, slice_)


def draw(tokens, size, vocabulary, masked=0.3, dtype=torch.float32, seed=0):
    """hidden, weight, labels and an upstream gradient a token."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < masked] = -100
    hidden, weight = random(tokens, size), 2 * size**-0.5 * random(vocabulary, size)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE), random(tokens).to(DEVICE)


def definition(hidden, weight, labels, factors, normalize):
    """log p, entropy, correctness and the gradients of Σ factors · log p, in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    z = hidden @ (F.normalize(weight, dim=-1) if normalize else weight).T
    kept = labels != -100
    chosen = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    logps = torch.where(kept, chosen - torch.logsumexp(z, -1), 0.0)
    p = z.softmax(-1)
    entropy = torch.where(kept, -torch.xlogy(p, p).sum(-1), 0.0)
    correct = (kept & (chosen >= z.amax(-1))).double()
    dhidden, dweight = torch.autograd.grad((factors.double() * logps).sum(), (hidden, weight))
    found = {"logps": logps, "entropy": entropy, "correct": correct, "dhidden": dhidden, "dweight": dweight}
    return {name: value.detach() for name, value in found.items()}


def result(operator, hidden, weight, labels, factors, normalize=False, frozen=False, impl=None):
    """What `definition` gives; of `linear_nll` with its sums, and with −factors[0] for its gradient."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
    found = operator(hidden, weight, labels, normalize=normalize, impl=impl)
    found.logps.backward(factors.to(found.logps.dtype))
    return {**{k: v.detach() for k, v in found._asdict().items()}, "dhidden": hidden.grad, "dweight": weight.grad}


def both(operator, hidden, weight, labels, factors, normalize=False, frozen=False, impl=None):
    """Pairs of name, result and truth."""
    if operator is linear_token_logps:
        truth = definition(hidden, weight, labels, factors, normalize)
    else:
        factors = factors.new_tensor(0.7)
        truth = definition(hidden, weight, labels, -factors.expand(len(hidden)), normalize)
        truth = {name: value if name.startswith("d") else value.sum() for name, value in truth.items()}
        truth["logps"] = -truth["logps"]
    found = result(operator, hidden, weight, labels, factors, normalize, frozen, impl)
    assert (found["dweight"] is None) == frozen
    return [(name, found[name], truth[name]) for name in truth if found[name] is not None]


def error(found, truth):
    """Relative, in the Frobenius norm; absolute where the truth is zero but for its own rounding."""
    assert found.shape == truth.shape
    norm = truth.norm().item()
    return (found.double() - truth).norm().item() / (norm if norm > 1e-12 else 1.0)


@both_impls
@pytest.mark.parametrize(
    ("operator", "frozen", "normalize", "chunks"),
    half(OPERATORS, (False, True), (False, True), CHUNKS),
    indirect=["chunks"],
)
@pytest.mark.parametrize(
    ("sizes", "masked"),
    [*((size, (0.0, 0.4)[i % 2]) for i, size in enumerate(SIZES)), (SIZES[0], 0.4), (SIZES[0], 1.1)],
)
def test_values_and_gradients_match_float64(sizes, masked, operator, frozen, normalize, impl, chunks):
    given = draw(*sizes, masked)
    for name, found, truth in both(operator, *given, normalize, frozen, impl):
        assert found.dtype == torch.float32
        assert error(found, truth) <= (2e-6 if name.startswith("d") else 1e-6), name
    if impl == "torch":
        hidden, weight, *rest = given
        for name, found, truth in both(operator, hidden.double(), weight.double(), *rest, normalize, frozen, impl):
            assert found.dtype == torch.float64 and error(found, truth) <= 1e-14, name


@both_heads
@frozen_or_not
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_gradcheck(tokens, frozen, normalize, chunks):
    hidden, weight, labels, _ = draw(tokens, 3, 5, 0.0, torch.float64)
    if tokens == 3:
        labels[1] = -100
    leaves = (hidden.requires_grad_(), weight.requires_grad_(not frozen))
    logps = lambda *leaves: linear_token_logps(*leaves, labels, normalize=normalize).logps  # noqa: E731
    nll = lambda *leaves: linear_nll(*leaves, labels, normalize=normalize).logps  # noqa: E731
    assert torch.autograd.gradcheck(logps, leaves)

    # gradcheck runs the backward pass again and again, which linear_nll refuses.
    trainable = [leaf for leaf in leaves if leaf.requires_grad]
    for leaf, gradient in zip(trainable, torch.autograd.grad(nll(*leaves), trainable), strict=True):
        with torch.no_grad():
            for place in range(leaf.numel()):
                ends = []
                for step in (1e-6, -2e-6):
                    leaf.view(-1)[place] += step
                    ends.append(nll(*leaves).item())
                leaf.view(-1)[place] += 1e-6
                assert gradient.view(-1)[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)


@both_impls
@pytest.mark.parametrize(
    ("operator", "frozen", "chunks"), half(OPERATORS, (False, True), CHUNKS), indirect=["chunks"]
)
def test_strides_do_not_matter(frozen, operator, impl, chunks):
    """Transposed states and head, every second label, an upstream gradient whose stride is 0."""
    hidden, weight, labels, factors = draw(5, 8, 13, 0.0)
    factors = factors[:1].expand(5)
    pairs = torch.stack((labels, torch.full_like(labels, 12)), dim=1)
    for strided in (
        (hidden.t().contiguous().t(), weight, labels, factors),
        (hidden, weight.t().contiguous().t(), labels, factors),
        (torch.cat((hidden, hidden), 1)[:, :8], torch.cat((weight, weight), 1)[:, 8:], labels, factors),
        (hidden[:1].expand(5, 8), weight, labels, factors),
        (hidden, weight, pairs[:, 0], factors),
    ):
        before = [tensor.clone() for tensor in strided]
        for name, found, truth in both(operator, *strided, True, frozen, impl):
            assert error(found, truth) <= 2e-6, name
        assert all(torch.equal(*pair) for pair in zip(strided, before, strict=True))


@both_impls
@both_operators
def test_extreme_logits_stay_exact(operator, impl, chunks):
    """Whole numbers, so that products are exact: logits of ±1e4, all equal ones, and ties of the label."""
    hidden = torch.tensor([[100.0, 0], [-100, 1], [0, 0], [1, 100], [100, 100]], device=DEVICE)
    weight = torch.tensor([[100.0, 0], [-100, 0], [0, 1], [100, 0], [0, 100]], device=DEVICE)
    labels = torch.tensor([0, 0, 2, 4, 1], device=DEVICE)
    for name, found, truth in both(operator, hidden, weight, labels, torch.ones(5, device=DEVICE), impl=impl):
        assert found.isfinite().all() and error(found, truth) <= 1e-6, name


@both_operators
@pytest.mark.parametrize("autocast", [False, True])
def test_a_normalised_heads_gradient_has_nothing_along_its_rows(autocast, operator, chunks):
    """Only their direction counts. A part along them would let their lengths drift, step after step."""
    hidden, weight, labels, _ = draw(40, 16, 29)
    weight.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss = operator(hidden, weight, labels, normalize=True).logps.sum()
    loss.backward()
    along = (F.normalize(weight, dim=-1) * weight.grad).sum(-1)
    assert (along.abs() <= 1e-6 * weight.grad.norm(dim=-1).clamp(min=1)).all()


@both_impls
@both_operators
def test_zero_rows_of_a_normalised_head_give_logits_of_zero_and_get_no_gradient(operator, impl, chunks):
    """Torch's own normalize would multiply their gradient by 1e12."""
    hidden, weight, labels, _ = draw(11, 16, 29, 0.0)
    zero = torch.tensor([0, 7, 28], device=DEVICE)
    labels[:3] = zero
    h, rest = hidden.double().requires_grad_(), weight.double().requires_grad_()
    keep = torch.ones(29, dtype=torch.float64, device=DEVICE).index_fill(0, zero, 0)
    truth = (h @ F.normalize(rest, dim=-1).T * keep).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    expected = truth.sum(), *torch.autograd.grad(truth.sum(), (h, rest))

    weight[zero] = 0
    weight[7, 3] = 1e-20  # too short to have a direction
    sign = 1 if operator is linear_token_logps else -1
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    value = sign * operator(*leaves, labels, normalize=True, impl=impl).logps.sum()
    for found, wanted in zip((value, *torch.autograd.grad(value, leaves)), expected, strict=True):
        assert error(found.detach(), wanted.detach()) <= 2e-6
    plain = torch.func.grad(lambda w: sign * operator(hidden.detach(), w, labels, normalize=True).logps.sum())
    assert error(plain(weight.detach()), expected[2]) <= 2e-6


# Half precision

BUDGET = 1.05  # times the error of torch's own path, summed over many draws
LATE = 1.1  # the same, where the gradient is ready before its factor comes: it is rounded once more then


def squares(totals, name, found, truth):
    """Adds the squares of an error and of the truth to `totals`."""
    new = torch.stack(((found.double() - truth).square().sum(), truth.square().sum()))
    totals[name] = totals[name] + new if name in totals else new


def compare(operator, dtype, normalize, frozen, impl=None, master=None):
    """Root of the summed squares of errors over many draws, by name: ours, and those of F.linear → F.cross_entropy.

    With `master`, parameters are of that dtype and `dtype` is autocast's. linear_nll is scaled to a mean, as in a loss.
    """
    ours, plain = {}, {}
    for seed in range(16 if impl is None else 2):  # the interpreter is slow
        tokens, vocabulary = 50 + seed, 140 + seed
        hidden, weight, labels, factors = draw(tokens, 48, vocabulary, 0.2, master or dtype, seed)
        mean = (labels != -100) / -(labels != -100).sum()
        factors = factors.float() if operator is linear_token_logps else mean
        truth = definition(hidden, weight, labels, factors, normalize)

        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        with torch.autocast(DEVICE, dtype, enabled=master is not None):
            count = [(labels != -100).sum()] if operator is linear_nll else []
            logps = operator(*leaves, labels, *count, normalize=normalize, impl=impl).logps
            assert logps.dtype == torch.float32
            if operator is linear_nll:
                truth["logps"] = (factors * truth["logps"]).sum()
        logps.backward(factors if operator is linear_token_logps else None)
        gradients = [leaf.grad for leaf in leaves if leaf.requires_grad]
        assert {gradient.dtype for gradient in gradients} == {master or dtype}
        for name, found in zip(("logps", "dhidden", "dweight"), (logps.detach(), *gradients), strict=False):
            squares(ours, name, found, truth[name])

        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        with torch.autocast(DEVICE, dtype, enabled=master is not None):
            head = F.normalize(leaves[1].float(), dim=-1).to(dtype) if normalize else leaves[1]
            logps = -F.cross_entropy(F.linear(leaves[0], head).float(), labels, reduction="none")
        if operator is linear_nll:
            logps = (factors * logps).sum()
        logps.backward(factors if operator is linear_token_logps else None)
        gradients = [leaf.grad for leaf in leaves if leaf.requires_grad]
        for name, found in zip(("logps", "dhidden", "dweight"), (logps.detach(), *gradients), strict=False):
            squares(plain, name, found, truth[name])
    if operator is linear_nll:
        assert (ours["logps"][0] / ours["logps"][1]).sqrt() <= torch.finfo(dtype).eps
        del ours["logps"]  # a number a draw: too few to tell whose error is larger
    return [(name, *(t[name][0].sqrt().item() for t in (ours, plain)), ours[name][1].sqrt().item()) for name in ours]


@pytest.mark.parametrize(
    ("operator", "frozen", "normalize", "dtype", "chunk"),
    half(OPERATORS, (False, True), (False, True), (torch.bfloat16, torch.float16), (2**25, 150 * 7)),
)
def test_half_precision_is_as_close_to_float64_as_torchs_cross_entropy(
    chunk, dtype, operator, frozen, normalize, monkeypatch
):
    small(monkeypatch, chunk, block=500, slice_=1000)
    late = frozen if operator is linear_token_logps else dtype == torch.float16
    budget = LATE if late else BUDGET
    for name, ours, plain, norm in compare(operator, dtype, normalize, frozen):
        assert ours <= budget * plain + 1e-7 * norm, name


@pytest.mark.parametrize(("operator", "normalize", "chunk"), half(OPERATORS, (False, True), (2**25, 150 * 7)))
def test_autocast_multiplies_in_bfloat16_and_gives_float32_gradients(chunk, operator, normalize, monkeypatch):
    small(monkeypatch, chunk, block=500, slice_=1000)
    seen = Products(monkeypatch)
    for name, ours, plain, norm in compare(operator, torch.bfloat16, normalize, False, master=torch.float32):
        assert ours <= BUDGET * plain + 1e-7 * norm, name
    assert seen.dtypes == {torch.bfloat16}


@needs_triton
@pytest.mark.parametrize(("operator", "normalize"), half(OPERATORS, (False, True)))
def test_triton_in_float16_is_as_close_to_float64_as_torchs_cross_entropy(operator, normalize):
    for name, ours, plain, norm in compare(operator, torch.float16, normalize, True, impl="triton"):
        assert ours <= LATE * plain + 1e-7 * norm, name


@both_heads
def test_float16_gradients_survive_until_the_loss_is_scaled(normalize):
    hidden, weight, labels, _ = draw(256, 32, 5000, 0.0, torch.float16)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    scale, count = 2.0**14, torch.tensor(256)
    (linear_nll(*leaves, labels, count, normalize=normalize).logps * scale).backward()
    truth = definition(hidden, weight, labels, torch.full((256,), -1 / 256, dtype=torch.float64), normalize)
    for leaf, name in zip(leaves, ("dhidden", "dweight"), strict=True):
        assert error(leaf.grad.double() / scale, truth[name]) <= 2e-3, name


@both_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_zeros_in_a_normalised_head_leaves_the_gradient_of_the_states_finite(dtype, operator):
    hidden, weight, labels, factors = draw(9, 8, 13, 0.0, dtype)
    weight[3] = 0
    limit = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for name, found, truth in both(operator, hidden, weight, labels, factors, True):
        if name == "dweight":  # along the zero itself it is any direction over 1e-12
            found, truth = (torch.cat((t[:3], t[4:])) for t in (found, truth))
        assert found.isfinite().all() and error(found, truth) <= limit, name


# The kernel itself


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "block", "dtype", "gradient", "normalize"),
    [
        (*size, dtype, gradient, (i + j + gradient) % 2 == 1)  # in bfloat16 the other half of them
        for i, size in enumerate([(5, 75, 16), (3, 64, 64), (7, 1, 1), (1, 33, 64)])
        for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
        for gradient in (False, True)
    ],
)
def test_the_kernel_fills_its_outputs_and_touches_nothing_beyond(tokens, vocabulary, block, dtype, gradient, normalize):
    """NaN around the operands shows in the results if it is read; the statistics begin as NaN.

    Where the kernel rounds itself, Triton's interpreter truncates bfloat16 and a GPU rounds to nearest: either is
    within one unit in the last place.
    """
    generator = torch.Generator().manual_seed(tokens)
    margin, seas = 1 << 13, []

    def among_nan(tensor):
        sea = torch.full((tensor.numel() + 2 * margin,), torch.nan, dtype=tensor.dtype, device=DEVICE)
        middle = sea[margin:-margin].view(tensor.shape)
        middle.copy_(tensor)
        seas.append(sea)
        return middle

    logits = among_nan((3 * torch.randn(tokens, vocabulary, generator=generator)).to(dtype))
    before = logits.clone()
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE)
    inverse = among_nan(0.5 + torch.rand(vocabulary, generator=generator)) if normalize else None
    factors = among_nan(torch.randn(tokens, generator=generator)) if gradient else None
    stats = among_nan(torch.full((3, tokens), torch.nan))
    module.linear_logps_fwd_kernel[(tokens,)](
        logits, labels, inverse, factors, stats, tokens, vocabulary,
        BLOCK_V=block,
    )  # fmt: skip
    assert all(sea[:margin].isnan().all() and sea[-margin:].isnan().all() for sea in seas)

    leaf = before.double().requires_grad_()
    z = leaf * inverse.double() if normalize else leaf
    logps = z.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    p = z.detach().softmax(-1)
    truth = torch.stack((logps.detach(), -torch.xlogy(p, p).sum(-1), (p.argmax(-1) == labels).double()))
    torch.testing.assert_close(stats.double(), truth, rtol=1e-6, atol=2e-6)
    if not gradient:
        assert torch.equal(logits, before)
        return
    (expected,) = torch.autograd.grad(logps, leaf, factors.double())
    unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), expected, rtol=unit + 3e-6, atol=1e-6 if unit == 0 else 3e-7)


# Work, memory and what autograd sees


class Products:
    """Notes the matrix products: each one's kind and its number of tokens."""

    def __init__(self, monkeypatch, size=None, vocabulary=None):
        self.kinds, self.tokens, self.dtypes = [], {"logits": 0, "dhidden": 0, "dweight": 0}, set()
        true = module.linear

        def linear(x, weight):
            kind = "dweight" if weight.shape[1] == x.shape[1] != size and x.shape[1] != vocabulary else "logits"
            kind = "dhidden" if vocabulary == x.shape[1] else kind
            self.kinds.append(kind)
            self.tokens[kind] += x.shape[1] if kind == "dweight" else x.shape[0]
            self.dtypes |= {x.dtype, weight.dtype}
            return true(x, weight)

        def add_product(head, dweight, dlogits, hidden, *, first, true=module._Head._add_product):
            self.kinds.append("dweight")
            self.tokens["dweight"] += len(dlogits)
            self.dtypes |= {dlogits.dtype, hidden.dtype}
            return true(head, dweight, dlogits, hidden, first=first)

        monkeypatch.setattr(module, "linear", linear)
        monkeypatch.setattr(module._Head, "_add_product", add_product)


@pytest.mark.parametrize(
    ("operator", "frozen", "grad", "expected"),
    [
        # 9 of 12 tokens count, 3 a chunk: logits, dhidden and dweight.
        (linear_token_logps, True, True, (9, 9, 0)),
        (linear_nll, True, True, (9, 9, 0)),
        (linear_nll, False, True, (9, 9, 9)),
        (linear_token_logps, False, True, (9 + 6, 9, 9)),  # all but the last chunk's logits again
        (linear_token_logps, False, False, (9, 0, 0)),
        (linear_nll, False, False, (9, 0, 0)),
        (linear_token_logps, True, None, (9, 0, 0)),  # nothing requires a gradient
        (linear_nll, True, None, (9, 0, 0)),
    ],
)
@both_heads
def test_no_product_is_taken_twice_or_for_an_ignored_token(normalize, operator, frozen, grad, expected, monkeypatch):
    small(monkeypatch)  # 40 // 13 = 3 tokens a chunk, 30 // 8 = 3 rows of the head a slice
    hidden, weight, labels, _ = draw(12, 8, 13, 0.0)
    labels[torch.tensor([0, 5, 11])] = -100
    hidden[torch.tensor([0, 5, 11])] = torch.nan  # would show
    seen = Products(monkeypatch, size=8, vocabulary=13)
    hidden.requires_grad_(grad is not None)
    weight.requires_grad_(not frozen)
    with torch.set_grad_enabled(grad is not False):
        loss = operator(hidden, weight, labels, normalize=normalize).logps.sum()
    assert loss.isfinite() and loss.requires_grad == bool(grad)
    if grad:
        loss.backward()
        assert not hidden.grad[torch.tensor([0, 5, 11])].any() and hidden.grad.isfinite().all()
    assert tuple(seen.tokens.values()) == expected


@both_operators
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_only_the_gradient_that_is_wanted_is_computed(which, operator, monkeypatch):
    hidden, weight, labels, factors = draw(9, 8, 13)
    seen = Products(monkeypatch, size=8, vocabulary=13)
    leaf = {"hidden": hidden, "weight": weight}[which].requires_grad_()
    operator(hidden, weight, labels).logps.sum().backward()
    assert seen.kinds == ["logits", f"d{which}"]
    sign = 1.0 if operator is linear_token_logps else -1.0
    truth = definition(hidden, weight, labels, torch.full_like(factors, sign), False)
    assert error(leaf.grad, truth[f"d{which}"]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_cuda)])
def test_a_product_onto_what_is_there_matches_float64(dtype):
    left, right, _, _ = draw(300, 17, 9, dtype=dtype)
    left, right = left[:, :7], torch.randn(7, 9, device=DEVICE).to(dtype)
    total = torch.full((300, 9), torch.nan, device=DEVICE)
    head = module._Head(total, dtype, False, None)
    head._add_product(total, left.t(), right, first=True)
    head._add_product(total, left.t(), right, first=False)
    assert error(total, 2 * left.double() @ right.double()) <= 1e-6


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
def test_a_gpu_takes_three_products_a_chunk_of_which_there_are_few(given, normalize):
    """On the meta device, which takes the same way as a GPU."""

    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found, self.small = [], 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "mm" in str(func):
                self.found.append((str(func), tuple(out.shape), out.dtype))
            self.small += isinstance(out, torch.Tensor) and out.shape[-1:] == (5120,)
            return out

    with torch.device("meta"):
        hidden, weight = torch.empty(8192, 5120, dtype=given), torch.empty(125_696, 5120, dtype=given)
        labels, factors = torch.empty(8192, dtype=torch.int64), torch.empty(8192)
        head = module._Head(weight, torch.bfloat16, normalize, lambda *_: None)
        with Products() as seen:
            stats, dhidden, dweight = head.gradients(hidden, labels, factors, of_hidden=True, of_weight=True)
    assert (dhidden.dtype, dweight.dtype, len(stats)) == (given, torch.float32, 3)
    sums = [entry for entry in seen.found if entry[1] == (125_696, 5120)]
    assert sums == [("aten.addmm.dtype_out", (125_696, 5120), torch.float32)] * 4
    assert len(seen.found) == 3 * 4 and seen.small < 300  # operations over rows of the head


class Sizes(TorchDispatchMode):
    """Notes every result of at least so many numbers."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.found = numbers, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.numbers:
                self.found.append(str(func))
        return out


@both_heads
@both_operators
def test_no_tensor_of_tokens_by_vocabulary_is_made(operator, normalize, monkeypatch):
    small(monkeypatch, chunk=1600)
    hidden, weight, labels, _ = draw(64, 8, 100)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Sizes(1601) as sizes:  # a chunk of 16 tokens; the head itself has 800 numbers
        operator(hidden, weight, labels, normalize=normalize).logps.sum().backward()
    assert not sizes.found
    with Sizes(1601) as sizes:  # the probe sees what it looks for
        F.cross_entropy(F.linear(hidden, weight), labels).backward()
    assert sizes.found


@frozen_or_not
def test_token_logps_run_backward_again_and_nll_refuses(frozen, chunks):
    hidden, weight, labels, factors = draw(9, 8, 13)
    leaves = [hidden.requires_grad_()] + ([] if frozen else [weight.requires_grad_()])
    logps = linear_token_logps(hidden, weight, labels).logps
    for upstream in (factors, factors.cos()):
        truth = definition(hidden, weight, labels, upstream, False)
        found = torch.autograd.grad(logps, leaves, upstream.float(), retain_graph=True)
        for value, name in zip(found, ("dhidden", "dweight"), strict=False):
            assert error(value, truth[name]) <= 2e-6
    nll = linear_nll(hidden, weight, labels).logps
    nll.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_nll runs backward once"):
        nll.backward()


@both_operators
@frozen_or_not
def test_a_second_derivative_is_refused(frozen, operator):
    hidden, weight, labels, _ = draw(9, 8, 13)
    found = operator(hidden.requires_grad_(), weight.requires_grad_(not frozen), labels)
    assert not found.entropy.requires_grad and not found.correct.requires_grad
    with pytest.raises(RuntimeError, match=f"{operator.__name__} is differentiable once: no create_graph=True"):
        torch.autograd.grad(found.logps.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["hidden", "weight", "labels"])
def test_what_changes_before_the_backward_pass_is_noticed(changed):
    hidden, weight, labels, _ = draw(9, 8, 13, 0.0)
    given = (hidden.requires_grad_(), weight.requires_grad_(), labels)
    logps = linear_token_logps(*given).logps
    with torch.no_grad():
        given[changed].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@frozen_or_not
def test_what_needs_nothing_of_the_head_any_more_lets_it_change(frozen):
    """linear_nll, and linear_token_logps with a frozen head, have their gradients already."""
    hidden, weight, labels, factors = draw(9, 8, 13)
    operator = linear_token_logps if frozen else linear_nll
    leaf = hidden.clone().requires_grad_()
    head = weight.clone().requires_grad_(not frozen)
    logps = operator(leaf, head, labels).logps
    with torch.no_grad():
        head.zero_()
    logps.sum().backward()
    truth = definition(hidden, weight, labels, torch.full_like(factors, 1.0 if frozen else -1.0), False)
    assert error(leaf.grad, truth["dhidden"]) <= 2e-6


@pytest.mark.parametrize(("operator", "normalize"), half(OPERATORS, (False, True)))
def test_compiled_and_under_torch_func_it_gives_the_same(operator, normalize):
    hidden, weight, labels, factors = draw(9, 8, 13)
    truth = definition(hidden, weight, labels, torch.ones_like(factors), normalize)
    sign = 1.0 if operator is linear_token_logps else -1.0

    def function(hidden, weight, labels=labels):
        found = operator(hidden, weight, labels, normalize=normalize)
        return sign * found.logps.sum(), (found.entropy.sum(), found.correct.sum())

    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    values, others = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    compiled = torch.autograd.grad(values, leaves)
    transform = torch.func.grad_and_value(function, argnums=(0, 1), has_aux=True)
    gradients, (value, aux) = transform(hidden, weight)
    for found, (entropy, correct), grads in ((values, others, compiled), (value, aux, gradients)):
        assert error(found.detach(), truth["logps"].sum()) <= 1e-6
        assert error(entropy.detach(), truth["entropy"].sum()) <= 1e-6 and correct == truth["correct"].sum()
        assert error(grads[0], truth["dhidden"]) <= 2e-6 and error(grads[1], truth["dweight"]) <= 2e-6
    rows = torch.func.vmap(lambda h, label: function(h, weight, label)[0])(hidden.view(3, 3, 8), labels.view(3, 3))
    assert error(rows, truth["logps"].view(3, 3).sum(1)) <= 1e-6


@both_operators
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_leaves_gradients_as_they_are(reentrant, operator, chunks):
    hidden, weight, labels, factors = draw(9, 8, 13)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(
        lambda h: operator(h, weight, labels).logps.sum(), hidden, use_reentrant=reentrant
    )
    loss.backward()
    factors = torch.full_like(factors, 1.0 if operator is linear_token_logps else -1.0)
    truth = definition(hidden, weight, labels, factors, False)
    assert error(hidden.grad, truth["dhidden"]) <= 2e-6 and error(weight.grad, truth["dweight"]) <= 2e-6


# What is refused


@both_operators
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"expected hidden \[N, D\], .* found \[2, 3, 4\], \[5, 4\], \[3\]"),
        ({"weight": torch.zeros(5, 3)}, r"found \[3, 4\], \[5, 3\], \[3\]"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"found \[3, 4\], \[5, 4\], \[4\]"),
        ({"labels": torch.tensor([0, 5, 9])}, "label 5 is outside of the vocabulary of 5"),
        ({"labels": torch.tensor([0, -1, 2])}, "label -1 is outside of the vocabulary of 5"),
        ({"labels": torch.zeros(3)}, "int64, found torch.float32"),
        ({"hidden": torch.zeros(3, 4).half()}, "hidden is torch.float16 and weight torch.float32.*autocast"),
        ({"impl": "cuda"}, """impl must be "torch", "triton" or None, found 'cuda'"""),
        pytest.param({"hidden": torch.zeros(3, 4).double(), "weight": torch.zeros(5, 4).double(), "impl": "triton"},
                     "no float64, found torch.float64", marks=needs_triton),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, message, operator):
    given = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.tensor([0, -100, 2]), **changes}
    with pytest.raises(ValueError, match=message):
        operator(**{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()})


def test_another_ignore_index_and_two_tokens_by_hand():
    # p(label) = 1/4 and 1/2, and a third token is left out: entropies (3/2) log 2 and (3/2) log 2.
    hidden = torch.tensor([[1.0, 0], [0, 1], [9, 9]], device=DEVICE)
    weight = torch.tensor([[2.0, 1], [1, 2], [1, 1]], device=DEVICE).log()
    labels = torch.tensor([1, 1, 0], device=DEVICE)
    found = linear_token_logps(hidden, weight, labels, ignore_index=0)
    assert found.logps.tolist() == pytest.approx([-math.log(4), -math.log(2), 0], rel=1e-6)
    assert found.entropy.tolist() == pytest.approx([1.5 * math.log(2)] * 2 + [0], rel=1e-6)
    assert found.correct.tolist() == [0, 1, 0]
    sums = linear_nll(hidden, weight, labels, ignore_index=0)
    assert [t.item() for t in sums] == pytest.approx([math.log(8), 3 * math.log(2), 1], rel=1e-6)


@pytest.mark.parametrize("operator", [linear_nll, linear_token_logps], ids=lambda operator: operator.__name__)
def test_one_chunk_of_logits_lives_at_a_time(operator, monkeypatch):
    """In both passes, also where the last chunk's logits wait for the backward pass."""
    made, multiply = [], module.linear
    hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)

    def noted(x, w):
        if w.shape != weight.shape:
            return multiply(x, w)
        assert not [logits for logits in made if logits() is not None]
        logits = multiply(x, w)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(module, "CHUNK", 10 * 50)
    monkeypatch.setattr(module, "linear", noted)
    found = operator(hidden, weight, torch.randint(0, 50, (40,)))
    found.logps.sum().backward()
    assert len(made) == (4 if operator is linear_nll else 7)
