"""SentencePiece BPE models (`tokenizer.model`), read without protobuf and converted to `tokenizers`.

Format: google/sentencepiece's `sentencepiece_model.proto`. Behaviour: its `normalizer.cc`, `bpe_model.cc` and
`sentencepiece_processor.cc`. What cannot be reproduced is refused, so equal text gives equal ids.
"""

import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE, UNKNOWN_TEXT = "▁", " ⁇ "

Piece = tuple[str, float, int]  # text, score and type
# The settings that ids and text depend on, by message (trainer, normalizer, denormalizer) and field: name, default, and
# what can be converted, a BPE (1 is unigram, 3 word, 4 char) that takes characters as they are; None is any.
SETTINGS: dict[tuple[int, int], tuple[str, Any, Any]] = {
    (2, 3): ("model_type", 1, 2),
    (2, 24): ("treat_whitespace_as_suffix", 0, 0),
    (2, 35): ("byte_fallback", 0, None),
    (2, 44): ("unk_surface", UNKNOWN_TEXT.encode(), UNKNOWN_TEXT.encode()),
    (3, 2): ("charsmap", b"", b""),
    (3, 3): ("add_dummy_prefix", 1, None),
    (3, 4): ("remove_extra_whitespaces", 1, 0),
    (3, 5): ("escape_whitespaces", 1, 1),
    (5, 2): ("denormalizer", b"", b""),
}
SIZES = {1: 8, 5: 4}  # bytes of a value by its wire type; 0 is a varint, and 2 begins with its size


def convert_sentencepiece(path: str | Path) -> Tokenizer:
    """Convert a SentencePiece BPE model to a tokenizer with the same ids, the pieces' positions in the file.

    Merges: every split of a normal piece into two pieces, by the whole's score (descending), then the halves' ids.
    Control pieces become special tokens, which text never yields while `encode_special_tokens` is set (`to_str` drops
    it); user-defined pieces become added tokens. Byte pieces that spell no valid text decode to U+FFFD for their whole
    run, where sentencepiece saves the characters before.
    Raises ValueError for what is not reproducible, and any exception for a damaged file.

    NOTE: where two pieces of one score overlap in a text, sentencepiece makes the left one, and this tokenizer one of
    them wherever they stand. Baichuan2's file has 428 such pairs, and a test shows that they give equal ids.
    """
    pieces, settings = parse_sentencepiece(Path(path).read_bytes())
    for name, _, wanted in SETTINGS.values():
        if wanted not in (None, settings[name]):
            raise ValueError(f"its {name} is {settings[name]!r:.40}, and only {wanted!r} can be converted")
    shared = Counter(score for piece, score, kind in pieces if kind == NORMAL and len(piece) > 1)
    if (most := max(shared.values(), default=0)) > 2:
        raise ValueError(
            f"{most} of its pieces share a score, as in an extended vocabulary: of those that overlap, the left one"
            " counts, which tokenizers cannot reproduce; use a tokenizer.json of it"
        )
    [unknown] = [piece for piece, _, kind in pieces if kind == UNKNOWN]
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    fallback, prefix = bool(settings["byte_fallback"]), bool(settings["add_dummy_prefix"])
    tokenizer = Tokenizer(BPE(ids, _merges(pieces, ids), unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    spaces = [normalizers.Prepend(SPACE)] * prefix + [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizer = normalizers.Sequence(spaces)
    # Unknown pieces become their text; the space of the prefix is taken off before a ▁ becomes a space.
    surface = decoders.Replace(Regex(rf"\A{re.escape(unknown)}\z"), UNKNOWN_TEXT)
    leading = [decoders.Replace(Regex(rf"\A{SPACE}"), "")] * prefix
    steps = [surface, *[decoders.ByteFallback()] * fallback, decoders.Fuse(), *leading, decoders.Replace(SPACE, " ")]
    tokenizer.decoder = decoders.Sequence(steps)
    added = []
    for piece, _, kind in pieces:
        if kind == UNUSED or (kind == USER_DEFINED and normalizer.normalize_str(piece) != piece):
            raise ValueError(f"its piece {piece!r} of type {kind} cannot be kept; use a tokenizer.json instead")
        if kind in (CONTROL, USER_DEFINED):
            added.append(AddedToken(piece, special=kind == CONTROL, normalized=kind == USER_DEFINED))
    tokenizer.add_tokens(added)
    tokenizer.encode_special_tokens = True
    return tokenizer


def parse_sentencepiece(data: bytes) -> tuple[list[Piece], dict[str, Any]]:
    """The pieces of a model of any type, in the order of their ids, and its settings."""
    pieces: list[Piece] = []
    settings = {name: default for name, default, _ in SETTINGS.values()}
    for message, content in _fields(data):
        if message == 1:
            piece: dict[int, Any] = {1: b"", 2: bytes(4), 3: NORMAL} | dict(_fields(content))
            pieces.append((piece[1].decode(), *struct.unpack("<f", piece[2]), piece[3]))
        elif message in (2, 3, 5):
            found = {SETTINGS[message, field][0]: v for field, v in _fields(content) if (message, field) in SETTINGS}
            settings |= found
    return pieces, settings


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value, an integer or bytes, of each field of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if key & 7 == 2 else (SIZES[key & 7], at)
        if size > len(data) - at:
            raise ValueError(f"a field claims {size} bytes where {len(data) - at} are left")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def _merges(pieces: list[Piece], ids: dict[str, int]) -> list[tuple[str, str]]:
    ranked = []
    for piece, score, kind in pieces:
        if kind != NORMAL or len(piece) == 1:
            continue
        if lost := [char for char in piece if char not in ids]:
            raise ValueError(f"its piece {piece!r} has {lost[0]!r}, which is not a piece, so no merges lead to it")
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
