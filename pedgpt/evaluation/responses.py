"""Answers of a model to held-out conversations, beside what should have been said."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pedgpt.data.chat import ChatFormat
from pedgpt.data.examples import encode_prompt
from pedgpt.data.records import Conversation, Message
from pedgpt.models.generation import generate
from pedgpt.models.transformer import Transformer

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One assistant turn to be written: the true conversation before it, and the true answer."""

    history: tuple[Message, ...]
    reference: str


def items(conversations: Sequence[Conversation], limit: int) -> list[Item]:
    """Every assistant turn of every conversation, thinned evenly to at most `limit`.

    An answer without a letter or digit ("...") cannot be scored by words and is left out.
    """
    found = [
        Item(conversation.messages[:i], message.content)
        for conversation in conversations
        for i, message in enumerate(conversation.messages)
        if message.role == "assistant" and any(map(str.isalnum, message.content))
    ]
    return thin(found, limit)


def thin(rows: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of the rows, evenly spread."""
    count = min(limit, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def answer(
    model: Transformer,
    chat: ChatFormat,
    questions: Sequence[Item],
    *,
    max_new_tokens: int,
    max_thinking_tokens: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """The model's greedy answers, in order; prompts of like length are decoded together.

    Reasoning is not part of an answer. Where the format asks for reasoning, the model may write `max_thinking_tokens`
    more, as far as its window reaches, and the answer after it is cut to `max_new_tokens`. Reasoning that does not end
    gives an empty answer.
    """
    prompts = [encode_prompt(question.history, chat) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    unfinished = 0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        window = model.config.max_position_embeddings - len(prompts[chosen[-1]])  # of the longest prompt
        room = max(max_new_tokens, min(max_new_tokens + max_thinking_tokens, window)) if chat.thinks else max_new_tokens
        outputs = generate(model, [prompts[i] for i in chosen], max_new_tokens=room, stop_tokens=chat.stop_tokens)
        for i, ids in zip(chosen, outputs, strict=True):
            message = chat.read_answer(chat.tokenizer.decode(ids))
            answers[i] = message.content
            unfinished += bool(message.reasoning and not message.content)
            if room > max_new_tokens:
                cut = chat.tokenizer.encode(answers[i])[:max_new_tokens]
                answers[i] = chat.tokenizer.decode(cut).strip()
    if unfinished:
        more = "raise max_thinking_tokens" if chat.thinks else "set enable_thinking, which gives it max_thinking_tokens"
        warnings.warn(
            f"{unfinished} of {len(answers)} answers are empty: their reasoning did not end; {more}", stacklevel=2
        )
    return answers
