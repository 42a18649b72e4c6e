"""A teacher: any OpenAI-compatible chat endpoint, asked from several threads; what it has answered is kept."""

from __future__ import annotations

import contextlib
import dataclasses
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
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from tqdm import tqdm

from pedgpt.corpus.rows import Unusable
from pedgpt.files import nearest, read_toml

T = TypeVar("T")
R = TypeVar("R")

_ATTEMPTS = 3  # answers to the same question, before it counts as one that the teacher cannot answer
_AHEAD = 4  # items in flight per worker, so that one slow answer does not keep the others waiting
_RETRIED = {408, 409, 425, 429}  # and all from 500
_MAX_BODY = 16 << 20  # bytes
_APPLICATION, _VERSION = 0x50656447, 1  # of the cache file: SQLite's application_id and user_version
_KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
_RANGES = {
    "temperature": (0, 2), "max_tokens": (1, 1e9), "concurrency": (1, 1024), "timeout": (1e-3, 86400),
    "max_retries": (0, 1000), "retry_wait": (1e-6, 86400), "max_wait": (1e-3, 86400), "token_budget": (0, 1e15),
    "price_per_million_input": (0, 1e9), "price_per_million_output": (0, 1e9),
}  # fmt: skip


@dataclass
class TeacherSettings:
    """Where the teacher is, how it is asked and what it may cost."""

    url: str  # of the API, up to and without /chat/completions: https://api.openai.com/v1
    model: str  # as the server names it
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key; "": the server wants none
    temperature: float = 0.7  # of the sampling, 0 to 2
    max_tokens: int = 1024  # longest answer, tokens
    concurrency: int = 8  # requests at the same time
    timeout: float = 60.0  # seconds for a request's whole answer, and for the silence before any part of it
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
        try:
            url = urlsplit(self.url)
            good = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:
            good = False
        if not good or re.search(r"[\s@?#]|[^ -~]|/chat/completions/?$", self.url):
            shown = "" if re.search("[@?#]", self.url) else f", found {self.url!r}"
            raise ValueError(
                "url must be http(s)://host[:port]/path, without user and password, ?, # and /chat/completions" + shown
            )
        if not re.fullmatch(r"([A-Z_][A-Z0-9_]*)?", self.key_variable):
            raise ValueError("key_variable must be an environment variable's name in upper case, not the key itself")
        if not self.model.strip():
            raise ValueError("model must not be empty")
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between {low:g} and {high:g}, found {getattr(self, name)}")

    def read_key(self) -> str:
        """The key, "" if none is wanted; ValueError if the environment has none or one that cannot be used."""
        variable = self.key_variable
        key = os.environ.get(variable, "") if variable else ""
        if variable and not key:
            raise ValueError(
                f"the environment variable {variable} with the teacher's key is not set; set it, or give key_variable "
                '= "" for a server that wants no key'
            )
        # What no header can hold would be shown by the error; a word as short as "none" cannot be masked in answers.
        if key and not re.fullmatch(r"[!#-\[\]-~]{8,}", key):
            raise ValueError(
                f"the environment variable {variable} must hold at least 8 ASCII characters without spaces, quotes and "
                'backslashes; give key_variable = "" for a server that wants no key'
            )
        return key


def load_teacher(path: str | Path) -> TeacherSettings:
    """The settings in a flat TOML file, checked; ValueError for a file or a value that cannot be used."""
    values = read_toml(path)
    kinds = typing.get_type_hints(TeacherSettings)
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"{path}: {name} is no setting of a teacher; {nearest(name, kinds, 'settings')}")
        if kinds[name] is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not kinds[name]:
            raise ValueError(f"{path}: {name} must be {_KINDS[kinds[name]]}, found {type(value).__name__}")
    for name in ("url", "model"):
        if name not in values:
            raise ValueError(f"{path}: missing setting: {name}")
    settings = TeacherSettings(**values)
    try:
        settings.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return settings


class TeacherFailure(ValueError):
    """The teacher gave no answer: it refused the request, or every retry failed."""


class BudgetSpent(ValueError):
    """The next request could exceed token_budget."""


class _Again(Exception):
    """A request failed in a way that may pass. `wait` is what the server asked for, seconds."""

    def __init__(self, problem: str, wait: float = 0.0, everyone: bool = False, answered: bool = False) -> None:
        super().__init__(problem)
        self.wait, self.everyone, self.answered = wait, everyone, answered


@dataclass
class Usage:
    """What a teacher was asked and what it cost; tokens of this run, and of all runs that share the cache."""

    requests: int = 0  # sent, retries included
    answered: int = 0  # new answers
    cached: int = 0  # answers from the cache, or shared with an identical request in flight
    retries: int = 0
    failures: int = 0  # questions given up
    unanswered: int = 0  # requests whose answer never arrived whole; a server may charge for them, no one knows
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    all_prompt_tokens: int = 0
    all_completion_tokens: int = 0
    all_cost: float = 0.0
    estimated: int = 0  # answers, of all runs, whose tokens are estimated by characters


class Teacher:
    """Asks a chat endpoint from any number of threads; a context manager.

    `cache` is an SQLite file: an answer is committed to it before it is used, and a question answered there is never
    sent again, so a run that was killed goes on where it ended. Raises ValueError if there is no key, no `httpx`, or a
    file in the cache's place that is none.
    """

    def __init__(self, settings: TeacherSettings, cache: str | Path) -> None:
        settings.check()
        self.settings, self.cache = settings, Path(cache)
        self._key = settings.read_key()
        try:
            import httpx
        except ImportError:
            raise ValueError('a teacher needs the package httpx: pip install -e ".[corpus]"') from None
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency)
        self._url = settings.url.rstrip("/") + "/chat/completions"
        self._http_error, self._not_sent = httpx.HTTPError, (httpx.ConnectError, httpx.ConnectTimeout)
        try:  # redirects are not followed: the key must not go to another host
            self._client = httpx.Client(
                headers=headers, timeout=settings.timeout, limits=limits, follow_redirects=False
            )
            self._client.build_request("POST", self._url)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ValueError(self._mask(f"url or proxy of the teacher cannot be used: {error}")) from None
        self._database = _open_cache(self.cache)
        self._changed = threading.Condition()  # guards all that follows, and the database
        self._usage, self._spent = Usage(), (0, 0, 0)
        self._pending: dict[str, Future[str]] = {}
        self._reserved = 0  # tokens, of the requests in flight
        self._resume = 0.0  # on the clock of time.monotonic: before it nothing is sent
        self._slots = threading.BoundedSemaphore(settings.concurrency)
        self._halt = threading.Event()
        self._reason, self._closed = "", False
        self._random = random.Random()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Send nothing more, let what is in flight arrive in the cache, and close it."""
        self._stop("the teacher is closed")
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)
            _, self._closed = self.usage, True  # the last numbers are kept
            self._client.close()
            self._database.close()

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

    def ask(self, messages: Sequence[Mapping[str, str]], *, attempt: int = 0) -> str:
        """The text of the answer to chat messages; another `attempt` is another answer to the same question.

        Raises TeacherFailure when the request was refused or all retries failed, and BudgetSpent. Of a server that has
        answered others, a refusal of what this one says (400, 413, 422) or answers without text are Unusable instead:
        they cost their row, not the run.
        """
        s = self.settings
        payload: dict[str, Any] = {
            "model": s.model, "messages": [dict(message) for message in messages], "temperature": s.temperature,
            "max_tokens": s.max_tokens, "stream": False,
        }  # fmt: skip
        if s.json_mode:
            payload["response_format"] = {"type": "json_object"}
        named = json.dumps({"url": self._url, "attempt": attempt, **payload}, sort_keys=True, separators=(",", ":"))
        key = hashlib.sha256(named.encode()).hexdigest()
        with self._changed:
            if self._halt.is_set():
                raise TeacherFailure(self._reason)
            found = self._sql("SELECT text FROM answers WHERE key = ?", key)
            pending = self._pending.get(key)
            if found or pending:
                self._usage.cached += 1
            else:
                ours = self._pending[key] = Future()
        if found:
            return found[0]
        if pending:
            return pending.result()
        try:
            text = self._fetch(key, payload)
            ours.set_result(text)
            return text
        except BaseException as error:
            self._count(failures=int(isinstance(error, TeacherFailure)))
            ours.set_exception(error)
            raise
        finally:
            with self._changed:
                del self._pending[key]
                self._changed.notify_all()

    @property
    def usage(self) -> Usage:
        """The numbers at this moment; of a closed teacher, the last."""
        with self._changed:
            if not self._closed:
                self._spent = self._sql("SELECT prompt, completion, estimated FROM spent")
            now, (prompt, completion, estimated) = dataclasses.replace(self._usage), self._spent
        now.all_prompt_tokens, now.all_completion_tokens, now.estimated = prompt, completion, estimated
        now.cost, now.all_cost = self._cost(now.prompt_tokens, now.completion_tokens), self._cost(prompt, completion)
        return now

    def describe(self) -> str:
        """The usage, in one paragraph."""
        u, s = self.usage, self.settings
        priced = s.price_per_million_input or s.price_per_million_output
        cost, all_cost = (f", {cost:.4f} {s.currency}" if priced else "" for cost in (u.cost, u.all_cost))
        text = (
            f"teacher {s.model} at {s.url}: {u.requests} requests sent, {u.answered} answered, {u.cached} answers from "
            f"{self.cache.name}, {u.retries} retries, {u.failures} failures; {u.prompt_tokens:,} prompt and "
            f"{u.completion_tokens:,} completion tokens{cost} (all runs with this cache: {u.all_prompt_tokens:,} and "
            f"{u.all_completion_tokens:,} tokens{all_cost})"
        )
        if s.token_budget:
            text += f"; budget {s.token_budget:,} tokens"
        if u.estimated:
            text += f"; the server gave no token counts for {u.estimated} answers: estimated by characters"
        if u.unanswered:
            text += f"; {u.unanswered} requests were cut or timed out, the server may charge for them too"
        return text + "."

    def _fetch(self, key: str, payload: dict[str, Any]) -> str:
        """Send until there is an answer; returns its text, committed."""
        s, body = self.settings, json.dumps(payload).encode()
        prompt = sum(len(str(message.get("content", ""))) for message in payload["messages"])
        unusable = 0
        for retry in range(s.max_retries + 1):
            with self._slots:
                self._reserve(prompt + s.max_tokens)
                try:
                    while (pause := self._resume - time.monotonic()) > 0:
                        self._wait(pause + self._random.uniform(0, s.retry_wait))
                    self._wait(0)
                    # A server that knows the header repeats what it has answered: after an unusable answer, ask anew.
                    answer = self._post(f"{key}-{unusable}" if unusable else key, body, is_retry=retry > 0)
                    unusable += 1
                    return self._keep(key, answer, prompt)
                except _Again as error:
                    problem, again = str(error), error
                finally:
                    with self._changed:
                        self._reserved -= prompt + s.max_tokens
                        self._changed.notify_all()
            backoff = self._random.uniform(0, min(s.max_wait, s.retry_wait * 2.0 ** min(retry, 30)))
            wait = max(again.wait, backoff)
            if again.everyone:
                with self._changed:
                    self._resume = max(self._resume, time.monotonic() + wait)
            if retry < s.max_retries:
                self._wait(wait)
        if again.answered and self._has_answered():
            raise Unusable(problem)
        raise TeacherFailure(f"no answer from {s.url} in {s.max_retries + 1} requests; the last: {problem}")

    def _post(self, key: str, body: bytes, is_retry: bool) -> dict[str, Any]:
        """One request; the JSON object of a good answer, else _Again or TeacherFailure."""
        s, data, deadline = self.settings, bytearray(), time.monotonic() + self.settings.timeout
        self._count(requests=1, retries=int(is_retry))
        try:
            with self._client.stream("POST", self._url, content=body, headers={"Idempotency-Key": key}) as response:
                for part in response.iter_bytes():
                    data += part
                    if time.monotonic() > deadline or len(data) > _MAX_BODY:
                        self._count(unanswered=1)
                        raise _Again(f"no whole answer within {s.timeout:g} seconds and {_MAX_BODY} bytes")
        except self._http_error as error:
            if not isinstance(error, self._not_sent):
                self._count(unanswered=1)
            raise _Again(self._mask(f"{type(error).__name__}: {error}")) from None
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        status = response.status_code
        if 200 <= status < 300 and isinstance(found, dict):
            return found
        shown = f"HTTP {status}: {self._message(found, data)}"
        if 200 <= status < 300:
            raise _Again(f"the answer is no JSON object: {shown}")
        if status in (401, 403):
            self._stop(f"{s.url} refuses the key in {s.key_variable or 'key_variable'}: {shown}")
            raise TeacherFailure(self._reason)
        if status not in _RETRIED and status < 500:
            hint = "; redirects are not followed, set url to the final address" if status < 400 else ""
            asked = " ".join(str(json.loads(body)["messages"][-1].get("content")).split())
            if status in (400, 413, 422) and self._has_answered():
                raise Unusable(f"{shown}, for {self._mask(asked)[:80]!r}")
            raise TeacherFailure(f"{s.url} refuses the request {self._mask(asked)[:80]!r}: {shown}{hint}")
        wait = _retry_after(response.headers.get("Retry-After"))
        if wait is not None and wait > s.max_wait:
            raise TeacherFailure(
                f"{s.url} asks to wait {wait:.0f} seconds, longer than max_wait = {s.max_wait:g}; run again later, "
                f"what was answered is kept in {self.cache} ({shown})"
            )
        raise _Again(shown, wait or 0.0, everyone=status == 429 or wait is not None)

    def _keep(self, key: str, answer: dict[str, Any], prompt_characters: int) -> str:
        """Commit an answer's text and tokens, and return the text; _Again if there is none."""
        try:
            text = answer["choices"][0]["message"]["content"]
            text.encode()  # raises for half a surrogate pair, which no file can hold
        except (KeyError, IndexError, TypeError, AttributeError, UnicodeEncodeError):
            text = ""
        text = self._mask(text).strip() if isinstance(text, str) else ""
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        prompt: Any = usage.get("prompt_tokens")
        completion: Any = usage.get("completion_tokens")
        known = all(type(count) is int and bool(text) <= count < 1 << 40 for count in (prompt, completion))
        if not known:
            prompt, completion = (prompt_characters, len(text)) if text else (0, 0)
        with self._changed:
            with self._database:  # takes back what an interruption leaves half done
                self._sql("BEGIN IMMEDIATE")
                if text:
                    self._sql("INSERT OR IGNORE INTO answers VALUES (?, ?)", key, text)
                spend = "UPDATE spent SET prompt = prompt + ?, completion = completion + ?, estimated = estimated + ?"
                self._sql(spend, prompt, completion, int(bool(text) and not known))
                self._sql("COMMIT")
            self._count(prompt_tokens=prompt, completion_tokens=completion, answered=int(bool(text)))
            if text:
                # Another process may have been first.
                return self._sql("SELECT text FROM answers WHERE key = ?", key)[0]
        raise _Again(f"the answer has no text: {self._message(answer, b'')}", answered=True)

    def _has_answered(self) -> bool:
        with self._changed:
            return self._sql("SELECT EXISTS (SELECT 1 FROM answers)")[0] == 1

    def _reserve(self, tokens: int) -> None:
        """Set tokens aside for a request; waits while those in flight may turn out to need fewer than they reserved."""
        budget = self.settings.token_budget
        with self._changed:
            while budget:
                used = self._sql("SELECT prompt + completion FROM spent")[0]
                if used + self._reserved + tokens <= budget:
                    break
                if not self._reserved:
                    raise BudgetSpent(
                        f"token_budget = {budget:,} is spent: {used:,} tokens were used, and the next request may need "
                        f"{tokens:,}; raise token_budget and run again, what was answered is kept in {self.cache}"
                    )
                self._changed.wait()
            self._reserved += tokens

    def _wait(self, seconds: float) -> None:
        if self._halt.wait(seconds):
            raise TeacherFailure(self._reason)

    def _stop(self, reason: str) -> None:
        with self._changed:
            self._reason = self._reason or reason
            self._halt.set()

    def _count(self, **more: int) -> None:
        with self._changed:
            for name, number in more.items():
                setattr(self._usage, name, getattr(self._usage, name) + number)

    def _cost(self, prompt: int, completion: int) -> float:
        s = self.settings
        return (prompt * s.price_per_million_input + completion * s.price_per_million_output) / 1e6

    def _sql(self, statement: str, *values: object) -> Any:
        """The first row of a statement's result, or None."""
        try:
            return self._database.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._database.rollback()
            raise ValueError(f"{self.cache}: the cache cannot be used ({error})") from None

    def _mask(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _message(self, found: object, data: bytes | bytearray) -> str:
        """What a server says, on one short line and without the key."""
        said = found.get("error", found) if isinstance(found, dict) else found
        said = said.get("message", said) if isinstance(said, dict) else said
        with contextlib.suppress(RecursionError):
            said = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
        text = self._mask(said if found is not None and isinstance(said, str) else data.decode("utf-8", "replace"))
        text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
        return text if len(text) <= 300 else text[:300] + "…"


def in_order(
    items: Iterable[T],
    work: Callable[[T], R],
    *,
    workers: int,
    desc: str = "",
    teachers: Sequence[Teacher] = (),
) -> Iterator[R]:
    """`work` of each item, in the order of the items, done in `workers` threads; with 0, in this one.

    At most 4 `workers` items are taken ahead of the last result. An exception of an item stops new work; what is in
    flight is finished, the results before it are given, and it is raised. With `desc` a progress bar is shown on
    stderr, without threads after three seconds; with what the `teachers` have cost.
    """
    interactive = sys.stderr.isatty()
    bar = tqdm(
        desc=desc, disable=not desc, dynamic_ncols=interactive, mininterval=0.2 if interactive else 10,
        file=sys.stderr, delay=0 if workers else 3,
    )  # fmt: skip
    with bar:
        for result in _in_threads(items, work, workers, teachers) if workers else map(work, items):
            if desc and teachers:
                bar.set_postfix_str("; ".join(map(_cost_so_far, teachers)), refresh=False)
            bar.update()
            yield result


def _cost_so_far(teacher: Teacher) -> str:
    u = teacher.usage
    tokens = u.prompt_tokens + u.completion_tokens
    return f"{u.cost:.2f} {teacher.settings.currency}, {tokens:,} tokens, {u.retries} retries"


def _in_threads(items: Iterable[T], work: Callable[[T], R], workers: int, teachers: Sequence[Teacher]) -> Iterator[R]:
    stopped = threading.Event()
    failed: list[BaseException] = []

    def guarded(item: T) -> R:
        if stopped.is_set():  # items start in order, so this one comes after that which failed
            raise CancelledError
        try:
            return work(item)
        except BaseException as error:
            failed.append(error)
            stopped.set()
            raise

    flying: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                flying.append(pool.submit(guarded, item))
                if len(flying) == _AHEAD * workers:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        except CancelledError:  # an item that had not begun when a later one failed
            raise failed[0] from None
        except KeyboardInterrupt:
            for teacher in teachers:
                teacher._stop("interrupted")  # the pool waits for its threads, and they might wait to retry
            raise
        finally:
            stopped.set()


def _open_cache(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise ValueError(f"{path}: the teacher's cache cannot be opened ({error})") from None
    try:
        database.execute("BEGIN IMMEDIATE")
        found = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
            database.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID")
            database.execute("CREATE TABLE spent (prompt INTEGER, completion INTEGER, estimated INTEGER)")
            database.execute("INSERT INTO spent VALUES (0, 0, 0)")
            database.execute(f"PRAGMA application_id = {_APPLICATION}")
            database.execute(f"PRAGMA user_version = {_VERSION}")
        elif found != [_APPLICATION, _VERSION]:
            what = "of another version" if found[0] == _APPLICATION else "of another program"
            raise ValueError(f"it is an SQLite file {what}")
        database.execute("COMMIT")
        with contextlib.suppress(sqlite3.OperationalError):  # SQLite does not wait here; who is first sets it for all
            database.execute("PRAGMA journal_mode = WAL")
        # In WAL mode NORMAL loses nothing to a kill; FULL loses nothing to a power cut either, and a sync per answer
        # is nothing beside the seconds and the money that the answer took.
        database.execute("PRAGMA synchronous = FULL")
        return database
    except (sqlite3.Error, ValueError) as error:
        database.close()
        raise ValueError(f"{path}: cannot be used as a teacher's cache ({error}); give another path") from None


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a Retry-After header: seconds or an HTTP date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return None if math.isnan(seconds) else max(seconds, 0.0)


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
