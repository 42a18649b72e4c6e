"""SentencePiece's order of merges where pieces share a score: the leftmost first.

Behaviour: google/sentencepiece's `bpe_model.cc`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import combinations, pairwise

import tokenizers

MAX_KNOWN, MAX_KNOWN_CHUNK = 1 << 18, 64  # chunks whose ids are remembered, and the most ids of one
_NONE: set[str] = set()


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

    def __init__(self, backend: tokenizers.Tokenizer, scores: Sequence[float | None]) -> None:
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
        self.follow = [inside[name[-1]] if name else _NONE for name in merged]
        self.known = lru_cache(MAX_KNOWN)(self._merge)

    def correct(self, ids: list[int]) -> list[int]:
        """sentencepiece's ids of the text for which `backend` gives `ids`."""
        first, follow, whole = self.first, self.follow, tuple(ids)
        cuts = [n for n, (a, b) in enumerate(pairwise(ids), start=1) if first[b] not in follow[a]]
        found: list[int] = []
        for start, end in pairwise([0, *cuts, len(ids)]):
            merge = self.known if end - start <= MAX_KNOWN_CHUNK else self._merge
            found += merge(whole[start:end])
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
