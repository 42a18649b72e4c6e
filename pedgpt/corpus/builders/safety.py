"""Synthetic safety and self-cognition rows: requests and safe answers from templates/safety.toml, no doses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

from pedgpt.corpus.rows import Built, templates
from pedgpt.data.records import Conversation, Message

SAFETY, SELF_COGNITION = "safety", "self_cognition"


def safety() -> Iterator[Built]:
    """Risky requests with answers that refuse what is unsafe and name the next step."""
    table = templates("safety")
    for topic in table["topic"]:
        for row, slot in [(row, "") for row in topic["rows"]] + list(product(topic["slotted"], table["slots"])):
            question, answer = (text.replace("{slot}", slot) for text in row)
            yield _row(question, answer, SAFETY, topic["name"])


def self_cognition(assistant: str, developer: str) -> Iterator[Built]:
    """What the assistant of that name, by that developer, is and is not. A blank name is a ValueError."""
    for key, name in (("assistant", assistant), ("developer", developer)):
        if not name.strip():
            raise ValueError(f"{key}: found {name!r}, expected a name")
    names = {"{assistant}": assistant.strip(), "{developer}": developer.strip()}
    for topic in templates("safety")["self"]:
        for question, answer in topic["rows"]:
            named = re.sub(r"\{\w+\}", lambda match: names[match[0]], answer)
            yield _row(question, named, SELF_COGNITION, topic["name"])


def _row(question: str, answer: str, task: str, topic: str) -> Built:
    messages = (Message("user", question), Message("assistant", answer))
    return Built(Conversation(messages, f"{task}:{topic}", task))
