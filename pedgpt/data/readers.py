"""Readers of every input format: documents, conversations, preference pairs and knowledge-graph triples.

A path names a file, or a folder, which stands for all files of data in it and in its subfolders. `inputs.py` finds the
files, `tables.py` cuts them into rows, and `records.py` makes a record of a row. Blank lines are no rows; every other
row is returned or reported.

A missing path, an empty folder, an unknown extension, a table's unusable header or a wrong setting is a ValueError.
Files in a folder that are no data, and rows that must not be learnt from, are left out whatever `on_bad_row` says; the
summary gives the reason.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, Unpack

from pedgpt.data.inputs import TEXTS, PathLike, Paths, files_of, format_of
from pedgpt.data.records import (
    FIELDS,
    KEYS,
    MEANINGS,
    PARSERS,
    Columns,
    Conversation,
    Document,
    LeftOut,
    PreferencePair,
    ReadSummary,
    SkippedRow,
    Triple,
    fields_of,
    some,
)
from pedgpt.data.tables import Unfit, read_rows
from pedgpt.files import nearest


class NoData(ValueError):
    """A file in which no field of any row is one that is known."""


class BadRow(ValueError):
    """A row that cannot be used: "file:line: fault: what was found, what was expected; how to fix it"."""


class Settings(TypedDict, total=False):
    """What every reader takes."""

    on_bad_row: str  # "error" raises BadRow at the first bad row; "skip" leaves it out and counts it in the summary
    max_characters: int | None  # bound on a row's text: all messages; a pair's prompt and its longer reply
    summary: ReadSummary | None  # to add to; without one, skipped rows are described in a warning
    # The column of each field whose column has no known name: {"question": "ask"}. A file without any of these columns
    # is read by its own names, with a warning.
    columns: Columns


def read_documents(paths: Paths, **settings: Unpack[Settings]) -> list[Document]:
    """Read whole .txt and .md files, titled by their first markdown heading, and rows of `text`, optionally `title`."""
    return _read(paths, "documents", settings)


def read_conversations(paths: Paths, **settings: Unpack[Settings]) -> list[Conversation]:
    """Read conversations, each row in any of these forms, with optional `system` and `task`.

    Alpaca (`instruction`, `input`, `output`, `history`), ShareGPT (`conversations`), OpenAI (`messages`),
    `conversation` of patient and doctor, `question` and `answer`, TRL's `prompt` and `completion`. A `title` is not
    part of the question; an exam's `options` are.
    What an assistant thought is read from `reasoning_content`, or from `<think>…</think>` before its answer.
    An assistant's message with `"loss": false`, or `"weight": 0` as OpenAI writes it, carries no loss; if none carries
    any, the row is bad. A row whose `label` is false (KTO: an undesirable answer) is left out.
    """
    return _read(paths, "conversations", settings)


def read_preferences(paths: Paths, **settings: Unpack[Settings]) -> list[PreferencePair]:
    """Read `prompt` (or ShareGPT `conversations`, or `question`), `chosen` and `rejected`, with optional `system`.

    Each is a string or a list of messages; a reply may be one message, or repeat the whole prompt, which is removed.
    Without a prompt it is what both lists of messages begin with, as in TRL.
    """
    return _read(paths, "preferences", settings)


def read_triples(paths: Paths, **settings: Unpack[Settings]) -> list[Triple]:
    """Read TSV of head, relation, tail (# begins a comment, quotes are text), or rows with those keys."""
    return _read(paths, "triples", settings)


def _read(paths: Paths, kind: str, settings: Settings) -> list[Any]:
    summary = settings.get("summary") or ReadSummary()
    complete: Settings = {**settings, "summary": summary}
    records = list(iter_records(paths, kind, **complete))
    if settings.get("summary") is None and summary.skipped:
        warnings.warn(f"some rows were skipped\n{summary.describe()}", stacklevel=3)
    return records


def iter_records(
    paths: Paths,
    kind: str,
    *,
    on_bad_row: str = "error",
    max_characters: int | None = None,
    summary: ReadSummary | None = None,
    columns: Columns = None,
) -> Iterator[Any]:
    """What the reader of that kind returns, one by one, so that a file of any size takes the memory of a row.

    `kind` is "documents", "conversations", "preferences" or "triples". Without a summary, skipped rows are not told.
    """
    if kind not in PARSERS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(PARSERS)}")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f'on_bad_row is {on_bad_row!r}, expected "error" or "skip"')
    if max_characters is not None and max_characters < 1:
        raise ValueError(f"max_characters is {max_characters}, expected 1 or more, or None for no bound")
    own, summary, left_out = _own(columns, kind), summary or ReadSummary(), dict[Path, str]()
    files = files_of(paths, left_out)
    summary.skipped += [SkippedRow(str(file), 0, f"left out, {reason}") for file, reason in left_out.items()]
    for path in files:
        summary.rows.setdefault(str(path), 0)
        named = not own
        for line, row in _rows(path, kind, own):
            place = f"{path}:{line}"
            if not named and isinstance(row, dict):
                named = True
                if row.keys().isdisjoint(own.values()):
                    found = f"found none of the columns {', '.join(own.values())}"
                    warnings.warn(f"{place}: {found}, so the file's own names are used", stacklevel=4)
            try:
                source = str(path) if format_of(path) in TEXTS else place
                record = PARSERS[kind](fields_of(row, own), source, max_characters)
            except Unfit as unfit:
                if on_bad_row == "error" and not isinstance(unfit, LeftOut):
                    raise BadRow(f"{place}: {unfit}") from None
                summary.skip(place, str(unfit))
            else:
                file = place.rpartition(":")[0]
                summary.rows[file] = summary.rows.get(file, 0) + 1
                yield record


def _rows(path: Path, kind: str, own: dict[str, str]) -> Iterator[tuple[int | str, object]]:
    if kind != "documents" and format_of(path) in TEXTS:
        yield 1, Unfit("a text file", path.suffix, f"rows of {kind}", "name the files to read, not their folder")
    else:
        yield from read_rows(path, triples=kind == "triples", columns=own.values())


def parse_columns(columns: Iterable[str]) -> dict[str, str]:
    """The setting `columns` of the recipes, ["question=ask", "answer=reply"], as the readers take it."""
    pairs = [(name.strip(), column.strip()) for name, _, column in (item.partition("=") for item in columns)]
    known = dict.fromkeys(field for fields in FIELDS.values() for field in fields)
    for name, column in pairs:
        if name not in known or not column:
            hint = nearest(name, known, "fields") if name not in known else "expected the name of a column after ="
            raise ValueError(f"columns: {name}={column} is not of the form field=column; {hint}")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"columns: {', '.join(name for name, _ in pairs)}: a field is given twice")
    return dict(pairs)


def _own(columns: Columns, kind: str) -> dict[str, str]:
    """The given columns, without those for fields that this kind of record does not have."""
    if unknown := set(columns or ()) - {field for fields in FIELDS.values() for field in fields}:
        raise ValueError(f"columns has {', '.join(unknown)}, expected some of {', '.join(FIELDS[kind])}")
    return {name: column for name, column in (columns or {}).items() if name in FIELDS[kind]}


def detect_kind(path: PathLike, columns: Columns = None) -> str:
    """Tell "documents", "conversations", "preferences" or "triples" by a file's first rows.

    Raises NoData if nothing there has a known field, and ValueError with the reason if rows cannot be used.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path}: found a folder, expected one file; name a file in it")
    (file,) = files_of(path)
    # Any TSV of three columns could hold triples, so there they come last; elsewhere their keys are the surer sign.
    tsv = format_of(file) == ".tsv"
    kinds = ["preferences", "conversations", *(["documents"] if tsv else []), "triples", "documents"]

    @cache
    def first_rows(triples: bool, *names: str) -> list[tuple[int | str, object]]:
        return list(islice(read_rows(file, triples=triples, columns=names), 20))

    reasons: list[tuple[bool, int, str]] = []  # (a field is missing, −known fields, why); the smallest is told
    unknown = "no row in it"
    for kind in ["documents"] if format_of(file) in TEXTS else dict.fromkeys(kinds):
        own = _own(columns, kind)
        try:
            for line, row in first_rows(tsv and kind == "triples", *own.values()):
                try:
                    PARSERS[kind](fields_of(row, own), "", None)
                    return kind
                except LeftOut:
                    return kind
                except Unfit as unfit:
                    known = len(fields_of(row).keys() & {*KEYS[kind], *own.values()}) if isinstance(row, dict) else 0
                    if known or isinstance(row, Unfit):
                        missing = str(unfit).startswith("missing field")
                        reasons.append((missing, -known - len(own), f"{file}:{line}: {unfit}"))
                    elif not reasons:
                        found = f"the fields {some(row)}" if isinstance(row, dict) else type(row).__name__
                        unknown = f"no known field, found {found}; if it is data, name its fields by `columns`"
        except ValueError as error:  # the file, or its columns for this kind
            reasons.append((False, 0, str(error)))
    if reasons:
        raise ValueError(min(reasons, key=lambda reason: reason[:2])[2])
    raise NoData(f"{file}: {unknown}")


class _Watched(dict[str, Any]):
    """A row that remembers which of its fields were read."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.taken: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.taken.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The field of that name."""
        return self[name] if name in self else default


def field_mapping(path: PathLike, kind: str, columns: Columns = None) -> str:
    """Which fields of a file its reader takes for what, and which it ignores, by the first good row; for people.

    E.g. "question → user, raw_anwser → assistant, department; ignored: id".
    """
    (file,) = files_of(path)
    if format_of(file) in TEXTS:
        return "the whole file → text"
    own, meanings = _own(columns, kind), MEANINGS | ({"prompt": "turns"} if kind == "preferences" else {})
    for _, row in islice(_rows(file, kind, own), 20):
        with suppress(Unfit):
            watched = _Watched(fields_of(row, own))
            PARSERS[kind](watched, "", None)
            taken = [(name, meaning) for name, meaning in meanings.items() if name in watched.taken]
            ignored = [name for name in watched if name not in watched.taken]
            found = ", ".join(name if meaning in ("", name) else f"{name} → {meaning}" for name, meaning in taken)
            return found + (f"; ignored: {', '.join(ignored)}" if ignored else "")
    return "no good row at its start"
