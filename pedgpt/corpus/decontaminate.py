"""Training rows that contain evaluation items: word for word, or lightly edited inside a longer text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pedgpt.corpus.duplicates import gram_hashes
from pedgpt.corpus.split import question_key

# An item of 13 or more characters with a tenth of them changed keeps a run of six; one of eight it may lose.
GRAM = 6
LEAST = 13  # characters, without punctuation, from which an item is recognised inside a longer text
MANY = 20  # items: a gram that more of them have is boilerplate
SEEN = 0.2  # share of its grams from which an item is looked at: each edit spoils up to six
SHARE = 0.8  # of its characters that must be there in runs of three or more; with a tenth changed 0.88 are


class Decontaminator:
    """Evaluation items, and the rows that contain one.

    Items and rows are compared without spaces, punctuation, case and width. What a row contains of an item is the
    share of its own characters that is found in one place; own are those outside of boilerplate, which is runs of six
    characters that many items have. An item with fewer than 13 characters of its own must be a whole message.
    """

    def __init__(self) -> None:
        self._places: dict[str, str] = {}  # by key, the first place
        self._questions: set[str] = set()
        self._repeated: set[str] = set()  # keys of several places
        self._built = False

    def add(self, place: str, text: str, question: bool = False) -> None:
        """Take in an item, what is asked (`question`) or another text of an evaluation row at `place`.

        Questions always count. Other texts count if they are in one place only, and have 13 characters or more: 不客气
        and 多喝水 are anybody's answer.
        """
        key = question_key(text)
        if key:
            if self._places.setdefault(key, place) != place:
                self._repeated.add(key)
            if question:
                self._questions.add(key)
            self._built = False

    def match(self, texts: Sequence[str]) -> tuple[str, float] | None:
        """(place, share) of the item of which a row with these messages contains most, if it is contaminated.

        The first message is what the row asks; a question of fewer than 13 characters must be just that.
        """
        if not self._built:
            self._build()
        keys = [question_key(text) for text in texts]
        if keys and keys[0] in self._short:
            return self._short[keys[0]], 1.0
        for key in keys:
            if key in self._whole:
                return self._whole[key], 1.0
        row = "\0".join(keys)  # no gram of an item reaches over a \0
        hashes = gram_hashes(row, GRAM)
        hits = np.flatnonzero(self._filter[hashes >> self._shift])
        if not len(hits):
            return None
        at = np.searchsorted(self._hashes, hashes[hits]).clip(max=len(self._hashes) - 1)
        there = self._hashes[at] == hashes[hits]
        if not there.any():
            return None
        hits, at = hits[there], at[there]
        first, counts = self._first[at], self._first[at + 1] - self._first[at]
        entries = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        items = self._items[entries]
        places = np.repeat(hits, counts)
        which, times = np.unique(items, return_counts=True)
        best: tuple[str, float] | None = None
        for item in which[times >= self._needed[which]].tolist():
            mine = np.flatnonzero(items == item)
            beginnings = np.sort(places[mine] - self._within[entries[mine]])  # where in the row it would begin
            start, slack = int(beginnings[len(mine) // 2]), 8 + len(self._keys[item]) // 8  # what edits may have moved
            if np.count_nonzero(abs(beginnings - start) <= slack) < self._needed[item]:
                continue
            share = self._share(item, row[max(0, start - slack) : start + len(self._keys[item]) + slack])
            if share >= SHARE and (best is None or share > best[1]):
                best = self._places[self._keys[item]], share
        return best

    def _share(self, item: int, window: str) -> float:
        key, own = self._keys[item], self._own[item]
        if key in window:
            return 1.0
        there = {window[i : i + 3] for i in range(len(window) - 2)}
        covered = np.zeros(len(key), bool)
        for i in range(len(key) - 2):
            if key[i : i + 3] in there:
                covered[i : i + 3] = True
        return float((covered & own).sum() / own.sum())

    def _build(self) -> None:
        """Index the grams of items that are long enough and not boilerplate."""
        counted = [key for key in self._places if key in self._questions or key not in self._repeated]
        self._short = {key: self._places[key] for key in counted if key in self._questions and len(key) < LEAST}
        self._whole = {key: self._places[key] for key in counted if len(key) >= LEAST}
        self._keys = [key for key in counted if len(key) >= LEAST]
        joined = "\0".join(self._keys)
        lengths = np.array([len(key) for key in self._keys], np.int64)
        item_of = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths + 1)
        hashes = gram_hashes(joined, GRAM)
        within = np.ones(len(joined) + 1, bool)
        ends = np.cumsum(lengths + 1)[:, None]
        within[(ends - np.arange(1, GRAM + 1)).ravel()] = False
        starts = np.flatnonzero(within[: len(hashes)])
        hashes, items = hashes[starts], item_of[starts]
        order = np.lexsort((items, hashes))
        hashes, items, starts = hashes[order], items[order], starts[order]
        new = np.r_[True, (hashes[1:] != hashes[:-1]) | (items[1:] != items[:-1])][: len(hashes)]  # once an item
        _, kind, count = np.unique(hashes[new], return_inverse=True, return_counts=True)
        rare = (count <= MANY)[kind][np.cumsum(new) - 1] if len(hashes) else np.zeros(0, bool)
        own = np.zeros(len(joined) + 1, bool)
        for i in range(GRAM):
            own[starts[rare] + i] = True
        offsets = np.cumsum(lengths + 1) - lengths - 1
        self._own = [own[start : start + length] for start, length in zip(offsets, lengths, strict=True)]
        enough = np.array([piece.sum() >= LEAST for piece in self._own], bool)
        keep = rare & new & (enough[items] if len(items) else rare)
        self._items, self._within = items[keep], starts[keep] - offsets[items[keep]]
        self._needed = np.maximum(1, SEEN * np.bincount(self._items, minlength=len(lengths)))
        grams, first = np.unique(hashes[keep], return_index=True)
        self._first = np.append(first, [keep.sum(), keep.sum()])
        self._hashes = np.append(grams, grams[-1:])  # so that there is one after the last
        if not len(grams):
            self._hashes = np.zeros(1, np.uint64)
        bits = min(max(10, (16 * len(grams)).bit_length()), 26)
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(2**bits, bool)  # most grams of a row are in no item: one look tells
        self._filter[grams >> self._shift] = True
        self._built = True
