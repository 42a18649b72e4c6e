"""The records of every input format, and how a row of a file becomes one: names of fields, roles, reasoning, loss.

A row is a mapping of names to values, as `tables.py` reads it from any format. A field that is null counts as missing.
A row that cannot be used raises `Unfit` with the reason.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count, islice, takewhile, zip_longest
from typing import Any, TypeVar

from pedgpt.data.tables import Unfit, not_utf8

Row = dict[str, Any]
T = TypeVar("T")
Columns = Mapping[str, str] | None
Parser = Callable[[Row, str, int | None], T]  # fields, source, max_characters

# Of several names, the first that a row has is used. raw_anwser is how the CMD cases spell it.
QUESTIONS = ("question", "ask", "instruction", "prompt", "query", "问题", "提问")
ANSWERS = ("answer", "output", "response", "completion", "raw_anwser", "回答", "答复", "答案")
CHOSEN = ("chosen", "response_chosen", "chosen_response")
REJECTED = ("rejected", "response_rejected", "rejected_response")
DEPARTMENTS = ("department", "cate1", "科室")
REASONING = ("reasoning_content", "complex_cot")  # the latter in HuatuoGPT-o1's data
TURNS = ("conversations", "conversation", "messages")
OPTIONS = ("option", "options", "choices", "选项")
LETTERS = tuple("abcdefgh")  # the columns of an exam's options in tables like CMMLU's
UNDESIRABLE = ("label", "kto_tag")  # one of BAD: an answer that somebody judged to be bad
BAD = ("false", "0", "0.0", "-1", "no", "bad", "undesirable", "rejected", "否", "差")
USERS = ("user", "human", "patient", "患者", "病人", "用户")
ASSISTANTS = ("assistant", "gpt", "chatgpt", "bot", "model", "doctor", "医生", "大夫", "助手")
ROLES = {"system": "system"} | dict.fromkeys(USERS, "user") | dict.fromkeys(ASSISTANTS, "assistant")
# What a reader takes a field for, in the order in which people are told; "" is the field's name itself.
MEANINGS = (
    dict.fromkeys(TURNS, "turns")
    | {"history": "earlier turns"}
    | dict.fromkeys(QUESTIONS, "user")
    | dict.fromkeys(("input", *OPTIONS, *LETTERS), "user, below it")
    | dict.fromkeys(ANSWERS, "assistant")
    | dict.fromkeys(CHOSEN, "chosen")
    | dict.fromkeys(REJECTED, "rejected")
    | dict.fromkeys(("head", "relation", "tail", "text", "title", "task"), "")
    | dict.fromkeys(REASONING, "reasoning")
    | dict.fromkeys(UNDESIRABLE, "left out where false")
    | {"system": "", "disease": ""}
    | dict.fromkeys(DEPARTMENTS, "department")
)
# The fields that `columns` may name, by kind.
_TALK = ("messages", "question", "input", "history", "system", "options", "department", "disease")
FIELDS = {
    "documents": ("text", "title", "department", "disease"),
    "conversations": (*_TALK, "answer", "task", "label"),
    "preferences": (*_TALK, "prompt", "chosen", "rejected"),
    "triples": ("head", "relation", "tail"),
}
# A row with one of these fields is meant to be of this kind, even if other fields are missing.
KEYS = {
    "documents": ("text",),
    "conversations": (*QUESTIONS, *ANSWERS, *TURNS),
    "preferences": ("prompt", *CHOSEN, *REJECTED),
    "triples": FIELDS["triples"],
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant".

    `loss` says whether an assistant's message is learnt from; on other roles, which never carry loss, it means nothing.
    `reasoning` is what an assistant thought before its answer; a `<think>…</think>` at the beginning of the content
    is moved there.
    """

    role: str
    content: str
    loss: bool = True
    reasoning: str = ""

    def __post_init__(self) -> None:
        if self.role == "assistant" and (self.reasoning or "</think>" in self.content):
            reasoning, answer = split_thought(self.content)
            object.__setattr__(self, "reasoning", self.reasoning.strip("\n") or reasoning)
            object.__setattr__(self, "content", answer)

    @property
    def written(self) -> str:
        """What a model writes: the reasoning, if there is any, between its tags, and then the answer."""
        return f"<think>\n{self.reasoning}\n</think>\n\n{self.content}" if self.reasoning else self.content


@dataclass(frozen=True, slots=True)
class Document:
    """Running text; `source` is "file:line", or "file" for a .txt or .md."""

    text: str
    source: str
    title: str = ""
    disease: str = ""
    department: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant in turn, the assistant last; `source` is "file:line"."""

    messages: tuple[Message, ...]
    source: str
    task: str = ""
    disease: str = ""
    department: str = ""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two different replies to one prompt, which ends with a user message; `source` is "file:line"."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str
    disease: str = ""
    department: str = ""


Record = Document | Conversation | PreferencePair


@dataclass(frozen=True, slots=True)
class Triple:
    """One edge of a knowledge graph; `source` is "file:line"."""

    head: str
    relation: str
    tail: str
    source: str


class LeftOut(Unfit):
    """Why a good row is not read. It is counted, and under no policy is it an error."""


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row left out; `line` counts from 1, and is 0 for a whole file."""

    file: str
    line: int
    reason: str


@dataclass(slots=True)
class ReadSummary:
    """Rows read, by file, and rows skipped; one summary may serve several readers."""

    rows: dict[str, int] = field(default_factory=dict)
    skipped: list[SkippedRow] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)  # sources of rows that were cut to fit

    def skip(self, source: str, reason: str) -> None:
        """Count one row left out; `source` is "file:line" or "file"."""
        file, _, line = source.rpartition(":")
        self.skipped.append(SkippedRow(file, int(line), reason) if line.isdecimal() else SkippedRow(source, 0, reason))

    def drop(self, source: str, reason: str) -> None:
        """Move a row that was read already to those left out."""
        self.skip(source, reason)
        file = self.skipped[-1].file
        if self.rows.get(file):
            self.rows[file] -= 1

    def describe(self) -> str:
        """A table "file  rows  skipped", then each fault with its count and first three places."""
        skipped = dict.fromkeys(self.rows, 0)
        faults: dict[str, list[str]] = {}
        for row in self.skipped:
            if row.line:
                skipped[row.file] = skipped.get(row.file, 0) + 1
            # A reason begins with its fault; what follows the colon differs from row to row.
            fault, place = row.reason.partition(":")[0], f"{row.file}:{row.line}" if row.line else row.file
            faults.setdefault(fault, []).append(place)
        width = max(map(len, ("file", *skipped)))
        lines = [f"{'file':{width}}  {'rows':>9}  {'skipped':>9}"]
        lines += [f"{file:{width}}  {self.rows.get(file, 0):9}  {count:9}" for file, count in skipped.items()]
        for fault, places in faults.items():
            what = fault if fault.startswith("left out") else f"skipped, {fault}"
            lines.append(f"{len(places)} {what}: {', '.join(places[:3])}{', ...' * (len(places) > 3)}")
        if cut := self.shortened:
            lines.append(f"{len(cut)} over-long, cut to fit: {', '.join(cut[:3])}{', ...' * (len(cut) > 3)}")
        return "\n".join(lines)


def split_thought(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a text `<think>reasoning</think>answer`, whose first tag may be missing; else ("", text).

    Line breaks around both are removed.
    """
    thought, closed, answer = text.partition("</think>")
    thought = thought.strip("\n").removeprefix("<think>").strip("\n")
    return (thought, answer.lstrip("\n")) if closed and "<think>" not in thought else ("", text)


def _check_length(limit: int | None, *texts: str) -> None:
    if limit is not None and (length := sum(map(len, texts))) > limit:
        raise Unfit("over-long", f"{length} characters", f"at most {limit}", "split the row or raise max_characters")


def _typed(value: object, kind: type[T], name: str) -> T:
    if isinstance(value, kind):
        return value
    raise Unfit(f"{name} has the wrong type", "null" if value is None else type(value).__name__, kind.__name__)


def fields_of(row: object, columns: Columns = None) -> Row:
    """A row without nulls and NaNs, by names in lower case; `columns` says which of its columns hold which fields."""
    if isinstance(row, Unfit):
        raise row
    found = _typed(row, dict, "the row")
    columns = columns if columns and not found.keys().isdisjoint(columns.values()) else {}
    for column in columns.values():
        _field(found, [column], f"{column}, which `columns` names")
    found = {k: v for k, v in found.items() if v is not None and v == v}  # pandas writes NaN for an empty cell
    named = {name: found[column] for name, column in columns.items() if column in found}
    taken = set(columns.values())
    return {k.strip().lower(): v for k, v in found.items() if k not in taken} | named


def _field(row: Row, names: Iterable[str], expected: str) -> str:
    if (name := next((name for name in names if name in row), None)) is not None:
        return name
    fix = "rename or add the field, or name it by `columns`"
    raise Unfit("missing field", f"the keys {some(row)}", expected, fix)


def some(names: Iterable[str]) -> str:
    """Names for a message, the first 20: an object by id may have thousands."""
    first = list(islice(names, 21))
    return ", ".join([*first[:20], *["…"] * (len(first) > 20)]) or "(none)"


def _text(row: Row, name: str, *, optional: bool = False) -> str:
    if optional and row.get(name) is None:
        return ""
    text = _typed(row[_field(row, [name], name)], str, name)
    if not text.strip():
        if optional:
            return ""
        raise Unfit(f"{name} is empty", repr(text), "some text")
    if unfit := not_utf8(text):  # bytes of a table or .json, or an escaped half of a pair: tokenizers stop at either
        raise unfit
    return text


def _messages(row: Row, name: str) -> list[Message]:
    messages = []
    for turn in _typed([row[name]] if isinstance(row[name], dict) else row[name], list, name):
        fields = _joined({k: v for k, v in _typed(turn, dict, f"a message of {name}").items() if v is not None})
        written = _text(fields, _field(fields, ("from", "role"), "role or from"))
        if (role := ROLES.get(written.strip(" :：").lower())) is None:
            raise Unfit("unknown role", repr(written), ", ".join(ROLES))
        # Many exports write an empty system message in every row: it says as much as none.
        content = _text(fields, _field(fields, ("value", "content"), "content or value"), optional=role == "system")
        messages += [_message(fields, role, content, _loss(fields, role))] if content else []
    return messages


def _message(fields: Row, role: str, content: str, loss: bool = True) -> Message:
    """A message; what an assistant thought stands in a field of its own, or in the content before the answer."""
    field = next((name for name in REASONING if role == "assistant" and name in fields), None)
    message = Message(role, content, loss, _text(fields, field, optional=True) if field else "")
    if not message.content.strip():
        raise Unfit("no answer after the reasoning", repr(content[-40:]), "an answer after </think>")
    return message


def _joined(fields: Row) -> Row:
    """The message; if its content is a list of parts, their texts take its place."""
    for name in ("value", "content"):
        if isinstance(parts := fields.get(name), list):
            texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
            said = [text for text in texts if isinstance(text, str)]
            if len(said) < len(texts):
                raise Unfit(f"a part of {name} is no text", json.dumps(parts)[:60], "parts with a text")
            fields = fields | {name: "\n".join(said)}
    return fields


def _loss(fields: Row, role: str) -> bool:
    flags = {}
    for key, kind, expected in (("loss", bool, "true or false"), ("weight", int, "0 or 1")):
        if key in fields:
            value = fields[key]
            if type(value) is not kind or value not in (0, 1):  # True is an int too, and 1.0 is in (0, 1)
                raise Unfit(f"{key} of a message is unusable", json.dumps(value)[:40], expected)
            flags[key] = bool(value)
    if len(set(flags.values())) > 1:
        raise Unfit("loss and weight disagree", str(flags), "one of the two")
    if role != "assistant" and any(flags.values()):
        raise Unfit(f"{next(iter(flags))} asks for loss on another's words", role, "assistant", "remove the flag")
    return role != "assistant" or all(flags.values())


def _alternating(row: Row, messages: list[Message], last: str) -> tuple[Message, ...]:
    if system := _text(row, "system", optional=True):
        messages = [Message("system", system), *messages]
    turns = [message.role for message in messages]
    turns = turns[1:] if turns[:1] == ["system"] else turns
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise Unfit("roles do not alternate", f"{role} as turn {number + 1} after any system message", expected)
    if turns[-1:] != [last]:
        raise Unfit(f"no {last} turn at the end", turns[-1] if turns else "no turn", last)
    return tuple(messages)


def _document(row: Row, source: str, limit: int | None) -> Document:
    text = _text(row, "text")
    _check_length(limit, text)
    return Document(text, source, _text(row, "title", optional=True), *_topic(row))


def _conversation(row: Row, source: str, limit: int | None) -> Conversation:
    for name in UNDESIRABLE:
        if name in row and str(row[name]).strip().lower() in BAD:
            raise LeftOut("an answer judged bad", f"{name} {row[name]}", "true or 1", "its pair may teach DFPO")
    turns = next((name for name in TURNS if row.get(name)), None)
    if not turns and row.keys().isdisjoint(QUESTIONS):
        turns = next((name for name in TURNS if name in row), None)
    messages = _alternating(row, _messages(row, turns) if turns else _question_and_answer(row), "assistant")
    if not any(message.loss for message in messages if message.role == "assistant"):
        raise Unfit("nothing carries loss", "loss false on every assistant message", "one that is learnt from")
    _check_length(limit, *(message.written for message in messages))
    task = row.get("task")
    return Conversation(messages, source, task if isinstance(task, str) else "", *_topic(row))


def _topic(row: Row) -> tuple[str, str]:
    """(disease, department) where a row names them; what is no text says nothing."""
    disease, department = row.get("disease"), next((row[name] for name in DEPARTMENTS if row.get(name)), "")
    said = [text if isinstance(text, str) and not not_utf8(text) else "" for text in (disease, department)]
    return said[0], said[1]


def _question_and_answer(row: Row) -> list[Message]:
    expected = "question and answer, instruction and output, conversations, conversation or messages"
    question, answer = _field(row, QUESTIONS, expected), _field(row, ANSWERS, expected)
    asked = _messages(row, question) if isinstance(row[question], list | dict) else _asked(row, question)
    if isinstance(row[answer], list | dict):
        return [*asked, *_messages(row, answer)]
    return [*asked, _message(row, "assistant", _text(row, answer))]


def _asked(row: Row, question: str) -> list[Message]:
    """The turns of `history`, then the question with its input and, of an exam, the options."""
    messages = []
    for pair in _typed(row.get("history") or [], list, "history"):
        if len(_typed(pair, list, "a pair of history")) != 2:
            raise Unfit("history is not in pairs", f"{len(pair)} items", "[question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(_message({}, role, _text({"history": text}, "history")))
    extra = [_text(row, question), _text(row, "input", optional=True)]
    options = _options(row)
    extra += [] if all(option in extra[0] for option in options) else options
    return [*messages, Message("user", "\n".join(filter(None, extra)))]


def _options(row: Row) -> list[str]:
    """The choices of an exam's question, each like "A. fever"; they get letters where they have none."""
    name = next((name for name in OPTIONS if row.get(name)), None)
    given = row[name] if name else {key.upper(): row[key] for key in LETTERS if key in row and {"a", "b"} <= row.keys()}
    if isinstance(given, str):
        return [_text(row, str(name), optional=True)]
    if isinstance(given, dict) and isinstance(given.get("text"), list):  # as ARC writes them
        given = [{"key": key, "text": text} for key, text in zip_longest(given.get("label") or [], given["text"])]
    pairs = list(map(_option, count(), given)) if isinstance(given, list) else _typed(given, dict, "options").items()
    options: dict[str, str] = {}
    for letter, text in pairs:
        text = str(text) if type(text) in (int, float) else _typed("" if text is None else text, str, "options")
        if said := _text({"options": text}, "options", optional=True):
            options[letter] = said
    begin = [match[1] for said in options.values() if (match := re.match(r"\(?([A-Z])[.、．:：)]", said))]
    own = sorted(begin) == sorted(options)  # E.coli begins with no letter of its own
    return [said if own else f"{letter}. {said}" for letter, said in options.items()]


def _option(number: int, each: object) -> tuple[str, object]:
    """(letter, text) of an element of a list of options."""
    fields = {str(key).lower(): value for key, value in each.items()} if isinstance(each, dict) else {"text": each}
    text = next((name for name in ("value", "text", "content") if name in fields), None)
    if not text and len(fields) == 1:
        return next((letter.upper(), said) for letter, said in fields.items())
    if not text:
        raise Unfit("an option without text", json.dumps(each, ensure_ascii=False)[:60], "value, text or content")
    key = next((str(fields[key]) for key in ("key", "label", "option") if fields.get(key)), chr(ord("A") + number))
    return key, fields[text]


def _preference(row: Row, source: str, limit: int | None) -> PreferencePair:
    expected = "prompt (or conversations, or question), chosen and rejected"
    names = [_field(row, names, expected) for names in (CHOSEN, REJECTED)]
    if "prompt" not in row and not row.keys() & {*TURNS, *QUESTIONS} and isinstance(row[names[0]], list):
        # TRL's implicit prompt is what both lists begin with, before the reply at their end.
        both = zip(*(_messages(row, name)[:-1] for name in names), strict=False)
        written = [one for one, _ in takewhile(lambda at: at[0] == at[1], both)]
    else:
        name = _field(row, ("prompt", *TURNS, *QUESTIONS), expected)
        written = _messages(row, name) if isinstance(row[name], list | dict) else _asked(row, name)
    # Of a pair only the replies carry loss: what the prompt's own flags say is true either way.
    prompt = tuple(replace(message, loss=True) for message in _alternating(row, written, "user"))
    chosen, rejected = (_reply(row, name, prompt) for name in names)
    if chosen.strip() == rejected.strip():
        raise Unfit("chosen equals rejected", repr(chosen[:40]), "two different replies", "delete the row")
    _check_length(limit, *(message.written for message in prompt), max(chosen, rejected, key=len))
    return PreferencePair(prompt, chosen, rejected, source, *_topic(row))


def _reply(row: Row, name: str, prompt: tuple[Message, ...]) -> str:
    if not isinstance(row[name], list | dict):
        return _text(row, name)
    messages = _messages(row, name)
    last = messages[-1] if messages else Message("no message", "")
    if last.role != "assistant":
        raise Unfit(f"{name} does not end with a reply", last.role, "assistant")
    if not last.loss:
        raise Unfit(f"{name} carries no loss", "loss false", "a reply that is learnt from")
    repeated = tuple(replace(message, loss=True) for message in messages[:-1])
    if repeated not in ((), prompt, prompt[prompt[0].role == "system" :]):
        raise Unfit(f"{name} repeats another prompt", f"{len(messages) - 1} other messages", "those of the prompt")
    return last.written


def _triple(row: Row, source: str, limit: int | None) -> Triple:
    head, relation, tail = (_text(row, name).strip() for name in ("head", "relation", "tail"))
    _check_length(limit, head, relation, tail)
    return Triple(head, relation, tail, source)


PARSERS: dict[str, Parser[Any]] = {
    "documents": _document,
    "conversations": _conversation,
    "preferences": _preference,
    "triples": _triple,
}
