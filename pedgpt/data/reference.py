"""The frozen reference's log-probabilities of preference pairs, kept in a file from one run to the next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pedgpt.data.chat import ChatFormat, TemplateChat
from pedgpt.data.chat_template import read_template
from pedgpt.data.tokenizer import Tokenizer
from pedgpt.files import atomic_write

_NAME, _DATE = "logps", "template_date"


def reference_key(*, model: str, chat: ChatFormat, data: str, dtype: str) -> dict[str, str]:
    """All that the log-probabilities of pairs depend on, as short texts.

    `model` is the reference's fingerprint, `data` that of the pairs, `dtype` that of the computation; the tokenizer is
    `chat`'s.
    """
    return {
        "model": model, "tokenizer": tokenizer_fingerprint(chat.tokenizer), "chat_format": chat_fingerprint(chat),
        "data": data, "dtype": dtype, **({_DATE: chat.today} if chat.today else {}),
    }  # fmt: skip


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A short name of the vocabulary, the merges, the added tokens and every step before and after them."""
    return _short(tokenizer.description())


def chat_fingerprint(chat: ChatFormat) -> str:
    """The format's name; of a Jinja template, its text and the special tokens' names that it is given as well."""
    name = type(chat).__name__
    if not isinstance(chat, TemplateChat):
        return name
    found = read_template(chat.tokenizer.config, chat.tokenizer.folder)
    return f"{name} {_short(json.dumps([found and found[0], chat.template.variables], sort_keys=True))}"


def reference_date(path: str | Path) -> str:
    """The day that is written in the prompts of a file, for a run that shares it; "" without a file or a day."""
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as handle:
        return (handle.metadata() or {}).get(_DATE, "")
    return ""


def save_reference(path: str | Path, logps: Tensor, key: Mapping[str, str]) -> None:
    """Write `logps` [pairs, 2] (chosen, rejected) float32 with its key, at once: the file is whole or not there.

    Raises ValueError, before anything is written, for another shape or dtype and for values that are not finite.
    """
    assert "format" not in key, "safetensors' own entry"
    path = Path(path)
    if fault := _fault(logps, len(logps)):
        raise ValueError(f"{path}: not written: {fault}")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({_NAME: logps.detach().cpu().contiguous()}, metadata={"format": "pt", **key})
    with atomic_write(path, "wb", size=len(content)) as handle:
        handle.write(content)


def load_reference(path: str | Path, key: Mapping[str, str], num_pairs: int, *, must_fit: bool = True) -> Tensor | None:
    """The log-probabilities [num_pairs, 2] float32 that were saved under `key`; None if there is no such file.

    A file that was written under another key, cannot be read, or holds anything but finite float32 numbers of that
    shape is a ValueError that names the file and the remedy, and every entry of the key that differs; None instead if
    the file need not fit.
    """
    try:
        with safe_open(path, "pt") as handle:
            found, names = dict(handle.metadata() or {}), sorted(handle.keys())
            tensor = handle.get_tensor(_NAME).clone() if names == [_NAME] else None  # not mapped from the file
        differing = "; ".join(
            f"{name[:40]!r} is {_quoted(found.get(name))}, expected {_quoted(key.get(name))}"
            for name in sorted({*found, *key} - {"format"})
            if found.get(name) != key.get(name)
        )
        fault = f"holds another run's reference log-probabilities: {differing}" if differing else None
        if tensor is None:
            others = ", ".join(map(_quoted, names[:5])) or "none"
            fault = fault or f"must hold one tensor, {_NAME!r}, found {others}"
        else:
            fault = fault or _fault(tensor, num_pairs)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, RuntimeError, MemoryError, OverflowError) as error:
        fault = f"cannot be read as safetensors, it may be truncated ({error})"
    if fault and must_fit:
        raise ValueError(f"{path}: {fault}; delete the file, or give another path via --reference_logps")
    return None if fault else tensor


def _fault(logps: Tensor, num_pairs: int) -> str | None:
    """What is wrong with these log-probabilities."""
    if logps.dtype != torch.float32 or logps.shape != (num_pairs, 2):
        kind = str(logps.dtype).removeprefix("torch.")
        return f"{_NAME} is {kind} of shape {list(logps.shape)}, expected float32 of shape [{num_pairs}, 2]"
    if len(bad := (~logps.isfinite()).any(dim=1).nonzero()):
        first = int(bad[0]) + 1
        return f"{len(bad)} of {num_pairs} pairs have a log-probability that is not finite, first pair {first}"
    return None


def _quoted(text: str | None) -> str:
    return "missing" if text is None else repr(text[:80])


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
