"""The ground floor: a full disk says what it needs; one process at a time writes an output folder."""

import errno
import json
import os
import shutil
import socket
import sqlite3
import threading
import time

import pytest

from pedgpt import files
from pedgpt.files import (
    DiskFull,
    atomic_write,
    available_memory,
    full_disk,
    naming_full_disk,
    sole_writer,
    write_text,
)  # fmt: skip


def no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_path_needed_and_free_space_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", no_space)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 8, 1500))
    with pytest.raises(DiskFull) as error:
        write_text(path, "新" * 1000)
    assert str(error.value) == (
        f"{path}: cannot be written (No space left on device): 3.0 kB needed, 1.5 kB free"
    )
    with pytest.raises(DiskFull, match=r"more than 1.5 kB needed, 1.5 kB free$"), atomic_write(path, "wb") as file:
        file.write(b"x")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_a_full_disk_is_known_whichever_library_tells_of_it(tmp_path):
    def hidden():
        try:
            no_space()
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 as torch does

    for call in (
        no_space, hidden,
        lambda: (_ for _ in ()).throw(RuntimeError("I/O error: Disk quota exceeded (os error 122)")),
        lambda: (_ for _ in ()).throw(sqlite3.OperationalError("database or disk is full")),
    ):  # fmt: skip
        with pytest.raises(DiskFull) as error, naming_full_disk(tmp_path):
            call()
        assert str(error.value).startswith(f"{tmp_path}: cannot be written")
    assert full_disk(ValueError("row 3: 'No space left on device'")) is None  # a user's text
    assert full_disk(FileNotFoundError(errno.ENOENT, "no")) is None


def test_a_second_run_is_told_who_holds_the_folder_and_a_third_may_have_it(tmp_path):
    output = tmp_path / "new" / "run"
    with sole_writer(output):
        with pytest.raises(ValueError) as error, sole_writer(output):
            pass
        who = f"process {os.getpid()} on {socket.gethostname()} since 20"
        assert str(error.value).startswith(f"{output} is in use by {who}")
        assert str(error.value).endswith("; wait for its end, stop it, or choose another --output")
    assert not (tmp_path / "new").exists()  # nothing was written
    with sole_writer(output):
        (output / "model").mkdir()
    assert [path.name for path in output.iterdir()] == ["model"]
    with sole_writer(output, beside=True):
        assert (output.parent / ".run.lock").exists()
        shutil.rmtree(output)
    assert not output.exists()


@pytest.fixture
def abroad(tmp_path, monkeypatch):
    """A folder whose lock is held by another host, on a disk that does not lock across hosts."""
    monkeypatch.setattr(files, "HEARTBEAT", 0.02)
    holder = {"process": 7, "host": "elsewhere", "since": "2026-01-01 00:00:00", "run": "a\x1b[31mb"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    return tmp_path


def test_another_host_holds_a_folder_as_long_as_it_shows_signs_of_life(abroad, capsys):
    ended = threading.Event()
    beat = threading.Thread(target=files._show_life, args=(abroad / ".lock", ended))
    beat.start()
    with pytest.raises(ValueError, match="in use by process 7 on elsewhere since 2026"), sole_writer(abroad):
        pass
    ended.set()
    beat.join()
    with sole_writer(abroad):  # it died: its file stays, untouched
        assert json.loads((abroad / ".lock").read_text())["process"] == os.getpid()
        before = (abroad / ".lock").stat().st_mtime_ns
        time.sleep(0.1)
        assert (abroad / ".lock").stat().st_mtime_ns > before  # this run shows signs of life as well
    assert "waiting 0 s for a sign of life of process 7 on elsewhere" in capsys.readouterr().err
    assert not list(abroad.iterdir())


@pytest.mark.parametrize("content", ["", "[]", "[" * 5000, "\x00"])
def test_a_damaged_lock_file_holds_nothing(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with sole_writer(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


def test_a_torchrun_restart_takes_the_folder_over_at_once(abroad, monkeypatch):
    monkeypatch.setattr(files, "HEARTBEAT", 100.0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a\x1b[31mb")
    with sole_writer(abroad):
        pass
    # A restarted process waits for the end of the one that it replaces.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    held, release = threading.Event(), threading.Event()

    def first():
        with sole_writer(abroad):
            held.set()
            release.wait(5)

    thread = threading.Thread(target=first)
    thread.start()
    held.wait(5)
    threading.Timer(0.2, release.set).start()
    with sole_writer(abroad):
        assert release.is_set()
    thread.join()


def test_a_disk_without_locks_goes_by_the_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HEARTBEAT", 0.02)

    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with sole_writer(tmp_path), pytest.raises(ValueError, match="is in use by process"), sole_writer(tmp_path):
        pass
    with sole_writer(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch):
    def denied(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with sole_writer(tmp_path):
        pass


def test_available_memory_is_what_the_system_says():
    lines = dict(line.split(":") for line in open("/proc/meminfo"))
    total = 1024 * int(lines["MemTotal"].split()[0])
    assert 0 < available_memory() < total


@pytest.mark.parametrize(("limit", "expected"), [("max", 5000 * 1024), ("3000000", 2_000_000), ("900000", 0)])
def test_available_memory_respects_the_control_group(monkeypatch, limit, expected):
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n", "/sys/fs/cgroup/memory.max": f"{limit}\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
    }  # fmt: skip
    monkeypatch.setattr("pathlib.Path.exists", lambda path: str(path) in files)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: files[str(path)])
    assert available_memory() == expected
