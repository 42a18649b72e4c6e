"""The ground floor: a full disk says what it needs; one process at a time writes an output folder."""

import errno
import os
import shutil
import sqlite3

import pytest

from pedgpt import files
from pedgpt.files import DiskFull, atomic_write, available_memory, naming_full_disk, sole_writer, write_text


def no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_path_needed_and_free_space_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", no_space)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 8, 1_500_000))
    with pytest.raises(DiskFull) as error:
        with atomic_write(path, size=2_500_000) as file:
            file.write("new")
    assert str(error.value) == (
        f"{path}: cannot be written (No space left on device): 2.5 MB needed, 1.5 MB free"
    )
    with pytest.raises(DiskFull, match=r"\(No space left on device\): 1.5 MB free$"), atomic_write(path, "wb") as file:
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
    for error in (ValueError("row 3: 'No space left on device'"), FileNotFoundError(errno.ENOENT, "no")):
        with pytest.raises(type(error)), naming_full_disk(tmp_path):
            raise error


def test_a_second_run_is_told_that_the_folder_is_in_use_and_a_third_may_have_it(tmp_path):
    output = tmp_path / "run"
    with sole_writer(output):
        with pytest.raises(ValueError) as error, sole_writer(output):
            pass
        how = "wait for its end, stop it, or choose another --output"
        assert str(error.value) == f"{output} is in use by another run; {how}"
    assert not output.exists()  # nothing was written
    with sole_writer(output):
        (output / "model").mkdir()
    assert [path.name for path in output.iterdir()] == ["model"]
    with sole_writer(output, beside=True):
        assert (output.parent / ".run.lock").exists()
        shutil.rmtree(output)
    assert not output.exists()


def test_a_disk_without_locks_is_written_without_one(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with sole_writer(tmp_path), sole_writer(tmp_path):
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
