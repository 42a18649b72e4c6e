"""Textbooks and guidelines as passages: a tree of headings, each leaf's text in pieces that say where they stand."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import PurePath

from pedgpt.data.records import Document
from pedgpt.data.tables import HEADING

BETWEEN = " › "  # between the parts of a passage's source
_SENTENCE = re.compile(r"[^。！？；!?;]*[。！？；!?;]+[”’」』）)\]】》]*|[^。！？；!?;]+")
# A paragraph ends at an empty line, or at a line that ends a sentence: other lines may be wrapped within one.
_PARAGRAPH_END = re.compile(r"\n[ \t\u3000]*\n\s*|(?<=[。！？；!?;”’」』）)\]】》])[ \t\u3000]*\n\s*")
_CLAUSE_END = re.compile(r"(?<=[，、：,\n])|(?<= )")
_ENDS = (_PARAGRAPH_END, _SENTENCE, _CLAUSE_END)

_DIGITS = "零〇一二三四五六七八九十百千0-9０-９"
_UNIT = (
    r"[ \t]*([%％‰℃°~～至—-]|毫|微|克|公斤|千克|厘|升|岁|个|天|日|周|年|小时|分|秒|倍|次|([mμ]?[gl]|k[gc]|[cm]m|IU)\b)"
)
_TITLE = r"([ \t\u3000:：\u4e00-\u9fff].*)?"
# (depth, form, certain): chapters and numbered headings as Chinese books have them; an uncertain one may be an item.
_FORMS = [
    (1, rf"第[{_DIGITS}]+[篇编卷]{_TITLE}", True),
    (2, rf"第[{_DIGITS}]+章{_TITLE}", True),
    (3, rf"第[{_DIGITS}]+节{_TITLE}", True),
    (4, r"[一二三四五六七八九十百]+[、．][ \t\u3000]*\S.*", False),
    (5, r"[（(][一二三四五六七八九十百]+[）)][ \t\u3000]*\S.*", False),
]
_DECIMAL = re.compile(rf"([1-9]\d?(?:\.\d{{1,2}}){{1,4}})(?!\d|{_UNIT})[.、．]?[ \t\u3000]*[A-Za-z\u4e00-\u9fff].*")
_NUMBERING = re.compile(
    rf"(?:第[{_DIGITS}]+[篇编卷章节][ \t\u3000:：]*|[一二三四五六七八九十百]+[、．]|[（(][一二三四五六七八九十百]+[）)]"
    r"|\d+(?:\.\d+)+[.、．]?|\d+[.、．])[ \t\u3000]*"
)
_LONGEST_HEADING = 30  # characters


@dataclass(frozen=True, slots=True)
class _Heading:
    text: str
    family: str  # of headings that can be compared by depth
    depth: int
    certain: bool  # false: could be an item of a list


def sentences(text: str) -> list[str]:
    """Sentences with their 。！？； and the quotes that close after them, stripped; in order, none empty."""
    return [part for match in _SENTENCE.finditer(text) if (part := match[0].strip())]


def passages(document: Document, *, max_characters: int = 1200) -> Iterator[Document]:
    """The document's text without its headings, in passages of at most `max_characters`, each under one heading.

    Headings are Markdown's, and the lines 第一章, 第三节, 一、, （一） and 1.2.3 of a book, if short and without final
    punctuation; a numbered line with nothing beneath it is an item of a list, thus text. Passages end at paragraphs, in
    a longer paragraph at sentences, in a longer sentence at commas or anywhere. All else comes out once, in order.

    `source` is "book.md:LINE › 第三章 › 肺炎 › 治疗", with the line where the passage begins if the document is a whole
    .txt or .md, else the document's own source before the headings. `title` is the nearest heading without its number,
    or the document's title. A short document without headings is returned as it is.
    """
    if max_characters < 1:
        raise ValueError(f"max_characters is {max_characters}, expected 1 or more")
    text = document.text
    lines = text.split("\n")  # and at nothing else, as the readers count lines
    headings = _headings([line.strip() for line in lines])
    if not headings and len(text) <= max_characters:
        yield document
        return
    whole = PurePath(document.source).suffix.lower() in (".txt", ".md")
    starts = [0, *accumulate(len(line) + 1 for line in lines)]  # of each line, and of what follows the last one
    path: list[_Heading] = []
    first = 0
    for number in [*headings, len(lines)]:
        for start, end in _chunks(text, starts[first], min(starts[number], len(text)), max_characters):
            source = f"{document.source}:{bisect_right(starts, start)}" if whole else document.source
            yield replace(
                document,
                text=text[start:end],
                source=BETWEEN.join([source, *(heading.text for heading in path)]),
                title=unnumbered(path[-1].text) if path else document.title,
            )
        if number < len(lines):
            heading = headings[number]
            # What is not deeper ends; a family seen for the first time is within all the others.
            stays = [i for i, h in enumerate(path) if h.family == heading.family and h.depth >= heading.depth]
            path = [*(path[: stays[0]] if stays else path), heading]
            first = number + 1


def _headings(lines: list[str]) -> dict[int, _Heading]:
    found = {number: heading for number, line in enumerate(lines) if (heading := _heading(line))}
    kept = {}
    for number, heading in found.items():
        after = next((n for n in range(number + 1, len(lines)) if lines[n]), None)
        follower = found.get(after) if after is not None else None
        deeper = follower and (follower.family != heading.family or follower.depth > heading.depth)
        # A numbered line with nothing beneath it is an item of a list: it must not be lost as a heading of nothing.
        if heading.certain or (after is not None and (follower is None or (deeper and not follower.certain))):
            kept[number] = heading
    return kept


def _heading(line: str) -> _Heading | None:
    if match := HEADING.match(line):
        return _Heading(match[1].strip(), "#", len(line) - len(line.lstrip("#")), True)
    if not line or len(line) > _LONGEST_HEADING or re.search(r"[。！？；，、：…!?;,:.]$", line):
        return None
    certain_only = re.search("[，。；！？]", line)
    for depth, form, certain in _FORMS:
        if (certain or not certain_only) and re.fullmatch(form, line):
            return _Heading(line, "章", depth, certain)
    if (match := _DECIMAL.fullmatch(line)) and not certain_only:
        return _Heading(line, "章", 6 + match[1].count("."), False)
    return None


def unnumbered(heading: str) -> str:
    """第二节 肺炎 -> 肺炎; a heading that is nothing but its number stays."""
    return heading[match.end() :] if (match := _NUMBERING.match(heading)) and match.end() < len(heading) else heading


def _chunks(text: str, start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    """Spans of at most `limit` characters without space at either end, which hold all of text[start:end] but space."""
    begin, last = -1, -1
    for left, right in _units(text, start, end, limit):
        if begin >= 0 and right - begin > limit:
            yield begin, last
            begin = -1
        begin, last = (left if begin < 0 else begin), right
    if begin >= 0:
        yield begin, last


def _units(text: str, start: int, end: int, limit: int, level: int = 0) -> Iterator[tuple[int, int]]:
    """Paragraphs; of one that is too long its sentences; of a sentence that is too long its clauses, cut if need be."""
    if level < len(_ENDS):
        cuts = [start, *(match.end() for match in _ENDS[level].finditer(text, start, end)), end]
    else:
        cuts = [*range(start, end, limit), end]
    for left, right in _stripped(text, cuts):
        if right - left <= limit:
            yield left, right
        else:
            yield from _units(text, left, right, limit, level + 1)


def _stripped(text: str, cuts: list[int]) -> Iterator[tuple[int, int]]:
    for left, right in zip(cuts, cuts[1:], strict=False):
        part = text[left:right]
        if part.strip():
            yield left + len(part) - len(part.lstrip()), left + len(part.rstrip())
