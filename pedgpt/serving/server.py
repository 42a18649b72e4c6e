"""An OpenAI-compatible server over the scheduler: chat, completions, models, metrics and one page.

It is safe to leave running: it logs no content, allows no other site, and bounds bodies, tokens and time.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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

from pedgpt.data import StreamDecoder
from pedgpt.serving.api import CHAT, COMPLETION, ApiError, Reply, Served, prompt_of, read_fields
from pedgpt.serving.scheduler import Piece, Request, Scheduler

Pieces = asyncio.Queue[tuple[int, Piece] | Exception]  # with the numbers of their choices; what ends all of them
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'"


class Limits(NamedTuple):
    """What one request may take."""

    body: int = 4 << 20  # bytes
    body_seconds: float = 30.0  # until the body is here
    seconds: float = 600.0  # waiting and answer


class Server:
    """The routes over a scheduler and the models that it serves by name; clients must send `key`, if it is set.

    `local` refuses requests to any host name but this machine's: a hostile site could point its name here, so that a
    browser lets it read answers.
    """

    def __init__(
        self, scheduler: Scheduler, served: Mapping[str, Served], limits: Limits, *, key: str = "", local: bool = True
    ) -> None:
        self.scheduler, self.served, self.limits, self.key, self.local = scheduler, served, limits, key, local
        self.began = int(time.time())
        guarded = {"/v1/models": self.models, "/v1/models/{name}": self.models, "/metrics": self.metrics}
        routes = [Route(path, self._guarded(handler)) for path, handler in guarded.items()]
        for path, known in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
            routes.append(Route(path, self._guarded(partial(self.answer, known)), methods=["POST"]))
        self.app = Starlette(routes=[*routes, Route("/", self.page)], exception_handlers={HTTPException: _unknown})

    def _guarded(self, handler: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[..., Any]:
        """The handler behind the key; what goes wrong becomes an error in OpenAI's form, without the content."""

        async def run(http: HttpRequest) -> Response:
            try:
                if self.local and not is_local(http.url.hostname or ""):
                    raise ApiError("this server answers only to this machine's own name", status=403)
                given = http.headers.get("authorization", "").removeprefix("Bearer ")
                if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
                    raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
                return await handler(http)
            except ApiError as error:
                return JSONResponse(error.body, error.status, error.headers)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:  # A traceback could show what a client wrote.
                print(f"{http.url.path} failed: {type(error).__name__}", file=sys.stderr, flush=True)
                return JSONResponse(ApiError("the server failed", status=500).body, 500)

        return run

    async def page(self, _: HttpRequest) -> Response:
        nonce = secrets.token_urlsafe(16)  # Only the page's own script runs, whatever a model writes.
        text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        policy = f"{_POLICY}; frame-ancestors 'none'; script-src 'nonce-{nonce}'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    async def models(self, http: HttpRequest) -> Response:
        row = {"object": "model", "created": self.began, "owned_by": "pedgpt"}
        if (name := http.path_params.get("name")) is not None:
            return JSONResponse({"id": self._served(name) and name, **row})
        return JSONResponse({"object": "list", "data": [{"id": name, **row} for name in self.served]})

    def _served(self, name: str | None) -> Served:
        if (served := self.served.get(name or "")) is None:
            raise ApiError(f"there is no model {name!r}; GET /v1/models lists them", "model", 404, "model_not_found")
        return served

    async def metrics(self, _: HttpRequest) -> Response:
        """Counters in Prometheus' text format."""
        found = {"waiting": len(self.scheduler.waiting), "active": len(self.scheduler.active), **self.scheduler.counts}
        return PlainTextResponse("".join(f"pedgpt_{name} {value}\n" for name, value in found.items()))

    async def answer(self, known: Mapping[str, Any], http: HttpRequest) -> Response:
        """One or several answers to a conversation or a text, whole or as a stream."""
        fields = read_fields(await self._body(http), known)
        served = self._served(fields["model"])
        pieces: Pieces = asyncio.Queue()
        prompt = await asyncio.to_thread(prompt_of, fields, served)  # A long one takes a while.
        requests = self._requests(fields, served, prompt, pieces)
        try:
            self.scheduler.submit(requests)
        except Full:
            if self.scheduler.closing:
                raise ApiError("the server is stopping", status=503, code="stopping", retry=10) from None
            raise ApiError("too many requests wait; try again", status=429, code="queue_full", retry=2) from None
        reply = Reply(fields, served, requests)
        if fields["stream"]:
            events, headers = self._events(reply, pieces, fields["stream_options"]), {"Cache-Control": "no-store"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        async for number, piece in self._pieces(reply, pieces, http):
            reply.add(number, piece)
        return JSONResponse(reply.whole())

    async def _body(self, http: HttpRequest) -> Any:
        if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError("Content-Type must be application/json", status=415)  # which no other site's form can send
        found = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in http.stream():
                    found += chunk
                    if len(found) > self.limits.body:
                        raise ApiError(f"the body has more than {self.limits.body} bytes", status=413)
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
        sampling["top_k"], wanted = sampling.get("top_k") or None, fields["logprobs"]
        if sampling.get("temperature", 0) < 1e-6:  # Divided by less, logits could overflow.
            sampling["temperature"] = 0.0
        # True or False in a chat, a number or None in a completion.
        sampling["top_logprobs"] = None if wanted is False else fields.get("top_logprobs", wanted)
        loop, requests = asyncio.get_running_loop(), []
        for number in range(fields["n"]):

            def deliver(piece: Piece, number: int = number) -> None:
                with suppress(RuntimeError):  # The loop is closed where the server has ended.
                    loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

            sampling["seed"] = None if fields["seed"] is None else (fields["seed"] + number) % 2**63
            decoder, stops = StreamDecoder(served.chat.tokenizer, fields["stop"]), served.stop_tokens
            requests.append(Request(fields["model"], prompt, asked or room, decoder, stops, deliver, **sampling))
        return requests

    async def _pieces(
        self, reply: Reply, pieces: Pieces, http: HttpRequest | None = None
    ) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers as they come; the rest is cancelled when the caller or the client `http` leaves."""
        left, loop = len(reply.requests), asyncio.get_running_loop()
        late = ApiError(f"the answer took more than {self.limits.seconds:.0f} seconds", status=504)
        ends: list[Any] = [loop.call_later(self.limits.seconds, pieces.put_nowait, late)]
        ends += [loop.create_task(_leaves(http, pieces))] if http else []
        try:
            while left:
                if isinstance(found := await pieces.get(), Exception):
                    raise found
                left -= found[1].finish is not None
                if found[1].finish in ("error", "cancelled"):
                    if self.scheduler.closing:
                        raise ApiError("the server is stopping", status=503, code="stopping")
                    raise ApiError("the answer could not be computed", status=500)
                yield found
        finally:
            for end in ends:
                end.cancel()
            for request in reply.requests:
                request.cancelled = True

    async def _events(self, reply: Reply, pieces: Pieces, options: Mapping[str, Any]) -> AsyncIterator[str]:
        """Server-sent events; an error after the first of them is an event too."""
        try:
            async for number, piece in self._pieces(reply, pieces):
                if chunk := reply.add(number, piece):
                    yield _event(chunk)
            if options.get("include_usage"):
                yield _event({**reply.head, "choices": [], "usage": reply.usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)


async def _unknown(http: HttpRequest, error: Any) -> Response:
    found = ApiError(f"{http.method} {http.url.path}: {error.detail}", status=error.status_code)
    return JSONResponse(found.body, found.status, error.headers)


async def _leaves(http: HttpRequest, pieces: Pieces) -> None:
    """Wait until the client leaves, and say so."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    pieces.put_nowait(ClientDisconnect())


def is_local(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    with suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    return False


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
