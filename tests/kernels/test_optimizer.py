"""The update against AdamW in float64, its rounding against statistics and hand arithmetic, Triton against torch.

The kernel runs compiled where there is a GPU and under Triton's interpreter elsewhere.
"""

import math

import pytest
import torch

from pedgpt.kernels import optimizer as module
from pedgpt.kernels.optimizer import PART, adamw_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(module.triton is None, reason="needs Triton")
both_impls = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
# numpy, which interprets the kernel, warns of 1 / 0, which is an intended infinity
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SETTINGS = {"step": 3, "lr": 1e-2, "betas": (0.877, 0.951), "eps": 1e-8, "weight_decay": 0.1, "key": 5}
INFINITY, NAN, LARGEST = math.inf, math.nan, torch.finfo(torch.bfloat16).max


def operands(size, weight=torch.bfloat16, state=torch.bfloat16, grad=None, seed=0):
    """weight, gradient and both moments, of the magnitudes of a language model."""
    generator = torch.Generator().manual_seed(seed)

    def random(dtype, scale):
        return (scale * torch.randn(size, generator=generator)).to(dtype)

    w, g, m, v = random(weight, 0.02), random(grad or weight, 1e-3), random(state, 1e-3), random(torch.float32, 1e-3)
    return w, g, m, (v**2).to(state)


def updated(tensors, impl="torch", **settings):
    """What the update makes of copies of these tensors, on the CPU: weight and moments."""
    device = DEVICE if impl == "triton" else "cpu"
    w, g, m, v = (tensor.clone().to(device) for tensor in tensors)
    adamw_(w, g, m, v, **{**SETTINGS, **settings}, impl=impl)
    assert torch.equal(g.cpu().nan_to_num(), tensors[1].nan_to_num())
    return [tensor.cpu() for tensor in (w, m, v)]


def definition(w, g, m, v, step, lr, betas, eps, weight_decay, key):
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    w, g, m, v = (tensor.double() for tensor in (w, g, m, v))
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
    mean, square = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return w - lr * (mean / (square.sqrt() + eps) + weight_decay * w), m, v


def neighbours(truth):
    """The numbers of bfloat16 around each of these in float64: the next towards zero, and the next away from it."""
    bits = truth.float().view(torch.int32) & -(2**16)
    below = bits.view(torch.float32).double()
    return below, (bits + 2**16).view(torch.float32).double()


@both_impls
@pytest.mark.parametrize("size", [1, 1023, 3001])
def test_float32_matches_the_definition(impl, size):
    tensors = operands(size, torch.float32, torch.float32)
    for found, truth in zip(updated(tensors, impl), definition(*tensors, **SETTINGS), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=2**-23 * truth.abs().max().item())


def test_float32_matches_torchs_adamw_over_steps():
    w, *_ = operands(1000, torch.float32)
    mine, m, v, other = w.clone(), torch.zeros_like(w), torch.zeros_like(w), torch.nn.Parameter(w.clone())
    theirs = torch.optim.AdamW([other], lr=1e-2, betas=SETTINGS["betas"], weight_decay=0.1)
    for step in range(1, 21):
        other.grad = 1e-3 * torch.randn(1000, generator=torch.Generator().manual_seed(step))
        theirs.step()
        adamw_(mine, other.grad, m, v, **{**SETTINGS, "step": step})
    torch.testing.assert_close(mine, other.detach(), rtol=1e-5, atol=1e-7)


@both_impls
def test_bfloat16_is_one_of_the_neighbours_of_the_definition(impl):
    tensors = operands(5000)
    for found, truth in zip(updated(tensors, impl), definition(*tensors, **SETTINGS), strict=True):
        below, above = neighbours(truth)
        # float32's own error may lead across a number of bfloat16 that lies next to the truth
        near = (truth - below).abs().minimum((truth - above).abs()) <= 1e-5 * truth.abs()
        assert found.dtype == torch.bfloat16
        assert ((found.double() == below) | (found.double() == above) | near).all() and near.float().mean() < 0.02
        assert (found.double() == below).float().mean() == pytest.approx(0.5, abs=0.05)


def rounded_up(places, steps, impl="torch"):
    """[3, steps, places]: whether the weight and the two moments, equal in all places, were rounded up.

    Without memory of earlier steps m = g, v = g² and w = 1 - lr. They lie 0.7, 0.3 and 0.6 of the way from one number
    of bfloat16 to the next: these have a distance of 1/256 below 1, and of 1/128 above.
    """
    zeros, number = torch.zeros(places, dtype=torch.bfloat16), torch.full((places,), 1 + 0.3 / 128)
    tensors, found = (zeros + 1, number, zeros, zeros), []
    for step in range(steps):
        settings = {"betas": (0.0, 0.0), "lr": 0.3 / 256, "weight_decay": 0.0, "key": 7919 * step - 10**18}
        w, m, v = updated(tensors, impl, **settings)
        assert ((w == 1) | (w == 255 / 256)).all() and ((m == 1) | (m == 129 / 128)).all()
        assert ((v == 1) | (v == 129 / 128)).all()
        found.append(torch.stack((w == 1, m > 1, v > 1)))
    return torch.stack(found, 1).double()


WAYS = torch.tensor([0.7, 0.3, 2 * 0.3 + 0.3**2 / 128], dtype=torch.float64)
SPREADS = (WAYS * (1 - WAYS)).sqrt()


def test_rounding_is_unbiased():
    ups = rounded_up(places=1000, steps=1000)
    means = (ups - WAYS[:, None, None]) / SPREADS[:, None, None]
    assert (means.mean((1, 2)) * 1000).abs().max() < 4
    for axis in (1, 2):  # a place over steps, and a step over places: of 3,000 means the largest
        assert 3 < (means.mean(axis) * 1000**0.5).abs().max() < 5


@needs_triton
def test_rounding_is_unbiased_in_triton():
    ups = rounded_up(places=5000, steps=4, impl="triton")
    assert ((ups.mean((1, 2)) - WAYS) / SPREADS * 20000**0.5).abs().max() < 4


def test_rounding_errors_are_independent_of_each_other():
    """Between the tensors, between places near and far, and between steps: correlations of 10⁶ errors."""
    ups = rounded_up(places=2000, steps=500)
    errors = (ups - WAYS[:, None, None]) / SPREADS[:, None, None]
    pairs = {(i, j): errors[i] * errors[j] for i in range(3) for j in range(i)}
    for shift in (1, 2, 3, 16, 64, 1000):
        pairs |= {("places", i, shift): errors[i, :, shift:] * errors[i, :, :-shift] for i in range(3)}
        pairs |= {("steps", i, shift): errors[i, shift:] * errors[i, :-shift] for i in range(3) if shift < 500}
        pairs[shift] = errors[0, :, shift:] * errors[1, :, :-shift]
    for name, products in pairs.items():
        assert abs(products.mean().item()) * products.numel() ** 0.5 < 4, name


def test_the_smallest_chance_has_its_share():
    """2⁻¹⁶ above a number of bfloat16 in the units of its distance to the next: once in 65,536 times it goes up."""
    size = 64 * 2**16
    number = torch.full((size,), 1 + 2.0**-23)
    zeros = torch.zeros(size, dtype=torch.bfloat16)
    _, m, _ = updated((zeros, number, zeros, zeros), betas=(0.0, 0.0))
    assert 32 < (m > 1).sum() < 96  # 64, with a standard deviation of 8


@pytest.mark.parametrize("key", [0, 1, -1, 2**62 + 12345])
def test_random_bits_are_uniform(key):
    """χ² over 256 classes of the upper and of the lower bits, for a whole part."""
    for field in module._random(torch.arange(PART, dtype=torch.int32), module.hash_bits(key)):
        assert field.min() >= 0 and field.max() < 2**16
        for classes in (field >> 8, field & 255):
            expected = PART / 256
            square = ((torch.bincount(classes, minlength=256) - expected) ** 2 / expected).sum().item()
            assert abs(square - 255) < 4.5 * math.sqrt(2 * 255)


@both_impls
def test_numbers_of_bfloat16_stay(impl):
    """All 65,536 of them: zeros of both signs, numbers below the smallest normal one, infinities and no numbers."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    zeros = torch.zeros_like(every)
    w, *_ = updated((every, zeros, zeros, zeros), impl, weight_decay=0.0)
    assert torch.equal(w.nan_to_num(nan=7), every.nan_to_num(nan=7)) and torch.equal(w.isnan(), every.isnan())
    _, m, v = updated((zeros, every, zeros, zeros), impl, betas=(0.0, 0.0))
    assert torch.equal(m.nan_to_num(nan=7), every.nan_to_num(nan=7)) and torch.equal(m.isnan(), every.isnan())
    assert torch.equal(v.isnan(), every.isnan())
    assert v[every.abs() < 2.0**63].isfinite().all() and (v[every.abs() > 2.0**64] == INFINITY).all()


@both_impls
@pytest.mark.parametrize("sign", [1, -1])
def test_no_finite_number_becomes_infinite(impl, sign):
    beyond = sign * torch.tensor([3.4e38, torch.finfo(torch.float32).max, LARGEST]).repeat(300)
    zeros = torch.zeros(900, dtype=torch.bfloat16)
    _, m, _ = updated((zeros, beyond, zeros, zeros), impl, betas=(0.0, 0.0))
    assert (m == sign * LARGEST).all()
    below = sign * torch.full((900,), LARGEST).nextafter(torch.zeros(())) * torch.tensor([1.0, 1.0, 0.999]).repeat(300)
    _, m, _ = updated((zeros, below, zeros, zeros), impl, betas=(0.0, 0.0))
    assert m.isfinite().all() and (m[::3] == sign * LARGEST).float().mean() > 0.98


@both_impls
def test_numbers_below_the_smallest_normal_one_are_rounded_without_bias(impl):
    tiny = torch.full((4000,), 2.5 * 2.0**-133)  # bfloat16's smallest number is 2⁻¹³³
    zeros = torch.zeros(4000, dtype=torch.bfloat16)
    _, m, _ = updated((zeros, -tiny, zeros, zeros), impl, betas=(0.0, 0.0))
    assert set((m.double() * 2.0**133).tolist()) == {-2.0, -3.0}
    assert (m.double() * 2.0**133).mean().item() == pytest.approx(-2.5, abs=4 * 0.5 / 4000**0.5)


@needs_triton
@pytest.mark.parametrize(
    ("weight", "state", "grad"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("first", [0, 1, PART - 700, 2**31 - 3, 5 * 2**32 + 77])
def test_triton_gives_the_bits_of_torch(weight, state, grad, first):
    tensors = operands(3001, weight, state, grad)
    tensors[0][:5] = torch.tensor([INFINITY, -INFINITY, NAN, LARGEST, -LARGEST])
    tensors[1][3:9] = torch.tensor([-1.0, 1.0, 1e19, 1e-22, INFINITY, NAN])
    tensors[2][9:11] = torch.tensor([1e-40, -1e-39])
    tensors[3][11:14] = torch.tensor([0.0, 1e-39, 3e38])
    for one, other in zip(updated(tensors, "torch", first=first), updated(tensors, "triton", first=first), strict=True):
        assert torch.equal(one.nan_to_num(nan=7), other.nan_to_num(nan=7)) and torch.equal(one.isnan(), other.isnan())
        assert one[14:].isfinite().all()


@both_impls
@pytest.mark.parametrize("first", [0, PART - 900, 2**33 + 5])
def test_parts_of_a_tensor_get_what_the_whole_gets(impl, first):
    tensors = operands(2000)
    whole = updated(tensors, impl, first=first)
    for begin, end in ((0, 1), (1, 900), (900, 2000), (700, 700)):
        part = updated([tensor[begin:end] for tensor in tensors], impl, first=first + begin)
        assert all(torch.equal(x, y[begin:end]) for x, y in zip(part, whole, strict=True))


def test_other_places_keys_and_parts_give_other_bits():
    tensors = operands(2000)
    seen = [updated(tensors)[0]]
    for other in ({"key": 6}, {"first": 2000}, {"first": PART}, {"first": 2**31}, {"first": 2**32}, {"first": 2**40}):
        seen.append(updated(tensors, **other)[0])
    for i, one in enumerate(seen):
        for another in seen[:i]:
            assert 0.2 < (one != another).float().mean() < 0.8


@both_impls
def test_bits_stay_what_they_are(impl):
    """A run goes on bit for bit only if these do; here they are computed in Python's integers.

    1 - 2⁻⁹ is half-way between two numbers of bfloat16: it goes up to 1 where the highest of the 16 bits is set.
    """
    mask = 2**32 - 1

    def hashed(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    half, ones, zeros = 1 - 2.0**-9, torch.ones(100).bfloat16(), torch.zeros(100).bfloat16()
    for key, first in ((5, 0), (-3, 3 * PART - 50), (2**40, 2**35 + 17), (10**18, 2**31 - 1)):
        settings = {"key": key, "first": first, "lr": 2.0**-9, "weight_decay": 1.0, "betas": (half, half)}
        w, *_ = updated((ones, zeros, zeros, zeros), impl, **settings)
        _, m, v = updated((zeros, zeros, ones, ones), impl, **settings)
        for i, place in enumerate(range(first, first + 100)):
            stream = hashed((hashed(key % 2**64) + place // PART) % 2**64)
            x = (place % PART * (stream >> 32) + stream) & mask
            x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
            x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
            x ^= x >> 16
            expected = [x >> 31, (x >> 15) & 1, ((x * 0x9E3779B1) & mask) >> 31]
            assert [int(tensor[i] == 1) for tensor in (w, m, v)] == expected


def test_strided_gradients_and_shapes_are_taken_as_they_are():
    w, g, m, v = (tensor.view(50, 60) for tensor in operands(3000))
    turned = g.t().contiguous().t()
    plain = updated((w, g, m, v))
    assert all(torch.equal(x, y) for x, y in zip(updated((w, turned, m, v)), plain, strict=True))
    assert plain[0].shape == (50, 60)
