"""Stage 1's mixture: running text, and instructions rewritten as running text (hybrid instruction pre-training).

Pre-training on raw medical text alone lets a model drift from the form in which it will be asked. Here a conversation
becomes a plain completion without chat role tokens, in several surface forms, and every token carries loss.

The data never lies in memory: `stage_sources` says which files there are, `write_tokens` turns them into ids on disk
(a `TokenStore`), `mix` draws documents by their lengths, and `PackedRows` makes the rows that a step asks for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pedgpt.data.packing import Row, best_fit_arrays, document_stream
from pedgpt.data.records import Conversation, ReadSummary, SkippedRow, files_of, iter_records
from pedgpt.data.tokenizer import Tokenizer
from pedgpt.files import sync, write_text

Numbers = NDArray[np.int64]

# Question and answer as one running text. Forms differ so that the knowledge is tied to none of them.
SURFACE_FORMS = (
    "{question}\n{answer}",
    "问：{question}\n答：{answer}",
    "问题：{question}\n解答：{answer}",
    "有人问：{question}\n回答是：{answer}",
    "{question}{answer}",
    "关于“{question}”，解答如下：\n{answer}",
    "【提问】{question}\n【回复】{answer}",
)
DOMAIN, GENERAL, INSTRUCTIONS = "domain text", "general text", "instructions"
# Which part of the mixture a table of documents belongs to; conversations are instructions, whatever their table.
_TEXT_TABLES = {"text/pediatric": DOMAIN, "text/general_medical": DOMAIN, "text/general": GENERAL}
_MANIFEST_VERSION, _STORE_VERSION = 1, 1
_REBUILD = "build the corpus again with recipes/build_corpus.py"


def as_completion(conversation: Conversation, form: int) -> str:
    """A conversation as running text in surface form `form` (modulo their number); no system text, no reasoning."""
    template = SURFACE_FORMS[form % len(SURFACE_FORMS)]
    turns = [message for message in conversation.messages if message.role != "system"]
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return "\n".join(template.format(question=question.content, answer=answer.content) for question, answer in pairs)


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
        part = INSTRUCTIONS if entry["kind"] == "conversations" else _TEXT_TABLES.get(entry["table"])
        if part is None or entry["kind"] not in ("documents", "conversations"):
            found = f"{entry['kind']} of table {entry['table']!r}"
            raise ValueError(
                f"{path}: {entry['path']}: found {found} in stage {stage}, expected conversations, or documents of "
                f"{', '.join(_TEXT_TABLES)}; {_REBUILD}"
            )
        grouped.setdefault((part, entry["source"]), []).append(str(_checked(Path(folder), entry)))
    sources = []
    for (part, name), paths in sorted(grouped.items()):
        about = manifest["sources"].get(name)
        if not isinstance(about, dict):
            raise ValueError(f"{path}: sources: nothing about {name!r}, which has files; {_REBUILD}")
        weight, epochs = about.get("weight", 1.0), about.get("epochs", 0.0)
        for key, value in (("weight", weight), ("epochs", epochs)):
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"{path}: sources: {key} of {name!r} is {value!r}, expected a number that is not negative; fix it "
                    "where the sources are listed, and build the corpus again"
                )
        kind = "conversations" if part == INSTRUCTIONS else "documents"
        sources.append(TextSource(name, part, kind, tuple(paths), float(weight), float(epochs)))
    return sources


def heldout_files(folder: str | Path, table: str) -> list[str]:
    """The held-out files of a table in the corpus at `folder`; checked, and raises, as in `stage_sources`."""
    entries = _read_manifest(folder)["files"]
    wanted = [entry for entry in entries if (entry["side"], entry["table"]) == ("heldout", table)]
    return [str(_checked(Path(folder), entry)) for entry in wanted]


def write_tokens(
    folder: str | Path,
    sources: Sequence[TextSource],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    on_bad_row: str = "error",
    columns: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """Make `folder` the token store of these sources, yielding the number of texts done after each batch of them.

    What is there already stays if it was made of the same files, tokenizer, surface forms and settings; otherwise it
    is made anew, under another name until it is complete. Holds one batch in memory. To be run to its end by one
    process; each step is short, so that others can wait for it in a collective. Raises ValueError as the readers do.
    """
    folder = Path(folder)
    key = _key(sources, tokenizer, seed, on_bad_row, columns)
    with suppress(ValueError):
        if TokenStore(folder).key == key:
            return
    temporary = folder.with_name(f".{folder.name}.tmp")
    for old in (temporary, folder):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    summary, digest = ReadSummary(), hashlib.sha256()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    counts: list[int] = []
    end = 0
    with open(temporary / "tokens.bin", "wb") as tokens, open(temporary / "offsets.bin", "wb") as offsets:
        offsets.write(np.zeros(1, "<i8").tobytes())
        for source in sources:
            counts.append(0)
            for batch in _batches(_texts(source, seed, on_bad_row, columns, summary)):
                streams = [
                    document_stream(ids, tokenizer.eos_id, tokenizer.document_prefix)
                    for ids in tokenizer.encode_batch(batch)
                ]
                ends = end + np.cumsum([len(stream) for stream in streams], dtype="<i8")
                for file, data in (
                    (tokens, np.fromiter(chain.from_iterable(streams), dtype).tobytes()),
                    (offsets, ends.tobytes()),
                ):
                    file.write(data)
                    digest.update(data)
                counts[-1] += len(batch)
                end = int(ends[-1])
                yield len(batch)
    for name in ("tokens.bin", "offsets.bin"):
        sync(temporary / name)
    store = {
        "key": key, "digest": digest.hexdigest(), "dtype": dtype.str, "tokens": end, "counts": counts,
        "sources": [asdict(source) for source in sources], "rows": summary.rows,
        "skipped": [asdict(row) for row in summary.skipped],
    }  # fmt: skip
    write_text(temporary / "store.json", json.dumps(store, ensure_ascii=False))
    os.replace(temporary, folder)


class TokenStore:
    """The documents of several sources as token ids on disk, mapped into memory, source after source.

    Document d is tokens[offsets[d] : offsets[d + 1]], its prefix and end included; `counts` says how many documents
    each of `sources` has, `summary` which rows were read and skipped, `digest` names the contents. Raises ValueError if
    the folder holds no complete store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / "store.json"
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            self.key, self.digest = about["key"], about["digest"]
            self.counts: list[int] = about["counts"]
            self.sources = [TextSource(**{**source, "paths": tuple(source["paths"])}) for source in about["sources"]]
            self.summary = ReadSummary(about["rows"], [SkippedRow(**row) for row in about["skipped"]])
            self.tokens = self._map("tokens.bin", np.dtype(about["dtype"]), about["tokens"])
            self.offsets = self._map("offsets.bin", np.dtype("<i8"), sum(self.counts) + 1)
            if self.offsets[-1] != len(self.tokens):
                raise ValueError(f"its offsets end at {self.offsets[-1]}, its tokens at {len(self.tokens)}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"no complete token store ({error}); delete it, and the next run makes it again"
            raise ValueError(f"{self.folder}: {reason}") from None

    def sizes(self) -> list[Numbers]:
        """The tokens that each document fills in rows, source by source: all but its last, which is only predicted."""
        sizes = np.maximum(np.diff(self.offsets) - 1, 0)
        return np.split(sizes, np.cumsum(self.counts)[:-1]) if self.counts else []

    def parts(self) -> set[str]:
        """The parts of the mixture that hold any text."""
        return {source.part for source, sizes in zip(self.sources, self.sizes(), strict=True) if sizes.any()}

    def source_of(self, token: int) -> str:
        """Where the token at this place comes from: "part/source document", documents counted from 1."""
        document = int(np.searchsorted(self.offsets, token, side="right")) - 1
        for source, count in zip(self.sources, self.counts, strict=True):
            if document < count:
                return f"{source.part}/{source.name} {document + 1}"
            document -= count
        raise IndexError(f"token {token} is beyond the {len(self.tokens)} of {self.folder}")

    def _map(self, name: str, dtype: np.dtype, count: int) -> NDArray[Any]:
        path = self.folder / name
        if (size := path.stat().st_size) != count * dtype.itemsize:
            raise ValueError(f"{name} has {size} bytes, expected {count * dtype.itemsize}")
        return np.asarray(np.memmap(path, dtype, "r")) if size else np.empty(0, dtype)  # nothing cannot be mapped


@contextmanager
def discarded_on_error(folder: str | Path) -> Iterator[None]:
    """Leave neither `folder` nor, if it has nothing else in it, its parent behind a user's mistake."""
    try:
        yield
    except (ValueError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            Path(folder).parent.rmdir()
        raise


@dataclass(frozen=True)
class Mixture:
    """Which documents, in which order, and how much of each source, named by (part, source), went in."""

    order: Numbers  # numbers of documents, over all sources end to end
    tokens: dict[tuple[str, str], int]
    epochs: dict[tuple[str, str], float]

    def describe(self) -> str:
        """By part, one line a source: tokens, share, and how often its text was read."""
        total = max(1, sum(self.tokens.values()))
        width = max(len(name) for key in self.tokens for name in (key[0], f"  {key[1]}"))
        lines = []
        for part in dict.fromkeys(part for part, _ in self.tokens):
            count = sum(n for key, n in self.tokens.items() if key[0] == part)
            lines.append(f"  {part:<{width}}{count:>14,} tokens {count / total:>6.1%}")
            for (owner, name), n in self.tokens.items():
                if owner == part:
                    epochs = self.epochs[part, name]
                    lines.append(f"    {name:<{width - 2}}{n:>14,} tokens {n / total:>6.1%}  {epochs:.2f} epochs")
        return "\n".join(lines)


def part_shares(instruction_share: float, domain_to_general: float, parts: Collection[str]) -> dict[str, float]:
    """The share of each part: of the text, `domain_to_general` tokens to one, if `parts` has any general text."""
    text = 1 - instruction_share
    general = text / (1 + domain_to_general) if GENERAL in parts else 0.0
    return {DOMAIN: text - general, GENERAL: general, INSTRUCTIONS: instruction_share}


def mix(
    sources: Sequence[TextSource],
    sizes: Sequence[Numbers],
    shares: Mapping[str, float],
    *,
    total_tokens: int,
    seed: int,
) -> Mixture:
    """Draw whole documents, given by their lengths, until each part has its share of `total_tokens`; shuffle them.

    `total_tokens` 0 reads the first part with a share once: each of its sources `weight` times, or `epochs`. Inside a
    part, sources with `epochs` are read that often, and the rest goes to the others in proportion to weight x tokens,
    each within one document. A source is read in a shuffled order, again and again if need be. The draw depends on
    lengths, settings and `seed` alone: permutations sort the raw output of PCG64, which numpy keeps across versions.

    Raises ValueError if the shares are negative or all 0, a part with a share holds no text, or the fixed epochs of a
    part do not fit its share.
    """
    total_share = sum(shares.values())
    if total_share <= 0 or min(shares.values()) < 0:
        raise ValueError(f"the shares of the mixture must not be negative and must not all be 0, found {dict(shares)}")
    held = [int(size.sum()) for size in sizes]
    members = {part: [i for i, s in enumerate(sources) if s.part == part] for part in shares if shares[part] > 0}
    wanted = {part: sum(held[i] * (sources[i].epochs or sources[i].weight) for i in members[part]) for part in members}
    for part, tokens_once in wanted.items():
        if not tokens_once:
            lacking = "all weights in it are 0" if any(held[i] for i in members[part]) else "it holds no text"
            raise ValueError(f"the mixture gives {part!r} a share of {shares[part] / total_share:.0%}, but {lacking}")
    if not total_tokens:
        part, tokens_once = next(iter(wanted.items()))
        total_tokens = round(round(tokens_once) * total_share / shares[part])

    first = np.cumsum([0, *map(len, sizes)])
    drawn: list[Numbers] = []
    tokens: dict[tuple[str, str], int] = {}
    epochs: dict[tuple[str, str], float] = {}
    for part, inside in members.items():
        budgets = _budgets(part, [sources[i] for i in inside], [held[i] for i in inside],
                           round(total_tokens * shares[part] / total_share), total_tokens)  # fmt: skip
        for i, budget in zip(inside, budgets, strict=True):
            key = (part, sources[i].name)
            picked = _draw(sizes[i], budget, (seed, *key))
            drawn.append(first[i] + picked)
            tokens[key] = int(sizes[i][picked].sum())
            epochs[key] = tokens[key] / max(1, held[i])
    order = np.concatenate(drawn)
    return Mixture(order[_shuffled(len(order), (seed, "order"))], tokens, epochs)


class PackedRows:
    """Documents of a store in rows of up to `row_length` tokens, packed best-fit by length and read when asked for.

    `order` numbers the documents. One longer than a row becomes several pieces; each token but the first of a document
    is predicted once. Takes tens of bytes of memory for each piece.
    """

    def __init__(self, store: TokenStore, order: Numbers, row_length: int) -> None:
        if row_length < 1:
            raise ValueError(f"row_length must be at least 1, found {row_length}")
        self.store, self.row_length = store, row_length
        begin = store.offsets[order]
        size = np.maximum(store.offsets[order + 1] - begin - 1, 0)
        pieces = -(-size // row_length)
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of its document's pieces
        starts = np.repeat(begin, pieces) + nth * row_length
        lengths = np.minimum(np.repeat(size, pieces) - nth * row_length, row_length)
        members, self.rows = best_fit_arrays(lengths, row_length)
        self.starts, self.lengths = starts[members], lengths[members].astype("<i4")

    def __len__(self) -> int:
        return len(self.rows) - 1

    def row(self, number: int) -> Row:
        """Row `number`; its `sources` name part, source and number of each document."""
        row = Row([], [], [])
        here = slice(*self.rows[number : number + 2])
        for start, length in zip(self.starts[here].tolist(), self.lengths[here].tolist(), strict=True):
            piece = self.store.tokens[start : start + length + 1].tolist()
            row.tokens.extend(piece[:-1])
            row.labels.extend(piece[1:])
            row.documents.extend([len(row.sources)] * length)
            row.sources.append(self.store.source_of(start))
        return row

    @property
    def utilization(self) -> float:
        """The share of positions that hold a token."""
        return float(self.lengths.sum(dtype=np.int64)) / max(1, len(self) * self.row_length)

    @property
    def fingerprint(self) -> str:
        """A short name of exactly these rows, to tell whether a checkpoint belongs to them."""
        digest = hashlib.sha256(self.store.digest.encode())
        for part in (self.rows, self.starts, self.lengths):
            digest.update(part.tobytes())
        return digest.hexdigest()[:16]


def _budgets(part: str, sources: list[TextSource], held: list[int], budget: int, total_tokens: int) -> list[int]:
    """The tokens to draw from each source of a part, in its order."""
    fixed = [round(source.epochs * tokens) for source, tokens in zip(sources, held, strict=True)]
    weights = [0.0 if s.epochs else s.weight * tokens for s, tokens in zip(sources, held, strict=True)]
    rest = budget - sum(fixed)
    slack = len(sources)  # each is rounded
    if rest < -slack or (rest > max(slack, budget // 100) and not any(weights)):
        asked = [f"{s.name} {s.epochs:g} x {n:,}" for s, n in zip(sources, held, strict=True) if s.epochs]
        raise ValueError(
            f"the mixture gives {part!r} {budget:,} of {total_tokens:,} tokens, but the fixed epochs of its sources "
            f"take {sum(fixed):,} ({', '.join(asked)}); change their epochs, the shares or total_tokens, or give a "
            "source of that part epochs 0 and a weight, to take what is left"
        )
    scale = max(0, rest) / (sum(weights) or 1)
    return [tokens or round(weight * scale) for tokens, weight in zip(fixed, weights, strict=True)]


def _draw(sizes: Numbers, budget: int, key: tuple[int | str, ...]) -> Numbers:
    """The fewest documents that reach `budget` tokens, read in a new shuffled order each time all were read."""
    usable = np.flatnonzero(sizes)
    held = int(sizes.sum())
    whole, rest = divmod(budget, held) if held else (0, 0)
    picked = [usable[_shuffled(len(usable), (*key, epoch))] for epoch in range(whole + (rest > 0))]
    if rest:
        reached = np.cumsum(sizes[picked[-1]])
        picked[-1] = picked[-1][: int(np.searchsorted(reached, rest)) + 1]
    return np.concatenate(picked) if picked else np.empty(0, np.int64)


def _shuffled(count: int, key: tuple[int | str, ...]) -> Numbers:
    """A permutation of `count` numbers that depends on `key` alone."""
    entropy = int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest())
    return np.argsort(np.random.PCG64(entropy).random_raw(count), kind="stable")


def _texts(
    source: TextSource, seed: int, on_bad_row: str, columns: Mapping[str, str] | None, summary: ReadSummary
) -> Iterator[str]:
    records = iter_records(source.paths, source.kind, on_bad_row=on_bad_row, summary=summary, columns=columns)
    for number, record in enumerate(records):
        if isinstance(record, Conversation):
            # Hashed rather than in turn: rows whose kind alternates must not each get forms of their own.
            yield as_completion(record, zlib.crc32(f"{seed}/{source.name}/{number}".encode()))
        else:
            yield record.text


def _batches(texts: Iterable[str], most: int = 1000, characters: int = 2**18) -> Iterator[list[str]]:
    """Texts in lists of up to `most`, ended early by long ones: its encoding takes 100 bytes a character."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == most or size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _key(
    sources: Sequence[TextSource],
    tokenizer: Tokenizer,
    seed: int,
    on_bad_row: str,
    columns: Mapping[str, str] | None,
) -> str:
    """Names all that a token store depends on."""
    ends = [tokenizer.eos_id, tokenizer.document_prefix]
    digest = hashlib.sha256(json.dumps([_STORE_VERSION, SURFACE_FORMS, ends, seed, on_bad_row, columns or {}]).encode())
    digest.update(tokenizer.description().encode())
    for source in sources:
        files = [(str(path), _sha256(path)[0]) for path in (files_of(source.paths) if source.paths else [])]
        digest.update(json.dumps([asdict(source), files]).encode())
    return digest.hexdigest()


def _sha256(path: Path) -> tuple[str, int]:
    """The SHA-256 of a file and its rows, lines that are not blank."""
    digest, rows = hashlib.sha256(), 0
    with open(path, "rb") as file:
        for line in file:
            digest.update(line)
            rows += bool(line.strip())
    return digest.hexdigest(), rows


_FIELDS = dict.fromkeys(("path", "side", "table", "source", "kind", "sha256"), str) | {"stages": list, "rows": int}


def _read_manifest(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the folder of a corpus, made by recipes/build_corpus.py")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {_REBUILD}") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != _MANIFEST_VERSION:
        raise ValueError(f"{path}: version is {version!r}, expected {_MANIFEST_VERSION}; {_REBUILD}")
    for key, kind in (("files", list), ("sources", dict)):
        if not isinstance(found := manifest.get(key), kind):
            raise ValueError(f"{path}: {key} is a {type(found).__name__}, expected {kind.__name__}; {_REBUILD}")
    seen = set()
    for number, entry in enumerate(manifest["files"], 1):
        values = entry if isinstance(entry, dict) else {}
        wrong = [key for key, kind in _FIELDS.items() if type(values.get(key)) is not kind]
        if wrong or values["path"] in seen:
            reason = f"{', '.join(wrong)} missing or of a wrong type" if wrong else f"{values['path']} is listed twice"
            raise ValueError(f"{path}: files: entry {number}: {reason}; {_REBUILD}")
        seen.add(values["path"])
    return manifest


def _checked(folder: Path, entry: Mapping[str, Any]) -> Path:
    """The file of a manifest's entry, if it lies in the folder and is what the entry says."""
    path = folder / entry["path"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / 'manifest.json'}: {entry['path']} leads out of the corpus; {_REBUILD}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but {folder / 'manifest.json'} lists it; {_REBUILD}")
    digest, rows = _sha256(path)
    if (digest, rows) != (entry["sha256"], entry["rows"]):
        raise ValueError(
            f"{path}: found {rows} rows, SHA-256 {digest[:12]}…, expected {entry['rows']} rows, SHA-256 "
            f"{entry['sha256'][:12]}…: it was changed since the manifest was written; {_REBUILD}"
        )
    return path
