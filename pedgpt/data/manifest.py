"""A corpus' manifest.json: how it is written, and which files a stage reads, checked against what is in the folder."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pedgpt.files import __version__, write_json

DOMAIN, GENERAL, INSTRUCTIONS = "domain text", "general text", "instructions"
# Which part of the mixture a table of documents belongs to; conversations are instructions, whatever their table.
_TEXT_TABLES = {"text/pediatric": DOMAIN, "text/general_medical": DOMAIN, "text/general": GENERAL}
_VERSION = 1
_ENTRY = dict.fromkeys(("path", "side", "table", "source", "kind", "sha256"), str) | {"stages": list, "rows": int}


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
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    sources: Mapping[str, Mapping[str, Any]],
    files: Sequence[Mapping[str, Any]],
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the manifest.json of a new corpus and return it; `found` is what the build counted, for people.

    Each source has its `weight` and `epochs`, and each file the keys of `_ENTRY`. The same corpus has the same bytes:
    there is no date and no path outside the corpus.
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


def stage_sources(folder: str | Path, stage: int = 1) -> list[TextSource]:
    """The training files of a stage in the corpus at `folder`, by part and source, as its manifest.json lists them.

    Raises ValueError naming the file if the manifest is missing or damaged, a file of the stage is missing, lies
    outside the folder, or differs from the manifest in rows or SHA-256.
    """
    manifest, path = _read_manifest(folder), Path(folder) / "manifest.json"
    grouped: dict[tuple[str, str], list[str]] = {}
    for entry in manifest["files"]:
        if entry["side"] != "train" or stage not in entry["stages"]:
            continue
        parts = {"conversations": INSTRUCTIONS, "documents": _TEXT_TABLES.get(entry["table"])}
        if not (part := parts.get(entry["kind"])):
            found = f"found {entry['kind']} of table {entry['table']!r} in stage {stage}"
            expected = f"expected conversations, or documents of {', '.join(_TEXT_TABLES)}"
            raise _unusable(path, f"{entry['path']}: {found}, {expected}")
        grouped.setdefault((part, entry["source"]), []).append(_checked(Path(folder), entry))
    sources = []
    for (part, name), paths in sorted(grouped.items()):
        about = manifest["sources"].get(name)
        if not isinstance(about, dict):
            raise _unusable(path, f"sources: nothing about {name!r}, which has files")
        weight, epochs = about.get("weight", 1.0), about.get("epochs", 0.0)
        for key, value in (("weight", weight), ("epochs", epochs)):
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                found = f"sources: {key} of {name!r} is {value!r}, expected a number that is not negative"
                raise ValueError(f"{path}: {found}; fix it where the sources are listed, and build the corpus again")
        kind = "conversations" if part == INSTRUCTIONS else "documents"
        sources.append(TextSource(name, part, kind, tuple(paths), float(weight), float(epochs)))
    return sources


def heldout_files(folder: str | Path, table: str) -> list[str]:
    """The held-out files of a table in the corpus at `folder`; checked, and raises, as in `stage_sources`."""
    entries = _read_manifest(folder)["files"]
    return [_checked(Path(folder), e) for e in entries if (e["side"], e["table"]) == ("heldout", table)]


def _read_manifest(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the folder of a corpus, made by recipes/build_corpus.py")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _unusable(path, f"not valid JSON ({error})") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != _VERSION:
        raise _unusable(path, f"version is {version!r}, expected {_VERSION}")
    for key, kind in (("files", list), ("sources", dict)):
        if not isinstance(found := manifest.get(key), kind):
            raise _unusable(path, f"{key} is a {type(found).__name__}, expected {kind.__name__}")
    seen = set()
    for number, entry in enumerate(manifest["files"], 1):
        values = entry if isinstance(entry, dict) else {}
        wrong = [key for key, kind in _ENTRY.items() if type(values.get(key)) is not kind]
        if wrong or values["path"] in seen:
            reason = f"{', '.join(wrong)} missing or of a wrong type" if wrong else f"{values['path']} is listed twice"
            raise _unusable(path, f"files: entry {number}: {reason}")
        seen.add(values["path"])
    return manifest


def _checked(folder: Path, entry: Mapping[str, Any]) -> str:
    """The path of a manifest's entry, if it lies in the folder and is what the entry says."""
    path, manifest = folder / entry["path"], folder / "manifest.json"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise _unusable(manifest, f"{entry['path']} leads out of the corpus")
    if not path.is_file():
        raise _unusable(path, f"no such file, but {manifest} lists it")
    digest, rows = hashlib.sha256(), 0
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            rows += bool(line.strip())
    if (digest.hexdigest(), rows) != (entry["sha256"], entry["rows"]):
        found = f"found {rows} rows, SHA-256 {digest.hexdigest()[:12]}…"
        expected = f"expected {entry['rows']} rows, SHA-256 {entry['sha256'][:12]}…"
        raise _unusable(path, f"{found}, {expected}: it was changed since the manifest was written")
    return str(path)


def _unusable(path: Path, fault: str) -> ValueError:
    return ValueError(f"{path}: {fault}; build the corpus again with recipes/build_corpus.py")
