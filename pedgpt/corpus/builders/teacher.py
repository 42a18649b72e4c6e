"""A teacher: a chat endpoint whose answers are JSON objects with the fields that were asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pedgpt.endpoint import Endpoint, Unusable

_ATTEMPTS = 3  # answers to the same question, before it counts as one that the teacher cannot answer
_OBJECT = re.compile(r'\{\s*["}].*\}', re.DOTALL)  # with what stands around it, such as ```json


class Teacher(Endpoint):
    """An endpoint that builders ask for JSON; what it has answered is kept in its cache."""

    def __call__(self, system: str, user: str, fields: Mapping[str, type]) -> dict[str, Any]:
        """The wanted fields of the JSON object that the teacher answers with; Unusable if three answers have none."""
        messages = [{"role": role, "content": text} for role, text in (("system", system), ("user", user)) if text]
        for attempt in range(_ATTEMPTS):
            text = self.ask(messages, attempt=attempt)
            try:
                return _wanted(text, fields)
            except (ValueError, RecursionError) as error:
                problem = f"{error}, found {text[:80]!r}"
        raise Unusable(f"{_ATTEMPTS} answers were unusable; in the last, {problem}")


def _wanted(text: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """The fields of the only object of an answer, texts stripped; each is of its type, and the first not blank."""
    match = _OBJECT.search(text.rpartition("</think>")[2])
    # strict=False: line breaks within strings; int refuses NaN and Infinity, which are no JSON.
    said = json.loads(match[0] if match else "", strict=False, parse_constant=int)
    json.dumps(said, ensure_ascii=False).encode()  # a ValueError if half a surrogate pair is in it
    found = {name: value.strip() if isinstance(value := said.get(name), str) else value for name in fields}
    for i, (name, kind) in enumerate(fields.items()):
        if type(found[name]) is not kind or (i == 0 and found[name] == ""):
            raise ValueError(f"{name} is {found[name]!r:.80}, expected {kind.__name__}")
    return found
