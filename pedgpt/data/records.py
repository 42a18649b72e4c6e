"""The records that training reads, and how a row of a file becomes one: names of fields, roles, reasoning, loss.

A row is a mapping of names to values, as `tables.py` reads it from any format. A field that is null counts as missing.
A row that cannot be used raises `Unfit` with the reason.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, Self, TypeVar

from pedgpt.data.tables import LONE_SURROGATE, Unfit

Row = dict[str, Any]
T = TypeVar("T")
Own = tuple[tuple[str, str], ...]  # (field, column) of each field whose column has no known name

# Fields that have several names. raw_anwser is how the CMD cases spell it, complex_cot is HuatuoGPT-o1's.
NAMES = {
    "messages": ("messages", "conversations", "conversation"),
    "question": ("question", "ask", "instruction", "prompt", "query", "问题", "提问"),
    "options": ("options", "option", "选项"),
    "answer": ("answer", "output", "response", "completion", "raw_anwser", "回答", "答复", "答案"),
    "chosen": ("chosen", "response_chosen", "chosen_response"),
    "rejected": ("rejected", "response_rejected", "rejected_response"),
    "reasoning_content": ("reasoning_content", "complex_cot"),
    "label": ("label", "kto_tag"),
    "department": ("department", "cate1", "科室"),
    "role": ("role", "from"),
    "content": ("content", "value"),
}
BAD = ("false", "0", "0.0", "no", "否")  # labels of an undesirable answer
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

    def __add__(self, other: Self) -> Self:
        """Both together."""
        return type(self)(self.rows | other.rows, self.skipped + other.skipped, self.shortened + other.shortened)

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
            fault = row.reason.partition(":")[0]  # what follows the colon differs from row to row
            faults[f"skipped, {fault}"].append(f"{row.file}:{row.line}" if row.line else row.file)
        if self.shortened:
            faults["over-long, cut to fit"] = self.shortened
        files = self.rows | skipped
        width = max(map(len, ("file", *files)))
        lines = [f"{'file':{width}}  {'rows':>9}  {'skipped':>9}"]
        lines += [f"{file:{width}}  {self.rows.get(file, 0):9}  {skipped[file]:9}" for file in files]
        for what, places in faults.items():
            lines.append(f"{len(places)} {what}: {', '.join(places[:3])}{', ...' * (len(places) > 3)}")
        return "\n".join(lines)


@lru_cache(1000)  # the rows of a file mostly have the same columns
def names_of(keys: tuple[str, ...], fields: tuple[str, ...], own: Own = ()) -> dict[str, str]:
    """By each column that holds one of these fields, the field: as `own` says, or by a known name."""
    found = {column: name for name, column in own if column in keys}
    known = {key.strip().lower(): key for key in keys if key not in found}
    for name in fields:
        names = () if name in found.values() else NAMES.get(name, (name,))
        if first := next((each for each in names if each in known), ""):
            found[known.pop(first)] = name
    return found


def fields_of(row: object, fields: tuple[str, ...], own: Own = ()) -> Row:
    """A row with these fields under their own names, without nulls and NaNs, which pandas writes."""
    if isinstance(row, Unfit):
        raise row
    columns = [column for _, column in own]
    row = _typed(row, dict, "the row or message")
    names = names_of(tuple(key for key in row if row[key] is not None or key in columns), fields, own)
    if not names.keys().isdisjoint(columns) and (lacking := [column for column in columns if column not in row]):
        raise _missing(row, f"{lacking[0]}, which `columns` names")
    renamed = {key: row[key] for key in row if key not in names} | {names[key]: row[key] for key in names}
    return {key: value for key, value in renamed.items() if value is not None and value == value}


def _missing(row: Row, expected: str) -> Unfit:
    found = f"the keys {', '.join(islice(row, 20)) or '(none)'}"  # an object by id may have thousands
    return Unfit("missing field", found, expected, "rename or add the field, or name it by `columns`")


def _typed(value: object, kind: type[T], name: str) -> T:
    if isinstance(value, kind):
        return value
    raise Unfit(f"{name} has the wrong type", "null" if value is None else type(value).__name__, kind.__name__)


def _text(row: Row, name: str, *, optional: bool = False) -> str:
    if name not in row and not optional:
        raise _missing(row, name)
    text = _typed(row.get(name, ""), str, name)
    # A byte of the file that is no text, or an escaped half of a pair: tokenizers stop at either.
    if broken := LONE_SURROGATE.search(text):
        found = f"{ascii(broken[0])} at character {broken.start() + 1} (\\udcXX stands for byte XX)"
        raise Unfit("invalid UTF-8", found, "UTF-8 text", "convert the file, as by iconv -f GB18030 -t UTF-8")
    if not text.strip() and not optional:
        raise Unfit(f"{name} is empty", "nothing", "some text")
    return text if text.strip() else ""


def _labels(row: Row, *fields: str) -> list[str]:
    """What a row says it is about; a value that is no text says nothing."""
    return [_text(row, field, optional=True) if isinstance(row.get(field), str) else "" for field in fields]


def _messages(turns: object, name: str) -> list[Message]:
    messages = []
    for each in _typed([turns] if isinstance(turns, dict) else turns, list, name):
        turn = fields_of(each, ("role", "content", "reasoning_content", "loss", "weight"))
        written = _text(turn, "role")
        if not (role := ROLES.get(written.strip(" :：").lower())):
            raise Unfit("unknown role", written, ", ".join(ROLES))
        if isinstance(turn.get("content"), list):
            parts = [part.get("text") if isinstance(part, dict) else part for part in turn["content"]]
            turn["content"] = "\n".join(_typed(part, str, "a part of content") for part in parts)
        flags = [turn.get(flag, True) for flag in ("loss", "weight")]
        if any(flag not in (0, 1) for flag in flags):
            raise Unfit("loss or weight is unusable", str(flags), "true, false, 1 or 0")
        # Many exports write an empty system message in every row: it says as much as none.
        if content := _text(turn, "content", optional=role == "system"):
            messages.append(_message(turn, role, content, role != "assistant" or all(flags)))
    if not messages:
        raise Unfit(f"{name} is empty", "no message", "messages")
    return messages


def _message(fields: Row, role: str, content: str, loss: bool = True) -> Message:
    """A message; what an assistant thought stands in a field of its own, or in the content before the answer."""
    thought = _text(fields, "reasoning_content", optional=True) if role == "assistant" else ""
    message = Message(role, content, loss, thought)
    if not message.content.strip():
        raise Unfit("no answer after the reasoning", "nothing", "an answer after </think>")
    return message


def _turns(row: Row, name: str) -> list[Message]:
    """What a field holds: messages, an answer, or the turns of `history`, then the question with what is below it."""
    if isinstance(row.get(name), list | dict):
        return _messages(row[name], name)
    if name in ("answer", "chosen", "rejected"):
        return [_message(row, "assistant", _text(row, name))]
    messages = []
    for pair in _typed(row.get("history") or [], list, "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unfit("history is not in pairs", repr(pair)[:80], "[question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(_message({}, role, _text({"history": text}, "history")))
    options = row.get("options")
    if isinstance(options, dict):
        options = "\n".join(f"{letter}. {text}" for letter, text in options.items() if text)
    below = {"input": row.get("input", ""), "options": options or ""}
    texts = [_text(row, name), *(_text(below, field, optional=True) for field in below)]
    return [*messages, Message("user", "\n".join(filter(None, texts)))]


def _in_turn(row: Row, messages: list[Message], last: str) -> tuple[Message, ...]:
    if system := _text(row, "system", optional=True):
        messages = [Message("system", system), *messages]
    roles = [message.role for message in messages]
    turns = roles[roles[0] == "system" :]
    if turns[-1:] != [last] or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        expected = f"user and assistant in turn after any system message, {last} at the end"
        raise Unfit("roles out of turn", ", ".join(roles)[:200], expected)
    return tuple(messages)


def _document(row: Row, source: str) -> Document:
    title = _text(row, "title", optional=True)
    return Document(_text(row, "text"), source, title, *_labels(row, "disease", "department"))


def _conversation(row: Row, source: str) -> Conversation:
    if str(row.get("label")).strip().lower() in BAD:
        raise Unfit("an answer judged bad", f"label {row['label']}", "true or 1", 'set on_bad_row = "skip"')
    said = [] if row.get("messages") else [*_turns(row, "question"), *_turns(row, "answer")]
    messages = _in_turn(row, said or _messages(row["messages"], "messages"), "assistant")
    if not any(message.loss for message in messages if message.role == "assistant"):
        raise Unfit("nothing carries loss", "loss false on every assistant message", "one that is learnt from")
    return Conversation(messages, source, *_labels(row, "task", "disease", "department"))


def _preference(row: Row, source: str) -> PreferencePair:
    row = row | {"reasoning_content": ""}  # it would belong to one of the replies only
    said = {name: _turns(row, name) for name in ("chosen", "rejected")}
    name = next((name for name in ("prompt", "messages", "question") if row.get(name)), "")
    if not name and len(said["chosen"]) > 1:
        asked = said["chosen"][:-1]  # TRL's implicit prompt: what both lists begin with
    else:
        asked = _turns(row, name or "prompt")
    prompt = _in_turn(row, asked, "user")
    for name, (*before, last) in said.items():
        _in_turn({}, [*prompt, last], "assistant")
        if tuple(before) not in ((), prompt, prompt[prompt[0].role == "system" :]):
            raise Unfit(f"{name} repeats another prompt", f"{len(before)} other messages", "those of the prompt")
    chosen, rejected = (messages[-1].written for messages in said.values())
    if chosen.strip() == rejected.strip():
        raise Unfit("chosen equals rejected", repr(chosen[:40]), "two different replies", "delete the row")
    return PreferencePair(prompt, chosen, rejected, source, *_labels(row, "disease", "department"))


def _triple(row: Row, source: str) -> Triple:
    head, relation, tail = (_text(row, name).strip() for name in ("head", "relation", "tail"))
    return Triple(head, relation, tail, source)


TALK = ("messages", "question", "history", "input", "options", "system", "disease", "department")
ANSWERED = (*TALK, "answer", "reasoning_content", "label", "task")
# Each kind of records, the surest sign first: how a row and its source become one; groups of fields, of which a row of
# this kind has one; and all fields that are read.
KINDS: dict[str, tuple[Callable[[Row, str], Any], tuple[set[str], ...], tuple[str, ...]]] = {
    "preferences": (_preference, ({"chosen", "rejected"},), ("prompt", "chosen", "rejected", *TALK)),
    "conversations": (_conversation, ({"messages"}, {"question", "answer"}), ANSWERED),
    "documents": (_document, ({"text"},), ("text", "title", "disease", "department")),
    "triples": (_triple, ({"head", "relation", "tail"},), ("head", "relation", "tail")),  # last: any TSV may hold them
}
