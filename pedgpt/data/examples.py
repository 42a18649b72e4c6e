"""What is learnt from a row: tokens with aligned labels, cut where they are too long, and a report of what is not."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pedgpt.data.chat import IGNORE_INDEX, ChatFormat
from pedgpt.data.records import Conversation, Message, PreferencePair, ReadSummary

Messages = Sequence[Message]
Rows = Iterable[Conversation | PreferencePair]


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


def document_stream(ids: Sequence[int], eos_id: int | None, prefix: Sequence[int] = ()) -> list[int]:
    """The ids of a text between `prefix`, unless it begins with that already or is empty, and its end."""
    stream = [*ids, eos_id] if eos_id is not None else list(ids)
    return [*prefix, *stream] if ids and stream[: len(prefix)] != list(prefix) else stream


def encode_document(
    ids: Sequence[int], eos_id: int | None, row_length: int, source: str = "", prefix: Sequence[int] = ()
) -> list[Example]:
    """A running text as examples of up to `row_length` tokens, in which each token but the first is predicted once.

    The end of the text is predicted too. `prefix` is a tokenizer's `document_prefix`.
    """
    stream = document_stream(ids, eos_id, prefix)
    pieces = (stream[start : start + row_length + 1] for start in range(0, len(stream) - 1, row_length))
    return [Example(piece[:-1], piece[1:], source) for piece in pieces]


def encode_conversation(messages: Messages, chat: ChatFormat, *, last_only: bool = False, source: str = "") -> Example:
    """Tokens and aligned labels of a conversation, with loss on every assistant message, or on the last one only.

    A message whose `loss` is false never carries loss. Neither does an earlier answer with reasoning, because its
    reasoning is left out here: `lessons` gives it a separate example. Raises ValueError naming `source` if the format
    cannot write the conversation.
    """
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    without = [i for i in answers[:-1] if last_only or (messages[i].reasoning and chat.enable_thinking is not False)]
    supervised = {i for i in answers if messages[i].loss}.difference(without)
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


def encode_prompt(messages: Messages, chat: ChatFormat) -> list[int]:
    """Tokens after which the model writes the next assistant message."""
    return chat.render(messages, set(), generation_prompt=True)[0]


def encode_rows(
    rows: Rows, chat: ChatFormat, row_length: int, on_bad_row: str, summary: ReadSummary, on_long_row: str = "error"
) -> Iterator[list[Example]]:
    """The examples of each row: chosen and rejected of a pair; of a conversation one for each of its `lessons`.

    A row that the chat format cannot write is a bad row: an error, or left out and counted in `summary`. For those
    longer than `row_length`, `on_long_row` decides: "error" raises one ValueError about all of them after the last row,
    "skip" leaves them out and counts them, "truncate" cuts their end off and counts them, but leaves a row out if
    nothing would be left to learn.
    """
    if on_long_row not in ("error", "skip", "truncate"):
        raise ValueError(f'on_long_row is {on_long_row!r}, expected "error", "skip" or "truncate"')
    long: list[tuple[int, str]] = []
    for row in rows:
        try:
            if isinstance(row, PreferencePair):
                both = [(*row.prompt, Message("assistant", answer)) for answer in (row.chosen, row.rejected)]
                encoded = [[encode_conversation(talk, chat, last_only=True, source=row.source) for talk in both]]
            else:
                talks = [part.messages for part in lessons(row, chat)]
                encoded = [[encode_conversation(talk, chat, source=row.source)] for talk in talks]
        except ValueError as error:
            if on_bad_row == "error":
                raise ValueError(f'{error}; fix it, or set on_bad_row = "skip"') from None
            summary.drop(row.source, str(error).removeprefix(f"{row.source}: "))
            continue
        for examples in encoded:
            size = max(len(one.tokens) for one in examples)
            if size <= row_length:
                yield examples
                continue
            cut = [Example(one.tokens[:row_length], one.labels[:row_length], one.source) for one in examples]
            if on_long_row == "error":
                long.append((size, row.source))
            elif on_long_row == "truncate" and all(one.supervised for one in cut):
                summary.shortened.append(row.source)
                yield cut
            else:
                summary.drop(row.source, f"over-long: {size} tokens do not fit a row of {row_length}")
    if long:
        found = f"over-long: {max(long)[0]} tokens do not fit a row of {row_length} ({len(long)} such rows)"
        raise ValueError(f'{long[0][1]}: {found}; raise row_length, or set on_long_row = "skip" or "truncate"')


def encode_conversations(*arguments: Any, **settings: Any) -> list[Example]:
    """All that `encode_rows` gives of conversations."""
    return [example for (example,) in encode_rows(*arguments, **settings)]
