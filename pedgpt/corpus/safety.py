"""Synthetic safety and self-cognition rows: requests and safe answers from templates/safety.toml, no doses."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from pedgpt.corpus.dialogues import ask_text
from pedgpt.corpus.rows import Ask, Built, Dropped, Unusable
from pedgpt.data.records import Conversation, Message

SAFETY, SELF_COGNITION = "safety", "self_cognition"


def safety(diseases_or_symptoms: Sequence[str] = (), ask: Ask | None = None) -> Iterator[Built | Dropped]:
    """Risky requests with answers that refuse what is unsafe and name the next step.

    Some requests speak of a disease or symptom: each of those given, or four common ones. With `ask`, every row is
    followed by one whose question the teacher paraphrased. A blank name is a ValueError.
    """
    if blank := [name for name in diseases_or_symptoms if not name.strip()]:
        raise ValueError(f"diseases_or_symptoms: found the blank name {blank[0]!r}, expected names; leave it out")
    table = _templates()
    slots = list(dict.fromkeys(name.strip() for name in diseases_or_symptoms)) or table["slots"]
    for topic in table["topic"]:
        filled = [[text.replace("{slot}", slot) for text in row] for row in topic["slotted"] for slot in slots]
        yield from _rows(SAFETY, topic["name"], topic["rows"] + filled, ask)


def self_cognition(assistant: str, developer: str, ask: Ask | None = None) -> Iterator[Built | Dropped]:
    """What the assistant of that name, by that developer, is and is not. A blank name is a ValueError."""
    for key, name in (("assistant", assistant), ("developer", developer)):
        if not name.strip():
            raise ValueError(f"{key}: found {name!r}, expected a name")
    names = {"{assistant}": assistant.strip(), "{developer}": developer.strip()}
    for topic in _templates()["self"]:
        pairs = [
            (question, re.sub(r"\{\w+\}", lambda match: names[match[0]], answer)) for question, answer in topic["rows"]
        ]
        yield from _rows(SELF_COGNITION, topic["name"], pairs, ask)


def _rows(task: str, topic: str, pairs: Iterable[Sequence[str]], ask: Ask | None) -> Iterator[Built | Dropped]:
    source = f"{task}:{topic}"
    for question, answer in pairs:
        yield Built(_conversation(question, answer, source, task))
        if ask is None:
            continue
        try:
            other = ask_text(ask, _templates()["teacher"], "question", question=question)
        except Unusable as error:
            yield Dropped(source, "teacher's answer was unusable", str(error)[:80])
            continue
        if other == question:
            yield Dropped(source, "paraphrase equals the question", question)
        else:
            yield Built(_conversation(other, answer, source, task), {"paraphrase_of": question})


def _conversation(question: str, answer: str, source: str, task: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), source, task)


@cache
def _templates() -> dict[str, Any]:
    return tomllib.loads(files("pedgpt.corpus").joinpath("templates/safety.toml").read_text(encoding="utf-8"))
