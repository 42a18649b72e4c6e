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
import socket
import sys
import threading
import time
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

# Seconds between a lock's signs of life. Another host waits for four times as long before it takes a lock over.
HEARTBEAT = 5.0


class DiskFull(OSError):
    """The disk took no more. The message names the path, the space that is needed and the space that is free."""


@contextmanager
def atomic_write(path: str | Path, mode: str = "w", *, size: int = 0) -> Iterator[IO[Any]]:
    """Open a file that becomes `path` when the block ends without an error; after an error nothing has changed.

    The content is on the disk before it gets its name. The permissions are those that the umask gives. A link at
    `path` is replaced, not followed. Several processes may write the same path: the last one to finish wins. Raises
    DiskFull with `size`, the bytes to be written, where the caller knows it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    with naming_full_disk(path, size):
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
    with naming_full_disk(path, os.stat(temporary).st_size):
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


@contextmanager
def naming_full_disk(path: str | Path, size: int = 0) -> Iterator[None]:
    """Raise DiskFull for `path` if this block fails on a full disk, whichever library says so, and however."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        if not isinstance(error, DiskFull) and (reason := full_disk(error)):
            raise disk_full(path, size, reason) from error
        raise


def full_disk(error: BaseException) -> str | None:
    """What the system said, if an error, or one that led to it, comes from a full disk, a quota or a size limit.

    Libraries hide the system's error behind one of their own: safetensors and sqlite keep its text only.
    """
    cause: BaseException | None = error
    while cause is not None:
        said = "" if isinstance(cause, ValueError) else str(cause)  # a ValueError is ours, and may quote anything
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if getattr(cause, "errno", None) == code or os.strerror(code) in said:
                return os.strerror(code)
        if "disk is full" in said:
            return os.strerror(errno.ENOSPC)
        cause = cause.__cause__ or cause.__context__
    return None


def disk_full(path: str | Path, size: int, reason: str = "No space left on device") -> DiskFull:
    """The error that says what is missing for `size` bytes at `path`; 0 is a size that nobody knows."""
    free = readable_size(free_space(path) or 0)
    needed = readable_size(size) if size else f"more than {free}"
    return DiskFull(f"{path}: cannot be written ({reason}): {needed} needed, {free} free")


def free_space(path: str | Path) -> int | None:
    """Bytes free on the disk that holds `path`, or will hold it; None where the disk does not say."""
    path = Path(path).absolute()
    usage = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists()))
    return usage.free if usage.total else None


def readable_size(size: int) -> str:
    """Bytes in the largest unit of which there is one."""
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3}
    return next((f"{size / unit:.1f} {name}" for name, unit in units.items() if size >= unit), f"{size} bytes")


@contextmanager
def sole_writer(output: str | Path, *, beside: bool = False) -> Iterator[None]:
    """Hold a lock on `output` in this block; ValueError names the process, the host and the time if another holds it.

    The lock is `flock` on a file in the folder, or `beside` it, that names the holder, so it ends with the process,
    whatever kills that. Not every disk locks across hosts: a thread touches the file every few seconds, and a process
    on another host takes the lock only after a while without this sign of life. A folder that cannot be written needs
    no lock. A folder that was made for the lock is removed if the block leaves it empty.
    """
    path = Path(os.path.abspath(output))
    file = path.with_name(f".{path.name}.lock") if beside else path / ".lock"
    made = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _take_lock(file, output)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"{file.parent}: cannot be a folder, as a file is in its place; choose another --output"
        ) from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        yield
        return
    ended = threading.Event()
    threading.Thread(target=_show_life, args=(file, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(OSError):
            file.unlink()
        os.close(handle)
        with suppress(OSError):  # until the first one that is not empty
            for folder in made:
                folder.rmdir()


def _take_lock(file: Path, output: str | Path) -> int:
    """A file descriptor that holds the lock; a restart by torchrun waits for the process that it replaces."""
    host, run = socket.gethostname(), os.environ.get("TORCHELASTIC_RUN_ID", "none")  # restarts keep torchrun's name
    mine = {"process": os.getpid(), "host": host, "since": time.strftime("%Y-%m-%d %H:%M:%S"), "run": run}
    patience = time.monotonic() + (10 if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else 0)
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        holder: dict[str, Any] = {}
        with suppress(OSError, ValueError, RecursionError, TypeError, LookupError):  # no file that a holder wrote
            found = json.loads(os.pread(handle, 4096, 0))
            holder = {name: found[name] for name in mine}
        who = printable("process {process} on {host}".format_map(holder)) if holder else "another process"
        locked, held = True, False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            locked, held = False, error.errno == errno.EWOULDBLOCK
        if holder and not held and not (locked and holder["host"] == host) and not holder["run"] == run != "none":
            # `flock` cannot know of a holder on another host or on a disk without locks.
            print(f"{output}: waiting {4 * HEARTBEAT:.0f} s for a sign of life of {who}", file=sys.stderr)
            held = _shows_life(handle, file)
        with suppress(FileNotFoundError):  # the holder may have removed the file, so that this lock is on none
            if not held and os.path.samestat(os.fstat(handle), os.stat(file)):
                with suppress(OSError):  # a full disk
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, json.dumps(mine).encode(), 0)
                return handle
        os.close(handle)
        if held and time.monotonic() > patience:
            who += printable(f" since {holder['since']}") if holder else ""
            raise ValueError(f"{output} is in use by {who}; wait for its end, stop it, or choose another --output")
        time.sleep(0.05)


def _show_life(file: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(file)


def _shows_life(handle: int, file: Path) -> bool:
    """Whether the file's time changes: two hosts' clocks may differ, so the time itself says nothing."""
    before, end = os.fstat(handle).st_mtime_ns, time.monotonic() + 4 * HEARTBEAT
    while time.monotonic() < end:
        time.sleep(HEARTBEAT / 5)
        with suppress(FileNotFoundError):
            if os.stat(file).st_mtime_ns != before:
                return True
    return False


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


def toml_value(place: str, value: Any, *kinds: type) -> Any:
    """A TOML value of one of `kinds` (int, float, bool, str), an integer also as a float; ValueError names `place`."""
    fits = type(value) is not int or -(1 << 63) <= value < 1 << 63
    if type(value) in kinds and fits:
        return value
    if float in kinds and type(value) is int and fits:
        return float(value)
    size = "" if fits else " of at most 64 bits"
    expected = " or ".join(_KINDS[kind] for kind in kinds)
    raise ValueError(f"{place} must be {expected}{size}, found {toml_shown(value)}")


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


def available_memory() -> int | None:
    """Bytes that this host can still give, within its control group's limit; None where it does not say."""
    paths = [Path("/proc/meminfo"), *(Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))]
    system, limit, used = (path.read_text().strip() if path.exists() else "" for path in paths)
    found = re.search(r"MemAvailable:\s+(\d+) kB", system)
    left = int(limit) - int(used) if limit.isdecimal() and used else sys.maxsize
    return min(1024 * int(found[1]), max(0, left)) if found else None
