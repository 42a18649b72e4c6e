"""Conversations as tokens, with a loss mask that is exact because it is made segment by segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pedgpt.data.records import Message
from pedgpt.data.tokenizer import Tokenizer

IGNORE_INDEX = -100


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


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens; `targets` are what the model should have predicted at each of them, −100 for nothing."""

    tokens: list[int]
    targets: list[int]


class ChatFormat:
    """How a family writes roles. `render` gives segments, `stop_tokens` what ends an answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_tokens: tuple[int, ...] = ()

    def render(self, messages: Sequence[Message], supervised: set[int], generation_prompt: bool) -> list[Segment]:
        """Segments of `messages`; loss falls on the assistant messages whose indices are in `supervised`."""
        raise NotImplementedError


class Baichuan2Chat(ChatFormat):
    """`195 user 196 answer 195 user 196 answer 2`; a system text stands first, bare; no bos.

    As in the vendor's fine-tuning the target at the user token after an answer is eos, so every answer learns to stop
    although no eos stands between turns in the input.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.user, self.assistant = tokenizer.token_id("<reserved_106>"), tokenizer.token_id("<reserved_107>")
        if tokenizer.eos_id is None:
            raise ValueError("Baichuan2's chat format needs an eos_token in tokenizer_config.json")
        self.eos = tokenizer.eos_id
        # Generation may also run into the next user turn.
        self.stop_tokens = (self.eos, self.user)

    def render(self, messages: Sequence[Message], supervised: set[int], generation_prompt: bool) -> list[Segment]:
        segments = []
        for i, message in enumerate(messages):
            ids = self.tokenizer.encode(message.content)
            after_answer = self.eos if i - 1 in supervised else IGNORE_INDEX
            if message.role == "system":
                segments.append(_silent(ids))
            elif message.role == "user":
                segments.append(Segment([self.user], [after_answer]))
                segments.append(_silent(ids))
            else:
                segments.append(_silent([self.assistant]))
                segments.append(_spoken(ids) if i in supervised else _silent(ids))
        if generation_prompt:
            segments.append(_silent([self.assistant]))
        elif messages and messages[-1].role == "assistant":
            segments.append(Segment([self.eos], [self.eos if len(messages) - 1 in supervised else IGNORE_INDEX]))
        return segments


class ChatML(ChatFormat):
    """`<|im_start|>role\\n…<|im_end|>\\n`; the `<|im_end|>` after an answer carries loss, the line break does not."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.start, self.end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
        others = {tokenizer.eos_id} - {None, self.end}
        self.stop_tokens = (self.end, *(t for t in others if t is not None))

    def render(self, messages: Sequence[Message], supervised: set[int], generation_prompt: bool) -> list[Segment]:
        newline = self.tokenizer.encode("\n")
        segments = []
        for i, message in enumerate(messages):
            segments.append(_silent([self.start, *self.tokenizer.encode(f"{message.role}\n")]))
            body = [*self.tokenizer.encode(message.content), self.end]
            segments.append(_spoken(body) if i in supervised else _silent(body))
            segments.append(_silent(newline))
        if generation_prompt:
            segments.append(_silent([self.start, *self.tokenizer.encode("assistant\n")]))
        return segments


def chat_format(tokenizer: Tokenizer, name: str = "auto") -> ChatFormat:
    """The format called "baichuan2" or "chatml", or with "auto" the one whose role tokens the tokenizer has."""
    if name == "baichuan2" or (name == "auto" and tokenizer.has("<reserved_106>", "<reserved_107>")):
        return Baichuan2Chat(tokenizer)
    if name == "chatml" or (name == "auto" and tokenizer.has("<|im_start|>", "<|im_end|>")):
        return ChatML(tokenizer)
    if name == "auto":
        raise ValueError("the tokenizer has neither <reserved_106> nor <|im_start|>: its chat format is not supported")
    raise ValueError(f'chat_format {name!r} is unknown; expected "auto", "baichuan2" or "chatml"')


def encode_conversation(
    messages: Sequence[Message], chat: ChatFormat, *, last_only: bool = False, source: str = ""
) -> Example:
    """Tokens and aligned labels of a conversation, with loss on every assistant message, or on the last one only."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    segments = chat.render(messages, set(answers[-1:] if last_only else answers), generation_prompt=False)
    tokens = [token for segment in segments for token in segment.tokens]
    targets = [target for segment in segments for target in segment.targets]
    return Example(tokens[:-1], targets[1:], source)


def encode_prompt(messages: Sequence[Message], chat: ChatFormat) -> list[int]:
    """Tokens after which the model writes the next assistant message."""
    segments = chat.render(messages, set(), generation_prompt=True)
    return [token for segment in segments for token in segment.tokens]


def _silent(ids: list[int]) -> Segment:
    return Segment(ids, [IGNORE_INDEX] * len(ids))


def _spoken(ids: list[int]) -> Segment:
    return Segment(ids, ids)
