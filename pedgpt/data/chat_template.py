"""A checkpoint's own Jinja chat template, taken apart: which text is the template's and which an answer's.

The template is rendered with a placeholder for every message's text. What stands between the placeholders is the
template's own writing, the same for all conversations with the same roles; only there are special tokens looked for.

What the model thought before an answer is its `reasoning`, and the template decides where it stands. Published
templates leave it out of earlier answers. Qwen3's writes it in the last answer. DeepSeek-R1's does not, although its
prompt ends with `<think>`: here its last answer is what a model writes after that, reasoning, `</think>` and answer.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pedgpt.data.records import Message
from pedgpt.data.tokenizer import CONFIG_FILE
from pedgpt.files import own_file

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_CHARACTERS = 1 << 20  # published templates hold some 10,000
MAX_ADDED_CHARACTERS = 1 << 20  # what a template may write beside the messages' text
# Noncharacters: no template writes them, and the text of users is not there when they are looked for.
_LEFT, _RIGHT, _BEGIN, _END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARK = re.compile(f"{_LEFT}([0-9]{{1,9}}){_RIGHT}|([{_BEGIN}{_END}])")


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a rendered conversation.

    `speaker` is the index of the answer that it belongs to, for the loss. `place` says which text it is: 2 i for the
    content of message i, 2 i + 1 for its reasoning, None for the template's own writing.
    """

    text: str
    speaker: int | None = None
    place: int | None = None


class ChatTemplate:
    """Renders conversations in jinja2's sandbox. `special` finds the special tokens in the template's own writing.

    An answer's part begins where the generation prompt ends and goes on to the first special token after its text;
    where the template marks answers by `{% generation %}`, those blocks decide. Messages' text may lose whitespace at
    its ends, as many templates trim it; any other change is a ValueError, as is a content that is left out.
    `enable_thinking` is given to the template if it is not None. `today` is the day that `strftime_now` writes.
    Template and output are bounded in size. The sandbox runs no code of the checkpoint, but a hostile template can
    still take time and memory.
    """

    def __init__(
        self,
        source: str,
        file: Path,
        variables: dict[str, str],
        special: re.Pattern[str],
        enable_thinking: bool | None = None,
        today: date | None = None,
    ) -> None:
        self.file, self.special, self.enable_thinking = file, special, enable_thinking
        self.variables = variables | ({} if enable_thinking is None else {"enable_thinking": enable_thinking})
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(f"{file}: its chat template has {len(source):,} characters, more than any real one")
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        now = datetime.combine(today or date.today(), time())  # one for a whole run, so that it can be resumed
        sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
        sandbox.filters["tojson"] = _tojson
        try:
            self.template = sandbox.from_string(source)
        except Exception as error:  # besides TemplateError, Python's own limits on nesting and numbers
            raise ValueError(f"{file}: its chat template is not valid Jinja ({error})") from None
        self.marks_answers = bool(re.search(r"\{%[-+]?\s*generation\b", source))
        self.thinks = "think>" in source if enable_thinking is None else enable_thinking
        self.is_dated = "strftime_now" in source
        self._outline = functools.lru_cache(maxsize=4096)(self._new_outline)

    def parts(self, messages: Sequence[Message], generation_prompt: bool) -> list[Part]:
        """The rendered conversation; `speaker` of its parts tells the answers. Raises ValueError naming the file."""
        written = self._written(messages, generation_prompt)
        closing, off = "\n</think>\n\n", self.enable_thinking is False
        if generation_prompt:  # where thinking is off, a thought that the template opens is closed at once
            return [*written, Part(closing)] if off and opens_thought(written) else written
        last, places = len(messages) - 1, [part.place for part in written]
        if last < 1 or messages[last].role != "assistant" or 2 * last not in places:
            return written
        reasoning = messages[last].reasoning
        placed = not reasoning or 2 * last + 1 in places
        opened = opens_thought(self._outline(_shape(messages[:-1]), True))
        if placed and not opened:
            return written
        prompt = self._written(messages[:-1], True)
        goes_on = "".join(part.text for part in written).startswith("".join(part.text for part in prompt))
        if placed and goes_on and not off:
            return written
        # The template drops the reasoning, or does not go on from its own prompt: write what a model would write there.
        thought = [Part(reasoning, last, 2 * last + 1)] if reasoning else []
        opening = [] if opened else [Part("<think>\n", last)]
        return [*prompt, *opening, *thought, Part(closing, None if off else last), *written[places.index(2 * last) :]]

    def _written(self, messages: Sequence[Message], generation_prompt: bool) -> list[Part]:
        """`parts` as the template itself writes them."""
        outline = self._outline(_shape(messages), generation_prompt)
        places = {part.place for part in outline}
        for i, message in enumerate(messages):
            if message.content and 2 * i not in places:
                raise self._error(f"leaves out message {i + 1}, of role {message.role}")
        said = [text for message in messages for text in (message.content, message.reasoning)]
        text = self._render(said, [message.role for message in messages], generation_prompt)
        parts, at = [], 0
        for number, part in enumerate(outline):
            if part.place is not None:
                size = _length_written(said[part.place], text, at, _literal_after(outline, number))
                if size is None:
                    break
                part = Part(text[at : at + size], part.speaker, part.place)
            elif not text.startswith(part.text, at):
                break
            parts.append(part)
            at += len(part.text)
        if "".join(part.text for part in parts) != text:
            raise self._error("changes the messages' text, so that answers cannot be told from the rest")
        return parts

    def _new_outline(self, shape: tuple[tuple[str, bool, bool], ...], generation_prompt: bool) -> list[Part]:
        """`_written` for these roles, without the messages' text; an empty text has no part with a `place`."""
        pieces = self._pieces(shape, generation_prompt)
        answers = {i for i, (role, *_) in enumerate(shape) if role == "assistant"}
        if self.marks_answers:
            return _marked(pieces, answers)
        parts: list[Part] = []
        for text, place in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            assert isinstance(text, str) and not isinstance(place, str)  # without marks they take turns
            message = None if place is None else place // 2
            # The text of an answer goes on to the token that ends it,
            last = parts[-1].place // 2 if parts and parts[-1].place is not None else None
            ended = self.special.search(text) if last in answers else None
            end = ended.end() if ended else 0
            start = len(text)
            if message in answers and message:
                # and begins where the generation prompt ends: a <think></think> after that is the model's to write.
                opening = self._pieces(shape[:message], True)[-1]
                if isinstance(opening, str) and text.startswith(opening):
                    start = max(end, len(opening))
            if message in answers and message == last:  # what stands between reasoning and answer is the model's, too
                end = start = 0
            said = message if message in answers else None
            parts += [Part(text[:end], last), Part(text[end:start]), Part(text[start:], said), Part("", said, place)]
        return [part for part in parts if part.text or part.place is not None]

    def _pieces(self, shape: tuple[tuple[str, bool, bool], ...], generation_prompt: bool) -> list[str | int]:
        """Literal text, a `place` for each text of a message, and the marks of `{% generation %}`, in order."""
        told = [is_there for _, *both in shape for is_there in both]
        marked = [f"{_LEFT}{place}{_RIGHT}" if is_there else "" for place, is_there in enumerate(told)]
        roles = [role for role, *_ in shape]
        text = self._render(marked, roles, generation_prompt, pedgpt_begin=_BEGIN, pedgpt_end=_END)
        pieces: list[str | int] = []
        at = 0
        for mark in _MARK.finditer(text):
            if (mark[1] and int(mark[1]) >= len(told)) or (mark[2] and not self.marks_answers):
                raise self._error(f"writes {ascii(mark[0])}, which is no character of any text")
            pieces += [text[at : mark.start()], int(mark[1]) if mark[1] else mark[2]]
            at = mark.end()
        pieces.append(text[at:])
        return pieces

    def _render(self, said: list[str], roles: list[str], generation_prompt: bool, **marks: str) -> str:
        """The template's text of these messages; `said` is content and reasoning of each in turn."""
        room = MAX_ADDED_CHARACTERS + 2 * sum(map(len, said))
        messages = [{"role": r, "content": c} for r, c in zip(roles, said[::2], strict=True)]
        for message, reasoning in zip(messages, said[1::2], strict=True):
            message |= {"reasoning_content": reasoning} if reasoning else {}
        blocks = []
        try:
            for block in self.template.generate(
                messages=messages, tools=None, documents=None, add_generation_prompt=generation_prompt,
                **self.variables, **marks,
            ):  # fmt: skip
                blocks.append(block)
                if (room := room - len(block)) < 0:
                    raise TemplateError(f"it writes more than {MAX_ADDED_CHARACTERS:,} characters of its own")
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
        if file.stat().st_size > 4 * MAX_TEMPLATE_CHARACTERS:
            raise ValueError(f"{file}: {file.stat().st_size:,} bytes, too large for a chat template")
        try:
            return file.read_text(encoding="utf-8"), file
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error})") from None
    file, found = folder / CONFIG_FILE, config.get("chat_template")
    if found is None:
        return None
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = entries[0].get("template") if entries else None
    if not isinstance(found, str):
        raise ValueError(f'{file}: chat_template must be a string, or a list with a template called "default"')
    return found, file


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: its text, between the values of pedgpt_begin and pedgpt_end."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load")]) for name in ("pedgpt_begin", "pedgpt_end"))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


def _marked(pieces: list[str | int], answers: set[int]) -> list[Part]:
    """Parts where `{% generation %}` blocks tell the answers: a block belongs to the answer in it, or the last one."""
    parts: list[Part] = []
    last: int | None = None
    block: list[str | int] | None = None
    for piece in pieces:
        spoken = piece // 2 if isinstance(piece, int) and piece // 2 in answers else None
        if piece == _BEGIN:
            block = []
        elif piece == _END and block is not None:
            said = [item // 2 for item in block if isinstance(item, int) and item // 2 in answers]
            last = said[0] if said else last
            parts += [_part(item, last) for item in block]
            block = None
        elif block is not None:
            block.append(piece)
        else:
            parts.append(_part(piece, None))
            last = last if spoken is None else spoken
    return [part for part in parts if part.text or part.place is not None]


def _part(piece: str | int, speaker: int | None) -> Part:
    return Part(piece, speaker) if isinstance(piece, str) else Part("", speaker, piece)


def _shape(messages: Sequence[Message]) -> tuple[tuple[str, bool, bool], ...]:
    """Of each message its role, and whether it has content and reasoning."""
    return tuple((m.role, bool(m.content), bool(m.reasoning)) for m in messages)


def opens_thought(prompt: list[Part]) -> bool:
    """Whether what is written after this prompt is reasoning."""
    return bool(prompt) and prompt[-1].text.rstrip().endswith("<think>")


def _literal_after(outline: list[Part], number: int) -> str | None:
    """The template's text after a message up to the next one; None where the conversation ends without any."""
    literal = ""
    for part in outline[number + 1 :]:
        if part.place is not None:
            return literal
        literal += part.text
    return literal or None


def _length_written(content: str, text: str, at: int, following: str | None) -> int | None:
    """How many characters of `text` from `at` are `content`, or what is left of it when its ends are trimmed.

    None if it is not there, or not followed by what the template writes after it.
    """
    core = content.strip()
    lead = content[: len(content) - len(content.lstrip())]
    trail = content[len(lead) + len(core) :]
    for cut in range(len(lead) + 1):
        if text.startswith(begun := lead[cut:] + core, at):
            for kept in range(len(trail), -1, -1):
                end = at + len(begun) + kept
                ends = end == len(text) if following is None else text.startswith(following, end)
                if ends and text.startswith(trail[:kept], at + len(begun)):
                    return end - at
    return None


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
