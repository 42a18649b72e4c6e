"""Chat formats: how a family writes roles, with a loss mask that is exact because it is made piece by piece."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from pedgpt.data.chat_template import TEMPLATE_FILE, ChatTemplate, opens_thought, read_template
from pedgpt.data.records import Message
from pedgpt.data.tokenizer import Tokenizer
from pedgpt.files import read_object, write_json, write_text

IGNORE_INDEX = -100
GENERATION_FILE = "generation_config.json"


# Tokens, and what the model should have predicted at each of them, −100 for nothing.
Rendered = tuple[list[int], list[int]]
# A special token's id, or text; and the index of the answer that it is part of, None outside answers.
Piece = tuple[int | str, int | None]


class ChatFormat:
    """How a family writes roles. `render` gives tokens, `stop_tokens` what ends an answer.

    The last answer is written with its reasoning, if it has any; earlier answers are written without theirs. With
    `enable_thinking` false no answer has reasoning. `opens_thought` says whether the prompt ends with `<think>`, after
    which the model goes on with its reasoning. `today` is the day that the format writes, or "" if it writes none.
    """

    role_tokens: tuple[str, ...] = ()  # a tokenizer that has them was made for this format
    jinja = ""  # the same format as a Jinja template, for other tools
    enable_thinking: bool | None = None
    opens_thought = False
    today = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_tokens: tuple[int, ...] = ()

    @property
    def thinks(self) -> bool:
        """Whether to expect reasoning before a new answer."""
        return self.enable_thinking is True

    def render(self, messages: Sequence[Message], supervised: set[int], generation_prompt: bool) -> Rendered:
        """Tokens and targets of `messages`, with loss on the assistant messages whose indices are in `supervised`."""
        raise NotImplementedError

    def read_answer(self, text: str) -> Message:
        """What a model wrote after a prompt, as a message; its content is empty if the reasoning never ended.

        Besides `<think>…</think>` this knows the headings of HuatuoGPT-o1.
        """
        thought, ended, answer = text.partition("## Final Response")
        if ended and thought.lstrip().startswith("## Thinking"):
            return Message("assistant", answer.strip(), reasoning=thought.strip().removeprefix("## Thinking").strip())
        if "</think>" not in text and (self.opens_thought or text.lstrip().startswith("<think>")):
            return Message("assistant", "", reasoning=text.strip())
        message = Message("assistant", text)
        return replace(message, content=message.content.strip())

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files and, for other tools, what was taught.

        That is the tokens that end an answer, beside those that are there already, and the format as a template, unless
        the checkpoint's own template writes the same.
        """
        self.tokenizer.save(folder)
        self.save_ends(folder)
        known = not self.jinja
        with suppress(ValueError):  # a missing or broken template does not write the same
            known = known or _agree(self, TemplateChat(self.tokenizer))
        if not known:
            write_text(Path(folder) / TEMPLATE_FILE, self.jinja)

    def save_ends(self, folder: str | Path) -> None:
        """Name every token that ends an answer in the folder's generation_config.json, as other tools read it."""
        settings = read_object(Path(folder), GENERATION_FILE)
        settings.pop("_from_model_config", None)  # transformers would take the end from config.json again
        ends = list(dict.fromkeys([*_ends_of(settings, Path(folder)), *self.stop_tokens]))
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        write_json(Path(folder) / GENERATION_FILE, settings)


class Baichuan2Chat(ChatFormat):
    """`195 user 196 answer 195 user 196 answer 2`; a system text stands first, bare; no bos.

    As in the vendor's fine-tuning the target at the user token after an answer is eos, so every answer learns to stop
    although no eos stands between turns in the input.
    """

    role_tokens = ("<reserved_106>", "<reserved_107>")
    jinja = (
        "{% for message in messages %}"
        "{{ {'system': '', 'user': '<reserved_106>', 'assistant': '<reserved_107>'}[message['role']] }}"
        "{{ message['content'] }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<reserved_107>' }}"
        "{% elif messages and messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    )

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.user, self.assistant = map(tokenizer.token_id, self.role_tokens)
        if tokenizer.eos_id is None:
            raise ValueError("Baichuan2's chat format needs an eos_token in tokenizer_config.json")
        self.eos = tokenizer.eos_id
        # Generation may also run into the next user turn.
        self.stop_tokens = _stops(tokenizer, [self.eos, self.user])

    def render(self, messages: Sequence[Message], supervised: set[int], generation_prompt: bool) -> Rendered:
        tokens: list[int] = []
        targets: list[int] = []
        for i, message in enumerate(messages):
            if message.role != "system":
                tokens.append(self.user if message.role == "user" else self.assistant)
                targets.append(self.eos if i - 1 in supervised else IGNORE_INDEX)
            ids = self.tokenizer.encode(_said(messages, i))
            tokens += ids
            targets += ids if i in supervised else [IGNORE_INDEX] * len(ids)
        if generation_prompt:
            return [*tokens, self.assistant], [*targets, IGNORE_INDEX]
        if messages and messages[-1].role == "assistant":
            return [*tokens, self.eos], [*targets, self.eos if len(messages) - 1 in supervised else IGNORE_INDEX]
        return tokens, targets


class PiecewiseChat(ChatFormat):
    """A format whose pieces become tokens as the tokenizer would encode the whole text.

    Neighbouring text is encoded in one run, cut only at special tokens and where an answer begins or ends, whether or
    not it carries loss: tokens do not depend on what is supervised, and a prompt's are those that training saw.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        added = tokenizer.backend.get_added_tokens_decoder()
        special = {i: token for i, token in added.items() if token.special}
        # Some tokens (Phi's) swallow the whitespace beside them.
        self.strips_before = {i for i, token in special.items() if token.lstrip}
        self.strips_after = {i for i, token in special.items() if token.rstrip}
        # SentencePiece puts a space before a text; inside one it must not, and after a special token it depends.
        self.newline = tokenizer.encode("\n")
        self.prefixes = tokenizer.encode("a") != self._inside("a")
        self.prefixes_after_special = self.prefixes and _prefixes_after_special(tokenizer, set(special))

    def pieces(self, messages: Sequence[Message], generation_prompt: bool) -> list[Piece]:
        """What the format writes, in order."""
        raise NotImplementedError

    def check(self, pieces: list[Piece], supervised: set[int]) -> None:
        """Raise ValueError if these pieces cannot teach the answers in `supervised`."""

    def render(self, messages: Sequence[Message], supervised: set[int], generation_prompt: bool) -> Rendered:
        pieces = self.pieces(messages, generation_prompt)
        self.check(pieces, supervised)
        runs: list[Piece] = []
        for piece, answer in pieces:
            if isinstance(piece, str) and runs and isinstance(runs[-1][0], str) and runs[-1][1] == answer:
                runs[-1] = (runs[-1][0] + piece, answer)
            elif piece != "":
                runs.append((piece, answer))
        tokens: list[int] = []
        targets: list[int] = []
        for at, (piece, answer) in enumerate(runs):
            before, after = (runs[i][0] if 0 <= i < len(runs) else None for i in (at - 1, at + 1))
            if isinstance(piece, str):
                piece = piece.lstrip() if before in self.strips_after else piece
                piece = piece.rstrip() if after in self.strips_before else piece
                begins = before is None or (isinstance(before, int) and self.prefixes_after_special)
                ids = self.tokenizer.encode(piece) if begins or not self.prefixes else self._inside(piece)
            else:
                ids = [piece]
            tokens += ids
            targets += ids if answer in supervised else [IGNORE_INDEX] * len(ids)
        return tokens, targets

    def _inside(self, text: str) -> list[int]:
        """Ids of a text that does not begin the whole: encoded after a line break, whose ids are dropped again."""
        ids, size = self.tokenizer.encode("\n" + text), len(self.newline)
        return ids[size:] if ids[:size] == self.newline else self.tokenizer.encode(text)


class ChatML(PiecewiseChat):
    """`<|im_start|>role\\n…<|im_end|>\\n`; the `<|im_end|>` after an answer carries loss, the line break does not."""

    role_tokens = ("<|im_start|>", "<|im_end|>")
    jinja = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.start, self.end = map(tokenizer.token_id, self.role_tokens)
        self.stop_tokens = _stops(tokenizer, [self.end])

    def pieces(self, messages: Sequence[Message], generation_prompt: bool) -> list[Piece]:
        pieces: list[Piece] = []
        for i, message in enumerate(messages):
            answer = i if message.role == "assistant" else None
            pieces += [*self._header(message.role), (_said(messages, i), answer), (self.end, answer), ("\n", None)]
        return pieces + (self._header("assistant") if generation_prompt else [])

    def _header(self, role: str) -> list[Piece]:
        return [(self.start, None), (f"{role}\n", None)]


class Llama3Chat(PiecewiseChat):
    """`<|start_header_id|>role<|end_header_id|>\\n\\n…<|eot_id|>`, bos first; an answer's `<|eot_id|>` carries loss.

    As in the published template, messages lose the whitespace at their ends.
    """

    role_tokens = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    jinja = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    )

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.start, self.header_end, self.end = map(tokenizer.token_id, self.role_tokens)
        if tokenizer.bos_id is None:
            raise ValueError("Llama 3's chat format needs a bos_token in tokenizer_config.json")
        self.bos = tokenizer.bos_id
        others = [tokenizer.token_id(name) for name in ("<|end_of_text|>", "<|eom_id|>") if tokenizer.has(name)]
        self.stop_tokens = _stops(tokenizer, [self.end, *others])

    def pieces(self, messages: Sequence[Message], generation_prompt: bool) -> list[Piece]:
        pieces: list[Piece] = [(self.bos, None)]
        for i, message in enumerate(messages):
            answer = i if message.role == "assistant" else None
            pieces += [*self._header(message.role), (_said(messages, i).strip(), answer), (self.end, answer)]
        return pieces + (self._header("assistant") if generation_prompt else [])

    def _header(self, role: str) -> list[Piece]:
        return [(self.start, None), (role, None), (self.header_end, None), ("\n\n", None)]


class TemplateChat(PiecewiseChat):
    """The checkpoint's own Jinja template, rendered in a sandbox; see `ChatTemplate` for what carries loss."""

    def __init__(self, tokenizer: Tokenizer, enable_thinking: bool | None = None, today: str = "") -> None:
        super().__init__(tokenizer)
        found = read_template(tokenizer.config, tokenizer.folder)
        if found is None:
            raise ValueError(f"{tokenizer.folder}: it has no chat_template; set chat_format to a format by its name")
        added = tokenizer.backend.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special and token.content}
        longest_first = sorted(self.special, key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        day, self.enable_thinking = read_day(today), enable_thinking
        self.template = ChatTemplate(*found, _special_names(tokenizer), pattern, enable_thinking, day)
        self.today = day.isoformat() if self.template.is_dated else ""
        ends = []
        with suppress(ValueError):  # a template for another kind of conversation: whoever renders one will be told
            self.opens_thought = opens_thought(self.template.parts(_PROBES[0][:1], True))
            pieces = self.pieces(_PROBES[0], False)
            for (piece, answer), (after, follower) in zip(pieces, [*pieces[1:], ("", None)], strict=True):
                if answer is not None and answer != follower:
                    ends.append(piece if isinstance(piece, int) else after)
        self.stop_tokens = _stops(tokenizer, [end for end in ends if isinstance(end, int)])

    @property
    def thinks(self) -> bool:
        return self.template.thinks

    def pieces(self, messages: Sequence[Message], generation_prompt: bool) -> list[Piece]:
        pieces: list[Piece] = []
        for part in self.template.parts(messages, generation_prompt):
            texts = [part.text] if part.place is not None else self.template.special.split(part.text)
            # Splitting at a group leaves the special tokens at the odd places.
            pieces += [(self.special[t] if i % 2 else t, part.speaker) for i, t in enumerate(texts) if t]
        return pieces

    def check(self, pieces: list[Piece], supervised: set[int]) -> None:
        ends = {answer: piece for piece, answer in pieces}
        for i in supervised:
            if i not in ends:
                raise ValueError(f"the chat template writes no answer for message {i + 1}: {self.template.file}")
            if not self.template.marks_answers and isinstance(ends[i], str):
                raise ValueError(
                    "the chat template writes no special token after an answer, so a model would never learn to stop: "
                    f"{self.template.file}; add eos_token there, or set chat_format to another format"
                )


BUILT_IN = {"baichuan2": Baichuan2Chat, "chatml": ChatML, "llama3": Llama3Chat}
# Whitespace at the ends of a text shows whether a template trims it.
_PROBES = [
    [Message(role, f" {role} 1\n") for role in roles]
    for roles in (["user", "assistant"] * 2, ["system", *["user", "assistant"] * 2])
]


def chat_format(
    tokenizer: Tokenizer, name: str = "auto", enable_thinking: bool | None = None, today: str = ""
) -> ChatFormat:
    """The format called "baichuan2", "chatml" or "llama3", or "template" for the checkpoint's own Jinja template.

    "auto" is the built-in format whose role tokens the tokenizer has, unless the checkpoint's own template gives other
    ids; then, and where no format fits, that template. `enable_thinking` is for thinking models: false asks for answers
    without reasoning, None leaves it to the template. `today`, like "2026-03-31", is for templates that write the date;
    empty: the day on the clock.
    """
    if name not in ("auto", "template", *BUILT_IN):
        names = ", ".join(f'"{known}"' for known in ("auto", *BUILT_IN))
        raise ValueError(f'chat_format {name!r} is unknown; expected {names} or "template"')
    own = None
    if name == "template" or (name == "auto" and read_template(tokenizer.config, tokenizer.folder) is not None):
        own = TemplateChat(tokenizer, enable_thinking, today)
    fitting = BUILT_IN.get(name)
    if name == "auto":
        fitting = next((kind for kind in BUILT_IN.values() if tokenizer.has(*kind.role_tokens)), None)
    if fitting is None:
        if own is None:
            known = ", ".join(kind.role_tokens[0] for kind in BUILT_IN.values())
            raise ValueError(f"the tokenizer has none of {known} and no chat_template: its chat format is unknown")
        return own
    built_in = fitting(tokenizer)
    built_in.enable_thinking = enable_thinking
    return own if own and (own.thinks or not _agree(built_in, own)) else built_in


def read_day(text: str) -> date:
    """A day like "2026-03-31", today if empty; ValueError for any other text."""
    try:
        return date.fromisoformat(text) if text else date.today()
    except ValueError:
        raise ValueError(f"template_date is {text!r}, expected a day like 2026-03-31") from None


def _said(messages: Sequence[Message], i: int) -> str:
    """The text of message i; the last message includes its reasoning."""
    return messages[i].written if i == len(messages) - 1 else messages[i].content


def _stops(tokenizer: Tokenizer, ends: list[int]) -> tuple[int, ...]:
    """`ends`, the end of a text, and what the checkpoint's generation_config.json calls an end, each once."""
    folder = tokenizer.folder
    known = _ends_of(read_object(folder, GENERATION_FILE), folder) if folder else []
    return tuple(dict.fromkeys([*ends, *([] if tokenizer.eos_id is None else [tokenizer.eos_id]), *known]))


def _ends_of(settings: dict[str, Any], folder: Path) -> list[int]:
    """`eos_token_id` of a generation_config.json as a list."""
    found = settings.get("eos_token_id")
    ends = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(end) is int for end in ends):
        raise ValueError(f"{folder / GENERATION_FILE}: eos_token_id is {found!r}; expected an id or a list of ids")
    return ends


def _special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables that templates know: bos_token, eos_token and their like, where the checkpoint names them."""
    keys = [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    values = {key: tokenizer.config.get(key) for key in keys}
    names = {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}
    return {key: name for key, name in names.items() if isinstance(name, str)}


def _prefixes_after_special(tokenizer: Tokenizer, special: set[int]) -> bool:
    """Whether a text gets SentencePiece's space also after a special token, as the tokenizer itself parses both."""
    backend = tokenizer.backend
    name = next((token for i in special if (token := backend.id_to_token(i))), None)
    if name is None:
        return True
    backend.encode_special_tokens = False
    try:
        return backend.encode(f"{name}a", add_special_tokens=False).ids[1:] == tokenizer.encode("a")
    finally:
        backend.encode_special_tokens = True


def _agree(built_in: ChatFormat, own: ChatFormat) -> bool:
    """Whether two formats give the same ids, but for what may follow the last answer of a whole conversation."""
    for probe in _PROBES:
        for messages, generation_prompt in ((probe, False), (probe[:-1], True)):
            try:
                left, right = (chat.render(messages, set(), generation_prompt)[0] for chat in (built_in, own))
            except ValueError:  # a template without a system text, say, is not the built-in format
                return False
            common = max(len(left), len(right)) if generation_prompt else min(len(left), len(right))
            if left[:common] != right[:common]:
                return False
    return True
