"""causal_lm_loss and sequence_logps against sums written by hand in float64."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pedgpt.data import chat
from pedgpt.kernels.linear_logps import linear_nll, linear_token_logps
from pedgpt.losses import IGNORE_INDEX, causal_lm_loss, sequence_logps

SHAPES = [(2, 5, 11), (1, 1, 2), (3, 1, 300), (1, 7, 1), (4, 9, 33)]


def batch(b, t, v, dtype=torch.float32, scale=3.0, seed=0):
    """Random logits, and labels of which about a third is ignored, the first never."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(b, t, v, generator=generator)).to(dtype)
    labels = torch.randint(v, (b, t), generator=generator)
    ignored = torch.rand(b, t, generator=generator) < 0.35
    ignored[0, 0] = False
    return logits, labels.masked_fill(ignored, -100)


def token_logps(logits, labels):
    """log p of every supervised label, a list for each row, in Python's own floats."""
    rows = []
    for row, targets in zip(logits.double().tolist(), labels.tolist(), strict=True):
        rows.append([])
        for scores, target in zip(row, targets, strict=True):
            if target != -100:
                top = max(scores)
                rows[-1].append(scores[target] - top - math.log(sum(math.exp(s - top) for s in scores)))
    return rows


def test_three_tokens_by_hand():
    # p(label) = 1/2, 1/4 and, ignored, 1/4.
    logits = torch.tensor([[[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [5.0, 1.0, 1.0]]]).log()
    labels = torch.tensor([[0, 2, -100]])
    assert causal_lm_loss(logits, labels).item() == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-6)
    assert causal_lm_loss(logits, labels, num_tokens=6).item() == pytest.approx(math.log(8) / 6, rel=1e-6)
    assert sequence_logps(logits, labels).tolist() == pytest.approx([-math.log(8)], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_match_sums_in_float64(shape, dtype):
    logits, labels = batch(*shape, dtype)
    rows = token_logps(logits, labels)
    flat = [x for row in rows for x in row]
    loss, logps = causal_lm_loss(logits, labels), sequence_logps(logits, labels)
    assert loss.dtype == logps.dtype == torch.float32 and loss.shape == () and logps.shape == shape[:1]
    assert loss.item() == pytest.approx(-math.fsum(flat) / len(flat), rel=2e-6, abs=1e-6)
    assert logps.tolist() == pytest.approx([math.fsum(row) for row in rows], rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_match_torch(shape):
    logits, labels = batch(*shape)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = causal_lm_loss(ours, labels)
    expected = F.cross_entropy(theirs.transpose(1, 2), labels)  # the mean over what is not −100
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-7)


def test_gradients_match_softmax_minus_one_hot():
    logits, labels = batch(3, 4, 13, seed=2)
    supervised = (labels != -100).double()[..., None]
    difference = (logits.double().softmax(-1) - F.one_hot(labels.clamp(min=0), 13)) * supervised
    leaf = logits.clone().requires_grad_()
    causal_lm_loss(leaf, labels, num_tokens=7).backward()
    torch.testing.assert_close(leaf.grad.double(), difference / 7, rtol=1e-5, atol=1e-7)

    leaf = logits.clone().requires_grad_()
    weights = torch.tensor([2.0, -1.0, 0.5])
    (sequence_logps(leaf, labels) * weights).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), -difference * weights[:, None, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_splits_of_the_global_batch_give_equal_gradients(width):
    """4×1, 2×2 and 1×4 rows, with 1, 2, 5 and no supervised tokens in them."""
    torch.manual_seed(0)
    labels = torch.full((4, 6), IGNORE_INDEX)
    for row, count in enumerate((1, 2, 5, 0)):
        labels[row, :count] = torch.randint(17, (count,))
    model = nn.Sequential(nn.Embedding(17, 12), nn.Linear(12, 17))
    tokens = torch.randint(17, (4, 6))
    truth = nn.Sequential(nn.Embedding(17, 12), nn.Linear(12, 17)).double()
    truth.load_state_dict(model.state_dict())
    supervised = labels != IGNORE_INDEX
    picked = truth(tokens).log_softmax(-1)[supervised].gather(1, labels[supervised][:, None])
    (-picked.sum() / 8).backward()

    def accumulate(num_tokens):
        model.zero_grad()
        total = 0.0
        for i in range(0, 4, width):
            loss = causal_lm_loss(model(tokens[i : i + width]), labels[i : i + width], num_tokens)
            loss.backward()
            total += loss.item()
        return total, [p.grad.double() for p in model.parameters()]

    for num_tokens in (8, torch.tensor(8)):
        total, gradients = accumulate(num_tokens)
        assert total == pytest.approx(-picked.sum().item() / 8, rel=1e-6)
        for ours, expected in zip(gradients, truth.parameters(), strict=True):
            torch.testing.assert_close(ours, expected.grad, rtol=1e-6, atol=1e-6 * expected.grad.abs().max().item())
    if width < 4:  # counting each part alone is another update: the rows differ enough to show it
        assert (accumulate(None)[1][0] / (4 / width) - truth[0].weight.grad).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(2, 3, 5), (0, 3, 5), (2, 0, 5), (0, 0, 5)])
def test_nothing_supervised_gives_zero_and_a_zero_gradient(shape):
    logits = torch.randn(shape, requires_grad=True)
    labels = torch.full(shape[:2], -100)
    loss = causal_lm_loss(logits, labels)
    assert loss.item() == 0
    loss.backward()
    assert logits.grad.shape == shape and not logits.grad.any()
    assert sequence_logps(logits, labels).tolist() == [0.0] * shape[0]
    assert causal_lm_loss(logits, labels, num_tokens=5).item() == 0


def test_bf16_logits_are_summed_in_float32():
    """A thousand tokens: sums in bf16 would stop growing at 256 times the size of a term."""
    logits, labels = batch(1, 1000, 40, torch.bfloat16)
    logits.requires_grad_()
    total = math.fsum(token_logps(logits, labels)[0])
    logps = sequence_logps(logits, labels)
    assert logps.item() == pytest.approx(total, rel=1e-6)
    logps.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    logits = torch.tensor([[[1e4, -1e4, 0.0], [3e38, -3e38, 0.0]]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1, 0]])
    loss = causal_lm_loss(logits, labels, num_tokens=1)
    loss.backward()
    assert loss.item() == pytest.approx(2e4, rel=1e-2)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("function", [causal_lm_loss, sequence_logps])
@pytest.mark.parametrize(
    ("logits", "labels"),
    [((2, 3, 5), (2, 4)), ((2, 3, 5), (3, 2)), ((2, 3, 5), (6,)), ((3, 5), (3,)), ((1, 3, 5), (2, 3))],
)
def test_other_shapes_are_refused(function, logits, labels):
    with pytest.raises(ValueError, match=r"expected logits \[B, T, V\] and labels \[B, T\], found \["):
        function(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_outside_the_vocabulary_is_an_error(label):
    with pytest.raises((IndexError, RuntimeError)):
        causal_lm_loss(torch.zeros(1, 2, 5), torch.tensor([[0, label]]))


def test_the_label_that_is_left_out_is_one_number():
    """The data, the losses and the kernels may not import each other, so each of them names it."""
    defaults = [inspect.signature(op).parameters["ignore_index"].default for op in (linear_token_logps, linear_nll)]
    assert {IGNORE_INDEX, chat.IGNORE_INDEX, *defaults} == {-100}
