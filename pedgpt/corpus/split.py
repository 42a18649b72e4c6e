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


class Split:
    """On which side a row lies: all rows on a disease on one, and else all rows with one question.

    So no fact of a held-out disease is trained on. Of the known `diseases` a share is held out, as exactly as whole
    diseases allow; other groups go by a hash of their name alone, whatever else there is.
    """

    def __init__(self, diseases: Iterable[str] = (), *, heldout_share: float, seed: int) -> None:
        self.diseases = set(diseases)
        self.heldout_share, self.seed = heldout_share, seed
        ranked = sorted(self.diseases, key=lambda name: (self._number(f"disease/{name}"), name))
        self._heldout = {f"disease/{name}" for name in ranked[: round(heldout_share * len(ranked))]}
        self._lengths = sorted({len(name) for name in self.diseases}, reverse=True)

    def group(self, record: Record) -> str:
        """By the row's own disease, or the longest known one in its title or first question, or that question."""
        asked = question(record)
        name = record.disease or self._named(asked[:200])
        return f"disease/{name}" if name else f"question/{question_key(asked)}"

    def side(self, group: str) -> str:
        """ "train" or "heldout"."""
        if group.removeprefix("disease/") in self.diseases:
            return "heldout" if group in self._heldout else "train"
        return "heldout" if self._number(group) < self.heldout_share else "train"

    def _named(self, text: str) -> str:
        for length in self._lengths:
            for start in range(len(text) - length + 1):
                if text[start : start + length] in self.diseases:
                    return text[start : start + length]
        return ""

    def _number(self, group: str) -> float:
        """In [0, 1), evenly spread."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{group}".encode()).digest()[:8], "big") / 2**64
