"""SentencePiece BPE models (`tokenizer.model`), read without protobuf and converted to `tokenizers`.

Format: google/sentencepiece's `sentencepiece_model.proto`. Behaviour: its `normalizer.cc`, `bpe_model.cc` and
`sentencepiece_processor.cc`. Where pieces share a score, `LeftmostMerges` corrects the ids of `tokenizers`; what cannot
be reproduced is refused. So equal text gives equal ids.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE, UNKNOWN_TEXT = "▁", " ⁇ "
MAX_KNOWN, MAX_KNOWN_CHUNK = 1 << 18, 64  # chunks whose ids are remembered, and the most ids of one

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
    (3, 4): ("remove_extra_whitespaces", 1, None),
    (3, 5): ("escape_whitespaces", 1, 1),
    (5, 2): ("denormalizer", b"", b""),
}
SIZES = {1: 8, 5: 4}  # bytes of a value by its wire type; 0 is a varint, and 2 begins with its size


def convert_sentencepiece(path: str | Path) -> tuple[Tokenizer, list[float | None] | None]:
    """Convert a SentencePiece BPE model to a tokenizer with the same ids, the pieces' positions in the file.

    Where several pieces share a score, the second result holds the score of each id, None if no merge makes or uses it,
    from which `LeftmostMerges` corrects the ids of the first; otherwise it is None.
    Merges: every split of a normal piece into two pieces, by the whole's score (descending), then the halves' ids.
    Control pieces become special tokens, which text never yields while `encode_special_tokens` is set (`to_str` drops
    it); user-defined pieces become added tokens. Byte pieces that spell no valid text decode to U+FFFD for their whole
    run, where sentencepiece saves the characters before.
    Raises ValueError for what is not reproducible, and any exception for a damaged file.
    """
    pieces, settings = parse_sentencepiece(Path(path).read_bytes())
    for name, _, wanted in SETTINGS.values():
        if wanted not in (None, settings[name]):
            raise ValueError(f"its {name} is {settings[name]!r:.40}, and only {wanted!r} can be converted")
    [unknown] = [piece for piece, _, kind in pieces if kind == UNKNOWN]
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    names = ("byte_fallback", "add_dummy_prefix", "remove_extra_whitespaces")
    fallback, prefix, squeeze = (bool(settings[name]) for name in names)
    tokenizer = Tokenizer(BPE(ids, _merges(pieces, ids), unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    strip = [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")] * squeeze
    trail = [normalizers.Replace(Regex(rf"{SPACE}+\z"), "")] * squeeze  # also a ▁ of the text itself
    spaces = [normalizers.Prepend(SPACE)] * prefix + [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizer = normalizers.Sequence([*strip, *spaces, *trail])
    # Unknown pieces become their text; the space of the prefix is taken off before a ▁ becomes a space.
    surface = decoders.Replace(Regex(rf"\A{re.escape(unknown)}\z"), UNKNOWN_TEXT)
    leading = [decoders.Replace(Regex(rf"\A{SPACE}" + "+" * squeeze), "")] * (prefix or squeeze)
    steps = [surface, *[decoders.ByteFallback()] * fallback, decoders.Fuse(), *leading, decoders.Replace(SPACE, " ")]
    tokenizer.decoder = decoders.Sequence(steps)
    added = []
    for piece, _, kind in pieces:
        if kind == UNUSED or (kind == USER_DEFINED and normalizer.normalize_str(piece) != piece):
            raise ValueError(
                f"its piece {piece!r} of type {kind} cannot be kept as it is; use a tokenizer.json instead"
            )
        if kind in (CONTROL, USER_DEFINED):
            added.append(AddedToken(piece, special=kind == CONTROL, normalized=kind == USER_DEFINED))
    tokenizer.add_tokens(added)
    tokenizer.encode_special_tokens = True
    made = [score for piece, score, kind in pieces if kind == NORMAL and len(piece) > 1]
    tied = len(set(made)) < len(made)
    return tokenizer, [score if kind == NORMAL else None for _, score, kind in pieces] if tied else None


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
        names = [backend.id_to_token(i) or "" for i in range(max(backend.get_vocab().values()) + 1)]
        self.ids = {names[i]: i for i, score in enumerate(scores) if score is not None}
        self.scores = {name: scores[i] for name, i in self.ids.items() if len(name) > 1}
        self.inside = {one + following for name in self.scores for one, following in pairwise(name)}
        # By id; "" for an id that no merge makes or uses, so that there is a cut beside it.
        added = {token.content for token in backend.get_added_tokens_decoder().values() if not token.special}
        self.names = [name if name in self.ids and name not in added else "" for name in names]
        self.first, self.last = ([name[at] for name in self.names] for at in (slice(1), slice(-1, None)))
        self.known = lru_cache(MAX_KNOWN)(self._merge)

    def correct(self, ids: list[int]) -> list[int]:
        """sentencepiece's ids of the text for which `backend` gives `ids`."""
        first, last, inside, known, whole = self.first, self.last, self.inside, self.known, tuple(ids)
        cuts = [n for n, (a, b) in enumerate(pairwise(ids), start=1) if last[a] + first[b] not in inside]
        found: list[int] = []
        for start, end in pairwise([0, *cuts, len(ids)]):
            found += known(whole[start:end]) if end - start <= MAX_KNOWN_CHUNK else self._merge(whole[start:end])
        return found

    def _merge(self, chunk: tuple[int, ...]) -> tuple[int, ...]:
        if len(chunk) < 2 and not (chunk and self.names[chunk[0]]):  # nothing, or an id that no merge uses
            return chunk
        text = "".join([self.names[i] for i in chunk])
        ends = {at: at + 1 for at in range(len(text))}  # where the symbol that begins here ends, and the reverse
        starts = {end: at for at, end in ends.items()}
        candidates: list[tuple[float, int, int]] = []

        def propose(start: int, end: int) -> None:
            if (score := self.scores.get(text[start:end])) is not None:
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
