"""Files as rows: how each format is opened, decoded and cut into rows.

Text may be gzipped (.gz) and is UTF-8, UTF-16 or GB18030, with or without a byte-order mark; LF or CRLF ends a line, or
CR in a file without LF. A file's content decides, not its name: JSON is one object a line, one list, objects over
several lines, or an object around a list; a table's cells are separated by the sign that its header contains most
often.
.parquet and .xlsx need the extra "tables".
"""

import codecs
import csv
import gzip
import io
import json
import re
import shlex
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from pedgpt.data.inputs import TEXTS, format_of

BLOCK = 2**18  # characters, or bytes, that are read at once
HEADING = re.compile(r"#{1,6}[ \t]+(\S.*?)([ \t]+#+)?\s*$")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
USUAL = re.compile("[\t\n\r -~\xa0-\xff\u2000-\u206f\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
SIGN = re.compile("[^\\s,\ufeff]")  # what does not merely separate JSON values
FIRST_KEY = re.compile(r'\{\s*"((?:[^"\\]|\\.)*)"\s*:')
# An object around a list of rows begins like {"version": 1, "data": [{.
MEMBER = re.compile(r'[\s\ufeff,{]*("(?:[^"\\]|\\.)*")\s*:\s*')
WRAPPERS = "data|rows|examples|instances|items|records|train|validation|dev|test"
FURTHER = rf'"(?:{WRAPPERS})"\s*:\s*(?=\[\s*\{{)'
Rows = Iterator[tuple[int | str, object]]


class Unfit(ValueError):
    """Why a row cannot be used; the first words name the fault, the same for every row that has it."""

    def __init__(self, fault: str, found: str, expected: str, fix: str = "fix or delete the row") -> None:
        reason = f"{fault}: found {found}, expected {expected}; {fix}"
        super().__init__(reason.encode(errors="backslashreplace").decode())  # a broken key must not break the report


def read_rows(path: Path, *, triples: bool = False) -> Rows:
    """Yield (line, row) for each row of a file: its fields by name, or the `Unfit` that says why it has none.

    Elements of a JSON list and rows of a .parquet or .xlsx are numbered, from 1, in place of lines; those of a
    workbook's second and later sheets are "sheet:row". With `triples` a .tsv needs no header and its quotes are text.
    A file whose encoding is unknown is a ValueError, as is a table in which two columns have one name.
    """
    line: int | str = 0
    suffix = format_of(path)
    binary = {".parquet": _parquet, ".xlsx": _workbook}.get(suffix)
    try:
        # A row that cannot be parsed is yielded as its Unfit: a generator that raises could not go on to the next row.
        for line, row in binary(path) if binary else _text_rows(path, suffix, triples):
            yield line, row
    except ImportError as error:
        raise ValueError(f'{path}: reading it needs {error.name}: pip install -e ".[tables]"') from None
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        after = int(str(line).rpartition(":")[2]) + 1
        yield after, Unfit("damaged file", str(error), "a whole file", "get it again; what follows is lost")


def _text_rows(path: Path, suffix: str, triples: bool) -> Rows:
    with open_text(path) as text:
        if suffix in TEXTS:
            lines = [line.replace("\r\n", "\n") for line in text]
            title = next((heading[1] for line in lines if (heading := HEADING.match(line))), "")
            broken = next((number for number, line in enumerate(lines, 1) if not_utf8(line)), 1)
            yield broken, {"text": "".join(lines), "title": title}
        elif suffix in (".json", ".jsonl"):
            yield from _json_rows(text, suffix)
        else:
            yield from _table(path, text, suffix, triples and suffix == ".tsv")


def open_text(path: Path) -> TextIO:
    """Open a text file, unpacked and in its encoding as recognised; lines end at LF and keep their LF or CRLF.

    In a file without LF, like the tables that Excel saves for the Macintosh, lines end at CR.
    """

    def binary() -> BinaryIO:
        return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")

    with binary() as file:
        sample = file.read(BLOCK)
        newline = None if b"\r" in sample and b"\n" not in sample else "\n"
        # 64 MB at most: if all of it is ASCII, a later row in another encoding is bad.
        while sample.isascii() and b"\0" not in sample and file.tell() < 2**26 and (more := file.read(BLOCK)):
            sample = more
    encoding = _encoding(path, sample)
    # A byte that is no text becomes a lone surrogate, U+DC00 + byte, so that it costs only its own row.
    errors = "surrogatepass" if encoding.startswith("utf-16") else "surrogateescape"
    return io.TextIOWrapper(binary(), encoding, errors, newline)


def _encoding(path: Path, sample: bytes) -> str:
    """The encoding of a file by bytes of it that are not all ASCII; ValueError if those are no text."""
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    beyond = b" ".join(re.findall(rb"[\x80-\xff]+", sample))[: 2**16]
    text = beyond.decode(errors="replace")
    broken = text.count("\ufffd")
    if sample.count(0) <= 0.2 * len(sample) and broken <= 1 + len(text) / 20:  # the sample's end may cut a character
        return "utf-8-sig"
    # Simplified Chinese consists of the characters of GB2312, which Big5 or broken UTF-8 rarely seem to be.
    simplified = beyond.decode("gb2312", errors="replace")
    if b"\0" not in sample and simplified.count("\ufffd") < 0.1 * len(simplified):
        return "gb18030"
    for name in ("utf-16-le", "utf-16-be") if b"\0" in sample else ():
        read = sample[: 2**16].decode(name, errors="replace")
        if len(USUAL.findall(read)) > 0.9 * len(read):
            return name
    if sum(char > "\u07ff" for char in text) - broken > 0.1 * len(text):  # UTF-8 with bad rows in it
        return "utf-8-sig"
    old, new = (shlex.quote(str(name)) for name in (path, path.with_name(f"{path.stem}.utf8{path.suffix}")))
    fix = f"convert it, perhaps by iconv -f BIG5 -t UTF-8 {old} > {new}"
    raise ValueError(f"{path}: found neither UTF-8 nor UTF-16 nor GB18030; {fix}")


def not_utf8(text: str) -> Unfit | None:
    """Why a text with a broken character cannot be used; None for any other text."""
    if broken := LONE_SURROGATE.search(text):
        found = f"{ascii(broken[0])} at character {broken.start() + 1} (\\udcXX stands for byte XX)"
        return Unfit("invalid UTF-8", found, "UTF-8 text", "convert the file, as by iconv -f GB18030 -t UTF-8")
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; json would keep the last of several values of one key and lose the others."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_repeated(name for name, _ in pairs)} twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)
BROKEN = (ValueError, RecursionError)


def _json_rows(text: TextIO, suffix: str) -> Rows:
    head = text.read(BLOCK)
    text.seek(0)
    sign = SIGN.search(head)
    begin, end, one_a_line = sign.start() if sign else 0, len(head), suffix == ".jsonl"
    with suppress(*BROKEN):
        end = DECODER.raw_decode(head, begin)[1]
        one_a_line = "\n" not in head[begin:end] and not head[end:].partition("\n")[0].strip()
    first = _first_of_wrapped(head)
    if not one_a_line or head.startswith("[", begin) or (first and head[end:].lstrip()[:1] != "{"):
        yield from _json_stream(text, first)
        return
    for number, line in enumerate(text, 1):
        if line := line.strip("\ufeff \t\r\n"):
            try:
                yield number, not_utf8(line) or DECODER.decode(line)
            except BROKEN as error:
                yield number, _invalid_json(str(error))


def _invalid_json(found: str) -> Unfit:
    return Unfit("invalid JSON", found, "one object a line, or one list")


def _first_of_wrapped(head: str) -> int:
    """Where the list begins if a text begins with an object around a list of rows; else 0."""
    at = 0
    with suppress(*BROKEN):
        while member := MEMBER.match(head, at):
            if re.compile(FURTHER).match(head, member.start(1)):
                return member.end()
            at = DECODER.raw_decode(head, member.end())[1]
    return 0


def _json_stream(text: TextIO, wrapped: int) -> Rows:
    """JSON values one after the other, with those of a list as rows of their own; one block and one row in memory.

    `wrapped` is where the list of an object around it begins. After a row that is broken, reading goes on at the next
    object whose first key is that row's first key, or that begins a line at the same indent.
    """
    buffer, at, number, in_list, value = text.read(BLOCK), wrapped, 0, False, None
    before = 0  # characters of the text before the buffer

    def more() -> bool:
        nonlocal buffer, at, before
        if piece := text.read(max(BLOCK, len(buffer) - at)):  # doubled, so that a long row is not read often
            line = buffer.rfind("\n", max(0, at - 100), at)  # its indent tells where the next row begins
            start = at if line < 0 else line
            buffer, at, before = buffer[start:] + piece, at - start, before + start
        return bool(piece)

    def pass_over(wanted: str) -> None:
        """Go behind the next match, or to the end."""
        nonlocal at
        while not (found := re.compile(wanted).search(buffer, at)):
            at = max(at, len(buffer) - 1000)
            if not more():
                break
        at = found.end() if found else len(buffer)

    while True:
        sign = SIGN.search(buffer, at)
        at = sign.start() if sign else len(buffer)
        if not sign:
            if not more():
                break
        elif sign[0] == ("]" if in_list else "["):
            at, in_list = at + 1, not in_list
            if wrapped and not in_list:  # what follows describes the list, or is another one
                pass_over(FURTHER)
        else:
            try:
                value, at = DECODER.raw_decode(buffer, at)
            except BROKEN as error:
                place = getattr(error, "pos", at)
                if (place > len(buffer) - 10 or "Unterminated" in str(error)) and more():
                    continue
                found = f"{getattr(error, 'msg', error)} after {buffer[max(at, place - 20) : place]!r}"
                own = FIRST_KEY.match(buffer, at)
                begins = r'(?=\{\s*"' + (re.escape(own[1]) + r'"\s*:)' if own else ")")
                line = buffer.rfind("\n", 0, at) + 1
                if line and not (indent := buffer[line:at]).strip():
                    begins += rf'|(?<=\n{indent})(?=\{{\s*")'
                start, at = before + at, at + 1
                pass_over(begins)
                value = _invalid_json(f"{found} ({before + at - start:,} characters are left out)")
            number += 1
            yield number, value
    if in_list and not isinstance(value, Unfit):
        yield number + 1, Unfit("invalid JSON", "the end of the file inside a list", "]", "get the whole file")


def _table(path: Path, text: TextIO, suffix: str, triples: bool) -> Rows:
    csv.field_size_limit(2**31 - 1)
    header = next((line for line in text if line.strip("\ufeff \t\r\n")), "")
    text.seek(0)
    outside = re.sub('"[^"]*"', "", header)
    separator = "\t" if triples or (suffix == ".tsv" and "\t" in outside) else max(",;\t|", key=outside.count)
    cell = rf'(?:[^"{re.escape(separator)}]*|"(?:[^"]|"")*")'
    well_formed = re.compile(rf"{cell}(?:{re.escape(separator)}{cell})*\n?")
    waiting: deque[str] = deque()  # lines to be read again
    taken: list[str] = []  # lines of the row that is being read

    def lines() -> Iterator[str]:
        while line := waiting.popleft() if waiting else text.readline().replace("\r\n", "\n"):
            taken.append(line)
            yield line

    # strict: without it, a quote that is never closed takes the rest of the file into one cell
    quoting: Any = csv.QUOTE_NONE if triples else csv.QUOTE_MINIMAL
    new_reader = partial(csv.reader, delimiter=separator, quoting=quoting, strict=True)
    reader, number, first, fault = new_reader(lines()), 1, True, ""
    names = ["head", "relation", "tail"]
    while True:
        taken.clear()
        doubtful = bool(fault or waiting)  # lines after a stray quote must be faultless
        try:
            cells = next(reader, None)
            fault = "a stray quote" if doubtful and not well_formed.fullmatch("".join(taken)) else ""
        except csv.Error as error:
            # The quote may have taken good rows along: go on with the next line.
            cells, fault = taken[:1], f"{error}, in lines {number} to {number + len(taken) - 1}"
            waiting.extendleft(reversed(taken[1:]))
            del taken[1:]
            reader = new_reader(lines())
        if cells is None:
            return
        line, number = number, number + len(taken)
        if fault:
            yield line, Unfit("invalid CSV", fault, "cells closed by a quote", 'write " inside a cell as ""')
        elif cells and (len(cells) > 1 or not cells[0].isspace()) and not (triples and cells[0].startswith("#")):
            titles = [cell.strip() for cell in cells] if first else []
            if first and (not triples or titles == names):
                _check_header(f"{path}:{line}", titles)
                names = titles
            else:
                yield line, _named(cells, names)
            first = False


def _repeated(names: Iterable[str]) -> str:
    """The names that come twice, but for columns without a name."""
    return ", ".join(name for name, count in Counter(names).items() if name and count > 1)


def _check_header(place: str, names: list[str]) -> None:
    if repeated := _repeated(names):
        raise ValueError(f"{place}: found the column {repeated} twice, expected it once; rename one")


def _named(cells: list[Any], names: list[str]) -> object:
    if len(cells) != len(names):
        expected = f"{len(names)} ({', '.join(names)})"
        return Unfit("wrong number of columns", str(len(cells)), expected, "quote a cell that holds the separator")
    return dict(zip(names, cells, strict=True))


def _parquet(path: Path) -> Rows:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_header(f"{path}:1", file.schema_arrow.names)
            batches = file.iter_batches(batch_size=256, use_threads=False)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise EOFError(" ".join(str(error).split())) from None


def _workbook(path: Path) -> Rows:
    from openpyxl import load_workbook

    try:
        with closing(load_workbook(path, read_only=True, data_only=True)) as book:
            for sheet in book.worksheets:
                sheet.reset_dimensions()  # some programs write a wrong size
                place = "" if sheet is book.worksheets[0] else f"{sheet.title}:"
                for number, row in _sheet(sheet.iter_rows(values_only=True)):
                    yield f"{place}{number}", row
    except (zipfile.BadZipFile, KeyError, SyntaxError) as error:
        raise EOFError(str(error)) from None


def _sheet(rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, object]]:
    """The rows of a sheet, as text but for true and false; Excel writes a carriage return as _x000D_."""
    names: list[str] = []
    titled = False  # whether all that came so far is one cell, which may be a title above the header
    for number, row in enumerate(rows, 1):
        texts = ["" if value is None else str(value).replace("_x000D_\n", "\n") for value in row]
        cells = [value if isinstance(value, bool) else text for value, text in zip(row, texts, strict=True)]
        while len(cells) > len(names) and cells[-1] == "":
            cells.pop()
        if not any(texts):
            continue
        if names and not (titled and len(cells) > 1):
            titled = False
            yield number, _named([*cells, *[""] * (len(names) - len(cells))], names)
            continue
        names = [str(cell).strip() for cell in cells]
        titled = len(names) == 1
        if repeated := _repeated(names):
            yield number, Unfit("a sheet that is not read", f"the column {repeated} twice", "it once", "rename one")
            return
