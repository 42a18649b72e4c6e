"""linear_cross_entropy, linear_sequence_logps and linear_dfpo_loss against the losses of whole logits, and by hand."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from trl import DPOTrainer
from trl.trainer.utils import selective_log_softmax

from pedgpt.kernels import linear_logps
from pedgpt.losses import (
    causal_lm_loss,
    dfpo_loss,
    linear_cross_entropy,
    linear_dfpo_loss,
    linear_sequence_logps,
    sequence_logps,
)

both_heads = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "NormHead"])


@pytest.fixture(autouse=True, params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    if request.param == "many chunks":
        for name, value in (("CHUNK", 60), ("BLOCK", 40), ("SLICE", 30)):
            monkeypatch.setattr(linear_logps, name, value)
    return request.param


@pytest.fixture
def larger_chunks(chunks, monkeypatch):
    """Of long sequences hundreds of tokens, not one."""
    if chunks == "many chunks":
        for name, value in (("CHUNK", 13_000), ("BLOCK", 4_000), ("SLICE", 30)):
            monkeypatch.setattr(linear_logps, name, value)


def draw(rows=4, tokens=9, size=8, vocabulary=19, masked=0.3, dtype=torch.float64, seed=0):
    """hidden, weight, and labels of which every row has one."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, size, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, size, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(vocabulary, (rows, tokens), generator=generator)
    ignored = torch.rand(rows, tokens, generator=generator) < masked
    ignored[:, 0] = False
    return hidden, weight, labels.masked_fill(ignored, -100)


def head(hidden, weight, normalize):
    return hidden @ (F.normalize(weight, dim=-1) if normalize else weight).T


def token_logps(hidden, weight, labels, normalize=False):
    """log p of every label, 0 where there is none, in the dtype of the operands."""
    logits = head(hidden, weight, normalize)
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)


def gradients(loss, *leaves):
    return [g if g is not None else torch.zeros_like(x) for x, g in
            zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)]  # fmt: skip


def assert_same(found, expected, limit):
    for ours, truth in zip(found, expected, strict=True):
        assert (ours.double() - truth.double()).norm() <= limit * truth.double().norm() + 1e-300


@both_heads
@pytest.mark.parametrize("num_tokens", [None, 41, torch.tensor(41)], ids=["counted", "int", "tensor"])
@pytest.mark.parametrize(("dtype", "limits"), [(torch.float64, (1e-14, 1e-13)), (torch.float32, (1e-6, 2e-6))])
def test_cross_entropy_matches_torchs_in_float64(dtype, limits, num_tokens, normalize):
    hidden, weight, labels = draw(dtype=dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(*leaves, labels, num_tokens, normalize=normalize)
    assert loss.shape == () and loss.dtype == dtype
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    count = (labels != -100).sum() if num_tokens is None else 41
    logits = head(*wide, normalize)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
    assert_same([loss], [expected], limits[0])
    assert_same(gradients(loss, *leaves), gradients(expected, *wide), limits[1])
    # The loss of whole logits itself is in float32.
    assert loss.item() == pytest.approx(causal_lm_loss(logits, labels, num_tokens).item(), rel=1e-6)


def test_cross_entropy_and_its_metrics_by_hand():
    """p = (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4): the second label is not the best, the fourth ties, one is ignored."""
    hidden = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]])
    weight = torch.tensor([[2.0, 1, 1], [1, 2, 1], [1, 1, 1]]).log()  # the third state: all equal
    labels = torch.tensor([[0, 2, -100, 1]])
    metrics = {"untouched": torch.tensor(5.0)}
    loss = linear_cross_entropy(hidden, weight, labels, metrics=metrics)
    assert loss.item() == pytest.approx((math.log(2) + math.log(4) + math.log(3)) / 3, rel=1e-6)
    assert metrics["entropy"].item() == pytest.approx((2 * 1.5 * math.log(2) + math.log(3)) / 3, rel=1e-6)
    assert metrics["mean_token_accuracy"].item() == pytest.approx(2 / 3, rel=1e-6)
    assert set(metrics) == {"untouched", "entropy", "mean_token_accuracy"}
    linear_cross_entropy(hidden, weight, labels, 6, metrics=metrics)
    assert metrics["mean_token_accuracy"].item() == pytest.approx(2 / 6, rel=1e-6)
    assert metrics["entropy"].item() == pytest.approx((2 * 1.5 * math.log(2) + math.log(3)) / 6, rel=1e-6)
    linear_sequence_logps(hidden, weight, labels, metrics=metrics)
    assert metrics["mean_token_accuracy"].tolist() == pytest.approx([2 / 3], rel=1e-6)
    assert metrics["entropy"].tolist() == pytest.approx([(2 * 1.5 * math.log(2) + math.log(3)) / 3], rel=1e-6)
    numbers = torch.tensor([[0, 2, 1, 2]])
    linear_sequence_logps(hidden, weight, labels, sequences=numbers, num_sequences=3, metrics=metrics)
    assert metrics["mean_token_accuracy"].tolist() == [1, 0, 0.5]
    assert metrics["entropy"].tolist() == pytest.approx(
        [1.5 * math.log(2), 0, (1.5 * math.log(2) + math.log(3)) / 2], rel=1e-6
    )


def test_metrics_carry_no_gradient():
    hidden, weight, labels = draw()
    for loss in (linear_cross_entropy, linear_sequence_logps):
        metrics = {}
        loss(hidden.requires_grad_(), weight.requires_grad_(), labels, metrics=metrics)
        assert not any(value.requires_grad for value in metrics.values())


@both_heads
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (0, 4), (3, 0)])
def test_nothing_supervised_is_a_loss_of_zero_with_zero_gradients(shape, normalize):
    hidden, weight = torch.randn(*shape, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels, metrics = torch.full(shape, -100), {}
    loss = linear_cross_entropy(hidden, weight, labels, normalize=normalize, metrics=metrics)
    assert loss.item() == metrics["entropy"].item() == metrics["mean_token_accuracy"].item() == 0
    loss.backward()
    assert not hidden.grad.any() and not weight.grad.any() and weight.grad.shape == weight.shape
    logps, counts = linear_sequence_logps(hidden, weight, labels, normalize=normalize, metrics=metrics)
    logps.sum().backward()
    assert logps.shape == counts.shape == shape[:1] and not logps.any() and not counts.any()
    assert metrics["entropy"].tolist() == metrics["mean_token_accuracy"].tolist() == [0.0] * shape[0]
    assert not hidden.grad.any() and not weight.grad.any()


def test_two_micro_batches_accumulate_to_one_batch():
    hidden, weight, labels = draw()
    count = int((labels != -100).sum())
    (expected,) = gradients(linear_cross_entropy(hidden, weight.requires_grad_(), labels), weight)
    for rows in (slice(0, 1), slice(1, 4)):
        linear_cross_entropy(hidden[rows], weight, labels[rows], count).backward()
    assert_same([weight.grad], [expected], 1e-14)


@both_heads
def test_a_weight_that_also_embeds_gets_both_gradients(normalize):
    _, weight, labels = draw()
    tokens = labels.clamp(min=0).roll(1)
    weight.requires_grad_()
    grads = []
    for loss in (
        linear_cross_entropy(torch.tanh(F.embedding(tokens, weight)), weight, labels, normalize=normalize),
        linear_sequence_logps(torch.tanh(F.embedding(tokens, weight)), weight, labels, normalize=normalize)[0].sum(),
    ):
        grads += gradients(loss, weight)
    logps = token_logps(torch.tanh(F.embedding(tokens, weight)), weight, labels, normalize)
    assert_same(grads[:1], gradients(-logps.sum() / (labels != -100).sum(), weight), 1e-13)
    assert_same(grads[1:], gradients(token_logps(torch.tanh(F.embedding(tokens, weight)), weight, labels,
                                                 normalize).sum(), weight), 1e-13)  # fmt: skip


# Sequences


@both_heads
@pytest.mark.parametrize("frozen", [False, True])
def test_sequence_logps_match_sums_over_rows_in_float64(frozen, normalize):
    hidden, weight, labels = draw()
    labels[2] = -100
    leaves = [hidden.requires_grad_()] + ([] if frozen else [weight.requires_grad_()])
    logps, counts = linear_sequence_logps(hidden, weight, labels, normalize=normalize)
    upstream = torch.tensor([1.0, -2.0, 0.3, 0.0], dtype=torch.float64)
    expected = token_logps(hidden, weight, labels, normalize).sum(-1)
    assert_same([logps], [expected], 1e-14)
    assert logps[2] == 0 and counts.tolist() == (labels != -100).sum(-1).tolist() and counts.dtype == torch.int64
    assert_same(gradients(upstream @ logps, *leaves), gradients(upstream @ expected, *leaves), 1e-13)
    torch.testing.assert_close(sequence_logps(head(hidden, weight, normalize), labels), logps.float())


@both_heads
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
def test_scattered_sequences_match_a_loop_over_tokens(integer, normalize):
    """Several a row, parts of one in two rows, one without a label; what stands where no label is plays no part."""
    hidden, weight, labels = draw(3, 12)
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(6, (3, 12), generator=generator).to(integer)
    sequences[sequences == 4] = 5
    sequences[labels == -100] = torch.tensor([-7, 99, 4, 2] * 9, dtype=integer)[: int((labels == -100).sum())]
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found, counts = linear_sequence_logps(
        *leaves, labels, sequences=sequences, num_sequences=7, normalize=normalize
    )
    each = token_logps(*leaves, labels, normalize)
    expected, lengths = [0.0] * 7, [0] * 7
    for place in (labels != -100).nonzero().tolist():
        number = sequences[tuple(place)].item()
        expected[number] = expected[number] + each[tuple(place)]
        lengths[number] += 1
    expected = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in expected])
    assert lengths[4] == lengths[6] == 0 and counts.tolist() == lengths
    assert_same([found], [expected], 1e-14)
    upstream = torch.randn(7, generator=generator, dtype=torch.float64)
    assert_same(gradients(upstream @ found, *leaves), gradients(upstream @ expected, *leaves), 1e-13)


@pytest.mark.parametrize("scattered", [False, True], ids=["a row", "scattered"])
def test_long_sequences_sum_as_exactly_as_sequence_logps(scattered, larger_chunks):
    """log-probabilities of −50,000 whose differences, times β, are the margins that train."""
    hidden, weight, labels = draw(2, 6000, 4, 50, 0.0, torch.float32)
    sequences = {"sequences": torch.arange(2)[:, None].expand(2, 6000), "num_sequences": 2} if scattered else {}
    found, _ = linear_sequence_logps(hidden, 2 * weight, labels, **sequences)
    exact = token_logps(hidden.double(), 2 * weight.double(), labels).sum(-1)
    assert_same([found], [exact], 1e-7)


@pytest.mark.parametrize("loss", [linear_cross_entropy, linear_sequence_logps])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(2, 4, dtype=torch.long)}, r"expected hidden \[B, T, D\] and labels \[B, T\], found "),
        ({"hidden": torch.zeros(6, 4)}, r"expected hidden \[B, T, D\]"),
        ({"weight": torch.zeros(5, 3)}, r"found \[6, 4\], \[5, 3\], \[6\]"),
        ({"labels": torch.tensor([[0, 1, 2], [3, 4, 5]])}, "label 5 is outside of the vocabulary of 5"),
        ({"labels": torch.tensor([[0, 1, -2], [3, 4, 5]])}, "label -2 is outside of the vocabulary of 5"),
        ({"hidden": torch.zeros(2, 3, 4).bfloat16()}, "hidden is torch.bfloat16 and weight torch.float32"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int32)}, "int64, found torch.int32"),
    ],
)
def test_what_does_not_fit_is_named(changes, message, loss):
    given = {"hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(5, 4), "labels": torch.tensor([[0, 1, -100]] * 2)}
    with pytest.raises(ValueError, match=message):
        loss(**{**given, **changes})


@pytest.mark.parametrize(
    ("sequences", "number", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.long), 1, r"sequences \[2, 2\] needs num_sequences and the shape of labels"),
        (torch.zeros(2, 3, dtype=torch.long), None, "needs num_sequences"),
        (torch.tensor([[0, 1, 2], [0, 0, 0]]), 2, r"must be in \[0, 2\) wherever there is a label"),
        (torch.tensor([[0, 1, -1], [0, 0, 0]]), 2, r"must be in \[0, 2\)"),
    ],
)
def test_sequences_that_do_not_fit_are_named(sequences, number, message):
    with pytest.raises(ValueError, match=message):
        linear_sequence_logps(
            torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.ones(2, 3, dtype=torch.long),
            sequences=sequences, num_sequences=number,
        )  # fmt: skip


# DFPO


def dfpo_by_definition(chosen, rejected, references, lengths, beta, mu, smoothing):
    """SPEC §3, in the dtype of its operands."""
    z = beta * ((chosen - references[0]) - (rejected - references[1]))
    softplus = lambda x: torch.logaddexp(x, torch.zeros_like(x))  # noqa: E731
    preference = ((1 - smoothing) * softplus(-z) + smoothing * softplus(z)).mean()
    return preference, (-chosen / lengths).mean(), preference + mu * (-chosen / lengths).mean()


@both_heads
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "sequences"])
@pytest.mark.parametrize(("beta", "mu", "smoothing"), [(0.1, 1.0, 0.0), (0.7, 0.0, 0.2), (0.0, 2.0, 0.0), (1, 0.3, 0)])
@pytest.mark.parametrize(("pairs", "tokens"), [(3, 7), (1, 1)])
def test_dfpo_matches_its_definition_and_dfpo_loss_of_whole_logits(
    pairs, tokens, beta, mu, smoothing, packed, normalize
):
    hidden, weight, labels = draw(2 * pairs, tokens)
    references = [-20 * torch.rand(pairs, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    settings = {"beta": beta, "mu": mu, "label_smoothing": smoothing}
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    given, sequences = (hidden, labels), None
    if packed:
        order = torch.stack((torch.arange(pairs), torch.arange(pairs) + pairs), 1).flatten()
        given = (hidden[order].reshape(1, -1, hidden.shape[2]), labels[order].reshape(1, -1))
        sequences = order[:, None].expand(-1, tokens).reshape(1, -1)
    metrics = {}
    found = linear_dfpo_loss(
        given[0], weight, given[1], *references, sequences=sequences, normalize=normalize, metrics=metrics, **settings
    )

    each = token_logps(*leaves, labels, normalize)
    chosen, rejected = each.sum(-1).chunk(2)
    lengths = (labels[:pairs] != -100).sum(-1)
    wide = [reference.double() for reference in references]
    preference, regularization, loss = dfpo_by_definition(chosen, rejected, wide, lengths, beta, mu, smoothing)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert found.preference.item() == pytest.approx(preference.item(), rel=2e-6)
    assert found.regularization.item() == pytest.approx(regularization.item(), rel=1e-6)
    right = (head(*leaves, normalize).argmax(-1) == labels).sum(-1) / (labels != -100).sum(-1)
    torch.testing.assert_close(metrics["mean_token_accuracy"].float(), right)
    assert_same(gradients(found.loss, *leaves), gradients(loss, *leaves), 2e-6)

    logps = sequence_logps(head(*leaves, normalize), labels).chunk(2)
    whole = dfpo_loss(*logps, *references, chosen_token_counts=lengths, **settings)
    for name, value in found._asdict().items():
        torch.testing.assert_close(value, getattr(whole, name), rtol=2e-6, atol=2e-6)
    assert [name for name, value in found._asdict().items() if value.requires_grad] == ["loss"]


@pytest.mark.parametrize("mu", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [[7, 7, 3, 10], [1, 1]])
def test_dfpo_matches_trls_sigmoid_and_sft(lengths, mu):
    """Chosen answers of one length, for which TRL's mean over tokens is SPEC §3's mean over answers."""
    pairs = len(lengths) // 2
    hidden, weight, ids = draw(2 * pairs, 12, masked=0.0, dtype=torch.float32)
    mask = ((torch.arange(12) >= 2) & (torch.arange(12) < 2 + torch.tensor(lengths)[:, None])).long()
    references = [-25 * torch.rand(pairs, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    token_logps = selective_log_softmax((hidden @ weight.T)[:, :-1], ids[:, 1:]) * mask[:, 1:]
    zeros = torch.zeros_like(token_logps.detach())
    outputs = SimpleNamespace(log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    alone = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=torch.nn.Module(), accelerator=alone, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", use_weighting=False, beta=0.25, label_smoothing=0.0,
        loss_types=["sigmoid", "sft"], loss_weights=[1.0, mu],
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": references[0], "ref_rejected_logps": references[1],
    }  # fmt: skip
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)

    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    ours = linear_dfpo_loss(*leaves, labels, *references, beta=0.25, mu=mu)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-6, atol=1e-6)
    assert_same(gradients(ours.loss, *leaves), gradients(theirs, *leaves), 5e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "sequences"])
def test_dfpo_of_long_answers_keeps_its_gradient(packed, larger_chunks):
    """Log-probabilities of −9,500, of which z takes a tenth of a difference of 5: relative error ≤ 5e-5 (SPEC §3)."""
    hidden, weight, labels = draw(8, 4000, 4, 5, 0.2, torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    chosen, rejected = token_logps(*wide, labels).sum(-1).chunk(2)
    references = chosen.detach().float() + 3, rejected.detach().float() - 2
    lengths = (labels[:4] != -100).sum(-1)
    *_, expected = dfpo_by_definition(chosen, rejected, [r.double() for r in references], lengths, 0.1, 0.0, 0.0)
    sequences = torch.arange(8)[:, None].expand(8, 4000) if packed else None
    found = linear_dfpo_loss(*leaves, labels, *references, sequences=sequences, mu=0.0)
    assert_same(gradients(found.loss, *leaves), gradients(expected, *wide), 5e-5)


def test_equal_answers_give_log_2_and_beta_zero_leaves_the_likelihood():
    hidden, weight, labels = draw(2, dtype=torch.float32)
    twice = hidden.repeat(2, 1, 1), weight, labels.repeat(2, 1)
    reference = torch.tensor([-9.0, -4.0])
    equal = linear_dfpo_loss(*twice, reference, reference)
    assert equal.preference.item() == pytest.approx(math.log(2), rel=1e-6) and not equal.margins.any()
    phi = -(token_logps(hidden.double(), weight.double(), labels).sum(-1) / (labels != -100).sum(-1)).mean().item()
    assert equal.loss.item() == pytest.approx(math.log(2) + phi, rel=1e-6)
    for beta in (1e-30, 0.0):
        found = linear_dfpo_loss(hidden, weight, labels, reference[:1], reference[1:], beta=beta, mu=2.5)
        phi = -token_logps(hidden.double(), weight.double(), labels)[0].sum().item() / (labels[0] != -100).sum().item()
        assert found.loss.item() == pytest.approx(math.log(2) + 2.5 * phi, rel=1e-6)


def test_an_empty_rejected_answer_has_the_log_probability_0():
    hidden, weight, labels = draw(2)
    labels[1] = -100
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found = linear_dfpo_loss(*leaves, labels, torch.tensor([-3.0]), torch.tensor([0.0]))
    logps = token_logps(*leaves, labels)[0].sum()
    z = 0.1 * (logps + 3)
    expected = torch.log1p(torch.exp(-z)) - logps / (labels[0] != -100).sum()
    assert found.rejected_logps.tolist() == [0.0] and found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same(gradients(found.loss, *leaves), gradients(expected, *leaves), 1e-6)
    with pytest.raises(ValueError, match=r"chosen_token_counts\[0\] is 0: a chosen response needs a token"):
        linear_dfpo_loss(hidden, weight, labels.flip(0), torch.tensor([-3.0]), torch.tensor([0.0]))


@pytest.mark.parametrize("sign", [1, -1])
def test_log_ratios_of_a_million_leave_loss_and_gradients_finite(sign):
    hidden, weight, labels = draw(4, dtype=torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    reference = torch.tensor([1e6, -1e6]) * sign
    found = linear_dfpo_loss(*leaves, labels, reference, -reference)
    assert found.preference.item() == pytest.approx(1e5, rel=1e-3)  # one pair all wrong, β · 2e6; the other all right
    assert all(g.isfinite().all() and g.any() for g in gradients(found.loss, *leaves))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_chosen_logps": torch.tensor([0.0, math.nan])}, r"reference_chosen_logps\[1\] is nan"),
        ({"reference_rejected_logps": torch.tensor([-math.inf, 0.0])}, r"reference_rejected_logps\[0\] is -inf"),
        ({"hidden": torch.full((4, 3, 4), math.nan)}, r"policy_chosen_logps\[0\] is nan"),
        ({"reference_rejected_logps": torch.zeros(3)}, r"reference_rejected_logps has the shape \[3\]"),
        ({"labels": torch.ones(3, 3).long(), "hidden": torch.zeros(3, 3, 4)}, "2 pairs are 4 rows, .* found 3"),
        ({"sequences": torch.full((4, 3), 4)}, r"sequences must be in \[0, 4\)"),
        ({"sequences": torch.full((4, 3), 1)}, r"chosen_token_counts\[0\] is 0"),
        ({"beta": -1.0}, "beta"),
        ({"mu": math.nan}, "mu"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
    ],
)
def test_dfpo_refuses_what_does_not_fit(changes, message):
    given = {
        "hidden": torch.zeros(4, 3, 4), "weight": torch.zeros(5, 4), "labels": torch.ones(4, 3, dtype=torch.long),
        "reference_chosen_logps": torch.zeros(2), "reference_rejected_logps": torch.zeros(2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_dfpo_loss(**{**given, **changes})


def scattered(hidden, weight, labels):
    numbers = torch.arange(4)[:, None].expand(labels.shape)
    return linear_sequence_logps(hidden, weight, labels, sequences=numbers, num_sequences=4)[0].sum()


def dfpo(hidden, weight, labels):
    numbers = torch.arange(4)[:, None].expand(labels.shape)
    return linear_dfpo_loss(hidden, weight, labels, -torch.ones(2), -torch.ones(2), sequences=numbers).loss


@pytest.mark.parametrize(
    "loss", [linear_cross_entropy, lambda *x: linear_sequence_logps(*x)[0].sum(), scattered, dfpo],
    ids=["cross entropy", "sequence logps", "scattered", "dfpo"],
)  # fmt: skip
def test_compiled_and_under_torch_func_they_give_the_same(loss):
    hidden, weight, labels = draw(dtype=torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    eager = loss(*leaves, labels)
    expected = gradients(eager, *leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves, labels)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    assert_same(gradients(compiled, *leaves), expected, 2e-6)
    assert_same(torch.func.grad(loss, argnums=(0, 1))(*(x.detach() for x in leaves), labels), expected, 2e-6)


def test_cross_entropy_takes_any_shape_before_the_width():
    hidden, weight = torch.randn(2, 3, 8), torch.randn(11, 8)
    labels = torch.tensor([[1, -100, 3], [4, 5, 10]])
    expected = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten())
    for shape in ((2, 3), (6,), (1, 2, 3)):
        loss = linear_cross_entropy(hidden.view(*shape, 8), weight, labels.view(shape))
        torch.testing.assert_close(loss, expected)
