"""The records that training reads, and how a row of a file becomes one: names of fields, roles, reasoning, loss.

A row is a mapping of names to values, as `tables.py` reads it from any format. A field that is null counts as missing.
A row that cannot be used raises `Unfit` with the reason.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile, zip_longest
from string import ascii_uppercase
from typing import Any, TypeVar

from pedgpt.data.tables import Unfit, not_utf8

Row = dict[str, Any]
T = TypeVar("T")
Columns = Mapping[str, str] | None

# Each field: what a reader takes it for, in the order in which people are told, and its names, of which the
# first that a row has is used. raw_anwser is how the CMD cases spell it; complex_cot is HuatuoGPT-o1's; a to h are
# the columns of an exam's options in tables like CMMLU's.
FIELDS = {
    "messages": ("turns", "conversations conversation messages"),
    "history": ("earlier turns", "history"),
    "question": ("user", "question ask instruction prompt query 问题 提问"),
    "prompt": ("turns", "prompt"),
    "input": ("user, below it", "input"),
    "options": ("user, below it", "option options choices 选项 a b c d e f g h"),
    "answer": ("assistant", "answer output response completion raw_anwser 回答 答复 答案"),
    "chosen": ("chosen", "chosen response_chosen chosen_response"),
    "rejected": ("rejected", "rejected response_rejected rejected_response"),
    "reasoning_content": ("reasoning", "reasoning_content complex_cot"),
    "label": ("left out where false", "label kto_tag"),
    **{name: (name, name) for name in ("head", "relation", "tail", "text", "title", "task", "system", "disease")},
    "department": ("department", "department cate1 科室"),
}
NAMES = {field: tuple(names.split()) for field, (_, names) in FIELDS.items()}
BAD = "false 0 0.0 -1 no bad undesirable rejected 否 差".split()  # labels of an undesirable answer
LOSS = {"loss": {"true": True, "false": False}, "weight": {"0": False, "1": True}}  # what flags of a message say
ROLES = {"system": "system"}
ROLES |= dict.fromkeys("user human patient 患者 病人 用户".split(), "user")
ROLES |= dict.fromkeys("assistant gpt chatgpt bot model doctor 医生 大夫 助手".split(), "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant".

    `loss` says whether an assistant's message is learnt from; on other roles, which never carry loss, it means nothing.
    `reasoning` is what an assistant thought before its answer; a `<think>…</think>` at the beginning of the content,
    whose first tag may be missing, is moved there, without the line breaks around it.
    """

    role: str
    content: str
    loss: bool = True
    reasoning: str = ""

    def __post_init__(self) -> None:
        if self.role == "assistant" and (self.reasoning or "</think>" in self.content):
            thought, closed, answer = self.content.partition("</think>")
            thought = thought.strip("\n").removeprefix("<think>").strip("\n")
            found = closed and "<think>" not in thought
            object.__setattr__(self, "reasoning", self.reasoning.strip("\n") or (thought if found else ""))
            object.__setattr__(self, "content", answer.lstrip("\n") if found else self.content)

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
        if self.rows.get(file := self.skipped[-1].file):
            self.rows[file] -= 1

    def describe(self) -> str:
        """A table "file  rows  skipped", then each fault with its count and first three places."""
        skipped = Counter(row.file for row in self.skipped if row.line)
        faults = defaultdict(list)
        for row in self.skipped:
            # A reason begins with its fault; what follows the colon differs from row to row.
            fault = row.reason.partition(":")[0]
            what = fault if fault.startswith("left out") else f"skipped, {fault}"
            faults[what].append(f"{row.file}:{row.line}" if row.line else row.file)
        if self.shortened:
            faults["over-long, cut to fit"] = self.shortened
        files = self.rows | skipped
        width = max(map(len, ("file", *files)))
        lines = [f"{'file':{width}}  {'rows':>9}  {'skipped':>9}"]
        lines += [f"{file:{width}}  {self.rows.get(file, 0):9}  {skipped[file]:9}" for file in files]
        for what, places in faults.items():
            lines.append(f"{len(places)} {what}: {', '.join(places[:3])}{', ...' * (len(places) > 3)}")
        return "\n".join(lines)


def some(names: Iterable[str]) -> str:
    """Names for a message, the first 20: an object by id may have thousands."""
    first = list(islice(names, 21))
    return ", ".join([*first[:20], *["…"] * (len(first) > 20)]) or "(none)"


def fields_of(row: object, columns: Columns = None) -> Row:
    """A row without nulls and NaNs, by names in lower case; `columns` says which of its columns hold which fields."""
    if isinstance(row, Unfit):
        raise row
    found = _typed(row, dict, "the row")
    columns = columns if columns and not found.keys().isdisjoint(columns.values()) else {}
    for column in columns.values():
        _find(found, [column], f"{column}, which `columns` names")
    good = {key: value for key, value in found.items() if value is not None and value == value}  # pandas writes NaN
    fields = {key.strip().lower(): value for key, value in good.items() if key not in columns.values()}
    return fields | {name: good[column] for name, column in columns.items() if column in good}


def _find(row: Row, names: Iterable[str], expected: str) -> str:
    for name in names:
        if name in row:
            return name
    fix = "rename or add the field, or name it by `columns`"
    raise Unfit("missing field", f"the keys {some(row)}", expected, fix)


def _filled(row: Row, field: str) -> str:
    """The first name of a field under which the row has something; else ""."""
    return next((name for name in NAMES[field] if name in row and row[name]), "")


def _must(holds: object, fault: str, found: str, expected: str, fix: str = "fix or delete the row") -> None:
    if not holds:
        raise Unfit(fault, found, expected, fix)


def _typed(value: object, kind: type[T], name: str) -> T:
    if isinstance(value, kind):
        return value
    raise Unfit(f"{name} has the wrong type", "null" if value is None else type(value).__name__, kind.__name__)


def _text(row: Row, name: str, *, optional: bool = False) -> str:
    text = "" if optional and name not in row else _typed(row[_find(row, [name], name)], str, name)
    if unfit := not_utf8(text):  # bytes of a table or .json, or an escaped half of a pair: tokenizers stop at either
        raise unfit
    blank = not text.strip()
    _must(optional or not blank, f"{name} is empty", "nothing", "some text")
    return "" if blank else text


def _labels(row: Row, *fields: str) -> list[str]:
    """What a row says it is about; a value that is no text says nothing."""
    found = [row[name] if (name := _filled(row, field)) else "" for field in fields]
    return [text if isinstance(text, str) and not not_utf8(text) else "" for text in found]


def _check_length(limit: int | None, *texts: str) -> None:
    length, fix = sum(map(len, texts)), "split the row or raise max_characters"
    _must(limit is None or length <= limit, "over-long", f"{length} characters", f"at most {limit}", fix)


def _messages(row: Row, name: str) -> list[Message]:
    messages = []
    for turn in _typed([row[name]] if isinstance(row[name], dict) else row[name], list, name):
        turn = {key: value for key, value in _typed(turn, dict, f"a message of {name}").items() if value is not None}
        written = _text(turn, _find(turn, ("from", "role"), "role or from"))
        if not (role := ROLES.get(written.strip(" :：").lower())):
            raise Unfit("unknown role", written, ", ".join(ROLES))
        said = _find(turn, ("value", "content"), "content or value")
        if isinstance(turn[said], list):
            parts = [part.get("text") if isinstance(part, dict) else part for part in turn[said]]
            turn[said] = "\n".join(_typed(part, str, f"a part of {said}") for part in parts)
        # Many exports write an empty system message in every row: it says as much as none.
        if content := _text(turn, said, optional=role == "system"):
            messages.append(_message(turn, role, content, _loss(turn, role)))
    return messages


def _message(fields: Row, role: str, content: str, loss: bool = True) -> Message:
    """A message; what an assistant thought stands in a field of its own, or in the content before the answer."""
    thought = _filled(fields, "reasoning_content") if role == "assistant" else ""
    message = Message(role, content, loss, _text(fields, thought, optional=True))
    _must(message.content.strip(), "no answer after the reasoning", "nothing", "an answer after </think>")
    return message


def _loss(turn: Row, role: str) -> bool:
    flags = {key: LOSS[key].get(json.dumps(turn[key])) for key in LOSS if key in turn}
    for key, flag in flags.items():
        found = json.dumps(turn[key])[:40]
        _must(flag is not None, f"{key} of a message is unusable", found, " or ".join(LOSS[key]))
        _must(role == "assistant" or not flag, f"{key} asks for loss on another's words", role, "assistant")
    _must(len({*flags.values()}) < 2, "loss and weight disagree", "true and false", "one of the two")
    return role != "assistant" or all(flags.values())


def _alternating(row: Row, messages: list[Message], last: str) -> tuple[Message, ...]:
    if system := _text(row, "system", optional=True):
        messages = [Message("system", system), *messages]
    turns = [message.role for message in messages]
    turns = turns[1:] if turns[:1] == ["system"] else turns
    for number, role in enumerate(turns, 1):
        expected = ("assistant", "user")[number % 2]
        if role != expected:
            raise Unfit("roles do not alternate", f"{role} as turn {number} after any system message", expected)
    _must(turns[-1:] == [last], f"no {last} turn at the end", turns[-1] if turns else "no turn", last)
    return tuple(messages)


def _said(row: Row, name: str) -> list[Message]:
    """What a row's field of an answer holds: messages, or the text of one."""
    if isinstance(row[name], list | dict):
        return _messages(row, name)
    return [_message(row, "assistant", _text(row, name))]


def _asked(row: Row, name: str) -> list[Message]:
    """Messages; or the turns of `history`, then the question with its input and, of an exam, the options."""
    if name in NAMES["messages"] or isinstance(row[name], list | dict):
        return _messages(row, name)
    messages = []
    for pair in _typed(row["history"] or [] if "history" in row else [], list, "history"):
        length = len(_typed(pair, list, "a pair of history"))
        _must(length == 2, "history is not in pairs", f"{length} items", "[question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(_message({}, role, _text({"history": text}, "history")))
    question, options = _text(row, name), _options(row)
    below = [_text(row, "input", optional=True), *([] if all(option in question for option in options) else options)]
    return [*messages, Message("user", "\n".join([question, *filter(None, below)]))]


def _options(row: Row) -> list[str]:
    """The choices of an exam's question, each like "A. fever"; they get letters where they have none."""
    name = _filled(row, "options")
    given = row[name] if name else []
    if len(name) == 1:  # columns of a table
        given = {key.upper(): row[key] for key in "abcdefgh" if key in row} if {"a", "b"} <= row.keys() else []
    if isinstance(given, str):
        return [_text(row, name, optional=True)]
    if isinstance(given, dict) and isinstance(given.get("text"), list):  # as ARC writes them
        given = [{"key": key, "text": text} for key, text in zip_longest(given.get("label") or [], given["text"])]
    if isinstance(given, list):
        given = dict(map(_option, ascii_uppercase, given))
    options = {}
    for letter, text in _typed(given, dict, "options").items():
        text = {} if text is None else {"options": str(text) if type(text) in (int, float) else text}
        if said := _text(text, "options", optional=True):
            options[letter] = said
    begin = [match[1] for said in options.values() if (match := re.match(r"\(?([A-Z])[.、．:：)]", said))]
    lettered = sorted(begin) == sorted(options)  # E.coli begins with no letter of its own
    return [said if lettered else f"{letter}. {said}" for letter, said in options.items()]


def _option(letter: str, each: object) -> tuple[str, object]:
    """(letter, text) of an element of a list of options."""
    if not isinstance(each, dict):
        return letter, each
    fields = {key.lower(): value for key, value in each.items()}
    text = next((name for name in ("value", "text", "content") if name in fields), "")
    if not text and len(each) == 1:
        return next(iter(each.items()))
    _must(text, "an option without text", some(fields), "value, text or content")
    key = next((str(fields[key]) for key in ("key", "label", "option") if fields.get(key)), letter)
    return key, fields[text]


def _document(row: Row, source: str, limit: int | None) -> Document:
    text = _text(row, "text")
    _check_length(limit, text)
    return Document(text, source, _text(row, "title", optional=True), *_labels(row, "disease", "department"))


def _conversation(row: Row, source: str, limit: int | None) -> Conversation:
    for name in NAMES["label"]:
        if name in row and str(row[name]).strip().lower() in BAD:
            raise LeftOut("an answer judged bad", f"{name} {row[name]}", "true or 1", "its pair may teach DFPO")
    forms = "question and answer, instruction and output, conversations, conversation or messages"
    name = _filled(row, "messages") or _find(row, (*NAMES["question"], *NAMES["messages"]), forms)
    answer = _find(row, NAMES["answer"], forms) if name in NAMES["question"] else ""
    said = _asked(row, name) + (_said(row, answer) if answer else [])
    messages = _alternating(row, said, "assistant")
    taught = any(message.loss for message in messages if message.role == "assistant")
    _must(taught, "nothing carries loss", "loss false on every assistant message", "one that is learnt from")
    _check_length(limit, *(message.written for message in messages))
    return Conversation(messages, source, *_labels(row, "task", "disease", "department"))


def _preference(row: Row, source: str, limit: int | None) -> PreferencePair:
    forms = "prompt (or conversations, or question), chosen and rejected"
    names = [_find(row, NAMES[field], forms) for field in ("chosen", "rejected")]
    said = [_said({name: row[name]}, name) or [Message("no message", "")] for name in names]
    prompts = ("prompt", *NAMES["messages"], *NAMES["question"])
    if len(said[0]) > 1 and row.keys().isdisjoint(prompts):
        # TRL's implicit prompt is what both lists begin with, before the reply at their end.
        both = zip(said[0][:-1], said[1][:-1], strict=False)
        asked = [one for one, _ in takewhile(lambda at: at[0] == at[1], both)]
    else:
        asked = _asked(row, _find(row, prompts, forms))
    # Of a pair only the replies carry loss: what the prompt's own flags say is true either way.
    prompt = tuple(replace(message, loss=True) for message in _alternating(row, asked, "user"))
    for name, (*before, last) in zip(names, said, strict=True):
        _must(last.role == "assistant", f"{name} does not end with a reply", last.role, "assistant")
        _must(last.loss, f"{name} carries no loss", "loss false", "a reply that is learnt from")
        repeated = tuple(replace(message, loss=True) for message in before)
        known = repeated in ((), prompt, prompt[prompt[0].role == "system" :])
        _must(known, f"{name} repeats another prompt", f"{len(before)} other messages", "those of the prompt")
    chosen, rejected = (messages[-1].written for messages in said)
    same = chosen.strip() == rejected.strip()
    _must(not same, "chosen equals rejected", repr(chosen[:40]), "two different replies", "delete the row")
    _check_length(limit, *(message.written for message in prompt), max(chosen, rejected, key=len))
    return PreferencePair(prompt, chosen, rejected, source, *_labels(row, "disease", "department"))


def _triple(row: Row, source: str, limit: int | None) -> Triple:
    head, relation, tail = (_text(row, name).strip() for name in ("head", "relation", "tail"))
    _check_length(limit, head, relation, tail)
    return Triple(head, relation, tail, source)


TALK = ("messages", "question", "history", "input", "options", "system", "disease", "department")
# Each kind of records, the surest sign first: how a row (with its source and max_characters) becomes one, the fields by
# which a row is known as one, and its other fields.
KINDS: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]] = {
    "preferences": (_preference, ("prompt", "chosen", "rejected"), TALK),
    "conversations": (_conversation, ("messages", "question", "answer"), (*TALK, "reasoning_content", "label", "task")),
    "triples": (_triple, ("head", "relation", "tail"), ()),
    "documents": (_document, ("text",), ("title", "disease", "department")),
}
