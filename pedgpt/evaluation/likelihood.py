"""Likelihood: how probable a model finds documents, the answers of preference pairs, and the options of a question."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pedgpt.data.chat import IGNORE_INDEX, ChatFormat
from pedgpt.data.examples import Example, Messages, encode_conversation
from pedgpt.data.packing import Batch, Row, collate, padded
from pedgpt.data.preference import EncodedPair, collate_pairs
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
        sums = _summed_logps(model, batch, numbers, count * len(chunk))
        counts = torch.bincount(numbers[batch.labels != IGNORE_INDEX], minlength=len(sums))
        found.append(torch.stack([-sums, counts], -1)[counts > 0])
    return torch.cat(found)


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
            tokens, labels, branch = examples[0].tokens[:shared], [IGNORE_INDEX] * shared, [0] * shared
            for number, one in enumerate(examples, 1):
                tokens += one.tokens[shared:]
                labels += [IGNORE_INDEX if label in chat.stop_tokens else label for label in one.labels[shared:]]
                branch += [number] * (len(tokens) - len(branch))
            rows.append([Example(tokens, labels)])
            branches.append(branch)
        batch = collate(rows, range(len(rows)))
        tree = padded(branches, 0)
        most = int(tree.max()) + 1
        numbers = tree + most * torch.arange(len(rows))[:, None]
        sums = _summed_logps(model, batch, numbers, most * len(rows), tree).view(-1, most)
        found += [row[1 : len(options) + 1].tolist() for row, (_, options) in zip(sums, chunk, strict=True)]
    return found


def pair_logps(model: Transformer, pairs: Sequence[EncodedPair], batch_size: int = 8) -> Tensor:
    """Summed log-probability of each answer, [pairs, 2] (chosen, rejected), float32 on the CPU."""
    parts = [torch.zeros(0, 2)]
    at_once = max(1, batch_size // 2)  # a pair is about as long as two rows
    for start in range(0, len(pairs), at_once):
        chunk = pairs[start : start + at_once]
        batch = collate_pairs(chunk, range(len(chunk)))
        sums = _summed_logps(model, batch, batch.sequences, 2 * len(chunk), batch.branches)
        parts.append(sums.float().view(2, -1).T)
    return torch.cat(parts)


def preference_values(
    logps: Tensor, pairs: Sequence[EncodedPair], reference_logps: Tensor | None
) -> dict[str, list[float]]:
    """Whether each pair is right, and how probable its answers are a token (nats), from `pair_logps`.

    By likelihood it is right if the chosen answer is the more probable one per token; by reward, where there are
    `pair_logps` of the reference that the model was trained from, if it gained more on that (DPO's implicit reward).
    """
    counts = torch.tensor([[pair.chosen.supervised, pair.rejected.supervised] for pair in pairs])
    chosen, rejected = (logps / counts).T
    values = {"likelihood_accuracy": chosen > rejected, "chosen_logp_per_token": chosen}
    values["rejected_logp_per_token"] = rejected
    if reference_logps is not None:
        gains = logps - reference_logps
        values["reward_accuracy"] = gains[:, 0] > gains[:, 1]
    return {name: value.float().tolist() for name, value in values.items()}


@torch.no_grad()
def _summed_logps(
    model: Transformer, batch: Batch, groups: Tensor, count: int, branches: Tensor | None = None
) -> Tensor:
    """Σ log p(label) over the labels of each of `count` groups, float64 on the CPU; `groups` [B, T] numbers them."""
    head = model.lm_head.weight
    batch, branches = batch.to(head.device), branches if branches is None else branches.to(head.device)
    hidden = model.hidden_states(batch.tokens, documents=batch.documents, branches=branches)
    normalize = model.config.normalize_head
    logps = linear_token_logps(hidden.flatten(0, 1), head, batch.labels.flatten(), normalize=normalize).logps
    return torch.zeros(count, dtype=torch.float64).index_add_(0, groups.flatten(), logps.cpu().double())
