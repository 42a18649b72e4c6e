"""What is learnt from a conversation: tokens with aligned labels, cut to a row where they are too long."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pedgpt.data.chat import IGNORE_INDEX, ChatFormat
from pedgpt.data.records import Conversation, Message


@dataclass(frozen=True, slots=True)
class Example:
    """Aligned training data: `labels[t]` is the token that position t predicts, −100 where there is no loss."""

    tokens: list[int]
    labels: list[int]
    source: str = ""

    @property
    def supervised(self) -> int:
        """How many positions carry loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def encode_conversation(
    messages: Sequence[Message], chat: ChatFormat, *, last_only: bool = False, source: str = ""
) -> Example:
    """Tokens and aligned labels of a conversation, with loss on every assistant message, or on the last one only.

    A message whose `loss` is false never carries loss. Neither does an earlier answer with reasoning, because its
    reasoning is left out here: `lessons` gives it a separate example. Raises ValueError naming `source` if the format
    cannot write the conversation.
    """
    messages = _as_thought(messages, chat)
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    taught = [i for i in answers if i == answers[-1] or not (last_only or messages[i].reasoning)]
    supervised = {i for i in taught if messages[i].loss}
    try:
        tokens, targets = chat.render(messages, supervised, generation_prompt=False)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None
    return Example(tokens[:-1], targets[1:], source)


def lessons(conversation: Conversation, chat: ChatFormat) -> list[Conversation]:
    """The examples that teach a conversation, so that each reasoning is learnt once and no history holds any.

    For each earlier answer with reasoning there is the part that ends with it, with loss on this answer only. Then
    comes the whole conversation, if another answer carries loss.
    """
    messages = conversation.messages
    own = [i for i, m in enumerate(messages[:-1]) if m.role == "assistant" and m.reasoning and m.loss]
    if chat.enable_thinking is False or not own:
        return [conversation]
    silent = tuple(replace(m, loss=m.loss and m.role != "assistant") for m in messages)
    parts = [replace(conversation, messages=(*silent[:i], messages[i])) for i in own]
    rest = any(m.role == "assistant" and m.loss for i, m in enumerate(messages) if i not in own)
    return [*parts, conversation] if rest else parts


def encode_prompt(messages: Sequence[Message], chat: ChatFormat) -> list[int]:
    """Tokens after which the model writes the next assistant message."""
    return chat.render(_as_thought(messages, chat), set(), generation_prompt=True)[0]


def encode_shortened(
    prompt: Sequence[Message], answers: Sequence[Message], chat: ChatFormat, row_length: int, *, last_only: bool = False
) -> list[Example]:
    """One prompt with each of its answers, as in `encode_conversation`, but cut to `row_length` tokens.

    The prompt loses its oldest turns and, where that is not enough, the beginning of its last question; its system text
    stays. An answer keeps at least half a row. A longer one is cut, and the cut is not taught as the end of an answer.
    Raises ValueError if that leaves nothing to learn.
    """
    system = list(prompt[:1]) if prompt[0].role == "system" else []
    turns = prompt[len(system) :]

    def encoded(turns: Sequence[Message]) -> list[Example]:
        return [encode_conversation([*system, *turns, answer], chat, last_only=last_only) for answer in answers]

    def longest(turns: Sequence[Message]) -> int:
        return max(len(example.tokens) for example in encoded(turns))

    starts = range(0, len(turns) - 1, 2)
    first = bisect_left(starts, True, key=lambda start: longest(turns[start:]) <= row_length)
    turns = turns[2 * first :]
    if first == len(starts) and (size := longest(turns)) > row_length:
        (question,) = turns

        def asked(start: int) -> list[Message]:
            return [*system, replace(question, content=question.content[start:])]

        room = row_length - min(size - len(encode_prompt(asked(0), chat)), row_length // 2)
        cuts = range(len(question.content))
        cut = bisect_left(cuts, True, key=lambda start: len(encode_prompt(asked(start), chat)) <= room)
        if cut == len(cuts):
            raise ValueError("no question has room beside its system text and half a row of answer")
        turns = asked(cut)[len(system) :]
    whole = encoded(turns)
    for example, answer in zip(whole, answers, strict=True):
        said = len(chat.tokenizer.encode(answer.content)) if answer.reasoning else 0
        if said and len(example.tokens) - said >= row_length:
            raise ValueError("its reasoning leaves no room for the answer")
    examples = [Example(one.tokens[:row_length], one.labels[:row_length], one.source) for one in whole]
    if not all(example.supervised for example in examples):
        raise ValueError("nothing to learn would be left")
    return examples


def _as_thought(messages: Sequence[Message], chat: ChatFormat) -> Sequence[Message]:
    """The messages, without reasoning where thinking is off."""
    return [replace(m, reasoning="") for m in messages] if chat.enable_thinking is False else messages
