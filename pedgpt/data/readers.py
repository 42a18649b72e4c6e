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
from typing import Any

from pedgpt.data.inputs import TEXTS, PathLike, Paths, files_of, format_of
from pedgpt.data.records import (
    FIELDS,
    KINDS,
    NAMES,
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


def read_documents(paths: Paths, **settings: Any) -> list[Document]:
    """Read whole .txt and .md files, titled by their first markdown heading, and rows of `text`, optionally `title`."""
    return _read(paths, "documents", **settings)


def read_conversations(paths: Paths, **settings: Any) -> list[Conversation]:
    """Read conversations, each row in any of these forms, with optional `system` and `task`.

    Alpaca (`instruction`, `input`, `output`, `history`), ShareGPT (`conversations`), OpenAI (`messages`),
    `conversation` of patient and doctor, `question` and `answer`, TRL's `prompt` and `completion`. A `title` is not
    part of the question; an exam's `options` are.
    What an assistant thought is read from `reasoning_content`, or from `<think>…</think>` before its answer.
    An assistant's message with `"loss": false`, or `"weight": 0` as OpenAI writes it, carries no loss; if none carries
    any, the row is bad. A row whose `label` is false (KTO: an undesirable answer) is left out.
    """
    return _read(paths, "conversations", **settings)


def read_preferences(paths: Paths, **settings: Any) -> list[PreferencePair]:
    """Read `prompt` (or ShareGPT `conversations`, or `question`), `chosen` and `rejected`, with optional `system`.

    Each is a string or a list of messages; a reply may be one message, or repeat the whole prompt, which is removed.
    Without a prompt it is what both lists of messages begin with, as in TRL.
    """
    return _read(paths, "preferences", **settings)


def read_triples(paths: Paths, **settings: Any) -> list[Triple]:
    """Read TSV of head, relation, tail (# begins a comment, quotes are text), or rows with those keys."""
    return _read(paths, "triples", **settings)


def _read(paths: Paths, kind: str, summary: ReadSummary | None = None, **settings: Any) -> list[Any]:
    told = summary or ReadSummary()
    records = list(iter_records(paths, kind, summary=told, **settings))
    if summary is None and told.skipped:
        warnings.warn(f"some rows were skipped\n{told.describe()}", stacklevel=3)
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

    `kind` is "documents", "conversations", "preferences" or "triples". A bad row raises BadRow, or is counted in the
    summary if `on_bad_row` is "skip". `max_characters` bounds all messages, or a prompt and its longer reply. `columns`
    names the column of each field whose column has no known name, {"question": "ask"}; a file without any of these
    columns is read by its own names, with a warning.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f'on_bad_row is {on_bad_row!r}, expected "error" or "skip"')
    if max_characters is not None and max_characters < 1:
        raise ValueError(f"max_characters is {max_characters}, expected 1 or more, or None for no bound")
    own, summary, left_out = _own(columns, kind), summary or ReadSummary(), dict[Path, str]()
    files = files_of(paths, left_out)
    summary.skipped += [SkippedRow(str(file), 0, f"left out, {reason}") for file, reason in left_out.items()]
    for path in files:
        summary.rows.setdefault(str(path), 0)
        whole, checked = format_of(path) in TEXTS, not own
        rows = read_rows(path, triples=kind == "triples")
        if whole and kind != "documents":
            rows = iter([(1, Unfit("a text file", path.suffix, f"rows of {kind}", "name the files, not their folder"))])
        for line, row in rows:
            place = f"{path}:{line}"
            if not checked and isinstance(row, dict):
                checked = True
                _check_columns(path, row, own)
            try:
                record = KINDS[kind][0](fields_of(row, own), str(path) if whole else place, max_characters)
            except Unfit as unfit:
                if on_bad_row == "error" and not isinstance(unfit, LeftOut):
                    raise BadRow(f"{place}: {unfit}") from None
                summary.skip(place, str(unfit))
            else:
                file = place.rpartition(":")[0]
                summary.rows[file] = summary.rows.get(file, 0) + 1
                yield record


def _check_columns(path: Path, row: dict[str, Any], own: dict[str, str]) -> None:
    """Warn if a file's first row has no column that `columns` names; ValueError if a table has only some of them."""
    lacking = [column for column in own.values() if column not in row]
    if len(lacking) == len(own):
        found = f"found none of the columns {', '.join(lacking)}"
        warnings.warn(f"{path}: {found}, so the file's own names are used", stacklevel=5)
    elif lacking and format_of(path) not in (".json", ".jsonl"):  # there each row may have other fields
        found = f"found columns {', '.join(row)}, expected {', '.join(lacking)}"
        raise ValueError(f"{path}:1: {found}; fix `columns`")


def parse_columns(columns: Iterable[str]) -> dict[str, str]:
    """The setting `columns` of the recipes, ["question=ask", "answer=reply"], as the readers take it."""
    found: dict[str, str] = {}
    for name, _, column in (item.partition("=") for item in columns):
        name, column = name.strip(), column.strip()
        if name not in FIELDS or not column:
            hint = nearest(name, FIELDS, "fields") if name not in FIELDS else "expected the name of a column after ="
            raise ValueError(f"columns: {name}={column} is not of the form field=column; {hint}")
        if name in found:
            raise ValueError(f"columns: {name}: a field is given twice")
        found[name] = column
    return found


def _own(columns: Columns, kind: str) -> dict[str, str]:
    """The given columns, without those for fields that this kind of record does not have."""
    columns, (_, needed, others) = columns or {}, KINDS[kind]
    if unknown := columns.keys() - FIELDS.keys():
        raise ValueError(f"columns has {', '.join(unknown)}, expected some of {', '.join(needed + others)}")
    return {name: column for name, column in columns.items() if name in needed + others}


def detect_kind(path: PathLike, columns: Columns = None) -> str:
    """Tell "documents", "conversations", "preferences" or "triples" by a file's first rows.

    Raises NoData if nothing there has a known field, and ValueError with the reason if rows cannot be used.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path}: found a folder, expected one file; name a file in it")
    (file,) = files_of(path)
    tsv = format_of(file) == ".tsv"
    kinds = sorted(KINDS, key=lambda kind: tsv and kind == "triples")  # last: any TSV of three columns could hold them
    first_rows = cache(lambda triples: list(islice(read_rows(file, triples=triples), 20)))
    reasons: list[tuple[int, str]] = []  # how many fields are known or named, and why a row cannot be used
    for kind in ["documents"] if format_of(file) in TEXTS else kinds:
        own, (parse, needed, _) = _own(columns, kind), KINDS[kind]
        known = {*own.values(), *(name for field in needed for name in NAMES[field])}
        try:
            for line, row in first_rows(tsv and kind == "triples"):
                try:
                    with suppress(LeftOut):
                        parse(fields_of(row, own), "", None)
                    return kind
                except Unfit as unfit:
                    names = fields_of(row) if isinstance(row, dict) else known if isinstance(row, Unfit) else ()
                    count, fix = len(known.intersection(names)), "if it is data, name its fields by `columns`"
                    unknown = f"no known field, found the fields {some(names)}; {fix}"
                    told = f"{file}:{line}: {unfit}" if count else f"{file}: {unknown}"
                    reasons.append((count and count + len(own), told))
        except ValueError as error:  # the file
            reasons.append((len(known), str(error)))
    count, why = max(reasons, key=lambda reason: reason[0], default=(0, f"{file}: no row in it"))
    raise ValueError(why) if count else NoData(why)


class _Watched(dict[str, Any]):
    """A row that remembers in `taken` which of its fields were read."""

    taken: set[str]

    def __getitem__(self, name: str) -> Any:
        self.taken.add(name)
        return super().__getitem__(name)


def field_mapping(path: PathLike, kind: str, columns: Columns = None) -> str:
    """Which fields of a file its reader takes for what, and which it ignores, by the first good row; for people.

    E.g. "question → user, raw_anwser → assistant, department; ignored: id".
    """
    (file,) = files_of(path)
    if format_of(file) in TEXTS:
        return "the whole file → text"
    own, (parse, *fields) = _own(columns, kind), KINDS[kind]
    known = [FIELDS[field] for field in FIELDS if field in sum(fields, ())]
    meanings = {name: meaning for meaning, names in known for name in names.split()}
    for _, row in islice(read_rows(file, triples=kind == "triples"), 20):
        with suppress(Unfit):
            watched = _Watched(fields_of(row, own))
            watched.taken = set()
            parse(watched, "", None)
            taken = [(name, meaning) for name, meaning in meanings.items() if name in watched.taken]
            found = ", ".join(name if meaning == name else f"{name} → {meaning}" for name, meaning in taken)
            ignored = ", ".join(name for name in watched if name not in watched.taken)
            return f"{found}; ignored: {ignored}" if ignored else found
    return "no good row at its start"
