"""The ground floor: what every part of the library does with files and with text for a terminal.

Files are written under a temporary name, synced and renamed, so that a process which dies at any moment leaves the old
file or the new one. A full disk says what it needs, and an output folder is written by one process at a time. Settings
files name the line of a mistake. Links that lead out of a folder are refused.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__version__ = "0.1.0"

# Control characters, and the marks that reorder text. A terminal obeys them: they can hide, move or recolour what is
# shown, and the escape character begins commands. A line feed and a tab are harmless.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_CONTROL |= {code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


class DiskFull(OSError):
    """The disk took no more. The message names the path, the space that is needed and the space that is free."""


@contextmanager
def atomic_write(path: str | Path, mode: str = "w", *, size: int = 0) -> Iterator[IO[Any]]:
    """Open a file that becomes `path` when the block ends without an error; after an error no file has changed.

    Its folder is made if there is none. The content is on the disk before it gets its name. The permissions are those
    that the umask gives. A link at `path` is replaced, not followed. Several processes may write the same path: the
    last one to finish wins. Raises DiskFull with `size`, the bytes to be written, where the caller knows it.
    """
    temporary = (path := Path(path)).with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    with naming_full_disk(path, size):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
                yield handle
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file with `atomic_write`."""
    with atomic_write(path, size=len(text.encode(errors="replace"))) as handle:
        handle.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as an indented JSON file with `atomic_write`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def settle(temporary: str | Path, path: str | Path) -> None:
    """Give a finished temporary file, which another library wrote, its permissions (the umask's) and its name."""
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # safetensors' save_file leaves a file that only its owner can read
    publish(temporary, path)


def publish(temporary: str | Path, path: str | Path) -> None:
    """Give a finished file or folder its name, once its content is on the disk; then that name is on it too."""
    sync(temporary)
    os.replace(temporary, path)
    sync(Path(path).parent)


def sync(path: str | Path) -> None:
    """Wait until a finished file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_FULL = [*(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), "disk is full"]  # SQLite's words


@contextmanager
def naming_full_disk(path: str | Path, size: int = 0) -> Iterator[None]:
    """Raise DiskFull for `path` if this block fails on a full disk, a quota or a size limit, whichever library says so.

    Libraries hide the system's error behind one of their own: safetensors and SQLite keep its text only.
    """
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        if isinstance(error, DiskFull) or not (reason := _full_disk(error)):
            raise
        places = (Path(path).absolute(), *Path(path).absolute().parents)
        free = shutil.disk_usage(next(place for place in places if place.exists())).free
        needed = f"{size / 1e6:,.1f} MB needed, " if size else ""
        raise DiskFull(f"{path}: cannot be written ({reason}): {needed}{free / 1e6:,.1f} MB free") from error


def _full_disk(error: BaseException | None) -> str:
    """What the system said, if an error, or one that led to it, comes from a full disk; else an empty text."""
    if error is None:
        return ""
    said = "" if isinstance(error, ValueError) else str(error)  # a ValueError is ours, and may quote anything
    return next((reason for reason in _FULL if reason in said), "") or _full_disk(error.__cause__ or error.__context__)


@contextmanager
def sole_writer(output: str | Path, *, beside: bool = False) -> Iterator[None]:
    """Hold a lock on `output` in this block; ValueError if another process holds it.

    The lock is `flock` on a file in the folder, or `beside` it, so it ends with the process, whatever kills that.
    A folder that was made for the lock is removed if the block leaves it empty.
    """
    path = Path(os.path.abspath(output))
    file = path.with_name(f".{path.name}.lock") if beside else path / ".lock"
    made = not file.parent.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            how = "wait for its end, stop it, or choose another --output"
            raise ValueError(f"{output} is in use by another run; {how}") from None
        except OSError:  # NOTE: a disk that cannot lock anything is written without a lock.
            pass
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            if made:
                with suppress(OSError):  # it is not empty
                    file.parent.rmdir()


def own_file(folder: Path, name: str) -> Path | None:
    """The file of this name, None if there is none; ValueError if it is a link that leaves the folder.

    One link is allowed: in a hub's cache, `snapshots/<revision>/` links to `blobs/` beside `snapshots/`.
    """
    target, root = Path(os.path.realpath(folder / name)), folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(home) for home in homes):
        raise ValueError(f"{folder / name}: a link out of its folder, to {target}; copy the file instead")
    return folder / name if os.path.isfile(target) else None  # Path.is_file raises for a name that is too long


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a folder's file; an empty one if there is no such file."""
    path = own_file(folder, name)
    if path is None:
        return {}
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; ValueError for a key that occurs twice, of which `json` would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return found


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """What to say after an unknown name: "did you mean 'rank'?", or "known settings: alpha, rank" (what = settings)."""
    near = difflib.get_close_matches(name, known := list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known {what}: {', '.join(known)}"


def read_toml(path: str | Path) -> dict[str, Any]:
    """The content of a TOML file; ValueError naming the file, and the line of a mistake."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from None


def toml_place(path: str | Path, key: str) -> str:
    """Where `key` is first set in a TOML file, for an error: "file.toml line 3"; without the line if it isn't found."""
    pattern = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*[.=]|\s*\[+\s*{re.escape(key)}\s*[].]""")
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), 1):
        if pattern.match(line):
            return f"{path} line {number}"
    return str(path)


def printable(text: str) -> str:
    """Text from a model or a file with all that a terminal would obey written out, like \\x1b: safe to print."""
    return text.translate(_CONTROL)


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "a table"}


def toml_value(place: str, value: Any, *kinds: type) -> Any:
    """A TOML value of one of `kinds` (int, float, bool, str), an integer also as a float; ValueError names `place`."""
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    expected = " or ".join(_KINDS[kind] for kind in kinds)
    raise ValueError(f"{place} must be {expected}, found {value!r:.100}")


def available_memory() -> int | None:
    """Bytes that this host can still give, within its control group's limit; None where it does not say."""
    paths = [Path("/proc/meminfo"), *(Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))]
    system, limit, used = (path.read_text().strip() if path.exists() else "" for path in paths)
    found = re.search(r"MemAvailable:\s+(\d+) kB", system)
    left = int(limit) - int(used) if limit.isdecimal() and used else sys.maxsize
    return min(1024 * int(found[1]), max(0, left)) if found else None
