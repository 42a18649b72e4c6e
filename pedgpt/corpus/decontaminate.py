"""Training rows that contain evaluation items: word for word, or lightly edited inside a longer text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pedgpt.corpus.duplicates import gram_hashes
from pedgpt.corpus.rows import either, templates
from pedgpt.corpus.split import Names, question_key

# An item of 13 or more characters with a tenth of them changed keeps a run of six; one of eight it may lose.
GRAM = 6
LEAST = 13  # an item with fewer characters of its own is not looked for inside a longer text
MANY = 20  # a gram that more items, or more rows, have is boilerplate; of many rows the limit is a hundredth
FEW = 5  # a short answer that more rows than this hold is anybody's answer
SEEN = 0.2  # share of its grams from which an item is looked at: each edit spoils up to six
SHARE = 0.8  # of its characters that must be there in runs of three or more; with a tenth changed 0.88 are
# Characters outside of boilerplate. In a shorter item one changed run is another subject, so its edits are counted.
SHORT = 36
ALL_OWN = 0.9  # with this share of its own characters an answer is recognised even without its stock phrases
_STOCK = re.compile(either(map(question_key, templates("support")["manners"] + templates("decontaminate")["stock"])))


class Decontaminator:
    """Evaluation items, and the rows that contain one.

    Items and rows are compared without spaces, punctuation, case and width. What counts is the share of the item's
    characters outside of boilerplate, which is runs of six characters that many items or rows have, that stands in one
    place of the row. An item's own characters are those of them outside of numbers and of the stock phrases of
    consultations (templates/decontaminate.toml); with fewer than 13 it matches only a whole message. `names` are those
    of diseases and the like: a row about one does not contain an item about another.
    """

    def __init__(self) -> None:
        self.names = Names()
        self._places: dict[str, str] = {}  # by key, the first place
        self._questions: set[str] = set()
        self._repeated: set[str] = set()  # keys of several places
        self._built = False
        self._holding: Counter[str] = Counter()  # counted rows by the item that they hold, "" for none
        self._common = np.zeros(0, np.uint64)  # grams that many counted rows have

    def add(self, place: str, text: str, question: bool = False) -> None:
        """Take in an item, what is asked (`question`) or another text of an evaluation row at `place`.

        Questions count if they ask anything. Other texts count if they are in one place only, and have 13 characters
        of their own: 不客气 and 建议您到正规医院就诊 are anybody's answer.
        """
        if key := question_key(text):
            if self._places.setdefault(key, place) != place:
                self._repeated.add(key)
            if question:
                self._questions.add(key)
            self._built = False

    def count(self, texts: Sequence[str]) -> None:
        """Count a training row's messages. Every row is counted before the first `match`.

        What many rows share is boilerplate, and so is an answer that many rows hold.
        """
        self._build()
        key, _, grams = self._search(texts)
        self._holding[key] += 1
        self._holders[np.unique(grams)] += 1

    def match(self, texts: Sequence[str]) -> tuple[str, float] | None:
        """(place, share) of the item of which a row with these messages contains most, if it is contaminated.

        The first message is what the row asks. A question with fewer than 13 characters of its own matches only a row
        whose first message is just that question.
        """
        if self._holding:
            many = max(MANY, self._holding.total() // 100)
            self._common = self._hashes[self._holders > many]
            short = {key for key, own in self._own.items() if own.sum() < SHORT}
            self._repeated |= {key for key, rows in self._holding.items() if rows > (FEW if key in short else many)}
            self._built = False
            self._holding.clear()
        self._build()
        key, share, _ = self._search(texts)
        return (self._places[key], share) if key else None

    def _search(self, texts: Sequence[str]) -> tuple[str, float, npt.NDArray[np.int64]]:
        """(key of the item that is there most, or "", its share, where in _hashes the grams of other items begin)."""
        keys = [question_key(text) for text in texts]
        for key in [key for key in keys[:1] if key in self._short] or [key for key in keys if key in self._own]:
            return key, 1.0, np.zeros(0, np.int64)
        row = "\0".join(keys)  # no gram of an item reaches over a \0
        hashes = gram_hashes(row, GRAM)
        first = np.searchsorted(self._hashes, hashes)
        counts = np.searchsorted(self._hashes, hashes, "right") - first
        entries = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        items = self._items[entries]
        begins = np.repeat(np.arange(len(hashes)), counts) - self._within[entries]  # where the item would begin
        which, times = np.unique(items, return_counts=True)
        best, most = "", 0.0
        for item in which[times >= self._needed[which]].tolist():
            key, places = self._keys[item], np.sort(begins[items == item])
            start, slack = int(places[len(places) // 2]), 8 + len(key) // 8  # what edits may have moved
            if np.count_nonzero(abs(places - start) <= slack) >= self._needed[item]:
                share = self._share(key, row[max(0, start - slack) : start + len(key) + slack])
                best, most = (key, share) if share > most else (best, most)
        return best, most, first[counts > 0]

    def _share(self, key: str, window: str) -> float:
        """The share of an item's own characters in a part of a row, or 0 if there are too few."""
        if key in window:
            return 1.0
        own, rare = self._own[key], self._rare[key]
        if rare.sum() < SHORT:
            count, changed = int(own.sum()), distance(key, own | _digits(key), window)
            few = changed <= max(1, count // 10) and distance(key, rare, window) <= (1 - SHARE) * rare.sum()
            share = 1 - changed / count if few else 0.0
        else:
            grams, there = {window[i : i + 3] for i in range(len(window) - 2)}, np.zeros(len(key), bool)
            for i in range(len(key) - 2):
                there[i : i + 3] |= key[i : i + 3] in grams
            share, own_share = float((there & rare).sum() / rare.sum()), float((there & own).sum() / own.sum())
            if key not in self._questions and own_share >= ALL_OWN:  # an answer without its stock phrases
                share = max(share, own_share)
        asked, named = set(self.names.named(key)), set(self.names.named(window))
        other = asked and named and not asked & named  # it is about another disease
        return share if share >= SHARE and not other else 0.0

    def _build(self) -> None:
        """Index the grams of items that are long enough and not boilerplate."""
        if self._built:
            return
        said = {key: _said(key) for key in self._places if key in self._questions or key not in self._repeated}
        self._short = {key for key in said if key in self._questions and 0 < said[key].sum() < LEAST}
        self._keys = [key for key in said if said[key].sum() >= LEAST]
        lengths = np.array([len(key) for key in self._keys], np.int64)
        offsets = np.cumsum(lengths) - lengths
        hashes = gram_hashes("".join(self._keys), GRAM)
        items = np.repeat(np.arange(len(lengths)), lengths)[: len(hashes)]
        starts = np.flatnonzero(np.arange(len(hashes)) + GRAM <= (offsets + lengths)[items])  # within one item
        starts = starts[np.lexsort((items[starts], hashes[starts]))]
        hashes, items = hashes[starts], items[starts]
        fresh = np.diff(hashes, prepend=~hashes[:1]) != 0
        new = fresh | (np.diff(items, prepend=-1) != 0)  # the first time in an item
        gram = np.cumsum(fresh) - 1
        rare, common = np.bincount(gram, new)[gram] <= MANY, np.isin(hashes, self._common)
        own = np.zeros(lengths.sum(), bool)
        for some, value in ((rare, True), (common, False)):  # the rare ones may reach into boilerplate
            for i in range(GRAM):
                own[starts[some] + i] = value
        self._rare = dict(zip(self._keys, np.split(own, offsets[1:]), strict=False))  # without keys there is one part
        self._own = {key: said[key] & rare for key, rare in self._rare.items()}
        enough = np.array([own.sum() >= LEAST for own in self._own.values()], bool)
        kept = rare & ~common & new & enough[items]
        self._hashes, self._items, self._within = hashes[kept], items[kept], (starts - offsets[items])[kept]
        self._needed = np.maximum(1, SEEN * np.bincount(self._items, minlength=len(lengths)))
        self._holders = np.zeros(len(self._hashes), np.int64)  # counted rows with a gram of items, but with no item
        self._built = True


def _digits(key: str) -> npt.NDArray[np.bool_]:
    return np.array([character in "0123456789" for character in key], bool)


def _said(key: str) -> npt.NDArray[np.bool_]:
    """Which characters of a key are neither digits nor of stock phrases."""
    own = ~_digits(key)
    for match in _STOCK.finditer(key):
        own[match.start() : match.end()] = False
    return own


def distance(key: str, own: npt.NDArray[np.bool_], text: str) -> int:
    """How many edits turn some part of a text into a key; edits of characters that are not its own cost nothing.

    A character that is replaced right after another one counts twice, because two of them make another word.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    steps = np.arange(len(codes) + 1)
    kept, replaced = np.zeros(len(codes) + 1, np.int64), np.full(len(codes) + 1, len(key))  # edits, by the last one
    for c, cost in zip(key, own.astype(int).tolist(), strict=True):
        either = np.minimum(kept, replaced)
        inside = np.minimum(kept[:-1] + cost, replaced[:-1] + 2 * cost)
        kept = either + cost  # left out
        kept[1:] = np.where(codes == ord(c), np.minimum(kept[1:], either[:-1]), kept[1:])
        replaced = np.append(len(key), inside)
        before = np.minimum.accumulate(np.minimum(kept, replaced) - cost * steps)
        kept[1:] = np.minimum(kept[1:], before[:-1] + cost * steps[1:])  # characters of the text that the key lacks
    return int(np.minimum(kept, replaced).min())
