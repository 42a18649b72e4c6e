"""A Jinja chat template, taken apart: which text is the template's and which an answer's.

The template is rendered with a placeholder for every message's text. What stands between the placeholders is the
template's own writing, the same for all conversations with the same roles; only there are special tokens looked for.

What the model thought before an answer is its `reasoning`, and the template decides where it stands. Published
templates leave it out of earlier answers. Qwen3's writes it in the last answer. DeepSeek-R1's does not, although its
prompt ends with `<think>`: here its last answer is what a model writes after that, reasoning, `</think>` and answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, time
from functools import lru_cache, partial
from itertools import cycle, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pedgpt.data.records import Message
from pedgpt.data.tokenizer import CONFIG_FILE
from pedgpt.files import own_file

TEMPLATE_FILE = "chat_template.jinja"
MAX_CHARACTERS = 1 << 20  # of a template (published ones hold some 10,000), and of what it adds to the messages' text
CLOSING = "\n</think>\n\n"
# Noncharacters: no template writes them, and the text of users is not there when they are looked for.
_LEFT, _RIGHT, _BEGIN, _END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_PLACE = re.compile(f"{_LEFT}([0-9]{{1,9}}){_RIGHT}")
_BLOCK = re.compile(f"{_BEGIN}(.*?){_END}", re.DOTALL)
Shape = tuple[tuple[str, bool, bool], ...]  # of each message its role, and whether it has content and reasoning


class Part(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    speaker: int | None = None  # the index of the answer that it belongs to, for the loss
    place: int | None = None  # 2 i: the content of message i, 2 i + 1: its reasoning, None: the template's own writing
    token: int | None = None  # the id of a special token, None for text


class ChatTemplate:
    """Renders conversations in jinja2's sandbox. `special` holds the special tokens that the template may write.

    An answer's part begins where the generation prompt ends and goes on to the first special token after its text;
    where the template marks answers by `{% generation %}`, those blocks decide. Messages' text may lose whitespace at
    its ends, as many templates trim it; any other change is a ValueError, as is a content that is left out. `fill` says
    what a template of our own makes of a text, which then need not be rendered again for each conversation.
    `today` is the day that `strftime_now` writes, and then "" if the template writes none. Template and output are
    bounded in size, but a hostile template can still take time and memory.
    """

    def __init__(
        self,
        source: str,
        file: Path,
        variables: dict[str, Any],
        special: dict[str, int],
        enable_thinking: bool | None,
        today: date,
        fill: Callable[[str], str] | None,
    ) -> None:
        if len(source) > MAX_CHARACTERS:
            raise ValueError(f"{file}: its chat template has {len(source):,} characters, more than any real one")
        self.file, self.special, self.enable_thinking = file, special, enable_thinking
        self.variables = variables | ({} if enable_thinking is None else {"enable_thinking": enable_thinking})
        self.fill = fill
        longest_first = sorted(special, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        extensions = [loopcontrols, _Generation]
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        now = datetime.combine(today, time())  # one for a whole run, so that it can be resumed
        sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
        sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        try:
            self.template = sandbox.from_string(source)
        except Exception as error:  # besides TemplateError, Python's own limits on nesting and numbers
            raise ValueError(f"{file}: its chat template is not valid Jinja ({error})") from None
        self.marks_answers = bool(re.search(r"\{%[-+]?\s*generation\b", source))
        self.thinks = "think>" in source if enable_thinking is None else enable_thinking
        self.may_open = "<think>" in source  # a thought, in a prompt
        self.today = today.isoformat() if "strftime_now" in source else ""
        self._outline = lru_cache(maxsize=4096)(self._new_outline)

    def parts(self, messages: Sequence[Message], generation_prompt: bool) -> list[Part]:
        """The rendered conversation; `speaker` of its parts tells the answers. Raises ValueError naming the file."""
        written = self._written(messages, generation_prompt)
        if not self.may_open and not (messages and messages[-1].reasoning):
            return written
        off = self.enable_thinking is False
        if generation_prompt:  # where thinking is off, a thought that the template opens is closed at once
            return [*written, *self._literal(CLOSING)] if off and opens_thought(written) else written
        last, places = len(messages) - 1, [part.place for part in written]
        if last < 1 or messages[last].role != "assistant" or 2 * last not in places:
            return written
        reasoning = messages[last].reasoning
        placed = not reasoning or 2 * last + 1 in places  # whether the template writes all that the model would
        opened = opens_thought(self._outline(self._shape(messages[:-1]), True))
        if placed and not opened:
            return written
        prompt = self._written(messages[:-1], True)
        if placed and not off and text_of(written).startswith(text_of(prompt)):
            return written
        # The template drops the reasoning, or does not go on from its own prompt: write what a model would write there.
        opening = [] if opened else self._literal("<think>\n", last)
        thought = [Part(reasoning, last, 2 * last + 1)] if reasoning else []
        closing = self._literal(CLOSING, None if off else last)
        return [*prompt, *opening, *thought, *closing, *written[places.index(2 * last) :]]

    def _written(self, messages: Sequence[Message], generation_prompt: bool) -> list[Part]:
        """`parts` as the template itself writes them."""
        outline = self._outline(self._shape(messages), generation_prompt)
        said = [text for message in messages for text in (message.content, message.reasoning)]
        if self.fill:
            return [p if p.place is None else Part(self.fill(said[p.place]), p.speaker, p.place) for p in outline]
        text = self._render(said, [message.role for message in messages], generation_prompt)
        parts, at = [], 0
        for number, part in enumerate(outline, start=1):
            if part.place is not None:
                following = text_of(takewhile(lambda part: part.place is None, outline[number:]))
                part = Part(_stretch(said[part.place], following, text, at), part.speaker, part.place)
            parts.append(part)
            at += len(part.text)
        if text_of(parts) != text:
            raise self._error("changes the messages' text, so that answers cannot be told from the rest")
        return parts

    def _shape(self, messages: Sequence[Message]) -> Shape:
        return tuple([(m.role, bool(self.fill or m.content), bool(m.reasoning)) for m in messages])

    def _new_outline(self, shape: Shape, generation_prompt: bool) -> list[Part]:
        """`_written` for these roles, without the messages' text; an empty text has no part with a `place`."""
        rendered = self._rendered_places(shape, generation_prompt)
        for i, (role, has_content, _) in enumerate(shape):
            if has_content and f"{_LEFT}{2 * i}{_RIGHT}" not in rendered:
                raise self._error(f"leaves out message {i + 1}, of role {role}")
        marked = rendered if self.marks_answers else self._mark_answers(rendered, shape)
        parts: list[Part] = []
        last = None  # the answer that was written last
        for is_block, stretch in zip(cycle([False, True]), _BLOCK.split(marked)):
            pieces = _PLACE.split(stretch)  # a literal text and a place in turn
            said = [int(place) // 2 for place in pieces[1::2] if shape[int(place) // 2][0] == "assistant"]
            speaker = next(iter(said), last) if is_block else None
            for n, piece in enumerate(pieces):
                parts += [Part("", speaker, int(piece))] if n % 2 else self._literal(piece, speaker)
            last = speaker if is_block else next(reversed(said), last)
        return parts

    def _mark_answers(self, rendered: str, shape: Shape) -> str:
        """Put the marks of `{% generation %}` around each answer."""
        for i in reversed([i for i, (role, *_) in enumerate(shape) if role == "assistant"]):
            places = re.findall(f"{_LEFT}(?:{2 * i}|{2 * i + 1}){_RIGHT}", rendered)
            if not places:
                continue
            # It begins where the generation prompt ends: a <think></think> after that is the model's to write.
            before, _, rest = rendered.partition(places[0])
            literal = before.rpartition(_RIGHT)[2]
            opening = self._rendered_places(shape[:i], True).rpartition(_RIGHT)[2] if i else literal
            start = len(before) - (len(literal) - len(opening) if literal.startswith(opening) else 0)
            # It goes on to the token that ends it.
            end = rendered.rindex(places[-1]) + len(places[-1])
            after = re.split(f"[{_LEFT}{_BEGIN}]", rendered[end:])[0]
            ended = self.pattern.search(after)
            end += ended.end() if ended else 0
            rendered = f"{rendered[:start]}{_BEGIN}{rendered[start:end]}{_END}{rendered[end:]}"
        return rendered

    def _rendered_places(self, shape: Shape, generation_prompt: bool) -> str:
        """The template's text with the number of its place, between two marks, for each text of a message."""
        told = enumerate(is_there for _, *both in shape for is_there in both)
        said = [f"{_LEFT}{place}{_RIGHT}" if is_there else "" for place, is_there in told]
        marks = {"pedgpt_begin": _BEGIN, "pedgpt_end": _END}
        text = self._render(said, [role for role, *_ in shape], generation_prompt, **marks)
        forged = [mark[0] for mark in _PLACE.finditer(text) if int(mark[1]) >= len(said)]
        forged += [] if self.marks_answers else [mark for mark in marks.values() if mark in text]
        if forged:
            raise self._error(f"writes {ascii(forged[0])}, which is no character of any text")
        return text

    def _literal(self, text: str, speaker: int | None = None) -> list[Part]:
        """The template's own writing, cut at special tokens."""
        return [Part(piece, speaker, token=self.special.get(piece)) for piece in self.pattern.split(text) if piece]

    def _render(self, said: list[str], roles: list[str], generation_prompt: bool, **marks: str) -> str:
        """The template's text of these messages; `said` is content and reasoning of each in turn."""
        room = MAX_CHARACTERS + 2 * sum(map(len, said))
        messages = [
            {"role": role, "content": content} | ({"reasoning_content": reasoning} if reasoning else {})
            for role, content, reasoning in zip(roles, said[::2], said[1::2], strict=True)
        ]
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generation_prompt}
        blocks = []
        try:
            for block in self.template.generate(given, **self.variables, **marks):
                blocks.append(block)
                if (room := room - len(block)) < 0:
                    raise TemplateError(f"it writes more than {MAX_CHARACTERS:,} characters of its own")
        except Exception as error:  # a template can raise anything that an expression of Python can
            raise self._error(f"fails ({error or type(error).__name__})") from None
        return "".join(blocks)

    def _error(self, fault: str) -> ValueError:
        fix = "fix the conversation or the template, or set chat_format to another format than this template"
        return ValueError(f"the chat template {fault}: {self.file}; {fix}")


def read_template(config: dict[str, Any], folder: Path | None) -> tuple[str, Path] | None:
    """The chat template of a checkpoint folder and the file that holds it: chat_template.jinja, or else the
    `chat_template` of tokenizer_config.json, a string or a list of {name, template} with one called "default"."""
    folder = folder or Path()
    if file := own_file(folder, TEMPLATE_FILE):
        try:
            return file.read_text(encoding="utf-8"), file
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error})") from None
    file, found = folder / CONFIG_FILE, config.get("chat_template")
    if isinstance(found, list):
        default = (e.get("template") for e in found if isinstance(e, dict) and e.get("name") == "default")
        found = next(default, None) or found
    if not isinstance(found, str | None):
        raise ValueError(f'{file}: chat_template must be a string, or a list with a template called "default"')
    return None if found is None else (found, file)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: its text, between the values of pedgpt_begin and pedgpt_end."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load")]) for name in ("pedgpt_begin", "pedgpt_end"))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


def opens_thought(prompt: Iterable[Part]) -> bool:
    """Whether what is written after this prompt is reasoning."""
    return text_of(prompt).rstrip().endswith("<think>")


def text_of(parts: Iterable[Part]) -> str:
    """The rendered text, special tokens spelled out."""
    return "".join([part.text for part in parts])


def _stretch(said: str, following: str, text: str, at: int) -> str:
    """What stands in `text` before `following`: all of `said`, or what is left when its ends are trimmed."""
    for start in range(len(said) - len(said.lstrip()) + 1):
        for end in range(len(said), max(start, len(said.rstrip())) - 1, -1):
            if text.startswith(said[start:end] + following, at):
                return said[start:end]
    return ""


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
