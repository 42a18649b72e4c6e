"""Readers of every input format: documents, conversations, preference pairs and knowledge-graph triples.

Paths name files, or folders that stand for every file in them of a known extension. Files are UTF-8, with or without
a byte-order mark, and lines end at LF or CRLF alone. A .json file is one list: its elements are numbered, from 1, in
place of lines. Blank lines are no rows; every other row is returned or reported. The readers' common settings:

    on_bad_row      "error" raises BadRow at the first bad row; "skip" leaves it out and counts it in the summary
    max_characters  bound on a row's text: all messages of a conversation; a pair's prompt and its longer reply
    summary         a ReadSummary to add to; without one, skipped rows are described in a warning

A missing path, an empty folder, an unknown extension, a table's unusable header or a wrong setting is a ValueError.
"""

import codecs
import csv
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

PathLike = str | os.PathLike[str]
Paths = PathLike | Iterable[PathLike]
Row = dict[str, Any]
T = TypeVar("T")
Parser = Callable[[Row, str, int | None], T]  # fields, source, max_characters

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv")
# Of several names, the first that a row has is used. raw_anwser is how the CMD cases spell it.
QUESTIONS = ("question", "ask", "instruction", "prompt", "query")
ANSWERS = ("answer", "output", "response", "raw_anwser")
DEPARTMENTS = ("department", "cate1")
TURNS = ("conversations", "conversation", "messages")
USERS, ASSISTANTS = ("user", "human", "patient"), ("assistant", "gpt", "doctor")
ROLES = {"system": "system"} | dict.fromkeys(USERS, "user") | dict.fromkeys(ASSISTANTS, "assistant")
HEADING = re.compile(r"#{1,6}[ \t]+(\S.*?)([ \t]+#+)?\s*$")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant".

    `loss` says whether an assistant's message is learnt from; on other roles, which never carry loss, it means nothing.
    `reasoning` is what an assistant thought before its answer; a `<think>…</think>` that begins the content goes there.
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


class BadRow(ValueError):
    """A row that cannot be used: "file:line: fault: what was found, what was expected; how to mend it"."""


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
            skipped[row.file] = skipped.get(row.file, 0) + 1
            # A reason begins with its fault; what follows the colon differs from row to row.
            faults.setdefault(row.reason.partition(":")[0], []).append(f"{row.file}:{row.line}")
        width = max(map(len, ("file", *skipped)))
        lines = [f"{'file':{width}}  {'rows':>9}  {'skipped':>9}"]
        lines += [f"{file:{width}}  {self.rows.get(file, 0):9}  {count:9}" for file, count in skipped.items()]
        for fault, places in faults.items():
            lines.append(f"{len(places)} skipped, {fault}: {', '.join(places[:3])}{', ...' * (len(places) > 3)}")
        return "\n".join(lines)


def split_thought(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a text `<think>reasoning</think>answer`, whose first tag may be missing; ("", text) of
    any other. Line breaks around both go."""
    thought, closed, answer = text.partition("</think>")
    thought = thought.strip("\n").removeprefix("<think>").strip("\n")
    return (thought, answer.lstrip("\n")) if closed and "<think>" not in thought else ("", text)


def read_documents(
    paths: Paths, *, on_bad_row: str = "error", max_characters: int | None = None, summary: ReadSummary | None = None
) -> list[Document]:
    """Read whole .txt and .md files, titled by their first markdown heading, and rows of `text`, optionally `title`."""
    return _read(paths, "documents", _document, on_bad_row, max_characters, summary)


def read_conversations(
    paths: Paths,
    *,
    on_bad_row: str = "error",
    max_characters: int | None = None,
    summary: ReadSummary | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Conversation]:
    """Read conversations, each row in any of these forms, with optional `system` and `task`.

    Alpaca (`instruction`, `input`, `output`, `history`), ShareGPT (`conversations`), OpenAI (`messages`),
    `conversation` of patient and doctor, `question` and `answer`. A CSV's headers are those names, or the names that
    `columns` gives: {"question": "ask", "answer": "reply"}. A `title` is not part of the question.
    What an assistant thought is read from `reasoning_content`, or from `<think>…</think>` before its answer.
    An assistant's message with `"loss": false`, or `"weight": 0` as OpenAI writes it, carries no loss; if none carries
    any, the row is bad.
    """
    if unknown := set(columns or ()) - {"question", "answer", "system", "task"}:
        raise ValueError(f"columns has {', '.join(unknown)}, expected some of question, answer, system, task")
    return _read(paths, "conversations", _conversation, on_bad_row, max_characters, summary, columns)


def read_preferences(
    paths: Paths, *, on_bad_row: str = "error", max_characters: int | None = None, summary: ReadSummary | None = None
) -> list[PreferencePair]:
    """Read `prompt` (or ShareGPT `conversations`), `chosen` and `rejected`, with optional `system`.

    Each is a string or a list of messages; a reply may be one message, or repeat the whole prompt, which is removed.
    """
    return _read(paths, "preferences", _preference, on_bad_row, max_characters, summary)


def read_triples(
    paths: Paths, *, on_bad_row: str = "error", max_characters: int | None = None, summary: ReadSummary | None = None
) -> list[Triple]:
    """Read TSV of head, relation, tail (# begins a comment, quotes are text), or rows with those keys."""
    return _read(paths, "triples", _triple, on_bad_row, max_characters, summary)


def iter_records(
    paths: Paths,
    kind: str,
    *,
    on_bad_row: str = "error",
    max_characters: int | None = None,
    summary: ReadSummary | None = None,
) -> Iterator[Any]:
    """What the reader of that kind returns, one by one, so that a file of any size takes the memory of a row.

    `kind` is "documents", "conversations", "preferences" or "triples". Without a summary, skipped rows are not told.
    """
    if kind not in PARSERS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(PARSERS)}")
    tally = ReadSummary() if summary is None else summary
    return _iterate(paths, kind, PARSERS[kind], on_bad_row, max_characters, tally)


def detect_kind(path: PathLike) -> str:
    """Tell "documents", "conversations", "preferences" or "triples" by a file's first rows; ValueError if none fits."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: found a folder, expected one file; name a file in it")
    (file,) = files_of(path)
    parsers: dict[str, Parser[object]] = {"preferences": _preference, "conversations": _conversation}
    # Any TSV of three columns could hold triples, so there they come last; elsewhere their keys are the surer sign.
    parsers |= {"documents": _document} if file.suffix.lower() == ".tsv" else {}
    parsers |= {"triples": _triple, "documents": _document}
    broken = ""
    for kind, parse in parsers.items():
        for _, row in islice(_rows(file, kind), 20):
            with suppress(_Unfit):
                parse(_fields(row), "", None)
                return kind
            broken = broken or (str(row) if isinstance(row, _Unfit) and "UTF-8" in str(row) else "")
    if broken:
        raise ValueError(f"{file}: {broken}")
    raise ValueError(f"{file}: found no row of {', '.join(parsers)} at its start; compare the formats of the readers")


def field_mapping(path: PathLike, kind: str) -> str:
    """Which fields of a file its reader takes for what, and which it ignores, by the first good row; for people.

    E.g. "question → user, raw_anwser → assistant, department; ignored: id".
    """
    (file,) = files_of(path)
    if file.suffix.lower() in (".txt", ".md"):
        return "the whole file → text"
    for _, row in islice(_rows(file, kind), 20):
        with suppress(_Unfit):
            fields = _fields(row)
            PARSERS[kind](fields, "", None)
            return _mapped(fields, kind)
    return "no good row at its start"


def _mapped(row: Row, kind: str) -> str:
    used: dict[str, str] = {}
    if kind == "triples":
        used = dict.fromkeys(("head", "relation", "tail"), "")
    elif kind == "documents":
        used = {"text": "", "title": ""}
    else:
        turns = next((name for name in (TURNS if kind == "conversations" else ("prompt", *TURNS)) if name in row), None)
        if turns:
            used = {turns: "turns"}
        else:
            asked, answered = (next(name for name in names if name in row) for names in (QUESTIONS, ANSWERS))
            used = {"history": "earlier turns", asked: "user", "input": "user, below it", answered: "assistant"}
            used |= {"reasoning_content": "reasoning"}
        used |= {"chosen": "", "rejected": ""} if kind == "preferences" else {"task": ""}
        used |= {"system": ""}
    if kind != "triples":
        used |= {"disease": "", next((name for name in DEPARTMENTS if row.get(name)), DEPARTMENTS[0]): "department"}
    found = [
        f"{name} → {meaning}" if meaning not in ("", name) else name for name, meaning in used.items() if name in row
    ]
    ignored = [name for name in row if name not in used]
    return ", ".join(found) + (f"; ignored: {', '.join(ignored)}" if ignored else "")


def _read(
    paths: Paths,
    kind: str,
    parse: Parser[T],
    on_bad_row: str,
    max_characters: int | None,
    summary: ReadSummary | None,
    columns: Mapping[str, str] | None = None,
) -> list[T]:
    tally = ReadSummary() if summary is None else summary
    records = list(_iterate(paths, kind, parse, on_bad_row, max_characters, tally, columns))
    if summary is None and tally.skipped:
        warnings.warn(f"some rows were skipped\n{tally.describe()}", stacklevel=3)
    return records


def _iterate(
    paths: Paths,
    kind: str,
    parse: Parser[T],
    on_bad_row: str,
    max_characters: int | None,
    tally: ReadSummary,
    columns: Mapping[str, str] | None = None,
) -> Iterator[T]:
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f'on_bad_row is {on_bad_row!r}, expected "error" or "skip"')
    if max_characters is not None and max_characters < 1:
        raise ValueError(f"max_characters is {max_characters}, expected 1 or more, or None for no bound")
    for path in files_of(paths):
        tally.rows.setdefault(str(path), 0)
        for line, row in _rows(path, kind, columns):
            place = f"{path}:{line}"
            source = str(path) if path.suffix.lower() in (".txt", ".md") else place
            try:
                record = parse(_fields(row), source, max_characters)
            except _Unfit as unfit:
                if on_bad_row == "error":
                    raise BadRow(f"{place}: {unfit}") from None
                tally.skip(place, str(unfit))
            else:
                tally.rows[str(path)] += 1
                yield record


def files_of(paths: Paths) -> list[Path]:
    """The files that paths name, those in folders sorted; ValueError if one is missing or holds none that is known."""
    files: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        if not path.exists():
            raise ValueError(f"{path}: found no such file or folder; check the path")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        known = [file for file in inside if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not known:
            raise ValueError(f"{path}: found no file ending in {' '.join(SUFFIXES)}; check the path or rename it")
        files += known
    return files


class _Unfit(ValueError):
    """Why a row cannot be used; the first words name the fault, the same for every row that has it."""

    def __init__(self, fault: str, found: str, expected: str, mend: str = "mend or delete the row") -> None:
        reason = f"{fault}: found {found}, expected {expected}; {mend}"
        super().__init__(reason.encode(errors="backslashreplace").decode())  # a broken key must not break the report


def _rows(path: Path, kind: str, columns: Mapping[str, str] | None = None) -> Iterator[tuple[int, object]]:
    # A row that cannot be parsed is yielded as its _Unfit: a generator that raises could not go on to the next row.
    suffix = path.suffix.lower()
    if suffix in (".txt", ".md"):
        yield _whole_text(path, kind)
    elif suffix == ".jsonl":
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                yield number, _not_utf8(line) or _json(line, "one object a line; one list belongs in a .json file")
    elif suffix == ".json":
        rows = _json("".join(_lines(path)), "one list in the file; one object a line belongs in a .jsonl file")
        yield from enumerate(rows if isinstance(rows, list) else [rows], 1)
    else:
        yield from _table(path, suffix, kind, columns or {})


def _lines(path: Path) -> Iterator[str]:
    """Lines with their LF; a byte that is not UTF-8 becomes a lone surrogate, so that it costs its own row alone."""
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 0 else raw
            yield raw.decode(errors="surrogateescape").replace("\r\n", "\n")


def _whole_text(path: Path, kind: str) -> tuple[int, object]:
    if kind != "documents":
        return 1, _Unfit("a text file", path.suffix, f"rows of {kind}", "name the files to read, not their folder")
    lines = list(_lines(path))
    title = next((heading[1] for line in lines if (heading := HEADING.match(line))), "")
    broken = next((number for number, line in enumerate(lines, 1) if _not_utf8(line)), 1)
    return broken, {"text": "".join(lines), "title": title}


def _json(text: str, expected: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return _Unfit("invalid JSON", str(error), expected)


def _table(path: Path, suffix: str, kind: str, columns: Mapping[str, str]) -> Iterator[tuple[int, object]]:
    triples = suffix == ".tsv" and kind == "triples"
    reader = csv.reader(
        _lines(path),
        delimiter="," if suffix == ".csv" else "\t",
        quoting=csv.QUOTE_NONE if triples else csv.QUOTE_MINIMAL,
        strict=True,  # without it, a quote that is never closed swallows the rest of the file into one cell
    )
    names = ["head", "relation", "tail"] if triples else []
    first = True
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            span = f"{error}, in lines {line} to {reader.line_num}"
            yield line, _Unfit("invalid CSV", span, "cells closed by a quote", 'write " inside a cell as ""')
            continue
        blank = not cells or (len(cells) == 1 and cells[0].isspace())
        if blank or (triples and cells[0].startswith("#")):
            continue
        if first and (not names or [cell.strip() for cell in cells] == names):
            names = [cell.strip() for cell in cells]
            _check_header(f"{path}:{line}", names, columns)
        else:
            yield line, _named(cells, names, columns)
        first = False


def _check_header(place: str, names: list[str], columns: Mapping[str, str]) -> None:
    if unfit := _not_utf8(",".join(names)):
        raise BadRow(f"{place}: {unfit}")
    if lacking := set(columns.values()) - set(names):
        raise ValueError(f"{place}: found columns {', '.join(names)}, expected {', '.join(lacking)}; mend `columns`")
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise ValueError(f"{place}: found the column {', '.join(twice)} twice, expected it once; rename one")


def _named(cells: list[str], names: list[str], columns: Mapping[str, str]) -> object:
    if len(cells) != len(names):
        expected = f"{len(names)} ({', '.join(names)})"
        return _Unfit("wrong number of columns", str(len(cells)), expected, "quote a cell that holds the separator")
    row = dict(zip(names, cells, strict=True))
    rest = {name: cell for name, cell in row.items() if name not in columns.values()}
    return rest | {name: row[column] for name, column in columns.items()}


def _not_utf8(text: str) -> _Unfit | None:
    if broken := LONE_SURROGATE.search(text):
        found = f"{ascii(broken[0])} at character {broken.start() + 1} (\\udcXX stands for byte XX)"
        return _Unfit("invalid UTF-8", found, "UTF-8 text", "convert the file, as by iconv -f GB18030 -t UTF-8")
    return None


def _check_length(limit: int | None, *texts: str) -> None:
    if limit is not None and (length := sum(map(len, texts))) > limit:
        raise _Unfit("over-long", f"{length} characters", f"at most {limit}", "split the row or raise max_characters")


def _typed(value: object, kind: type[T], name: str) -> T:
    if isinstance(value, kind):
        return value
    raise _Unfit(f"{name} has the wrong type", "null" if value is None else type(value).__name__, kind.__name__)


def _fields(row: object) -> Row:
    if isinstance(row, _Unfit):
        raise row
    return _typed(row, dict, "the row")


def _field(row: Row, names: Iterable[str], expected: str) -> str:
    if name := next((name for name in names if name in row), None):
        return name
    raise _Unfit("missing field", f"the keys {', '.join(row) or '(none)'}", expected, "rename or add the field")


def _text(row: Row, name: str, *, optional: bool = False) -> str:
    if optional and row.get(name) is None:
        return ""
    text = _typed(row[_field(row, [name], name)], str, name)
    if not text.strip():
        if optional:
            return ""
        raise _Unfit(f"{name} is empty", repr(text), "some text")
    if unfit := _not_utf8(text):  # bytes of a table or .json, or an escaped half of a pair: tokenizers stop at either
        raise unfit
    return text


def _messages(row: Row, name: str) -> list[Message]:
    messages = []
    for turn in _typed([row[name]] if isinstance(row[name], dict) else row[name], list, name):
        fields = _typed(turn, dict, f"a message of {name}")
        written = _text(fields, _field(fields, ("from", "role"), "role or from"))
        if (role := ROLES.get(written)) is None:
            raise _Unfit("unknown role", repr(written), ", ".join(ROLES))
        # Many exports write an empty system message in every row: it says as much as none.
        content = _text(fields, _field(fields, ("value", "content"), "content or value"), optional=role == "system")
        messages += [_message(fields, role, content, _loss(fields, role))] if content else []
    return messages


def _message(fields: Row, role: str, content: str, loss: bool = True) -> Message:
    """A message; what an assistant thought stands in a field of its own, or in the content before the answer."""
    reasoning = _text(fields, "reasoning_content", optional=True) if role == "assistant" else ""
    message = Message(role, content, loss, reasoning)
    if not message.content.strip():
        raise _Unfit("no answer after the reasoning", repr(content[-40:]), "an answer after </think>")
    return message


def _loss(fields: Row, role: str) -> bool:
    flags = {}
    for key, kind, expected in (("loss", bool, "true or false"), ("weight", int, "0 or 1")):
        if key in fields:
            value = fields[key]
            if type(value) is not kind or value not in (0, 1):  # True is an int too, and 1.0 is in (0, 1)
                raise _Unfit(f"{key} of a message is unusable", json.dumps(value)[:40], expected)
            flags[key] = bool(value)
    if len(set(flags.values())) > 1:
        raise _Unfit("loss and weight disagree", str(flags), "one of the two")
    if role != "assistant" and any(flags.values()):
        raise _Unfit(f"{next(iter(flags))} asks for loss on another's words", role, "assistant", "remove the flag")
    return role != "assistant" or all(flags.values())


def _alternating(row: Row, messages: list[Message], last: str) -> tuple[Message, ...]:
    if system := _text(row, "system", optional=True):
        messages = [Message("system", system), *messages]
    turns = [message.role for message in messages]
    turns = turns[1:] if turns[:1] == ["system"] else turns
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise _Unfit("roles do not alternate", f"{role} as turn {number + 1} after any system message", expected)
    if turns[-1:] != [last]:
        raise _Unfit(f"no {last} turn at the end", turns[-1] if turns else "no turn", last)
    return tuple(messages)


def _document(row: Row, source: str, limit: int | None) -> Document:
    text = _text(row, "text")
    _check_length(limit, text)
    return Document(text, source, _text(row, "title", optional=True), *_topic(row))


def _conversation(row: Row, source: str, limit: int | None) -> Conversation:
    turns = next((name for name in TURNS if name in row), None)
    messages = _alternating(row, _messages(row, turns) if turns else _question_and_answer(row), "assistant")
    if not any(message.loss for message in messages if message.role == "assistant"):
        raise _Unfit("nothing carries loss", "loss false on every assistant message", "one that is learnt from")
    _check_length(limit, *(message.written for message in messages))
    task = row.get("task")
    return Conversation(messages, source, task if isinstance(task, str) else "", *_topic(row))


def _topic(row: Row) -> tuple[str, str]:
    """(disease, department) where a row names them; what is no text says nothing."""
    disease, department = row.get("disease"), next((row[name] for name in DEPARTMENTS if row.get(name)), "")
    said = [text if isinstance(text, str) and not _not_utf8(text) else "" for text in (disease, department)]
    return said[0], said[1]


def _question_and_answer(row: Row) -> list[Message]:
    expected = "question and answer, instruction and output, conversations, conversation or messages"
    question, answer = _field(row, QUESTIONS, expected), _field(row, ANSWERS, expected)
    messages = []
    for pair in _typed(row.get("history") or [], list, "history"):
        if len(_typed(pair, list, "a pair of history")) != 2:
            raise _Unfit("history is not in pairs", f"{len(pair)} items", "[question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(_message({}, role, _text({"history": text}, "history")))
    extra = _text(row, "input", optional=True)
    asked = _text(row, question) + (f"\n{extra}" if extra else "")
    return [*messages, Message("user", asked), _message(row, "assistant", _text(row, answer))]


def _preference(row: Row, source: str, limit: int | None) -> PreferencePair:
    expected = "prompt (or conversations), chosen and rejected"
    name = _field(row, ("prompt", *TURNS), expected)
    written = [Message("user", _text(row, name))] if isinstance(row[name], str) else _messages(row, name)
    # Of a pair only the replies carry loss: what the prompt's own flags say is true either way.
    prompt = tuple(replace(message, loss=True) for message in _alternating(row, written, "user"))
    chosen, rejected = (_reply(row, _field(row, [reply], expected), prompt) for reply in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise _Unfit("chosen equals rejected", repr(chosen[:40]), "two different replies", "delete the row")
    _check_length(limit, *(message.written for message in prompt), max(chosen, rejected, key=len))
    return PreferencePair(prompt, chosen, rejected, source, *_topic(row))


def _reply(row: Row, name: str, prompt: tuple[Message, ...]) -> str:
    if not isinstance(row[name], list | dict):
        return _text(row, name)
    messages = _messages(row, name)
    last = messages[-1] if messages else Message("no message", "")
    if last.role != "assistant":
        raise _Unfit(f"{name} does not end with a reply", last.role, "assistant")
    if not last.loss:
        raise _Unfit(f"{name} carries no loss", "loss false", "a reply that is learnt from")
    repeated = tuple(replace(message, loss=True) for message in messages[:-1])
    if repeated not in ((), prompt, prompt[prompt[0].role == "system" :]):
        raise _Unfit(f"{name} repeats another prompt", f"{len(messages) - 1} other messages", "those of the prompt")
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
