"""Whether an answer is grounded in its passage, by its words alone: numbers, names, negations and shared characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from fractions import Fraction

from pedgpt.corpus.rows import either, pattern, templates

_FORMS = templates("support")
_WORDS = {name: either(words) for name, words in _FORMS.items() if isinstance(words, list)}
_HAN = re.compile(r"[\u3400-\u9fff]+")
_SENTENCE = re.compile(r"[^。！？；!?;\n]+")
_LATIN = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)*")
_PARTICLES = re.compile(f"[{_FORMS['particles']}]")
_MANNERS = re.compile(f"{_WORDS['manners']}|{_PARTICLES.pattern}")

# What a unit counts, and how many of it: 3天 and 72小时 are 4,320 minutes, 3次 is 3 of 次.
UNITS = {unit: (unit, Fraction(1)) for unit in _FORMS["counters"].split()} | {
    unit: (kind, Fraction(factor)) for units, (kind, factor) in _FORMS["units"].items() for unit in units.split()
}
UNIT = either(UNITS)
_ARABIC = str.maketrans("零〇一二两三四五六七八九", "001223456789")
_HAN_DIGITS, _DIGITS = "[零〇一二两三四五六七八九十百千万亿]{1,20}", r"\d{1,20}"
_VALUE = rf"(?:{_DIGITS}(?:\.{_DIGITS})?[百千万亿]?|半|{_HAN_DIGITS}(?:点{_HAN_DIGITS})?)"
_VALUES = re.compile(_VALUE)
_NUMBER = re.compile(
    rf"(?P<whole>{_VALUE})分之(?P<part>{_VALUE})|(?<![A-Za-z\d.])(?<![A-Za-z]-)(?:(?=\d)|(?<![几数多]))"
    rf"(?P<values>{_VALUE}(?:[ ]?[-–—~至到、或]+[ ]?{_VALUE})*)[多余来]?[ ]?"
    rf"(?P<unit>(?:{UNIT})(?!(?<=[A-Za-z])[A-Za-z]))?(?P<half>半(?![天年日夜]))?"
)
_NO_NUMBER = re.compile("百日咳|[一二三四五六]年级|四周[围边]")
_LISTED = re.compile(r"[①-⑳]|(?:^|(?<=[\n。；;:：]))[ \t]*[(（]?\d{1,2}[.)）、](?!\d)", re.MULTILINE)  # 1. of a list
_TURNING = f"(?:{_WORDS['negations']})(?=(?:{_WORDS['fillers']})*(?:{_WORDS['advice']}))"
_ADVISED = f"(?:{_WORDS['forbidding']}|{_TURNING}|{_WORDS['advice']})"
_ADVICE = re.compile(
    rf"(?P<words>{_ADVISED}(?:{_ADVISED}|{_WORDS['fillers']})*)(?P<aim>[\u3400-\u9fffA-Za-z0-9、]{{2,24}})"
)


@dataclass(frozen=True, slots=True)
class Support:
    """How well a passage supports an answer."""

    share: float  # of the answer's content (pairs of Chinese characters, Latin words) that the passage has, 0 to 1
    weakest: float  # the lowest share of a sentence of medicine of at least eight pairs; 1 if there is none
    # "numbers" with their units and "terms" (names of drugs, Latin names with a digit) that the passage does not give,
    # and advice that it gives the other way round ("turned round").
    missing: dict[str, list[str]]

    def ok(self, min_share: float = 0.6) -> bool:
        """Nothing missing or turned round, `min_share` of the whole supported, and half that of every sentence."""
        return not any(self.missing.values()) and self.share >= min_share and self.weakest >= min_share / 2

    def describe(self) -> str:
        """What is missing, in one line."""
        named = [f"{name}: {'、'.join(values)}" for name, values in self.missing.items() if values]
        return "; ".join([f"share {self.share:.2f}, weakest sentence {self.weakest:.2f}", *named])


def support(answer: str, passage: str, *, question: str = "") -> Support:
    """Compare an answer's words with its passage's; what the question says already counts neither for nor against.

    Numbers are compared by value and unit: 三天 is 3天 and 72小时, 30% is 百分之三十. Names of drugs are known by their
    endings. It is a check of words, not of meaning. It cannot see: the right words in the wrong relation (one drug's
    indication given to another, 不到3天 for 超过3天); a symptom or a drug exchanged for another that the passage names
    too; negations other than of advice (没有发热 for 发热). Synonyms cost share, and advice for another case than the
    passage's counts as turned round: what it refuses may still be right.
    """
    answer, passage, question = (
        unicodedata.normalize("NFKC", _LISTED.sub(" ", text)) for text in (answer, passage, question)
    )
    drugs = [match[0] for match in pattern("support", "drugs").finditer(answer)]
    named = drugs + [word for word in _LATIN.findall(answer) if re.search(r"\d", word)]  # B12, EV71
    given = f"{passage}\n{question}"
    known, asked = ({*_grams(text), *_grams(_PARTICLES.sub("", text))} for text in (passage, question))
    have, total, weakest = 0, 0, 1.0
    for sentence in _SENTENCE.findall(answer):
        # Numbers with a unit are compared by value.
        counted = _NUMBER.sub(lambda match: " " if match["part"] or match["unit"] else match[0], sentence)
        content = [gram for gram in _grams(_MANNERS.sub(" ", counted)) if gram in known or gram not in asked]
        supported = sum(gram in known for gram in content)
        have, total = have + supported, total + len(content)
        if len(content) >= 8 and pattern("support", "medical").search(sentence):
            weakest = min(weakest, supported / len(content))
    # Without a unit on either side, the value alone counts.
    meant = {meaning for _, value, unit in numbers(given) for meaning in [("any", value), meaning_of(value, unit)]}
    missing = {
        "numbers": [
            written for written, value, unit in numbers(answer)
            if meant.isdisjoint([("", value), meaning_of(value, unit)] if unit else [("any", value)])
        ],
        "terms": [name for name in dict.fromkeys(named) if name.casefold() not in given.casefold()],
        "turned round": list(_flips(answer, passage)),
    }  # fmt: skip
    return Support(have / total if total else 0.0, weakest, missing)


def _grams(text: str) -> list[str]:
    """Latin words and pairs of neighbouring Chinese characters."""
    pairs = [run[i : i + 2] for run in _HAN.findall(text) for i in range(len(run) - 1)]
    return [word.casefold() for word in _LATIN.findall(text)] + pairs


def meaning_of(value: Fraction, unit: str) -> tuple[str, Fraction]:
    """What a number with its unit counts, and how many of it; "" without a unit."""
    kind, factor = UNITS.get(unit, ("", Fraction(1)))
    return kind, value * factor


def numbers(text: str) -> list[tuple[str, Fraction, str]]:
    """Numbers as written, their values and units, in order.

    Chinese ones only with a unit (三天, not 三凹征), which a range shares: 三至五天 is 3天 5天.
    """
    # 一天三次 is 每日三次
    text = re.sub(r"[1一][天日](?=[1-9一二两三四五六]次)", "每日", _NO_NUMBER.sub(" ", text))
    found: list[tuple[str, Fraction, str]] = []
    for match in _NUMBER.finditer(text):
        if match["part"]:
            found.append((match[0], 100 * _value(match["part"]) / (_value(match["whole"]) or 1), "%"))
            continue
        unit, half = match["unit"] or "", Fraction(1, 2) if match["half"] else 0
        dose = text[match.start() - 1 : match.start()] in tuple("天日周月时每")
        for written in _VALUES.findall(match["values"]):
            # 一次 and 一个 are seldom counts, and 一度 is once; but 每日一次 is a dose.
            idle = written == "一" and unit in tuple("次个度期级种") and not dose
            if written[0].isdecimal() or (unit and not idle):
                found.append((f"{written}{unit}", _value(written) + half, unit))
    return found


def _value(written: str) -> Fraction:
    """A number in Arabic or Chinese digits, with a fraction or without: 3万2千 is 32,000."""
    if written == "半":
        return Fraction(1, 2)
    whole, _, decimals = written.translate(_ARABIC).partition("点")
    return _integer(whole) + Fraction(f"0.{re.sub('[^0-9]', '0', decimals) or 0}")


def _integer(written: str) -> Fraction:
    for unit in "亿万千百十":
        many, found, rest = written.rpartition(unit)
        if found:
            return _integer(many or "1") * int(unicodedata.numeric(unit)) + _integer(rest or "0")
    return Fraction(written)


def _flips(answer: str, passage: str) -> Iterator[str]:
    """Advice of the answer whose aim the passage has with the opposite direction, and more of it than with the same."""
    given = list(_advices(passage))
    for advice, positive, aim in _advices(answer):
        overlap = {True: 0, False: 0}
        for _, other, other_aim in given:
            common = SequenceMatcher(None, aim, other_aim, autojunk=False).find_longest_match().size
            overlap[other != positive] = max(overlap[other != positive], common)
        if overlap[True] >= min(3, len(aim)) and overlap[True] > overlap[False]:
            yield advice


def _advices(text: str) -> Iterator[tuple[str, bool, str]]:
    """Each advice as written, whether it is for its aim (not against it), and the aim."""
    for match in (match for sentence in _SENTENCE.findall(text) for match in _ADVICE.finditer(sentence)):
        turned = re.findall(f"{_WORDS['forbidding']}|{_WORDS['negations']}", match["words"])
        yield match[0], len(turned) % 2 == 0, match["aim"]
