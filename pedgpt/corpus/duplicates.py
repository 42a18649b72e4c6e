"""Repeated rows, found in time linear in the rows and a few hundred bytes of memory for each.

Texts are compared by their question_key, so that spaces, punctuation, case and width make no difference, but numbers
and signs do. What is long waits in temporary files.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import tempfile
from array import array
from collections import Counter, defaultdict
from fractions import Fraction
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pedgpt.corpus.builders.support import UNIT, UNITS, meaning_of, numbers
from pedgpt.corpus.split import Names, question_key

# Five characters are two or three Chinese words: fewer are shared by unrelated texts of one specialty, and of more, one
# changed character would spoil too many.
GRAM = 5
PERMUTATIONS = 120
BATCH = 2**12  # grams whose hashes are permuted at once
CANDIDATES = 64  # kept rows of each of its buckets that a row is compared with at most, the last ones
COMPARED = 16  # of them by their grams, those that share most buckets with it

U64 = npt.NDArray[np.uint64]


class Spool:
    """Values by number, kept in a temporary file in `folder`, by default the system's."""

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> Any:
        self._file.flush()
        start, end = self._ends[number], self._ends[number + 1]
        return pickle.loads(os.pread(self._file.fileno(), end - start, start))

    def append(self, value: Any) -> int:
        """Keep a value; its number."""
        self._ends.append(self._ends[-1] + self._file.write(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)))
        return len(self) - 1

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


def digest(text: str) -> bytes:
    """16 bytes that are equal for texts of one question_key."""
    return hashlib.blake2b(question_key(text).encode(), digest_size=16).digest()


def gram_hashes(text: str, n: int) -> U64:
    """A 64-bit hash of each run of n characters, [len(text) - n + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    hashes = codes[: max(0, len(codes) - n + 1)].copy()
    for i in range(1, n):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += codes[i : len(codes) - n + 1 + i]
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # splitmix64: every bit of the input moves every other
        hashes ^= hashes >> np.uint64(31)
        hashes *= np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))


# Latin words, signs, results, and what a dose refers to (每公斤, /kg). A hyphen between digits is no sign, because a
# range is written 3-5天 or 3至5天. A Latin "word" of more than 20 characters is English that has lost its spaces.
_WORDS = re.compile(rf"[/每](?:{UNIT}|d)|(?:(?<![a-z0-9°])|(?<=\d))[a-z][a-z0-9]{{0,19}}(?![a-z0-9])"
                    r"|[+±<>=≤≥≠↑↓‰]|(?<!\d)-|-(?!\d)|[阴阳]性")  # fmt: skip


def facts(key: str, names: Names) -> int:
    """64 bits, equal for keys with the same numbers and units, signs, Latin words and known names in the same order."""
    found = [(unit if unit == "月" else "", meaning_of(value, unit)) for _, value, unit in numbers(key)]
    words = [meaning_of(Fraction(1), word[1:]) if word[0] in "/每" else word for word in _WORDS.findall(key)
             if word not in UNITS]  # fmt: skip
    said = repr((found, words, names.named(key))).encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest())


class NearDuplicates:
    """Rows that repeat an earlier kept row: Jaccard similarity of their character 5-grams of at least `threshold`.

    Rows of different `facts` never repeat each other: 每次5毫升 is not 每次50毫升, whatever else is alike.
    MinHash and banding propose pairs, one at the threshold with a probability of at least 0.99; each is decided by its
    exact similarity. Only rows that are themselves kept count, so no chain of small changes drops a row unlike all that
    stay. `folder` (by default the system's) holds the texts until `close`.
    """

    def __init__(self, folder: Path | None = None, *, threshold: float = 0.8, seed: int = 0) -> None:
        self.threshold = threshold
        random = np.random.default_rng(seed)
        # Odd factors permute the 32-bit integers.
        self._factors = random.integers(0, 2**31, (PERMUTATIONS, 1), np.uint32) * np.uint32(2) + np.uint32(1)
        self._weights = random.integers(0, 2**64, PERMUTATIONS, np.uint64)
        # In b bands of r, a pair of similarity s is seen with probability 1 - (1 - s^r)^b. For 0.8: 20 of 6, 0.998.
        self._depth = max(r for r in (1, 2, 3, 4, 5, 6, 8) if (1 - threshold**r) ** (PERMUTATIONS // r) <= 0.01)
        self._keys, self._signatures = Spool(folder), bytearray()

    def add(self, text: str) -> int:
        """Take in a row; its index."""
        key = question_key(text).ljust(GRAM, "\0")  # so that a shorter one is a single gram
        hashes = (gram_hashes(key, GRAM) >> np.uint64(32)).astype(np.uint32)
        parts = range(0, len(hashes), BATCH)  # the whole of a book would need much memory at once
        least = np.min([(self._factors * hashes[i : i + BATCH]).min(axis=1) for i in parts], axis=0)
        self._signatures += least.astype(np.uint16).tobytes()  # the low halves agree as often
        return self._keys.append(key)

    def find(self, names: Names | None = None) -> list[tuple[int, int, float]]:
        """(row, the kept row that it repeats, their similarity) of each row to drop, in order.

        `names` are the keys of names such as those of diseases and drugs: rows that name different ones are different.
        """
        signatures = np.frombuffer(self._signatures, np.uint16).reshape(-1, PERMUTATIONS)
        parts = range(0, PERMUTATIONS, self._depth)
        weighted = [signatures[:, i : i + self._depth] @ self._weights[i : i + self._depth] for i in parts]
        bands, names = np.stack(weighted, axis=1), names or Names()
        said = np.zeros((len(bands), 1), np.uint64)
        for row in _shared(_buckets(bands)):
            said[row] = facts(self._keys[row], names)
        buckets = _buckets(bands ^ said)  # rows of other facts are not even compared
        members: dict[int, list[int]] = defaultdict(list)  # the kept rows of each bucket
        grams_of = lru_cache(1024)(self._grams)
        found = []
        for row in _shared(buckets):
            own = [members[bucket] for bucket in set(buckets[row].tolist()) - {-1}]
            likely = Counter(chain.from_iterable(rows[-CANDIDATES:] for rows in own))
            for other, _ in likely.most_common(COMPARED):
                shared = len(grams_of(row) & grams_of(other))
                similarity = shared / (len(grams_of(row)) + len(grams_of(other)) - shared)
                if similarity >= self.threshold:
                    found.append((row, other, similarity))
                    break
            else:
                for rows in own:
                    rows.append(row)
        return found

    def close(self) -> None:
        """Delete the temporary file."""
        self._keys.close()

    def _grams(self, row: int) -> set[str]:
        key = self._keys[row]
        return {key[i : i + GRAM] for i in range(len(key) - GRAM + 1)}


def _buckets(bands: U64) -> npt.NDArray[np.int32]:
    """The bucket of each row in each band, -1 where it is alone, [rows, bands]."""
    buckets, total = np.empty(bands.shape, np.int32), 0
    for band in range(bands.shape[1]):
        _, label, size = np.unique(bands[:, band], return_inverse=True, return_counts=True)
        buckets[:, band] = np.where(size > 1, np.cumsum(size > 1) - 1 + total, -1)[label]
        total += int((size > 1).sum())
    return buckets


def _shared(buckets: npt.NDArray[np.int32]) -> list[int]:
    """The rows that share a bucket."""
    return np.flatnonzero((buckets >= 0).any(axis=1)).tolist()
