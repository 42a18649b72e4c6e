"""Examples into fixed rows, and rows into batches of tensors. Letters: B batch, T tokens."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pedgpt.data.chat import IGNORE_INDEX
from pedgpt.data.examples import Example

PADDING_DOCUMENT = -1
Row = list[Example]  # end to end; each example is a document of its own


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs: tensors [B, T] (int64), `row_ids` [B], and `weight`, the supervised tokens in it.

    `documents` numbers, within a row, the document that each token belongs to. `row_ids` number the rows over the whole
    training, whatever the ranks: random numbers that are drawn by row id do not depend on how a batch is split.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor
    row_ids: Tensor
    weight: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch, padding left out."""
        return int((self.documents != PADDING_DOCUMENT).sum())

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def pack(examples: Sequence[Example], row_length: int) -> list[Row]:
    """Best-fit decreasing: each example, longest first, into the fullest row that still holds it, whole.

    Raises ValueError naming the source of an example longer than a row. Order within equal lengths is kept, so the
    result depends on the input alone.
    """
    sizes = [len(example.tokens) for example in examples]
    for example, size in zip(examples, sizes, strict=True):
        if size > row_length:
            raise ValueError(f"{example.source}: {size} tokens do not fit a row of {row_length}; raise row_length")
    return [[examples[i] for i in members] for members in best_fit(sizes, row_length)]


def best_fit(sizes: ArrayLike, row_length: int) -> list[list[int]]:
    """The members of each row by `pack`'s rule, as indices into `sizes`, none above `row_length`; 0 is left out."""
    members, starts = best_fit_arrays(sizes, row_length)
    return [members[first:last].tolist() for first, last in pairwise(starts)]


def best_fit_arrays(sizes: ArrayLike, row_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`best_fit` of millions: (members, starts), where row r holds members[starts[r] : starts[r + 1]].

    Rows wait in one heap for each number of free tokens, and bit n of `free_sizes` says that the heap of n is not
    empty, so the fullest row with room is found without a search. Memory: tens of bytes for each of `sizes`.
    """
    sizes = np.asarray(sizes, np.int64)
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    waiting: list[list[int]] = [[] for _ in range(row_length + 1)]
    free_sizes, num_rows = 0, 0
    row_of = np.empty(len(order), np.int64)
    for place, size in enumerate(sizes[order].tolist()):
        if fitting := free_sizes >> size:
            free = size + (fitting & -fitting).bit_length() - 1
            row = heapq.heappop(waiting[free])
            if not waiting[free]:
                free_sizes ^= 1 << free
        else:
            free, row = row_length, num_rows
            num_rows += 1
        row_of[place] = row
        if free > size:
            heapq.heappush(waiting[free - size], row)
            free_sizes |= 1 << free - size
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return order[np.argsort(row_of, kind="stable")], starts


def collate(rows: Sequence[Row], row_ids: Sequence[int]) -> Batch:
    """Rows as one batch, padded on the right to the longest; padding is a document of its own and carries no loss.

    No rows at all give a batch of one padding token and weight 0, for a rank that has nothing left to do in a step.
    """
    labels = padded([[label for one in row for label in one.labels] for row in rows], IGNORE_INDEX)
    return Batch(
        tokens=padded([[token for one in row for token in one.tokens] for row in rows], 0),
        labels=labels,
        documents=padded([[i for i, one in enumerate(row) for _ in one.tokens] for row in rows], PADDING_DOCUMENT),
        row_ids=torch.tensor(row_ids if rows else [0]),
        weight=int((labels != IGNORE_INDEX).sum()),
    )


def full_rows(settings: Any, count: int) -> Batch:
    """So many rows of one document of `settings.row_length` tokens each, of which all are learnt, for a plan."""
    zeros = [0] * settings.row_length
    return collate([[Example(zeros, zeros)]] * count, range(count))


def padded(values: Sequence[list[int]], filler: int) -> Tensor:
    """Lists as one tensor [B, T], filled up on the right to the longest; at least [1, 1]."""
    width = max([1, *map(len, values)])
    return torch.tensor([row + [filler] * (width - len(row)) for row in values or [[]]])
