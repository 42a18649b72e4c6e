"""Training and held-out rows that share no disease and no question."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

from pedgpt.corpus.rows import question
from pedgpt.data.records import Record


def question_key(text: str) -> str:
    """A question without spaces, punctuation, case and width, so that two spellings of it are equal."""
    try:
        return text.translate(_KEYS)
    except _Composing:
        composed = unicodedata.normalize("NFKC", text).casefold()
        return "".join(c for c in composed if unicodedata.category(c)[0] in "LNS")


class _Composing(Exception):
    """A character that NFKC may join to the one before it: the text cannot be read one by one."""


class _Keys(dict[int, str]):
    def __missing__(self, code: int) -> str:
        plain = unicodedata.normalize("NFKC", chr(code))
        # Marks, and the vowels and finals of Hangul; nothing else composes with what stands before it.
        if any(unicodedata.category(c)[0] == "M" or "\u1160" <= c <= "\u11ff" for c in plain):
            raise _Composing
        self[code] = "".join(c for c in plain.casefold() if unicodedata.category(c)[0] in "LNS")
        return self[code]


_KEYS = _Keys()


def side(group: str, heldout_share: float, seed: int) -> str:
    """Which side, "train" or "heldout", by a hash of the group's name: a group is never divided."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{group}".encode()).digest()[:8], "big")
    return "heldout" if number < heldout_share * 2**64 else "train"


class Groups:
    """Which group a row belongs to: its disease if one of `diseases` is named, or else its own question.

    All rows on a disease fall on one side of the split, so that no fact of a held-out disease is trained on.
    """

    def __init__(self, diseases: Iterable[str] = ()) -> None:
        self.diseases = set(diseases)
        self._lengths = sorted({len(name) for name in self.diseases}, reverse=True)

    def group(self, record: Record) -> str:
        """By the row's own disease, or the longest known one in its title or first question, or that question."""
        asked = question(record)
        name = record.disease or self._named(asked[:200])
        return f"disease/{name}" if name else f"question/{question_key(asked)}"

    def _named(self, text: str) -> str:
        for length in self._lengths:
            for start in range(len(text) - length + 1):
                if text[start : start + length] in self.diseases:
                    return text[start : start + length]
        return ""
