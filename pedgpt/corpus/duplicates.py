"""Repeated and contradicting rows, found in time linear in the rows and a few hundred bytes of memory for each.

Texts are compared by their question_key, so that spaces, punctuation, case and width make no difference, but numbers
and signs do. What is long waits in temporary files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from array import array
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pedgpt.corpus.builders.support import UNIT, UNITS, meanings, numbers
from pedgpt.corpus.split import Names, question_key

# Five characters are two or three Chinese words: fewer are shared by unrelated texts of one specialty, and of more, one
# changed character would spoil too many.
GRAM = 5
PERMUTATIONS = 120
BATCH = 2**16  # characters that are hashed at once
CANDIDATES = 512  # kept rows that a row is compared with at most, those of its rarest buckets first
NO_NAMES = Names()
BLUR = 0.11  # three standard errors of a similarity of 0.8 as estimated from the signatures

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


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


def grams(key: str) -> set[str]:
    """The runs of five characters of a key, as a set; a shorter key is its own only one."""
    return {key[i : i + GRAM] for i in range(len(key) - GRAM + 1)} or {key}


def jaccard(one: set[str], other: set[str]) -> float:
    """|A ∩ B| / |A ∪ B|."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


# Latin words, signs, results, and what a dose refers to (每公斤, /kg). A hyphen between digits is no sign, because a
# range is written 3-5天 or 3至5天. A Latin "word" of more than 20 characters is English that has lost its spaces.
_WORDS = re.compile(rf"[/每](?:{UNIT}|d)|(?:(?<![a-z0-9°])|(?<=\d))[a-z][a-z0-9]{{0,19}}(?![a-z0-9])"
                    r"|[+±<>=≤≥≠↑↓‰]|(?<!\d)-|-(?!\d)|[阴阳]性")  # fmt: skip


def facts(key: str, names: Names) -> int:
    """64 bits, equal for keys with the same numbers and units, signs, Latin words and known names in the same order."""
    found = [(unit if unit == "月" else "", meanings(value, unit)) for _, value, unit in numbers(key)]
    words = [meanings(Fraction(1), word[1:]) if word[0] in "/每" else word for word in _WORDS.findall(key)
             if word not in UNITS]  # fmt: skip
    said = repr((found, words, names.named(key)))
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")


class NearDuplicates:
    """Rows that repeat an earlier kept row: Jaccard similarity of their character 5-grams of at least `threshold`.

    Rows of different `facts` never repeat each other: 每次5毫升 is not 每次50毫升, whatever else is alike.
    MinHash and banding propose pairs, one at the threshold with a probability of at least 0.99; each is decided by its
    exact similarity. Only rows that are themselves kept count, so no chain of small changes drops a row unlike all that
    stay. `folder` (by default the system's) holds the temporary files until `close`.
    """

    def __init__(self, folder: Path | None = None, *, threshold: float = 0.8, seed: int = 0) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, found {threshold}")
        self.threshold = threshold
        # Odd factors permute the 32-bit integers.
        self._factors = np.random.default_rng(seed).integers(0, 2**31, PERMUTATIONS, np.uint32) * np.uint32(2) + 1
        # In b bands of r, a pair of similarity s is seen with probability 1 - (1 - s^r)^b. For 0.8: 20 of 6, 0.998.
        self._depth = max(r for r in (1, 2, 3, 4, 5, 6, 8) if (1 - threshold**r) ** (PERMUTATIONS // r) <= 0.01)
        self._keys, self._signatures, self._bands = (tempfile.TemporaryFile(dir=folder) for _ in range(3))
        self._offsets = array("q", [0])
        self._batch: list[str] = []
        self._waiting = 0

    def add(self, text: str) -> int:
        """Take in a row; its index."""
        key = question_key(text).ljust(GRAM, "\0")  # so that a shorter one is a single gram
        encoded = key.encode()
        self._keys.write(encoded)
        self._offsets.append(self._offsets[-1] + len(encoded))
        self._batch.append(key)
        self._waiting += len(key)
        if self._waiting >= BATCH:
            self._sign()
        return len(self._offsets) - 2

    def find(self, names: Names = NO_NAMES) -> list[tuple[int, int, float]]:
        """(row, the kept row that it repeats, their similarity) of each row to drop, in order.

        `names` are the keys of names such as those of diseases and drugs: rows that name different ones are different.
        """
        self._sign()
        signatures = _read(self._signatures, np.uint16, PERMUTATIONS)
        bands = _read(self._bands, np.uint32, PERMUTATIONS // self._depth + 1)
        said = np.zeros(len(bands), np.uint64)
        for row in np.flatnonzero((_buckets(bands)[0] >= 0).any(axis=1)).tolist():
            said[row] = facts(self._key(row), names)
        buckets, sizes = _buckets(bands ^ said.astype(np.uint32)[:, None])  # rows of other facts are not even compared
        room = np.minimum(sizes, CANDIDATES)
        start = np.cumsum(room) - room
        members = np.zeros(int(room.sum()), np.int32)  # of each bucket, the last rows that were kept
        count = np.zeros(len(sizes), np.int32)
        grams_of = lru_cache(1024)(self._grams)
        found = []
        for row in np.flatnonzero((buckets >= 0).any(axis=1)).tolist():
            own = buckets[row][buckets[row] >= 0]
            own = own[np.argsort(count[own], kind="stable")]  # rare ones first: boilerplate fills the others
            left, near = CANDIDATES, []
            for bucket, here in zip(own.tolist(), np.minimum(count[own], room[own]).tolist(), strict=True):
                if here and left > 0:
                    near.append(members[start[bucket] : start[bucket] + min(here, left)])
                    left -= here
            others = np.unique(np.concatenate(near)) if near else np.zeros(0, np.int32)
            first = self._first(row, others[said[others] == said[row]], signatures, grams_of)
            if first:
                found.append((row, *first))
            else:
                members[start[own] + count[own] % room[own]] = row
                count[own] += 1
        return found

    def close(self) -> None:
        """Delete the temporary files."""
        for file in (self._keys, self._signatures, self._bands):
            file.close()

    def _first(self, row: int, near: npt.NDArray[np.int32], signatures: npt.NDArray[np.uint16], grams_of: Any) -> Any:
        agree = (signatures[near] == signatures[row]).sum(axis=1)
        for i in np.argsort(-agree, kind="stable"):
            if agree[i] < (self.threshold - BLUR) * PERMUTATIONS:
                break
            similarity = jaccard(grams_of(row), grams_of(int(near[i])))
            if similarity >= self.threshold:
                return int(near[i]), similarity
        return None

    def _key(self, row: int) -> str:
        start, end = self._offsets[row], self._offsets[row + 1]
        return os.pread(self._keys.fileno(), end - start, start).decode()

    def _grams(self, row: int) -> set[str]:
        return grams(self._key(row))

    def _sign(self) -> None:
        self._keys.flush()
        if not self._batch:
            return
        lengths = np.array([len(key) for key in self._batch])
        inside = np.ones(lengths.sum(), bool)  # grams that do not reach into the next row
        inside[(np.cumsum(lengths)[:, None] - np.arange(1, GRAM)).ravel()] = False
        hashes = (gram_hashes("".join(self._batch), GRAM) >> np.uint64(32)).astype(np.uint32)[inside[: 1 - GRAM]]
        starts = np.cumsum(lengths - GRAM + 1) - (lengths - GRAM + 1)
        least = np.empty((PERMUTATIONS, len(lengths)), np.uint32)
        permuted = np.empty_like(hashes)
        for factor, out in zip(self._factors, least, strict=True):
            np.multiply(hashes, factor, out=permuted)
            np.minimum.reduceat(permuted, starts, out=out)
        signatures = least.T.copy()
        self._signatures.write(signatures.astype(np.uint16).tobytes())  # the low halves agree as often, all but 2^-16
        bands = _mix(signatures.reshape(len(lengths), -1, self._depth))
        self._bands.write(np.concatenate([bands, _mix(bands[:, None])], axis=1).tobytes())  # the last: all is equal
        self._batch, self._waiting = [], 0


def _mix(parts: U32) -> U32:
    """Hash the last axis, [..., k] -> [...]."""
    mixed = np.zeros(parts.shape[:-1], np.uint64)
    for i in range(parts.shape[-1]):
        mixed = (mixed ^ parts[..., i]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return (mixed >> np.uint64(16)).astype(np.uint32)


def _read(file: Any, dtype: Any, columns: int) -> Any:
    file.flush()
    file.seek(0)
    return np.fromfile(file, dtype).reshape(-1, columns)


def _buckets(bands: U32) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The bucket of each row in each band, -1 where it is alone, [rows, bands]; and the buckets' sizes."""
    buckets = np.full(bands.shape, -1, np.int32)
    sizes: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    total = 0
    for band in range(bands.shape[1]):
        _, label, size = np.unique(bands[:, band], return_inverse=True, return_counts=True)
        shared = size > 1
        buckets[:, band] = np.where(shared, np.cumsum(shared) - 1 + total, -1)[label]
        sizes.append(size[shared])
        total += len(sizes[-1])
    return buckets, np.concatenate(sizes)


# How an answer begins that says yes or no, after a greeting and the like.
_OPENING = re.compile(
    r"(?:[您你]好|问题分析|病情分析|意见建议|指导意见|回答|答|医生|[，,。.！!：:、\s])*"
    r"(?:一般|通常|当然|完全|原则上|理论上|这种情况|这个|这|孩子|宝宝|来说|情况下|都|也|，|,)*?"
    r"(?:(?P<no>不可以|不可能|不可|不能|不是|不会|不需要|不用|不必|不宜|不应|不行|没有(?!问题|关系|影响)|无需|无须|否(?=[，,。.！!]))"
    r"|(?P<yes>(?:可以|需要|没有问题|没问题|没有关系|没关系)(?!不)"
    r"|(?:能|会|有)(?=的|[，,。.！!]|够|可能)|是(?=的|[，,。.！!])|应该|必须|要(?!不|看)))"
)


def polarity(answer: str) -> int:
    """1 if the answer's first sentence begins by affirming (可以, 能, 是的), -1 if by denying (不可以), or 0."""
    match = _OPENING.match(answer)
    return 0 if not match else 1 if match["yes"] else -1


class Contradictions:
    """Rows that answer one question differently. They are reported, never dropped."""

    def __init__(self, folder: Path | None = None) -> None:
        self._rows = tempfile.TemporaryFile(dir=folder)
        self._offsets, self._questions = array("q", [0]), array("Q")

    def add(self, place: str, question: str, answer: str) -> None:
        """Take in a row; its texts wait in a temporary file."""
        line = json.dumps([place, question, answer]).encode()
        self._rows.write(line)
        self._offsets.append(self._offsets[-1] + len(line))
        self._questions.append(int.from_bytes(digest(question)[:8], "big"))

    def groups(self) -> Iterator[dict[str, Any]]:
        """Each question with several answers: the places of the different ones, the lowest similarity of one with the
        first, and whether one begins by affirming and another by denying. In the order of the first rows."""
        self._rows.flush()
        if not self._questions:
            return
        questions = np.frombuffer(self._questions, np.uint64)
        order = np.argsort(questions, kind="stable")
        ends = [0, *(np.flatnonzero(np.diff(questions[order])) + 1).tolist(), len(order)]
        for start, end in sorted(((s, e) for s, e in pairwise(ends) if e > s + 1), key=lambda span: order[span[0]]):
            answers: dict[bytes, str] = {}  # by digest, the place
            for row in order[start:end].tolist():
                at, after = self._offsets[row], self._offsets[row + 1]
                place, question, answer = json.loads(os.pread(self._rows.fileno(), after - at, at))
                key = question_key(answer)
                if not answers:
                    asked, first, lowest, sides = question, grams(key), 1.0, {polarity(answer)}
                if answers.setdefault(digest(answer), place) is place:
                    lowest = min(lowest, jaccard(first, grams(key)))
                    sides.add(polarity(answer))
            if len(answers) > 1:
                yield {
                    "question": asked, "places": list(answers.values()),
                    "similarity": round(lowest, 3), "opposed": {1, -1} <= sides,
                }  # fmt: skip
