"""SentencePiece BPE models (`tokenizer.model`), read without protobuf and converted to `tokenizers`.

Format: google/sentencepiece's `sentencepiece_model.proto`. Behaviour: its `normalizer.cc`, `bpe_model.cc` and
`sentencepiece_processor.cc`. Where pieces share a score, `LeftmostMerges` corrects the ids of `tokenizers`; what cannot
be reproduced is refused. So equal text gives equal ids.
"""

import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, NormalizedString, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE_MODEL = 2  # of 1 unigram, 2 BPE, 3 word, 4 char
SPACE = "▁"
MAX_RULE_BYTES = 512  # what one character may become; NFKC's longest takes 33
MAX_PIECE_LENGTH = 512  # the trainer's own limit; it keeps the search for merges linear in the file's size
MAX_KNOWN, MAX_KNOWN_CHUNK = 1 << 18, 64  # chunks whose ids are remembered, and the most ids of one

# The fields of each message that ids and text depend on: number, name and default.
Schema = dict[int, tuple[str, Any]]
Piece = tuple[str, float, int]  # text, score and type
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


def convert_sentencepiece(path: str | Path) -> tuple[Tokenizer, list[float | None] | None]:
    """Convert a SentencePiece BPE model to a tokenizer with the same ids, the pieces' positions in the file.

    Where several pieces share a score, the second result holds the score of each id, None if no merge makes or uses it,
    from which `LeftmostMerges` corrects the ids of the first; otherwise it is None.
    Merges: every split of a normal piece into two pieces, by the whole's score (descending), then the halves' ids.
    Control pieces become special tokens, which text never yields while `encode_special_tokens` is set (`to_str` drops
    it); user-defined pieces become added tokens. With a character map the normalizer is Python code, and the tokenizer
    cannot be saved or pickled. Byte pieces that spell no valid text decode to U+FFFD for their whole run, where
    sentencepiece saves the characters before.
    Raises ValueError naming the file if it is damaged, not BPE, or not reproducible.
    """
    try:
        pieces, settings = parse_sentencepiece(Path(path).read_bytes())
        tokenizer = _convert(pieces, settings)
    except ValueError as error:
        raise ValueError(f"{path}: a damaged SentencePiece model, or one that cannot be converted: {error}") from None
    made = [score for piece, score, kind in pieces if kind == NORMAL and len(piece) > 1]
    tied = len(set(made)) < len(made)
    return tokenizer, [score if kind == NORMAL else None for _, score, kind in pieces] if tied else None


def parse_sentencepiece(data: bytes) -> tuple[list[Piece], dict[str, Any]]:
    """The pieces of a model of any type, in the order of their ids, and the settings of the schemas above."""
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
    return pieces, settings


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


def _convert(pieces: list[Piece], settings: dict[str, Any]) -> Tokenizer:
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
    if found := [name for name, is_there in unsupported.items() if is_there]:
        raise ValueError(f"it has {', '.join(found)}, which tokenizers cannot reproduce")
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


def _merges(pieces: list[Piece], ids: dict[str, int]) -> list[tuple[str, str]]:
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


class LeftmostMerges:
    """Corrects the ids that `backend` gives with a vocabulary in which several pieces share a score.

    sentencepiece merges the pair of the highest score first and, among equal scores, the leftmost pair of the text. A
    BPE of `tokenizers` ranks its merges, so among equal scores it prefers one piece to another wherever they stand.
    A text can be cut between two characters that stand side by side in no piece, because no merge crosses such a
    place in either library. What lies between two cuts is a chunk, and its ids depend on nothing but itself: each
    chunk is merged once in sentencepiece's order, and its ids are remembered. `scores` holds the score of every id,
    None for an id that no merge makes or uses. Added tokens are found before any merge, so nothing crosses them.

    NOTE: -0.0, the score of the first piece that was trained, equals 0.0, as for sentencepiece up to 0.2.1. Release
    0.2.3 puts it below 0.0, which matters where a user's piece of score 0 overlaps that one piece.
    """

    def __init__(self, backend: Tokenizer, scores: Sequence[float | None]) -> None:
        size = max(backend.get_vocab().values()) + 1
        self.names = [backend.id_to_token(i) or "" for i in range(size)]
        normal = {self.names[i]: score for i, score in enumerate(scores) if score is not None}
        self.ids = {name: i for i, name in enumerate(self.names) if name in normal}
        self.made = {name: score for name, score in normal.items() if len(name) > 1}
        count = Counter(self.made.values())
        self.tied = {name: score for name, score in self.made.items() if count[score] > 1}
        inside: dict[str, set[str]] = defaultdict(set)  # the characters that follow this one in some piece
        for name in self.made:
            for one, next_one in pairwise(name):
                inside[one].add(next_one)
        # By id: a piece's first character, and those that follow its last one in some piece. An id that no merge makes
        # or uses has neither, so that there is a cut beside it.
        added = {token.content for token in backend.get_added_tokens_decoder().values() if not token.special}
        merged = [name if name in normal and name not in added else "" for name in self.names]
        self.first = [name[:1] for name in merged]
        self.follow = [inside[name[-1]] if name else set() for name in merged]
        self.known = lru_cache(MAX_KNOWN)(self._merge)

    def correct(self, ids: list[int]) -> list[int]:
        """sentencepiece's ids of the text for which `backend` gives `ids`."""
        first, follow, known, whole = self.first, self.follow, self.known, tuple(ids)
        cuts = [n for n, (a, b) in enumerate(pairwise(ids), start=1) if first[b] not in follow[a]]
        found: list[int] = []
        for start, end in pairwise([0, *cuts, len(ids)]):
            found += known(whole[start:end]) if end - start <= MAX_KNOWN_CHUNK else self._merge(whole[start:end])
        return found

    def _merge(self, chunk: tuple[int, ...]) -> tuple[int, ...]:
        if not chunk or not self.first[chunk[0]]:  # an id that no merge uses is a chunk of its own
            return chunk
        text = "".join([self.names[i] for i in chunk])
        if len(text) <= 16:  # in a longer one, looking up every part would take longer than merging
            parts = [text[start:end] for start, end in combinations(range(len(text) + 1), 2)]
            scores = [self.tied[part] for part in parts if part in self.tied]
            if len(set(scores)) == len(scores):  # no two pieces in it share a score, so `tokenizers` is right
                return chunk
        ends = {at: at + 1 for at in range(len(text))}  # where the symbol that begins here ends, and the reverse
        starts = {end: at for at, end in ends.items()}
        candidates: list[tuple[float, int, int]] = []

        def propose(start: int, end: int) -> None:
            if (score := self.made.get(text[start:end])) is not None:
                heappush(candidates, (-score, start, end))

        for at in range(len(text) - 1):
            propose(at, at + 2)
        while candidates:
            _, start, end = heappop(candidates)
            middle = ends.get(start, end)
            if ends.get(middle) != end:
                continue  # one of the two symbols has gone into another piece since
            del ends[middle], starts[middle]
            ends[start], starts[end] = end, start
            if start in starts:
                propose(starts[start], end)
            if end in ends:
                propose(start, ends[end])
        return tuple(self.ids[text[start:end]] for start, end in ends.items())

    def overlaps(self) -> Iterator[str]:
        """The texts in which two pieces of equal score overlap, so that one of them cannot be made."""
        begins = defaultdict(list)
        for piece, score in self.tied.items():
            for n in range(1, len(piece)):
                begins[score, piece[:n]].append(piece)
        for piece, score in self.tied.items():
            for n in range(1, len(piece)):
                yield from (piece + other[n:] for other in begins.get((score, piece[-n:]), ()) if other != piece)
