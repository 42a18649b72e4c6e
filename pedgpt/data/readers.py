"""Readers of every input format: documents, conversations, preference pairs and knowledge-graph triples.

A path names a file, or a folder, which stands for all files of data in it and in its subfolders. `tables.py` finds the
files and cuts them into rows, and `records.py` makes a record of a row. Blank lines are no rows; every other row is
returned or reported. A path or file that cannot be read and a wrong setting are a ValueError.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pedgpt.data.records import KINDS, Conversation, Document, PreferencePair, ReadSummary, fields_of, names_of
from pedgpt.data.tables import TEXTS, PathLike, Paths, Unfit, files_of, format_of, read_rows
from pedgpt.files import nearest

Columns = Mapping[str, str] | None


class NoData(ValueError):
    """A file whose first rows have no field of any kind of records."""


class BadRow(ValueError):
    """A row that cannot be used: "file:line: fault: what was found, what was expected; how to fix it"."""


def read_documents(paths: Paths, **settings: Any) -> list[Document]:
    """Read whole .txt and .md files, titled by their first markdown heading, and rows of `text`, optionally `title`."""
    return _read(paths, "documents", **settings)


def read_conversations(paths: Paths, **settings: Any) -> list[Conversation]:
    """Read Alpaca, ShareGPT, OpenAI `messages`, `question` and `answer`, `prompt` and `completion`, with any `system`.

    What an assistant thought is read from `reasoning_content`, or from `<think>…</think>` before its answer. A message
    with `"loss": false`, or `"weight": 0` as OpenAI writes it, carries no loss. A row without any loss is bad, and so
    is one whose `label` is false (KTO: an undesirable answer).
    """
    return _read(paths, "conversations", **settings)


def read_preferences(paths: Paths, **settings: Any) -> list[PreferencePair]:
    """Read `prompt` (or `conversations`, or `question`), `chosen` and `rejected`, each a string or a list of messages.

    A reply may repeat the whole prompt, which is removed; without a prompt it is what both replies begin with (TRL).
    """
    return _read(paths, "preferences", **settings)


def _read(paths: Paths, kind: str, summary: ReadSummary | None = None, **settings: Any) -> list[Any]:
    told = summary or ReadSummary()
    records = list(iter_records(paths, kind, summary=told, **settings))
    if summary is None and told.skipped:
        warnings.warn(f"some rows were skipped\n{told.describe()}", stacklevel=3)
    return records


def iter_records(
    paths: Paths, kind: str, *, on_bad_row: str = "error", summary: ReadSummary | None = None, columns: Columns = None
) -> Iterator[Any]:
    """The records of a kind ("documents"), one by one, in the memory of a row; only a JSON list is held whole.

    "triples" are TSV of head, relation, tail (# begins a comment, quotes are text), or rows with those keys. A bad row
    raises BadRow, or is counted in the summary if `on_bad_row` is "skip". `columns` names the column of each field
    whose column has no known name, {"question": "ask"}; a row with none of them is read by its own names.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f'on_bad_row is {on_bad_row!r}, expected "error" or "skip"')
    parse, _, fields = KINDS[kind]
    own = _own(columns, fields)
    summary, left_out = summary or ReadSummary(), dict[Path, str]()
    files = files_of(paths, left_out)
    for path, reason in left_out.items():
        summary.skip(str(path), reason)
    for path in files:
        summary.rows.setdefault(str(path), 0)
        whole, warned = format_of(path) in TEXTS, not own
        for line, row in read_rows(path, triples=kind == "triples"):
            if not warned and isinstance(row, dict) and row.keys().isdisjoint(dict(own).values()):
                warned, found = True, f"found none of the columns {', '.join(dict(own).values())}"
                warnings.warn(f"{path}: {found}, so the file's own names are used", stacklevel=4)
            place = f"{path}:{line}"
            try:
                record = parse(fields_of(row, fields, own), str(path) if whole else place)
            except Unfit as unfit:
                if on_bad_row == "error":
                    raise BadRow(f"{place}: {unfit}") from None
                summary.skip(place, str(unfit))
            else:
                file = place.rpartition(":")[0]
                summary.rows[file] = summary.rows.get(file, 0) + 1
                yield record


def parse_columns(columns: Iterable[str]) -> dict[str, str]:
    """The setting `columns` of the recipes, ["question=ask", "answer=reply"], as the readers take it."""
    known = sorted({field for _, _, fields in KINDS.values() for field in fields})
    found: dict[str, str] = {}
    for item in columns:
        field, _, column = (part.strip() for part in item.partition("="))
        if field not in known or field in found or not column:
            hint = "" if field in known else f"; {nearest(field, known, 'fields')}"
            raise ValueError(f"columns: found {item!r}, expected field=column, each field once{hint}")
        found[field] = column
    return found


def _own(columns: Columns, fields: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The given columns, but for those of fields that another kind of records has."""
    given = parse_columns(f"{field}={column}" for field, column in (columns or {}).items())
    return tuple((field, column) for field, column in given.items() if field in fields)


def detect_kind(path: PathLike, columns: Columns = None) -> str:
    """Tell "documents", "conversations", "preferences" or "triples" by the fields of the first rows.

    Of a folder the first file counts. Raises ValueError if no kind has all its fields, and NoData if none has any.
    """
    file = files_of(path)[0]
    faults, names, some = list[ValueError](), tuple[str, ...](), False
    for kind, (_, needed, fields) in KINDS.items():
        try:
            for _, row in islice(read_rows(file, triples=kind == "triples"), 20):
                names = tuple(key for key in row if row[key] is not None) if isinstance(row, dict) else names
                found = set(names_of(names, fields, _own(columns, fields)).values())
                if any(group <= found for group in needed):
                    return kind
                some = some or any(group & found for group in needed)
        except ValueError as fault:  # a first row of triples may be no header
            faults.append(fault)
    told = f"rows of no known kind, found the fields {', '.join(names[:20]) or '(none)'}"
    unknown = (ValueError if some else NoData)(f"{file}: {told}; if it is data, name its fields by `columns`")
    raise faults[0] if faults else unknown


def field_mapping(path: PathLike, kind: str, columns: Columns = None) -> str:
    """Which fields of a file its reader takes for what, and which it ignores, by the first row; for people.

    E.g. "question, raw_anwser → answer, department; ignored: id".
    """
    rows = (row for _, row in read_rows(files_of(path)[0], triples=kind == "triples") if isinstance(row, dict))
    row = next(rows, {})
    names = names_of(tuple(row), KINDS[kind][2], _own(columns, KINDS[kind][2]))
    taken = [name if names[name] == name else f"{name} → {names[name]}" for name in row if name in names]
    ignored = [name for name in row if name not in names]
    return ", ".join(taken) + (f"; ignored: {', '.join(ignored)}" if ignored else "")
