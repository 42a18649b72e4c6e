"""One writing, no personal data, no broken rows: what every text and record goes through."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from datetime import date
from functools import cache
from html.entities import html5

from pedgpt.corpus.rows import answers, pattern, question, templates, texts
from pedgpt.data.records import Document, PreferencePair, Record

TOO_SHORT, TOO_LONG, NOT_CHINESE = "too short", "too long", "not Chinese"
BROKEN, NO_QUESTION = "broken text", "empty question"
EMPTY, EQUAL = "empty message", "chosen equals rejected"  # what no reader of ours takes

# Full-width letters and digits; line ends and spaces of other kinds; controls, zero-width and private-use characters
# and lone surrogates, which go.
_PLAIN = {chr(c): chr(c - 0xFEE0) for start, end in ("０９", "ＡＺ", "ａｚ") for c in range(ord(start), ord(end) + 1)}
_PLAIN |= dict.fromkeys("\x0b\x0c\r\x85\u2028\u2029", "\n")
_PLAIN |= dict.fromkeys("\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u202f\u205f\u3000", " ")
_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\uf8ff\U000e0000-\U000e007f\U000f0000-\U0010ffff"
)
_ODD = re.compile(f"[{_INVISIBLE}{''.join(_PLAIN)}]")
_ENTITY = re.compile(r"&(?:amp;)*(#\d{1,7}|#x[0-9a-f]{1,6}|[a-z]{2,8}\d{0,2});", re.IGNORECASE)
_TAG = re.compile(r"[ \t]*<(?:br\s*/?|/?p(?:\s[^<>\n]{0,200})?)>[ \t]*", re.IGNORECASE)
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_SPACES = re.compile(r"(?<=[^\s|])( ) +(?=[^\s|])|[ \t]+(?=\n)|(?<=\n\n)\n+")
_REPEATED = re.compile(r"([。，、；：！？])\1+|([!?,;])\2{2,}|(～)～+|(~)~{3,}|(\.\.\.)\.+")


def normalize(text: str) -> str:
    """The text as all of the corpus is written; idempotent.

    NFC; full-width letters and digits become ASCII, while Chinese punctuation stays; invisible and private-use
    characters go; HTML entities, <br> and <p> become what they stand for; runs of spaces, of empty lines and of one
    punctuation mark become short. … and —, and between backticks all but invisible characters, stay; so do indents.
    """
    for _ in range(10):  # what one step uncovers (&lt;br&gt;) is the next one's
        before = text
        text = unicodedata.normalize("NFC", text).replace("\r\n", "\n")
        text = re.sub(r"(\A|\n)\u3000+", r"\1", text)  # the indent of a Chinese paragraph
        text = re.sub(r"(?<=\d)．(?=\d)", ".", _ODD.sub(lambda match: _PLAIN.get(match[0], ""), text))
        text = "".join(part if i % 2 else _tidy(part) for i, part in enumerate(_CODE.split(text))).strip()
        if text == before:
            break
    return text


def _tidy(text: str) -> str:
    # Of names only those that are one: unescape() takes &ampamp; for &amp and amp;
    text = _ENTITY.sub(lambda m: html.unescape(f"&{m[1]};") if m[1][0] == "#" or f"{m[1]};" in html5 else m[0], text)
    return _REPEATED.sub(lambda match: match[match.lastindex or 0], _SPACES.sub(r"\1", _TAG.sub("\n", text)))


_HAN = re.compile("[々〆\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]+")


def chinese_share(text: str) -> float:
    """Share of Chinese characters among the letters (categories L*); 1.0 without letters: nothing is foreign then."""
    rest = _HAN.sub("", text)
    chinese = len(text) - len(rest)
    letters = chinese + sum(map(str.isalpha, rest))
    return chinese / letters if letters else 1.0


def scrub(text: str) -> tuple[str, Counter[str]]:
    """The text with personal data replaced by placeholders like 【电话】, and how many of each kind there were.

    电话: mobile numbers and landlines in their usual spellings, but no hotlines. 身份证号: of 18 digits with a valid
    date and checksum (after the word 身份证 without one too), or of 15 with a valid date. 邮箱. 微信号 and QQ号 where
    introduced as such. 姓名 where introduced (我叫, 姓名：, 孩子叫) and made of a known surname and one or two given
    characters with an end behind; other names stay. Traditional characters count as simplified ones; numbers of
    Taiwan, Hong Kong and Macau are known by their country code or the word before them. Doses and counts stay. The
    patterns are in templates/quality.toml.
    """
    rules = [rule for where, kinds in _rules() if where.search(text) for rule in kinds]
    found: Counter[str] = Counter()
    plain = simplified(text) if rules else ""
    for kind, form in rules:
        accepted = _ACCEPTED.get(kind, bool)
        for match in reversed([match for match in form.finditer(plain) if accepted(match)]):
            start, end = match.span("value")
            text, plain = (f"{said[:start]}【{kind}】{said[end:]}" for said in (text, plain))
            found[kind] += 1
    return text, found


@cache
def _rules() -> list[tuple[re.Pattern[str], list[tuple[str, re.Pattern[str]]]]]:
    """Where each group of kinds is sought, and the kinds with their patterns."""
    words, found = templates("quality"), []
    for rule in words["personal"]:
        forms = ((kind, re.sub("<([a-z]+)>", lambda m: words.get(m[1], m[0]), form)) for kind, form in rule["kinds"])
        found.append((re.compile(rule["where"]), [(kind, re.compile(form)) for kind, form in forms]))
    return found


def simplified(text: str) -> str:
    """The text, of equal length, in simplified characters and half width: for comparisons only, never to be stored."""
    return text.translate(_SIMPLE)


_SIMPLE = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20, 0x2010: 0x2D, 0x2013: 0x2D, 0x2014: 0x2D}
_SIMPLE |= str.maketrans(templates("quality")["traditional"], templates("quality")["simplified"])


def _is_amount(match: re.Match[str]) -> bool:
    return bool(pattern("quality", "amount").match(match.string, match.end("value")))


def _is_of_a_person(match: re.Match[str]) -> bool:
    before = match.string[max(0, match.start("value") - 60) : match.start("value")]
    if pattern("quality", "of_a_thing").search(before) or _is_amount(match):
        return False
    is_round = re.sub(r"\D", "", match["value"]).endswith("000000")
    is_count = is_round or pattern("quality", "amount_of").search(before)
    return not is_count or bool(pattern("quality", "called").search(before[-8:]))


def _is_identity(match: re.Match[str]) -> bool:
    number = match["value"].replace(" ", "").upper()
    if number[0].isalpha():
        return True
    try:
        day = date.fromisoformat(number[6:14] if len(number) == 18 else f"19{number[6:12]}")
    except ValueError:
        return False
    if len(number) == 15:
        return _is_of_a_person(match)
    total = sum(int(digit) * 2 ** (17 - i) for i, digit in enumerate(number[:17]))
    # A mistyped number of a person is one too.
    said = re.search("身[份分]证[字号码为是:： ]*$", match.string[: match.start("value")][-12:])
    return 1850 <= day.year <= 2100 and (bool(said) or "10X98765432"[total % 11] == number[17])


def _is_account(match: re.Match[str]) -> bool:
    if any(mark in match["colon"] for mark in ":是为"):
        return True
    is_dose = re.search(r"(?i)\d(?:m?g|ml|iu|u)$", match["value"])
    return any(map(str.isdigit, match["value"])) and not (match["plus"] and (is_dose or _is_amount(match)))


_ACCEPTED = {"身份证号": _is_identity, "电话": _is_of_a_person, "微信号": _is_account}

_DRAWN = "-.=_|*#~+─━│·…"  # what tables and figures are made of


def fault(record: Record, *, min_characters: int, max_characters: int, min_chinese: float) -> tuple[str, str] | None:
    """Why a normalised record is unfit: (a fixed phrase, what was found); None if it is fit.

    `min_characters` is of what is learnt: a document's text, a conversation's answers together, a pair's shorter
    reply. `max_characters` is of a whole conversation, or a pair with its longer reply; `min_chinese` as in
    chinese_share.
    """
    said, lengths = texts(record), [len(text) for text in answers(record)]
    learnt, whole = sum(lengths), sum(map(len, said))
    if isinstance(record, PreferencePair):
        learnt, whole = min(lengths), whole - min(lengths)
        if record.chosen.strip() == record.rejected.strip():
            return EQUAL, repr(record.chosen[:40])
    if not isinstance(record, Document) and not any(map(str.isalnum, question(record))):
        return NO_QUESTION, repr(question(record)[:20])
    if blank := [i for i, text in enumerate(said, 1) if not text.strip()]:
        return EMPTY, f"text {blank[0]} of {len(said)}"
    if learnt < min_characters:
        return TOO_SHORT, f"{learnt} characters, fewer than {min_characters}"
    if whole > max_characters and not isinstance(record, Document):
        return TOO_LONG, f"{whole} characters, more than {max_characters}"
    for text in said:
        if match := pattern("quality", "broken").search(text):
            return BROKEN, repr(text[max(0, match.start() - 5) : match.end() + 5])
        character, times = Counter(text).most_common(1)[0]
        if len(text) >= 10 and 2 * times > len(text) and character not in _DRAWN and not character.isspace():
            return BROKEN, f"{character!r} {times} times in {len(text)} characters"
    share = chinese_share("\n".join(said))
    return (NOT_CHINESE, f"{share:.0%} Chinese, less than {min_chinese:.0%}") if share < min_chinese else None
