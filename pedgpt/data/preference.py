"""Preference pairs as batches: chosen and rejected answers to the same prompt, which is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor

from pedgpt.data.chat import IGNORE_INDEX
from pedgpt.data.examples import Example, encode_rows
from pedgpt.data.packing import Batch, Row, best_fit, collate, padded
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
    return [EncodedPair(chosen, rejected) for chosen, rejected in encode_rows(*arguments, **settings)]


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
        chosen, rejected = (self.store.example(start, end - start) for start, end in pairwise(starts))
        return EncodedPair(chosen, rejected)

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
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    if shared_prompt:
        trees = [_tree(pair, i, len(pairs) + i) for i, pair in enumerate(pairs)]
        members = best_fit([len(tree) for tree in trees], max(map(len, trees), default=0))
        ids = [row_ids[row[0]] for row in members]
    else:
        trees = [_part(answer, slice(None), 0, i) for i, answer in enumerate(answers)]
        members = [[i] for i in range(len(trees))]
        ids = [2 * i for i in row_ids] + [2 * i + 1 for i in row_ids]
    rows, branches, sequences = [], [], []
    for row in members:
        tokens, labels, branch, sequence = map(list, zip(*(place for i in row for place in trees[i]), strict=True))
        rows.append(Row(tokens, labels, [number for number, i in enumerate(row) for _ in trees[i]]))
        branches.append(branch)
        sequences.append(sequence)
    batch = vars(collate(rows, ids)) | {"weight": len(pairs)}
    width = batch["tokens"].shape[1]
    if reference_logps is None or not pairs:
        reference_logps = torch.zeros(max(1, len(pairs)), 2)
    return PreferenceBatch(
        **batch,
        branches=padded(branches or [[]], width, 0),
        sequences=padded(sequences or [[]], width, 0),
        counts=torch.tensor([answer.supervised for answer in answers] or [0, 0]),
        reference_logps=reference_logps.T.reshape(-1),
    )


def full_pairs(settings: Any, count: int) -> PreferenceBatch:
    """So many pairs of `settings.row_length` tokens, whose answers have nothing in common, for a plan."""
    pair = EncodedPair(*(Example([token] * settings.row_length, [token] * settings.row_length) for token in range(2)))
    return collate_pairs([pair] * count, range(count), shared_prompt=settings.shared_prompt)


def _tree(pair: EncodedPair, chosen: int, rejected: int) -> list[tuple[int, int, int, int]]:
    """What both answers share, then the rest of each, as in `_part`; `chosen` and `rejected` number the answers."""
    trunk, rest = slice(pair.shared), slice(pair.shared, None)
    both = _part(pair.chosen, rest, 1, chosen) + _part(pair.rejected, rest, 2, rejected)
    return _part(pair.chosen, trunk, 0, 0) + both


def _part(example: Example, where: slice, branch: int, answer: int) -> list[tuple[int, int, int, int]]:
    """(token, label, branch, answer) at each of these places of an example; answer 0 where there is no label."""
    pairs = zip(example.tokens[where], example.labels[where], strict=True)
    return [(token, label, branch, answer if label != IGNORE_INDEX else 0) for token, label in pairs]
