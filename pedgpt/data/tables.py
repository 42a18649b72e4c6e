"""Files as rows: which files a path names, and how each format is opened, decoded and cut into rows.

Text may be gzipped (.gz) and is UTF-8, UTF-16 with its mark, or GB18030. JSON is one object a line, one list, or an
object whose `data` is the list, under either name; a table's cells are separated by the sign that its header contains
most often. .parquet and .xlsx need the extra "tables".
"""

import codecs
import csv
import gzip
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TextIO, cast

PathLike = str | os.PathLike[str]
Paths = PathLike | Iterable[PathLike]

TEXTS = (".txt", ".md")
SUFFIXES = (*TEXTS, ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx")
# Files beside the data: notes for people, and what other projects write about their data.
NOTES = re.compile(r"(readme|licen[cs]e|changelog|requirements|dataset_infos?)(?![a-z]).*", re.IGNORECASE)
BLOCK = 2**18  # bytes by which an encoding is recognised
HEADING = re.compile(r"#{1,6}[ \t]+(\S.*?)([ \t]+#+)?\s*$")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
DAMAGE = (ValueError, OSError, EOFError, KeyError, SyntaxError, RecursionError, zlib.error, zipfile.BadZipFile)
Rows = Iterator[tuple[int | str, object]]


class Unfit(ValueError):
    """Why a row cannot be used; the first words name the fault, the same for every row that has it."""

    def __init__(self, fault: str, found: str, expected: str, fix: str = "fix or delete the row") -> None:
        reason = f"{fault}: found {found}, expected {expected}; {fix}"
        super().__init__(reason.encode(errors="backslashreplace").decode())  # a broken key must not break the report


def stem_of(path: Path) -> str:
    """A file's name without its suffix, and without .gz."""
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def format_of(path: Path) -> str:
    """The format that a file's name tells: ".csv" for a.CSV and for a.csv.gz; empty if it is none of `SUFFIXES`."""
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path).suffix.lower()
    return suffix if suffix in SUFFIXES else ""


def files_in(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """The files in a folder and its subfolders that may hold data, sorted, and why others are left out.

    Hidden and temporary files are passed over.
    """
    files: list[Path] = []
    left_out: dict[Path, str] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(name.startswith((".", "~$", "__MACOSX")) for name in path.relative_to(folder).parts)
        if hidden or (path.is_dir() and not path.is_symlink()):
            continue
        if NOTES.fullmatch(path.name) and path.suffix.lower() in ("", ".json", *TEXTS):
            left_out[path] = "about the data, not data"
        elif not path.is_file() or not format_of(path):
            left_out[path] = "no file of a format that is read"
        elif not path.stat().st_size:
            left_out[path] = "empty"
        else:
            files.append(path)
    return files, left_out


def files_of(paths: Paths, left_out: dict[Path, str] | None = None) -> list[Path]:
    """The files that paths name, sorted within a folder; what a folder leaves out goes into `left_out` with the reason.

    Raises one ValueError about all paths that are missing, of no known format, or folders without data.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        found, others = files_in(path) if path.is_dir() else ([path] if path.exists() and format_of(path) else [], {})
        if not found:
            what = f"file ending in {' '.join(SUFFIXES)}" if path.exists() else "such file or folder"
            problems.append(f"{path}: found no {what}; check the path")
        files += found
        if left_out is not None:
            left_out |= others
    if problems:
        raise ValueError("\n".join(problems))
    return files


def read_rows(path: Path, *, triples: bool = False) -> Rows:
    """Yield (line, row) for each row of a file: its fields by name, or the `Unfit` that says why it has none.

    Elements of a JSON list and rows of a .parquet or .xlsx are numbered, from 1, in place of lines; those of a
    workbook's second and later sheets are "sheet:row". With `triples` a .tsv needs no header and its quotes are text.
    A file that cannot be read, or not to its end, is a ValueError.
    """
    line: int | str = 0
    suffix = format_of(path)
    binary = {".parquet": _parquet, ".xlsx": _workbook}.get(suffix)
    try:
        for line, row in binary(path) if binary else _text_rows(path, suffix, triples):
            yield line, row
    except ImportError as error:
        raise ValueError(f'{path}: reading it needs {error.name}: pip install -e ".[tables]"') from None
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read after line {line}: {reason}; fix the file or get it again") from None


def _text_rows(path: Path, suffix: str, triples: bool) -> Rows:
    with open_text(path) as text:
        if suffix in TEXTS:
            lines = list(text)
            title = next((heading[1] for line in lines if (heading := HEADING.match(line))), "")
            broken = next((number for number, line in enumerate(lines, 1) if LONE_SURROGATE.search(line)), 1)
            yield broken, {"text": "".join(lines), "title": title}
        elif suffix in (".json", ".jsonl"):
            yield from _json_rows(text)
        else:
            yield from _table(text, suffix, triples and suffix == ".tsv")


def open_text(path: Path) -> TextIO:
    """Open a text file, unpacked and in its encoding as recognised; every line ends at LF.

    A byte that is no text becomes a lone surrogate, U+DC00 + byte, so that it costs only its own row.
    """
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rb") as file:
        encoding = _encoding(file.read(BLOCK))
    return cast(TextIO, opened(path, "rt", encoding=encoding, errors="surrogateescape"))


def _encoding(sample: bytes) -> str:
    """The encoding of a file by its first bytes: the first in which few of those beyond ASCII are broken."""
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    beyond = b" ".join(re.findall(rb"[\x80-\xff]+", sample))
    # GB2312 has the characters of simplified Chinese, which Big5 or broken UTF-8 rarely seem to be.
    utf8, simplified = (beyond.decode(name, errors="replace") for name in ("utf-8", "gb2312"))
    broken = simplified.count("\ufffd")
    if b"\0" not in sample and utf8.count("\ufffd") <= broken + 1:  # the sample's end may cut a character
        return "utf-8-sig"
    if b"\0" not in sample and broken < 0.1 * len(simplified):
        return "gb18030"
    raise ValueError("found neither UTF-8 nor UTF-16 nor GB18030; convert it, perhaps by iconv -f BIG5 -t UTF-8")


def _json_rows(text: TextIO) -> Rows:
    """Objects, one a line; a list, or an object over several lines or alone in its file, is read whole."""
    first, *second = [line.strip()[:2] for line in islice(filter(str.strip, text), 2)] or ["", ""]
    text.seek(0)
    if first.startswith("[") or first == "{" or not second:
        value = json.load(text)
        value = value.get("data", value) if isinstance(value, dict) else value
        yield from enumerate(value if isinstance(value, list) else [value], 1)
        return
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, Unfit("invalid JSON", str(error), "one object a line, or one list")


def _table(text: TextIO, suffix: str, triples: bool) -> Rows:
    csv.field_size_limit(2**31 - 1)
    header = next(filter(str.strip, text), "")
    text.seek(0)
    separator = "\t" if suffix == ".tsv" else max(",;\t|", key=header.count)
    # strict: without it, a quote that is never closed takes the rest of the file into one cell
    quoting: Any = csv.QUOTE_NONE if triples else csv.QUOTE_MINIMAL
    reader = csv.reader(text, delimiter=separator, quoting=quoting, strict=True)
    names = ["head", "relation", "tail"] if triples else []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fault = Unfit("invalid CSV", str(error), "cells closed by a quote", 'write " inside a cell as ""')
            yield from ((lost, fault) for lost in range(line, reader.line_num + 1))
            continue
        if cells is None:
            return
        if not cells or (len(cells) == 1 and cells[0].isspace()) or (triples and cells[0].startswith("#")):
            continue
        if not names or [cell.strip() for cell in cells] == names:
            names = _header(cells)
        elif len(cells) == len(names):
            yield line, dict(zip(names, cells, strict=True))
        else:
            expected = f"{len(names)} ({', '.join(names)})"
            yield line, Unfit("wrong number of columns", f"{len(cells)}", expected, "quote a cell with the separator")


def _header(cells: Iterable[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise ValueError(f"found the column {', '.join(sorted(twice))} twice, expected it once")
    return names


def _parquet(path: Path) -> Rows:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=256, use_threads=False)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _workbook(path: Path) -> Rows:
    """The rows of each sheet as text; a sheet's first row with anything in it is its header."""
    from openpyxl import load_workbook

    with closing(load_workbook(path, read_only=True, data_only=True)) as book:
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # some programs write a wrong size
            names: list[str] = []
            for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
                # Excel writes a carriage return as _x000D_.
                cells = ["" if value is None else str(value).replace("_x000D_\n", "\n") for value in row]
                if names and any(cells):
                    line = number if sheet is book.worksheets[0] else f"{sheet.title}:{number}"
                    yield line, dict(zip_longest(names, cells, fillvalue=""))
                elif any(cells):
                    names = _header(cells)
