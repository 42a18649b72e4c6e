"""A corpus' manifest.json: how it is written, and which files a stage reads, checked against what is in the folder."""

import hashlib
import json
import platform
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pedgpt.files import __version__, write_json

Table = Mapping[str, Any]
DOMAIN, GENERAL, INSTRUCTIONS = "domain text", "general text", "instructions"
# Which part of the mixture a table of documents belongs to; conversations are instructions, whatever their table.
_TEXT_TABLES = {"text/pediatric": DOMAIN, "text/general_medical": DOMAIN, "text/general": GENERAL}
_VERSION = 1


@dataclass(frozen=True)
class TextSource:
    """Files of one origin in one part of the mixture.

    In its part a source gets tokens in proportion to `weight` x its own; with `epochs` above 0 it is read exactly that
    often instead. `kind` is "documents" or "conversations".
    """

    name: str
    part: str
    kind: str
    paths: tuple[str, ...]
    weight: float = 1.0
    epochs: float = 0.0


def write_manifest(
    folder: str | Path, *, settings: Table, sources: Mapping[str, Table], files: Sequence[Table], found: Table
) -> dict[str, Any]:
    """Write the manifest.json of a new corpus and return it; `found` is what the build counted, for people.

    Each source has its `weight` and `epochs`, and each file `path`, `side`, `table`, `source`, `kind`, `sha256`,
    `stages` and `rows`. The same corpus has the same bytes: there is no date and no path outside the corpus.
    """
    rows: dict[str, dict[str, int]] = {}
    for file in files:
        rows.setdefault(file["table"], {"train": 0, "heldout": 0})[file["side"]] += file["rows"]
    versions = {"pedgpt": __version__, "python": platform.python_version(), "numpy": np.__version__}
    manifest = {
        "version": _VERSION,
        "made_by": versions | {"unicode": unicodedata.unidata_version},
        "settings": settings,
        "sources": sources,
        "rows": dict(sorted(rows.items())),
        **found,
        "files": files,
    }
    write_json(Path(folder) / "manifest.json", manifest)
    return manifest


def stage_sources(folder: str | Path) -> list[TextSource]:
    """The training files of stage 1 in the corpus at `folder`, by part and source, as its manifest.json lists them.

    Raises ValueError naming the file if the manifest is missing or damaged, or a file of the stage is missing or has
    another SHA-256 than the manifest says.
    """
    with _manifest(folder) as manifest:
        grouped: dict[tuple[str, str], list[str]] = {}
        for entry in manifest["files"]:
            if entry["side"] == "train" and 1 in entry["stages"]:
                part = INSTRUCTIONS if entry["kind"] == "conversations" else _TEXT_TABLES[entry["table"]]
                grouped.setdefault((part, entry["source"]), []).append(_checked(Path(folder), entry))
        sources = []
        for (part, name), paths in sorted(grouped.items()):
            about = {"weight": 1.0, "epochs": 0.0} | manifest["sources"][name]
            kind = "conversations" if part == INSTRUCTIONS else "documents"
            sources.append(TextSource(name, part, kind, tuple(paths), float(about["weight"]), float(about["epochs"])))
        return sources


def heldout_files(folder: str | Path, table: str) -> list[str]:
    """The held-out files of a table in the corpus at `folder`; checked, and raises, as in `stage_sources`."""
    with _manifest(folder) as manifest:
        entries = [e for e in manifest["files"] if (e["side"], e["table"]) == ("heldout", table)]
        return [_checked(Path(folder), entry) for entry in entries]


@contextmanager
def _manifest(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The manifest of a corpus; what fails while it is read is a ValueError that names it."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the folder of a corpus, made by recipes/build_corpus.py")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["version"] != _VERSION:
            raise ValueError(f"version is {manifest['version']!r}, expected {_VERSION}")
        yield manifest
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        reason = error if isinstance(error, ValueError | OSError) else repr(error)
        raise ValueError(f"{path}: {reason}; build the corpus again with recipes/build_corpus.py") from None


def _checked(folder: Path, entry: Table) -> str:
    """The path of a manifest's entry, if the file is what the entry says."""
    path = folder / entry["path"]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry["sha256"]:
        found = f"found SHA-256 {digest[:12]}…, expected {entry['sha256'][:12]}…"
        raise ValueError(f"{path}: {found}: it was changed since the manifest was written")
    return str(path)
