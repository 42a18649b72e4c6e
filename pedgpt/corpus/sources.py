"""What a corpus is built from: files with their kind, licence and weight, listed in TOML or found by their content."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from pedgpt.corpus.classify import DOMAINS, GENERAL, PEDIATRIC, classify, domain_of_texts
from pedgpt.data.readers import NoData, detect_kind, field_mapping, iter_records, parse_columns
from pedgpt.data.tables import files_in, files_of, stem_of
from pedgpt.files import nearest, printable, read_toml

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
_KIND_FOUND = {"documents": "encyclopedia", "triples": "knowledge_graph"}  # of files that no listing names
_KIND_FOUND |= {"conversations": "instructions", "preferences": "preferences"}


@dataclass(frozen=True)
class Source:
    """One [[source]] table; "safety" and "self_cognition" have no files, they are made from templates."""

    kind: str  # one of KINDS
    name: str = ""  # names its files in the corpus; by default the file's stem, or the kind
    files: tuple[Path, ...] = ()  # key "file": a file or folder beside the TOML, or a list of them
    domain: str = PEDIATRIC  # pediatric, general_medical or general; empty: each row's own words tell it
    task: str = ""  # conversations only: what they are; empty: by each row's own task, or its words
    columns: Mapping[str, str] = field(default_factory=dict)  # key: ["question=ask", …], if names are unknown
    licence: str = "not stated"
    weight: float = 1.0  # in stage 1's mixture: how often its text is drawn, beside others of its part
    epochs: float = 0.0  # in stage 1's mixture: drawn exactly this often; 0: by weight
    build: tuple[str, ...] = ()  # builders; by default those of its kind
    assistant: str = "儿科小助手"  # self_cognition only
    developer: str = "PedGPT 研究项目"  # self_cognition only
    root: Path = Path()  # the folder of the TOML, or that in which it was found; places name files from there

    @property
    def reads(self) -> str:
        """The reader of its files: documents, conversations, preferences or triples; empty without files."""
        return KINDS[self.kind][0]


def read_listing(
    path: Path, columns: Mapping[str, str] | None = None, left_out: dict[Path, str] | None = None, domain: str = ""
) -> list[Source]:
    """The sources that a TOML file lists, or those of a folder: its corpus.toml, or else its files by their content.

    A single data file is read like a folder that holds nothing else. `columns` and `domain` are for files that are
    found by content; those of them that hold no data are put into `left_out` with the reason. Raises ValueError for a
    wrong listing, naming the table and the key, and one about all files whose data cannot be used.
    """
    if (path / "corpus.toml").is_file():
        path = path / "corpus.toml"
    if not path.exists():
        raise ValueError(f"--source {path}: no such file or folder")
    if path.suffix.lower() != ".toml":
        return _found(path, columns or {}, {} if left_out is None else left_out, domain)
    if columns or domain:
        raise ValueError(f"--columns and --domain are for files that are found by content; write `domain` in {path}")
    listing = read_toml(path)
    entries = listing.get("source")
    if [*listing] != ["source"] or not isinstance(entries, list) or {*map(type, entries)} != {dict}:
        raise ValueError(f"{path}: expected [[source]] tables alone, each with a kind and, but for templates, a file")
    sources: dict[str, Source] = {}
    for number, entry in enumerate(entries, 1):
        try:
            source = _source(entry, path.parent)
            if source.name in sources:
                raise ValueError(f"the name {source.name!r} is taken; give it another `name`")
        except ValueError as error:
            raise ValueError(f"{path}: source {number}: {error}") from None
        sources[source.name] = source
    return list(sources.values())


def _source(entry: dict[str, Any], folder: Path) -> Source:
    def expect(key: str, fits: Any, expected: str) -> None:
        if not fits:
            raise ValueError(f"{key} is {entry.get(key)!r}, expected {expected}")

    known = {"file", *(f.name for f in fields(Source))} - {"files", "root"}
    for key, value in entry.items():
        if key not in known:
            raise ValueError(f"unknown key {key!r}; {nearest(key, sorted(known), 'keys')}")
        if key in ("weight", "epochs"):
            expect(key, type(value) in (int, float) and 0 <= value < math.inf, "a number of at least 0")
        elif isinstance(value, list) and key in ("file", "build", "columns"):
            expect(key, all(value) and {*map(type, value)} <= {str}, "a list of texts")
        else:
            expect(key, isinstance(value, str) and key not in ("build", "columns"), "a list of texts or some text")
            expect(key, value.strip() or key in ("name", "task"), "some text")
    expect("kind", entry.get("kind") in KINDS, f"one of {', '.join(KINDS)}")
    reads, default, more = KINDS[entry["kind"]]
    told: dict[str, Any] = {"file": [], "columns": [], "build": default, "domain": PEDIATRIC} | entry
    names = told.pop("file")
    files = tuple(folder / name for name in ([names] if isinstance(names, str) else names))
    expect("domain", told["domain"] in DOMAINS, f"one of {', '.join(DOMAINS)}")
    among = ", ".join((*default, *more)) or "none for this kind"
    expect("build", {*told["build"]} <= {*default, *more}, f"a list of builders among {among}")
    expect("file", bool(files) == bool(reads), "a path or a list of paths" if reads else "none for this kind")
    files_of(files)  # which raises an error about those that are not there
    told["name"] = told.get("name") or (stem_of(files[0]) if files else told["kind"])
    for key in ("name", "task"):
        expect(key, is_name(told.get(key) or "-"), "letters, digits, _, - and & only, as it names a file")
    told |= {"columns": parse_columns(told["columns"]), "build": tuple(told["build"])}
    return Source(files=files, root=folder, **told)


def _found(folder: Path, columns: Mapping[str, str], left_out: dict[Path, str], domain: str) -> list[Source]:
    """Every file of a folder, or the one file, as what its first rows show it to be."""
    files, others = files_in(folder) if folder.is_dir() else (files_of(folder), {})
    root = folder if folder.is_dir() else folder.parent
    built = {path.parent for path in files if path.name == "manifest.json" and is_corpus(path.parent)}
    left_out |= {path: reason for path, reason in others.items() if built.isdisjoint(path.parents)}
    left_out |= dict.fromkeys(built, "a corpus that was built from sources")
    sources: dict[str, Source] = {}
    problems = []
    for path in (path for path in files if built.isdisjoint(path.parents)):
        try:
            reads = detect_kind(path, columns)
        except NoData as reason:
            left_out[path] = str(reason).removeprefix(f"{path}: ")
            continue
        except (ValueError, OSError) as problem:
            problems.append(str(problem))
            continue
        kind, about = _KIND_FOUND[reads], domain
        records = iter_records(path, reads, on_bad_row="skip", columns=columns)
        if reads == "documents":
            about = domain or domain_of_texts(records)
        elif reads == "conversations":  # most of the first ones have several turns and speak of medicine
            first = list(islice(records, 20))
            talks = sum(len(row.messages) > 3 and classify(row) != GENERAL for row in first)
            kind = "dialogues" if 2 * talks > len(first) else kind
        stem = re.sub(r"[^\w&-]", "_", inside(path.with_name(stem_of(path)), folder))[-50:]
        name = next(name for name in chain([stem], (f"{stem}_{n}" for n in count(2))) if name not in sources)
        sources[name] = Source(kind, name, (path,), about, root=root, columns=columns, build=KINDS[kind][1])
    if not sources and not problems:
        problems = [f"found no data; {_shown(left_out, folder)}"]
    if problems:
        raise ValueError(f"--source {folder}: " + "\n".join(problems))
    return list(sources.values())


def describe_sources(sources: list[Source], folder: Path, left_out: Mapping[Path, str]) -> str:
    """A table of how each file is read, field by field, and of the files that are not read."""
    lines = []
    for source in sources:
        domain, build = source.domain or "each row of the domain that its words tell", ", ".join(source.build)
        lines.append(f"{source.name}: {source.kind}, {domain}, {build or 'as it is'}; licence {source.licence}")
        for file in source.files:
            mapping = field_mapping(file, source.reads, source.columns) if file.is_file() else "every file in it"
            lines.append(f"  {inside(file, folder)}: {mapping}")
    return printable("\n".join(filter(None, [*lines, _shown(left_out, folder)])))


def _shown(left_out: Mapping[Path, str], folder: Path) -> str:
    """A line for each file that is not read; of many files with one reason only the first ten are named."""
    lines, seen = [], Counter[str]()
    for path, reason in left_out.items():
        seen[reason] += 1
        lines += [f"{inside(path, folder)}: not read: {reason}"] if seen[reason] <= 10 else []
    lines += [f"… and {files - 10:,} more files: not read: {reason}" for reason, files in seen.items() if files > 10]
    return "\n".join(lines)


def inside(path: Path, folder: Path) -> str:
    """A file's path in a folder; its name if it lies elsewhere."""
    return str(path.relative_to(folder)) if folder in path.parents else path.name


def is_corpus(folder: Path) -> bool:
    """Whether a folder is what build_corpus.py wrote."""
    manifest = folder / "manifest.json"
    return manifest.is_file() and b'"made_by"' in manifest.read_bytes()[:1000]


def is_name(text: str) -> bool:
    """Whether a source or task can name a file of the corpus; a row's task may be any text."""
    return bool(re.fullmatch(r"[\w&-]{1,60}", text))
