"""Token ids on disk, made once by one process and mapped by all, and the rows of a step made from them."""

import functools
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pedgpt.data.chat import ChatFormat, ChatSettings
from pedgpt.data.examples import Example, document_stream, encode_rows
from pedgpt.data.hybrid import SURFACE_FORMS, Numbers, as_completion
from pedgpt.data.manifest import TextSource
from pedgpt.data.packing import Batch, best_fit_arrays, collate
from pedgpt.data.readers import iter_records, parse_columns
from pedgpt.data.records import Conversation, ReadSummary, SkippedRow
from pedgpt.data.tables import files_of
from pedgpt.data.tokenizer import Tokenizer
from pedgpt.files import publish, sync, write_text

_VERSION = 2
_LABEL = np.dtype("<i4")
T = TypeVar("T")
Encode = Callable[[TextSource, ReadSummary], Iterator[list[Example]]]  # a source's documents, batch by batch


def write_tokens(
    folder: str | Path,
    sources: Sequence[TextSource],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    on_bad_row: str = "error",
    columns: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """Make `folder` the token store of these sources as running text, as `_write` does."""

    def encode(source: TextSource, summary: ReadSummary) -> Iterator[list[Example]]:
        records = iter_records(source.paths, source.kind, on_bad_row=on_bad_row, summary=summary, columns=columns)
        # A hash chooses the form. Taken in turn, forms would be tied to kinds of rows where these alternate.
        texts = (
            as_completion(record, zlib.crc32(f"{seed}/{source.name}/{number}".encode()))
            if isinstance(record, Conversation)
            else record.text
            for number, record in enumerate(records)
        )
        for batch in _batches(texts, len):
            yield [Example(document_stream(ids, *around), []) for ids in tokenizer.encode_batch(batch)]

    around = tokenizer.eos_id, tokenizer.document_prefix
    made_of = [SURFACE_FORMS, *around, seed, on_bad_row, columns or {}]
    return _write(Path(folder), sources, tokenizer, made_of, encode, labelled=False)


def write_chats(
    folder: str | Path, kind: str, paths: Mapping[str, Sequence[str]], chat: ChatFormat, settings: ChatSettings
) -> Iterator[int]:
    """Make `folder`/name a token store of each name's files, as `_write` does.

    `kind` is "conversations", each of them a document, or "preferences", each of them two: chosen, then rejected.
    """
    columns, tokenizer = parse_columns(settings.columns), chat.tokenizer
    length, bad, long = settings.row_length, settings.on_bad_row, settings.on_long_row

    def encode(source: TextSource, summary: ReadSummary) -> Iterator[list[Example]]:
        rows = iter_records(source.paths, kind, on_bad_row=bad, summary=summary, columns=columns)
        fitting = encode_rows(rows, chat, length, bad, summary, long)
        for batch in _batches(fitting, lambda examples: sum(len(one.tokens) for one in examples)):
            yield list(chain.from_iterable(batch))

    made_of = [chat.fingerprint, chat.today, length, bad, long, columns]
    for name, files in paths.items():
        source = TextSource("files", kind, kind, tuple(map(str, files)))
        yield from _write(Path(folder) / name, [source], tokenizer, made_of, encode, labelled=True)


def _write(
    folder: Path, sources: Sequence[TextSource], tokenizer: Tokenizer, made_of: list, encode: Encode, labelled: bool
) -> Iterator[int]:
    """Make `folder` a token store, yielding the number of documents done after each batch of them.

    What is there already stays if it was made of the same files, tokenizer and settings (`made_of`); otherwise it is
    made anew, under another name until it is complete. Holds one batch in memory. One process runs this to its end. It
    yields often, because the other ranks wait in a collective that times out.
    """
    key = hashlib.sha256(json.dumps([_VERSION, tokenizer.description(), *made_of]).encode())
    for source in sources:
        key.update(json.dumps(asdict(source)).encode())
        for path in files_of(source.paths):
            with path.open("rb") as data:
                key.update(json.dumps([str(path), hashlib.file_digest(data, "sha256").hexdigest()]).encode())
    with suppress(ValueError):
        if TokenStore(folder).key == key.hexdigest():
            return
    temporary = folder.with_name(f".{folder.name}.tmp")
    for old in (temporary, folder):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    summary, digest = ReadSummary(), hashlib.sha256()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    names = ["tokens.bin", "offsets.bin", "labels.bin"][: 2 + labelled]
    counts: list[int] = []
    end = 0
    with ExitStack() as stack:
        files = [stack.enter_context((temporary / name).open("wb")) for name in names]
        files[1].write(np.zeros(1, "<i8").tobytes())
        for source in sources:
            counts.append(0)
            for examples in encode(source, summary):
                ids = np.fromiter(chain.from_iterable(one.tokens for one in examples), dtype)
                ends = end + np.cumsum([len(one.tokens) for one in examples], dtype="<i8")
                labels = np.fromiter(chain.from_iterable(one.labels for one in examples), _LABEL)
                for file, array in zip(files, (ids, ends, labels), strict=False):
                    file.write(array.tobytes())
                    digest.update(array.tobytes())
                counts[-1] += len(examples)
                end = int(ends[-1])
                yield len(examples)
    for name in names:
        sync(temporary / name)
    store = {
        "key": key.hexdigest(), "digest": digest.hexdigest(), "dtype": dtype.str, "tokens": end, "counts": counts,
        "labelled": labelled, "sources": [asdict(source) for source in sources], "read": asdict(summary),
    }  # fmt: skip
    write_text(temporary / "store.json", json.dumps(store, ensure_ascii=False))
    publish(temporary, folder)


class TokenStore:
    """The documents of several sources as token ids on disk, mapped into memory, source after source.

    Document d is tokens[offsets[d] : offsets[d + 1]]; `labels` are aligned with `tokens`. In running text they are the
    next tokens, so the last one of a document is only predicted. `counts` says how many documents each of `sources`
    has, `digest` names the contents. Raises ValueError if the folder holds no complete store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / "store.json").read_text(encoding="utf-8"))
            self.key, self.digest, self.counts = about["key"], about["digest"], about["counts"]
            self.sources = [TextSource(**source) for source in about["sources"]]
            self.summary = ReadSummary(**about["read"])
            self.summary.skipped = [SkippedRow(**row) for row in about["read"]["skipped"]]
            self.tokens = self._map("tokens.bin", np.dtype(about["dtype"]), about["tokens"])
            self.offsets = self._map("offsets.bin", np.dtype("<i8"), sum(self.counts) + 1)
            self.only_predicted = int(not about["labelled"])  # tokens at the end of each document
            self.labels = self.tokens[1:] if self.only_predicted else self._map("labels.bin", _LABEL, about["tokens"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"no complete token store ({error}); delete it, and the next run makes it again"
            raise ValueError(f"{self.folder}: {reason}") from None

    def _map(self, name: str, dtype: np.dtype, count: int) -> NDArray[Any]:
        file = self.folder / name
        return np.asarray(np.memmap(file, dtype, "r", shape=(count,))) if count else np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sizes(self) -> list[Numbers]:
        """The tokens that each document fills in rows, source by source."""
        sizes = np.maximum(np.diff(self.offsets) - self.only_predicted, 0)
        return np.split(sizes, np.cumsum(self.counts)[:-1]) if self.counts else []

    def parts(self) -> set[str]:
        """The parts of the mixture that hold any text."""
        return {source.part for source, sizes in zip(self.sources, self.sizes(), strict=True) if sizes.any()}

    def example(self, start: int, length: int) -> Example:
        """`length` tokens from `start` on, which belong to one document."""
        here = slice(start, start + length)
        return Example(self.tokens[here].tolist(), self.labels[here].tolist())


def discards_tokens(main: Callable[[Any], None]) -> Callable[[Any], None]:
    """Decorate a recipe: delete OUTPUT/tokens when it is finished, or when the start that made it ends by a mistake."""

    @functools.wraps(main)
    def wrapped(config: Any) -> None:
        tokens = Path(config.output) / "tokens"
        there = tokens.exists()
        try:
            main(config)
        except (ValueError, OSError):
            if not there:
                shutil.rmtree(tokens, ignore_errors=True)
            raise
        shutil.rmtree(tokens, ignore_errors=True)

    return wrapped


class PackedRows:
    """Documents of a store in rows of up to `row_length` tokens, packed best-fit by length and read when asked for.

    `order` numbers the documents; None takes all of them once. One longer than a row becomes several pieces. Takes tens
    of bytes of memory for each piece.
    """

    def __init__(self, store: TokenStore, order: Numbers | None, row_length: int) -> None:
        if row_length < 1:
            raise ValueError(f"row_length must be at least 1, found {row_length}")
        self.store, self.row_length = store, row_length
        order = np.arange(len(store)) if order is None else order
        begin = store.offsets[order]
        size = np.maximum(store.offsets[order + 1] - begin - store.only_predicted, 0)
        pieces = -(-size // row_length)
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of its document's pieces
        starts = np.repeat(begin, pieces) + nth * row_length
        lengths = np.minimum(np.repeat(size, pieces) - nth * row_length, row_length)
        members, self.rows = best_fit_arrays(lengths, row_length)
        self.starts, self.lengths = starts[members], lengths[members].astype("<i4")

    def __len__(self) -> int:
        return len(self.rows) - 1

    def row(self, number: int) -> list[Example]:
        """The documents of row `number`."""
        here = slice(*self.rows[number : number + 2])
        return [*map(self.store.example, self.starts[here].tolist(), self.lengths[here].tolist())]

    def batch(self, numbers: Sequence[int], row_ids: Sequence[int]) -> Batch:
        """The rows of these numbers, as `collate` joins them."""
        return collate([self.row(number) for number in numbers], row_ids)

    def describe(self) -> str:
        """How many rows there are, and the share of positions that hold a token."""
        return f"{len(self):,} rows of {self.row_length}, {self.utilization:.1%} used"

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


def packed_chats(
    settings: Any, chat: ChatFormat, run: Callable[[Iterator[int]], None], **files: Any
) -> list[PackedRows]:
    """The `PackedRows` of each list of conversations, whose token stores `run` makes in settings.output/tokens."""
    folder = Path(settings.output) / "tokens"
    run(write_chats(folder, "conversations", files, chat, settings))
    return [PackedRows(TokenStore(folder / name), None, settings.row_length) for name in files]


def _batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in lists of up to 1000, ended early by large ones: encoding takes 100 bytes a character."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if len(batch) == 1000 or total >= 2**18:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
