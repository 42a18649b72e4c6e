"""Synthetic safety and self-cognition rows: requests and safe answers from templates/safety.toml, no doses."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from pedgpt.corpus.rows import Built, spoken, templates

SAFETY, SELF_COGNITION = "safety", "self_cognition"


def safety() -> Iterator[Built]:
    """Risky requests with answers that refuse what is unsafe and name the next step."""
    table = templates("safety")
    for topic in table["topic"]:
        for row, slot in [*product(topic["rows"], [""]), *product(topic["slotted"], table["slots"])]:
            turns = [text.replace("{slot}", slot) for text in row]
            yield Built(spoken(*turns, source=f"{SAFETY}:{topic['name']}", task=SAFETY))


def self_cognition(assistant: str, developer: str) -> Iterator[Built]:
    """What the assistant of that name, by that developer, is and is not."""
    for topic in templates("safety")["self"]:
        for question, answer in topic["rows"]:
            named = answer.format(assistant=assistant.strip(), developer=developer.strip())
            yield Built(spoken(question, named, source=f"{SELF_COGNITION}:{topic['name']}", task=SELF_COGNITION))
