"""An OpenAI-compatible chat endpoint, asked from several threads: deadline, retries, budget, a cache of its answers.

Each request runs in an event loop of its own, in the thread that asks, so that it can be cancelled at its deadline or
after Ctrl-C, whatever the server makes it wait for.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, Self, get_type_hints

from pedgpt.files import nearest, printable, read_toml, toml_place, toml_value
from pedgpt.ordered import in_order as in_order  # who asks in threads takes it from here

_MAX_BODY = 4 << 20  # bytes
_URL = r'(?a)(?!.*/chat/completions/*$)https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[!"$->A-~]*)?'
_RANGES = {
    "temperature": (0, 2), "max_tokens": (1, 1e9), "concurrency": (1, 1024), "timeout": (1e-3, 86400),
    "max_retries": (0, 1000), "retry_wait": (1e-6, 86400), "max_wait": (1e-3, 86400), "token_budget": (0, 1e15),
    "price_per_million_input": (0, 1e9), "price_per_million_output": (0, 1e9),
}  # fmt: skip
_FORMAT = (0x50656447, 1)  # of the cache file: SQLite's application_id and user_version
_SCHEMA = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS spent (prompt INTEGER, completion INTEGER, estimated INTEGER);
    INSERT INTO spent SELECT 0, 0, 0 WHERE NOT EXISTS (SELECT * FROM spent);
    PRAGMA application_id = {_FORMAT[0]};
    PRAGMA user_version = {_FORMAT[1]};
    COMMIT;
"""


@dataclass
class EndpointSettings:
    """Where the endpoint is, how it is asked and what it may cost."""

    url: str = ""  # of the API, up to and without /chat/completions: https://api.openai.com/v1
    model: str = ""  # as the server names it
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key; "": the server wants none
    temperature: float = 0.7  # of the sampling, 0 to 2
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
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between {low:g} and {high:g}, found {getattr(self, name)}")

    def read_key(self) -> str:
        """The key, "" if none is wanted; ValueError if the environment has none or one that cannot be used."""
        name = self.key_variable
        key = os.environ.get(name, "") if name else ""
        # An error would show a key that no header can hold, and a word as short as "none" cannot be masked in answers.
        if name and not re.fullmatch(r"[!#-\[\]-~]{8,}", key):
            wrong = "needs at least 8 ASCII characters without spaces, quotes and backslashes" if key else "is not set"
            raise ValueError(f'the environment variable {name} {wrong}; give key_variable = "" if no key is wanted')
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
    """The endpoint gave no answer: it refused the request, or every retry failed."""


class BudgetSpent(ValueError):
    """The next request could exceed token_budget."""


class Unusable(ValueError):
    """The endpoint answers, but never what was asked for."""


class _Again(Exception):
    """A request failed in a way that may pass."""


@dataclass
class Usage:
    """What an endpoint was asked and what it cost; tokens of this run, and of all runs that share the cache."""

    requests: int = 0  # sent, retries included
    answered: int = 0  # new answers
    cached: int = 0  # answers from the cache, or shared with an identical request in flight
    retries: int = 0
    unanswered: int = 0  # requests whose answer never arrived whole; the server may charge for them
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    all_prompt_tokens: int = 0
    all_completion_tokens: int = 0
    all_cost: float = 0.0
    estimated: int = 0  # answers, of all runs, whose tokens are estimated by characters


class Endpoint:
    """Asks a chat endpoint from any number of threads; a context manager.

    `cache` is an SQLite file: an answer is committed to it before it is used, and never asked for again, so a run that
    was killed goes on where it ended. Raises ValueError without a key or `httpx`, or if the file is no cache.
    """

    title = "endpoint"  # what error messages and the account of the usage call it

    def __init__(self, settings: EndpointSettings, cache: str | Path) -> None:
        settings.check()
        self.settings, self.cache = settings, Path(cache)
        key = settings.read_key()
        self._secret, self._url = _spellings(key), settings.url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        try:  # redirects are not followed: the key must not go to another host
            import httpx

            self._client = partial(httpx.AsyncClient, headers=headers, timeout=None, verify=httpx.create_ssl_context())
            self._client()
        except (ImportError, ValueError) as error:  # no httpx, or a proxy that it cannot use
            raise ValueError(f'{self.title}: {self._shown(str(error))}; see pip install -e ".[corpus]"') from None
        self._failures = (httpx.HTTPError, httpx.InvalidURL)
        self._database = _open_cache(self.cache)
        self._slots, self._turn = threading.Semaphore(settings.concurrency), threading.Condition()
        # Everything that follows is changed by a thread that holds `_turn`.
        self._counts, self._spent = Counter[str](), ()
        self._pending: set[str] = set()  # questions that some thread is asking
        self._reserved = 0  # tokens, of the requests in flight
        self._resume = 0.0  # on the clock of time.monotonic: before it nothing is sent
        self._reason, self._given_up = "", False  # why nothing is sent any more; whether requests are given up

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Ctrl-C, or a signal that ends the program, waits for no server.
        self.close(wait=kind is None or issubclass(kind, Exception))

    def close(self, *, wait: bool = True) -> None:
        """Send nothing more and close the cache; requests in flight are waited for, or given up if not `wait`."""
        with self._turn:
            self._reason = self._reason or f"the {self.title} is closed"
            self._given_up |= not wait
            self._turn.notify_all()
            try:
                self._turn.wait_for(lambda: not self._pending)
            except KeyboardInterrupt:
                self.close(wait=False)
                raise
            self._spent = self._spent or self._sql("SELECT * FROM spent")
            self._database.close()

    def ask(self, messages: Sequence[Mapping[str, str]], *, attempt: int = 0) -> str:
        """The text of the answer to chat messages; another `attempt` is another answer to the same question.

        Raises EndpointFailure when the request was refused or all retries failed, and BudgetSpent; but once the server
        has answered others, Unusable if it refuses what this one says (400, 413, 422) or gives no text.
        """
        s = self.settings
        payload = {
            "model": s.model, "messages": [dict(message) for message in messages], "temperature": s.temperature,
            "max_tokens": s.max_tokens, "stream": False,
        }  # fmt: skip
        payload |= {"response_format": {"type": "json_object"}} if s.json_mode else {}
        named = json.dumps({"url": self._url, "attempt": attempt, **payload}, sort_keys=True, separators=(",", ":"))
        key = hashlib.sha256(named.encode()).hexdigest()
        with self._turn:
            self._turn.wait_for(lambda: key not in self._pending)  # another thread's question is not sent twice
            self._pause(0)
            self._pending.add(key)
        try:
            if found := self._sql("SELECT text FROM answers WHERE key = ?", key):
                self._count(cached=1)
                return found[0]
            return self._send(key, payload)
        finally:
            with self._turn:
                self._pending.remove(key)
                self._turn.notify_all()

    @property
    def usage(self) -> Usage:
        """The numbers at this moment; of a closed endpoint, the last."""
        s = self.settings
        with self._turn:
            u = Usage(**self._counts)
            u.all_prompt_tokens, u.all_completion_tokens, u.estimated = self._spent or self._sql("SELECT * FROM spent")
        prompt, answer = s.price_per_million_input / 1e6, s.price_per_million_output / 1e6
        u.cost = u.prompt_tokens * prompt + u.completion_tokens * answer
        u.all_cost = u.all_prompt_tokens * prompt + u.all_completion_tokens * answer
        return u

    def describe(self) -> str:
        """The usage, in one paragraph."""
        u, s = self.usage, self.settings
        priced = s.price_per_million_input or s.price_per_million_output
        cost, all_cost = (f", {cost:.4f} {s.currency}" if priced else "" for cost in (u.cost, u.all_cost))
        text = (
            f"{self.title} {s.model} at {s.url}: {u.requests} requests sent, {u.answered} answered, {u.cached} answers "
            f"from {self.cache.name}, {u.retries} retries; {u.prompt_tokens:,} prompt and "
            f"{u.completion_tokens:,} completion tokens{cost} (all runs with this cache: {u.all_prompt_tokens:,} and "
            f"{u.all_completion_tokens:,} tokens{all_cost})"
        )
        if u.estimated:
            text += f"; the server gave no token counts for {u.estimated} answers: estimated by characters"
        if u.unanswered:
            text += f"; {u.unanswered} requests were cut or timed out, the server may charge for them too"
        return printable(text + ".")

    def so_far(self) -> str:
        """Cost, tokens and retries of this run, for a progress bar."""
        u = self.usage
        spent = f"{u.cost:.2f} {self.settings.currency}, {u.prompt_tokens + u.completion_tokens:,} tokens"
        return f"{spent}, {u.retries} retries"

    def _count(self, **more: int) -> None:
        with self._turn:
            self._counts.update(more)

    def _send(self, key: str, payload: dict[str, Any]) -> str:
        """Send until there is an answer; returns its text, committed."""
        s, body, answers = self.settings, json.dumps(payload).encode(), 0
        prompt = sum(len(str(message.get("content", ""))) for message in payload["messages"])
        for retry in range(s.max_retries + 1):
            with self._slots:
                with self._turn:
                    self._reserve(prompt + s.max_tokens)
                try:
                    while (pause := self._resume - time.monotonic()) > 0:
                        self._pause(pause + random.uniform(0, s.retry_wait))
                    self._pause(0)
                    self._count(retries=retry > 0, requests=1, unanswered=1)
                    # A server that knows the header repeats what it has answered: after an unusable answer, ask anew.
                    name = f"{key}-{answers}" if answers else key
                    with closing(asyncio.new_event_loop()) as loop:  # does not wait for a hanging name server
                        status, wait, data = loop.run_until_complete(self._in_time(name, body))
                    answer = self._read(status, wait, data, str(payload["messages"][-1].get("content")))
                    answers += 1
                    return self._keep(key, answer, data, prompt)
                except _Again as error:
                    again = error
                finally:
                    with self._turn:
                        self._reserved -= prompt + s.max_tokens
                        self._turn.notify_all()
            if retry < s.max_retries:
                self._pause(random.uniform(0, min(s.max_wait, s.retry_wait * 2.0 ** min(retry, 30))))
        if answers and self._sql("SELECT 1 FROM answers"):
            raise Unusable(str(again))
        raise EndpointFailure(f"no answer from {s.url} in {s.max_retries + 1} requests; the last: {again}")

    def _reserve(self, tokens: int) -> None:
        """Reserve tokens for a request; if too few are left, wait for those in flight, which may need fewer."""
        budget, tokens_used = self.settings.token_budget, "SELECT prompt + completion FROM spent"
        while budget and (used := self._sql(tokens_used)[0]) + self._reserved + tokens > budget:
            if not self._reserved:
                raise BudgetSpent(
                    f"token_budget = {budget:,} is spent: {used:,} tokens were used, and the next request may need "
                    f"{tokens:,}; raise token_budget and run again, what was answered is kept in {self.cache}"
                )
            self._turn.wait()
        self._reserved += tokens

    def _pause(self, seconds: float) -> None:
        """Wait; EndpointFailure once nothing is sent any more. NOTE: 0 must not wait, which gives the lock away."""
        with self._turn:
            if self._reason or (seconds and self._turn.wait_for(lambda: self._reason, seconds)):
                raise EndpointFailure(self._reason)

    async def _in_time(self, key: str, body: bytes) -> tuple[int, float, bytes]:
        """`_post`, but a request that is late, or not waited for any more, is cancelled."""
        task, seconds = asyncio.create_task(self._post(key, body)), self.settings.timeout
        end = time.monotonic() + seconds
        while not task.done() and not self._given_up and time.monotonic() < end:
            await asyncio.wait([task], timeout=min(0.1, seconds))
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait([task])
        self._pause(0)
        raise _Again(f"no whole answer within {seconds:g} seconds")

    async def _post(self, key: str, body: bytes) -> tuple[int, float, bytes]:
        """One request: its response's status, the seconds that the server asks to wait, and the content."""
        data, headers = bytearray(), {"Idempotency-Key": key}
        try:
            async with self._client() as client, client.stream("POST", self._url, content=body, headers=headers) as got:
                async for part in got.aiter_raw():
                    data += part
                    if len(data) > _MAX_BODY:
                        raise _Again(f"the answer is longer than {_MAX_BODY} bytes")
        except self._failures as error:
            name = type(error).__name__
            self._count(unanswered=-(name == "ConnectError"))  # nothing was sent
            raise _Again(self._shown(f"{name}: {error}")) from None
        self._count(unanswered=-1)
        return got.status_code, _retry_after(got.headers.get("Retry-After", "")), bytes(data)

    def _read(self, status: int, wait: float, data: bytes, asked: str) -> dict[str, Any]:
        """The JSON object of a good answer, else _Again, EndpointFailure or Unusable."""
        s, found = self.settings, None
        with suppress(ValueError, RecursionError):
            found = json.loads(data)
        good = 200 <= status < 300
        if good and isinstance(found, dict):
            return found
        said, asked = f"HTTP {status}: {self._message(data)}", self._shown(asked)[:80]
        if good:
            raise _Again(f"the answer is no JSON object: {said}")
        if status in (401, 403):
            with self._turn:
                self._reason = self._reason or f"{s.url} refuses the key in {s.key_variable or 'key_variable'}: {said}"
                self._turn.notify_all()
            raise EndpointFailure(self._reason)
        if status in (400, 413, 422) and self._sql("SELECT 1 FROM answers"):
            raise Unusable(f"{said}, for {asked!r}")
        if status < 500 and status not in (408, 409, 425, 429):
            hint = "; redirects are not followed, set url to the final address" if status < 400 else ""
            raise EndpointFailure(f"{s.url} refuses the request {asked!r}: {said}{hint}")
        if wait > s.max_wait:
            raise EndpointFailure(
                f"{s.url} asks to wait {wait:.0f} seconds, longer than max_wait = {s.max_wait:g}; run again later, "
                f"what was answered is kept in {self.cache} ({said})"
            )
        wait = max(wait, s.retry_wait if status == 429 else 0)  # for everyone, as all share the server's limit
        with self._turn:
            self._resume = max(self._resume, time.monotonic() + wait)
        raise _Again(said)

    def _keep(self, key: str, answer: dict[str, Any], data: bytes, prompt_characters: int) -> str:
        """Commit an answer's text and tokens, and return the text; _Again if there is none."""
        text, usage = "", answer.get("usage")
        with suppress(LookupError, TypeError, AttributeError, UnicodeEncodeError):
            found = answer["choices"][0]["message"]["content"].strip()
            text = self._secret.sub("***", found.encode().decode())  # no file can hold half a surrogate pair
        names = ("prompt_tokens", "completion_tokens")
        counts: list[Any] = [usage.get(name) if isinstance(usage, dict) else None for name in names]
        known = all(type(count) is int and bool(text) <= count < 1 << 40 for count in counts)
        prompt, completion = counts if known else (prompt_characters, len(text)) if text else (0, 0)
        spend = "UPDATE spent SET prompt = prompt + ?, completion = completion + ?, estimated = estimated + ?"
        with self._turn:
            self._sql("BEGIN IMMEDIATE")
            if text:
                self._sql("INSERT OR IGNORE INTO answers VALUES (?, ?)", key, text)
            self._sql(spend, prompt, completion, bool(text) and not known)
            self._sql("COMMIT")
            self._count(prompt_tokens=prompt, completion_tokens=completion, answered=bool(text))
        if not text:
            raise _Again(f"the answer has no text: {self._message(data)}")
        return self._sql("SELECT text FROM answers WHERE key = ?", key)[0]  # another process may have been first

    def _sql(self, statement: str, *values: object) -> Any:
        """The first row of a statement's result, or None."""
        try:
            with self._turn:
                return self._database.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):
                self._database.rollback()  # otherwise other threads could begin no transaction
            raise ValueError(f"{self.cache}: the cache cannot be used ({error})") from None

    def _shown(self, text: str) -> str:
        """The start of what a server says, on one line, without the key and without what a terminal would obey."""
        text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
        text = self._secret.sub("***", text[:20_000])  # the cut comes after blanks shrink, so no part of a key is shown
        return text if len(text) <= 300 else text[:300] + "…"

    def _message(self, data: bytes) -> str:
        """What a server says is wrong: the message in its JSON, else all that it said."""
        text = data.decode("utf-8", "replace")
        with suppress(ValueError, RecursionError, LookupError, TypeError):
            text = "" + json.loads(text)["error"]["message"]
        return self._shown(text)


def _open_cache(path: Path) -> sqlite3.Connection:
    """The database at `path`, made if there is none; ValueError for any other file, which stays as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
            database.executescript(_SCHEMA)
        if database.execute("SELECT * FROM pragma_application_id, pragma_user_version").fetchone() != _FORMAT:
            raise ValueError("it is an SQLite file of another program or version")
        with suppress(sqlite3.OperationalError):  # SQLite does not wait here; the first sets it for all
            database.execute("PRAGMA journal_mode = WAL")
        # An answer took seconds and money, so a sync for each is cheap: FULL loses nothing to a power cut either.
        database.execute("PRAGMA synchronous = FULL")
    except (OSError, sqlite3.Error, ValueError) as error:
        raise ValueError(f"{path}: cannot be used as a cache of answers ({error}); give another path") from None
    return database


def _retry_after(value: str) -> float:
    """Seconds to wait, from a Retry-After header: seconds or an HTTP date; 0 for what cannot be understood."""
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, OverflowError, TypeError, IndexError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _spellings(key: str) -> re.Pattern[str]:
    """Finds a key as it is, and as a server may write it in JSON or in a URL; nothing if the key is empty."""
    forms = (rf"(?:\\{{0,4}}(?:{re.escape(char)}|u00{ord(char):02x})|%(?:25)?{ord(char):02x})" for char in key)
    return re.compile("".join(forms) or "(?!)", re.IGNORECASE)
