"""SentencePiece's order of merges where pieces share a score: the leftmost first.

Behaviour: google/sentencepiece's `bpe_model.cc`.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import pairwise

MAX_KNOWN, MAX_KNOWN_CHUNK = 1 << 18, 64  # chunks whose ids are remembered, and the most ids of one
_NONE: set[str] = set()


class LeftmostMerges:
    """Corrects the ids that `tokenizers` gives with a vocabulary in which several pieces share a score.

    sentencepiece merges the pair of the highest score first and, among equal scores, the leftmost pair of the text. A
    BPE of `tokenizers` ranks its merges, so among equal scores it prefers one piece to another wherever they stand.
    A text can be cut between two characters that stand side by side in no piece, because no merge crosses such a
    place in either library. What lies between two cuts is a chunk, and its ids depend on nothing but itself: each
    chunk is merged once in sentencepiece's order, and its ids are remembered.

    NOTE: -0.0, the score of the first piece that was trained, equals 0.0, as for sentencepiece up to 0.2.1. Release
    0.2.3 puts it below 0.0, which matters where a user's piece of score 0 overlaps that one piece.
    """

    def __init__(self, names: Sequence[str], scores: Sequence[float | None]) -> None:
        """The piece and the score of every id; the score is None for an id that no merge makes or uses."""
        normal = [
            (i, name, score) for i, (name, score) in enumerate(zip(names, scores, strict=True)) if score is not None
        ]
        self.names = names
        self.ids = {name: i for i, name, _ in normal}
        self.made = {name: score for _, name, score in normal if len(name) > 1}
        count = Counter(self.made.values())
        self.tied = {name: score for name, score in self.made.items() if count[score] > 1}
        inside: dict[str, set[str]] = defaultdict(set)  # the characters that follow this one in some piece
        for name in self.made:
            for one, next_one in pairwise(name):
                inside[one].add(next_one)
        # By id: a piece's first character, and those that follow its last one in some piece. An id that no merge makes
        # or uses has neither, so that there is a cut beside it.
        self.first, self.follow = [""] * len(names), [_NONE] * len(names)
        for i, name, _ in normal:
            self.first[i], self.follow[i] = sys.intern(name[0]), inside[name[-1]]
        self.known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def correct(self, ids: list[int]) -> list[int]:
        """sentencepiece's ids of the text for which `tokenizers` gives `ids`."""
        first, follow, known, whole = self.first, self.follow, self.known, tuple(ids)
        cuts = [n for n, (a, b) in enumerate(pairwise(ids), start=1) if first[b] not in follow[a]]
        found: list[int] = []
        for start, end in pairwise([0, *cuts, len(ids)]):
            chunk = whole[start:end]
            found += known.get(chunk) or self._merge(chunk)
        return found

    def keep(self, ids: Iterable[int]) -> None:
        """Merge nothing across these ids: they are added tokens, which `tokenizers` finds before any merge."""
        for i in ids:
            missing = i + 1 - len(self.first)
            self.first += [""] * missing
            self.follow += [_NONE] * missing
            self.first[i], self.follow[i] = "", _NONE

    def _merge(self, chunk: tuple[int, ...]) -> tuple[int, ...]:
        merged = chunk
        if chunk and self.first[chunk[0]]:  # an id that no merge uses is a chunk of its own
            text = "".join([self.names[i] for i in chunk])
            merged = chunk if self._is_untied(text) else self._merge_leftmost(text)
        if len(chunk) <= MAX_KNOWN_CHUNK:
            if len(self.known) >= MAX_KNOWN:
                self.known.clear()
            self.known[chunk] = merged
        return merged

    def _is_untied(self, text: str) -> bool:
        """Whether a text is short and no two pieces in it share a score, so that `tokenizers` is right."""
        size = len(text)
        if size > 16:  # looking up every part of it would take longer than merging
            return False
        parts = [text[start:end] for start in range(size) for end in range(start + 2, size + 1)]
        scores = [self.tied[part] for part in parts if part in self.tied]
        return len(set(scores)) == len(scores)

    def _merge_leftmost(self, text: str) -> tuple[int, ...]:
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
