"""Textbooks and guidelines as passages: a tree of headings, each leaf's text in pieces that say where they stand."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise, takewhile
from pathlib import PurePath
from typing import NamedTuple

from pedgpt.data.records import Document
from pedgpt.data.tables import HEADING

BETWEEN = " › "  # between the parts of a passage's source
_SENTENCE = re.compile(r"[^。！？；!?;]*[。！？；!?;]+[”’」』）)\]】》]*|[^。！？；!?;]+")
# A paragraph ends at an empty line, or at a line that ends a sentence: other lines may be wrapped within one.
_PARAGRAPH_END = re.compile(r"\n[ \t\u3000]*\n\s*|(?<=[。！？；!?;”’」』）)\]】》])[ \t\u3000]*\n\s*")
_CLAUSE_END = re.compile(r"(?<=[，、：,\n])|(?<= )")
_BARE = re.compile(r"\S(?:.*\S)?", re.DOTALL)
_ENDS = (_PARAGRAPH_END, _SENTENCE, _CLAUSE_END)

_DIGITS, _NUMERAL = "零〇一二三四五六七八九十百千0-9０-９", "[一二三四五六七八九十百]+"
_UNIT = r"[ \t]*([%％‰℃°~～至—毫微克厘升岁个天日周年分秒倍次-]|公斤|千克|小时|([mμ]?[gl]|k[gc]|[cm]m|IU)\b)"
_TITLE, _SPACE = r"([ \t\u3000:：\u4e00-\u9fff].*)?", r"[ \t\u3000]*"
# Chapters and numbered headings as Chinese books have them, by depth. From the fourth on, one may be an item of a list.
_FORMS = [
    *(re.compile(rf"第[{_DIGITS}]+{unit}{_TITLE}") for unit in ("[篇编卷]", "章", "节")),
    re.compile(rf"{_NUMERAL}[、．]{_SPACE}\S.*"),
    re.compile(rf"[（(]{_NUMERAL}[）)]{_SPACE}\S.*"),
    re.compile(rf"(?P<number>[1-9]\d?(\.\d{{1,2}}){{1,4}})(?!\d|{_UNIT})[.、．]?{_SPACE}[A-Za-z\u4e00-\u9fff].*"),
]
_NUMBERING = re.compile(
    rf"(?:第[{_DIGITS}]+[篇编卷章节][ \t\u3000:：]*|{_NUMERAL}[、．]|[（(]{_NUMERAL}[）)]"
    rf"|\d+(?:\.\d+)+[.、．]?|\d+[.、．]){_SPACE}"
)
_LONGEST_HEADING = 30  # characters


class _Heading(NamedTuple):
    text: str
    family: str  # of headings that can be compared by depth
    depth: int
    certain: bool  # false: could be an item of a list

    def is_within(self, other: _Heading) -> bool:
        """A family seen for the first time is within all the others."""
        return self.family != other.family or self.depth > other.depth


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
    text = document.text
    lines = text.split("\n")  # and at nothing else, as the readers count lines
    headings = _headings([line.strip() for line in lines])
    if not headings and len(text) <= max_characters:
        yield document
        return
    whole = PurePath(document.source).suffix.lower() in (".txt", ".md")
    starts = [0, *accumulate(len(line) + 1 for line in lines)]  # of each line, and of what follows the last one
    path: list[_Heading] = []
    for above, below in pairwise([-1, *headings, len(lines)]):
        if above >= 0:
            path = [*takewhile(headings[above].is_within, path), headings[above]]
        for start, end in _chunks(text, starts[above + 1], min(starts[below], len(text)), max_characters):
            source = f"{document.source}:{bisect_right(starts, start)}" if whole else document.source
            source = BETWEEN.join([source, *(heading.text for heading in path)])
            title = unnumbered(path[-1].text) if path else document.title
            yield replace(document, text=text[start:end], source=source, title=title)


def _headings(lines: list[str]) -> dict[int, _Heading]:
    kept = {}
    beneath, follower = False, None  # whether a line follows that is not empty, and the heading that it is
    for number, line in reversed(list(enumerate(lines))):
        if heading := _heading(line):
            # A numbered line with nothing beneath it is an item of a list: it must not be lost as a heading of nothing.
            holds = beneath and (not follower or (follower.is_within(heading) and not follower.certain))
            if heading.certain or holds:
                kept[number] = heading
        if line:
            beneath, follower = True, heading
    return dict(reversed(kept.items()))


def _heading(line: str) -> _Heading | None:
    if match := HEADING.match(line):
        return _Heading(match[1].strip(), "#", len(line) - len(line.lstrip("#")), True)
    if len(line) <= _LONGEST_HEADING and not re.search(r"[。！？；，、：…!?;,:.]$", line):
        for depth, form in enumerate(_FORMS):
            certain = depth < 3
            if (match := form.fullmatch(line)) and (certain or not re.search("[，。；！？]", line)):
                return _Heading(line, "章", depth + match.groupdict().get("number", "").count("."), certain)
    return None


def unnumbered(heading: str) -> str:
    """第二节 肺炎 -> 肺炎; a heading that is nothing but its number stays."""
    return heading[match.end() :] if (match := _NUMBERING.match(heading)) and match.end() < len(heading) else heading


def _chunks(text: str, start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    """Spans of at most `limit` characters without space at either end, which hold all of text[start:end] but space."""
    span: tuple[int, int] | None = None
    for left, right in _units(text, start, end, limit):
        if span and right - span[0] > limit:
            yield span
            span = None
        span = (span[0] if span else left, right)
    if span:
        yield span


def _units(text: str, start: int, end: int, limit: int, level: int = 0) -> Iterator[tuple[int, int]]:
    """Paragraphs; of one that is too long its sentences; of a sentence that is too long its clauses, cut if need be."""
    cuts = range(start + limit, end, limit)
    ends = cuts if level == len(_ENDS) else (match.end() for match in _ENDS[level].finditer(text, start, end))
    for left, right in pairwise([start, *ends, end]):
        if match := _BARE.search(text, left, right):
            fits = match.end() - match.start() <= limit
            yield from [match.span()] if fits else _units(text, *match.span(), limit, level + 1)
