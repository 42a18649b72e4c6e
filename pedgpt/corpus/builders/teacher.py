"""A teacher: a chat endpoint whose answers are JSON objects with the fields that were asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pedgpt.corpus.rows import wanted
from pedgpt.endpoint import Endpoint, Unusable

_ATTEMPTS = 3  # answers to the same question, before it counts as one that the teacher cannot answer
_OBJECT = re.compile(r'\{\s*["}]')  # where one begins
# strict=False: line breaks within strings; int refuses NaN and Infinity, which are no JSON.
_DECODER = json.JSONDecoder(strict=False, parse_constant=int)


class Teacher(Endpoint):
    """An endpoint that builders ask for JSON; what it has answered is kept in its cache."""

    def __call__(self, system: str, user: str, fields: Mapping[str, type]) -> dict[str, Any]:
        """The wanted fields of the JSON object that the teacher answers with; Unusable if three answers have none."""
        messages = [{"role": role, "content": text} for role, text in (("system", system), ("user", user)) if text]
        for attempt in range(_ATTEMPTS):
            text = self.ask(messages, attempt=attempt)
            try:
                return wanted(_only_object(text), fields)
            except (ValueError, RecursionError) as error:
                problem = f"{error}, found {text[:80]!r}"
        raise Unusable(f"{_ATTEMPTS} answers were unusable; in the last, {problem}")


def _only_object(text: str) -> dict[str, Any]:
    objects: list[dict[str, Any]] = []
    start, text = 0, text.rpartition("</think>")[2]
    while match := _OBJECT.search(text, start):
        found, start = _DECODER.raw_decode(text, match.start())
        objects.append(found)
    if len(objects) != 1:
        raise ValueError(f"one JSON object was expected, not {len(objects)}")
    json.dumps(objects, ensure_ascii=False).encode()  # a ValueError if half a surrogate pair is in it
    return objects[0]
