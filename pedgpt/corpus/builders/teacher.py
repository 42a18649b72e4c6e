"""A teacher: a chat endpoint whose answers are JSON objects with the fields that were asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pedgpt.endpoint import Endpoint, Unusable

_ATTEMPTS = 3  # answers to the same question, before it counts as one that the teacher cannot answer


class Teacher(Endpoint):
    """An endpoint that builders ask for JSON; what it has answered is kept in its cache."""

    title = "teacher"

    def __call__(self, system: str, user: str, fields: Mapping[str, type]) -> dict[str, Any]:
        """The wanted fields of the JSON object that the teacher answers with; Unusable if three answers have none."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        for attempt in range(_ATTEMPTS):
            text = self.ask(messages, attempt=attempt)
            try:
                return _read_fields(text, fields)
            except ValueError as error:
                problem = f"{error}, found {text[:80]!r}"
        raise Unusable(f"{_ATTEMPTS} answers were unusable; in the last, {problem}")


_OBJECT = re.compile(r'\{\s*["}]')  # where one begins
# strict=False: line breaks within strings; int refuses NaN and Infinity, which are no JSON.
_DECODER = json.JSONDecoder(strict=False, parse_constant=int)


def _read_fields(text: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """The fields of the only JSON object in a text; ValueError says what is missing or wrong."""
    objects: list[dict[str, Any]] = []
    start, text = 0, text.rpartition("</think>")[2]
    while match := _OBJECT.search(text, start):
        try:
            found, start = _DECODER.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            raise ValueError("the JSON is broken or cut off") from None
        objects.append(found)
    if len(objects) != 1:
        raise ValueError(f"one JSON object was expected, not {len(objects)}")
    for name, kind in fields.items():
        value = objects[0].get(name)
        if kind is float and type(value) is int:
            value = objects[0][name] = float(value)
        if type(value) is not kind or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"{name!r} is missing, empty or no {kind.__name__}")
    wanted = {name: objects[0][name] for name in fields}
    try:
        json.dumps(wanted, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair was found") from None
    return wanted
