"""Pairs: loss on the final answers alone; as two rows, and as one tree that packs, from which they come out again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pedgpt.data import (
    EncodedPair,
    Example,
    Message,
    PreferencePair,
    ReadSummary,
    chat_format,
    collate_pairs,
    encode_pairs,
)

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


def encode_pair(pair, chat):
    (encoded,) = encode_pairs([pair], chat, 999, "error", ReadSummary())
    return encoded


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
    # The fork: just before the token that predicts both answers' first.
    fork = encoded.chosen.labels.index(chat.tokenizer.encode(pair.chosen)[0])
    assert fork == encoded.rejected.labels.index(chat.tokenizer.encode(pair.rejected)[0])
    assert encoded.shared == fork
    assert encoded.chosen.tokens[: fork + 1] == encoded.rejected.tokens[: fork + 1]


def test_rows_hold_all_chosen_then_all_rejected(chat):
    pairs = [encode_pair(pair, chat) for pair in PAIRS]
    reference = torch.tensor([[-1.0, -10.0], [-2.0, -20.0], [-3.0, -30.0]])
    batch = collate_pairs(pairs, [4, 0, 7], reference, shared_prompt=False)
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
        assert batch.tokens[i].tolist() == example.tokens + [0] * padding
        assert batch.labels[i].tolist() == example.labels + [IGNORED] * padding
        assert batch.documents[i].tolist() == [0] * len(example.tokens) + [-1] * padding
        assert batch.sequences[i].tolist() == [i if t != IGNORED else 0 for t in batch.labels[i].tolist()]
        assert batch.counts[i] == sum(label != IGNORED for label in example.labels)
    assert batch.branches.shape == batch.tokens.shape and not batch.branches.any()


def example(tokens, labels):
    return Example(tokens, [IGNORED if label is None else label for label in labels])


def pair_of(prompt, chosen, rejected):
    """A prompt of token ids and two answers, aligned: the prompt's last token predicts the answer's first."""
    return EncodedPair(
        *(
            example([*prompt, *answer][:-1] if answer else prompt, [None] * (len(prompt) - bool(answer)) + answer)
            for answer in (chosen, rejected)
        )
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        (([1, 2, 3, 4, 5], [None, None, 4, 5, 6]), ([1, 2, 3, 7], [None, None, 7, 6]), 2),
        (([3, 4], [4, 6]), ([3, 5], [5, 6]), 0),  # a prompt of one token
        (([1, 2, 3, 4], [None, None, 4, 6]), ([1, 2, 3], [None, None, None]), 2),  # nothing rejected
        (([1, 2, 3], [None, None, None]), ([1, 2, 3, 4], [None, None, None, 6]), 3),
        (([1, 2, 3], [None, 3, 6]), ([1, 2, 3], [None, 3, 6]), 1),  # the same answer twice
        (([1, 2, 3, 4], [None, None, 4, 6]), ([1, 9, 3, 4], [None, None, 4, 6]), 1),  # prompts that differ
        (([1, 2, 3, 4], [None, 3, None, 6]), ([1, 2, 3, 5], [None, None, None, 6]), 1),  # a label in one alone
        (([1, 2], [None, None]), ([1, 2], [None, None]), 2),
        (([8], [6]), ([9], [6]), 0),
    ],
)
def test_pair_forks_where_a_token_or_a_label_parts_them(chosen, rejected, shared):
    assert EncodedPair(example(*chosen), example(*rejected)).shared == shared
    assert EncodedPair(example(*rejected), example(*chosen)).shared == shared


def test_pairs_pack_as_trees_by_hand():
    pairs = [
        pair_of([11, 12], [13], [14, 15]),  # 1 + 1 + 2 = 4 tokens
        pair_of([21, 22, 23, 24], [25, 26], [27, 28]),  # 3 + 2 + 2 = 7
        pair_of([31], [32], [33, 34]),  # 0 + 1 + 2 = 3
    ]
    reference = torch.tensor([[-1.0, -10.0], [-2.0, -20.0], [-3.0, -30.0]])
    batch = collate_pairs(pairs, [4, 0, 7], reference)
    assert batch.tokens.tolist() == [[21, 22, 23, 24, 25, 24, 27], [11, 12, 12, 14, 31, 31, 33]]
    no = IGNORED
    assert batch.labels.tolist() == [[no, no, no, 25, 26, 27, 28], [no, 13, 14, 15, 32, 33, 34]]
    assert batch.documents.tolist() == [[0] * 7, [0, 0, 0, 0, 1, 1, 1]]
    assert batch.branches.tolist() == [[0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 2, 1, 2, 2]]
    assert batch.sequences.tolist() == [[0, 0, 0, 1, 1, 4, 4], [0, 0, 3, 3, 2, 5, 5]]
    assert batch.counts.tolist() == [1, 2, 1, 2, 2, 2]
    assert batch.reference_logps.tolist() == [-1.0, -2.0, -3.0, -10.0, -20.0, -30.0]
    assert batch.row_ids.tolist() == [0, 4] and batch.weight == 3
    for name in ("tokens", "labels", "documents", "branches", "sequences", "counts", "row_ids"):
        assert getattr(batch, name).dtype == torch.int64, name

    padded = collate_pairs(pairs[:2], [4, 0])
    assert padded.tokens[1].tolist() == [11, 12, 12, 14, 0, 0, 0]
    assert padded.labels[1].tolist() == [no, 13, 14, 15, no, no, no]
    assert padded.documents[1].tolist() == [0, 0, 0, 0, -1, -1, -1]
    assert padded.branches[1].tolist() == [0, 1, 2, 2, 0, 0, 0]
    assert padded.sequences[1].tolist() == [0, 0, 2, 2, 0, 0, 0]


def unpacked(batch):
    """(tokens, labels, answers named by the labels) of each path of each document, row by row."""
    found = []
    columns = (batch.tokens, batch.labels, batch.documents, batch.branches, batch.sequences)
    for row in zip(*(column.tolist() for column in columns), strict=True):
        places = list(zip(*row, strict=True))
        for number in sorted({place[2] for place in places} - {-1}):
            tree = [place for place in places if place[2] == number]
            paths = []
            for branch in (1, 2):
                path = [place for place in tree if place[3] in (0, branch)]
                answers = {place[4] for place in path if place[1] != IGNORED}
                paths.append(([place[0] for place in path], [place[1] for place in path], answers))
            found.append(paths)
    return found


ids = st.integers(1, 3)  # few: answers begin alike, prompts repeat
encoded_pairs = st.builds(
    pair_of, st.lists(ids, min_size=1, max_size=6), st.lists(ids, max_size=5), st.lists(ids, max_size=5)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(encoded_pairs, min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_every_pair_comes_out_of_the_packing_as_it_went_in(pairs, random):
    names = random.sample(range(100), len(pairs))
    batch = collate_pairs(pairs, names)
    sizes = [len(p.chosen.tokens) + len(p.rejected.tokens) - p.shared for p in pairs]
    assert batch.tokens.shape[1] == max(sizes)
    assert batch.num_tokens == sum(sizes) and len(batch.tokens) <= len(pairs)
    trees = unpacked(batch)
    assert len(trees) == len(pairs)
    count = len(pairs)

    # A tree whose labels name its pair is that pair's; trees without labels are told by what they hold.
    def key(i):
        pair = pairs[i]
        return [
            (answer.tokens, answer.labels, {name} if answer.supervised else set())
            for answer, name in ((pair.chosen, i), (pair.rejected, count + i))
        ]

    expected = [key(i) for i in range(count)]
    for tree in trees:
        expected.remove(tree)
    assert expected == []

    # Branches: trunk first, then chosen's rest, then rejected's, each in one run; documents are numbered in order.
    for documents, branches in zip(batch.documents.tolist(), batch.branches.tolist(), strict=True):
        real = [place for place in zip(documents, branches, strict=True) if place[0] != -1]
        assert real == sorted(real)
        assert [document for document, _ in real] + [-1] * (len(documents) - len(real)) == documents
        assert {document for document, _ in real} == set(range(real[-1][0] + 1))
    outside = batch.documents == -1
    assert (batch.tokens[outside] == 0).all() and not batch.branches[outside].any()

    # Every label once, with its answer.
    labelled = batch.labels != IGNORED
    assert not batch.sequences[~labelled].any()
    assert batch.counts.tolist() == torch.bincount(batch.sequences[labelled], minlength=2 * count).tolist()
    assert batch.counts.tolist() == [p.chosen.supervised for p in pairs] + [p.rejected.supervised for p in pairs]
    assert batch.weight == count and batch.reference_logps.shape == (2 * count,)

    # A row's name is that of the pair at its start.
    for row, name in enumerate(batch.row_ids.tolist()):
        pair = pairs[names.index(name)]
        first = [*pair.chosen.tokens, *pair.rejected.tokens[pair.shared :]]
        assert batch.tokens[row, : len(first)].tolist() == first
    assert len(set(batch.row_ids.tolist())) == len(batch.tokens)


@pytest.mark.parametrize("pair", PAIRS)
def test_real_pair_comes_out_of_its_tree(chat, pair):
    encoded = encode_pair(pair, chat)
    [[chosen, rejected]] = unpacked(collate_pairs([encoded], [0]))
    assert chosen == (encoded.chosen.tokens, encoded.chosen.labels, {0})
    assert rejected == (encoded.rejected.tokens, encoded.rejected.labels, {1})


def test_row_length_bounds_each_answer_not_the_tree(chat):
    encoded = encode_pair(PAIRS[0], chat)
    limit = max(len(encoded.chosen.tokens), len(encoded.rejected.tokens))
    kept = encode_pairs(PAIRS[:1], chat, limit, "error", ReadSummary())
    assert kept == [encoded] and collate_pairs(kept, [0]).tokens.shape[1] > limit
    with pytest.raises(ValueError, match="p:1: over-long"):
        encode_pairs(PAIRS[:1], chat, limit - 1, "error", ReadSummary())


def test_reference_is_zero_until_it_is_known(chat):
    batch = collate_pairs([encode_pair(PAIRS[0], chat)], [0])
    assert batch.reference_logps.tolist() == [0.0, 0.0] and batch.reference_logps.dtype == torch.float32


def test_batch_without_pairs_has_no_weight(chat):
    for reference, shared in [(None, True), (torch.zeros(0, 2), True), (None, False), (torch.zeros(0, 2), False)]:
        batch = collate_pairs([], [], reference, shared_prompt=shared)
        assert batch.weight == 0 and batch.num_tokens == 0
        assert bool((batch.labels == IGNORED).all())
        assert len(batch.tokens) == len(batch.row_ids) == 1
        for name in ("tokens", "labels", "documents", "branches", "sequences"):
            assert getattr(batch, name).shape == (1, 1) and getattr(batch, name).dtype == torch.int64
        assert not batch.branches.any() and not batch.sequences.any()
        assert batch.reference_logps.tolist() == [0.0, 0.0] and batch.counts.tolist() == [0, 0]
        assert batch.reference_logps.dtype == torch.float32 and batch.counts.dtype == torch.int64


def test_all_tensors_move_with_the_batch(chat):
    moved = collate_pairs([encode_pair(PAIRS[0], chat)], [0]).to(torch.device("meta"))
    for name in ("tokens", "labels", "documents", "branches", "sequences", "counts", "reference_logps", "row_ids"):
        assert getattr(moved, name).device.type == "meta"
