"""An OpenAI-compatible server over the scheduler: chat, completions, models, metrics and one page.

It is safe to leave running: it logs no content, allows no other site, and bounds bodies, tokens and time.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pedgpt.data import StreamDecoder
from pedgpt.serving.api import CHAT, COMPLETION, ApiError, Served, prompt_of, read_fields, stop_strings
from pedgpt.serving.replies import Reply
from pedgpt.serving.scheduler import Piece, QueueFullError, Request, Scheduler

LOCAL = ["127.0.0.1", "localhost"]


class Limits(NamedTuple):
    """What one request may take."""

    body: int = 4 << 20  # bytes
    seconds: float = 600.0  # for the whole answer
    body_seconds: float = 30.0  # until the body is here


class Server:
    """The routes over a scheduler and the models that it serves by name; `key` "" lets everyone in."""

    def __init__(
        self, scheduler: Scheduler, served: Mapping[str, Served], *, key: str = "", local: bool = True,
        limits: Limits,
    ) -> None:  # fmt: skip
        self.scheduler, self.served, self.key, self.limits = scheduler, served, key, limits
        self.began = int(time.time())
        routes = {
            "/v1/models": ("GET", self.models), "/v1/chat/completions": ("POST", self.answer),
            "/v1/completions": ("POST", self.answer), "/metrics": ("GET", self.metrics),
        }  # fmt: skip
        guarded = [Route(path, self._guarded(handle), methods=[method]) for path, (method, handle) in routes.items()]
        # NOTE: another site could let its own name point to this machine, so that a browser takes them for one.
        hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL)] if local else []
        self.app = Starlette(routes=[*guarded, Route("/", self.page), Route("/health", self.health)], middleware=hosts)

    def _guarded(
        self, handle: Callable[[HttpRequest], Awaitable[Response]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """The handler behind the key; what goes wrong becomes an error in OpenAI's form, without the content."""

        async def run(request: HttpRequest) -> Response:
            try:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
                    raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
                return await handle(request)
            except ApiError as error:
                headers = {"Retry-After": str(error.retry)} if error.retry else None
                return JSONResponse(error.body, error.status, headers)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:  # A traceback could show what a client wrote.
                print(f"{request.url.path} failed: {type(error).__name__}", file=sys.stderr, flush=True)
                return JSONResponse(ApiError("the server failed", status=500).body, 500)

        return run

    async def page(self, _: HttpRequest) -> Response:
        nonce = secrets.token_urlsafe(16)  # Only the page's own script runs, whatever a model writes.
        text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; connect-src 'self'; "
        policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    async def health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, _: HttpRequest) -> Response:
        rows = [{"id": name, "object": "model", "created": self.began, "owned_by": "pedgpt"} for name in self.served]
        return JSONResponse({"object": "list", "data": rows})

    async def metrics(self, _: HttpRequest) -> Response:
        """Prometheus' text format."""
        scheduler = self.scheduler
        lines = [
            f'pedgpt_tokens_total{{kind="{kind}"}} {scheduler.counts[kind]}'
            for kind in ("prompt", "cached", "generated")
        ]
        ends = ("stop", "length", "error", "cancelled")
        lines += [f'pedgpt_requests_total{{finish="{kind}"}} {scheduler.counts[kind]}' for kind in ends]
        lines += [
            f"pedgpt_requests_waiting {len(scheduler.waiting)}",
            f"pedgpt_requests_active {len(scheduler.active)}",
        ]
        waits = sorted(scheduler.waits)
        for share in (0.5, 0.9, 0.99) if waits else ():
            lines.append(f'pedgpt_first_token_seconds{{quantile="{share}"}} {waits[int(share * (len(waits) - 1))]:.4f}')
        return PlainTextResponse("\n".join(lines) + "\n")

    async def answer(self, http: HttpRequest) -> Response:
        """One or several answers to a conversation or a text, whole or as a stream."""
        chat = http.url.path.endswith("/chat/completions")
        fields = read_fields(await self._body(http), CHAT if chat else COMPLETION)
        served = self.served.get(fields["model"] or "")
        if served is None:
            raise ApiError(
                f"there is no model {fields['model']!r}; GET /v1/models lists them", "model", 404, "model_not_found"
            )
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        requests = self._requests(fields, served, pieces)
        try:
            self.scheduler.submit(requests)
        except QueueFullError:
            if self.scheduler.closing:
                raise ApiError("the server is stopping", status=503, code="stopping", retry=10) from None
            raise ApiError("too many requests wait; try again", status=429, code="queue_full", retry=2) from None
        reply = Reply(chat, fields, served, requests)
        if fields["stream"]:
            return StreamingResponse(
                self._events(reply, pieces), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        task, gone = asyncio.ensure_future(self._whole(reply, pieces)), asyncio.ensure_future(_gone(http))
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            self.scheduler.cancel(requests)
            task.cancel()
            raise ClientDisconnect
        gone.cancel()
        return task.result()

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

    def _requests(self, fields: Mapping[str, Any], served: Served, pieces: asyncio.Queue) -> list[Request]:
        prompt, stops = prompt_of(fields, served), stop_strings(fields)
        room = self.scheduler.capacity - len(prompt)
        asked = fields.get("max_completion_tokens") or fields["max_tokens"]
        if room < 1 or (asked or 1) > room:
            found = f"the prompt has {len(prompt)} tokens" + f" and max_tokens is {asked}" * bool(asked)
            raise ApiError(f"{found}, but the context holds {self.scheduler.capacity}", code="context_length_exceeded")
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        sampling = {**served.defaults, **{name: fields[name] for name in names if fields[name] is not None}}
        sampling["top_k"] = sampling.get("top_k") or None
        logprobs = fields.get("top_logprobs", fields["logprobs"])
        logprobs = None if fields["logprobs"] in (None, False) else logprobs or 0
        loop = asyncio.get_running_loop()

        def deliver(number: int) -> Callable[[Piece], None]:
            return lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

        return [
            Request(
                fields["model"], prompt, asked or room, StreamDecoder(served.chat.tokenizer, stops), served.stop_tokens,
                deliver(number), **sampling, top_logprobs=logprobs,
                seed=None if fields["seed"] is None else (fields["seed"] + number) % 2**63,
            )
            for number in range(fields["n"])
        ]  # fmt: skip

    async def _pieces(self, requests: list[Request], pieces: asyncio.Queue) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers as they come; what is not finished is cancelled when the caller leaves."""
        left, until = len(requests), time.monotonic() + self.limits.seconds
        try:
            while left:
                number, piece = await asyncio.wait_for(pieces.get(), until - time.monotonic())
                left -= piece.finish is not None
                if piece.finish in ("error", "cancelled"):
                    if self.scheduler.closing:
                        raise ApiError("the server is stopping", status=503, code="stopping")
                    raise ApiError("the answer could not be computed", status=500)
                yield number, piece
        except TimeoutError:
            raise ApiError(f"the answer took more than {self.limits.seconds:.0f} seconds", status=504) from None
        finally:
            self.scheduler.cancel(requests)

    async def _whole(self, reply: Reply, pieces: asyncio.Queue) -> Response:
        async for number, piece in self._pieces(reply.requests, pieces):
            reply.add(number, piece)
        return JSONResponse(reply.whole())

    async def _events(self, reply: Reply, pieces: asyncio.Queue) -> AsyncIterator[str]:
        """Server-sent events; an error after the first of them is an event too."""
        try:
            for chunk in reply.opening():
                yield _event(chunk)
            async for number, piece in self._pieces(reply.requests, pieces):
                for chunk in reply.add(number, piece):
                    yield _event(chunk)
            for chunk in reply.closing():
                yield _event(chunk)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)
        finally:
            self.scheduler.cancel(reply.requests)


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _gone(http: HttpRequest) -> None:
    """Returns when the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
