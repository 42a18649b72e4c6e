"""Text to token ids and back, over the `tokenizers` library."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from pedgpt.data.sentencepiece import convert_sentencepiece
from pedgpt.files import atomic_write, own_file, read_object, write_json, write_text

JSON_FILE, MODEL_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
ADDED_FILE, NAMES_FILE = "added_tokens.json", "special_tokens_map.json"
# What a checkpoint folder keeps of its tokenizer, so that other tools still load the folder that we write.
_COMPANIONS = (
    JSON_FILE, MODEL_FILE, CONFIG_FILE, ADDED_FILE, NAMES_FILE, "vocab.json", "merges.txt", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_CONTROL = re.compile(r"<[^<>\s]+>$")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>$")
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")  # add a bos unless their config says otherwise


class Tokenizer:
    """Token ids of plain text; special tokens enter only by id, never from text that spells them.

    `bos_id`, `eos_id`, `pad_id` are None where the checkpoint names none. `special` holds the id of each special token.
    `document_prefix` holds the ids that the checkpoint puts before a document: its bos, or nothing.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path | None = None) -> None:
        self.backend, self.config, self.folder = backend, config, folder
        names = [token_name(config.get(key)) for key in NAMED[:3]]
        named = [None if name is None else self.token_id(name) for name in names]
        self.bos_id, self.eos_id, self.pad_id = named
        lists = [config[key] for key in _LISTED if isinstance(config.get(key), list)]
        lists.append([token for token in config.get("added_tokens_decoder", {}).values() if token.get("special")])
        named += [backend.token_to_id(token_name(token) or "") for tokens in lists for token in tokens]
        _protect_special_tokens(backend, {i for i in named if i is not None})
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder().items()
        self.special = {token.content: i for i, token in added if token.special}
        if folder is None or (folder / JSON_FILE).is_file():
            found = backend.encode("a", add_special_tokens=True)
            self.document_prefix = found.ids[: [*found.special_tokens_mask, 0].index(0)]
        else:
            adds_bos = config.get("add_bos_token", config.get("tokenizer_class") in _LLAMA)
            self.document_prefix = [self.bos_id] if adds_bos and self.bos_id is not None else []

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that a model's embedding needs at least."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

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
        if (found := self.backend.token_to_id(token)) is None:
            raise ValueError(f"{self.folder}: the tokenizer has no token {token!r}")
        return found

    def stop_ids(self, strings: Sequence[str]) -> set[int]:
        """The ids of the special tokens that `strings` spell. No decoded text holds them, so they stop by id."""
        return {self.special[text] for text in strings if text in self.special}

    def has(self, *names: str) -> bool:
        """Whether the vocabulary has all these tokens."""
        return all(self.backend.token_to_id(name) is not None for name in names)

    def description(self) -> str:
        """All that the ids of a text depend on, as text, from which a fingerprint is made."""
        return self.backend.to_str()

    def check_fits(self, vocab_size: int, folder: str) -> None:
        """Raise ValueError if the tokenizer has ids beyond the model's vocabulary (which may well be larger)."""
        if self.vocab_size > vocab_size:
            sizes = f"the model has a vocabulary of {vocab_size} tokens, its tokenizer needs {self.vocab_size}"
            raise ValueError(f"{folder}: {sizes}; they do not belong together")

    def save(self, folder: str | Path) -> None:
        """Copy the files that the tokenizer came with; without such, write tokenizer.json and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.folder is None:
            write_text(folder / JSON_FILE, self.backend.to_str(pretty=True))
            write_json(folder / CONFIG_FILE, self.config)
        elif self.folder.resolve() != folder.resolve():
            # Code that auto_map names is copied, for tools that run it; pedgpt does not.
            for name in (*_COMPANIONS, *(path.name for path in self.folder.glob("*.py"))):
                if source := own_file(self.folder, name):
                    with atomic_write(folder / name, "wb") as target:
                        target.write(source.read_bytes())
                elif name == "chat_template.jinja":  # an earlier one would hide that of tokenizer_config.json
                    (folder / name).unlink(missing_ok=True)


class StreamDecoder:
    """Turns ids that arrive one by one into the text of `Tokenizer.decode`, holding back what is not yet certain.

    That is a character until all its bytes are there, and what may begin one of `stop_strings`. `stopped` becomes
    True when one is complete, or when the special token that one spells arrives; the rest is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self.stop_ids = tokenizer.stop_ids(stop_strings)
        self.tokenizer, self.stop_strings, self.stopped = tokenizer, tuple(stop_strings), False
        # Their first `given` characters were given: the last id is decoded again, so that spacing after it is right.
        self.ids: list[int] = []
        self.given, self.held = 0, ""

    def push(self, token: int) -> str:
        """The text that this id completes, perhaps empty."""
        if token in self.stop_ids and not self.stopped:
            text, self.stopped = self.finish(), True
            return text
        name = self.tokenizer.backend.id_to_token(token)
        if self.stopped or name is None or name in self.tokenizer.special:
            return ""
        self.ids.append(token)
        text, last = self.tokenizer.decode(self.ids), self.tokenizer.decode([token])
        if _BYTE.match(name) or text.endswith("\ufffd"):  # one wrong byte spoils the whole run
            return ""
        new, self.given = text[self.given :], len(text)
        if last:  # else what follows would be taken for the beginning of a text, which may lose its space
            self.ids, self.given = [token], len(last)
        return self._release(new)

    def finish(self) -> str:
        """What is left at the end, broken characters included."""
        text = "" if self.stopped else self._release(self.tokenizer.decode(self.ids)[self.given :]) + self.held
        self.ids, self.given, self.held = [], 0, ""
        return text

    def _release(self, text: str) -> str:
        """What cannot be part of a stop string any more."""
        text, self.held = self.held + text, ""
        found = [(at + len(stop), at) for stop in self.stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        begun = (n for stop in self.stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n]))
        size = len(text) - max(begun, default=0)
        self.held = text[size:]
        return text[:size]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder: tokenizer.json, or else tokenizer.model (SentencePiece BPE, converted).

    special_tokens_map.json names what tokenizer_config.json does not. Raises ValueError naming the file if there is no
    tokenizer, a file is broken, a tokenizer.model lacks tokens that the files beside it add, or a file is a link that
    leaves the folder (a hub cache's links to its blobs are fine).
    """
    folder = Path(folder)
    config, names = read_object(folder, CONFIG_FILE), read_object(folder, NAMES_FILE)
    config |= {key: names[key] for key in (*NAMED, *_LISTED) if key in names and key not in config}
    path = own_file(folder, JSON_FILE) or own_file(folder, MODEL_FILE)
    if path is None:
        raise ValueError(f"{folder}: no tokenizer; expected {JSON_FILE} or {MODEL_FILE}")
    try:
        if path.name == JSON_FILE:
            backend = tokenizers.Tokenizer.from_file(str(path))
        else:
            backend, added = convert_sentencepiece(path), read_object(folder, ADDED_FILE)
            added |= {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
            if lost := [name for name, i in added.items() if backend.token_to_id(name) != i]:
                where = f"{ADDED_FILE} or {CONFIG_FILE} declares {lost[0]!r} with id {added[lost[0]]}"
                raise ValueError(f"{where}, which is not in {MODEL_FILE}; save the tokenizer as {JSON_FILE}")
    except Exception as error:  # the library raises bare Exception over a broken file
        fault = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a usable tokenizer with the files beside it ({fault})") from None
    return Tokenizer(backend, config, folder)


def taught_folder(model: str, adapter: str = "") -> str:
    """The folder with a model's tokenizer, template and end tokens: the adapter's, if it holds a tokenizer."""
    beside = adapter and any((Path(adapter) / name).is_file() for name in (JSON_FILE, MODEL_FILE))
    return adapter if beside else model


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """A byte-level BPE trained on `texts`, whose first ids are `special_tokens` (unknown, bos, eos, then others)."""
    backend = tokenizers.Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True) for name in special_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    unknown, begin, end = special_tokens[:3]
    config = {"bos_token": begin, "eos_token": end, "pad_token": unknown, "unk_token": unknown}
    return Tokenizer(backend, config)


def token_name(token: object) -> str | None:
    """The name of a token as a configuration writes it, a string or {"content": …}; None for anything else."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _protect_special_tokens(backend: tokenizers.Tokenizer, named: set[int]) -> None:
    """Mark the tokens in `named` and every added token of the form <…> special, so that text never yields them.

    Checkpoints forget the mark on some of them (Baichuan2's reserved tokens, Qwen's <|fim_prefix|>). Tags that come in
    pairs and are not marked, <think> and </think>, stay what they are: tokens that text may hold.
    """
    added = backend.get_added_tokens_decoder()
    names = {token.content for token in added.values()}
    tags = {name for name in names if {f"<{name.strip('</>')}>", f"</{name.strip('</>')}>"} <= names}
    control = {i for i, token in added.items() if _CONTROL.match(token.content) and token.content not in tags}
    tokens = [added.get(i) or AddedToken(backend.id_to_token(i), normalized=False) for i in sorted(named | control)]
    for token in tokens:
        token.special = True
    backend.add_tokens(tokens)
