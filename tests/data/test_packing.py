"""Rows hold every example once and whole; labels, padding, bad rows and fingerprints, by count and by hand."""

import bisect
import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pedgpt.data import (
    Conversation,
    Example,
    Message,
    ReadSummary,
    chat_format,
    collate,
    encode_conversations,
    encode_document,
    pack,
)
from pedgpt.data.packing import best_fit, best_fit_arrays

IGNORED, PADDING = -100, -1


def examples_of(lengths):
    """Example i holds its own tokens, which no other holds."""
    starts = itertools.accumulate([0, *lengths])
    return [
        Example(list(range(start, start + n)), [-t if t % 3 else IGNORED for t in range(start, start + n)], f"f:{i}")
        for i, (n, start) in enumerate(zip(lengths, starts, strict=False))
    ]


def parts(row):
    """(tokens, labels) of each document of a row."""
    return [(tuple(one.tokens), tuple(one.labels)) for one in row]


def sorted_rows(rows):
    return sorted(sorted(parts(row)) for row in rows)


def best_fit_decreasing(lengths, row_length):
    """The textbook algorithm, trying every row: the lengths of each row's members."""
    rows = []
    for size in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= row_length]
        if size and fitting:
            max(fitting, key=sum).append(size)
        elif size:
            rows.append([size])
    return sorted(sorted(row) for row in rows)


def best_fit_by_insertion(sizes, row_length):
    """Best-fit decreasing over one sorted list of (free tokens, row); ties go to the lowest row."""
    rows, room = [], []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if sizes[i] == 0:
            continue
        at = bisect.bisect_left(room, (sizes[i], -1))
        free, row = room.pop(at) if at < len(room) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (free - sizes[i], row))
    return rows


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), max_size=60))))
@settings(max_examples=150, deadline=None)
def test_best_fit_matches_insertion_into_a_sorted_list(case):
    row_length, sizes = case
    assert best_fit(sizes, row_length) == best_fit_by_insertion(sizes, row_length)


@pytest.mark.parametrize(("row_length", "median"), [(4096, 300), (384, 90), (4096, 1500), (63, 9)])
def test_best_fit_of_many_matches_insertion_and_fills_the_rows(row_length, median):
    lengths = np.random.default_rng(0).lognormal(np.log(median), 0.9, 20_000).astype(int) + 1
    sizes = np.minimum(lengths, row_length).tolist()
    rows = best_fit(sizes, row_length)
    assert rows == best_fit_by_insertion(sizes, row_length)
    assert sum(sizes) / (len(rows) * row_length) > 0.995
    members, starts = best_fit_arrays(sizes, row_length)
    assert [part.tolist() for part in np.split(members, starts[1:-1])] == rows


def test_best_fit_of_nothing():
    for sizes in ([], [0, 0]):
        members, starts = best_fit_arrays(sizes, 5)
        assert best_fit(sizes, 5) == members.tolist() == [] and starts.tolist() == [0]


LENGTHS = st.integers(1, 40).flatmap(
    lambda row_length: st.tuples(st.just(row_length), st.lists(st.integers(0, row_length), max_size=40))
)


@given(LENGTHS)
@settings(max_examples=80, deadline=None)
def test_every_example_is_in_exactly_one_row_and_whole(case):
    row_length, lengths = case
    examples = examples_of(lengths)
    rows = pack(examples, row_length)
    packed = Counter(part for row in rows for part in parts(row))
    assert packed == Counter((tuple(e.tokens), tuple(e.labels)) for e in examples if e.tokens)
    for row in rows:
        batch = collate([row], [0])
        assert 0 < batch.tokens.shape[1] == batch.labels.shape[1] == batch.documents.shape[1] <= row_length
        numbers = [number for number, _ in itertools.groupby(batch.documents[0].tolist())]
        assert numbers == list(range(len(numbers)))  # contiguous, counted from 0
    assert rows == pack(examples, row_length)
    members = sorted(sorted(len(one.tokens) for one in row) for row in rows)
    assert members == best_fit_decreasing(lengths, row_length)


def test_rows_are_well_used_on_realistic_lengths():
    rng = random.Random(0)
    for row_length, median in ((4096, 300), (512, 90), (2048, 700)):
        lengths = [min(row_length, int(rng.lognormvariate(0, 0.9) * median) + 1) for _ in range(1500)]
        rows = pack(examples_of(lengths), row_length)
        assert sum(lengths) / (len(rows) * row_length) >= 0.97


def test_too_long_example_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="f:2.*11.*10.*row_length"):
        pack(examples_of([10, 3, 11]), 10)
    assert len(pack(examples_of([10, 10]), 10)) == 2
    assert pack([], 10) == [] == pack(examples_of([0, 0]), 10)


@given(st.lists(st.integers(5, 99), max_size=50), st.none() | st.just(2), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_document_predicts_each_token_but_the_first_exactly_once(ids, eos, row_length):
    stream = ids + ([eos] if eos is not None else [])
    pieces = encode_document(ids, eos, row_length, "f:1")
    assert [label for piece in pieces for label in piece.labels] == stream[1:]
    assert [token for piece in pieces for token in piece.tokens] == stream[:-1]
    assert all(0 < len(piece.tokens) <= row_length and piece.source == "f:1" for piece in pieces)
    assert all(len(piece.tokens) == row_length for piece in pieces[:-1])
    assert len(pack(pieces, row_length)) <= len(pieces)


@pytest.mark.parametrize(
    ("ids", "eos", "row_length", "expected"),
    [
        ([], 2, 4, []),
        ([], None, 4, []),
        ([7], None, 4, []),
        ([7], 2, 4, [([7], [2])]),
        ([7, 8, 9, 10], 2, 4, [([7, 8, 9, 10], [8, 9, 10, 2])]),
        ([7, 8, 9, 10, 11], 2, 4, [([7, 8, 9, 10], [8, 9, 10, 11]), ([11], [2])]),
        ([7, 8, 9], None, 2, [([7, 8], [8, 9])]),
    ],
)
def test_documents_by_hand(ids, eos, row_length, expected):
    assert [(piece.tokens, piece.labels) for piece in encode_document(ids, eos, row_length)] == expected


def test_collate_pads_on_the_right_with_a_document_of_its_own():
    rows = [[Example([5, 6], [6, IGNORED]), Example([7], [8])], [Example([9], [10])]]
    batch = collate(rows, [40, 17])
    assert batch.tokens.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch.labels.tolist() == [[6, IGNORED, 8], [10, IGNORED, IGNORED]]
    assert batch.documents.tolist() == [[0, 0, 1], [0, PADDING, PADDING]]
    assert batch.row_ids.tolist() == [40, 17]
    assert (batch.weight, batch.num_tokens) == (3, 4)
    assert all(value.dtype == torch.int64 for value in (batch.tokens, batch.labels, batch.documents, batch.row_ids))


def test_collate_leaves_the_rows_alone():
    rows = [[Example([5, 6], [6, 7])], [Example([9], [10])]]
    collate(rows, [0, 1])
    assert rows[1] == [Example([9], [10])]


def test_batch_moves_every_tensor():
    batch = collate([[Example([5, 6], [6, 7])]], [3]).to(torch.device("meta"))
    assert {batch.tokens.device.type, batch.labels.device.type} == {"meta"}
    assert {batch.documents.device.type, batch.row_ids.device.type} == {"meta"}
    assert batch.weight == 2


def test_empty_batch_has_a_token_and_no_weight():
    batch = collate([], [])
    assert batch.tokens.tolist() == [[0]] and batch.labels.tolist() == [[IGNORED]]
    assert batch.documents.tolist() == [[PADDING]]
    assert (batch.weight, batch.num_tokens, len(batch.row_ids)) == (0, 0, 1)


@pytest.fixture
def spoken(tokenizers_by_name):
    """Conversations of 4, 10 and 5 tokens in Baichuan2's format: user, n digits, assistant, m digits."""
    def conversation(question, answer, line):
        return Conversation((Message("user", question), Message("assistant", answer)), f"talk.jsonl:{line}")

    rows = [conversation("1", "2", 3), conversation("1234", "5678", 4), conversation("12", "3", 9)]
    return rows, chat_format(tokenizers_by_name["baichuan"])


def test_over_long_conversation_is_skipped_and_counted(spoken):
    rows, chat = spoken
    summary = ReadSummary(rows={"talk.jsonl": 3})
    kept = encode_conversations(rows, chat, 9, "error", summary, on_long_row="skip")
    assert [(len(example.tokens), example.source) for example in kept] == [(4, "talk.jsonl:3"), (5, "talk.jsonl:9")]
    assert summary.rows == {"talk.jsonl": 2}
    (skipped,) = summary.skipped
    assert (skipped.file, skipped.line) == ("talk.jsonl", 4)
    assert "10 tokens" in skipped.reason and "9" in skipped.reason and skipped.reason.startswith("over-long")


@pytest.mark.parametrize(("row_length", "fit"), [(9, False), (10, True)])
def test_over_long_conversation_is_an_error_that_names_it(spoken, row_length, fit):
    rows, chat = spoken
    summary = ReadSummary()
    if fit:
        assert [len(e.tokens) for e in encode_conversations(rows, chat, row_length, "error", summary)] == [4, 10, 5]
    else:
        with pytest.raises(ValueError, match="talk.jsonl:4.*10 tokens.*9.*row_length.*on_long_row"):
            encode_conversations(rows, chat, row_length, "error", summary)
    assert not summary.skipped
