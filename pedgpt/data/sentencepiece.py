"""SentencePiece BPE models (`tokenizer.model`), read without protobuf and converted to `tokenizers`.

Format: google/sentencepiece's `sentencepiece_model.proto`. Behaviour: its `normalizer.cc`, `bpe_model.cc` and
`sentencepiece_processor.cc`. Where pieces share a score, `LeftmostMerges` corrects the ids of `tokenizers`; what cannot
be reproduced is refused. So equal text gives equal ids.
"""

import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, NormalizedString, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE_MODEL = 2  # of 1 unigram, 2 BPE, 3 word, 4 char
SPACE = "▁"
MAX_RULE_BYTES = 512  # what one character may become; NFKC's longest takes 33
MAX_PIECE_LENGTH = 512  # the trainer's own limit; it keeps the search for merges linear in the file's size

# The fields of each message that ids and text depend on: number, name and default.
Schema = dict[int, tuple[str, Any]]
MODEL: Schema = {1: ("piece", b""), 2: ("trainer", b""), 3: ("normalizer", b""), 5: ("denormalizer", b"")}
PIECE: Schema = {1: ("piece", b""), 2: ("score", 0.0), 3: ("type", NORMAL)}
TRAINER: Schema = {
    3: ("model_type", 1), 24: ("treat_whitespace_as_suffix", 0), 35: ("byte_fallback", 0),
    44: ("unk_surface", " ⁇ ".encode()),
}  # fmt: skip
NORMALIZER: Schema = {
    2: ("charsmap", b""), 3: ("add_dummy_prefix", 1), 4: ("remove_extra_whitespaces", 1), 5: ("escape_whitespaces", 1),
}  # fmt: skip
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
WIRE_TYPES = {int: VARINT, bytes: BYTES, float: FIXED32}


class SentencePieceModel(NamedTuple):
    """A `tokenizer.model`: pieces (text, score, type) in the order of their ids, and the settings of the schemas."""

    pieces: list[tuple[str, float, int]]
    settings: dict[str, Any]


def convert_sentencepiece(path: str | Path) -> tuple[Tokenizer, list[float | None] | None]:
    """Convert a SentencePiece BPE model to a tokenizer with the same ids, the pieces' positions in the file.

    Where several pieces share a score, the second result holds the score of each id, None if no merge makes or uses it,
    from which `LeftmostMerges` corrects the ids of the first; otherwise it is None.
    Merges: every split of a normal piece into two pieces, by the whole's score (descending), then the halves' ids.
    Control pieces become special tokens, which text never yields while `encode_special_tokens` is set (`to_str` drops
    it); user-defined pieces become added tokens. No bos or eos is added. With a character map the normalizer is
    Python code, and the tokenizer cannot be saved or pickled. Byte pieces that spell no valid text decode to U+FFFD
    for their whole run, where sentencepiece saves the characters before.
    Raises ValueError naming the file if it is damaged, not BPE, or not reproducible; OSError if it cannot be read.
    """
    try:
        model = parse_sentencepiece(Path(path).read_bytes())
        tokenizer = _convert(model)
    except ValueError as error:
        raise ValueError(f"{path}: a damaged SentencePiece model, or one that cannot be converted: {error}") from None
    made = [score for piece, score, kind in model.pieces if kind == NORMAL and len(piece) > 1]
    tied = len(set(made)) < len(made)
    return tokenizer, [score if kind == NORMAL else None for _, score, kind in model.pieces] if tied else None


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """Read a model of any type: ModelProto {1 pieces, 2 trainer, 3 normalizer, 5 denormalizer}.

    Raises ValueError saying what is wrong with it.
    """
    messages = defaultdict(list)
    for name, value in _fields(data, MODEL):
        messages[name].append(value)
    if not messages["piece"]:
        raise ValueError("it has no pieces" if data else "it is empty")
    ids: dict[str, int] = {}
    pieces = []
    for i, value in enumerate(messages["piece"]):
        try:
            piece, score, kind = _message([value], PIECE).values()
            pieces.append((piece.decode(), score, kind))
        except ValueError as error:
            raise ValueError(f"piece {i}: {error}") from None
        if not piece or not NORMAL <= kind <= BYTE or not math.isfinite(score):
            raise ValueError(f"piece {i}: {piece!r} of type {kind} with score {score}")
        if ids.setdefault(pieces[i][0], i) != i:
            raise ValueError(f"pieces {ids[pieces[i][0]]} and {i} are the same, {pieces[i][0]!r}")
    settings = _message(messages["trainer"], TRAINER) | _message(messages["normalizer"], NORMALIZER)
    settings["denormalizer"] = _message(messages["denormalizer"], NORMALIZER)["charsmap"]
    return SentencePieceModel(pieces, settings)


def _message(parts: list[bytes], schema: Schema) -> dict[str, Any]:
    """A message's fields or their defaults, in the schema's order; a message that occurs several times is merged."""
    return dict(schema.values()) | dict(_fields(b"".join(parts), schema))


def _fields(data: bytes, schema: Schema) -> Iterator[tuple[str, Any]]:
    """Name and value of each field in the schema, in the file's order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        name, default = schema.get(field, ("", None))
        if field == 0 or wire not in (VARINT, FIXED64, BYTES, FIXED32) or (name and wire != WIRE_TYPES[type(default)]):
            raise ValueError(f"field {field} {name} has wire type {wire}")
        size = {FIXED64: 8, FIXED32: 4}.get(wire, 0)
        if wire in (VARINT, BYTES):
            value, at = _varint(data, at)
            size = value if wire == BYTES else 0
        if size > len(data) - at:
            raise ValueError(f"field {field} {name} claims {size} bytes where {len(data) - at} are left")
        if name:
            content = data[at : at + size]
            yield name, value if wire == VARINT else content if wire == BYTES else struct.unpack("<f", content)[0]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number is longer than 10 bytes" if shift == 70 else "it ends inside a number")


def _convert(model: SentencePieceModel) -> Tokenizer:
    pieces, settings = model
    unknown = [piece for piece, _, kind in pieces if kind == UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"it has {len(unknown)} unknown pieces (type {UNKNOWN}), not one")
    if settings["model_type"] != BPE_MODEL:
        raise ValueError(f"it is of type {settings['model_type']} (1 unigram, 2 BPE, 3 word, 4 char), not BPE")
    unsupported = {
        "treat_whitespace_as_suffix": settings["treat_whitespace_as_suffix"],
        "escape_whitespaces = false": not settings["escape_whitespaces"],
        "a denormalizer": settings["denormalizer"],
        "a long unk_surface": len(settings["unk_surface"]) > MAX_RULE_BYTES,
        "unused pieces": any(kind == UNUSED for _, _, kind in pieces),
    }
    if any(unsupported.values()):
        found = ", ".join(name for name, is_there in unsupported.items() if is_there)
        raise ValueError(f"it has {found}, which tokenizers cannot reproduce")
    byte_fallback = bool(settings["byte_fallback"])
    byte_pieces = {piece for piece, _, kind in pieces if kind == BYTE}
    if byte_pieces != ({f"<0x{byte:02X}>" for byte in range(256)} if byte_fallback else set()):
        raise ValueError(f"it has {len(byte_pieces)} byte pieces and byte_fallback = {byte_fallback}")

    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    bpe = BPE(ids, _merges(pieces, ids), unk_token=unknown[0], fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizer = _normalizer(settings)
    tokenizer.decoder = _decoder(settings, unknown[0])
    added = []
    for piece, _, kind in pieces:
        if kind == USER_DEFINED and (settings["charsmap"] or normalizer.normalize_str(piece) != piece):
            raise ValueError(
                f"user-defined piece {piece!r} meets a character map, a dummy prefix or spaces that change, and"
                " tokenizers cannot keep it as it is; use a tokenizer.json of this model"
            )
        if kind in (CONTROL, USER_DEFINED):
            added.append(AddedToken(piece, special=kind == CONTROL, normalized=kind == USER_DEFINED))
    tokenizer.add_tokens(added)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _merges(pieces: list[tuple[str, float, int]], ids: dict[str, int]) -> list[tuple[str, str]]:
    ranked = []
    for piece, score, kind in pieces:
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


def _normalizer(settings: dict[str, Any]) -> normalizers.Sequence:
    """Normalizer::Normalize: characters, then spaces; remove_extra_whitespaces also drops a ▁ that ends the text."""
    charsmap = settings["charsmap"]
    chars = [normalizers.Normalizer.custom(_CharacterMap(charsmap))] if charsmap else []
    prefix = [normalizers.Prepend(SPACE)] if settings["add_dummy_prefix"] else []
    spaces = normalizers.Replace(" ", SPACE)
    if not settings["remove_extra_whitespaces"]:
        return normalizers.Sequence([*prefix, *chars, spaces])  # the prefix stays when no character does
    strip, squeeze = normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")
    trail = normalizers.Replace(Regex(rf"{SPACE}+\z"), "")
    return normalizers.Sequence([*chars, strip, squeeze, *prefix, spaces, trail])


class _CharacterMap:
    """Normalizer::NormalizePrefix: at each place the longest rule of a double array (darts-clone) of byte strings.

    `normalizers.Precompiled` reads the same bytes, but applies the shortest rule to whole grapheme clusters and so
    loses characters: the second accent of a decomposed ế, the line feed of a CR LF.
    """

    def __init__(self, blob: bytes) -> None:
        size = int.from_bytes(blob[:4], "little")
        if size % 4 or not 0 < size <= len(blob) - 4:
            raise ValueError(f"its character map claims {size} of {len(blob)} bytes")
        self.units, self.texts = struct.unpack(f"<{size // 4}I", blob[4 : 4 + size]), blob[4 + size :]
        for at, unit in enumerate(self.units):
            if not unit >> 31 and (at ^ self._offset(unit)) | 255 >= len(self.units):
                raise ValueError(f"its character map leads nowhere at unit {at}")
        if max(map(len, self.texts.split(b"\0"))) > MAX_RULE_BYTES:
            raise ValueError(f"its character map makes more than {MAX_RULE_BYTES} bytes of one character")

    @staticmethod
    def _offset(unit: int) -> int:
        return unit >> 10 << (unit >> 6 & 8)

    def normalize(self, normalized: NormalizedString) -> None:
        data, units, texts = normalized.normalized.encode(), self.units, self.texts
        out = bytearray()
        at = 0
        while at < len(data):
            text, end, node = data[at : at + 1], at + 1, self._offset(units[0])
            for stop in range(at, len(data)):
                unit = units[node ^ data[stop]]
                if unit & 0x800000FF != data[stop]:
                    break
                node ^= data[stop] ^ self._offset(unit)
                if unit & 256:  # a rule ends here; its text stands behind the array
                    start, end = units[node] & 0x7FFFFFFF, stop + 1
                    text = texts[start : texts.find(b"\0", start)]
            out += text
            at = end
        normalized.clear()
        normalized.append(out.decode(errors="replace"))


def _decoder(settings: dict[str, Any], unknown: str) -> decoders.Decoder:
    """SentencePieceProcessor::Decode: unknown pieces become their surface, and the space of the dummy prefix goes."""
    surface = decoders.Replace(Regex(rf"\A{re.escape(unknown)}\z"), settings["unk_surface"].decode())
    fuse: list[decoders.Decoder] = [decoders.ByteFallback()] if settings["byte_fallback"] else []
    fuse.append(decoders.Fuse())
    spaces = decoders.Replace(SPACE, " ")
    if not (settings["add_dummy_prefix"] or settings["remove_extra_whitespaces"]):
        return decoders.Sequence([surface, spaces, *fuse])
    leading = rf"\A{SPACE}+" if settings["remove_extra_whitespaces"] else rf"\A{SPACE}"
    return decoders.Sequence([surface, *fuse, decoders.Replace(Regex(leading), ""), spaces])
