"""Training and held-out rows that share no disease and no question."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from pedgpt.corpus.rows import number, question, texts
from pedgpt.data.records import Document, Record


def question_key(text: str) -> str:
    """A text without spaces, punctuation, case and width, so that two spellings of it are equal.

    The marks that numbers and signs need stay: 1.5毫升, 3-5天, 1:2000, 120/80, mg/kg, 5%, -2, HBsAg- for HBsAg(-),
    and a space between two numbers. 1,000 is 1000, and 1.50毫升 is 1.5毫升.
    """
    text = _BETWEEN.sub(_separated, _ABOVE.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0])} ", text))
    if any(dash in text for dash in "-－−—"):
        text = _SIGN.sub(_HELD["-"], text)
    if "/" in text or "／" in text:
        text = _PER.sub(_HELD["/"], text)
    try:
        key = text.translate(_KEYS)
    except _Composing:
        key = "".join(map(_mark, unicodedata.normalize("NFKC", text).casefold()))
    return _ZEROS.sub(lambda match: match[0].rstrip("0").rstrip("."), key) if "." in key else key


# Stand for the marks that a key keeps; no text has these characters.
_HELD = dict(zip(".-/: ", "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4", strict=True))
_MARKS = {held: mark for mark, held in _HELD.items()}
_ABOVE = re.compile("[²³¹¼-¾⁰-₉①-⒛⓪-⓿❶-➓]")  # numbers by themselves: ①5天 is not 15天, and 10⁹ is not 109
_BETWEEN = re.compile(r"[0-9０-９]\W+(?=[0-9０-９])")
# The hyphen is a sign in HBsAg(-), HBsAg-, -2 and BE-2.5, but not in the name IL-6. Points are \ufdd0 by now.
_SIGN = re.compile(
    r"[(（][-－−–—][)）]|(?<![A-Za-z－−–—-])[-－−](?=\d)|[-－−](?=\d+(?:\ufdd0\d|mmol|[°℃%]))|(?<=\w)[-－−](?![\w－−–—-])"
)
_PER = re.compile(r"[/／](?=\s*(?:kg|d|h|min|次|日|天|周|公斤|千克|小时|分))", re.IGNORECASE)  # mg/kg/d
# Zeros at the end of a decimal number that a unit follows: 7.10 without one may be a day of July.
_ZEROS = re.compile(r"(?<=\d)\.\d*0(?=[a-z%‰°μ毫微克升片粒袋支滴度厘])")


def _separated(match: re.Match[str]) -> str:
    """A digit, and one character for what separates it from the next digit; a comma of thousands separates nothing."""
    digit, between = match[0][0], unicodedata.normalize("NFKC", match[0][1:])
    if any(dash in between for dash in "-−–—―〜~"):
        return digit + _HELD["-"]
    if any(unicodedata.category(c)[0] == "S" for c in between):  # 3+5
        return match[0]
    if between == "," and _THOUSANDS.fullmatch(match.string[max(0, match.start() - 3) : match.end() + 4]):
        return digit
    return digit + _HELD["." if between in (".", "·") else next((mark for mark in "/:" if mark in between), " ")]


_THOUSANDS = re.compile(r"(?:.*\D)?\d{1,3}[,，]\d{3}(?:\D.*)?", re.DOTALL)


def _mark(c: str) -> str:
    return _MARKS.get(c) or (c if unicodedata.category(c)[0] in "LNS" or c in "%‰" else "")


class _Composing(Exception):
    """A character that NFKC may join to the one before it: the text cannot be read one by one."""


class _Keys(dict[int, str]):
    def __missing__(self, code: int) -> str:
        plain = unicodedata.normalize("NFKC", chr(code))
        # Marks, and the vowels and finals of Hangul; nothing else composes with what stands before it.
        if any(unicodedata.category(c)[0] == "M" or "\u1160" <= c <= "\u11ff" for c in plain):
            raise _Composing
        self[code] = "".join(map(_mark, plain.casefold()))
        return self[code]


_KEYS = _Keys()


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
