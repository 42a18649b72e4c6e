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
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from pedgpt.data.inputs import EXTRA, TEXTS, format_of

BLOCK = 2**18  # characters, or bytes, that are read at once
HEADING = re.compile(r"#{1,6}[ \t]+(\S.*?)([ \t]+#+)?\s*$")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# A character of GB2312, of which simplified Chinese texts consist, is in the group; others beyond ASCII are not.
GB2312 = re.compile(rb"([\xa1-\xa9\xb0-\xf7][\xa1-\xfe])|[\x80-\xff][\x40-\xfe]?")
USUAL = re.compile("[\t\n\r -~\xa0-\xff\u2000-\u206f\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
GAP = re.compile("[\\s,\ufeff]*")
FIRST_KEY = re.compile(r'\{\s*"((?:[^"\\]|\\.)*)"\s*:')
# An object around a list of rows begins like {"version": 1, "data": [{.
WRAPPERS = ("data", "rows", "examples", "instances", "items", "records", "train", "validation", "dev", "test")
MEMBER = re.compile(r'\s*[{,]\s*"((?:[^"\\]|\\.)*)"\s*:\s*')
FURTHER = re.compile(rf'"(?:{"|".join(WRAPPERS)})"\s*:\s*\[\s*(?=\{{)')


class Unfit(ValueError):
    """Why a row cannot be used; the first words name the fault, the same for every row that has it."""

    def __init__(self, fault: str, found: str, expected: str, fix: str = "fix or delete the row") -> None:
        reason = f"{fault}: found {found}, expected {expected}; {fix}"
        super().__init__(reason.encode(errors="backslashreplace").decode())  # a broken key must not break the report


def _byte_by_byte(error: UnicodeError) -> tuple[str, int]:
    """Each byte that is no text becomes a lone surrogate, U+DC00 + byte, so that it costs only its own row."""
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("pedgpt_byte_by_byte", _byte_by_byte)


def read_rows(
    path: Path, *, triples: bool = False, columns: Collection[str] = ()
) -> Iterator[tuple[int | str, object]]:
    """Yield (line, row) for each row of a file: its fields by name, or the `Unfit` that says why it has none.

    Elements of a JSON list and rows of a .parquet or .xlsx are numbered, from 1, in place of lines; those of a
    workbook's second and later sheets are "sheet:row". With `triples` a .tsv needs no header and its quotes are text.
    A table with some of `columns`, but not all, is a ValueError, as is a file whose encoding is unknown.
    """
    line: int | str = 0
    try:
        for line, row in _reader(path, triples, columns):
            yield line, row
    except ImportError:
        package = EXTRA[format_of(path)]
        raise ValueError(f'{path}: reading it needs {package}: pip install -e ".[tables]"') from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield _after(line), Unfit("damaged file", str(error), "a whole .gz", "get the file again; what follows is lost")


def _after(line: int | str) -> int:
    return int(str(line).rpartition(":")[2]) + 1


def _reader(path: Path, triples: bool, columns: Collection[str]) -> Iterator[tuple[int | str, object]]:
    # A row that cannot be parsed is yielded as its Unfit: a generator that raises could not go on to the next row.
    suffix = format_of(path)
    if suffix == ".parquet":
        yield from _parquet(path, columns)
    elif suffix == ".xlsx":
        yield from _workbook(path, columns)
    else:
        with open_text(path) as text:
            if suffix in TEXTS:
                yield _whole_text(text)
            elif suffix in (".json", ".jsonl"):
                yield from _json_rows(text, suffix)
            else:
                yield from _table(path, text, suffix, triples and suffix == ".tsv", columns)


def _whole_text(text: TextIO) -> tuple[int, object]:
    lines = [line.replace("\r\n", "\n") for line in text]
    title = next((heading[1] for line in lines if (heading := HEADING.match(line))), "")
    broken = next((number for number, line in enumerate(lines, 1) if not_utf8(line)), 1)
    return broken, {"text": "".join(lines), "title": title}


def open_text(path: Path) -> TextIO:
    """Open a text file, unpacked and in its encoding as recognised; lines end at LF and keep their LF or CRLF.

    In a file without LF, like the tables that Excel saves for the Macintosh, lines end at CR.
    """

    def binary() -> BinaryIO:
        return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")

    with binary() as file:
        encoding = _encoding(path, file)
        file.seek(0)
        sample = file.read(BLOCK)
    newline = None if b"\r" in sample and b"\n" not in sample else "\n"
    return io.TextIOWrapper(binary(), encoding, errors="pedgpt_byte_by_byte", newline=newline)


def _encoding(path: Path, file: BinaryIO) -> str:
    """The encoding, by the byte-order mark or the first bytes that are not ASCII; ValueError if those are no text."""
    sample = file.read(BLOCK)
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for _ in range(256):  # 64 MB at most: if all of it is ASCII, a later row in another encoding is bad
        if not sample.isascii() or b"\0" in sample or not (more := file.read(BLOCK)):
            break
        sample = more
    zeros = sample.count(0) / max(1, len(sample))
    odd = re.search(rb"[\x80-\xff]", sample)
    told = sample[odd.start() if odd else 0 :][: 2**16]
    text = told.decode(errors="replace")
    broken, beyond = text.count("\ufffd"), sum(char > "\x7f" for char in text)
    if zeros < 0.2 and broken <= 1 + beyond / 20:  # the sample's end may cut a character
        return "utf-8-sig"
    if zeros:
        shares = {}
        for name in ("utf-16-le", "utf-16-be"):
            read = sample[: min(2**16, len(sample) // 2 * 2)].decode(name, errors="replace")
            shares[name] = len(USUAL.findall(read)) / len(read)
        likely = max(shares, key=lambda name: shares[name])
        if shares[likely] > 0.9:
            return likely
    else:
        pairs = GB2312.findall(told)
        if sum(map(bool, pairs)) > 0.9 * len(pairs):
            return "gb18030"
    if sum(char > "\u07ff" for char in text) - broken > 0.2 * beyond:  # UTF-8 with bad rows in it
        return "utf-8-sig"
    guess = "BIG5" if told.decode("cp950", errors="replace").count("\ufffd") <= 1 else "GB18030"
    old, new = (shlex.quote(str(name)) for name in (path, path.with_name(f"{path.stem}.utf8{path.suffix}")))
    line = f"iconv -f {'UTF-16LE' if zeros > 0.2 else guess} -t UTF-8 {old} > {new}"
    raise ValueError(f"{path}: found neither UTF-8 nor UTF-16 nor GB18030; convert it, perhaps by {line}")


def not_utf8(text: str) -> Unfit | None:
    """Why a text with a broken character cannot be used; None for any other text."""
    if broken := LONE_SURROGATE.search(text):
        found = f"{ascii(broken[0])} at character {broken.start() + 1} (\\udcXX stands for byte XX)"
        return Unfit("invalid UTF-8", found, "UTF-8 text", "convert the file, as by iconv -f GB18030 -t UTF-8")
    return None


def _json_rows(text: TextIO, suffix: str) -> Iterator[tuple[int, object]]:
    head = text.read(BLOCK)
    text.seek(0)
    start = GAP.match(head)
    first, _, rest = head[start.end() if start else 0 :].partition("\n")
    row = _parsed(first)
    whole = not isinstance(row, Unfit) and not _list_inside(row)
    lines = isinstance(row, dict) and rest.lstrip()[:1] == "{"  # a list in a row of many lines is the row's own
    around = first[:1] == "[" or _wrapped(head)
    if lines or not around and (whole or not (suffix == ".json" or _begins_object(head))):
        for number, line in enumerate(text, 1):
            if line := line.strip("\ufeff \t\r\n"):
                yield number, not_utf8(line) or _parsed(line)
    else:
        yield from _json_stream(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; json would keep the last of several values of one key and lose the others."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)} twice")
    return found


def _parsed(line: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return Unfit("invalid JSON", str(error), "one object a line, or one list")


def _list_inside(value: object) -> list[object]:
    """The rows of an object around lists, {"data": [{…}, …]}; none of any other value."""
    lists = [rows for name, rows in value.items() if name in WRAPPERS] if isinstance(value, dict) else []
    rows = [row for rows in lists if isinstance(rows, list) for row in rows]
    return rows if all(isinstance(row, dict) for row in rows) else []


def _wrapped(head: str) -> int:
    """Where the first row of an object around a list begins; 0 if a text does not begin with such an object."""
    at = cast(re.Match[str], GAP.match(head)).end()
    with suppress(ValueError, RecursionError):
        while member := MEMBER.match(head, at):
            if member[1] in WRAPPERS and (rows := re.compile(r"\[\s*(?=\{)").match(head, member.end())):
                return rows.end()
            at = json.JSONDecoder().raw_decode(head, member.end())[1]
    return 0


def _begins_object(head: str) -> bool:
    """Whether a text begins with an object over several lines."""
    try:
        return isinstance(json.JSONDecoder().raw_decode(head.lstrip("\ufeff \t\r\n"))[0], dict)
    except (ValueError, RecursionError):
        return False


def _json_stream(text: TextIO) -> Iterator[tuple[int, object]]:
    """JSON values one after the other, with those of a list as rows of their own; one block and one row in memory.

    After a row that is broken, reading goes on at the next object whose first key is that row's first key, or that
    begins a line at the same indent.
    """
    buffer = text.read(BLOCK)
    at = wrapped = _wrapped(buffer)
    in_list, number, broken = bool(wrapped), 0, False
    decode = json.JSONDecoder(object_pairs_hook=_once).raw_decode
    while True:
        at = cast(re.Match[str], GAP.match(buffer, at)).end()
        if at == len(buffer):
            if not (buffer := text.read(BLOCK)):
                break
            at = 0
            continue
        if buffer[at] == ("]" if in_list else "["):
            at, in_list = at + 1, not in_list
            if wrapped:  # what follows describes the list, or is another one
                buffer, at, _ = _next(FURTHER, text, buffer, at)
                further = FURTHER.match(buffer, at)
                at, in_list = (further.end(), True) if further else (at, False)
            continue
        try:
            value, at = decode(buffer, at)
            broken = False
        except (ValueError, RecursionError) as error:
            place = getattr(error, "pos", at)
            cut = place > len(buffer) - 10 or "Unterminated" in str(error)
            if cut and (more := text.read(max(BLOCK, len(buffer)))):  # doubled, so that a long row is not read often
                buffer, at = buffer[at:] + more, 0
                continue
            found = f"{getattr(error, 'msg', error)} after {buffer[max(at, place - 20) : place]!r}"
            own = FIRST_KEY.match(buffer, at)
            begins = r'\{\s*"' + (re.escape(own[1]) + r'"\s*:' if own else "")
            line = buffer.rfind("\n", 0, at) + 1
            if line and not (indent := buffer[line:at]).strip():
                begins += rf'|(?<=\n{indent})\{{\s*"'
            buffer, at, passed = _next(re.compile(begins), text, buffer, at + 1)
            found += f" ({passed + 1:,} characters are left out)"
            value, broken = Unfit("invalid JSON", found, "one object a line, or one list"), True
        for row in (not in_list and _list_inside(value)) or [value]:
            number += 1
            yield number, row
    if in_list and not broken:
        yield number + 1, Unfit("invalid JSON", "the end of the file inside a list", "]", "get the whole file")


def _next(wanted: re.Pattern[str], text: TextIO, buffer: str, at: int) -> tuple[str, int, int]:
    """(buffer, place, characters passed over) of `wanted` from `at` on; an empty buffer if it is nowhere."""
    passed = -at
    while not (found := wanted.search(buffer, at)):
        if not (more := text.read(BLOCK)):
            return "", 0, passed + len(buffer)
        kept = max(at, len(buffer) - 1000)
        passed += kept
        buffer, at = buffer[kept:] + more, 0
    return buffer, found.start(), passed + found.start()


def _table(
    path: Path, text: TextIO, suffix: str, triples: bool, columns: Collection[str]
) -> Iterator[tuple[int, object]]:
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

    def new_reader() -> Any:
        # strict: without it, a quote that is never closed takes the rest of the file into one cell
        quoting: Any = csv.QUOTE_NONE if triples else csv.QUOTE_MINIMAL
        return csv.reader(lines(), delimiter=separator, quoting=quoting, strict=True)

    names = ["head", "relation", "tail"] if triples else []
    reader, number, first, doubtful = new_reader(), 1, True, 0
    while True:
        taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            last = number + len(taken) - 1
            span = f"{error}, in lines {number} to {last}"
            yield number, Unfit("invalid CSV", span, "cells closed by a quote", 'write " inside a cell as ""')
            # A stray quote may have taken good rows along: go on with the next line, whose row must now be faultless.
            waiting.extendleft(reversed(taken[1:]))
            reader, number, doubtful = new_reader(), number + 1, max(doubtful, last)
            continue
        line, number = number, number + len(taken)
        blank = not cells or (len(cells) == 1 and cells[0].isspace())
        if blank or (triples and cells[0].startswith("#")):
            continue
        if first and (not names or [cell.strip() for cell in cells] == names):
            names = [cell.strip() for cell in cells]
            check_header(f"{path}:{line}", names, columns)
        elif doubtful and not well_formed.fullmatch("".join(taken)):
            yield line, Unfit("invalid CSV", "a stray quote", "cells closed by a quote", 'write " inside a cell as ""')
            doubtful = max(doubtful, number - 1)
        else:
            yield line, _named(cells, names)
            doubtful = doubtful if line <= doubtful else 0
        first = False


def check_header(place: str, names: list[str], columns: Collection[str]) -> None:
    """Raise ValueError if a table's columns cannot be told apart, are no text, or are only some of `columns`."""
    if unfit := not_utf8(",".join(names)):
        raise ValueError(f"{place}: {unfit}")
    if (lacking := set(columns) - set(names)) and lacking != set(columns):  # without any, its own names are used
        raise ValueError(f"{place}: found columns {', '.join(names)}, expected {', '.join(lacking)}; fix `columns`")
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise ValueError(f"{place}: found the column {', '.join(twice)} twice, expected it once; rename one")


def _named(cells: list[Any], names: list[str]) -> object:
    if len(cells) != len(names):
        expected = f"{len(names)} ({', '.join(names)})"
        return Unfit("wrong number of columns", str(len(cells)), expected, "quote a cell that holds the separator")
    return dict(zip(names, cells, strict=True))


def _parquet(path: Path, columns: Collection[str]) -> Iterator[tuple[int, object]]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            check_header(f"{path}:1", file.schema_arrow.names, columns)
            for batch in file.iter_batches(batch_size=256, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        yield number + 1, Unfit("damaged file", " ".join(str(error).split()), "a whole .parquet", "get the file again")


def _workbook(path: Path, columns: Collection[str]) -> Iterator[tuple[int | str, object]]:
    from openpyxl import load_workbook

    line: int | str = 0
    try:
        with closing(load_workbook(path, read_only=True, data_only=True)) as book:
            for sheet in book.worksheets:
                sheet.reset_dimensions()  # some programs write a wrong size
                names: list[str] = []
                titled = False  # whether all that came so far is one cell, which may be a title above the header
                for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
                    line = number if sheet is book.worksheets[0] else f"{sheet.title}:{number}"
                    values = [_cell(cell) for cell in cells]
                    while values and values[-1] == "" and len(values) > len(names):
                        values.pop()
                    if all(value == "" for value in values):
                        continue
                    if names and not (titled and len(values) > 1):
                        titled = False
                        yield line, _named([*values, *[""] * (len(names) - len(values))], names)
                        continue
                    names = [str(value).strip() for value in values]
                    titled = len(names) == 1
                    try:
                        check_header(f"{path}:{line}", names, columns)
                    except ValueError as error:
                        if sheet is book.worksheets[0]:
                            raise
                        found = str(error).partition(": found ")[2].partition(", expected")[0]
                        yield line, Unfit("a sheet that is not read", found, "a header like the first sheet's")
                        break
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, SyntaxError) as error:
        yield _after(line), Unfit("damaged file", str(error), "an .xlsx workbook", "save it again")


def _cell(value: object) -> Any:
    """A cell as text, as in a CSV, except true and false; Excel writes a carriage return as _x000D_."""
    if isinstance(value, bool):
        return value
    return "" if value is None else str(value).replace("_x000D_\n", "\n")
