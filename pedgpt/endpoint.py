"""An OpenAI-compatible chat endpoint, asked from several threads: deadline, retries, budget, a cache of its answers.

All requests of a process run in one event loop, in a thread of its own. So connections stay open for the next request,
every request can be cancelled at its deadline or after Ctrl-C, and what requests share needs no locks.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import math
import os
import random
import re
import sqlite3
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar, get_type_hints

from tqdm import tqdm

from pedgpt.files import nearest, printable, read_toml, toml_place, toml_value

T = TypeVar("T")
R = TypeVar("R")
_URL = r'(?a)(?!.*/chat/completions/*$)https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[!"$->A-~]*)?'
_LEAST = {"max_tokens": 1, "concurrency": 1, "timeout": 0.001}  # of a setting that is a number; 0 for the others
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS spent (prompt INTEGER, completion INTEGER);
    INSERT INTO spent (prompt, completion) SELECT 0, 0 WHERE NOT EXISTS (SELECT * FROM spent);
"""


@dataclass
class EndpointSettings:
    """Where the endpoint is, how it is asked and what it may cost."""

    url: str = ""  # of the API, up to and without /chat/completions: https://api.openai.com/v1
    model: str = ""  # as the server names it
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key; "": the server wants none
    temperature: float = 0.7  # of the sampling
    max_tokens: int = 1024  # longest answer, tokens
    concurrency: int = 8  # requests at the same time
    timeout: float = 60.0  # seconds for a request, from connecting to the end of its answer
    max_retries: int = 6  # of one request
    retry_wait: float = 1.0  # seconds: a random wait of up to this, twice this, four times this, ... between retries
    max_wait: float = 120.0  # seconds: the longest such wait; a server that asks for a longer one ends the run
    token_budget: int = 0  # tokens of prompts and answers, over all runs that share the cache; 0: no limit
    price_per_million_input: float = 0.0  # currency units per million tokens of prompts
    price_per_million_output: float = 0.0  # currency units per million tokens of answers
    currency: str = "USD"  # of the prices, for display
    json_mode: bool = False  # send response_format json_object, for servers that know it

    def check(self) -> None:
        """Raise ValueError for a value out of range."""
        # A wrong value is not repeated, as it may hold a secret.
        if not re.fullmatch(_URL, self.url):
            raise ValueError("url must be http(s)://host[:port]/path, without user, ?, # and /chat/completions")
        if not re.fullmatch(r"([A-Z_][A-Z0-9_]*)?", self.key_variable):
            raise ValueError("key_variable must be an environment variable's name in upper case, not the key itself")
        if not self.model.strip():
            raise ValueError("model is missing")
        for name, kind in get_type_hints(EndpointSettings).items():
            if kind in (int, float) and not _LEAST.get(name, 0) <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {_LEAST.get(name, 0)}, found {getattr(self, name)}")

    def read_key(self) -> str:
        """The key, "" if none is wanted; ValueError if the environment has none, or one that no header can hold."""
        name = self.key_variable
        key = os.environ.get(name, "")
        if name and not re.fullmatch(r"[!-~]+", key):  # an error of the client would show it
            raise ValueError(
                f'the environment variable {name} is not set to a key; give key_variable = "" if none is wanted'
            )
        return key


def load_endpoint(path: str | Path) -> EndpointSettings:
    """The settings in a flat TOML file, checked; ValueError for a file or a value that cannot be used."""
    values, kinds = read_toml(path), get_type_hints(EndpointSettings)
    for name, value in values.items():
        place = f"{toml_place(path, name)}: {name}"
        if name not in kinds:
            raise ValueError(f"{place} is no setting of an endpoint; {nearest(name, kinds, 'settings')}")
        values[name] = toml_value(place, value, kinds[name])
    settings = EndpointSettings(**values)
    try:
        settings.check()
    except ValueError as error:
        raise ValueError(f"{toml_place(path, str(error).partition(' ')[0])}: {error}") from None
    return settings


class EndpointFailure(ValueError):
    """The endpoint gave no answer: it refused the request, every retry failed, or the budget is spent."""


class Unusable(ValueError):
    """The endpoint answers, but never what was asked for."""


class _Again(Exception):
    """A request failed in a way that may pass."""


@dataclass
class Usage:
    """What an endpoint was asked in this run, and what all runs that share the cache have cost."""

    requests: int = 0  # sent, retries included
    answered: int = 0  # new answers
    cached: int = 0  # answers from the cache
    retries: int = 0
    prompt_tokens: int = 0  # of all runs, as are those that follow
    completion_tokens: int = 0
    cost: float = 0.0


class Endpoint:
    """Asks a chat endpoint from any number of threads; a context manager.

    `cache` is an SQLite file: an answer is committed to it before it is used, and never asked for again, so a run that
    was killed goes on where it ended. Before each request the budget is checked; what is in flight is not known then,
    so the budget may be exceeded by as many requests as run at the same time, less one. Raises ValueError without a key
    or `httpx`, or if the file is no cache.
    """

    def __init__(self, settings: EndpointSettings, cache: str | Path) -> None:
        settings.check()
        self.settings, self.cache, key = settings, Path(cache), settings.read_key()
        self._url = settings.url.rstrip("/") + "/chat/completions"
        self._secret = key if len(key) >= 8 else ""  # to be masked: a server without keys may want a word like "none"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:  # redirects are not followed: the key must not go to another host
            import httpx

            limits = httpx.Limits(max_keepalive_connections=settings.concurrency)
            self._client = httpx.AsyncClient(headers=headers, timeout=None, limits=limits)
        except ImportError as error:
            raise ValueError(f'{error}; see pip install -e ".[corpus]"') from None
        self._failures = (httpx.HTTPError, httpx.InvalidURL)
        self.usage, self._database, self._loop = Usage(), _open_cache(self.cache), _running_loop(os.getpid())
        self._account()
        # From now on the database is used in the loop's thread only, as all that follows.
        self._slots, self._resume = asyncio.Semaphore(settings.concurrency), 0.0  # before that moment nothing is sent
        self._tasks: weakref.WeakSet[Any] = weakref.WeakSet()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is in flight, send nothing more, and close the cache. It waits for no server."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()

    def ask(self, messages: Sequence[Mapping[str, str]], *, attempt: int = 0) -> str:
        """The text of the answer to chat messages; another `attempt` is another answer to the same question.

        Raises EndpointFailure when the request was refused, all retries failed or the budget is spent; but once the
        server has answered others, Unusable if it refuses what this one says (400, 413, 422) or gives no text.
        """
        answer = asyncio.run_coroutine_threadsafe(self._answer(messages, attempt), self._loop)
        try:
            return answer.result()
        except CancelledError:
            raise EndpointFailure(f"the endpoint {self.settings.url} is closed") from None

    def describe(self) -> str:
        """The usage, in one paragraph."""
        u, s = self.usage, self.settings
        cost = f", {u.cost:.4f} {s.currency}" if u.cost else ""
        return printable(
            f"{s.model} at {s.url}: {u.requests} requests sent, {u.answered} answered, {u.cached} answers "
            f"from {self.cache.name}, {u.retries} retries; all runs with this cache: {u.prompt_tokens:,} prompt and "
            f"{u.completion_tokens:,} completion tokens{cost} (characters where the server counts no tokens)."
        )

    def so_far(self) -> str:
        """Cost and tokens of all runs and retries of this one, for a progress bar."""
        u = self.usage
        tokens = u.prompt_tokens + u.completion_tokens
        return f"{u.cost:.2f} {self.settings.currency}, {tokens:,} tokens, {u.retries} retries"

    async def _close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()
        self._database.close()

    async def _answer(self, messages: Sequence[Mapping[str, str]], attempt: int) -> str:
        """The cached answer, or a new one, after as many requests as it takes."""
        if self._closed:
            raise asyncio.CancelledError
        self._tasks.add(asyncio.current_task())
        s, empty = self.settings, False
        payload: dict[str, Any] = {
            "model": s.model, "messages": [dict(message) for message in messages], "temperature": s.temperature,
            "max_tokens": s.max_tokens, "stream": False,
        }  # fmt: skip
        payload |= {"response_format": {"type": "json_object"}} if s.json_mode else {}
        named = json.dumps({"url": self._url, "attempt": attempt, **payload}, sort_keys=True, separators=(",", ":"))
        key, body = hashlib.sha256(named.encode()).hexdigest(), json.dumps(payload).encode()
        prompt = sum(len(str(message.get("content", ""))) for message in messages)
        if found := self._sql("SELECT text FROM answers WHERE key = ?", key):
            self.usage.cached += 1
            return found[0]
        for retry in range(s.max_retries + 1):
            if retry:
                await asyncio.sleep(random.uniform(0, min(s.max_wait, s.retry_wait * 2.0 ** (retry - 1))))
            async with self._slots:
                if (pause := self._resume - time.monotonic()) > 0:
                    await asyncio.sleep(pause + random.uniform(0, s.retry_wait))
                self._account()
                used, most = self.usage.prompt_tokens + self.usage.completion_tokens, prompt + s.max_tokens
                if s.token_budget and used + most > s.token_budget:
                    raise EndpointFailure(
                        f"token_budget = {s.token_budget:,} is spent: {used:,} tokens were used, and the next request "
                        f"may need {most:,}; raise it and run again, what was answered is kept in {self.cache}"
                    )
                self.usage.retries += retry > 0
                try:
                    answer = await self._post(key, body)
                    empty = True
                    return self._keep(key, answer, prompt)
                except _Again as error:
                    again = error
        if empty and self._sql("SELECT 1 FROM answers"):
            raise Unusable(str(again))
        raise EndpointFailure(f"no answer from {s.url} in {s.max_retries + 1} requests; the last: {again}")

    async def _post(self, key: str, body: bytes) -> dict[str, Any]:
        """Send one request; the JSON object of a good answer, else _Again, EndpointFailure or Unusable."""
        s, found = self.settings, None
        self.usage.requests += 1
        try:
            async with asyncio.timeout(s.timeout):
                got = await self._client.post(self._url, content=body, headers={"Idempotency-Key": key})
        except TimeoutError:
            raise _Again(f"no whole answer within {s.timeout:g} seconds") from None
        except self._failures as error:
            raise _Again(self._shown(f"{type(error).__name__}: {error}")) from None
        status, said = got.status_code, got.text
        with suppress(ValueError, RecursionError, LookupError, TypeError):
            found = got.json()
            said = str(found["error"]["message"])
        said = f"HTTP {status}: {self._shown(said)}"
        if got.is_success and isinstance(found, dict):
            return found
        if status in (400, 413, 422) and self._sql("SELECT 1 FROM answers"):
            raise Unusable(said)
        if 300 <= status < 500 and status not in (408, 409, 425, 429):
            what = f"the key in {s.key_variable or 'key_variable'}" if status in (401, 403) else "the request"
            raise EndpointFailure(f"{s.url} refuses {what}: {said}")
        asked = got.headers.get("Retry-After", "")
        wait = max(float(asked) if asked.isdecimal() else 0.0, s.retry_wait if status == 429 else 0.0)
        if wait > s.max_wait:
            longer = f"{s.url} asks to wait {wait:.0f} seconds, longer than max_wait = {s.max_wait:g}"
            raise EndpointFailure(f"{longer}; run again later, answers are kept in {self.cache} ({said})")
        self._resume = max(self._resume, time.monotonic() + wait)  # for all requests, as they share the server's limit
        raise _Again(said)

    def _keep(self, key: str, answer: dict[str, Any], prompt_characters: int) -> str:
        """Commit an answer's text and tokens, and return the text; _Again if there is none."""
        text, usage = "", answer.get("usage")
        with suppress(LookupError, TypeError, AttributeError, UnicodeEncodeError):
            found = self._masked(answer["choices"][0]["message"]["content"].strip())
            text = found.encode().decode()  # no file can hold half a surrogate pair
        names = ("prompt_tokens", "completion_tokens")
        counts: list[Any] = [usage.get(name) if isinstance(usage, dict) else None for name in names]
        if not all(type(count) is int and bool(text) <= count < 1 << 40 for count in counts):
            counts = [prompt_characters, len(text)]
        with self._database:  # one transaction, which is rolled back if a statement fails
            if text:
                self._sql("INSERT OR IGNORE INTO answers VALUES (?, ?)", key, text)
            self._sql("UPDATE spent SET prompt = prompt + ?, completion = completion + ?", *counts)
        self._account()
        if not text:
            raise _Again(f"the answer has no text: {self._shown(json.dumps(answer, ensure_ascii=False))}")
        self.usage.answered += 1
        return self._sql("SELECT text FROM answers WHERE key = ?", key)[0]  # another request may have been first

    def _account(self) -> None:
        """Bring what all runs have used, and what it costs, up to date."""
        u, s = self.usage, self.settings
        u.prompt_tokens, u.completion_tokens = self._sql("SELECT prompt, completion FROM spent")
        u.cost = (u.prompt_tokens * s.price_per_million_input + u.completion_tokens * s.price_per_million_output) / 1e6

    def _sql(self, statement: str, *values: object) -> Any:
        """The first row of a statement's result, or None."""
        try:
            return self._database.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise ValueError(f"{self.cache}: the cache cannot be used ({error})") from None

    def _masked(self, text: str) -> str:
        """A text without the key."""
        return text.replace(self._secret, "***") if self._secret else text

    def _shown(self, text: str) -> str:
        """The start of what a server says, on one line, without the key and without what a terminal would obey."""
        return printable(" ".join(self._masked(text).split()))[:300]


@functools.cache
def _running_loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop of the requests of a process, in a thread that ends with it. A process that was forked needs its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _open_cache(path: Path) -> sqlite3.Connection:
    """The database at `path`, made if there is none; ValueError for any other file, which stays as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=60, check_same_thread=False)
        if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
            database.executescript(_SCHEMA)
        database.execute("SELECT key, text, prompt, completion FROM answers, spent")
        with suppress(sqlite3.OperationalError):  # SQLite does not wait here; the first sets it for all
            database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last answers, a killed run none
    except (OSError, sqlite3.Error) as error:
        raise ValueError(f"{path}: cannot be used as a cache of answers ({error}); give another path") from None
    return database


def in_order(
    items: Iterable[T], work: Callable[[T], R], *, workers: int, desc: str = "", endpoints: Sequence[Endpoint] = ()
) -> Iterator[R]:
    """`work` of each item, in the order of the items, done in `workers` threads; with 0, in this one.

    At most 4 × `workers` items are taken ahead of the last result. An exception is raised when the results before its
    item are given, and work in flight is finished. With `desc` a progress bar on stderr also shows `so_far()` of the
    `endpoints`; without threads it appears after three seconds.
    """
    often = 0.2 if sys.stderr.isatty() else 10  # seconds
    total = len(items) if isinstance(items, Sequence) else None
    with tqdm(desc=printable(desc), total=total, disable=not desc, mininterval=often, delay=0 if workers else 3) as bar:
        for result in _in_threads(items, work, workers) if workers else map(work, items):
            bar.set_postfix_str(printable("; ".join(endpoint.so_far() for endpoint in endpoints)), refresh=False)
            bar.update()
            yield result


def _in_threads(items: Iterable[T], work: Callable[[T], R], workers: int) -> Iterator[R]:
    pool = ThreadPoolExecutor(workers)
    submitted = (pool.submit(work, item) for item in items)
    try:
        flying = deque(islice(submitted, 4 * workers))  # so that one slow answer does not keep the others waiting
        while flying:
            yield flying.popleft().result()
            flying.extend(islice(submitted, 1))
    finally:  # after Ctrl-C the endpoint is closed, which ends what is in flight
        pool.shutdown(isinstance(sys.exception(), Exception | None), cancel_futures=True)
