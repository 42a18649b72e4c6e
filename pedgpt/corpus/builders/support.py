"""Whether an answer is grounded in its passage, by its words alone: numbers, names, negations and shared characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import NamedTuple

from pedgpt.corpus.rows import either, pattern, templates

_FORMS = templates("support")
_WORDS = {name: either(words) for name, words in _FORMS.items() if isinstance(words, list)}
_HAN = re.compile(r"[\u3400-\u9fff]+")
_SENTENCE = re.compile(r"[^。！？；!?;\n]+")
_LATIN = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)*")
_PARTICLES = re.compile(f"[{_FORMS['particles']}]")
_MANNERS = re.compile(f"{_WORDS['manners']}|{_PARTICLES.pattern}")

# What a unit counts, and how many of it.
UNITS: dict[str, list[tuple[str, Fraction]]] = {
    unit: [(kind, Fraction(factor)) for kind, factor in counts.items()]
    for units, counts in [*((unit, {unit: 1}) for unit in _FORMS["counters"].split()), *_FORMS["units"].items()]
    for unit in units.split()
}
UNIT = either(UNITS)
# Not the unit that it looks like: 百日咳, 三年级, 三成为, 四周围.
_NO_UNIT = r"(?!(?<=日)咳|(?<=年)级|(?<=成)[为年熟人分]|(?<=周)[围边]|(?<=种)植|(?<=[A-Za-z])[A-Za-z])"
_DIGIT = "[一二两三四五六七八九]"
_ARABIC = str.maketrans("零〇一二两三四五六七八九", "001223456789")
_INTEGER, _DIGITS = r"[零〇一二两三四五六七八九十百千万亿]{1,20}", r"\d{1,20}"  # bounded for the sake of hostile text
_DECIMAL = rf"{_INTEGER}(?:点{_INTEGER})?"
_NUMBER = re.compile(
    rf"(?P<share>(?:{_INTEGER}|{_DIGITS})分之(?:{_DECIMAL}|{_DIGITS}(?:\.{_DIGITS})?)|一半)"
    rf"|(?P<value>(?<![A-Za-z\d.])(?<![A-Za-z]-){_DIGITS}(?:,\d{{3}}){{0,5}}(?:\.{_DIGITS})?[百千万亿]?"
    rf"|(?<![几数多])(?:半|{_DECIMAL}))"
    rf"(?P<half>个半)?[多余来]?[ ]?(?P<unit>(?:{UNIT}){_NO_UNIT})?(?P<after>半(?![天年日夜]))?"
)
_LISTED = re.compile(r"[①-⑳]|(?:^|(?<=[\n。；;:：]))[ \t]*[(（]?\d{1,2}[.)）、](?!\d)", re.MULTILINE)  # 1. of a list
_RANGE = re.compile("[ ]?[-–—~至到、或]+[ ]?")
_TURNING = f"(?:{_WORDS['negations']})(?=(?:{_WORDS['fillers']})*(?:{_WORDS['advice']}))"
_ADVISED = f"(?:{_WORDS['forbidding']}|{_TURNING}|{_WORDS['advice']})"
_ADVICE = re.compile(
    rf"(?P<words>{_ADVISED}(?:{_ADVISED}|{_WORDS['fillers']})*)(?P<aim>[\u3400-\u9fffA-Za-z0-9、]{{2,24}})"
)
_MOST_ADVICE = 200


@dataclass(frozen=True, slots=True)
class Support:
    """How well a passage supports an answer.

    share            of the answer's content (pairs of Chinese characters, Latin words) that the passage has, 0 to 1
    missing_numbers  numbers, with their units, that the passage does not give
    missing_terms    names (drugs, and terms of the lexicon) that the passage does not name
    flips            advice that the passage gives the other way round
    weakest          the lowest share of a sentence of medicine of at least eight pairs; 1 if there is none
    """

    share: float
    missing_numbers: tuple[str, ...]
    missing_terms: tuple[str, ...]
    flips: tuple[str, ...]
    weakest: float

    def ok(self, min_share: float = 0.6) -> bool:
        """Nothing missing or turned round, `min_share` of the whole supported, and half that of every sentence."""
        nothing = not (self.missing_numbers or self.missing_terms or self.flips)
        return nothing and self.share >= min_share and self.weakest >= min_share / 2

    def describe(self) -> str:
        """What is missing, in one line."""
        found = {"numbers": self.missing_numbers, "terms": self.missing_terms, "turned round": self.flips}
        named = [f"{name}: {'、'.join(values)}" for name, values in found.items() if values]
        return "; ".join([f"share {self.share:.2f}, weakest sentence {self.weakest:.2f}", *named])


def support(answer: str, passage: str, *, question: str = "", lexicon: Collection[str] = ()) -> Support:
    """Compare an answer's words with its passage's; what the question says already counts neither for nor against.

    Numbers are compared by value and unit: 三天 is 3天 and 72小时, 30% is 百分之三十. Names of drugs are known by their
    endings; of `lexicon`, a collection of medical terms, every term in the answer must be in the passage. The first 200
    pieces of advice of either text are compared.

    It is a check of words, not of meaning. It cannot see: the right words in the wrong relation (cause for effect, one
    drug's indication given to another, 不到3天 for 超过3天); a symptom or a drug exchanged for another that the passage
    names too; negations other than of advice (没有发热 for 发热); a name that is neither in the lexicon nor ends like a
    drug's, if the rest of its sentence is from the passage. Synonyms cost share: what it refuses may still be right.
    """
    answer, passage, question = (
        unicodedata.normalize("NFKC", _LISTED.sub(" ", text)) for text in (answer, passage, question)
    )
    known, asked = _known(passage), _known(question)
    have, total, weakest = 0, 0, 1.0
    for sentence in _SENTENCE.findall(answer):
        content = [gram for gram in _content(sentence) if gram in known or gram not in asked]
        supported = sum(gram in known for gram in content)
        have, total = have + supported, total + len(content)
        if len(content) >= 8 and pattern("support", "medical").search(sentence):
            weakest = min(weakest, supported / len(content))
    return Support(
        share=have / total if total else 0.0,
        missing_numbers=tuple(_missing_numbers(answer, numbers(passage) + numbers(question))),
        missing_terms=tuple(_missing_terms(answer, f"{passage}\n{question}".casefold(), lexicon)),
        flips=tuple(_flips(answer, passage)),
        weakest=weakest,
    )


def _pairs(text: str) -> list[str]:
    return [run[i : i + 2] for run in _HAN.findall(text) for i in range(len(run) - 1)]


def _grams(text: str) -> list[str]:
    """Latin words and pairs of neighbouring Chinese characters."""
    return [word.casefold() for word in _LATIN.findall(text)] + _pairs(text)


def _known(text: str) -> set[str]:
    return {*_grams(text), *_pairs(_PARTICLES.sub("", text))}


def _content(text: str) -> list[str]:
    # Numbers with a unit are compared by value.
    counted = _NUMBER.sub(lambda match: " " if match["share"] or match["unit"] else match[0], text)
    return _grams(_MANNERS.sub(" ", counted))


def _missing_numbers(answer: str, given: list[tuple[str, Fraction, str]]) -> Iterator[str]:
    known = {meaning for _, value, unit in given for meaning in [("any", value), *meanings(value, unit)]}
    for written, value, unit in numbers(answer):
        # Without a unit on either side, the value alone counts.
        if known.isdisjoint([("bare", value), *meanings(value, unit)] if unit else [("any", value)]):
            yield written


def meanings(value: Fraction, unit: str) -> list[tuple[str, Fraction]]:
    """What a number with its unit counts, and how many of it: 3天 and 72小时 are 4,320 minutes."""
    return [(kind, value * factor) for kind, factor in UNITS.get(unit, [("bare", Fraction(1))])]


def numbers(text: str) -> list[tuple[str, Fraction, str]]:
    """Numbers as written, their values and units, in order.

    Chinese ones only with a unit (三天, not 三凹征), which a range shares: 三至五天 is 3天 5天.
    """
    text = re.sub(r"[1一][天日](?=[1-9一二两三四五六]次)", "每日", text)  # 一天三次 is 每日三次
    found: list[tuple[str, Fraction, str]] = []
    unit, right = "", len(text)  # of the number to the right, and where that begins
    for match in reversed(list(_NUMBER.finditer(text))):
        written, value, between = match[0].strip(), match["value"], text[match.end() : right]
        before, right = unit, match.start()
        if match["share"]:
            whole, _, part = written.partition("分之")
            share = _value(part) / (_value(whole) or 1) if part else Fraction(1, 2)
            found.append((written, share * 100, "%"))
            unit = "%"
            continue
        unit = match["unit"] or ""
        if not unit and before and _RANGE.fullmatch(between):
            unit, written = before, f"{written}{before}"
        # 一次 and 一个 are seldom counts, 十分 is very, 一度 once; but 每日一次 is a dose.
        idle = value == "一" and unit in tuple("次个度期级种") and text[right - 1 : right] not in tuple("天日周月时每")
        if re.match("[0-9]", value) or (unit and not idle):
            half = Fraction(1, 2) if match["half"] or match["after"] else 0
            pair = re.fullmatch(_DIGIT * 2, value)  # 两三天: either
            found += [(written, _value(digit) + half, unit) for digit in (value if pair else [value])]
    return found[::-1]


def _value(written: str) -> Fraction:
    """A number in Arabic or Chinese digits, with a fraction or without; 二三十 is 30."""
    if written == "半":
        return Fraction(1, 2)
    whole, _, decimals = re.sub(f"{_DIGIT}(?={_DIGIT}[十百千万亿])|,", "", written).translate(_ARABIC).partition("点")
    return _integer(whole) + Fraction(f"0.{re.sub('[^0-9]', '0', decimals) or 0}")


def _integer(written: str) -> Fraction:
    """The value of Arabic digits among which 十百千万亿 stand: 3万2千 is 32,000."""
    for unit in "亿万千百十":
        many, found, rest = written.rpartition(unit)
        if found:
            return _integer(many or "1") * int(unicodedata.numeric(unit)) + _integer(rest or "0")
    return Fraction(written)


def _missing_terms(answer: str, known: str, lexicon: Collection[str]) -> Iterator[str]:
    named = [match[0] for match in pattern("support", "drugs").finditer(answer)]
    # Latin names that hold a digit are names as a whole: B12, EV71.
    named += [word for word in _LATIN.findall(answer) if re.search(r"\d", word)]
    named += [term for term in lexicon if term in answer]
    yield from (name for name in dict.fromkeys(named) if name.casefold() not in known)


class _Advice(NamedTuple):
    text: str
    positive: bool
    aim: str  # what is advised
    condition: set[str]  # the pairs of what stands before it in its sentence, if that is a condition
    bound: bool  # by its condition, or as 不推荐常规使用 leaves other use open


def _flips(answer: str, passage: str) -> Iterator[str]:
    """Advice of the answer whose aim the passage has with the opposite direction, and more of it than with the same."""
    given = list(islice(_advices(passage), _MOST_ADVICE))
    for advice in islice(_advices(answer), _MOST_ADVICE):
        overlap = {True: 0, False: 0}
        for other in given:
            opposite = other.positive != advice.positive
            elsewhere = other.bound and advice.condition and not advice.condition & other.condition
            if not (opposite and elsewhere):  # not said of another case
                overlap[opposite] = max(overlap[opposite], _common(advice.aim, other.aim))
        if overlap[True] >= min(3, len(advice.aim)) and overlap[True] > overlap[False]:
            yield advice.text


def _advices(text: str) -> Iterator[_Advice]:
    turning = f"{_WORDS['forbidding']}|{_WORDS['negations']}"
    for sentence in _SENTENCE.findall(text):
        bound = re.search(_WORDS["conditions"], sentence)
        for match in _ADVICE.finditer(sentence):
            words, before = match["words"], sentence[max(0, match.start() - 100) : match.start()]
            case = set(_pairs(before) or [before] if bound and bound.end() <= match.start() else [])
            positive = len(re.findall(turning, words)) % 2 == 0
            qualified = re.search(_WORDS["qualifiers"], words)
            yield _Advice(match[0], positive, match["aim"], case, bool(case or qualified))


def _common(a: str, b: str) -> int:
    """The length of the longest text that occurs in both."""
    best = 0
    for i in range(len(a)):
        while i + best < len(a) and a[i : i + best + 1] in b:
            best += 1
    return best
