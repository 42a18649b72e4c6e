"""Likelihood: perplexity of text and answers, the answer of a pair and the option of a question a model prefers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pedgpt.data.chat import IGNORE_INDEX, ChatFormat
from pedgpt.data.examples import Example, Messages, encode_conversation
from pedgpt.data.packing import Batch, Row, collate, padded
from pedgpt.data.preference import EncodedPair, PreferenceBatch, collate_pairs
from pedgpt.data.records import Message
from pedgpt.kernels import linear_token_logps
from pedgpt.models.transformer import Transformer


def document_losses(model: Transformer, rows: Sequence[Row], batch_size: int = 8) -> Tensor:
    """Of each document in packed rows, the summed negative log-likelihood and the supervised tokens, [documents, 2]."""
    found = [torch.zeros(0, 2, dtype=torch.float64)]
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        batch = collate(chunk, range(len(chunk)))
        documents = batch.documents - batch.documents.min()  # the padding's too
        count = int(documents.max()) + 1
        numbers = documents + count * torch.arange(len(chunk))[:, None]
        losses = torch.stack([-_token_logps(model, batch).cpu().double(), (batch.labels != IGNORE_INDEX).double()], -1)
        sums = torch.zeros(count * len(chunk), 2, dtype=torch.float64)
        sums.index_add_(0, numbers.flatten(), losses.flatten(0, 1))
        found.append(sums[sums[:, 1] > 0])
    return torch.cat(found)


def perplexity(model: Transformer, rows: Sequence[Row], batch_size: int = 8) -> float:
    """exp of the mean negative log-likelihood per supervised token; ValueError if there is no such token."""
    return mean_perplexity(document_losses(model, rows, batch_size).numpy())


def mean_perplexity(losses: Any) -> Any:
    """The perplexity from `document_losses` [..., documents, 2]."""
    totals = losses.sum(-2)
    if not (totals[..., 1] > 0).all():
        raise ValueError("perplexity needs at least one supervised token")
    return np.exp(totals[..., 0] / totals[..., 1])


def option_logps(
    model: Transformer, chat: ChatFormat, questions: Sequence[tuple[Messages, Sequence[str]]], batch_size: int = 8
) -> list[list[float]]:
    """log p(option | history) of each option of each question, in nats, over the option's own tokens.

    A question is computed once, and its options stand after it as branches that do not see each other.
    """
    found: list[list[float]] = []
    for start in range(0, len(questions), batch_size):
        rows, branches = [], []
        chunk = questions[start : start + batch_size]
        for history, options in chunk:
            talks = [[*history, Message("assistant", text)] for text in options]
            examples = [encode_conversation(talk, chat, last_only=True) for talk in talks]
            # The last token before an option predicts its first one, so each branch begins with that token.
            shared = next(i for i, label in enumerate(examples[0].labels) if label != IGNORE_INDEX)
            row, branch = Example(examples[0].tokens[:shared], [IGNORE_INDEX] * shared), [0] * shared
            for number, one in enumerate(examples, 1):
                labels = [IGNORE_INDEX if label in chat.stop_tokens else label for label in one.labels[shared:]]
                row.tokens.extend(one.tokens[shared:])
                row.labels.extend(labels)
                branch += [number] * len(labels)
            rows.append([row])
            branches.append(branch)
        batch = collate(rows, range(len(rows)))
        tree = padded(branches, 0)
        logps = _token_logps(model, batch, tree).cpu().double()
        for number, (_, options) in enumerate(chunk):
            sums = torch.zeros(len(options) + 1, dtype=torch.float64).index_add_(0, tree[number], logps[number])
            found.append(sums[1:].tolist())
    return found


def pair_logps(model: Transformer, pairs: Sequence[EncodedPair], batch_size: int = 8) -> Tensor:
    """Summed log-probability of each answer, [pairs, 2] (chosen, rejected), float32 on the CPU."""
    parts = []
    at_once = max(1, batch_size // 2)  # a pair is about as long as two rows
    for start in range(0, len(pairs), at_once):
        chunk = pairs[start : start + at_once]
        batch = collate_pairs(chunk, range(len(chunk)))
        tokens = _token_logps(model, batch).cpu()
        logps = torch.zeros(2 * len(chunk), dtype=torch.float64)
        logps.index_add_(0, batch.sequences.flatten(), tokens.flatten().double())
        parts.append(logps.float().view(2, len(chunk)).T)
    return torch.cat(parts) if parts else torch.zeros(0, 2)


@dataclass(frozen=True)
class PreferenceScores:
    """What share of pairs a model gets right, and how probable it finds their answers (nats per token)."""

    pairs: int
    likelihood_accuracy: float  # chosen more probable than rejected, per token
    reward_accuracy: float | None  # chosen gained more on the reference than rejected did (DPO's implicit reward)
    chosen_logp_per_token: float
    rejected_logp_per_token: float
    values: dict[str, list[float]]  # each of these figures is the mean of its values, one for each pair


def preference_scores(logps: Tensor, pairs: Sequence[EncodedPair], reference_logps: Tensor | None) -> PreferenceScores:
    """Scores from `pair_logps` of a model and, for the reward, of the reference it was trained from."""
    if not pairs:
        raise ValueError("preference scores need at least one pair")
    counts = torch.tensor([[pair.chosen.supervised, pair.rejected.supervised] for pair in pairs])
    chosen, rejected = (logps / counts).T
    values = {"likelihood_accuracy": chosen > rejected, "chosen_logp_per_token": chosen}
    values["rejected_logp_per_token"] = rejected
    if reference_logps is not None:
        gains = logps - reference_logps
        values["reward_accuracy"] = gains[:, 0] > gains[:, 1]
    means: dict[str, Any] = {name: value.float().mean().item() for name, value in values.items()}
    return PreferenceScores(
        pairs=len(pairs), **{"reward_accuracy": None, **means},
        values={name: value.float().tolist() for name, value in values.items()},
    )  # fmt: skip


@torch.no_grad()
def _token_logps(model: Transformer, batch: Batch, branches: Tensor | None = None) -> Tensor:
    """log p(label) [B, T], 0 where there is no label, on the model's device."""
    head = model.lm_head.weight
    batch = batch.to(head.device)
    branches = batch.branches if isinstance(batch, PreferenceBatch) else branches
    branches = branches if branches is None else branches.to(head.device)
    hidden = model.hidden_states(batch.tokens, documents=batch.documents, branches=branches)
    normalize = model.config.normalize_head
    logps = linear_token_logps(hidden.flatten(0, 1), head, batch.labels.flatten(), normalize=normalize).logps
    return logps.view(batch.labels.shape)
