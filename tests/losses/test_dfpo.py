"""dfpo_loss against numbers worked by hand, float64, and TRL's DPO trainer."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from trl import DPOTrainer
from trl.trainer.utils import selective_log_softmax

from pedgpt.losses import dfpo_loss, sequence_logps

NAMES = ["policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps"]


def logps(batch=6, dtype=torch.float32, seed=0):
    """Policy and reference log-probabilities of chosen and rejected answers, and the chosen ones' lengths."""
    generator = torch.Generator().manual_seed(seed)
    values = [-40 * torch.rand(batch, generator=generator, dtype=torch.float64) for _ in range(4)]
    counts = torch.randint(1, 30, (batch,), generator=generator)
    return [v.to(dtype) for v in values], counts


def truth(values, counts, beta, mu, smoothing):
    """(loss, d loss / d chosen, d loss / d rejected) in Python's own floats, from SPEC §3."""
    n = len(counts)
    loss, chosen_gradient, rejected_gradient = 0.0, [], []
    for pc, pr, rc, rr, count in zip(*(v.double().tolist() for v in values), counts.tolist(), strict=True):
        z = beta * ((pc - rc) - (pr - rr))
        p = 1 / (1 + math.exp(-z))
        loss += (-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p) + mu * -pc / count) / n
        dz = (-(1 - smoothing) * (1 - p) + smoothing * p) / n
        chosen_gradient.append(beta * dz - mu / count / n)
        rejected_gradient.append(-beta * dz)
    return loss, chosen_gradient, rejected_gradient


def test_two_pairs_by_hand():
    result = dfpo_loss(
        torch.tensor([-10.0, -6.0]),
        torch.tensor([-20.0, -6.0]),
        torch.tensor([-12.0, -5.0]),
        torch.tensor([-17.0, -8.0]),
        chosen_token_counts=torch.tensor([5, 4]),
        beta=0.2,
        mu=0.5,
    )
    # Log-ratios 2 and −3, then −1 and 2: z = 0.2 · 5 = 1 and 0.2 · (−3) = −0.6. Φ = (10/5 + 6/4) / 2 = 1.75.
    preference = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.6))) / 2
    assert result.preference.item() == pytest.approx(preference, rel=1e-6)
    assert result.regularization.item() == pytest.approx(1.75, rel=1e-6)
    assert result.loss.item() == pytest.approx(preference + 0.875, rel=1e-6)
    assert result.chosen_rewards.tolist() == pytest.approx([0.4, -0.2], rel=1e-6)
    assert result.rejected_rewards.tolist() == pytest.approx([-0.6, 0.4], rel=1e-6)
    assert result.margins.tolist() == pytest.approx([1.0, -0.6], rel=1e-6)
    assert result.accuracies.tolist() == [1, 0]
    assert [name for name, value in result._asdict().items() if value.requires_grad] == []


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("mu", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("batch", [1, 6])
def test_loss_and_gradients_match_float64(batch, beta, mu, smoothing):
    values, counts = logps(batch)
    leaves = [v.requires_grad_() for v in values]
    result = dfpo_loss(*leaves, chosen_token_counts=counts, beta=beta, mu=mu, label_smoothing=smoothing)
    loss, chosen, rejected = truth([v.detach() for v in values], counts, beta, mu, smoothing)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, rel=3e-6)
    for leaf, expected in zip(leaves[:2], (chosen, rejected), strict=True):
        assert leaf.grad.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert not any(value.requires_grad for value in result[1:])


def test_defaults_are_beta_0_1_mu_1_and_no_smoothing():
    values, counts = logps()
    loss = dfpo_loss(*values, chosen_token_counts=counts).loss.item()
    assert loss == pytest.approx(truth(values, counts, 0.1, 1.0, 0.0)[0], rel=3e-6)


def test_gradcheck():
    """The loss computes in float32, hence a wide step and its tolerance; the closed form above is held to 1e-4."""
    values, counts = logps(3, torch.float64)
    leaves = [(v / 10).requires_grad_() for v in values]

    def function(*leaves):
        return dfpo_loss(*leaves, chosen_token_counts=counts, beta=0.8, mu=0.3, label_smoothing=0.2).loss.double()

    assert torch.autograd.gradcheck(function, leaves, eps=1e-2, atol=2e-4, rtol=1e-3)


def trl_loss(token_logps, ref_chosen, ref_rejected, mask, beta, mu):
    """(loss, metrics) of TRL's own DPO step, with a model that returns `token_logps` [2B, T]; mask is [2B, T + 1]."""
    zeros = torch.zeros_like(token_logps.detach())
    outputs = SimpleNamespace(log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    alone = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=torch.nn.Module(), accelerator=alone, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", use_weighting=False, beta=beta, label_smoothing=0.0,
        loss_types=["sigmoid", "sft"], loss_weights=[1.0, mu],
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected,
    }  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def pairs(lengths, tokens=12, vocab=19, seed=0):
    """Logits and ids of B chosen then B rejected answers whose lengths are given, each after a prompt of 2 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (len(lengths), tokens), generator=generator)
    logits = 2 * torch.randn(len(lengths), tokens, vocab, generator=generator)
    place = torch.arange(tokens)
    mask = ((place >= 2) & (place < 2 + torch.tensor(lengths)[:, None])).long()
    references = [-25 * torch.rand(len(lengths) // 2, generator=generator) for _ in range(2)]
    return logits, ids, mask, references


@pytest.mark.parametrize("mu", [0.0, 1.0, 0.3])
@pytest.mark.parametrize(
    "lengths",
    # TRL takes Φ's mean over all chosen tokens of a batch, SPEC §3 over answers: equal lengths make them one.
    [[7, 7, 7, 3, 10, 1], [4, 9], [1, 1], [10, 10, 2, 8]],
)
def test_loss_gradients_and_metrics_match_trl(lengths, mu):
    logits, ids, mask, (ref_chosen, ref_rejected) = pairs(lengths)
    results = []

    leaf = logits.clone().requires_grad_()
    token_logps = selective_log_softmax(leaf[:, :-1], ids[:, 1:]) * mask[:, 1:]
    loss, metrics = trl_loss(token_logps, ref_chosen, ref_rejected, mask, 0.25, mu)
    loss.backward()
    results.append((loss, leaf.grad))

    leaf = logits.clone().requires_grad_()
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)  # what the data path does
    chosen, rejected = sequence_logps(leaf, labels).chunk(2)
    counts = (labels != -100).sum(-1).chunk(2)[0]
    ours = dfpo_loss(chosen, rejected, ref_chosen, ref_rejected, chosen_token_counts=counts, beta=0.25, mu=mu)
    ours.loss.backward()
    results.append((ours.loss, leaf.grad))

    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-7)
    for name, value in {
        "rewards/chosen": ours.chosen_rewards,
        "rewards/rejected": ours.rejected_rewards,
        "rewards/margins": ours.margins,
        "rewards/accuracies": ours.accuracies,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }.items():
        assert value.mean().item() == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


def test_regularisation_counts_answers_where_trl_counts_tokens():
    """Chosen answers of 2 and 10 tokens: the mean over answers of each one's mean per token (SPEC §3)."""
    logits, ids, mask, references = pairs([2, 10, 5, 5])
    token_logps = selective_log_softmax(logits[:, :-1], ids[:, 1:]) * mask[:, 1:]
    chosen, rejected = token_logps.sum(-1).chunk(2)
    result = dfpo_loss(chosen, rejected, *references, chosen_token_counts=torch.tensor([2, 10]))
    expected = -(token_logps[0, 1:3].mean() + token_logps[1, 1:11].mean()) / 2
    assert result.regularization.item() == pytest.approx(expected.item(), rel=1e-6)
    over_tokens = -token_logps[:2].sum() / 12
    assert abs(over_tokens - expected) > 0.01


def test_mu_zero_is_dpo():
    """Rafailov et al. 2023, equation 7, by torch's own logsigmoid; the answers' lengths play no part."""
    values, counts = logps()
    pc, pr, rc, rr = (v.double() for v in values)
    expected = -F.logsigmoid(0.1 * (pc - rc) - 0.1 * (pr - rr)).mean().item()
    for c in (counts, counts + 9):
        result = dfpo_loss(*values, chosen_token_counts=c, mu=0.0)
        assert result.loss.item() == result.preference.item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_equal_answers_give_log_2(beta, smoothing):
    (chosen, _, reference, _), counts = logps()
    result = dfpo_loss(
        chosen, chosen, reference, reference, chosen_token_counts=counts, beta=beta, label_smoothing=smoothing
    )
    assert result.preference.item() == pytest.approx(math.log(2), rel=1e-6)
    assert not result.margins.any() and not result.accuracies.any()


def test_a_policy_that_is_its_reference_gives_log_2_and_no_rewards():
    (chosen, rejected, _, _), counts = logps()
    result = dfpo_loss(chosen, rejected, chosen, rejected, chosen_token_counts=counts)
    assert result.preference.item() == pytest.approx(math.log(2), rel=1e-6)
    assert not result.chosen_rewards.any() and not result.rejected_rewards.any()


def test_beta_zero_leaves_only_the_likelihood_term():
    values, counts = logps()
    chosen, rejected = (v.requires_grad_() for v in values[:2])
    result = dfpo_loss(*values, chosen_token_counts=counts, beta=0.0, mu=2.0)
    result.loss.backward()
    assert result.preference.item() == pytest.approx(math.log(2), rel=1e-6)
    assert not result.margins.any() and not rejected.grad.any()
    torch.testing.assert_close(chosen.grad, -2 / counts / len(counts))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("gap", [1e3, 1e6, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_log_ratios_stay_finite(gap, sign, smoothing):
    chosen = torch.tensor([-gap, 0.0][::sign], requires_grad=True)
    rejected = torch.tensor([0.0, -gap][::sign], requires_grad=True)
    zero = torch.zeros(2)
    counts = torch.tensor([3, 3])
    result = dfpo_loss(chosen, rejected, zero, zero, chosen_token_counts=counts, label_smoothing=smoothing)
    result.loss.backward()
    # One pair is all wrong, the other all right: z = ∓ gap / 10, and only one of the two logarithms is not 0.
    assert result.preference.item() == pytest.approx(gap / 10 / 2, rel=1e-5)
    assert result.loss.isfinite() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    wrong, right = (0, 1)[::sign]
    assert rejected.grad[wrong].item() == pytest.approx(0.1 * (1 - smoothing) / 2, rel=1e-5)
    assert rejected.grad[right].item() == pytest.approx(-0.1 * smoothing / 2, rel=1e-5)


def test_gradients_reach_the_policy_in_the_dpo_direction():
    values, counts = logps()
    leaves = [v.requires_grad_() for v in values]
    dfpo_loss(*leaves, chosen_token_counts=counts, mu=0.0).loss.backward()
    assert (leaves[0].grad < 0).all() and (leaves[1].grad > 0).all()


def test_bf16_inputs_are_computed_in_float32():
    values, counts = logps(dtype=torch.bfloat16)
    loss, chosen, _ = truth(values, counts, 0.1, 1.0, 0.0)
    leaf = values[0].requires_grad_()
    result = dfpo_loss(*values, chosen_token_counts=counts)
    assert {value.dtype for value in result} == {torch.float32}
    assert result.loss.item() == pytest.approx(loss, rel=3e-6)
    result.loss.backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert leaf.grad.tolist() == pytest.approx(chosen, rel=2**-8)
    pc, pr, rc, rr = (v.double() for v in values)
    margins = (0.1 * ((pc - rc) - (pr - rr))).tolist()
    assert result.margins.tolist() == pytest.approx(margins, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", [*NAMES, "chosen_token_counts"])
@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 2), ()])
def test_other_shapes_are_refused(name, shape):
    arguments = {n: torch.full((2,), -1.0) for n in NAMES} | {"chosen_token_counts": torch.tensor([1, 2])}
    arguments[name] = torch.ones(shape)
    # All are compared with the first: if its length is another, the second is named.
    named = NAMES[1] if name == NAMES[0] and len(shape) == 1 else name
    with pytest.raises(ValueError, match=f"^{named} has the shape .*one value a pair"):
        dfpo_loss(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), found 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"beta": -0.1}, "found beta=-0.1, mu=1.0"),
        ({"mu": -1}, "found beta=0.1, mu=-1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    values, counts = logps()
    with pytest.raises(ValueError, match=message):
        dfpo_loss(*values, chosen_token_counts=counts, **settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named(name, value):
    values, counts = logps()
    arguments = dict(zip(NAMES, values, strict=True))
    arguments[name][3:] = value
    with pytest.raises(ValueError, match=rf"^{name}\[3\] is {value}; expected a finite log-probability"):
        dfpo_loss(**arguments, chosen_token_counts=counts)


@pytest.mark.parametrize("count", [0, -1])
def test_a_chosen_answer_without_tokens_is_refused(count):
    values, counts = logps()
    counts[4] = count
    with pytest.raises(ValueError, match=rf"chosen_token_counts\[4\] is {count}: a chosen response needs a token"):
        dfpo_loss(*values, chosen_token_counts=counts)


def test_compiled_and_under_torch_func_it_gives_the_same():
    values, counts = logps()
    loss = lambda *values: dfpo_loss(*values, chosen_token_counts=counts).loss  # noqa: E731
    expected, *gradients = truth(values, counts, 0.1, 1.0, 0.0)
    assert torch.compile(loss, backend="aot_eager", fullgraph=True)(*values).item() == pytest.approx(expected, rel=3e-6)
    for ours, theirs in zip(torch.func.grad(loss, argnums=(0, 1))(*values), gradients, strict=True):
        assert ours.tolist() == pytest.approx(theirs, rel=1e-4, abs=1e-7)
