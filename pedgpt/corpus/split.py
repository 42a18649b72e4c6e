"""Training and held-out rows that share no disease and no question."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from pedgpt.corpus.rows import number, question, texts
from pedgpt.data.records import Document, Record

_ALONE = re.compile("[²³¹¼-¾⁰-₉①-⒛⓪-⓿❶-➓]")  # numbers by themselves: ①5天 is not 15天, and 10⁹ is not 109
_THOUSANDS = re.compile(r"(?<![\d,])(\d{1,3}),(?=\d{3}(?![\d,]))")
_PLAIN = r"[^\w+<>=≤≥≠≈±×÷°%‰↑↓]"  # neither a letter, nor a digit, nor a sign
_MARKS = re.compile(
    rf"(?P<between>(?<=\d){_PLAIN}+(?=\d))|(?P<minus>\([-−–]\)|[-−](?=\d)|(?<=[a-z0-9])[-−](?![\w-]))"
    rf"|(?P<per>/(?=\s*(?:kg|d|h|min|次|日|天|周|公斤|千克|小时|分)))|{_PLAIN}|_"
)


def question_key(text: str) -> str:
    """A text without spaces, punctuation, case and width, so that two spellings of it are equal.

    The marks that numbers and signs need stay: 1.5毫升, 3-5天, 1:2000, 120/80, mg/kg, 5%, -2, HBsAg- for HBsAg(-),
    and a space between two numbers. 1,000 is 1000.
    """
    text = unicodedata.normalize("NFKC", _ALONE.sub(r" \g<0> ", text)).casefold()
    return _MARKS.sub(_kept, _THOUSANDS.sub(r"\1", text))


def _kept(match: re.Match[str]) -> str:
    if not (between := match["between"]):
        return "-" if match["minus"] else "/" if match["per"] else ""
    marks = re.sub("[−–—―〜~]", "-", between)
    return "." if marks in (".", "·") else next((mark for mark in "-/:" if mark in marks), " ")


class Names:
    """Known names, to be found in texts."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = set(names) - {""}
        self._lengths: dict[str, list[int]] = {}  # of the names that begin with a character, the longest first
        for name in sorted(self._names, key=lambda name: (-len(name), name)):
            self._lengths.setdefault(name[0], []).append(len(name))

    def named(self, text: str) -> list[str]:
        """The names in a text, in order; of names inside one another the longest."""
        found, at = [], 0
        while self._names and at < len(text):
            lengths = self._lengths.get(text[at], ())
            name = next((text[at : at + n] for n in lengths if text[at : at + n] in self._names), "")
            found += [name] if name else []
            at += len(name) or 1
        return found


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
        self.named = Names(self.diseases).named

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

    def _number(self, group: str) -> float:
        """In [0, 1), evenly spread."""
        return number(str(self.seed), group) / 2**64
