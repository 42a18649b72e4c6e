"""Preference pairs as batches: chosen and rejected answers to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pedgpt.data.chat import ChatFormat, Example, encode_conversation
from pedgpt.data.packing import Batch, Row, collate, encode_fitting
from pedgpt.data.records import Message, PreferencePair, ReadSummary


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Both answers after their prompt; only the answer carries loss."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """P pairs as 2P rows, all chosen first, then all rejected; `weight` counts pairs.

    `reference_logps` [2P] float32: the frozen reference's summed log-probability of each answer.
    """

    reference_logps: Tensor


def encode_pair(pair: PreferencePair, chat: ChatFormat) -> EncodedPair:
    """Tokens of prompt + chosen and prompt + rejected, with loss on the final answer alone."""
    chosen, rejected = (
        encode_conversation([*pair.prompt, Message("assistant", answer)], chat, last_only=True, source=pair.source)
        for answer in (pair.chosen, pair.rejected)
    )
    return EncodedPair(chosen, rejected)


def encode_pairs(
    pairs: Sequence[PreferencePair], chat: ChatFormat, row_length: int, on_bad_row: str, summary: ReadSummary
) -> list[EncodedPair]:
    """`encode_pair` of each; bad rows, those with an answer too long among them, as in `encode_fitting`."""
    return encode_fitting(
        pairs,
        lambda pair: encode_pair(pair, chat),
        lambda both: max(len(both.chosen.tokens), len(both.rejected.tokens)),
        row_length,
        on_bad_row,
        summary,
    )


def collate_pairs(
    pairs: Sequence[EncodedPair],
    row_ids: Sequence[int],
    reference_logps: Tensor | None = None,
    pad_id: int = 0,
) -> PreferenceBatch:
    """Pairs as one batch; `reference_logps` [P, 2] (chosen, rejected), or None for zeros. No pairs: weight 0."""
    examples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rows = [Row(example.tokens, example.labels, [0] * len(example.tokens)) for example in examples]
    batch = collate(rows, [2 * i for i in row_ids] + [2 * i + 1 for i in row_ids], pad_id)
    if reference_logps is None or not pairs:
        reference_logps = torch.zeros(len(batch.tokens), dtype=torch.float32)
    else:
        reference_logps = reference_logps.T.reshape(-1)
    return PreferenceBatch(
        batch.tokens, batch.labels, batch.documents, batch.row_ids, len(pairs), reference_logps=reference_logps
    )
