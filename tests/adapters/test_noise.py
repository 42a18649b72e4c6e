"""Gate noise that belongs to (seed, row, token, layer, expert), and looks like standard normal numbers."""

import copy
import math

import pytest
import torch
from torch import nn

from pedgpt.adapters import ExpertLoRALinear, inject_experts, set_noise_rows
from pedgpt.kernels.expert_gate import expert_gate

EXPERTS = 4


@pytest.fixture
def model(make_model, randomize):
    model = make_model()
    inject_experts(model, rank=2, target_modules=["q_proj", "down_proj"])
    return randomize(model).train()


def noise(seed, rows, tokens, layers=1):
    """float64 [layers, rows, tokens, EXPERTS], as the layers of a model draw it."""
    model = nn.ModuleList(ExpertLoRALinear(nn.Linear(1, 1), 1, 1, EXPERTS) for _ in range(layers))
    set_noise_rows(model, seed, torch.as_tensor(rows))
    like = torch.zeros(len(rows), tokens, EXPERTS, dtype=torch.float64)
    return torch.stack([layer.noise_stream.normal(like) for layer in model])


@pytest.fixture(scope="module")
def many():
    """480,000 numbers, seed 0: 3 layers, 200 rows, 200 tokens, 4 experts."""
    return noise(0, range(200), 200, layers=3)


def test_how_rows_are_split_does_not_change_their_outputs(model, tokens):
    rows = torch.tensor([30, 7, 8, 2**40])

    def run(size):
        parts = []
        for i in range(0, 4, size):
            set_noise_rows(model, 5, rows[i : i + size])
            parts.append(model(tokens[i : i + size]).detach())
        return torch.cat(parts)

    whole = run(4)
    torch.testing.assert_close(run(2), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(1), whole, rtol=1e-5, atol=1e-6)
    set_noise_rows(model, 5, rows.flip(0))
    torch.testing.assert_close(model(tokens.flip(0)).flip(0), whole, rtol=1e-5, atol=1e-6)
    set_noise_rows(model, 6, rows)  # and the noise does matter
    assert (model(tokens) - whole).abs().mean() > 1e-3


def test_noise_is_exactly_the_same_in_any_batch_and_for_any_length():
    rows = [3, -9, 2**40, 12]
    whole = noise(1, rows, 6, layers=2)
    for i, row in enumerate(rows):
        assert torch.equal(noise(1, [row], 6, layers=2)[:, 0], whole[:, i])
    assert torch.equal(noise(1, rows, 4, layers=2), whole[:, :, :4])
    assert torch.equal(noise(1, rows, 6), whole[:1])


def test_the_gates_use_the_noise(model, tokens):
    layer = ExpertLoRALinear(nn.Linear(3, 3), num_specific_experts=EXPERTS)
    set_noise_rows(layer, 9, torch.tensor([4, 5]))
    scores = math.log(2) * noise(9, [4, 5], 6)[0]  # softplus(0) = log 2, and a new router is zero
    expected = scores.exp() / scores.exp().sum(-1, keepdim=True)
    drawn = layer.noise(torch.zeros(2, 6, 3)).normal(torch.zeros(2, 6, EXPERTS))
    gates, _ = expert_gate(torch.zeros(2, 6, 2 * EXPERTS), drawn)
    torch.testing.assert_close(gates.double(), expected, rtol=1e-5, atol=1e-6)


def test_moments_are_those_of_a_standard_normal(many):
    x, n = many.flatten(), many.numel()
    assert n >= 200_000
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert x.abs().max() < 6  # a normal sample of this size passes it once in 1,000 draws


def test_distribution_matches_the_normal_one(many):
    x = many.flatten().sort().values
    n = len(x)
    cdf = torch.special.ndtr(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    assert math.sqrt(n) * distance < 1.95  # Kolmogorov-Smirnov at 0.1 %


@pytest.mark.parametrize("axis", ["layer", "row", "token", "expert"])
@pytest.mark.parametrize("distance", [1, 2])
def test_neighbours_are_uncorrelated(many, axis, distance):
    dim = ["layer", "row", "token", "expert"].index(axis)
    size = many.shape[dim] - distance
    a, b = many.narrow(dim, 0, size).flatten(), many.narrow(dim, distance, size).flatten()
    for f in (lambda x: x, lambda x: x.square() - 1, lambda x: x.sign()):
        correlation = (f(a) * f(b)).mean() / (f(a).square().mean() * f(b).square().mean()).sqrt()
        assert abs(correlation) < 5 / math.sqrt(len(a))


def test_neighbouring_seeds_are_uncorrelated(many):
    for seed in (1, -1, 2**32):
        other = noise(seed, range(200), 200)[0].flatten()
        assert abs((many[0].flatten() * other).mean()) < 5 / math.sqrt(len(other))


def test_no_number_comes_twice(many):
    assert len(many.flatten().unique()) == many.numel()


def test_seeds_and_rows_far_apart_negative_or_huge_are_all_different():
    seeds = [0, 1, -1, 2**31, 2**32, -(2**32), 0x9E3779B9, 0x9E3779B97F4A7C15, 2**62, 2**63 - 1, -(2**63), 2**64 - 2]
    rows = [0, 1, -1, 2**31, 2**32, 2**32 - 1, -(2**32), 2**40, 2**63 - 1, -(2**63)]
    numbers = torch.stack([noise(seed, rows, 3, layers=3) for seed in seeds])
    assert numbers.isfinite().all()
    assert len(numbers.flatten().unique()) == numbers.numel()


def test_layers_do_not_share_their_noise_by_swapping_rows():
    # With a 32-bit state, some two of these layers would draw the same numbers for other rows.
    first = noise(0, range(3000), 1, layers=100)[..., 0, 0]
    assert len(first.flatten().unique()) == first.numel()


@pytest.mark.parametrize("numbered", [True, False])
def test_activation_checkpointing_recomputes_the_same_noise(model, tokens, numbered):
    layer = model.model.layers[0].mlp.down_proj
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    for model.activation_checkpointing in ("none", "selective", "block"):
        model.zero_grad()
        calls.clear()
        set_noise_rows(model, 2, torch.arange(4) if numbered else None)
        torch.manual_seed(0)
        loss = model(tokens).square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        assert len(calls) == 1 + (model.activation_checkpointing == "block")
    assert len(results[0]) == 1 + 4 * 4
    for plain, *recomputed in zip(*results, strict=True):
        assert plain.abs().max() > 0
        for other in recomputed:
            torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-9)


def test_without_rows_the_noise_is_torchs_own_again(model, tokens):
    set_noise_rows(model, 0, torch.arange(4))
    assert torch.equal(model(tokens), model(tokens))
    set_noise_rows(model, 0, None)
    assert not torch.equal(model(tokens), model(tokens))


def test_evaluation_ignores_the_rows(model, tokens):
    model.eval()
    plain = model(tokens)
    set_noise_rows(model, 0, torch.arange(9))
    assert torch.equal(model(tokens), plain)


def test_a_copy_of_the_model_draws_the_same(model, tokens):
    set_noise_rows(model, 0, torch.arange(4))
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))


def test_another_number_of_rows_is_refused(model, tokens):
    set_noise_rows(model, 0, torch.arange(3))
    with pytest.raises(ValueError, match="gate noise for 3 rows needs"):
        model(tokens)
    with pytest.raises(ValueError, match=r"needs \[rows, tokens, .*found \[3, 44\]"):
        model.model.layers[0].mlp.down_proj(torch.zeros(3, 44))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_draws_the_same_noise(model):
    rows = torch.tensor([0, 5, 2**40, -3])
    layer = model.model.layers[1].mlp.down_proj
    like = torch.zeros(4, 50, 3)
    set_noise_rows(model, 7, rows)
    cpu = layer.noise_stream.normal(like)
    set_noise_rows(model, 7, rows.cuda())
    torch.testing.assert_close(layer.noise_stream.normal(like.cuda()).cpu(), cpu, rtol=1e-6, atol=1e-6)
