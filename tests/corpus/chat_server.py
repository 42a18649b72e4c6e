"""A chat endpoint on 127.0.0.1 that misbehaves as it is told, and keeps account of it. No client should trust it."""

import gzip
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

# What is sent with status 200 though it is no answer.
BODIES = {
    "no json": b"<html>busy</html>", "half json": b'{"choices": [{"mess', "no choices": b"{}", "nested": b"[" * 100_000,
    "empty choices": b'{"choices": []}', "choices null": b'{"choices": null}', "a list": b"[1, 2]", "nothing": b"",
    "content a number": b'{"choices": [{"message": {"content": 3}}]}',
    "content null": b'{"choices": [{"message": {"content": null}}]}',
    "content a list": b'{"choices": [{"message": {"content": ["a"]}}]}',
    "content blank": b'{"choices": [{"message": {"content": " \\n"}}]}',
    "half a character": b'{"choices": [{"message": {"content": "\\ud83d"}}]}', "not utf-8": b'{"choices": "\xff\xfe"}',
}  # fmt: skip
STATUSES = {"408": 408, "409": 409, "425": 425, "429": 429, "500": 500, "502": 502, "503": 503, "529": 529}
# Sent as they are, for as long as the client listens; 0.02 s between the parts of those that drip.
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ENDLESS: dict[str, Callable[[], Iterator[bytes]]] = {
    "endless headers": lambda: itertools.chain([HEAD], (b"X-%d: y\r\n" % i for i in itertools.count())),
    "drip headers": lambda: itertools.chain([HEAD, b"X: "], itertools.repeat(b"y")),
    "endless 1xx": lambda: itertools.repeat(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "drip 1xx": lambda: itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "endless gzip": lambda: itertools.chain(
        [HEAD, b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b"")[:10]],
        itertools.repeat(b"\0\1\0\xfe\xff "),  # stored blocks of one byte
    ),
    "hang": lambda: itertools.chain([HEAD], iter(lambda: time.sleep(0.02) or b"", None)),
}
BOMB = gzip.compress(bytes(40 << 20))  # 40 KB that are 40 MB
PASSING = ("429 retry-after", "slow", "drip", "cut", "refused", *BODIES, *STATUSES)  # faults that a retry mends


def reply(payload: dict[str, Any]) -> str:
    """The right answer to a question: a JSON object that repeats it."""
    return json.dumps({"answer": "答：" + payload["messages"][-1]["content"]}, ensure_ascii=False)


@dataclass
class Request:
    """One request: when it came, by which key, what was asked, what was done, and whether a whole answer was sent."""

    time: float
    key: str
    question: str
    headers: dict[str, str]
    fault: str = "good"
    answered: bool = False


@dataclass(eq=False)
class ChatServer(ThreadingHTTPServer):
    """`behave` is given a request and how often its question came before, and names a fault or "good"."""

    behave: Callable[[Request, int], str] = lambda request, nth: "good"
    answer: Callable[[dict[str, Any]], str] = reply
    usage: Any = "characters"  # one token a character; else what is sent as usage; None: no usage is sent
    pause: float = 0.0  # seconds before every good answer
    slow: float = 1.0  # seconds before a slow one
    retry_after: str = "0"  # the header's value
    echo: str = ""  # is part of every error's message
    log: list[Request] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    daemon_threads = True
    request_queue_size = 128

    def __post_init__(self) -> None:
        self.lock, self.closing = threading.Lock(), threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.thread.join()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""

    def count(self, fault: str) -> int:
        return sum(request.fault == fault for request in self.log)


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = payload["messages"][-1]["content"]
        request = Request(time.monotonic(), self.headers["Idempotency-Key"], question, dict(self.headers.items()))
        with server.lock:
            nth = sum(other.question == question for other in server.log)
            request.fault = fault = server.behave(request, nth)
            server.log.append(request)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            if self.path != "/v1/chat/completions":
                self.send(404, b"no such path")
            elif fault == "refused":
                self.close_connection = True
            elif fault in BODIES:
                self.send(200, BODIES[fault])
            elif fault in ("429 retry-after", "503 later"):
                self.send(int(fault[:3]), self.error(fault), {"Retry-After": server.retry_after})
            elif fault in ENDLESS:
                for part in ENDLESS[fault]():
                    self.wfile.write(part)
                    if server.closing.wait(0.02 if "drip" in fault else 0):
                        break
                self.close_connection = True
            elif fault == "gzip bomb":
                self.send(200, BOMB, {"Content-Encoding": "gzip"})
            elif fault == "br":
                self.send(200, b"\x8b\x02\x80", {"Content-Encoding": "br"})
            elif fault == "redirect":
                self.send(307, b"", {"Location": f"{server.url}/elsewhere"})
            elif fault.isdigit():
                self.send(int(fault), self.error(fault))
            else:
                self.good(payload, request)
        finally:
            with server.lock:
                server.in_flight -= 1

    def good(self, payload: dict[str, Any], request: Request) -> None:
        """An answer: whole, late, byte by byte, or cut in the middle."""
        text = self.server.answer(payload)
        usage = self.server.usage
        if usage == "characters":
            prompt = sum(len(message["content"]) for message in payload["messages"])
            usage = {"prompt_tokens": prompt, "completion_tokens": len(text)}
        body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
        data = json.dumps(body if usage is None else body | {"usage": usage}).encode()
        self.server.closing.wait(self.server.slow if request.fault == "slow" else self.server.pause)
        if request.fault == "drip":
            self.head(200, len(data))
            for i in range(len(data)):
                if self.server.closing.wait(0.02):
                    break
                self.wfile.write(data[i : i + 1])
        elif request.fault == "cut":
            self.head(200, len(data))
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif request.fault == "gzip":
            self.send(200, gzip.compress(data), {"Content-Encoding": "GZip"})
        else:
            self.send(200, data)
            request.answered = request.fault == "good"

    def error(self, fault: str) -> bytes:
        return json.dumps({"error": {"message": f"{fault} for {self.server.echo}", "code": 1}}).encode()

    def head(self, status: int, length: int, headers: Iterable[tuple[str, str]] = ()) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(length)), *headers):
            self.send_header(name, value)
        self.end_headers()

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.head(status, len(data), (headers or {}).items())
        self.wfile.write(data)


def misbehaving(share: float, faults: Iterable[str] = PASSING, most: int = 4) -> Callable[[Request, int], str]:
    """A random fault of a share of the requests, the same in every run, and at most `most` times of one question."""
    kinds = list(faults)

    def behave(request: Request, nth: int) -> str:
        rng = random.Random(f"{request.question} {nth}")
        return rng.choice(kinds) if nth < most and rng.random() < share else "good"

    return behave
