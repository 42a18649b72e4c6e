"""Training and held-out rows that share no question."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def question_key(text: str) -> str:
    """A question without spaces, punctuation, case and width, so that two spellings of it are equal."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if unicodedata.category(c)[0] in "LNS")


def split(
    rows: Sequence[T],
    question: Callable[[T], str],
    *,
    identity: Callable[[T], str] | None = None,
    heldout_share: float,
    seed: int,
) -> tuple[list[T], list[T], int]:
    """(training, held-out, repeated): by a hash of each row's question, so equal questions fall on the same side.

    Rows whose `identity` (by default the question) repeats an earlier one's are left out and counted. Order is kept;
    the result depends on the texts and the seed alone.
    """
    seen: set[str] = set()
    training: list[T] = []
    heldout: list[T] = []
    for row in rows:
        name = question_key(question(row))
        key = name if identity is None else question_key(identity(row))
        if key in seen:
            continue
        seen.add(key)
        number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
        (heldout if number < heldout_share * 2**64 else training).append(row)
    return training, heldout, len(rows) - len(seen)
