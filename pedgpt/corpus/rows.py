"""What a builder gives: rows, and rows that it left out with the reason; and what all builders share."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from importlib.resources import files
from typing import Any, TypeVar

from pedgpt.data.records import Conversation, Document, Message, PreferencePair, Record
from pedgpt.endpoint import Unusable as Unusable  # builders take it from here

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Built:
    """A row for the corpus; `record.source` says where it came from."""

    record: Record
    details: dict[str, Any] = field(default_factory=dict)  # JSON: how well a passage supports it, earlier versions


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row left out."""

    source: str
    reason: str  # a fixed phrase, by which such rows are counted
    detail: str = ""  # what was found


Row = Built | Dropped
# A teacher: chat messages and the wanted fields in, those of its JSON answer out, of their types and the first one not
# blank; raises Unusable if there are none.
Ask = Callable[[str, str, Mapping[str, type]], dict[str, Any]]


class LeftOut(Exception):
    """Raised by a builder that leaves its row out, with the reason and the detail of `Dropped`."""


def builder(build: Callable[..., Built | None]) -> Callable[..., Iterator[Row]]:
    """A builder of one row: it yields what `build` returns, or the Dropped row of the LeftOut or Unusable raised."""

    @wraps(build)
    def rows(record: Record, /, *args: Any, **kwargs: Any) -> Iterator[Row]:
        try:
            row = build(record, *args, **kwargs)
            yield from [row] if row else []
        except Unusable as error:
            yield Dropped(record.source, "teacher's answer was unusable", str(error))
        except LeftOut as left_out:
            yield Dropped(record.source, *left_out.args)

    return rows


def answered(ask: Ask, prompts: Mapping[str, str], fields: Mapping[str, type], **values: str) -> dict[str, Any]:
    """A teacher's answer to `prompts` filled with `values`."""
    return ask(prompts["system"].format(**values), prompts["user"].format(**values), fields)


def spoken(*turns: str, source: str, task: str, disease: str = "", department: str = "") -> Conversation:
    """A conversation of these turns; the user begins."""
    messages = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns))
    return Conversation(messages, source, task, disease, department)


def turns(record: Record) -> tuple[Message, ...]:
    """The messages of a conversation, or of a pair's prompt; running text has none."""
    if isinstance(record, Document):
        return ()
    return record.prompt if isinstance(record, PreferencePair) else record.messages


def asked(record: Record) -> list[str]:
    """What the user says, turn by turn."""
    return [message.content for message in turns(record) if message.role == "user"]


def answers(record: Record) -> list[str]:
    """What is learnt: the doctor's turns of a conversation, both replies of a pair, or the whole text."""
    if isinstance(record, Conversation):
        return [message.content for message in record.messages if message.role == "assistant"]
    return [record.text] if isinstance(record, Document) else [record.chosen, record.rejected]


def texts(record: Record) -> list[str]:
    """All texts of a record, in order; an answer includes its reasoning, and a title does not count."""
    written = [message.written for message in turns(record)]
    return written if isinstance(record, Conversation) else written + answers(record)


def question(record: Record) -> str:
    """What a record is asked: a conversation's first user message, a pair's last; a document's title or text."""
    if isinstance(record, Document):
        return record.title or record.text
    return asked(record)[-1 if isinstance(record, PreferencePair) else 0]


def map_texts(record: Record, change: Callable[[str], str]) -> Record:
    """The record with each of its texts changed; titles, reasoning, diseases and departments are texts, too."""

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return change(value) if value else ""
        return tuple(replace(turn, content=change(turn.content), reasoning=changed(turn.reasoning)) for turn in value)

    names = ("text", "title", "messages", "prompt", "chosen", "rejected", "disease", "department")
    return replace(record, **{name: changed(getattr(record, name)) for name in names if hasattr(record, name)})


@cache
def templates(name: str) -> dict[str, Any]:
    """The phrasings and word lists of templates/`name`.toml."""
    return tomllib.loads(files("pedgpt.corpus").joinpath(f"templates/{name}.toml").read_text(encoding="utf-8"))


@cache
def pattern(name: str, key: str) -> re.Pattern[str]:
    """The regular expression `key` of templates/`name`.toml; a list there holds alternatives."""
    found = templates(name)[key]
    return re.compile(found if isinstance(found, str) else "|".join(found))


def rewritten(text: str, changes: Iterable[Sequence[str]]) -> str:
    """The text with each pattern of `changes` replaced by what stands beside it, one after another."""
    for form, replacement in changes:
        text = re.sub(form, replacement, text)
    return text


def either(words: Iterable[str]) -> str:
    """A regular expression of plain words, of which the longest that fits is taken."""
    return "|".join(map(re.escape, sorted(set(words), key=lambda word: (-len(word), word))))


def number(*names: str) -> int:
    """The same for the same names, on any machine."""
    return int.from_bytes(hashlib.sha256("/".join(names).encode()).digest()[:8], "big")


def pick(forms: Sequence[T], *names: str) -> T:
    """One of several forms, the same for the same names."""
    return forms[number(*names) % len(forms)]
