"""Whether an answer is grounded in its passage, by its words alone: numbers, names, negations and shared characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import islice

from pedgpt.corpus.rows import templates

_HAN = re.compile(r"[\u3400-\u9fff]+")
_SENTENCE = re.compile(r"[^。！？；!?;\n]+")
_LATIN = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)*")

# What a unit counts, and how many of it. A month is a twelfth of a year of age as of a year; a year is no year of age.
UNITS: dict[str, tuple[tuple[str, Fraction | int], ...]] = {
    **dict.fromkeys(("岁", "周岁"), (("岁", 12),)),
    "年": (("年", 12),),
    **dict.fromkeys(("个月", "月龄", "月"), (("岁", 1), ("年", 1))),
    **dict.fromkeys(("周", "星期", "个星期", "礼拜"), (("分", 7 * 24 * 60),)),
    **dict.fromkeys(("天", "日"), (("分", 24 * 60),)),
    **dict.fromkeys(("小时", "个小时", "h"), (("分", 60),)),
    **dict.fromkeys(("分钟", "min"), (("分", 1),)),
    **dict.fromkeys(("秒", "秒钟"), (("分", Fraction(1, 60)),)),
    **dict.fromkeys(("°C", "°c", "℃", "摄氏度", "度"), (("度", 1),)),
    **dict.fromkeys(("kg", "公斤", "千克"), (("克", 1000),)),
    **dict.fromkeys(("g", "克"), (("克", 1),)),
    **dict.fromkeys(("mg", "毫克"), (("克", Fraction(1, 1000)),)),
    **dict.fromkeys(("μg", "微克"), (("克", Fraction(1, 10**6)),)),
    **dict.fromkeys(("L", "升"), (("升", 1),)),
    **dict.fromkeys(("ml", "mL", "毫升"), (("升", Fraction(1, 1000)),)),
    **dict.fromkeys(("m", "米"), (("米", 1),)),
    **dict.fromkeys(("cm", "厘米"), (("米", Fraction(1, 100)),)),
    **dict.fromkeys(("mm", "毫米"), (("米", Fraction(1, 1000)),)),
    "%": (("%", 1),),
    "成": (("%", 10),),
    **{unit: ((unit, 1),) for unit in "次 倍 片 粒 滴 支 袋 包 盒 瓶 丸 勺 剂 顿 个 型 级 期 例 种".split()},
}
UNIT = "|".join(sorted(map(re.escape, UNITS), key=len, reverse=True))
# Not the unit that it looks like: 百日咳, 三年级, 三成为, 四周围.
_NO_UNIT = r"(?!(?<=日)咳|(?<=年)级|(?<=成)[为年熟人分]|(?<=周)[围边]|(?<=种)植|(?<=[A-Za-z])[A-Za-z])"
_CHINESE = "零〇一二两三四五六七八九十百千万亿"
_INTEGER, _DIGITS = rf"[{_CHINESE}]{{1,20}}", r"\d{1,20}"  # no longer, so that hostile text takes no time
_DECIMAL = rf"{_INTEGER}(?:点{_INTEGER})?"
_NUMBER = re.compile(
    rf"(?P<share>(?:{_INTEGER}|{_DIGITS})分之(?:{_DECIMAL}|{_DIGITS}(?:\.{_DIGITS})?)|一半)"
    rf"|(?P<value>(?<![A-Za-z\d.])(?<![A-Za-z]-){_DIGITS}(?:,\d{{3}}){{0,5}}(?:\.{_DIGITS})?[百千万亿]?"
    rf"|(?<![几数多])(?:半|{_DECIMAL}))"
    rf"(?P<half>个半)?[多余来]?[ ]?(?P<unit>(?:{UNIT}){_NO_UNIT})?(?P<after>半(?![天年日夜]))?"
)
_LISTED = re.compile(r"[①-⑳]|(?:^|(?<=[\n。；;:：]))[ \t]*[(（]?\d{1,2}[.)）、](?!\d)", re.MULTILINE)  # 1. of a list
_RANGE = re.compile("[ ]?[-–—~至到、或]+[ ]?")
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
    missing_numbers: tuple[str, ...] = ()
    missing_terms: tuple[str, ...] = ()
    flips: tuple[str, ...] = ()
    weakest: float = 1.0

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
    known, asked = _pairs_of(passage), _pairs_of(question) | set(map(str.casefold, _LATIN.findall(question)))
    known |= set(map(str.casefold, _LATIN.findall(passage)))
    have, total, weakest = 0, 0, 1.0
    for sentence in _SENTENCE.findall(answer):
        content = [pair for pair in _content(sentence) if pair in known or pair not in asked]
        supported = sum(pair in known for pair in content)
        have, total = have + supported, total + len(content)
        if len(content) >= 8 and re.search(templates("support")["medical"], sentence):
            weakest = min(weakest, supported / len(content))
    return Support(
        share=have / total if total else 0.0,
        missing_numbers=tuple(_missing_numbers(answer, passage, question)),
        missing_terms=tuple(_missing_terms(answer, passage + "\n" + question, lexicon)),
        flips=tuple(_flips(answer, passage)),
        weakest=weakest,
    )


def _pairs(text: str) -> list[str]:
    return [run[i : i + 2] for run in _HAN.findall(text) for i in range(len(run) - 1)]


def _pairs_of(text: str) -> set[str]:
    """All pairs of neighbours, with the particles and without them."""
    return {*_pairs(text), *_pairs(re.sub(f"[{templates('support')['particles']}]", "", text))}


def _content(text: str) -> list[str]:
    words = [word.casefold() for word in _LATIN.findall(text)]
    text = _NUMBER.sub(lambda match: " " if match["share"] or match["unit"] else match[0], text)  # compared by value
    return words + _pairs(_manners().sub(" ", text))


def _missing_numbers(answer: str, *given: str) -> Iterator[str]:
    there = [number for text in given for number in numbers(text)]
    known = {meaning for _, value, unit in there for meaning in [("any", value), *meanings(value, unit)]}
    for written, value, unit in numbers(answer):
        # Without a unit on either side, the value alone counts.
        if known.isdisjoint([("bare", value), *meanings(value, unit)] if unit else [("any", value)]):
            yield written


def meanings(value: Fraction, unit: str) -> list[tuple[str, Fraction]]:
    """What a number with its unit counts, and how many of it: 3天 and 72小时 are 4,320 minutes."""
    return [(kind, value * factor) for kind, factor in UNITS.get(unit, (("bare", 1),))]


def numbers(text: str) -> list[tuple[str, Fraction, str]]:
    """Numbers as written, their values and units, in order.

    Chinese ones only with a unit (三天, not 三凹征), which a range shares: 三至五天 is 3天 5天.
    """
    text = re.sub(r"[1一][天日](?=[1-9一二两三四五六]次)", "每日", text)  # 一天三次 is 每日三次
    found: list[tuple[str, Fraction, str]] = []
    unit, right = "", len(text)  # of the number to the right, and where that begins
    for match in reversed(list(_NUMBER.finditer(text))):
        written = match[0].strip()
        if match["share"]:
            share = Fraction(1, 2)
            if "分之" in written:
                whole, part = map(_value, written.split("分之"))
                share = part / whole if whole else Fraction(0)
            found.append((written, share * 100, "%"))
            unit, right = "%", match.start()
            continue
        between = text[match.end() : right]
        own = match["unit"] or ""
        if not own and unit and _RANGE.fullmatch(between):
            own, written = unit, f"{written}{unit}"
        digits = match["value"][0].isdigit() and match["value"][0].isascii()
        # 一次 and 一个 are seldom counts, 十分 is very, 一度 once; but 每日一次 is a dose.
        often = match.start() and text[match.start() - 1] in "天日周月时每"
        idle = match["value"] == "一" and own in ("次", "个", "度", "期", "级", "种") and not often
        if digits or (own and not idle):
            half = Fraction(1, 2) if match["half"] or match["after"] else Fraction(0)
            pair = re.fullmatch("[一二两三四五六七八九]{2}", match["value"])
            values = [_value(c) for c in match["value"]] if pair else [_value(match["value"])]  # 两三天: either
            found += [(written, value + half, own) for value in values]
        unit, right = own, match.start()
    return found[::-1]


def _value(written: str) -> Fraction:
    """An integer or decimal number in Arabic or Chinese digits."""
    if written == "半":
        return Fraction(1, 2)
    whole, _, decimals = written.replace(",", "").partition("点")
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([百千万亿]?)", whole):
        return Fraction(match[1]) * {"": 1, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}[match[2]]
    digits = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
    tenths = sum(Fraction(digits.get(c, 0), 10**i) for i, c in enumerate(decimals, 1))
    if not re.search("[十百千万亿]", whole):
        return Fraction(int("".join(str(digits[c]) for c in whole))) + tenths
    total = section = digit = 0
    for c in whole:
        if c in "万亿":
            total, section, digit = (total + section + digit) * (10**4 if c == "万" else 10**8), 0, 0
        elif c in "十百千":
            section, digit = section + (digit or 1) * {"十": 10, "百": 100, "千": 1000}[c], 0
        else:
            digit = digits[c]
    return Fraction(total + section + digit) + tenths


def _missing_terms(answer: str, known: str, lexicon: Collection[str]) -> Iterator[str]:
    named = [match[0] for match in re.finditer(templates("support")["drugs"], answer)]
    # Latin names that hold a digit are names as a whole: B12, EV71.
    named += [word for word in _LATIN.findall(answer) if re.search(r"\d", word)]
    named += [term for term in lexicon if term in answer]
    folded = known.casefold()
    yield from dict.fromkeys(name for name in named if name.casefold() not in folded)


@dataclass(frozen=True, slots=True)
class _Advice:
    text: str
    positive: bool
    aim: str  # what is advised
    condition: frozenset[str]  # the pairs of what stands before it in its sentence, if that is a condition
    qualified: bool  # 不推荐常规使用 leaves other use open


def _flips(answer: str, passage: str) -> Iterator[str]:
    """Advice of the answer whose aim the passage has with the opposite direction, and more of it than with the same."""
    given = list(islice(_advices(passage), _MOST_ADVICE))
    for advice in islice(_advices(answer), _MOST_ADVICE):
        overlap = {True: 0, False: 0}
        for other in given:
            common = _common(advice.aim, other.aim)
            opposite = other.positive != advice.positive
            bound = other.condition or other.qualified
            if opposite and bound and advice.condition and not advice.condition & other.condition:
                continue  # said of another case
            overlap[opposite] = max(overlap[opposite], common)
        if overlap[True] >= min(3, len(advice.aim)) and overlap[True] > overlap[False]:
            yield advice.text


def _advices(text: str) -> Iterator[_Advice]:
    condition = re.compile(_either("conditions"))
    turning = re.compile(f"{_either('forbidding')}|{_either('negations')}")
    qualifying = re.compile(_either("qualifiers"))
    for sentence in _SENTENCE.findall(text):
        bound = condition.search(sentence)
        for match in _advice_form().finditer(sentence):
            words, before = match["words"], sentence[max(0, match.start() - 100) : match.start()]
            case = frozenset(_pairs(before) or [before] if bound and bound.end() <= match.start() else [])
            positive = len(turning.findall(words)) % 2 == 0
            yield _Advice(match[0], positive, match["aim"], case, bool(qualifying.search(words)))


def _common(a: str, b: str) -> int:
    """The length of the longest text that occurs in both."""
    best = 0
    for i in range(len(a)):
        while i + best < len(a) and a[i : i + best + 1] in b:
            best += 1
    return best


def _either(name: str) -> str:
    return "|".join(sorted(map(re.escape, templates("support")[name]), key=len, reverse=True))


@cache
def _advice_form() -> re.Pattern[str]:
    advice, fillers = _either("advice"), _either("fillers")
    turning = f"(?:{_either('negations')})(?=(?:{fillers})*(?:{advice}))"
    one = f"(?:{_either('forbidding')}|{turning}|{advice})"
    return re.compile(rf"(?P<words>{one}(?:{one}|{fillers})*)(?P<aim>[\u3400-\u9fffA-Za-z0-9、]{{2,24}})")


@cache
def _manners() -> re.Pattern[str]:
    return re.compile(f"{_either('manners')}|[{templates('support')['particles']}]")
