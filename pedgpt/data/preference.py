"""Preference pairs as batches: chosen and rejected answers to the same prompt, which is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor

from pedgpt.data.chat import IGNORE_INDEX
from pedgpt.data.examples import Example, encode_rows
from pedgpt.data.packing import Batch, best_fit, collate, padded
from pedgpt.data.store import TokenStore


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Both answers after their prompt; only the answer carries loss."""

    chosen: Example
    rejected: Example

    @property
    def shared(self) -> int:
        """Tokens that both begin with and that carry no loss: the prompt without its last, which predicts."""
        chosen, rejected = self.chosen, self.rejected
        columns = zip(chosen.tokens, rejected.tokens, chosen.labels, rejected.labels, strict=False)
        return sum(1 for _ in takewhile(lambda at: at[0] == at[1] and at[2] == at[3] == IGNORE_INDEX, columns))


@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """P pairs; `weight` counts them. Answer i is pair i's chosen one, answer P + i its rejected one.

    `branches` [B, T] int64: 0 in what both answers of a pair share, 1 in the chosen one, 2 in the rejected one; all 0
    where each answer has a row of its own. `sequences` [B, T] int64: the answer that a label belongs to, 0 where there
    is no label. `counts` [2P] int64: labels of each answer. `reference_logps` [2P] float32: the frozen reference's
    summed log-probability of each answer. Without pairs the last two are two zeros, as for one pair.
    """

    branches: Tensor
    sequences: Tensor
    counts: Tensor
    reference_logps: Tensor


def encode_pairs(*arguments: Any, **settings: Any) -> list[EncodedPair]:
    """All that `encode_rows` gives of pairs, with loss on the final answers alone.

    A row's length bounds each answer with its prompt, not both together.
    """
    return [EncodedPair(*answers) for answers in encode_rows(*arguments, **settings)]


class StoredPairs:
    """The pairs of a token store that `write_chats` made, each read when asked for.

    `reference_logps` [pairs, 2] goes into their batches, once it is known.
    """

    def __init__(self, store: TokenStore, *, shared_prompt: bool = True) -> None:
        self.store, self.fingerprint, self.shared_prompt = store, store.digest[:16], shared_prompt
        self.reference_logps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.store) // 2

    def __getitem__(self, number: int) -> EncodedPair:
        starts = self.store.offsets[2 * number : 2 * number + 3].tolist()
        return EncodedPair(*(self.store.example(start, end - start) for start, end in pairwise(starts)))

    def batch(self, numbers: Sequence[int], row_ids: Sequence[int]) -> PreferenceBatch:
        """The pairs of these numbers, as `collate_pairs` joins them."""
        logps = None if self.reference_logps is None else self.reference_logps[list(numbers)]
        return collate_pairs([self[i] for i in numbers], row_ids, logps, shared_prompt=self.shared_prompt)


def collate_pairs(
    pairs: Sequence[EncodedPair],
    row_ids: Sequence[int],
    reference_logps: Tensor | None = None,
    *,
    shared_prompt: bool = True,
) -> PreferenceBatch:
    """Pairs as one batch; `row_ids` [P] number them, `reference_logps` [P, 2] (chosen, rejected), or None for zeros.

    With `shared_prompt` a pair is one document: what its answers share, then the rest of each as a branch; pairs are
    packed into rows as in `pack`, no wider than the longest of them, and a row's id is that of its first pair.
    Otherwise 2P rows, all chosen first, then all rejected, with ids 2i and 2i + 1. No pairs: one row of padding,
    weight 0.
    """
    count = len(pairs)
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    # A part of a document is an answer's number, where it begins and ends there, and its branch.
    if shared_prompt:
        forks = enumerate(pair.shared for pair in pairs)
        trees = [_tree(answers, [(i, 0, n, 0), (i, n, None, 1), (count + i, n, None, 2)]) for i, n in forks]
        sizes = [len(document.tokens) for document, *_ in trees]
        members = best_fit(sizes, max(sizes, default=0))
        ids = [row_ids[row[0]] for row in members]
    else:
        trees = [_tree(answers, [(i, 0, None, 0)]) for i in range(2 * count)]
        members = [[i] for i in range(2 * count)]
        ids = [2 * i for i in row_ids] + [2 * i + 1 for i in row_ids]
    batch = vars(collate([[trees[i][0] for i in row] for row in members], ids)) | {"weight": count}
    if reference_logps is None or not pairs:
        reference_logps = torch.zeros(max(1, count), 2)
    return PreferenceBatch(
        **batch,
        branches=padded([[branch for i in row for branch in trees[i][1]] for row in members], 0),
        sequences=padded([[answer for i in row for answer in trees[i][2]] for row in members], 0),
        counts=torch.tensor([answer.supervised for answer in answers] or [0, 0]),
        reference_logps=reference_logps.T.reshape(-1),
    )


def full_pairs(settings: Any, count: int) -> PreferenceBatch:
    """So many pairs of `settings.row_length` tokens, whose answers have nothing in common, for a plan."""
    pair = EncodedPair(*(Example([token] * settings.row_length, [token] * settings.row_length) for token in range(2)))
    return collate_pairs([pair] * count, range(count), shared_prompt=settings.shared_prompt)


def _tree(
    answers: Sequence[Example], parts: Sequence[tuple[int, int, int | None, int]]
) -> tuple[Example, list[int], list[int]]:
    """The document of these parts, and of each place its branch and its answer, which is 0 where there is no label."""
    places = [
        (token, label, branch, number if label != IGNORE_INDEX else 0)
        for number, start, end, branch in parts
        for token, label in zip(answers[number].tokens[start:end], answers[number].labels[start:end], strict=True)
    ]
    tokens, labels, branches, numbers = map(list, zip(*places, strict=True))
    return Example(tokens, labels), branches, numbers
