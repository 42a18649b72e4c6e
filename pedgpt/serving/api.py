"""What a client asks for, in the form of OpenAI's API, checked: each field is used, harmless, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pedgpt.data import Message, encode_prompt
from pedgpt.data.chat import ChatFormat


class ApiError(Exception):
    """An answer of status 400 and above, in OpenAI's form."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None, retry: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.retry = status, retry
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Served(NamedTuple):
    """What the server knows of one model by name."""

    chat: ChatFormat
    stop_tokens: frozenset[int]
    defaults: Mapping[str, Any]  # how to sample where a request does not say it
    vocabulary: int
    fingerprint: str


class Field(NamedTuple):
    """A field of a request: its types, its range, and its value where it is absent or null."""

    kinds: tuple[type, ...]
    default: Any = None
    least: float = -math.inf
    most: float = math.inf


NUMBER = (int, float)
COMMON = {
    "model": Field((str,)),
    "max_tokens": Field((int,), None, 1),
    "temperature": Field(NUMBER, None, 0, 2),
    "top_p": Field(NUMBER, None, 1e-6, 1),
    "top_k": Field((int,), None, 0),
    "repetition_penalty": Field(NUMBER, None, 1e-3, 100),
    "seed": Field((int,), None, -(2**63), 2**63 - 1),
    "stop": Field((str, list)),
    "n": Field((int,), 1, 1, 16),
    "stream": Field((bool,), False),
    "stream_options": Field((dict,), {}),
}
CHAT = COMMON | {
    "messages": Field((list,)),
    "max_completion_tokens": Field((int,), None, 1),
    "logprobs": Field((bool,), False),
    "top_logprobs": Field((int,), None, 0, 20),
}
COMPLETION = COMMON | {
    "prompt": Field((str, list)),
    "logprobs": Field((int,), None, 0, 20),
    "echo": Field((bool,), False),
}
# These change nothing, or nothing if they have one of these values.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
}


def read_fields(body: Any, known: Mapping[str, Field]) -> dict[str, Any]:
    """The fields of a request with their defaults; ApiError for a wrong value, and for what is not supported."""
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    found = {name: field.default for name, field in known.items()}
    for name, value in body.items():
        if value is None or name in HARMLESS or value in NEUTRAL.get(name, ()):
            continue
        if name not in known:
            raise ApiError(f"{name} is not supported by this server; leave it out", name, code="unsupported_parameter")
        field = known[name]
        if not isinstance(value, field.kinds) or (isinstance(value, bool) and bool not in field.kinds):
            kinds = " or ".join(kind.__name__ for kind in field.kinds)
            raise ApiError(f"{name} must be {kinds}, found {type(value).__name__}", name, code="invalid_type")
        if isinstance(value, int | float) and not field.least <= value <= field.most:
            raise ApiError(f"{name} must be from {field.least} to {field.most}", name, code="invalid_value")
        found[name] = value
    return found


def stop_strings(fields: Mapping[str, Any]) -> list[str]:
    """`stop` as a list of at most 16 texts."""
    given = fields["stop"]
    texts = [given] if isinstance(given, str) else given or []
    if len(texts) > 16 or not all(isinstance(text, str) and 0 < len(text) <= 256 for text in texts):
        raise ApiError("stop must be a text, or a list of at most 16, of 1 to 256 characters each", "stop")
    return texts


def prompt_of(fields: Mapping[str, Any], served: Served) -> list[int]:
    """The tokens of a request; text of a client never becomes a special token."""
    if "messages" in fields:
        messages = [_message(one, number) for number, one in enumerate(fields["messages"] or [])]
        if not messages or messages[-1].role != "user":
            raise ApiError("messages must end with one of the role user", "messages")
        return _tried(lambda: encode_prompt(messages, served.chat), "messages")
    given = fields["prompt"]
    if isinstance(given, list) and given and all(type(token) is int for token in given):
        if not all(0 <= token < served.vocabulary for token in given):
            raise ApiError(f"prompt holds a token outside of the {served.vocabulary} of the model", "prompt")
        return given
    if not isinstance(given, str) or not given:
        raise ApiError("prompt must be one text or one list of tokens, not empty", "prompt")
    tokenizer = served.chat.tokenizer
    return _tried(lambda: [*tokenizer.document_prefix, *tokenizer.encode(given)], "prompt")


def _tried(make: Callable[[], list[int]], name: str) -> list[int]:
    try:
        return make()
    except ValueError as error:  # half of a surrogate pair, or a template that has no place for a role
        raise ApiError(f"{name} cannot be encoded: {error}", name) from None


def _message(given: Any, number: int) -> Message:
    """A message of text; OpenAI's "developer" is a system message."""
    name = f"messages[{number}]"
    if not isinstance(given, dict):
        raise ApiError(f"{name} must be an object with role and content", name)
    role = {"developer": "system"}.get(given.get("role"), given.get("role"))
    if role not in ("system", "user", "assistant"):
        raise ApiError(f"{name}.role must be system, user or assistant", f"{name}.role")
    content = given.get("content")
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            raise ApiError(f"{name}.content may hold only parts of text", f"{name}.content")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        raise ApiError(f"{name}.content must be a text that is not empty", f"{name}.content")
    if given.get("tool_calls") or given.get("function_call"):
        raise ApiError(f"{name} calls tools, which this server does not support", name)
    reasoning = given.get("reasoning_content")
    return Message(role, content, reasoning=reasoning if isinstance(reasoning, str) else "")
