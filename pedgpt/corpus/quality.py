"""One writing, no personal data, no broken rows: what every text and record goes through."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import cache
from html.entities import html5

from pedgpt.corpus.rows import question, templates, texts
from pedgpt.data.records import Conversation, Document, PreferencePair, Record

TOO_SHORT, TOO_LONG, NOT_CHINESE = "too short", "too long", "not Chinese"
BROKEN, NO_QUESTION = "broken text", "empty question"
EMPTY, EQUAL = "empty message", "chosen equals rejected"  # what no reader of ours takes

# Controls, zero-width and private-use characters, lone surrogates; separators and spaces of other widths; full width.
_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\uf8ff\U000e0000-\U000e007f\U000f0000-\U0010ffff"
)
_ODD = re.compile(f"[{_INVISIBLE}\x0b-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000０-９Ａ-Ｚａ-ｚ]")
_WIDE = {c: c - 0xFEE0 for start, end in ("０９", "ＡＺ", "ａｚ") for c in range(ord(start), ord(end) + 1)}
_NESTED = re.compile(r"&(?:(?:amp|AMP|#0{0,4}38|#[xX]0{0,4}26);)+")  # &amp;amp;lt;
_ENTITY = re.compile(r"&(?:[A-Za-z]{2,8}\d{0,2}|#\d{1,7}|#[xX][0-9A-Fa-f]{1,6});")
_TAG = re.compile(r"(?<![ \t])[ \t]*<(?:br\s*/?|/?p(?:\s[^<>\n]{0,200})?)>[ \t]*", re.IGNORECASE)
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_SPACES = re.compile(r"(?<=[^\s|])( ) +(?=[^\s|])|(?<![ \t])[ \t]+(?=\n)|(?<=\n\n)\n+")
_REPEATED = re.compile(r"([。，、；：！？])\1+|([!?,;])\2{2,}|(～)～+|(~)~{3,}|(\.\.\.)\.+")


def normalize(text: str) -> str:
    """The text as all of the corpus is written; idempotent.

    NFC; full-width letters and digits become ASCII, while Chinese punctuation stays; invisible and private-use
    characters go; HTML entities, <br> and <p> become what they stand for; runs of spaces, of empty lines and of one
    punctuation mark become short. … and —, and between backticks all but invisible characters, stay; so do indents.
    """
    for _ in range(10):  # what one step uncovers (&amp;lt;br&amp;gt;) is the next one's
        before = text
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
        if "\r" in text:
            text = text.replace("\r\n", "\n")
        if _ODD.search(text):
            text = re.sub(r"(\A|\n)\u3000+", r"\1", text)  # the indent of a Chinese paragraph
            text = _ODD.sub(_plain, text)
        if "．" in text:
            text = re.sub(r"(?<=\d)．(?=\d)", ".", text)
        if "`" in text:
            parts = _CODE.split(text)
            text = "".join(part if i % 2 else _tidy(part) for i, part in enumerate(parts)).strip()
        else:
            text = _tidy(text).strip()
        if text == before:
            break
    return text


def _plain(match: re.Match[str]) -> str:
    character = match[0]
    if ord(character) in _WIDE:
        return chr(_WIDE[ord(character)])
    if character in "\x0b\x0c\r\x85\u2028\u2029":
        return "\n"
    return " " if unicodedata.category(character) == "Zs" else ""


def _tidy(text: str) -> str:
    if "&" in text:
        text = _ENTITY.sub(_character, _NESTED.sub("&", text))
    if "<" in text:
        text = _TAG.sub(lambda match: " " if _in_table(text, match.start()) else "\n", text)
    if "  " in text or "\n\n\n" in text or " \n" in text or "\t\n" in text:
        text = _SPACES.sub(r"\1", text)
    return _REPEATED.sub(lambda match: match[match.lastindex or 0], text)


def _character(match: re.Match[str]) -> str:
    # Of names only those that are one: unescape() takes &ampamp; for &amp and amp;
    return html.unescape(match[0]) if match[0][1] == "#" or match[0][1:] in html5 else match[0]


def _in_table(text: str, place: int) -> bool:
    return text.startswith("|", text.rfind("\n", 0, place) + 1)


_HAN = re.compile("[々〆\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]+")


def chinese_share(text: str) -> float:
    """Share of Chinese characters among the letters (categories L*); 1.0 without letters: nothing is foreign then."""
    rest = _HAN.sub("", text)
    chinese = len(text) - len(rest)
    letters = chinese + sum(map(str.isalpha, rest))
    return chinese / letters if letters else 1.0


# Personal data, sought in a copy of equal length: ASCII in place of full-width forms, simplified characters in place of
# traditional ones. What goes is group "value".
_HALF = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20, 0x2010: 0x2D, 0x2013: 0x2D, 0x2014: 0x2D}
_DIGITS = re.compile(r"[0-9０-９](?:[-－—‐– 　()（）.·_]{0,2}[0-9０-９]){6}")
_CONTACT = re.compile(r"[微威薇Vv]信|[Qq]{2}|扣扣|[Ww]e[Cc]hat|[VvWw][Xx]|[+加][Vv]")
_END = r"(?!\d|[-.]\d)"
_EMAIL = re.compile(
    r"(?<![\w.%+-])(?!git@)(?P<value>[a-z0-9][\w.%+-]*@(?!example\.)(?:[a-z0-9-]+\.)+[a-z]{2,})(?![a-z0-9])",
    re.ASCII | re.IGNORECASE,
)
_IDENTITY = re.compile(
    r"(?<![0-9A-Za-z.])(?P<value>(?:1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3])\d{4}"
    r"(?: ?\d{8} ?\d{3}[0-9Xx]|\d{9}))(?![0-9A-Za-z]|\.\d)",
    re.ASCII,
)
_MOBILE = re.compile(
    r"(?<!\d)(?<!\d[-.])(?P<value>(?:\(?(?:(?:\+|00) ?)?86\)?[- ]{0,2})?"
    r"(?=1[- ]?(?:3|4[- ]?[014-9]|5[- ]?[0-35-9]|6[- ]?[2567]|7[- ]?[0-8]|8|9))"  # what is given to networks
    r"(?:\d{11}|(?:\d{3}-(?!20[0-2]\d[01])\d{8}|\d{3}([-. ·_])\d{4}\2\d{4}"  # behind 139- a date is no number
    r"|\d{4}([- ])\d{3}\3\d{4}|\d{4}([- ])\d{4}\4\d{3}|\d([- ])\d(?:\5\d){9})"
    r"(?! ?\d)))" + _END,
    re.ASCII,
)
_LANDLINE = re.compile(
    r"(?<![0-9A-Za-z])(?<!\d[-.])(?P<value>(?:(?:\+|00)86[- ]?\(?0?|\(?0)"
    r"(?:(?:10|2\d)\)?[- ]{0,2}[2-9]\d{3}|[3-9]\d{2}\)?[- ]{0,2}[2-9]\d{2,3})[- ]?\d{4}(?:(?:-|转)\d{1,5})?)" + _END,
    re.ASCII,
)
# Only after a word such as 电话: numbers without an area code, and those of Taiwan with one of two or three digits.
_LOCAL = re.compile(
    r"(?:电话|手机|座机|固话|传真|联[系络]方式|(?<![a-z])tel|phone|whatsapp)(?:号码|号|是|为|[:. ])*"
    r"(?P<value>[2-9]\d{2,3}[- ]?\d{4}|(?:886[- ]?|0)9\d\d[- ]?\d{3}[- ]?\d{3}|85[23][- ]?\d{4}[- ]?\d{4}"
    r"|\(?0[2-8]\d?\)?[- ]?\d{3,4}[- ]?\d{3,4})" + _END,
    re.ASCII | re.IGNORECASE,
)
_ABROAD = re.compile(  # Taiwan, Hong Kong, Macau
    r"(?<![0-9A-Za-z])(?P<value>(?:\+|00)(?:886[- ]?(?:\(0\))?\d{1,3}|85[23])[- ]?\d{3,4}[- ]?\d{3,4})" + _END, re.ASCII
)
_IDENTITY_ABROAD = re.compile(
    r"身[份分]证(?:字号|号码|号)?[ :是为]*(?P<value>[A-Z][12]\d{8}|[A-Z]{1,2}\d{6} ?\([0-9A]\))(?![0-9A-Za-z])",
    re.ASCII | re.IGNORECASE,
)
# Behind +V there must be a mark, a space or a number: +Vancomycin1g is a drug.
_WECHAT = re.compile(
    r"(?:[微威薇v]信|wechat|(?<![a-z])[vw]x|(?P<plus>[+加]v)(?=[ :是为\d]))(?:号码|账号|帐号|号|id)?"
    r"(?P<colon>[ :是为]*)(?P<value>[a-z][-_a-z0-9]{5,19}|[1-9]\d{4,10})(?![-_a-z0-9]|\.\d)",
    re.ASCII | re.IGNORECASE,
)
_QQ = re.compile(
    r"(?<![a-z])(?:qq|扣扣)(?:号码|账号|帐号|群号|号|群)?[ :是为]*(?P<value>[1-9]\d{4,10})(?!\d|\.\d)",
    re.ASCII | re.IGNORECASE,
)
# Before the numbers of things, in links and inside of names, digits are nobody's.
_OF_A_THING = re.compile(
    r"(?:订单|单号|编号|流水|批号|货号|条码|条形码|发票|准字|序列号|账单|合同|型号|ISBN|DOI|NO)[^\d，。；,;\n]{0,6}$"
    r"|(?:https?:/|www\.)[!-~]*$|[a-z_](?<!tel)(?<!phone)(?<!mobile)(?<![+加]v)(?<!vx)(?<!wx)(?<!qq)$",
    re.IGNORECASE,
)
# What stands behind or before a count, a concentration or a price that has as many digits as a telephone number.
_AMOUNT = re.compile(
    r" ?(?:(?:iu|u|copies|cfu|cells?|[mnuμ]?g|[mu]?l|[mnu]?mol|元|次|%)(?![a-z])|拷贝|个(?!人)|[万亿×*^]|x ?10"
    r"|/ ?[a-zμ毫升])",
    re.IGNORECASE,
)
_AMOUNT_OF = re.compile(
    r"(?:定量|总[数量]|计数|数[量值目]|载量|含量|浓度|滴度|活性|拷贝数?|病毒|细胞|血小板|精子|菌落|DNA|RNA|HCG)[^，。；,;?!\n\d]{0,8}$",
    re.IGNORECASE,
)
_CALLED = re.compile(r"电话|手机|号码|联[系络]|身份|拨|致电|打$|tel|phone", re.IGNORECASE)

Rule = tuple[str, re.Pattern[str], Callable[[re.Match[str]], bool]]


def scrub(text: str) -> tuple[str, Counter[str]]:
    """The text with personal data replaced by placeholders like 【电话】, and how many of each kind there were.

    电话: mobile numbers and landlines in their usual spellings, but no hotlines. 身份证号: of 18 digits with a valid
    date and checksum (after the word 身份证 without one too), or of 15 with a valid date. 邮箱. 微信号 and QQ号 where
    introduced as such. 姓名 where introduced (我叫, 姓名：, 孩子叫) and made of a known surname and one or two given
    characters with an end behind; other names stay. Traditional characters count as simplified ones; numbers of
    Taiwan, Hong Kong and Macau are known by their country code or the word before them. Doses and counts stay.
    """
    rules: list[Rule] = []
    if "@" in text or "＠" in text:
        rules.append(("邮箱", _EMAIL, bool))
    if _DIGITS.search(text):
        rules += [("身份证号", _IDENTITY, _is_identity), ("身份证号", _IDENTITY_ABROAD, bool)]
        rules += [("电话", pattern, _is_of_a_person) for pattern in (_MOBILE, _ABROAD, _LANDLINE, _LOCAL)]
    if _CONTACT.search(text):
        rules += [("微信号", _WECHAT, _is_account), ("QQ号", _QQ, bool)]
    if "叫" in text or "姓名" in text or "名字" in text or "姓 名" in text:
        rules.append(("姓名", _names(), bool))
    found: Counter[str] = Counter()
    plain = simplified(text) if rules else ""
    for kind, pattern, accepted in rules:
        for match in reversed([match for match in pattern.finditer(plain) if accepted(match)]):
            start, end = match.span("value")
            text, plain = (f"{form[:start]}【{kind}】{form[end:]}" for form in (text, plain))
            found[kind] += 1
    return text, found


def simplified(text: str) -> str:
    """The text, of equal length, in simplified characters and half width: for comparisons only, never to be stored."""
    return text.translate(_simple_forms())


@cache
def _simple_forms() -> dict[int, int]:
    lists = templates("quality")
    return _HALF | {ord(a): ord(b) for a, b in zip(lists["traditional"], lists["simplified"], strict=True)}


def _is_of_a_person(match: re.Match[str]) -> bool:
    before = match.string[max(0, match.start("value") - 60) : match.start("value")]
    if _OF_A_THING.search(before) or _AMOUNT.match(match.string, match.end("value")):
        return False
    round_number = re.sub(r"\D", "", match["value"]).endswith("000000")
    return bool(_CALLED.search(before[-8:])) or not (round_number or _AMOUNT_OF.search(before))


def _is_identity(match: re.Match[str]) -> bool:
    number = match["value"].replace(" ", "").upper()
    born = number[6:14] if len(number) == 18 else "19" + number[6:12]
    try:
        day = date(int(born[:4]), int(born[4:6]), int(born[6:]))
    except ValueError:
        return False
    if len(number) == 15:
        return _is_of_a_person(match)
    total = sum(int(digit) * 2 ** (17 - i) for i, digit in enumerate(number[:17]))
    # A mistyped number of a person is one too.
    said = re.search(
        "身[份分]证[字号码为是:： ]*$", match.string[max(0, match.start("value") - 12) : match.start("value")]
    )
    return 1850 <= day.year <= 2100 and (bool(said) or "10X98765432"[total % 11] == number[17])


def _is_account(match: re.Match[str]) -> bool:
    if any(mark in match["colon"] for mark in ":是为"):
        return True
    is_dose = match["plus"] and re.search(r"\d(?:m?g|ml|iu|u)$", match["value"], re.IGNORECASE)
    is_amount = match["plus"] and _AMOUNT.match(match.string, match.end("value"))
    return any(map(str.isdigit, match["value"])) and not (is_dose or is_amount)


@cache
def _names() -> re.Pattern[str]:
    lists = templates("quality")
    surname = f"(?:{'|'.join(lists['compound'])}|[{''.join(lists['surnames'].split())}])"
    person = f"(?:{lists['persons']})的?"
    given = rf"(?:(?![{lists['never']}])[\u4e00-\u9fff]){{1,2}}"
    return re.compile(
        rf"(?:我的名字[叫是]|我的?名叫|我叫做?|姓 ?名[:是为叫 ]+|{person}(?:名字叫|[大小]?名叫|叫做?|名字是)) ?"
        rf"(?P<value>(?!{lists['words']})(?P<first>{surname})(?!{lists['titles']}|(?P=first)){given})"
        rf"(?=$|[^\u4e00-\u9fff·•・]|{lists['follows']})"
    )


# U+FFFD; what comes of reading UTF-8 as GBK or Latin-1, or of memory that nobody filled.
_MOJIBAKE = re.compile(
    r"\ufffd|锟斤|斤拷|烫烫烫|屯屯屯|(?:[锛銆鈥鐨浜鍦鏄瀛鍜鍔鎴鍙鎬鍥鍚].{0,6}?){3}|(?:[Â-ï][\x80-\xbf\u0152-\u2122]{1,2}){3}"
)

_DRAWN = "-.=_|*#~+─━│·…"  # what tables and figures are made of


def fault(record: Record, *, min_characters: int, max_characters: int, min_chinese: float) -> tuple[str, str] | None:
    """Why a normalised record is unfit: (a fixed phrase, what was found); None if it is fit.

    `min_characters` is of what is learnt: a document's text, a conversation's answers together, a pair's shorter
    reply. `max_characters` is of a whole conversation, or a pair with its longer reply; `min_chinese` as in
    chinese_share.
    """
    said = texts(record)
    if isinstance(record, PreferencePair):
        learnt, whole = min(len(record.chosen), len(record.rejected)), sum(map(len, said)) - min(map(len, said[-2:]))
    elif isinstance(record, Conversation):
        learnt = sum(len(message.content) for message in record.messages if message.role == "assistant")
        whole = sum(map(len, said))
    else:
        learnt, whole = len(record.text), 0
    if not isinstance(record, Document) and not any(map(str.isalnum, question(record))):
        return NO_QUESTION, repr(question(record)[:20])
    if not isinstance(record, Document) and (blank := [i for i, text in enumerate(said, 1) if not text.strip()]):
        return EMPTY, f"text {blank[0]} of {len(said)}"
    if isinstance(record, PreferencePair) and record.chosen.strip() == record.rejected.strip():
        return EQUAL, repr(record.chosen[:40])
    if learnt < min_characters:
        return TOO_SHORT, f"{learnt} characters, fewer than {min_characters}"
    if whole > max_characters:
        return TOO_LONG, f"{whole} characters, more than {max_characters}"
    for text in said:
        if match := _MOJIBAKE.search(text):
            return BROKEN, repr(text[max(0, match.start() - 5) : match.end() + 5])
        character, times = Counter(text).most_common(1)[0] if len(text) >= 10 else ("", 0)
        if character not in _DRAWN and not character.isspace() and 2 * times > len(text):
            return BROKEN, f"{character!r} {times} times in {len(text)} characters"
    share = chinese_share("\n".join(said))
    return (NOT_CHINESE, f"{share:.0%} Chinese, less than {min_chinese:.0%}") if share < min_chinese else None
