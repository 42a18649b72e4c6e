"""An OpenAI-compatible server over the scheduler: chat, completions, models, metrics and one page.

It is safe to leave running: it logs no content, allows no other site, and bounds bodies, tokens and time.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Full
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pedgpt.data import Message, StreamDecoder, encode_prompt
from pedgpt.data.chat import ChatFormat
from pedgpt.serving.scheduler import Piece, Request, Scheduler

Pieces = asyncio.Queue[tuple[Request, Piece] | Exception]  # an exception ends all answers


class ApiError(HTTPException):
    """An answer of status 400 and above, with a body in OpenAI's form; `retry` is in seconds."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None, retry: int = 0
    ) -> None:
        super().__init__(status, message, {"Retry-After": str(retry)} if retry else None)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Served(NamedTuple):
    """What the server knows of one model by name."""

    chat: ChatFormat
    stop_tokens: frozenset[int]
    defaults: Mapping[str, Any]  # how to sample where a request does not say it
    fingerprint: str


class Field(NamedTuple):
    """A field of a request: its types, its value where it is absent or null, the range of a number or of a length."""

    kinds: Any
    default: Any = None
    least: float = -math.inf
    most: float = math.inf


NUMBER = int | float
COMMON = {
    "model": Field(str), "max_tokens": Field(int, None, 1), "n": Field(int, 1, 1, 16), "stop": Field(str | list, []),
    "temperature": Field(NUMBER, None, 0, 2), "top_p": Field(NUMBER, None, 1e-6, 1), "top_k": Field(int, None, 0),
    "repetition_penalty": Field(NUMBER, None, 1e-3, 100), "seed": Field(int, None, 0, 2**62),
    "stream": Field(bool, False), "stream_options": Field(dict, {}),
}  # fmt: skip
COMPLETION = COMMON | {"prompt": Field(str | list), "logprobs": Field(int, None, 0, 5), "best_of": Field(int, 1, 1, 1)}
CHAT = COMMON | {
    "messages": Field(list, [], 1, 512), "max_completion_tokens": Field(int, None, 1), "logprobs": Field(bool, False),
    "top_logprobs": Field(int, 0, 0, 20),
}  # fmt: skip
# These are ignored. Any other unknown field is refused, unless its value, one of ABSENT, asks for nothing.
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
        size = len(value) if isinstance(value, str | list | dict) else value
        if not expected.least <= size <= expected.most:
            raise ApiError(f"{name} has a size outside {expected.least} to {expected.most}", name, code="invalid_value")
        found[name] = value
    found["stop"] = [found["stop"]] if isinstance(found["stop"], str) else found["stop"]
    if len(found["stop"]) > 16 or not all(isinstance(text, str) and 0 < len(text) <= 256 for text in found["stop"]):
        raise ApiError("stop must be one text or a list of at most 16 texts, of 1 to 256 characters each", "stop")
    return found


def prompt_of(fields: Mapping[str, Any], served: Served) -> list[int]:
    """The tokens of a request; text of a client never becomes a special token."""
    if "messages" in fields:
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
    size = tokenizer.vocab_size
    if not given or not all(type(token) is int and 0 <= token < size for token in given):
        raise ApiError("prompt must be one text, or one list of the model's tokens, not empty", "prompt")
    return given


def _message(given: Any, name: str) -> Message:
    """A message of text; OpenAI's "developer" is a system message."""
    message: dict[str, Any] = given if isinstance(given, dict) and not given.get("tool_calls") else {}
    role, content = (message.get(key) for key in ("role", "content"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if role not in ("system", "developer", "user", "assistant") or not isinstance(content, str) or not content.strip():
        raise ApiError(
            f"{name} needs the role system, user or assistant, content of text only, not empty, and no tool_calls", name
        )
    return Message(role.replace("developer", "system"), content, reasoning=str(message.get("reasoning_content") or ""))


class Reply:
    """One response with a choice for each request, whole or in chunks; reasoning stands in <think> … </think>."""

    def __init__(self, fields: Mapping[str, Any], served: Served, requests: Sequence[Request]) -> None:
        self.served, self.requests, self.chat = served, requests, "messages" in fields
        kind = "chat.completion" if self.chat else "text_completion"
        self.head = {
            "id": f"{kind}-{uuid.uuid4().hex}", "object": kind + ".chunk" * (self.chat and fields["stream"]),
            "created": int(time.time()), "model": fields["model"], "system_fingerprint": served.fingerprint,
        }  # fmt: skip

    def chunk(self, request: Request, piece: Piece) -> dict[str, Any] | None:
        """What a stream says of one token; None where that is nothing."""
        first = piece is request.pieces[0]
        if not (first or piece.text or piece.finish or request.top_logprobs is not None):
            return None
        return {**self.head, "choices": [self._choice(request, [piece], "delta", first)]}

    def whole(self) -> dict[str, Any]:
        """The response of a request without `stream`."""
        choices = [self._choice(request, request.pieces, "message", True) for request in self.requests]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        prompt, answers = len(self.requests[0].prompt), sum(len(request.answer) for request in self.requests)
        cached = {"prompt_tokens_details": {"cached_tokens": self.requests[0].cached}}
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers, **cached}

    def _choice(self, request: Request, pieces: Sequence[Piece], key: str, first: bool) -> dict[str, Any]:
        opens = first and self.chat and self.served.chat.opens_thought  # The prompt ends with the tag.
        text = "<think>" * opens + "".join(piece.text for piece in pieces)
        rows = None if request.top_logprobs is None else [self._logprob(piece) for piece in pieces]
        found = {"index": self.requests.index(request), "finish_reason": pieces[-1].finish, "logprobs": None}
        if self.chat:
            logprobs = rows and {"content": rows, "refusal": None}
            role = {"role": "assistant"} if first else {}
            return found | {key: role | {"content": text}, "logprobs": logprobs}
        tops = [{top["token"]: top["logprob"] for top in row["top_logprobs"]} for row in rows or []]
        tokens, logprobs = ([row[name] for row in rows or []] for name in ("token", "logprob"))
        columns = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops}
        return found | {"text": text, "logprobs": rows and columns}

    def _logprob(self, piece: Piece) -> dict[str, Any]:
        def one(token: int | None, logprob: float) -> dict[str, Any]:
            text = self.served.chat.tokenizer.decode([] if token is None else [token])
            return {"token": text, "logprob": logprob, "bytes": None}  # unknown where a token is half a character

        top = [one(token, logprob) for token, logprob in piece.top]
        return one(piece.token, piece.logprob) | {"top_logprobs": top}


class Server:
    """The routes over a scheduler and the models that it serves by name; clients must send `key`, if it is set.

    A request may have `most_bytes`, which arrive within `body_seconds`, and its answer may take `seconds`. `local`
    refuses any host name but localhost: a hostile site could point its name here, so that a browser lets it read
    answers.
    """

    def __init__(
        self, scheduler: Scheduler, served: Mapping[str, Served], *, key: str = "", local: bool = True,
        seconds: float = 600.0, body_seconds: float = 30.0, most_bytes: int = 4 << 20,
    ) -> None:  # fmt: skip
        self.scheduler, self.served, self.key, self.local = scheduler, served, key, local
        self.seconds, self.body_seconds, self.most_bytes = seconds, body_seconds, most_bytes
        self.began = int(time.time())
        guarded = {"/v1/models": self.models, "/v1/models/{name}": self.models, "/metrics": self.metrics}
        routes = [Route(path, partial(self._guarded, handler)) for path, handler in guarded.items()]
        for path in ("/v1/chat/completions", "/v1/completions"):
            routes.append(Route(path, partial(self._guarded, self.answer), methods=["POST"]))
        html = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
        page = HTMLResponse(html, headers={"X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"})
        routes.append(Route("/", page, methods=["GET"]))
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _told})

    async def _guarded(self, handler: Callable[[HttpRequest], Awaitable[Response]], http: HttpRequest) -> Response:
        """What the handler answers, if the key is right; what goes wrong is told without the content."""
        if self.local and not is_local(http.url.hostname or ""):
            raise ApiError("this server answers only at localhost or a loopback address such as 127.0.0.1", status=403)
        given = http.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
        try:
            return await handler(http)
        except ClientDisconnect:
            return Response(status_code=499)
        except HTTPException:
            raise
        except Exception as error:  # A traceback could show what a client wrote.
            print(f"{http.url.path} failed: {type(error).__name__}", file=sys.stderr, flush=True)
            raise ApiError("the server failed", status=500) from None

    async def models(self, http: HttpRequest) -> Response:
        one = http.path_params.get("name")
        row = {"object": "model", "created": self.began, "owned_by": "pedgpt"}
        rows = [{"id": name, **row} for name in ([one] if one else self.served) if self._served(name)]
        return JSONResponse(rows[0] if one else {"object": "list", "data": rows})

    def _served(self, name: str | None) -> Served:
        if (served := self.served.get(name or "")) is None:
            raise ApiError(f"there is no model {name!r}; GET /v1/models lists them", "model", 404, "model_not_found")
        return served

    async def metrics(self, _: HttpRequest) -> Response:
        """Counters in Prometheus' text format."""
        found = {"waiting": len(self.scheduler.waiting), "active": len(self.scheduler.active), **self.scheduler.counts}
        return PlainTextResponse("".join(f"pedgpt_{name} {value}\n" for name, value in found.items()))

    async def answer(self, http: HttpRequest) -> Response:
        """One or several answers to a conversation or a text, whole or as a stream."""
        fields = read_fields(await self._body(http), CHAT if "/chat/" in http.url.path else COMPLETION)
        served = self._served(fields["model"])
        pieces: Pieces = asyncio.Queue()
        prompt = await asyncio.to_thread(prompt_of, fields, served)  # A long one takes a while.
        requests = self._requests(fields, served, prompt, pieces)
        try:
            self.scheduler.submit(requests)
        except Full:
            raise self._refusal("too many requests wait; try again", 429, "queue_full", 2) from None
        reply = Reply(fields, served, requests)
        if fields["stream"]:
            events, headers = self._events(reply, pieces, fields["stream_options"]), {"Cache-Control": "no-store"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        async for _ in self._pieces(reply, pieces, http):
            pass
        return JSONResponse(reply.whole())

    def _refusal(self, message: str, status: int = 500, code: str | None = None, retry: int = 0) -> ApiError:
        """The error with this message, or that of a server that stops."""
        if self.scheduler.closing:
            return ApiError("the server is stopping", None, 503, "stopping", 10)
        return ApiError(message, None, status, code, retry)

    async def _body(self, http: HttpRequest) -> Any:
        if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError("Content-Type must be application/json", status=415)  # which no other site's form can send
        found = bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                async for chunk in http.stream():
                    found += chunk
                    if len(found) > self.most_bytes:
                        raise ApiError(f"the body has more than {self.most_bytes} bytes", status=413)
            body = json.loads(found)
            json.dumps(body, ensure_ascii=False).encode()  # fails at half of a surrogate pair, which is no text
            return body
        except TimeoutError:
            raise ApiError("the body did not arrive in time", status=408) from None
        except (ValueError, RecursionError):
            raise ApiError("the body is not JSON in UTF-8") from None

    def _requests(self, fields: Any, served: Served, prompt: list[int], pieces: Pieces) -> list[Request]:
        """A request for each choice, all with one prompt."""
        room = self.scheduler.capacity - len(prompt)
        asked = fields.get("max_completion_tokens") or fields["max_tokens"]
        if room < max(1, asked or 1):
            found = f"{len(prompt)} tokens of the prompt and {asked or 1} of the answer"
            raise ApiError(f"{found} exceed the context, {self.scheduler.capacity}", code="context_length_exceeded")
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        sampling = {**served.defaults, **{name: fields[name] for name in names if fields[name] is not None}}
        wanted = fields["logprobs"]  # true or false in a chat, a number or None in a completion
        sampling["top_logprobs"] = None if wanted is False else fields.get("top_logprobs", wanted)
        loop, requests = asyncio.get_running_loop(), []

        def deliver(*found: Any) -> None:
            with suppress(RuntimeError):  # The loop is closed where the server has ended.
                loop.call_soon_threadsafe(pieces.put_nowait, found)

        for number in range(fields["n"]):
            sampling["seed"] = None if fields["seed"] is None else fields["seed"] + number
            decoder, stops = StreamDecoder(served.chat.tokenizer, fields["stop"]), served.stop_tokens
            requests.append(Request(fields["model"], prompt, asked or room, decoder, stops, deliver, **sampling))
        return requests

    async def _pieces(
        self, reply: Reply, pieces: Pieces, http: HttpRequest | None = None
    ) -> AsyncIterator[tuple[Request, Piece]]:
        """The pieces of all answers as they come; the rest is cancelled when the caller or the client `http` leaves."""
        loop = asyncio.get_running_loop()
        left = len(reply.requests)
        late = ApiError(f"the answer took more than {self.seconds:.0f} seconds", status=504)
        ends: list[Any] = [loop.call_later(self.seconds, pieces.put_nowait, late)]
        ends += [loop.create_task(_leaves(http, pieces))] if http else []
        try:
            while left:
                if isinstance(found := await pieces.get(), Exception):
                    raise found
                left -= found[1].finish is not None
                if found[1].finish in ("error", "cancelled"):
                    raise self._refusal("the answer could not be computed")
                yield found
        finally:
            for end in ends:
                end.cancel()
            for request in reply.requests:
                request.cancelled = True

    async def _events(self, reply: Reply, pieces: Pieces, options: Mapping[str, Any]) -> AsyncIterator[str]:
        """Server-sent events; any error is an event too, because the status line is sent before the first of them."""
        try:
            async for request, piece in self._pieces(reply, pieces):
                if chunk := reply.chunk(request, piece):
                    yield _event(chunk)
            if options.get("include_usage"):
                yield _event({**reply.head, "choices": [], "usage": reply.usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)


async def _told(http: HttpRequest, error: Any) -> Response:
    """An error in OpenAI's form."""
    told = f"{http.method} {http.url.path}: {error.detail}"
    found = error if isinstance(error, ApiError) else ApiError(told, status=error.status_code)
    return JSONResponse(found.body, found.status_code, error.headers)


async def _leaves(http: HttpRequest, pieces: Pieces) -> None:
    """Wait until the client leaves, and say so."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    pieces.put_nowait(ClientDisconnect())


def is_local(host: str) -> bool:
    """Whether a host is localhost or a loopback address; this machine's name and address in a network are not."""
    with suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    return False


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
