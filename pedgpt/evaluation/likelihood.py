"""Held-out likelihood: perplexity of text and answers, and which answer of a pair a model prefers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pedgpt.data.packing import Batch, Row, collate
from pedgpt.data.preference import EncodedPair, PreferenceBatch, collate_pairs
from pedgpt.kernels import linear_token_logps
from pedgpt.models.transformer import Transformer


def perplexity(model: Transformer, rows: Sequence[Row], batch_size: int = 8) -> float:
    """exp of the mean negative log-likelihood per supervised token; ValueError if there is no such token."""
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        batch = collate(chunk, range(len(chunk)))
        total -= _token_logps(model, batch).double().sum().item()
        count += batch.weight
    if not count:
        raise ValueError("perplexity needs at least one supervised token")
    return math.exp(total / count)


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


def preference_scores(logps: Tensor, pairs: Sequence[EncodedPair], reference_logps: Tensor | None) -> PreferenceScores:
    """Scores from `pair_logps` of a model and, for the reward, of the reference it was trained from."""
    if not pairs:
        raise ValueError("preference scores need at least one pair")
    counts = torch.tensor([[pair.chosen.supervised, pair.rejected.supervised] for pair in pairs])
    per_token = logps / counts
    rewarded = None
    if reference_logps is not None:
        gains = logps - reference_logps
        rewarded = (gains[:, 0] > gains[:, 1]).float().mean().item()
    return PreferenceScores(
        pairs=len(pairs),
        likelihood_accuracy=(per_token[:, 0] > per_token[:, 1]).float().mean().item(),
        reward_accuracy=rewarded,
        chosen_logp_per_token=per_token[:, 0].mean().item(),
        rejected_logp_per_token=per_token[:, 1].mean().item(),
    )


@torch.no_grad()
def _token_logps(model: Transformer, batch: Batch) -> Tensor:
    """log p(label) [B, T], 0 where there is no label, on the model's device."""
    head = model.lm_head.weight
    batch = batch.to(head.device)
    branches = batch.branches if isinstance(batch, PreferenceBatch) else None
    hidden = model.hidden_states(batch.tokens, documents=batch.documents, branches=branches)
    normalize = model.config.normalize_head
    logps = linear_token_logps(hidden.flatten(0, 1), head, batch.labels.flatten(), normalize=normalize).logps
    return logps.view(batch.labels.shape)
