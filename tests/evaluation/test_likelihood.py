"""Perplexity and preference scores against float64 log-probabilities taken one document at a time."""

import copy
import math

import pytest
import torch

from pedgpt.data import Example, Message, chat_format, encode_prompt, pack, train_tokenizer
from pedgpt.data.preference import EncodedPair
from pedgpt.evaluation.agreement import bootstrap, perplexity_of
from pedgpt.evaluation.likelihood import document_losses, option_logps, pair_logps, preference_values
from pedgpt.models import ModelConfig, Transformer

IGNORED = -100
VOCABULARY = 37
SPECIAL = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]


@pytest.fixture(scope="module", params=["rope", "alibi"])
def model(request):
    torch.manual_seed(3)
    config = ModelConfig(
        model_type="baichuan", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=8, max_position_embeddings=64, positions=request.param,
        initializer_range=0.3, fused_qkv=True,
    )  # fmt: skip
    return Transformer(config).eval()


@torch.no_grad()
def logps_by_hand(model, example):
    """log p of every label of one example, alone in the model, from logits in float64."""
    exact = copy.deepcopy(model).double()
    logits = exact(torch.tensor([example.tokens]))[0].tolist()
    values = []
    for row, label in zip(logits, example.labels, strict=True):
        if label != IGNORED:
            peak = max(row)
            values.append(row[label] - peak - math.log(sum(math.exp(value - peak) for value in row)))
    return values


def some_examples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint
    made = []
    for n in lengths:
        labels = draw(VOCABULARY, (n,), generator=generator).tolist()
        labels = [IGNORED if i % 3 == 1 else label for i, label in enumerate(labels)]
        made.append(Example(draw(VOCABULARY, (n,), generator=generator).tolist(), labels))
    return made


def perplexity(model, rows, batch_size=8):
    return bootstrap(document_losses(model, rows, batch_size), statistic=perplexity_of, draws=2)[0]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_matches_float64_by_hand(model, batch_size):
    examples = some_examples([7, 12, 1, 5, 20, 3, 9, 16, 2])
    rows = pack(examples, 20)
    assert max(map(len, rows)) > 2 and len({sum(len(one.tokens) for one in row) for row in rows}) > 1
    logps = [value for example in examples for value in logps_by_hand(model, example)]
    expected = math.exp(-sum(logps) / len(logps))
    assert perplexity(model, rows, batch_size) == pytest.approx(expected, rel=2e-6)


def test_perplexity_of_bfloat16_is_near_float32(model):
    rows = pack(some_examples([7, 12, 5, 20]), 20)
    half = copy.deepcopy(model).bfloat16()
    assert perplexity(half, rows) == pytest.approx(perplexity(model, rows), rel=0.1)


def test_perplexity_of_a_uniform_model_is_its_vocabulary(model):
    uniform = copy.deepcopy(model)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    assert perplexity(uniform, pack(some_examples([5, 9]), 16)) == pytest.approx(VOCABULARY, rel=1e-6)


@pytest.mark.parametrize("rows", [[], [[Example([1, 2], [IGNORED, IGNORED])]]])
def test_perplexity_of_nothing_is_an_error(model, rows):
    with pytest.raises(ValueError, match="found 0 rows"):
        perplexity(model, rows)


def make_pairs(lengths, seed=1):
    examples = some_examples([n for pair in lengths for n in pair], seed)
    return [EncodedPair(*examples[i : i + 2]) for i in range(0, len(examples), 2)]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_pair_logps_match_float64_by_hand(model, batch_size):
    pairs = make_pairs([(4, 9), (12, 3), (1, 1), (7, 7), (15, 2)])
    expected = torch.tensor(
        [[sum(logps_by_hand(model, example)) for example in (pair.chosen, pair.rejected)] for pair in pairs]
    )
    found = pair_logps(model, pairs, batch_size)
    assert found.shape == (5, 2) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_pairs(model):
    assert pair_logps(model, []).shape == (0, 2)


def test_preference_scores_by_hand():
    # Supervised tokens (2, 4), (3, 1), (1, 1), (2, 2), (4, 1) of chosen and rejected.
    def answer(count):
        return Example([5] * (count + 1), [IGNORED] + [6] * count)

    pairs = [EncodedPair(answer(c), answer(r)) for c, r in ((2, 4), (3, 1), (1, 1), (2, 2), (4, 1))]
    logps = torch.tensor([[-4.0, -6.0], [-3.0, -2.0], [-5.0, -5.0], [-1.0, -8.0], [-4.0, -2.0]])
    # a token: (-2, -1.5) wrong although the sum is larger; (-1, -2) right; (-5, -5) a tie, so wrong; (-0.5, -4) right;
    # (-1, -2) right although the sum is smaller
    reference = torch.tensor([[-5.0, -6.5], [-3.0, -3.0], [-6.0, -5.0], [-1.5, -8.5], [-3.0, -2.0]])
    # gains: (1, 0.5) right; (0, 1) wrong; (1, 0) right; (0.5, 0.5) a tie, so wrong; (-1, 0) wrong
    scores = preference_values(logps, pairs, reference)
    assert scores["likelihood_accuracy"] == [0, 1, 0, 1, 1] and scores["reward_accuracy"] == [1, 0, 1, 0, 0]
    assert scores["chosen_logp_per_token"] == pytest.approx([-2, -1, -5, -0.5, -1])
    assert scores["rejected_logp_per_token"] == pytest.approx([-1.5, -2, -5, -4, -2])
    assert "reward_accuracy" not in preference_values(logps, pairs, None)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_options_match_one_plain_forward_pass_each(batch_size):
    chat = chat_format(train_tokenizer(["孩子发烧咳嗽怎么办多喝水"] * 3, vocab_size=290, special_tokens=SPECIAL))
    torch.manual_seed(3)
    config = ModelConfig(
        model_type="baichuan", vocab_size=chat.tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8, max_position_embeddings=128,
        initializer_range=0.4, fused_qkv=True, normalize_head=True,
    )  # fmt: skip
    model = Transformer(config).eval()
    options = [["A", "B", "C"], ["对", "错"], ["多喝水", "A"]]
    histories = [[Message("user", "孩子" * n)] for n in (1, 5, 2)]
    found = option_logps(model, chat, list(zip(histories, options, strict=True)), batch_size)
    for history, texts, logps in zip(histories, options, found, strict=True):
        prompt = encode_prompt(history, chat)
        for text, logp in zip(texts, logps, strict=True):
            ids = chat.tokenizer.encode(text)
            scores = model(torch.tensor([prompt + ids]))[0].log_softmax(-1).double()
            expected = sum(scores[len(prompt) + i - 1, token].item() for i, token in enumerate(ids))
            assert logp == pytest.approx(expected, abs=1e-4)


def test_losses_are_given_by_document(model):
    examples = some_examples([5, 9, 3, 7])
    losses = document_losses(model, pack(examples, 16), 2)
    found = sorted((count, loss) for loss, count in losses.tolist())
    alone = [logps_by_hand(model, one) for one in examples]
    for (count, loss), (expected_count, expected) in zip(found, sorted((len(x), -sum(x)) for x in alone), strict=True):
        assert count == expected_count and loss == pytest.approx(expected, rel=1e-5)
