"""The ground floor: what every part of the library does with files and with text for a terminal.

Files are written under a temporary name, synced and renamed, so that a process which dies at any moment leaves the old
file or the new one. Settings files name the line of a mistake. Links that lead out of a folder are refused.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# Control characters, and the marks that reorder text. A terminal obeys them: they can hide, move or recolour what is
# shown, and the escape character begins commands. A line feed and a tab are harmless.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_CONTROL |= {code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that becomes `path` when the block ends without an error; after an error nothing has changed.

    The content is on the disk before it gets its name. The permissions are those that the umask gives. A link at
    `path` is replaced, not followed. Several processes may write the same path: the last one to finish wins.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file with `atomic_write`."""
    with atomic_write(path) as handle:
        handle.write(text)


def settle(temporary: str | Path, path: str | Path) -> None:
    """Give a finished temporary file, which another library wrote, its permissions (the umask's) and its name."""
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # safetensors' save_file leaves a file that only its owner can read
    sync(temporary)
    os.replace(temporary, path)


def sync(path: str | Path) -> None:
    """Wait until a finished file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def own_file(folder: Path, name: str) -> Path | None:
    """The file of this name, None if there is none; ValueError if it is a link that leaves the folder.

    In a hub's cache, `snapshots/<revision>/` links to `blobs/` beside `snapshots/`.
    """
    target, root = Path(os.path.realpath(folder / name)), folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(home) for home in homes):
        raise ValueError(f"{folder / name}: a link out of its folder, to {target}; copy the file instead")
    return folder / name if target.is_file() else None


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """What to say after an unknown name: "did you mean 'rank'?", or "known settings: alpha, rank" (what = settings)."""
    names = list(known)
    near = difflib.get_close_matches(name[:200], names[:1000], n=1)
    return f"did you mean {near[0]!r}?" if near else f"known {what}: {', '.join(names)}"


def read_toml(path: str | Path) -> dict[str, Any]:
    """The content of a TOML file; ValueError naming the file, and the line of a mistake."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # a mistake, no UTF-8, a number of thousands of digits, deep nesting
        raise ValueError(f"{path}: not valid TOML ({error})") from None


def toml_place(path: str | Path, key: str) -> str:
    """Where `key` is first set in a TOML file, for an error: "file.toml line 3"; without the line if it isn't found."""
    pattern = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*[.=]|\s*\[+\s*{re.escape(key)}\s*[].]""")
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), 1):
        if pattern.match(line):
            return f"{path} line {number}"
    return str(path)


def printable(text: str) -> str:
    """`text` with every character that a terminal would obey written out, like \\x1b: safe to print.

    Text from a model, a file or a checkpoint goes through it before it is shown.
    """
    return text.translate(_CONTROL)


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def toml_value(place: str, value: Any, kind: type) -> Any:
    """A TOML value of `kind` (int, float, bool or str), an integer also as a float; ValueError naming the place."""
    fits = type(value) is not int or -(1 << 63) <= value < 1 << 63
    if kind is float and type(value) is int and fits:
        return float(value)
    if type(value) is kind and fits:
        return value
    size = "" if fits else " of at most 64 bits"
    raise ValueError(f"{place} must be {_KINDS[kind]}{size}, found {toml_shown(value)}")


def toml_shown(value: Any) -> str:
    """A TOML value, or what kind of thing it is, for an error."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"one of {value.bit_length()} bits"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "an array of tables"
    if hasattr(value, "isoformat"):
        return f"the date or time {value.isoformat()}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
