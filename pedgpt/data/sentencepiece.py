"""SentencePiece BPE models (`tokenizer.model`), read without protobuf and converted to `tokenizers`.

Format: google/sentencepiece's `sentencepiece_model.proto`. Behaviour: its `normalizer.cc`, `bpe_model.cc` and
`sentencepiece_processor.cc`. Where pieces share a score, `LeftmostMerges` corrects the ids of `tokenizers`; what cannot
be reproduced is refused. So equal text gives equal ids.
"""

import contextlib
import hashlib
import json
import math
import re
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, NormalizedString, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from pedgpt.data.leftmost import LeftmostMerges

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE_MODEL = 2  # of 1 unigram, 2 BPE, 3 word, 4 char
SPACE = "▁"
MAX_FILE_BYTES = 256 << 20  # published models hold some 10 MB
CONVERSION = 2  # part of the cache's file names: raise it whenever the conversion changes
MAX_RULE_BYTES = 512  # what one character may become; NFKC's longest takes 33
MAX_PIECE_LENGTH = 512  # the trainer's own limit; it keeps the search for merges linear in the file's size

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Schema = dict[int, tuple[str, int]]  # field number -> name, wire type
MODEL: Schema = {1: ("piece", BYTES), 2: ("trainer", BYTES), 3: ("normalizer", BYTES), 5: ("denormalizer", BYTES)}
PIECE: Schema = {1: ("piece", BYTES), 2: ("score", FIXED32), 3: ("type", VARINT)}
TRAINER: Schema = {
    3: ("model_type", VARINT), 24: ("treat_whitespace_as_suffix", VARINT), 35: ("byte_fallback", VARINT),
    41: ("bos_id", VARINT), 42: ("eos_id", VARINT), 43: ("pad_id", VARINT), 44: ("unk_surface", BYTES),
}  # fmt: skip
NORMALIZER: Schema = {
    2: ("charsmap", BYTES), 3: ("add_dummy_prefix", VARINT), 4: ("remove_extra_whitespaces", VARINT),
    5: ("escape_whitespaces", VARINT),
}  # fmt: skip


@dataclass(frozen=True)
class SentencePieceModel:
    """A `tokenizer.model`: pieces in the order of their ids, and the settings that ids and text depend on."""

    pieces: list[tuple[str, float, int]]  # piece, score, type
    model_type: int
    unk_id: int  # of the one piece of type UNKNOWN, as sentencepiece itself finds it
    bos_id: int  # -1: none, here and below
    eos_id: int
    pad_id: int
    unk_surface: str  # what an unknown piece decodes to
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes  # compiled character rules; empty for the identity
    unsupported: tuple[str, ...]  # settings that change ids or text, and that the conversion does not know


def read_sentencepiece(path: str | Path) -> SentencePieceModel:
    """Read a SentencePiece model of any type.

    Format: `sentencepiece_model.proto`, ModelProto {1 pieces, 2 trainer, 3 normalizer, 5 denormalizer}.
    Raises ValueError naming the file and what is wrong with it, OSError when it cannot be read.
    """
    return _parse(Path(path), _read(Path(path)))


def convert_sentencepiece(path: str | Path, cache: Path | None = None) -> tuple[Tokenizer, LeftmostMerges | None]:
    """Convert a SentencePiece BPE model to a tokenizer with the same ids, the pieces' positions in the file.

    Where several pieces share a score, the second result corrects the ids of the first; otherwise it is None.
    Merges: every split of a normal piece into two pieces, by the whole's score (descending), then the halves' ids.
    Control pieces become special tokens, which text never yields while `encode_special_tokens` is set (`to_str` drops
    it); user-defined pieces become added tokens. No bos or eos is added. With a character map the normalizer is
    Python code, and the tokenizer cannot be saved or pickled. Byte pieces that spell no valid text decode to U+FFFD
    for their whole run, where sentencepiece saves the characters before.
    With `cache`, a folder, the conversion is kept there for the next time, unless the model has a character map.
    Raises ValueError naming the file if it is damaged, not BPE, or not reproducible; OSError if it cannot be read.
    """
    path = Path(path)
    data = _read(path)
    kept = cache and cache / f"sentencepiece-{CONVERSION}-{hashlib.sha256(data).hexdigest()}.json"
    if kept and (known := _load_cached(kept)):
        return known
    model = _parse(path, data)
    try:
        tokenizer = _convert(model)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be converted: {error}") from None
    made = [score for piece, score, kind in model.pieces if kind == NORMAL and len(piece) > 1]
    scores = None
    if len(set(made)) < len(made):
        scores = [score if kind == NORMAL else None for _, score, kind in model.pieces]
    if kept and not model.charsmap:
        _save_cached(tokenizer, scores, kept)
    return tokenizer, _leftmost(tokenizer, scores)


def _leftmost(tokenizer: Tokenizer, scores: list[float | None] | None) -> LeftmostMerges | None:
    return LeftmostMerges([tokenizer.id_to_token(i) or "" for i in range(len(scores))], scores) if scores else None


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so not a SentencePiece model")
    return path.read_bytes()


def _parse(path: Path, data: bytes) -> SentencePieceModel:
    try:
        return _parse_model(data)
    except ValueError as error:
        raise ValueError(f"{path}: not a SentencePiece model, or a damaged one: {error}") from None


def _checksum(file: Path, text: bytes) -> bytes:
    """Of the content and the name, so that a file under another's name is not believed either."""
    return hashlib.sha256(file.name.encode() + text).hexdigest().encode()


def _load_cached(file: Path) -> tuple[Tokenizer, LeftmostMerges | None] | None:
    try:
        checksum, _, text = file.read_bytes().partition(b"\n")
        if checksum != _checksum(file, text):
            return None
        scores, _, state = text.partition(b"\n")
        tokenizer = Tokenizer.from_buffer(state)
    except Exception:  # absent, unreadable, or of another release of the library, which raises bare Exception
        return None
    tokenizer.encode_special_tokens = True
    return tokenizer, _leftmost(tokenizer, json.loads(scores))


def _save_cached(tokenizer: Tokenizer, scores: list[float | None] | None, file: Path) -> None:
    text = f"{json.dumps(scores)}\n{tokenizer.to_str()}".encode()
    with contextlib.suppress(OSError):  # a cache that cannot be written is no loss
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # several ranks may write at once
            (Path(folder) / file.name).write_bytes(_checksum(file, text) + b"\n" + text)
            (Path(folder) / file.name).replace(file)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends inside a number")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number is longer than 10 bytes")


def _fields(data: bytes, schema: Schema) -> Iterator[tuple[str, int, bytes]]:
    """(name, number, payload) of each field in the schema; the number is a VARINT's value or a payload's length."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        name, expected = schema.get(field, ("", wire))
        if wire != expected or wire not in (VARINT, FIXED64, BYTES, FIXED32):
            raise ValueError(f"field {field} {name} has wire type {wire}")
        number, size = 0, {FIXED64: 8, FIXED32: 4}.get(wire, 0)
        if wire in (VARINT, BYTES):
            number, at = _varint(data, at)
            size = number if wire == BYTES else 0
        if field == 0 or size > len(data) - at:
            raise ValueError(f"field {field} {name} claims {size} bytes where {len(data) - at} are left")
        if name:
            yield name, number, data[at : at + size]
        at += size


def _parse_model(data: bytes) -> SentencePieceModel:
    messages: dict[str, list[bytes]] = {name: [] for name, _ in MODEL.values()}
    for name, _, value in _fields(data, MODEL):
        messages[name].append(value)
    if not messages["piece"]:
        raise ValueError("it has no pieces" if data else "it is empty")
    pieces = []
    ids: dict[str, int] = {}
    for i, value in enumerate(messages["piece"]):
        try:
            pieces.append(_parse_piece(value))
        except ValueError as error:
            raise ValueError(f"piece {i}: {error}") from None
        if ids.setdefault(pieces[i][0], i) != i:
            raise ValueError(f"pieces {ids[pieces[i][0]]} and {i} are the same, {pieces[i][0]!r}")
    unknown = [i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"it has {len(unknown)} unknown pieces (type {UNKNOWN}), not one")

    numbers = {"model_type": 1, "bos_id": 1, "eos_id": 2, "pad_id": -1}  # the format's defaults
    numbers |= {"add_dummy_prefix": 1, "remove_extra_whitespaces": 1, "escape_whitespaces": 1}
    texts = {"unk_surface": " ⁇ ".encode()}
    for message, schema in (("trainer", TRAINER), ("normalizer", NORMALIZER)):
        for name, number, texts[name] in _fields(b"".join(messages[message]), schema):  # repeated messages merge
            numbers[name] = (number + (1 << 31)) % (1 << 32) - (1 << 31)  # an int32 of -1 is written as 2**64 - 1
    for name in ("bos_id", "eos_id", "pad_id"):
        if not -1 <= numbers[name] < len(pieces):
            raise ValueError(f"{name} is {numbers[name]}, but the last piece is {len(pieces) - 1}")
    back = [name for part in messages["denormalizer"] for name, _, value in _fields(part, NORMALIZER) if value]
    unsupported = {
        "treat_whitespace_as_suffix": numbers.get("treat_whitespace_as_suffix"),
        "escape_whitespaces = false": not numbers["escape_whitespaces"],
        "a denormalizer": "charsmap" in back,
        "a long unk_surface": len(texts["unk_surface"]) > MAX_RULE_BYTES,
        "unused pieces": any(kind == UNUSED for _, _, kind in pieces),
    }
    return SentencePieceModel(
        pieces=pieces,
        model_type=numbers["model_type"],
        unk_id=unknown[0],
        bos_id=numbers["bos_id"],
        eos_id=numbers["eos_id"],
        pad_id=numbers["pad_id"],
        unk_surface=texts["unk_surface"].decode(),
        byte_fallback=bool(numbers.get("byte_fallback")),
        add_dummy_prefix=bool(numbers["add_dummy_prefix"]),
        remove_extra_whitespaces=bool(numbers["remove_extra_whitespaces"]),
        charsmap=texts.get("charsmap", b""),
        unsupported=tuple(name for name, found in unsupported.items() if found),
    )


def _parse_piece(data: bytes) -> tuple[str, float, int]:
    piece, score, kind = b"", 0.0, NORMAL
    for name, number, value in _fields(data, PIECE):
        if name == "piece":
            piece = value
        elif name == "score":
            (score,) = struct.unpack("<f", value)
        else:
            kind = number
    if not piece or not NORMAL <= kind <= BYTE or not math.isfinite(score):
        raise ValueError(f"{piece!r} of type {kind} with score {score}")
    return piece.decode(), score, kind


def _convert(model: SentencePieceModel) -> Tokenizer:
    if model.model_type != BPE_MODEL:
        raise ValueError(f"it is of type {model.model_type} (1 unigram, 2 BPE, 3 word, 4 char), not BPE")
    if model.unsupported:
        raise ValueError(f"it has {', '.join(model.unsupported)}, which tokenizers cannot reproduce")
    byte_pieces = {piece for piece, _, kind in model.pieces if kind == BYTE}
    if byte_pieces != ({f"<0x{byte:02X}>" for byte in range(256)} if model.byte_fallback else set()):
        raise ValueError(f"it has {len(byte_pieces)} byte pieces and byte_fallback = {model.byte_fallback}")

    ids = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
    unk = model.pieces[model.unk_id][0]
    merges = _merges(model, ids)
    tokenizer = Tokenizer(BPE(ids, merges, unk_token=unk, fuse_unk=True, byte_fallback=model.byte_fallback))
    tokenizer.normalizer = normalizer = _normalizer(model)
    tokenizer.decoder = _decoder(model)
    added = []
    for piece, _, kind in model.pieces:
        if kind == USER_DEFINED and (model.charsmap or normalizer.normalize_str(piece) != piece):
            raise ValueError(
                f"user-defined piece {piece!r} meets a character map, a dummy prefix or spaces that change, and"
                " tokenizers cannot keep it as it is; use a tokenizer.json of this model"
            )
        if kind in (CONTROL, USER_DEFINED):
            added.append(AddedToken(piece, special=kind == CONTROL, normalized=kind == USER_DEFINED))
    tokenizer.add_tokens(added)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _merges(model: SentencePieceModel, ids: dict[str, int]) -> list[tuple[str, str]]:
    ranked = []
    for piece, score, kind in model.pieces:
        if kind != NORMAL or len(piece) == 1:
            continue
        if len(piece) > MAX_PIECE_LENGTH:
            raise ValueError(f"piece {ids[piece]} has {len(piece)} characters, more than {MAX_PIECE_LENGTH}")
        if lost := [char for char in piece if char not in ids]:
            raise ValueError(f"piece {piece!r} has {lost[0]!r}, which is not a piece, so no merges lead to it")
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(model: SentencePieceModel) -> normalizers.Sequence:
    """Normalizer::Normalize: characters, then spaces; remove_extra_whitespaces also drops a ▁ that ends the text."""
    chars = [normalizers.Normalizer.custom(_Charsmap(model.charsmap))] if model.charsmap else []
    prefix = [normalizers.Prepend(SPACE)] if model.add_dummy_prefix else []
    spaces = normalizers.Replace(" ", SPACE)
    if not model.remove_extra_whitespaces:
        return normalizers.Sequence([*prefix, *chars, spaces])  # the prefix stays when no character does
    strip, squeeze = normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")
    trail = normalizers.Replace(Regex(rf"{SPACE}+\z"), "")
    return normalizers.Sequence([*chars, strip, squeeze, *prefix, spaces, trail])


class _Charsmap:
    """Normalizer::NormalizePrefix: at each place the longest rule of a double array (darts-clone) of byte strings.

    `normalizers.Precompiled` reads the same bytes, but applies the shortest rule to whole grapheme clusters and so
    loses characters: the second accent of a decomposed ế, the line feed of a CR LF.
    """

    def __init__(self, blob: bytes) -> None:
        size = int.from_bytes(blob[:4], "little")
        if size % 4 or not 0 < size <= len(blob) - 4:
            raise ValueError(f"its character map claims {size} of {len(blob)} bytes")
        self.units = struct.unpack(f"<{size // 4}I", blob[4 : 4 + size])
        self.texts: dict[int, bytes] = {}  # what a rule writes, by its place behind the array
        place = 0
        for text in blob[4 + size :].split(b"\0"):
            if len(text) <= MAX_RULE_BYTES:
                self.texts[place] = text
            place += len(text) + 1
        for at, unit in enumerate(self.units):
            node = at ^ self._offset(unit)
            if not unit >> 31 and (
                node | 255 >= len(self.units) or unit & 256 and self.units[node] & 0x7FFFFFFF not in self.texts
            ):
                raise ValueError(f"its character map leads nowhere at unit {at}")

    @staticmethod
    def _offset(unit: int) -> int:
        return unit >> 10 << (unit >> 6 & 8)

    def normalize(self, normalized: NormalizedString) -> None:
        data, units = normalized.normalized.encode(), self.units
        out = bytearray()
        at = 0
        while at < len(data):
            text, end, node = data[at : at + 1], at + 1, self._offset(units[0])
            for stop in range(at, len(data)):
                unit = units[node ^ data[stop]]
                if unit & 0x800000FF != data[stop]:
                    break
                node ^= data[stop] ^ self._offset(unit)
                if unit & 256:  # a rule ends here
                    text, end = self.texts[units[node] & 0x7FFFFFFF], stop + 1
            out += text
            at = end
        normalized.clear()
        normalized.append(out.decode(errors="replace"))


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    """SentencePieceProcessor::Decode: unknown pieces become their surface, and the space of the dummy prefix goes."""
    unknown = decoders.Replace(Regex(rf"\A{re.escape(model.pieces[model.unk_id][0])}\z"), model.unk_surface)
    fuse: list[decoders.Decoder] = [decoders.ByteFallback()] if model.byte_fallback else []
    fuse.append(decoders.Fuse())
    spaces = decoders.Replace(SPACE, " ")
    if not (model.add_dummy_prefix or model.remove_extra_whitespaces):
        return decoders.Sequence([unknown, spaces, *fuse])
    leading = rf"\A{SPACE}+" if model.remove_extra_whitespaces else rf"\A{SPACE}"
    return decoders.Sequence([unknown, *fuse, decoders.Replace(Regex(leading), ""), spaces])
