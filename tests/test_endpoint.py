"""An endpoint's answers are neither lost nor doubled nor paid twice, whatever the server and the machine do."""

import asyncio
import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import logging
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import httpx
import pytest

from pedgpt.endpoint import (
    Endpoint,
    EndpointFailure,
    EndpointSettings,
    Unusable,
    in_order,
    load_endpoint,
)

HERE = Path(__file__).resolve()
spec = importlib.util.spec_from_file_location("chat_server", HERE.parent / "corpus" / "chat_server.py")
chat_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chat_server)
ChatServer, BODIES, STATUSES = chat_server.ChatServer, chat_server.BODIES, chat_server.STATUSES

KEY = "sk-TestKey/0123+456="
GOOD = {"url": "http://127.0.0.1:1/v1", "model": "m"}
QUESTIONS = [f"第{i}问：孩子咳嗽怎么护理？" for i in range(100)]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(HERE.parent))  # reading all certificates takes longer than most tests here
    monkeypatch.setenv("TEACHER_KEY", KEY)


def settings(server, **changed):
    values = {"key_variable": "TEACHER_KEY", "retry_wait": 0.002, "timeout": 5.0, "max_retries": 6} | changed
    return EndpointSettings(url=server.url, model="tiny", **values)


def user(text):
    return [{"role": "user", "content": text}]


def expected(question):
    return json.dumps({"answer": "答：" + question}, ensure_ascii=False)


def scripted(*faults):
    """The faults one after another, then good answers."""
    left = list(faults)
    return lambda request, nth: left.pop(0) if left else "good"


# Settings


def test_the_shipped_settings_load():
    endpoint = load_endpoint(HERE.parents[1] / "recipes/configs/teacher.toml")
    assert endpoint.url.startswith("https://") and endpoint.key_variable


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('url = "http://h/v1"\nmodle = "m"', ["line 2: modle", "'model'"]),
        ('url = "http://h/v1"', ["missing", "model"]),
        ('url = "http://h/v1"\nmodel = 3', ["model must be a string"]),
        ('url = "http://h/v1"\nmodel = "m"\nmax_tokens = 1.5', ["line 3: max_tokens must be an integer"]),
        ('url = "http://h/v1"\nmodel = "m"\nmax_tokens = true', ["max_tokens must be an integer"]),
        ('url = "http://h/v1"\nmodel = "m"\ntimeout = "1"', ["timeout must be a number"]),
        ('url = "http://h/v1"\nmodel = "m"\ntimeout = nan', ["line 3: timeout must be at least 0.001"]),
        ('url = "ftp://h/v1"\nmodel = "m"', ["url must be http"]),
        ('url = "http://h/v1/chat/completions"\nmodel = "m"', ["url must be http", "/chat/completions"]),
        ("url = ", ["not valid TOML"]),
        (None, ["cannot be read"]),
    ],
)
def test_wrong_settings_are_named(tmp_path, toml, words):
    path = tmp_path / "teacher.toml"
    if toml is not None:
        path.write_text(toml)
    with pytest.raises(ValueError) as error:
        load_endpoint(path)
    assert all(word in str(error.value) for word in [str(path), *words])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("max_tokens", 0), ("concurrency", 0), ("timeout", 0.0),
        ("timeout", math.inf), ("max_retries", -1), ("retry_wait", -0.1), ("max_wait", math.nan), ("token_budget", -1),
        ("price_per_million_input", -1.0), ("price_per_million_output", math.inf), ("model", " "), ("url", ""),
        ("url", "http://"), ("url", "http://h:99999999"), ("url", "http://h h/v1"), ("url", "http://[::1/v1"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(name, value):
    EndpointSettings(**GOOD).check()
    with pytest.raises(ValueError, match=name):
        EndpointSettings(**GOOD | {name: value}).check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("url", "https://me:hunter22@host/v1"), ("url", "https://hunter22@host/v1"), ("url", "https://h/?k=hunter22"),
        ("url", "https://h/#hunter22"), ("key_variable", "sk-hunter22"), ("key_variable", "hunter22"),
    ],
)  # fmt: skip
def test_no_secret_in_the_settings_is_repeated(name, value):
    with pytest.raises(ValueError, match=name) as error:
        EndpointSettings(**GOOD | {name: value}).check()
    assert "hunter22" not in str(error.value)


@pytest.mark.parametrize("key", [None, "", "with a space", "line\nbreak-of-a-key", "schlüssel-lang-genug"])
def test_without_a_usable_key_nothing_begins(tmp_path, monkeypatch, key):
    monkeypatch.delenv("TEACHER_KEY")
    if key is not None:
        monkeypatch.setenv("TEACHER_KEY", key)
    with ChatServer() as server:
        with pytest.raises(ValueError, match="TEACHER_KEY") as error:
            Endpoint(settings(server), tmp_path / "cache.sqlite")
        assert not server.log
    assert not list(tmp_path.iterdir())
    assert not key or key not in str(error.value)


def test_a_server_without_keys_is_sent_none(tmp_path):
    with ChatServer() as server, Endpoint(settings(server, key_variable=""), tmp_path / "c") as endpoint:
        assert endpoint.ask(user("问")) == expected("问")
        assert "Authorization" not in server.log[0].headers


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[corpus\]"'):
        Endpoint(EndpointSettings(**GOOD, key_variable=""), tmp_path / "c")


# Requests


def test_no_row_is_lost_doubled_or_moved_under_random_misbehaviour(tmp_path):
    with ChatServer(behave=chat_server.misbehaving(0.5), slow=2.0) as server:
        with Endpoint(settings(server, timeout=1.0), tmp_path / "c") as endpoint:
            rows = list(in_order(QUESTIONS, lambda q: (q, endpoint.ask(user(q))), workers=8))
            usage = endpoint.usage
        assert rows == [(question, expected(question)) for question in QUESTIONS]
        answered = collections.Counter(request.question for request in server.log if request.answered)
        assert answered == dict.fromkeys(QUESTIONS, 1)
        assert usage.requests == len(server.log) and usage.answered == len(QUESTIONS)
        assert usage.retries == len(server.log) - len(QUESTIONS) == len(server.log) - server.count("good") > 40
        assert {request.headers["Authorization"] for request in server.log} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("fault", [*BODIES, *STATUSES, "refused", "cut", "429 retry-after"])
def test_a_fault_that_may_pass_is_tried_again(tmp_path, fault):
    with ChatServer(behave=scripted(fault, fault)) as server, Endpoint(settings(server), tmp_path / "c") as endpoint:
        assert endpoint.ask(user("问")) == expected("问")
        assert [request.fault for request in server.log] == [fault, fault, "good"]
        assert len({request.key for request in server.log}) == 1


def test_the_connection_is_tried_again_until_retries_end(tmp_path):
    endpoint = Endpoint(EndpointSettings(**GOOD, key_variable="", retry_wait=0.001, max_retries=3), tmp_path / "c")
    with endpoint, pytest.raises(EndpointFailure, match="in 4 requests; the last: ConnectError"):
        endpoint.ask(user("问"))
    assert endpoint.usage.requests == 4


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_a_late_answer_is_cut_off(tmp_path, fault):
    with ChatServer(behave=scripted(fault), slow=3.0) as server:
        with Endpoint(settings(server, timeout=0.3, max_retries=0), tmp_path / "c") as endpoint:
            start = time.monotonic()
            with pytest.raises(EndpointFailure):
                endpoint.ask(user("问" * 20))  # as a drip it takes over 4 seconds, with 0.02 between bytes
            assert 0.29 < time.monotonic() - start < 1.5


@pytest.mark.parametrize("fault", [*chat_server.ENDLESS, "br"])
def test_no_server_keeps_a_request_beyond_its_deadline(tmp_path, fault):
    with ChatServer(behave=lambda request, nth: fault if "坏" in request.question else "good") as server:
        with Endpoint(settings(server, timeout=0.3, max_retries=1), tmp_path / "c") as endpoint:
            start = time.monotonic()
            with pytest.raises(EndpointFailure, match="no answer from .* in 2 requests"):
                endpoint.ask(user("坏"))
            assert time.monotonic() - start < 4  # on a busy machine; without a deadline most of these never end
            assert len(server.log) == 2
            assert endpoint.ask(user("好")) == expected("好")  # the connections of the others


@pytest.mark.parametrize("value", ["-5", "nan", "", "soon", "Fri, 31 Dec 9999 23:59:59 GMT", "１e９"])
def test_no_retry_after_header_confuses(tmp_path, value):
    with ChatServer(behave=scripted("503 later"), retry_after=value.encode().decode("latin-1")) as server:
        with Endpoint(settings(server), tmp_path / "c") as endpoint:
            assert endpoint.ask(user("问")) == expected("问") and len(server.log) == 2


@pytest.mark.parametrize("status", [400, 404, 422, 402, 413, 418])
def test_a_refused_request_fails_at_once_with_the_servers_words(tmp_path, status):
    with ChatServer(behave=scripted(str(status)), echo="the reason " + "x" * 2000) as server:
        with Endpoint(settings(server), tmp_path / "c") as endpoint:
            with pytest.raises(EndpointFailure, match=f"HTTP {status}: {status} for the reason xx") as error:
                endpoint.ask(user("问"))
            assert len(server.log) == 1 and len(str(error.value)) < 450
            assert endpoint.ask(user("另一问")) == expected("另一问")


@pytest.mark.parametrize(("fault", "requests"), [("400", 1), ("413", 1), ("422", 1), ("content null", 3)])
def test_a_server_that_answers_others_costs_a_refused_question_its_row_alone(tmp_path, fault, requests):
    with ChatServer(behave=lambda request, nth: fault if "坏" in request.question else "good") as server:
        with Endpoint(settings(server, max_retries=2), tmp_path / "c") as endpoint:
            assert endpoint.ask(user("好")) == expected("好")
            with pytest.raises(Unusable, match="400 for|413 for|422 for|no text"):
                endpoint.ask(user("坏"))
            assert len(server.log) == 1 + requests


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_and_is_told(tmp_path, status):
    with ChatServer(behave=lambda request, nth: str(status)) as server:
        with Endpoint(settings(server, max_retries=50, retry_wait=5.0), tmp_path / "c") as endpoint:
            with pytest.raises(EndpointFailure, match=f"refuses the key in TEACHER_KEY: HTTP {status}"):
                list(in_order(QUESTIONS, lambda q: endpoint.ask(user(q)), workers=4))
            assert len(server.log) <= 16  # those that were taken ahead


def test_the_key_is_not_sent_where_a_redirect_points(tmp_path):
    with ChatServer(behave=scripted("redirect")) as server, Endpoint(settings(server), tmp_path / "c") as endpoint:
        with pytest.raises(EndpointFailure, match="refuses the request: HTTP 307"):
            endpoint.ask(user("问"))
        assert len(server.log) == 1


def test_all_threads_wait_as_long_as_the_server_asks(tmp_path):
    with ChatServer(behave=scripted("429 retry-after"), retry_after="1", pause=0.02) as server:
        with Endpoint(settings(server, concurrency=4), tmp_path / "c") as endpoint:
            list(in_order(QUESTIONS[:40], lambda q: endpoint.ask(user(q)), workers=4))
        first = server.log[0].time
        later = [request.time - first for request in server.log[1:]]
        assert not [seconds for seconds in later if 0.3 < seconds < 1.0]
        assert len([seconds for seconds in later if seconds >= 1.0]) > 30 and max(later) < 4


def test_a_wait_longer_than_allowed_is_a_failure(tmp_path):
    with ChatServer(behave=scripted("429 retry-after"), retry_after="3600") as server:
        with Endpoint(settings(server), tmp_path / "c") as endpoint:
            with pytest.raises(EndpointFailure, match="wait 3600 seconds, longer than max_wait = 120.*are kept in"):
                endpoint.ask(user("问"))
            assert len(server.log) == 1


def test_no_more_requests_at_a_time_than_allowed(tmp_path):
    with ChatServer(pause=0.02) as server, Endpoint(settings(server, concurrency=3), tmp_path / "c") as endpoint:
        list(in_order(QUESTIONS[:30], lambda q: endpoint.ask(user(q)), workers=10))
        assert server.most_in_flight == 3


def test_a_connection_serves_many_requests(tmp_path):
    with ChatServer() as server, Endpoint(settings(server), tmp_path / "c") as endpoint:
        connections, accept = [], server.process_request
        server.process_request = lambda *arguments: (connections.append(1), accept(*arguments))
        for question in QUESTIONS[:10]:
            assert endpoint.ask(user(question)) == expected(question)
        assert len(server.log) == 10 and len(connections) == 1


def test_asking_works_where_an_event_loop_runs_as_in_a_notebook(tmp_path):
    async def cell(endpoint):
        return endpoint.ask(user("问"))

    with ChatServer() as server, Endpoint(settings(server), tmp_path / "c") as endpoint:
        assert asyncio.run(cell(endpoint)) == expected("问")


# Tokens


def test_the_budget_is_kept_and_the_next_run_goes_on(tmp_path):
    def tokens(question):
        return len(question) + len(expected(question))

    costs = [tokens(question) for question in QUESTIONS[:10]]
    reserve = len(QUESTIONS[0]) + 60
    budget = sum(costs[:3]) + reserve  # after three answers a fourth request may be sent, after four no more
    with ChatServer() as server:
        with Endpoint(settings(server, token_budget=budget, max_tokens=60), tmp_path / "c") as endpoint:
            with pytest.raises(EndpointFailure, match=f"{sum(costs[:4])} tokens were used.*may need {reserve}; raise"):
                for question in QUESTIONS:
                    endpoint.ask(user(question))
        assert 1 <= len(server.log) <= 4  # whoever is late already waits for the first
        wide = settings(server, token_budget=10 * budget, max_tokens=60, price_per_million_input=2e6,
                        price_per_million_output=1e6)  # fmt: skip
        with Endpoint(wide, tmp_path / "c") as endpoint:
            for question in QUESTIONS[:10]:
                endpoint.ask(user(question))
            usage = endpoint.usage
        assert len(server.log) == 10 and (usage.answered, usage.cached) == (6, 4)
        assert usage.prompt_tokens + usage.completion_tokens == sum(costs)
        assert usage.prompt_tokens == sum(map(len, QUESTIONS[:10]))
        assert usage.cost == usage.prompt_tokens * 2 + usage.completion_tokens


def test_threads_exceed_the_budget_by_what_is_in_flight_at_most(tmp_path):
    budget, largest = 1500, max(len(question) + len(expected(question)) for question in QUESTIONS)
    with ChatServer(pause=0.005) as server:
        with Endpoint(settings(server, token_budget=budget, max_tokens=60), tmp_path / "c") as endpoint:
            with pytest.raises(EndpointFailure):
                list(in_order(QUESTIONS, lambda q: endpoint.ask(user(q)), workers=8))
            usage = endpoint.usage
        spent = sum(len(request.question) + len(expected(request.question)) for request in server.log)
        assert usage.prompt_tokens + usage.completion_tokens == spent
        assert budget - 60 - largest < spent <= budget + 7 * largest


def test_unusable_answers_are_paid_for_too(tmp_path):
    usage = {"prompt_tokens": 5, "completion_tokens": 7}
    with ChatServer(answer=lambda payload: "" if len(server.log) < 3 else "好", usage=usage) as server:
        with Endpoint(settings(server), tmp_path / "c") as endpoint:
            assert endpoint.ask(user("问")) == "好"
            assert (endpoint.usage.prompt_tokens, endpoint.usage.completion_tokens) == (15, 21)


@pytest.mark.parametrize(
    "usage",
    [
        None, 3, [], {}, {"prompt_tokens": 5}, {"prompt_tokens": "5", "completion_tokens": 1},
        {"prompt_tokens": -5, "completion_tokens": 1}, {"prompt_tokens": 5.0, "completion_tokens": 1},
        {"prompt_tokens": True, "completion_tokens": 1}, {"prompt_tokens": 10**30, "completion_tokens": 1},
        {"prompt_tokens": 0, "completion_tokens": 0},
    ],
)  # fmt: skip
def test_tokens_that_a_server_does_not_count_are_estimated(tmp_path, usage):
    with ChatServer(usage=usage, answer=lambda payload: "四个字。") as server:
        with Endpoint(settings(server), tmp_path / "c") as endpoint:
            endpoint.ask([{"role": "system", "content": "一二三"}, *user("一二")])
            assert (endpoint.usage.prompt_tokens, endpoint.usage.completion_tokens) == (5, 4)


# Cache


def test_a_second_run_sends_nothing_and_anything_else_is_another_question(tmp_path):
    with ChatServer() as server:
        for requests in (20, 0):
            with Endpoint(settings(server), tmp_path / "c") as endpoint:
                assert [endpoint.ask(user(q)) for q in QUESTIONS[:20]] == [expected(q) for q in QUESTIONS[:20]]
            assert endpoint.usage.requests == requests and endpoint.usage.cached == 20 - requests
            assert "20 answers from c" in endpoint.describe() or requests
        others = [{}, {"temperature": 0.1}, {"max_tokens": 7}, {"json_mode": True}]
        for i, changed in enumerate(others):
            with Endpoint(settings(server, **changed), tmp_path / "c") as endpoint:
                endpoint.ask(user(QUESTIONS[0]))
                assert endpoint.usage.requests == (i > 0)
        with Endpoint(settings(server), tmp_path / "c") as endpoint:
            endpoint.ask(user(QUESTIONS[0]), attempt=1)
            endpoint.ask([{"role": "system", "content": ""}, *user(QUESTIONS[0])])
            assert endpoint.usage.requests == 2
        with Endpoint(dataclasses.replace(settings(server), model="other"), tmp_path / "c") as endpoint:
            endpoint.ask(user(QUESTIONS[0]))
            assert endpoint.usage.requests == 1
        assert len({request.key for request in server.log}) == len(server.log)


def test_answers_that_an_earlier_version_kept_are_read(tmp_path):
    settings = EndpointSettings(**GOOD, key_variable="")
    Endpoint(settings, tmp_path / "c").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "c")) as database, database:
        # What this question was kept under when pedgpt.corpus.teacher was the client.
        key = "ba668a1351e50b1ef0e18474a6f5f90cde253c7b2a1939472e607e2157e65048"
        database.execute("INSERT INTO answers VALUES (?, ?)", (key, "旧"))
    with Endpoint(settings, tmp_path / "c") as endpoint:
        assert endpoint.ask(user("问")) == "旧"


@pytest.mark.parametrize("kind", ["text", "program", "folder", "cut"])
def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path, kind):
    path = tmp_path / "c"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no database, but long enough to be looked at " * 100)
    elif kind == "program":
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE answers (question TEXT)")
    else:
        with ChatServer() as server:
            Endpoint(settings(server), path).close()
        path.write_bytes(path.read_bytes()[:3000])
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ValueError, match=str(path)):
        Endpoint(EndpointSettings(**GOOD, key_variable=""), path)
    assert not path.is_file() or path.read_bytes() == before


# A builder's run in a process of its own: url, cache, first question, last question, workers.
CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[6])
import logging
logging.basicConfig(level=logging.DEBUG)
from pedgpt.endpoint import Endpoint, EndpointSettings, in_order
url, cache, first, last, workers = sys.argv[1:6]
settings = EndpointSettings(url, "tiny", key_variable="TEACHER_KEY", retry_wait=0.01, concurrency=int(workers))
with Endpoint(settings, cache) as endpoint:
    ask = lambda i: endpoint.ask([{"role": "user", "content": f"第{i}问"}])
    for answer in in_order(range(int(first), int(last)), ask, workers=int(workers), desc="rows", endpoints=[endpoint]):
        print(answer, flush=True)
print(endpoint.describe(), file=sys.stderr)
"""


def child(server, cache, first, last, workers):
    arguments = [server.url, cache, first, last, workers, HERE.parents[1]]
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def test_a_killed_run_asks_nothing_again_that_was_answered(tmp_path):
    workers, count = 4, 120
    with ChatServer(pause=0.02) as server:
        for kill_after in (20, 60):
            process = child(server, tmp_path / "c", 0, count, workers)
            while sum(request.answered for request in server.log) < kill_after and process.poll() is None:
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            time.sleep(0.1)  # the server ends what it has in hand
        committed = dict(sqlite3.connect(tmp_path / "c").execute("SELECT key, text FROM answers"))
        before = len(server.log)
        assert 40 <= len(committed) < count
        out, err = child(server, tmp_path / "c", 0, count, workers).communicate()
        assert out.splitlines() == [expected(f"第{i}问") for i in range(count)], err
        assert not committed.keys() & {request.key for request in server.log[before:]}
        times = collections.Counter(request.key for request in server.log)
        assert len(times) == count and times.total() <= count + 2 * workers
        assert all(times[key] <= 3 for key in times) and f"{len(committed)} answers from c" in err


def test_two_processes_share_a_cache_and_log_no_key(tmp_path):
    with ChatServer(pause=0.002, behave=scripted("500", "429", "cut"), echo=KEY) as server:
        processes = [child(server, tmp_path / "c", first, first + 60, 4) for first in (0, 30)]
        results = [process.communicate() for process in processes]
        for first, (out, err) in zip((0, 30), results, strict=True):
            assert out.splitlines() == [expected(f"第{i}问") for i in range(first, first + 60)], err
            assert "DEBUG" in err and KEY not in err
            assert "rows" in err and "USD" in err and "retries" in err  # the bar
        database = sqlite3.connect(tmp_path / "c")
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT count(*) FROM answers").fetchone() == (90,)
        spent = database.execute("SELECT prompt, completion FROM spent").fetchone()
        questions = [request.question for request in server.log if request.answered]
        assert spent == (sum(map(len, questions)), sum(len(expected(question)) for question in questions))


def test_two_teachers_who_ask_the_same_at_once_give_the_same(tmp_path):
    with ChatServer(pause=0.2, answer=lambda payload: f"第{next(numbers)}个") as server:
        numbers = itertools.count()
        with Endpoint(settings(server), tmp_path / "c") as one, Endpoint(settings(server), tmp_path / "c") as other:
            first, second = in_order([one, other], lambda endpoint: endpoint.ask(user("问")), workers=2)
            assert first == second and len(server.log) == 2
        assert max(one.usage.completion_tokens, other.usage.completion_tokens) == 6


# Secrets


def test_the_key_is_shown_and_kept_nowhere(tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    shown = []
    faults = ["400", "401", "404", "500", "429", "429 retry-after", "redirect", "cut", "refused", "content null"]
    for fault in faults:
        with ChatServer(behave=lambda request, nth, fault=fault: fault, echo=f"x{KEY}x", retry_after="999") as server:
            endpoint = Endpoint(settings(server, max_retries=1), tmp_path / "c")
            with endpoint, pytest.raises(EndpointFailure) as error:
                list(in_order(["问"], lambda q, endpoint=endpoint: endpoint.ask(user(q)), workers=1, desc="b"))
            shown += traceback.format_exception(error.value) + [repr(error.value), repr(endpoint), endpoint.describe()]
            cause = error.value
            while cause := cause.__cause__ or cause.__context__:
                shown += [repr(cause), str(cause), repr(getattr(cause, "args", ""))]
    assert "400 for x***x" in "".join(shown)
    with ChatServer(answer=lambda payload: f"钥匙是{KEY}。") as server:
        with Endpoint(settings(server), tmp_path / "c") as endpoint:
            assert endpoint.ask(user("问")) == "钥匙是***。"
            live = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert "钥匙是***".encode() in live
    out = capfd.readouterr()
    kept = live + b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for text in (*shown, out.out, out.err, caplog.text, kept.decode("utf-8", "replace")):
        assert KEY not in text and KEY[3:] not in text
    assert "POST" in caplog.text  # the libraries did log


def test_a_word_that_a_server_without_keys_wants_is_not_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "EMPTY")
    with ChatServer(answer=lambda payload: "EMPTY 4mg/kg") as server:
        with Endpoint(settings(server), tmp_path / "c") as endpoint:
            assert endpoint.ask(user("问")) == "EMPTY 4mg/kg"
            assert server.log[0].headers["Authorization"] == "Bearer EMPTY"


def test_the_key_is_masked_in_what_is_cut(tmp_path):
    for spaces in (280, 9_990):  # near the end of what is shown of an error, and beyond it
        with ChatServer(behave=scripted("400"), echo=" " * spaces + KEY) as server:
            with Endpoint(settings(server), tmp_path / "c") as endpoint:
                with pytest.raises(EndpointFailure, match=r"400 for \*\*"):
                    endpoint.ask(user("问"))


def test_a_servers_words_hold_nothing_that_a_terminal_obeys(tmp_path):
    with ChatServer(behave=scripted("400"), echo="\x1b]0;title\x07\x1b[2J\u202e\u2028 plain") as server:
        with Endpoint(settings(server), tmp_path / "c") as endpoint, pytest.raises(EndpointFailure) as error:
            endpoint.ask(user("\x1b[31m问"))
    assert all(char.isprintable() for char in str(error.value)) and "plain" in str(error.value)


# Order


@pytest.mark.parametrize("workers", [0, 1, 7])
def test_results_come_in_the_order_of_the_items(workers):
    rng = random.Random(0)
    waits = [rng.random() * 0.01 for _ in range(40)]

    def work(i):
        time.sleep(waits[i])
        return i, threading.get_ident()

    results = list(in_order(range(40), work, workers=workers))
    assert [i for i, _ in results] == list(range(40))
    threads = {thread for _, thread in results}
    assert threads == {threading.get_ident()} if workers == 0 else threading.get_ident() not in threads
    assert len(threads) <= max(workers, 1)


@pytest.mark.parametrize("workers", [0, 3])
def test_items_are_taken_only_a_little_ahead(workers):
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    given = in_order(items(), lambda i: i, workers=workers)
    assert not taken
    for i in range(50):
        assert next(given) == i
        assert len(taken) <= i + max(4 * workers, 1)
    given.close()
    assert len(taken) <= 50 + 4 * workers


def test_one_slow_item_stops_neither_order_nor_bound():
    release, started = threading.Event(), []

    def work(i):
        started.append(i)
        assert i or release.wait(5)
        return i

    given = in_order(range(100), work, workers=3)
    threading.Timer(0.2, release.set).start()
    assert next(given) == 0
    assert len(started) <= 13
    assert list(given) == list(range(1, 100))


@pytest.mark.parametrize("workers", [0, 3])
def test_an_items_exception_comes_in_its_turn_and_ends_new_work(workers):
    done, started = [], []

    def work(i):
        started.append(i)
        if i == 10:
            raise EndpointFailure("ten")
        time.sleep(0.02)
        done.append(i)
        return i

    results = []
    with pytest.raises(EndpointFailure, match="ten"):
        for result in in_order(range(1000), work, workers=workers):
            results.append(result)
    assert results == list(range(10))
    assert len(started) <= 11 + 4 * workers and sorted(done) == sorted(set(started) - {10})


def test_an_interrupted_run_does_not_wait_to_retry(tmp_path):
    def interrupt():
        while not server.log:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    with ChatServer(behave=lambda request, nth: "503 later", retry_after="30") as server:
        start = time.monotonic()
        with Endpoint(settings(server), tmp_path / "c") as endpoint, pytest.raises(KeyboardInterrupt):
            threading.Thread(target=interrupt).start()
            list(in_order(QUESTIONS, lambda q: endpoint.ask(user(q)), workers=4, endpoints=[endpoint]))
        assert 1 <= len(server.log) <= 4  # whoever is late already waits for the first
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("where", ["alone", "in a thread", "while using a result"])
def test_ctrl_c_ends_within_two_seconds_though_requests_hang(tmp_path, where):
    sent = []

    def interrupt(count):
        while len(server.log) < count:
            time.sleep(0.01)
        time.sleep(0.05)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    before = threading.active_count()
    with ChatServer(behave=lambda request, nth: "good" if request.question == "0" else "hang") as server:
        with pytest.raises(KeyboardInterrupt), Endpoint(settings(server, timeout=60.0), tmp_path / "c") as endpoint:
            threading.Thread(target=interrupt, args=[1 if where == "alone" else 4]).start()
            if where == "alone":
                endpoint.ask(user("问"))
            for _ in in_order(map(str, range(50)), lambda q: endpoint.ask(user(q)), workers=4):
                if where == "while using a result":
                    time.sleep(30)
        assert time.monotonic() - sent[0] < 2
        usage = endpoint.usage
        assert usage.requests == len(server.log) <= 5
    time.sleep(0.1)
    assert threading.active_count() <= before  # no thread waits for the server any more


def test_closing_waits_for_no_server(tmp_path):
    got = []
    with ChatServer(behave=lambda request, nth: "hang") as server:
        endpoint = Endpoint(settings(server, timeout=60.0), tmp_path / "c")

        def ask():
            with pytest.raises(EndpointFailure, match="closed"):
                endpoint.ask(user("问"))
            got.append(time.monotonic())

        thread = threading.Thread(target=ask)
        thread.start()
        while not server.log:
            time.sleep(0.005)
        start = time.monotonic()
        endpoint.close()
        thread.join()
    assert got[0] - start < 2
    with pytest.raises(EndpointFailure, match="closed"):
        endpoint.ask(user("问"))


def test_the_oracle_reads_what_the_server_sends(tmp_path):
    with ChatServer() as server:
        headers = {"Idempotency-Key": "k"}
        body = httpx.post(f"{server.url}/chat/completions", json={"messages": user("问")}, headers=headers)
    assert body.json()["choices"][0]["message"]["content"] == expected("问")
