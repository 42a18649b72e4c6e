"""Text to token ids and back, over the `tokenizers` library."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from pedgpt.data.sentencepiece import convert_sentencepiece

JSON_FILE, MODEL_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
# What a checkpoint folder keeps of its tokenizer, so that other tools still load the folder that we write.
_COMPANIONS = (
    JSON_FILE, MODEL_FILE, CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_CONTROL = re.compile(r"<[^<>\s]+>$")


class Tokenizer:
    """Token ids of plain text; special tokens enter only by id, never from text that spells them.

    `bos_id`, `eos_id`, `pad_id` are None where the checkpoint names none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path | None = None) -> None:
        self.backend = _protect_control_tokens(backend)
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self.config, self.folder = config, folder
        self.bos_id, self.eos_id, self.pad_id = (self._named(key) for key in ("bos_token", "eos_token", "pad_token"))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that a model's embedding needs at least."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with nothing added before or after."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int:
        """The id of a token given by its exact name; ValueError if the vocabulary lacks it."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return found

    def has(self, *names: str) -> bool:
        """Whether the vocabulary has all these tokens."""
        return all(self.backend.token_to_id(name) is not None for name in names)

    def check_fits(self, vocab_size: int, folder: str) -> None:
        """Raise ValueError if the tokenizer has ids beyond the model's vocabulary (which may well be larger)."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"{folder}: the model has a vocabulary of {vocab_size} tokens, its tokenizer needs {self.vocab_size}; "
                "they do not belong together"
            )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, or copy the files that the tokenizer came with."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.folder is not None:
            # Code that auto_map names is copied, for tools that run it; pedgpt does not.
            for name in (*_COMPANIONS, *(path.name for path in self.folder.glob("*.py"))):
                if (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                    shutil.copyfile(self.folder / name, folder / name)
            return
        self.backend.save(str(folder / JSON_FILE))
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")

    def _named(self, key: str) -> int | None:
        value = self.config.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        if name is not None and not (isinstance(name, str) and self.has(name)):
            raise ValueError(f"{(self.folder or Path()) / CONFIG_FILE}: {key} is {name!r}, which the tokenizer lacks")
        return None if name is None else self.token_id(name)


class StreamDecoder:
    """Turns ids that arrive one by one into text, holding back a character until all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.context: list[int] = []  # already printed; decoded again so that spacing between tokens is right
        self.pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that this id completes, perhaps empty."""
        self.pending.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        self.context, self.pending = self.pending, []
        return text

    def finish(self) -> str:
        """What is left at the end, broken characters included."""
        text = self._new_text() if self.pending else ""
        self.context, self.pending = [], []
        return text

    def _new_text(self) -> str:
        return self.tokenizer.decode(self.context + self.pending)[len(self.tokenizer.decode(self.context)) :]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder: tokenizer.json, or else tokenizer.model (SentencePiece BPE, converted).

    Raises ValueError naming the file if there is neither or one is broken.
    """
    folder = Path(folder)
    config: dict[str, Any] = {}
    if (folder / CONFIG_FILE).is_file():
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder / CONFIG_FILE}: not valid JSON ({error})") from None
        if not isinstance(config, dict):
            raise ValueError(f"{folder / CONFIG_FILE}: expected a JSON object, found {type(config).__name__}")
    if (folder / JSON_FILE).is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / JSON_FILE))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{folder / JSON_FILE}: not a tokenizer ({error})") from None
    elif (folder / MODEL_FILE).is_file():
        backend = convert_sentencepiece(folder / MODEL_FILE)
    else:
        raise ValueError(f"{folder}: no tokenizer; expected {JSON_FILE} or {MODEL_FILE}")
    return Tokenizer(backend, config, folder)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """A byte-level BPE trained on `texts`, whose first ids are `special_tokens` (unknown, bos, eos, then others)."""
    if len(special_tokens) < 3:
        raise ValueError("special_tokens must begin with the unknown, the begin and the end token")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True) for name in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    unknown, begin, end = special_tokens[:3]
    config = {"bos_token": begin, "eos_token": end, "pad_token": unknown, "unk_token": unknown}
    return Tokenizer(backend, config)


def _protect_control_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Mark every added token of the form <…> special, so that text that spells one is encoded as plain text.

    Checkpoints forget the mark on some of them (Baichuan2's reserved tokens, Qwen's tool tags).
    """
    unmarked = [t for t in backend.get_added_tokens_decoder().values() if not t.special and _CONTROL.match(t.content)]
    if not unmarked:
        return backend
    state = json.loads(backend.to_str())
    names = {token.content for token in unmarked}
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] in names
    return tokenizers.Tokenizer.from_str(json.dumps(state))
