"""What a builder gives: rows, and rows that it left out with the reason."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any, Protocol, TypeVar

from pedgpt.data.records import Conversation, Document, Message, PreferencePair, Record
from pedgpt.endpoint import Unusable as Unusable  # builders take it from here

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Built:
    """A row for the corpus; `record.source` says where it came from, `details` what a reader may want to know of it.

    `details` is JSON: how well a passage supports the answer, the versions that came before.
    """

    record: Record
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row left out. `reason` is a fixed phrase, by which such rows are counted; `detail` what was found."""

    source: str
    reason: str
    detail: str = ""


class Ask(Protocol):
    """A teacher: chat messages in, the wanted fields of its JSON answer out; raises Unusable if none is usable."""

    def __call__(self, system: str, user: str, fields: Mapping[str, type]) -> dict[str, Any]: ...


def texts(record: Record) -> list[str]:
    """All texts of a record, in order; an answer includes its reasoning, and a title does not count."""
    if isinstance(record, Document):
        return [record.text]
    if isinstance(record, Conversation):
        return [message.written for message in record.messages]
    return [*(message.written for message in record.prompt), record.chosen, record.rejected]


def map_texts(record: Record, change: Callable[[str], str]) -> Record:
    """The record with each of its texts changed, the title and the reasoning included."""

    def changed(message: Message) -> Message:
        reasoning = change(message.reasoning) if message.reasoning else ""
        return replace(message, content=change(message.content), reasoning=reasoning)

    if isinstance(record, Document):
        return replace(record, text=change(record.text), title=change(record.title))
    if isinstance(record, Conversation):
        return replace(record, messages=tuple(changed(message) for message in record.messages))
    prompt = tuple(changed(message) for message in record.prompt)
    return replace(record, prompt=prompt, chosen=change(record.chosen), rejected=change(record.rejected))


def question(record: Record) -> str:
    """What a record is asked: a conversation's first user message, a pair's last; a document's title or text."""
    if isinstance(record, Document):
        return record.title or record.text
    if isinstance(record, PreferencePair):
        return record.prompt[-1].content
    return next(message.content for message in record.messages if message.role == "user")


@cache
def templates(name: str) -> dict[str, Any]:
    """The phrasings and word lists of templates/`name`.toml."""
    return tomllib.loads(files("pedgpt.corpus").joinpath(f"templates/{name}.toml").read_text(encoding="utf-8"))


def number(*names: str) -> int:
    """The same for the same names, on any machine."""
    return int.from_bytes(hashlib.sha256("/".join(names).encode()).digest()[:8], "big")


def pick(forms: Sequence[T], *names: str) -> T:
    """One of several forms, the same for the same names."""
    return forms[number(*names) % len(forms)]
