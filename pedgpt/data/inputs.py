"""Which files the given paths name, and which files of a folder hold data."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

PathLike = str | os.PathLike[str]
Paths = PathLike | Iterable[PathLike]

TEXTS, EXTRA = (".txt", ".md"), (".parquet", ".xlsx")
SUFFIXES = (*TEXTS, ".jsonl", ".json", ".csv", ".tsv", *EXTRA)
# Files beside the data: notes for people, and what other projects write about their data.
NOTES = re.compile(r"(readme|licen[cs]e|changelog|requirements|dataset_infos?)(?![a-z]).*", re.IGNORECASE)
ADVICE = dict.fromkeys(".zip .rar .7z .tar .gz .tgz .bz2 .xz .zst".split(), "an archive; unpack it")
ADVICE |= dict.fromkeys((".pdf", ".doc", ".docx"), "no text; save its text as .txt")
ADVICE[".xls"] = "an old workbook; save it as .xlsx"


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def format_of(path: Path) -> str:
    """The format that a file's name tells: ".csv" for a.CSV and for a.csv.gz; empty if it is none of `SUFFIXES`."""
    suffix = _unpacked(path).suffix.lower()
    return suffix if suffix in SUFFIXES and (suffix not in EXTRA or _unpacked(path) == path) else ""


def stem_of(path: Path) -> str:
    """A file's name without its suffix, and without .gz."""
    return _unpacked(path).stem


def files_in(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """The files in a folder and its subfolders that may hold data, sorted, and why each of the others is left out."""
    files: list[Path] = []
    left_out: dict[Path, str] = {}
    for path in sorted(folder.rglob("*")):
        names = path.relative_to(folder).parts
        hidden = next((n for n, name in enumerate(names, 1) if name.startswith((".", "~$", "__MACOSX"))), 0)
        if hidden:
            left_out[folder.joinpath(*names[:hidden])] = "hidden or temporary"
        elif path.is_dir():
            if path.is_symlink():
                left_out[path] = "a link to a folder; name that folder itself"
            elif not os.access(path, os.R_OK | os.X_OK):
                left_out[path] = "a folder that may not be opened"
        elif not path.is_file():
            left_out[path] = "not a plain file"
        elif NOTES.fullmatch(path.name) and path.suffix.lower() in ("", ".json", *TEXTS):
            left_out[path] = "about the data, not data"
        elif not format_of(path):
            left_out[path] = ADVICE.get(path.suffix.lower(), "not a format that is read")
        elif not path.stat().st_size:
            left_out[path] = "empty"
        else:
            files.append(path)
    return files, left_out


def files_of(paths: Paths, left_out: dict[Path, str] | None = None) -> list[Path]:
    """The files that paths name, sorted within a folder; what a folder leaves out goes into `left_out` with the reason.

    Raises ValueError about all paths that are missing, of no known format, or folders without data.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        known, others = files_in(path) if path.is_dir() else ([path] if format_of(path) else [], {})
        if not path.exists():
            problems.append(f"{path}: found no such file or folder; check the path")
        elif not known:
            problems.append(f"{path}: found no file ending in {' '.join(SUFFIXES)}; check the path or rename it")
        files += known
        if left_out is not None:
            left_out |= others
    if problems:
        raise ValueError("\n".join(problems))
    return files
