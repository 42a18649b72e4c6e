"""What a corpus is built from: files with their kind, licence and weight, listed in TOML or found by their content."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pedgpt.corpus.classify import DOMAINS, GENERAL, PEDIATRIC, classify, domain_of_texts
from pedgpt.data.records import SUFFIXES, detect_kind, field_mapping, iter_records
from pedgpt.files import nearest, read_toml

# A kind of source: how its files are read, and what may be built from it; what is built by default comes first.
KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "textbook": ("documents", ("role_play",), ("preferences",)),
    "guideline": ("documents", ("role_play",), ("preferences",)),
    "encyclopedia": ("documents", (), ("role_play", "preferences")),
    "knowledge_graph": ("triples", ("text", "medkqa", "evidiag", "trerecom", "two_hop", "negative"), ("preferences",)),
    "dialogues": ("conversations", ("evidiag",), ()),
    "instructions": ("conversations", (), ("reconstruct", "preferences")),
    "preferences": ("preferences", (), ()),
    "safety": ("", (), ()),
    "self_cognition": ("", (), ()),
}
_KIND_FOUND = {
    "documents": "encyclopedia",
    "triples": "knowledge_graph",
    "conversations": "instructions",
    "preferences": "preferences",
}


@dataclass(frozen=True)
class Source:
    """One [[source]] table; "safety" and "self_cognition" have no files, they are made from templates."""

    kind: str  # one of KINDS
    name: str = ""  # names its files in the corpus; by default the file's stem, or the kind
    files: tuple[Path, ...] = ()  # key "file": a file or folder beside the TOML, or a list of them
    domain: str = PEDIATRIC  # pediatric, general_medical or general; empty if found by content: see `in_domain`
    task: str = ""  # conversations only: what they are; empty: by each row's own task, or its words
    licence: str = "not stated"
    weight: float = 1.0  # in stage 1's mixture: how often its text is drawn, beside others of its part
    epochs: float = 0.0  # in stage 1's mixture: drawn exactly this often; 0: by weight
    build: tuple[str, ...] = ()  # builders; by default those of its kind
    assistant: str = "儿科小助手"  # self_cognition only
    developer: str = "PedGPT 研究项目"  # self_cognition only

    @property
    def reads(self) -> str:
        """The reader of its files: documents, conversations, preferences or triples; empty without files."""
        return KINDS[self.kind][0]


def read_listing(path: Path) -> list[Source]:
    """The sources that a TOML file lists, or those of a folder: its corpus.toml, or else its files by their content.

    Raises ValueError for a file that is no such listing, naming the table and the key.
    """
    if path.is_dir() and (path / "corpus.toml").is_file():
        path = path / "corpus.toml"
    if path.is_dir():
        found = list(_found(path))
        if not found:
            raise ValueError(f"--source {path}: found no file ending in {' '.join(SUFFIXES)}")
        return found
    if not path.is_file():
        raise ValueError(f"--source {path}: no such file or folder")
    if path.suffix.lower() != ".toml":
        raise ValueError(f"--source {path}: expected a folder, or a .toml file that lists sources")
    listing = read_toml(path)
    entries = listing.get("source")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected [[source]] tables, each with a kind and, but for templates, a file")
    if unknown := listing.keys() - {"source"}:
        raise ValueError(f"{path}: found the key {', '.join(sorted(unknown))}, expected [[source]] tables alone")
    sources = [_source(entry, path, number) for number, entry in enumerate(entries, 1)]
    for i, source in enumerate(sources):
        if source.name in {other.name for other in sources[:i]}:
            raise ValueError(f"{path}: source {i + 1}: the name {source.name!r} is taken; give it another `name`")
    return sources


def _source(entry: dict[str, Any], listing: Path, number: int) -> Source:
    place = f"{listing}: source {number}"
    known = {f.name for f in fields(Source)} - {"files"} | {"file"}
    for key in entry.keys() - known:
        raise ValueError(f"{place}: unknown key {key!r}; {nearest(key, sorted(known), 'keys')}")
    kind, domain = entry.get("kind"), entry.get("domain", PEDIATRIC)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{place}: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if domain not in DOMAINS:
        raise ValueError(f"{place}: domain is {domain!r}, expected one of {', '.join(DOMAINS)}")
    reads, default, more = KINDS[kind]
    names = entry.get("file", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{place}: file is {names!r}, expected a path or a list of paths")
    if bool(names) != bool(reads):
        raise ValueError(f"{place}: a source of kind {kind!r} {'needs a file' if reads else 'has no file'}")
    files = tuple(listing.parent / name for name in names)
    for file in files:
        if not file.exists():
            raise ValueError(f"{place}: {file}: no such file or folder; paths are relative to the TOML file")
    for key in ("name", "task", "licence", "assistant", "developer"):
        if not isinstance(entry.get(key, ""), str) or (key in entry and key != "task" and not entry[key].strip()):
            raise ValueError(f"{place}: {key} is {entry[key]!r}, expected some text")
    for key, least in (("weight", 0), ("epochs", 0)):
        value = entry.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            raise ValueError(f"{place}: {key} is {value!r}, expected a number of at least {least}")
    build = entry.get("build", list(default))
    allowed = (*default, *more)
    if not isinstance(build, list) or not set(map(str, build)) <= set(allowed):
        expected = ", ".join(allowed) or "none for this kind"
        raise ValueError(f"{place}: build is {build!r}, expected a list of builders among {expected}")
    name, task = entry.get("name") or (files[0].stem if files else kind), entry.get("task", "")
    for key, value in (("name", name), ("task", task)):
        if value and not is_name(value):
            raise ValueError(f"{place}: {key} {value!r} cannot name a file; choose another")
    rest = {key: entry[key] for key in ("licence", "assistant", "developer") if key in entry}
    weight, epochs = float(entry.get("weight", 1)), float(entry.get("epochs", 0))
    return Source(kind, name, files, domain, task, weight=weight, epochs=epochs, build=tuple(build), **rest)


def _found(folder: Path) -> Iterator[Source]:
    """Every file of a known extension in the folder, as what its first rows show it to be."""
    names: set[str] = set()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix.lower() not in SUFFIXES or path.stem.lower() == "readme":
            continue
        kind = _KIND_FOUND[detect_kind(path)]
        if kind == "instructions" and _are_consultations(path):
            kind = "dialogues"
        name = re.sub(r"[^\w&-]", "_", path.stem)[:60]
        while name in names:
            name += "_"
        names.add(name)
        yield Source(kind, name, (path,), domain="", build=KINDS[kind][1])


def _are_consultations(path: Path) -> bool:
    """Whether most of a file's first conversations have several turns and speak of medicine."""
    first = list(islice(iter_records(path, "conversations", on_bad_row="skip"), 20))
    return 2 * sum(len(row.messages) > 3 and classify(row) != GENERAL for row in first) > len(first)


def in_domain(source: Source, stated: str = "") -> Source:
    """A source that was found by content, with the domain that is `stated`, or for running text with that of its words.

    Without a stated domain conversations keep none: each row's words tell.
    """
    if source.domain or not (stated or source.reads == "documents"):
        return source
    return replace(source, domain=stated or domain_of_texts(iter_records(source.files, "documents", on_bad_row="skip")))


def describe_sources(sources: list[Source], folder: Path) -> str:
    """A table of what each file is read as, field by field; in a folder without a listing also what is not read."""
    lines = []
    for source in sources:
        lines += [f"{source.name}: {source.kind}, {', '.join(source.build) or 'as it is'}; licence {source.licence}"]
        for file in source.files:
            mapping = field_mapping(file, source.reads) if file.is_file() else "every file in it"
            lines.append(f"  {file.name}: {mapping}")
    if not any(source.domain for source in sources):
        read = {file for source in sources for file in source.files}
        lines += [f"{path.name}: not read" for path in sorted(folder.iterdir()) if path not in read]
    return "\n".join(lines)


def is_name(text: str) -> bool:
    """Whether a source or task can name a file of the corpus; a row's task may be any text."""
    return bool(re.fullmatch(r"[\w&-]{1,60}", text))
