"""Rotary embedding, its scalings, ALiBi and the restart of positions, each against its definition."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from pedgpt.kernels import rotary
from pedgpt.models import ModelConfig
from pedgpt.models.positions import alibi_slopes, rope_frequencies, rotary_tables
from pedgpt.models.transformer import document_positions

LLAMA31 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(("size", "theta"), [(128, 10_000.0), (64, 5e5), (2, 1e6), (10, 300.0)])
def test_frequencies_match_float64(size, theta):
    expected = torch.tensor([theta ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)
    torch.testing.assert_close(rope_frequencies(size, theta).double(), expected, rtol=1e-6, atol=0)
    linear = rope_frequencies(size, theta, {"rope_type": "linear", "factor": 4.0})
    torch.testing.assert_close(linear.double(), expected / 4, rtol=1e-6, atol=0)


def test_llama3_frequencies_match_their_piecewise_definition():
    got = rope_frequencies(128, 5e5, LLAMA31).tolist()
    regions = {"kept": 0, "divided": 0, "between": 0}
    for i, value in enumerate(got):
        f = 5e5 ** (-2 * i / 128)
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            region, expected = "kept", f
        elif wavelength > 8192 / 1:
            region, expected = "divided", f / 8
        else:
            s = (8192 / wavelength - 1) / (4 - 1)
            region, expected = "between", (1 - s) * f / 8 + s * f
        regions[region] += 1
        assert value == pytest.approx(expected, rel=2e-6), i
    assert min(regions.values()) > 3


def plain(size):
    """What rotary_tables needs of a config without scaling."""
    return SimpleNamespace(head_dim=size, rope_theta=10_000.0, rope_scaling=None)


@pytest.mark.parametrize("size", [2, 6, 16])
def test_rotation_matches_complex_numbers(size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, size, generator=generator)
    positions = torch.randint(0, 500, (2, 7), generator=generator)
    turned = x.transpose(1, 2)
    got = rotary(turned, turned, *rotary_tables(plain(size), positions, torch.float32))[0].transpose(1, 2)
    half = size // 2
    f = torch.tensor([10_000.0 ** (-2 * i / size) for i in range(half)], dtype=torch.float64)
    turn = torch.polar(torch.ones(2, 1, 7, half).double(), positions[:, None, :, None] * f)
    expected = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    torch.testing.assert_close(got.double(), torch.cat((expected.real, expected.imag), -1), atol=2e-4, rtol=0)


def test_rotary_tables_are_rounded_only_once():
    """Angles in bfloat16 would be wrong by whole turns at position 1,001."""
    cos, sin = rotary_tables(plain(8), torch.tensor([[1001]]), torch.bfloat16)
    angles = [1001 * 10_000.0 ** (-2 * i / 8) for i in range(4)] * 2
    assert cos.dtype == sin.dtype == torch.bfloat16 and cos.shape == (1, 1, 1, 8)
    for got, truth in ((cos, math.cos), (sin, math.sin)):
        assert got.flatten().tolist() == pytest.approx([truth(a) for a in angles], abs=2**-8)


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (3, [4, 8, 2]),
        (6, [2, 4, 6, 8, 1, 3]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (40, [(i + 1) / 4 for i in range(32)] + [(2 * j + 1) / 8 for j in range(8)]),  # Baichuan2-13B
    ],
)
def test_alibi_slopes_match_hand_arithmetic(heads, exponents):
    slopes = alibi_slopes(heads)
    assert slopes.dtype == torch.float32
    assert slopes.tolist() == pytest.approx([0.5**e for e in exponents], rel=1e-7)


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ([0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 1, 0]),
        ([5, 5, -1, -1, -1, 5], [0, 1, 0, 1, 2, 0]),
        ([1, 2, 3, 4, 5, 6], [0] * 6),
        ([7] * 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_positions_restart_with_each_document(documents, expected):
    tokens = torch.zeros(2, 6, dtype=torch.long)
    rows = torch.tensor([documents, [9] * 6])
    assert document_positions(tokens, rows).tolist() == [expected, [0, 1, 2, 3, 4, 5]]
    assert document_positions(tokens, None).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},  # as Qwen2.5's model card says
        {"rope_type": "yarn", "factor": 4.0},  # the original length is then max_position_embeddings
        {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0,
         "mscale_all_dim": 0.8, "beta_fast": 16, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 2.5, "attention_factor": 0.9, "truncate": False},
        {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 7},  # a ramp of no width
    ],
    ids=str,
)  # fmt: skip
def test_yarn_matches_transformers(scaling):
    raw = {
        "model_type": "qwen2", "vocab_size": 9, "hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1e6, "rope_scaling": scaling,
    }  # fmt: skip
    positions = torch.tensor([[0, 1, 17, 4096, 100_000]])
    theirs = Qwen2RotaryEmbedding(Qwen2Config(**raw))
    expected = theirs(torch.zeros(1), positions)
    ours = rotary_tables(ModelConfig.from_hf(raw), positions, torch.float32)
    for got, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(got[:, 0], truth, atol=2e-2, rtol=0)  # at 100,000 a rounding of f turns far
        torch.testing.assert_close(got[:, 0, :4], truth[:, :4], atol=1e-3, rtol=0)
    config = ModelConfig.from_hf(raw)
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=3e-7, atol=0)
    assert ModelConfig.from_hf(config.to_hf()) == config
