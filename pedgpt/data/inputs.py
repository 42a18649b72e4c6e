"""Which files the given paths name, and which files of a folder hold data."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

PathLike = str | os.PathLike[str]
Paths = PathLike | Iterable[PathLike]

TEXTS = (".txt", ".md")
SUFFIXES = (*TEXTS, ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx")
# Files beside the data: notes for people, and what other projects write about their data.
NOTES = re.compile(r"(readme|licen[cs]e|changelog|requirements|dataset_infos?)(?![a-z]).*", re.IGNORECASE)


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def format_of(path: Path) -> str:
    """The format that a file's name tells: ".csv" for a.CSV and for a.csv.gz; empty if it is none of `SUFFIXES`."""
    suffix = _unpacked(path).suffix.lower()
    return suffix if suffix in SUFFIXES else ""


def stem_of(path: Path) -> str:
    """A file's name without its suffix, and without .gz."""
    return _unpacked(path).stem


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
