"""Training and held-out rows that share no disease and no question."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

from pedgpt.corpus.rows import number, question, texts
from pedgpt.data.records import Document, Record


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
    """On which side a row lies: all rows about a disease on one, and else all rows with one question.

    So nothing about a held-out disease is trained on; a row about another may still name it, as its complication. Of
    the known `diseases` a share is held out, as exactly as whole diseases allow; other groups go by a hash of their
    name alone, whatever else there is.
    """

    def __init__(self, diseases: Iterable[str] = (), *, heldout_share: float, seed: int) -> None:
        self.diseases = set(diseases)
        self.heldout_share, self.seed = heldout_share, seed
        ranked = sorted(self.diseases, key=lambda name: (self._number(f"disease/{name}"), name))
        self._heldout = {f"disease/{name}" for name in ranked[: round(heldout_share * len(ranked))]}
        self._lengths: dict[str, list[int]] = {}  # of the names that begin with a character, the longest first
        for name in sorted(self.diseases, key=lambda name: (-len(name), name)):
            self._lengths.setdefault(name[0], []).append(len(name))

    def group(self, record: Record) -> str:
        """By the row's own disease, those that its question, title or headings name, the one that it names most often
        anywhere, or its question.

        Empty if what it is about by its own words lies on both sides: then it belongs on neither.
        """
        asked = question(record)
        subject = asked if not isinstance(record, Document) else record.title
        headings = record.source.partition(" › ")[2]
        for text in (record.disease, f"{subject}\n{headings}"):
            if names := self.named(text):
                sides = {self.side(f"disease/{name}") for name in names}
                return f"disease/{max(names, key=len)}" if len(sides) == 1 else ""
            if text and text == record.disease:
                return f"disease/{text.strip()}"  # that no graph knows
        if names := self.named("\n".join(texts(record))):
            return f"disease/{Counter(names).most_common(1)[0][0]}"
        return f"question/{question_key(asked)}"

    def side(self, group: str) -> str:
        """ "train" or "heldout"."""
        if group.removeprefix("disease/") in self.diseases:
            return "heldout" if group in self._heldout else "train"
        return "heldout" if self._number(group) < self.heldout_share else "train"

    def named(self, text: str) -> list[str]:
        """The known diseases in a text, in order; of names inside one another the longest."""
        found, at = [], 0
        while at < len(text):
            lengths = self._lengths.get(text[at], ())
            name = next((text[at : at + n] for n in lengths if text[at : at + n] in self.diseases), "")
            found += [name] if name else []
            at += len(name) or 1
        return found

    def _number(self, group: str) -> float:
        """In [0, 1), evenly spread."""
        return number(str(self.seed), group) / 2**64
