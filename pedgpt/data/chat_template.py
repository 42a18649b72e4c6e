"""A checkpoint's own Jinja chat template, taken apart: which text is the template's and which an answer's.

The template is rendered with a placeholder for every message's text. What stands between the placeholders is the
template's own writing, the same for all conversations with the same roles; only there are special tokens looked for.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
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

    `speaker` is the index of the answer that it belongs to, for the loss; `message` that of the message whose text it
    is, None for the template's own writing.
    """

    text: str
    speaker: int | None = None
    message: int | None = None


class ChatTemplate:
    """Renders conversations in jinja2's sandbox. `special` finds the special tokens in the template's own writing.

    An answer's part begins where the generation prompt ends and goes on to the first special token after its text;
    where the template marks answers by `{% generation %}`, those blocks decide. Messages' text may lose whitespace at
    its ends, as many templates trim it; any other change is a ValueError, as is a text that is left out.
    Template and output are bounded in size. The sandbox runs no code of the checkpoint, but a hostile template can
    still take time and memory.
    """

    def __init__(self, source: str, file: Path, variables: dict[str, str], special: re.Pattern[str]) -> None:
        self.file, self.variables, self.special = file, variables, special
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(f"{file}: its chat template has {len(source):,} characters, more than any real one")
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        now = datetime.now()  # one time for a whole run, so that renderings can be compared
        sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
        sandbox.filters["tojson"] = _tojson
        try:
            self.template = sandbox.from_string(source)
        except Exception as error:  # besides TemplateError, Python's own limits on nesting and numbers
            raise ValueError(f"{file}: its chat template is not valid Jinja ({error})") from None
        self.marks_answers = bool(re.search(r"\{%[-+]?\s*generation\b", source))
        self._outline = functools.lru_cache(maxsize=4096)(self._new_outline)

    def parts(self, messages: Sequence[Message], generation_prompt: bool) -> list[Part]:
        """The rendered conversation; `speaker` of its parts tells the answers. Raises ValueError naming the file."""
        outline = self._outline(tuple((m.role, bool(m.content)) for m in messages), generation_prompt)
        for i in {i for i, m in enumerate(messages) if m.content} - {part.message for part in outline}:
            raise self._error(f"leaves out message {i + 1}, of role {messages[i].role}")
        text = self._render([{"role": m.role, "content": m.content} for m in messages], generation_prompt)
        parts, at = [], 0
        for number, part in enumerate(outline):
            if part.message is not None:
                size = _length_written(messages[part.message].content, text, at, _literal_after(outline, number))
                if size is None:
                    break
                part = Part(text[at : at + size], part.speaker, part.message)
            elif not text.startswith(part.text, at):
                break
            parts.append(part)
            at += len(part.text)
        if "".join(part.text for part in parts) != text:
            raise self._error("changes the messages' text, so that answers cannot be told from the rest")
        return parts

    def _new_outline(self, shape: tuple[tuple[str, bool], ...], generation_prompt: bool) -> list[Part]:
        """`parts` of any conversation of these roles, without the messages' text; an empty message has no place."""
        pieces = self._pieces(shape, generation_prompt)
        answers = {i for i, (role, _) in enumerate(shape) if role == "assistant"}
        if self.marks_answers:
            return _marked(pieces, answers)
        parts: list[Part] = []
        for text, message in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            assert isinstance(text, str) and not isinstance(message, str)  # without marks they take turns
            # The text of an answer goes on to the token that ends it,
            last = parts[-1].message if parts else None
            ended = self.special.search(text) if last in answers else None
            end = ended.end() if ended else 0
            start = len(text)
            if message in answers and message:
                # and begins where the generation prompt ends: a <think></think> after that is the model's to write.
                opening = self._pieces(shape[:message], True)[-1]
                if isinstance(opening, str) and text.startswith(opening):
                    start = max(end, len(opening))
            said = message if message in answers else None
            parts += [Part(text[:end], last), Part(text[end:start]), Part(text[start:], said), Part("", said, message)]
        return [part for part in parts if part.text or part.message is not None]

    def _pieces(self, shape: tuple[tuple[str, bool], ...], generation_prompt: bool) -> list[str | int]:
        """Literal text, and the index of a message in place of its text; marks of `{% generation %}` stand alone."""
        marked = [{"role": r, "content": f"{_LEFT}{i}{_RIGHT}" if said else ""} for i, (r, said) in enumerate(shape)]
        text = self._render(marked, generation_prompt, pedgpt_begin=_BEGIN, pedgpt_end=_END)
        pieces: list[str | int] = []
        at = 0
        for mark in _MARK.finditer(text):
            if (mark[1] and int(mark[1]) >= len(shape)) or (mark[2] and not self.marks_answers):
                raise self._error(f"writes {ascii(mark[0])}, which is no character of any text")
            pieces += [text[at : mark.start()], int(mark[1]) if mark[1] else mark[2]]
            at = mark.end()
        pieces.append(text[at:])
        return pieces

    def _render(self, messages: list[dict[str, str]], generation_prompt: bool, **marks: str) -> str:
        room = MAX_ADDED_CHARACTERS + 2 * sum(len(message["content"]) for message in messages)
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
        mend = "mend the conversation or the template, or set chat_format to another format than this template"
        return ValueError(f"the chat template {fault}: {self.file}; {mend}")


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
        if piece == _BEGIN:
            block = []
        elif piece == _END and block is not None:
            last = next((item for item in block if item in answers and isinstance(item, int)), last)
            parts += [_part(item, last) for item in block]
            block = None
        elif block is not None:
            block.append(piece)
        else:
            parts.append(_part(piece, None))
            last = piece if isinstance(piece, int) and piece in answers else last
    return [part for part in parts if part.text or part.message is not None]


def _part(piece: str | int, speaker: int | None) -> Part:
    return Part(piece, speaker) if isinstance(piece, str) else Part("", speaker, piece)


def _literal_after(outline: list[Part], number: int) -> str | None:
    """The template's text after a message up to the next one; None where the conversation ends without any."""
    literal = ""
    for part in outline[number + 1 :]:
        if part.message is not None:
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
