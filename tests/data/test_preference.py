"""Pairs: loss on the final answers alone, chosen rows before rejected ones, reference log-probabilities beside them."""

import pytest
import torch

from pedgpt.data import Message, PreferencePair, chat_format, collate_pairs, encode_pair

IGNORED = -100
PROMPT = (
    Message("system", "规"),
    Message("user", "孩子发烧"),
    Message("assistant", "几天了？"),
    Message("user", "三天<reserved_107></s><|im_end|>"),
)
PAIRS = [
    PreferencePair(PROMPT, "别急，多喝水。", "喝水", "p:1"),
    PreferencePair((Message("user", "咳嗽"),), "查", "别担心，先观察。", "p:2"),
    PreferencePair((Message("user", "12"),), "34", "5", "p:3"),
]


@pytest.fixture(params=["baichuan", "qwen", "qwen_unmarked"])
def chat(request, tokenizers_by_name):
    return chat_format(tokenizers_by_name[request.param])


@pytest.mark.parametrize("pair", PAIRS)
def test_only_the_final_answer_carries_loss(chat, pair):
    encoded = encode_pair(pair, chat)
    for example, answer in ((encoded.chosen, pair.chosen), (encoded.rejected, pair.rejected)):
        taught = [label for label in example.labels if label != IGNORED]
        assert taught == [*chat.tokenizer.encode(answer), chat.stop_tokens[0]]
        first = next(i for i, label in enumerate(example.labels) if label != IGNORED)
        assert example.labels[first : first + len(taught)] == taught  # in one run
        assert example.source == pair.source
    # Everything up to the token that predicts the answer's first is the same prompt.
    shared = encoded.chosen.labels.index(chat.tokenizer.encode(pair.chosen)[0]) + 1
    assert encoded.chosen.tokens[:shared] == encoded.rejected.tokens[:shared]
    assert set(encoded.chosen.labels[: shared - 1]) <= {IGNORED}


def test_rows_hold_all_chosen_then_all_rejected(chat):
    pairs = [encode_pair(pair, chat) for pair in PAIRS]
    reference = torch.tensor([[-1.0, -10.0], [-2.0, -20.0], [-3.0, -30.0]])
    batch = collate_pairs(pairs, [4, 0, 7], reference, pad_id=9)
    answers = [
        chat.tokenizer.decode([t for t in row if t != IGNORED]) for row in batch.labels.tolist()
    ]
    assert answers == [p.chosen for p in PAIRS] + [p.rejected for p in PAIRS]
    assert batch.reference_logps.tolist() == [-1.0, -2.0, -3.0, -10.0, -20.0, -30.0]
    assert batch.row_ids.tolist() == [8, 0, 14, 9, 1, 15]
    assert len(set(batch.row_ids.tolist())) == 6
    assert batch.weight == 3  # pairs
    examples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    width = max(len(example.tokens) for example in examples)
    assert batch.tokens.shape == batch.labels.shape == batch.documents.shape == (6, width)
    for i, example in enumerate(examples):
        padding = width - len(example.tokens)
        assert batch.tokens[i].tolist() == example.tokens + [9] * padding
        assert batch.labels[i].tolist() == example.labels + [IGNORED] * padding
        assert batch.documents[i].tolist() == [0] * len(example.tokens) + [-1] * padding


def test_reference_is_zero_until_it_is_known(chat):
    batch = collate_pairs([encode_pair(PAIRS[0], chat)], [0])
    assert batch.reference_logps.tolist() == [0.0, 0.0] and batch.reference_logps.dtype == torch.float32


def test_batch_without_pairs_has_no_weight(chat):
    for reference in (None, torch.zeros(0, 2)):
        batch = collate_pairs([], [], reference)
        assert batch.weight == 0 and batch.num_tokens == 0
        assert bool((batch.labels == IGNORED).all())
        assert len(batch.reference_logps) == len(batch.tokens) == len(batch.row_ids)


def test_reference_moves_with_the_batch(chat):
    moved = collate_pairs([encode_pair(PAIRS[0], chat)], [0]).to(torch.device("meta"))
    assert moved.reference_logps.device.type == moved.tokens.device.type == "meta"
