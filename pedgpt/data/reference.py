"""The frozen reference's log-probabilities of preference pairs, kept in a file from one run to the next."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pedgpt.data.chat import ChatFormat
from pedgpt.files import atomic_write

_NAME = "logps"


def reference_key(*, model: str, chat: ChatFormat, data: str, dtype: str) -> dict[str, str]:
    """All that the log-probabilities of pairs depend on, as short texts.

    `model` is the reference's fingerprint, `data` that of the pairs, `dtype` that of the computation.
    """
    tokenizer = hashlib.sha256(chat.tokenizer.description().encode()).hexdigest()[:16]
    key = {"model": model, "tokenizer": tokenizer, "chat_format": chat.fingerprint, "data": data, "dtype": dtype}
    return key | ({"template_date": chat.today} if chat.today else {})


def save_reference(path: str | Path, logps: Tensor, key: Mapping[str, str]) -> None:
    """Write `logps` [pairs, 2] (chosen, rejected) float32 with its key, at once: the file is whole or not there."""
    path = Path(path)
    if not logps.isfinite().all():
        raise ValueError(f"{path}: not written: a log-probability of the reference is not finite")
    content = save({_NAME: logps.detach().cpu().contiguous()}, metadata={"format": "pt", **key})
    with atomic_write(path, "wb", size=len(content)) as handle:
        handle.write(content)


def load_reference(path: str | Path, key: Mapping[str, str], num_pairs: int, *, must_fit: bool = True) -> Tensor | None:
    """The log-probabilities [num_pairs, 2] float32 that were saved under `key`; None if there is no such file.

    A file that was written under another key or cannot be read is a ValueError that names every entry of the key that
    differs; None instead if the file need not fit.
    """
    try:
        with safe_open(path, "pt") as handle:
            found, tensor = handle.metadata() or {}, handle.get_tensor(_NAME).clone()  # not mapped from the file
        names = [name for name in sorted({*found, *key} - {"format"}) if found.get(name) != key.get(name)]
        if not names and tensor.shape == (num_pairs, 2):
            return tensor
        differing = "; ".join(f"{name!r} is {found.get(name)!r}, expected {key.get(name)!r}" for name in names)
        fault = f"holds another run's reference log-probabilities: {differing or tensor.shape}"
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        fault = f"cannot be read ({error})"
    if must_fit:
        raise ValueError(f"{path}: {fault}; delete the file, or give another path via --reference_logps")
    return None
