"""A Jinja chat template, taken apart: which text is the template's and which an answer's.

The template is rendered with a placeholder for every message's text. What stands between the placeholders is the
template's own writing, the same for all conversations with the same roles; only there are special tokens looked for.

What the model thought before an answer is its `reasoning`, and the template decides where it stands. Published
templates leave it out of earlier answers. Qwen3's writes it in the last answer. DeepSeek-R1's does not, although its
prompt ends with `<think>`: here its last answer is what a model writes after that, reasoning, `</think>` and answer.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import date, datetime, time
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pedgpt.data.records import Message
from pedgpt.data.tokenizer import CONFIG_FILE
from pedgpt.files import own_file

TEMPLATE_FILE = "chat_template.jinja"
CLOSING = "\n</think>\n\n"
# Noncharacters: no template writes them, and the text of users is not there when they are looked for.
_LEFT, _RIGHT = "\ufdd0", "\ufdd1"
_PLACE = re.compile(f"{_LEFT}([0-9]+){_RIGHT}")
Shape = tuple[tuple[str, bool, bool], ...]  # of each message its role, and whether it has content and reasoning


class Part(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    speaker: int | None = None  # the index of the answer that it belongs to, for the loss
    place: int | None = None  # 2 i: the content of message i, 2 i + 1: its reasoning, None: the template's own writing
    token: int | None = None  # the id of a special token, None for text


class ChatTemplate:
    """Renders conversations in jinja2's sandbox. `special` holds the special tokens that the template may write.

    An answer's part begins where the generation prompt ends and goes on to the first special token after its text.
    Messages' text may lose whitespace at its ends, as many templates trim it; any other change is a ValueError, as is a
    content that is left out. `today` is the day that `strftime_now` writes, and then "" if the template writes none.
    """

    def __init__(
        self, source: str, file: Path, variables: dict[str, Any], special: dict[str, int], today: date
    ) -> None:
        self.source, self.file, self.variables, self.special = source, file, variables, special
        self.enable_thinking = variables.get("enable_thinking")
        longest_first = sorted(special, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        now = datetime.combine(today, time())  # one for a whole run, so that it can be resumed
        sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
        sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        try:
            # `{% generation %}…{% endgeneration %}` is its text: what it marks as an answer is found without.
            plain = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
            self.template = sandbox.from_string(re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", plain))
        except Exception as error:  # besides TemplateError, Python's own limits on nesting and numbers
            raise ValueError(f"{file}: its chat template is not valid Jinja ({error})") from None
        self.thinks = "think>" in source if self.enable_thinking is None else self.enable_thinking
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
        reasoning, prompt = messages[last].reasoning, self._written(messages[:-1], True)
        placed = not reasoning or 2 * last + 1 in places  # whether the template writes all that the model would
        opened = opens_thought(prompt)
        if placed and (not opened or (not off and text_of(written).startswith(text_of(prompt)))):
            return written
        # The template drops the reasoning, or does not go on from its own prompt: write what a model would write there.
        opening = [] if opened else self._literal("<think>\n", last)
        thought = [Part(reasoning, last, 2 * last + 1)] if reasoning else []
        closing = self._literal(CLOSING, None if off else last)
        return [*prompt, *opening, *thought, *closing, *written[places.index(2 * last) :]]

    def _written(self, messages: Sequence[Message], generation_prompt: bool) -> list[Part]:
        """`parts` as the template itself writes them."""
        said = [(message.role, message.content, message.reasoning) for message in messages]
        shape = tuple([(role, bool(content), bool(reasoning)) for role, content, reasoning in said])
        outline, text = self._outline(shape, generation_prompt), self._render(said, generation_prompt)
        parts, at = [], 0
        for number, part in enumerate(outline, start=1):
            if part.place is not None:
                following = text_of(takewhile(lambda part: part.place is None, outline[number:]))
                content = said[part.place // 2][1 + part.place % 2]
                part = Part(_stretch(content, following, text, at), part.speaker, part.place)
            parts.append(part)
            at += len(part.text)
        if text_of(parts) != text:
            raise self._error("changes the messages' text, so that answers cannot be told from the rest")
        return parts

    def _new_outline(self, shape: Shape, generation_prompt: bool) -> list[Part]:
        """`_written` for these roles, without the messages' text; an empty text has no part with a `place`."""
        pieces = _PLACE.split(self._rendered_places(shape, generation_prompt))  # a literal text and a place in turn
        places = [int(place) for place in pieces[1::2]]
        for i, (role, has_content, _) in enumerate(shape):
            if has_content and 2 * i not in places:
                raise self._error(f"leaves out message {i + 1}, of role {role}")
        parts: list[Part] = []
        before = None  # the answer, or another message's None, before the literal text
        for literal, place in zip(pieces[::2], [*places, None], strict=True):
            after = place // 2 if place is not None and shape[place // 2][0] == "assistant" else None
            end, start = 0, len(literal)  # of what belongs to the answer before, and to the one after
            if before == after:
                end = start
            elif before is not None and (ended := self.pattern.search(literal)):
                end = ended.end()
            if after and after != before:  # a <think></think> after the prompt is the model's to write
                opening = self._rendered_places(shape[:after], True).rpartition(_RIGHT)[2]
                start = len(opening) if literal.startswith(opening) else start
            parts += self._literal(literal[:end], before) + self._literal(literal[end:start])
            parts += self._literal(literal[start:], after) + ([] if place is None else [Part("", after, place)])
            before = after
        return parts

    def _rendered_places(self, shape: Shape, generation_prompt: bool) -> str:
        """The template's text with the number of its place, between two marks, for each text of a message."""
        said = [
            (role, f"{_LEFT}{2 * i}{_RIGHT}" if content else "", f"{_LEFT}{2 * i + 1}{_RIGHT}" if reasoning else "")
            for i, (role, content, reasoning) in enumerate(shape)
        ]
        return self._render(said, generation_prompt)

    def _literal(self, text: str, speaker: int | None = None) -> list[Part]:
        """The template's own writing, cut at special tokens."""
        return [Part(piece, speaker, token=self.special.get(piece)) for piece in self.pattern.split(text) if piece]

    def _render(self, said: Iterable[tuple[str, str, str]], generation_prompt: bool) -> str:
        """The template's text of messages that are given by role, content and reasoning."""
        messages = [
            {"role": role, "content": content} | ({"reasoning_content": reasoning} if reasoning else {})
            for role, content, reasoning in said
        ]
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generation_prompt}
        try:
            return self.template.render(given, **self.variables)
        except Exception as error:  # a template can raise anything that an expression of Python can
            raise self._error(f"fails ({error or type(error).__name__})") from None

    def _error(self, fault: str) -> ValueError:
        fix = "fix the conversation or the template, or set chat_format to another format than this template"
        return ValueError(f"the chat template {fault}: {self.file}; {fix}")


def read_template(config: dict[str, Any], folder: Path | None) -> tuple[str, Path] | None:
    """The chat template of a checkpoint folder and the file that holds it: chat_template.jinja, or else the
    `chat_template` of tokenizer_config.json, a string or a list of {name, template} with one called "default"."""
    folder = folder or Path()
    if file := own_file(folder, TEMPLATE_FILE):
        return file.read_text(encoding="utf-8"), file
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    return None if found is None else (found, folder / CONFIG_FILE)


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
