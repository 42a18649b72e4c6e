"""Texts as token ids on disk, so that a corpus never lies in memory, and the rows of a step made from them."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pedgpt.data.hybrid import SURFACE_FORMS, Numbers, as_completion
from pedgpt.data.inputs import files_of
from pedgpt.data.manifest import TextSource
from pedgpt.data.packing import Row, best_fit_arrays, document_stream
from pedgpt.data.readers import iter_records
from pedgpt.data.records import Conversation, ReadSummary, SkippedRow
from pedgpt.data.tokenizer import Tokenizer
from pedgpt.files import publish, sync, write_text

_VERSION = 1


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
                around = tokenizer.eos_id, tokenizer.document_prefix
                streams = [document_stream(ids, *around) for ids in tokenizer.encode_batch(batch)]
                ends = end + np.cumsum([len(stream) for stream in streams], dtype="<i8")
                for file, data in ((tokens, np.fromiter(chain.from_iterable(streams), dtype)), (offsets, ends)):
                    file.write(data.tobytes())
                    digest.update(data.tobytes())
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
    publish(temporary, folder)


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
    sources: Sequence[TextSource], tokenizer: Tokenizer, seed: int, on_bad_row: str, columns: Mapping[str, str] | None
) -> str:
    """Names all that a token store depends on."""
    ends = [tokenizer.eos_id, tokenizer.document_prefix]
    digest = hashlib.sha256(json.dumps([_VERSION, SURFACE_FORMS, ends, seed, on_bad_row, columns or {}]).encode())
    digest.update(tokenizer.description().encode())
    for source in sources:
        digest.update(json.dumps(asdict(source)).encode())
        for path in files_of(source.paths):
            with path.open("rb") as file:
                digest.update(json.dumps([str(path), hashlib.file_digest(file, "sha256").hexdigest()]).encode())
    return digest.hexdigest()
