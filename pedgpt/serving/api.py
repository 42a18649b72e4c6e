"""OpenAI's API: what a client asks for, checked field by field, and what it gets, whole or as a stream's chunks."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pedgpt.data import Message, encode_prompt
from pedgpt.data.chat import ChatFormat
from pedgpt.serving.scheduler import Piece, Request

_OPEN, _CLOSE = "<think>", "</think>"


class ApiError(Exception):
    """An answer of status 400 and above, in OpenAI's form; `retry` is in seconds."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None, retry: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, {"Retry-After": str(retry)} if retry else None
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
    """A field of a request: its types, its value where it is absent or null, its range."""

    kinds: Any
    default: Any = None
    least: float = -math.inf
    most: float = math.inf


NUMBER, MOST_MESSAGES = int | float, 512
COMMON = {
    "model": Field(str), "max_tokens": Field(int, None, 1), "n": Field(int, 1, 1, 16), "stop": Field(str | list, []),
    "temperature": Field(NUMBER, None, 0, 2), "top_p": Field(NUMBER, None, 1e-6, 1), "top_k": Field(int, None, 0),
    "repetition_penalty": Field(NUMBER, None, 1e-3, 100), "seed": Field(int, None, -(2**63), 2**63 - 1),
    "stream": Field(bool, False), "stream_options": Field(dict, {}),
}  # fmt: skip
COMPLETION = COMMON | {"prompt": Field(str | list), "logprobs": Field(int, None, 0, 5)}
CHAT = COMMON | {
    "messages": Field(list, []), "max_completion_tokens": Field(int, None, 1), "logprobs": Field(bool, False),
    "top_logprobs": Field(int, 0, 0, 20),
}  # fmt: skip
# These change nothing here. Any other field is refused unless it is as good as absent.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
ABSENT: tuple[Any, ...] = (0, "", [], {}, "none", "auto", {"type": "text"}, ["text"])


def read_fields(body: Any, known: Mapping[str, Field]) -> dict[str, Any]:
    """The fields of a request with their defaults; ApiError for a wrong value, and for what is not supported."""
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    found = {name: expected.default for name, expected in known.items()}
    for name, value in body.items():
        if value is None or name in HARMLESS or (name not in known and value in ABSENT):
            continue
        if (expected := known.get(name)) is None:
            raise ApiError(f"{name} is not supported by this server; leave it out", name, code="unsupported_parameter")
        if not isinstance(value, expected.kinds) or (isinstance(value, bool) and expected.kinds is not bool):
            raise ApiError(f"{name} is of the wrong type, {type(value).__name__}", name, code="invalid_type")
        if isinstance(value, int | float) and not expected.least <= value <= expected.most:
            raise ApiError(f"{name} must be from {expected.least} to {expected.most}", name, code="invalid_value")
        found[name] = value
    found["stop"] = [found["stop"]] if isinstance(found["stop"], str) else found["stop"]
    if len(found["stop"]) > 16 or not all(isinstance(text, str) and 0 < len(text) <= 256 for text in found["stop"]):
        raise ApiError("stop must be a text, or a list of at most 16, of 1 to 256 characters each", "stop")
    return found


def prompt_of(fields: Mapping[str, Any], served: Served) -> list[int]:
    """The tokens of a request; text of a client never becomes a special token."""
    if "prompt" not in fields:
        if len(fields["messages"]) > MOST_MESSAGES:
            raise ApiError(f"messages has more than {MOST_MESSAGES} entries", "messages")
        messages = [_message(one, f"messages[{i}]") for i, one in enumerate(fields["messages"])]
        if not messages or messages[-1].role != "user":
            raise ApiError("messages must end with one of the role user", "messages")
        try:
            return encode_prompt(messages, served.chat)
        except ValueError as error:  # a template that has no place for a role, say
            raise ApiError(f"messages cannot be encoded: {error}", "messages") from None
    given, tokenizer = fields["prompt"], served.chat.tokenizer
    if isinstance(given, str) and given:
        return [*tokenizer.document_prefix, *tokenizer.encode(given)]
    if not given or not all(type(token) is int and 0 <= token < served.vocabulary for token in given):
        raise ApiError("prompt must be one text, or one list of the model's tokens, not empty", "prompt")
    return given


def _message(given: Any, name: str) -> Message:
    """A message of text; OpenAI's "developer" is a system message."""
    if not isinstance(given, dict) or given.get("tool_calls"):
        raise ApiError(f"{name} must be an object with role and content, without tool calls", name)
    role = "system" if given.get("role") == "developer" else given.get("role")
    if role not in ("system", "user", "assistant"):
        raise ApiError(f"{name}.role must be system, user or assistant", f"{name}.role")
    content = given.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) or not content.strip():
        raise ApiError(f"{name}.content must be a text, or a list of parts of text, not empty", f"{name}.content")
    return Message(role, content, reasoning=str(given.get("reasoning_content") or ""))


@dataclass
class Choice:
    """What one answer is so far."""

    text: str = ""  # as the model wrote it; then its two parts
    reasoning: str = ""
    content: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    begun: bool = False  # whether a chunk of it was sent


class Reply:
    """One response with a choice for each request; `add` returns a stream's chunk and keeps it for `whole`."""

    def __init__(self, fields: Mapping[str, Any], served: Served, requests: Sequence[Request]) -> None:
        self.served, self.requests, self.chat = served, requests, "messages" in fields
        self.choices = [Choice() for _ in requests]
        kind = "chat.completion" if self.chat else "text_completion"
        self.head = {
            "id": f"{kind}-{uuid.uuid4().hex}", "object": kind + ".chunk" * (self.chat and fields["stream"]),
            "created": int(time.time()), "model": fields["model"], "system_fingerprint": served.fingerprint,
        }  # fmt: skip

    def add(self, number: int, piece: Piece) -> dict[str, Any] | None:
        """Take one token in; returns its chunk, or None where there is nothing to send."""
        choice = self.choices[number]
        first, reasoning, content = not choice.begun, choice.reasoning, choice.content
        choice.text, choice.finish = choice.text + piece.text, piece.finish
        choice.reasoning, choice.content = self._divided(choice)
        logprobs = [] if self.requests[number].top_logprobs is None else [self._logprob(piece)]
        choice.logprobs += logprobs
        new = Choice("", choice.reasoning[len(reasoning) :], choice.content[len(content) :], logprobs, piece.finish)
        if not (new.reasoning or new.content or logprobs or piece.finish):
            return None
        choice.begun = True
        return {**self.head, "choices": [self._entry(number, new, "delta", first)]}

    def whole(self) -> dict[str, Any]:
        """The response of a request without `stream`."""
        entries = [self._entry(number, choice, "message", True) for number, choice in enumerate(self.choices)]
        return {**self.head, "choices": entries, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        prompt, answers = len(self.requests[0].prompt), sum(len(request.answer) for request in self.requests)
        cached = {"prompt_tokens_details": {"cached_tokens": self.requests[0].cached}}
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers, **cached}

    def _entry(self, number: int, choice: Choice, key: str, first: bool) -> dict[str, Any]:
        head = {"index": number, "finish_reason": choice.finish, "logprobs": None}
        wanted = self.requests[number].top_logprobs is not None
        if not self.chat:
            tops = [{top["token"]: top["logprob"] for top in row["top_logprobs"]} for row in choice.logprobs]
            rows = {"tokens": [row["token"] for row in choice.logprobs], "top_logprobs": tops}
            rows["token_logprobs"] = [row["logprob"] for row in choice.logprobs]
            return head | {"text": choice.content} | ({"logprobs": rows} if wanted else {})
        said = ({"role": "assistant"} if first else {}) | {"content": choice.content}
        said |= {"reasoning_content": choice.reasoning} if choice.reasoning else {}
        return head | {key: said} | ({"logprobs": {"content": choice.logprobs, "refusal": None}} if wanted else {})

    def _divided(self, choice: Choice) -> tuple[str, str]:
        """(reasoning, content) as far as they are certain: what may begin a tag is held back until the end."""
        text, begun, running = choice.text, choice.text.lstrip(), choice.finish is None
        if not self.chat or not (self.served.chat.opens_thought or begun.startswith(_OPEN)):
            return "", "" if self.chat and running and _OPEN.startswith(begun) else text
        thought, closed, answer = begun.removeprefix(_OPEN).partition(_CLOSE)
        if running and not closed:
            before, mark, rest = thought.rpartition("<")
            thought = before if mark and _CLOSE.startswith(mark + rest) else thought
        return thought.lstrip("\n"), answer.lstrip("\n")

    def _logprob(self, piece: Piece) -> dict[str, Any]:
        def one(token: int | None, logprob: float) -> dict[str, Any]:
            text = self.served.chat.tokenizer.decode([] if token is None else [token])
            whole = "\ufffd" not in text  # A part of a character is no text, and its bytes are not known here.
            return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

        top = [one(token, logprob) for token, logprob in piece.top]
        return one(piece.token, piece.logprob) | {"top_logprobs": top}
