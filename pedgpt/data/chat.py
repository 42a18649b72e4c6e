"""Chat formats: how a family writes roles, with a loss mask that is exact because it is made piece by piece."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

from pedgpt.data.chat_template import TEMPLATE_FILE, ChatTemplate, Part, opens_thought, read_template, text_of
from pedgpt.data.records import Message
from pedgpt.data.tokenizer import Tokenizer, load_tokenizer, token_name
from pedgpt.files import read_object, write_json, write_text

IGNORE_INDEX = -100
GENERATION_FILE = "generation_config.json"
_PROBE = [Message(role, role) for role in ("user", "assistant", "user", "assistant")]  # shows what ends an answer


class ChatFormat:
    """How a family writes roles. `render` gives tokens, `stop_tokens` what ends an answer.

    Neighbouring text is encoded in one run, cut only at special tokens and where an answer begins or ends, whether or
    not it carries loss: tokens do not depend on what is supervised, and a prompt's are those that training saw.
    The last answer is written with its reasoning, if it has any; earlier ones without. `opens_thought` says whether the
    prompt ends with `<think>`, after which the model goes on with its reasoning; `thinks` whether to expect reasoning
    before a new answer. `today` is the day that the format writes, or "" if it writes none.
    """

    jinja = ""  # the template of a built-in format; empty: the checkpoint's own
    role_tokens: tuple[str, ...] = ()  # a tokenizer that has them was made for this format
    teaches_eos = False  # whether the target at an answer's end is eos, though another token stands there
    opens_thought = False

    def __init__(self, tokenizer: Tokenizer, enable_thinking: bool | None = None, today: str = "") -> None:
        self.tokenizer, self.enable_thinking = tokenizer, enable_thinking
        own = (self.jinja, Path(type(self).__name__)) if self.jinja else None
        if not (found := own or read_template(tokenizer.config, tokenizer.folder)):
            lacking = f"no chat_template, and no tokens like {BUILT_IN['chatml'].role_tokens[0]} that tell its format"
            raise ValueError(f"{tokenizer.folder}: it has {lacking}; set chat_format to one of {', '.join(BUILT_IN)}")
        special = tokenizer.special | {role: tokenizer.token_id(role) for role in self.role_tokens}
        names = ((key, token_name(value)) for key, value in tokenizer.config.items() if key.endswith("_token"))
        given: dict[str, Any] = {key: name for key, name in names if name is not None}
        given |= {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        day = date.fromisoformat(today) if today else date.today()
        self.template = ChatTemplate(*found, given, special, day)
        self.thinks, self.today = self.template.thinks, self.template.today
        self.answer_end = tokenizer.eos_id if self.teaches_eos else None
        self.stop_tokens = self._stop_tokens()
        # SentencePiece puts a space before a text. Inside one it must not; after a special token it is tried here.
        self.newline = tokenizer.encode("\n")
        alone = tokenizer.encode("a")
        self.prefixes = alone != self._inside("a")
        tokenizer.backend.encode_special_tokens = False  # as the tokenizer itself parses both
        parsed = tokenizer.encode(f"{next(iter(special), '')}a")
        tokenizer.backend.encode_special_tokens = True
        self.prefixes_after_special = self.prefixes and parsed[-len(alone) :] == alone

    def render(
        self, messages: Sequence[Message], supervised: set[int], generation_prompt: bool
    ) -> tuple[list[int], list[int]]:
        """Tokens of `messages`, and what should be predicted there, −100 for nothing but the answers in `supervised`.

        Raises ValueError naming the template if it cannot write these messages, or cannot teach these answers.
        """
        if self.enable_thinking is False:
            messages = [replace(message, reasoning="") for message in messages]
        parts = self.template.parts(messages, generation_prompt)
        ends = {part.speaker: part.token for part in parts}
        if any(ends.get(i) is None for i in supervised):
            raise ValueError(
                "the chat template writes no special token after an answer, so a model would never learn to stop: "
                f"{self.template.file}; add eos_token there, or set chat_format to another format"
            )
        tokens: list[int] = []
        targets: list[int] = []
        before = None
        for (speaker, token), group in groupby(filter(attrgetter("text"), parts), key=attrgetter("speaker", "token")):
            run = list(group)
            if token is not None:
                ids = [token] * len(run)
                taught = ids if self.answer_end is None else [self.answer_end] * len(run)
            elif self.prefixes and tokens and (before is None or not self.prefixes_after_special):
                ids = taught = self._inside(text_of(run))
            else:
                ids = taught = self.tokenizer.encode(text_of(run))
            tokens += ids
            targets += taught if speaker in supervised else [IGNORE_INDEX] * len(ids)
            before = token
        return tokens, targets

    @property
    def fingerprint(self) -> str:
        """The format's name, and one of its template with the special tokens' names and settings given to it."""
        given = json.dumps([self.template.source, self.template.variables], sort_keys=True)
        return f"{type(self).__name__} {hashlib.sha256(given.encode()).hexdigest()[:16]}"

    def read_answer(self, text: str) -> Message:
        """What a model wrote after a prompt, as a message; its content is empty if the reasoning never ended."""
        thought, ended, answer = text.partition("## Final Response")
        if ended and thought.lstrip().startswith("## Thinking"):  # the headings of HuatuoGPT-o1
            return Message("assistant", answer.strip(), reasoning=thought.strip().removeprefix("## Thinking").strip())
        if "</think>" not in text and (self.opens_thought or text.lstrip().startswith("<think>")):
            return Message("assistant", "", reasoning=text.strip())
        message = Message("assistant", text)
        return replace(message, content=message.content.strip())

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files and, for other tools, what was taught: the ends of answers, and the template."""
        self.tokenizer.save(folder)
        self.save_ends(folder)
        if self.jinja:
            write_text(Path(folder) / TEMPLATE_FILE, self.jinja)

    def save_ends(self, folder: str | Path) -> None:
        """Name every token that ends an answer in the folder's generation_config.json, as other tools read it."""
        settings = read_object(Path(folder), GENERATION_FILE)
        settings.pop("_from_model_config", None)  # transformers would take the end from config.json again
        ends = list(dict.fromkeys([*_ends_of(settings), *self.stop_tokens]))
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        write_json(Path(folder) / GENERATION_FILE, settings)

    def _stop_tokens(self) -> tuple[int, ...]:
        """What ends an answer in the template, the end of a text, and the ends of generation_config.json, each once."""
        ends: list[int | None] = []
        with suppress(ValueError):  # a template for another kind of conversation: whoever renders one will be told
            self.opens_thought = opens_thought(self.template.parts(_PROBE[:1], True))
            for part, after in pairwise([*self.template.parts(_PROBE, False), Part("")]):
                if part.speaker not in (None, after.speaker):
                    ends.insert(0, after.token if part.token is None else part.token)
        folder = self.tokenizer.folder
        ends += [self.tokenizer.eos_id, *(_ends_of(read_object(folder, GENERATION_FILE)) if folder else [])]
        return tuple(end for end in dict.fromkeys(ends) if end is not None)

    def _inside(self, text: str) -> list[int]:
        """Ids of a text that is not the first: a line break before it keeps a space away; its ids are dropped."""
        ids, size = self.tokenizer.encode("\n" + text), len(self.newline)
        return ids[size:] if ids[:size] == self.newline else self.tokenizer.encode(text)


class Baichuan2Chat(ChatFormat):
    """`195 user 196 answer 195 user 196 answer 2`; a system text stands first, bare; no bos.

    195 is `<reserved_106>`, 196 `<reserved_107>`, 2 eos. As in the vendor's fine-tuning the target at the user token
    after an answer is eos, so every answer learns to stop although no eos stands between turns in the input.
    Generation may also run into the next user turn.
    """

    role_tokens = ("<reserved_106>", "<reserved_107>")
    teaches_eos = True
    jinja = (
        "{% for message in messages %}"
        "{{ {'system': '', 'user': '<reserved_106>', 'assistant': '<reserved_107>'}[message['role']] }}"
        "{{ message['content'] }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<reserved_107>' }}"
        "{% elif messages and messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    )


class ChatML(ChatFormat):
    """`<|im_start|>role\\n…<|im_end|>\\n`; the `<|im_end|>` after an answer carries loss, the line break does not."""

    role_tokens = ("<|im_start|>", "<|im_end|>")
    jinja = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


class Llama3Chat(ChatFormat):
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


BUILT_IN = {"baichuan2": Baichuan2Chat, "chatml": ChatML, "llama3": Llama3Chat}


def chat_format(
    tokenizer: Tokenizer, name: str = "auto", enable_thinking: bool | None = None, today: str = ""
) -> ChatFormat:
    """The format called "baichuan2", "chatml" or "llama3", or "template" for the checkpoint's own Jinja template.

    "auto" is that template if there is one, unless it is a built-in format's, and otherwise the built-in format whose
    role tokens the tokenizer has. `enable_thinking` false asks a thinking model for answers without reasoning, None
    leaves it to the template. `today`, like "2026-03-31", is for templates that write the date; empty: the clock's.
    """
    if name not in ("auto", "template", *BUILT_IN):
        names = ", ".join(f'"{known}"' for known in ("auto", *BUILT_IN))
        raise ValueError(f'chat_format {name!r} is unknown; expected {names} or "template"')
    if name == "auto":
        own = read_template(tokenizer.config, tokenizer.folder)
        for known, kind in BUILT_IN.items():
            if kind.jinja == own[0] if own else tokenizer.has(*kind.role_tokens):
                name = known
    return BUILT_IN.get(name, ChatFormat)(tokenizer, enable_thinking, today)


@dataclass(kw_only=True)
class FormatSettings:
    """How conversations are written."""

    chat_format: str = "auto"  # auto, baichuan2, chatml, llama3, or template (the model's own)
    enable_thinking: bool | None = None  # of a thinking model: false leaves reasoning out; unset, the template decides
    template_date: str = ""  # the day that a dated template writes, like 2026-03-31; empty: today, or when a run began

    def format(self, tokenizer: Tokenizer) -> ChatFormat:
        """The chat format of a tokenizer."""
        return chat_format(tokenizer, self.chat_format, self.enable_thinking, self.template_date)


@dataclass(kw_only=True)
class ChatSettings(FormatSettings):
    """How a stage reads conversations or preference pairs, and writes them as tokens."""

    model: str  # folder of the model
    row_length: int = 4096  # tokens in a packed row; for pairs, the most tokens of a prompt with one of its answers
    columns: list[str] = field(default_factory=list)  # field=column, e.g. question=ask, if the column's name is unknown
    on_bad_row: str = "error"  # "error" stops at a bad row, "skip" counts it and goes on
    on_long_row: str = "error"  # rows that do not fit: "error" names them, "skip" leaves them out, "truncate" cuts them

    def load_chat(self, today: str, read_sizes: Callable[[str], Any]) -> ChatFormat:
        """The model's chat format; its day is kept as `template_date`, so that the run goes on with it on another.

        Raises ValueError if its tokens or `row_length` do not fit the ModelConfig that `read_sizes` reads.
        """
        self.template_date = today
        chat, sizes = self.format(load_tokenizer(self.model)), read_sizes(self.model)
        chat.tokenizer.check_fits(sizes.vocab_size, self.model)
        sizes.check_length(self.row_length)
        self.template_date = chat.today
        return chat


def _ends_of(settings: dict[str, Any]) -> list[int]:
    """`eos_token_id` of a generation_config.json as a list."""
    found = settings.get("eos_token_id")
    return [] if found is None else found if isinstance(found, list) else [found]
