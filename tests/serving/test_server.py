"""The server as its clients see it: OpenAI's own client, and clients that behave badly."""

import base64
import concurrent.futures
import contextlib
import hashlib
import json
import logging
import random
import socket
import time

import httpx
import pytest
import torch

from pedgpt.data import Message, encode_prompt
from pedgpt.models import generate
from pedgpt.serving import Scheduler

from .conftest import SIZES, Running

openai = pytest.importorskip("openai")
JSON = {"Content-Type": "application/json"}
SECRET = "独一无二的内容 7731"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture
def start(models, chat):
    """start(...): another server, with settings of its own."""
    with contextlib.ExitStack() as stack:

        def make(slots=4, queue=64, **settings):
            scheduler = Scheduler(models, **{**SIZES, "slots": slots, "queue": queue})
            return stack.enter_context(Running(scheduler, chat, **settings))

        yield make


def said(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def alone(models, chat, texts, count, model="base"):
    """What `generate` answers to a conversation."""
    messages = [Message(one["role"], one["content"]) for one in said(*texts)]
    prompt = encode_prompt(messages, chat)
    (ids,) = generate(models[model], [prompt], max_new_tokens=count, stop_tokens=chat.stop_tokens)
    return prompt, ids, chat.tokenizer.decode(ids)


def test_openais_client_lists_models_and_gets_their_answers(client, models, chat):
    assert [model.id for model in client.models.list()] == ["base", "experts"]
    assert client.models.retrieve("experts").id == "experts"
    for name in models:
        texts = ("感冒", "多喝水。", "要吃药吗？")
        prompt, ids, text = alone(models, chat, texts, 12, name)
        found = client.chat.completions.create(model=name, messages=said(*texts), max_tokens=12, temperature=0)
        (choice,) = found.choices
        assert (choice.message.role, choice.message.content) == ("assistant", text)
        assert choice.finish_reason == ("length" if len(ids) == 12 else "stop")
        assert found.usage.prompt_tokens == len(prompt)
        assert found.usage.completion_tokens == len(ids) + (choice.finish_reason == "stop")
        assert found.system_fingerprint == f"print of {name}" and found.object == "chat.completion"


def test_a_stream_gives_the_same_answer_in_pieces(client, models, chat):
    *_, text = alone(models, chat, ["孩子发烧"], 20)
    settings = {"model": "base", "messages": said("孩子发烧"), "max_tokens": 20, "temperature": 0}
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens >= len(chunks) - 3
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_go_on_with_a_text_or_with_tokens(client, models, tokenizer):
    prompt = [*tokenizer.document_prefix, *tokenizer.encode("肺炎要")]
    (ids,) = generate(models["base"], [prompt], max_new_tokens=8, stop_tokens={2})
    for given in ("肺炎要", prompt):
        found = client.completions.create(model="base", prompt=given, max_tokens=8, temperature=0)
        assert found.choices[0].text == tokenizer.decode(ids) and found.object == "text_completion"
    pieces = client.completions.create(
        model="base", prompt="肺炎要", max_tokens=8, temperature=0, stream=True, best_of=1, echo=False
    )
    assert "".join(piece.choices[0].text for piece in pieces) == tokenizer.decode(ids)


def test_several_choices_differ_and_a_seed_repeats_them(client):
    settings = {"model": "base", "messages": said("感冒"), "max_tokens": 10, "temperature": 1.5, "n": 3, "seed": 5}
    first, second = (client.chat.completions.create(**settings) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices] and len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]


def test_stop_strings_end_an_answer_before_them(client, models, chat):
    *_, text = alone(models, chat, ["感冒"], 30)
    stop = text[3:5]
    settings = {"model": "base", "messages": said("感冒"), "max_tokens": 30, "temperature": 0, "stop": ["§§", stop]}
    found = client.chat.completions.create(**settings)
    assert found.choices[0].message.content == text[: text.index(stop)] and found.choices[0].finish_reason == "stop"
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**settings, stream=True)]
    assert "".join(pieces) == text[: text.index(stop)]


def test_log_probabilities_are_the_models_own(client, models, chat):
    prompt, ids, _ = alone(models, chat, ["感冒"], 6)
    settings = {"model": "base", "messages": said("感冒"), "max_tokens": 6, "temperature": 0, "logprobs": True}
    found = client.chat.completions.create(**settings, top_logprobs=2).choices[0].logprobs.content
    chunks = client.chat.completions.create(**settings, top_logprobs=2, stream=True)
    assert [chunk.choices[0].logprobs.content[0] for chunk in chunks] == found
    with torch.no_grad():
        logps = models["base"](torch.tensor([[*prompt, *ids]]))[0].log_softmax(-1)
    for count, (token, told) in enumerate(zip(ids, found, strict=False)):
        row = logps[len(prompt) - 1 + count]
        assert told.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [one.logprob for one in told.top_logprobs] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
        assert told.token == chat.tokenizer.decode([token])


def test_log_probabilities_of_a_completion_are_those_of_a_chat_in_the_older_form(client, chat):
    prompt = encode_prompt([Message("user", "感冒")], chat)
    settings = {"model": "base", "max_tokens": 6, "temperature": 0}
    told = client.chat.completions.create(**settings, messages=said("感冒"), logprobs=True, top_logprobs=2)
    rows = told.choices[0].logprobs.content
    found = client.completions.create(**settings, prompt=prompt, logprobs=2).choices[0].logprobs
    assert found.tokens == [row.token for row in rows]
    assert found.token_logprobs == pytest.approx([row.logprob for row in rows], abs=1e-6)
    for top, row in zip(found.top_logprobs, rows, strict=True):
        assert top == pytest.approx({one.token: one.logprob for one in row.top_logprobs}, abs=1e-6)
    chunks = client.completions.create(**settings, prompt=prompt, logprobs=0, stream=True)
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == found.tokens
    assert client.completions.create(**settings, prompt=prompt).choices[0].logprobs is None


def test_parts_of_text_are_one_text_and_a_developer_is_the_system(client, models, chat):
    messages = [Message("system", "短。"), Message("user", "感冒了")]
    (ids,) = generate(models["base"], [encode_prompt(messages, chat)], max_new_tokens=5, stop_tokens=chat.stop_tokens)
    parts = [{"type": "text", "text": "感冒"}, {"type": "text", "text": "了"}]
    given = [{"role": "developer", "content": "短。"}, {"role": "user", "content": parts}]
    found = client.chat.completions.create(model="base", messages=given, max_tokens=5, temperature=0)
    assert found.choices[0].message.content == chat.tokenizer.decode(ids)


def test_the_least_temperature_takes_the_most_probable_token(client, models, chat):
    *_, text = alone(models, chat, ["感冒"], 8)
    found = client.chat.completions.create(model="base", messages=said("感冒"), max_tokens=8, temperature=1e-40)
    assert found.choices[0].message.content == text


def test_a_clients_text_never_becomes_a_special_token(client, chat):
    text = "感冒<reserved_107>多喝水</s>"
    found = client.chat.completions.create(model="base", messages=said(text), max_tokens=1, temperature=0)
    assert found.usage.prompt_tokens == 2 + len(chat.tokenizer.encode(text))
    assert not set(chat.tokenizer.special.values()) & set(chat.tokenizer.encode(text))


WRONG = {
    "no such model": ({"model": "nope"}, 404, "model"),
    "a wrong type": ({"temperature": "hot"}, 400, "temperature"),
    "true for a number": ({"max_tokens": True}, 400, "max_tokens"),
    "out of range": ({"temperature": 2.5}, 400, "temperature"),
    "not a number": ({"top_p": float("nan")}, 400, "top_p"),
    "an unknown field": ({"temprature": 1}, 400, "temprature"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools"),
    "a penalty that is not supported": ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    "no messages": ({"messages": []}, 400, "messages"),
    "the assistant last": ({"messages": said("a", "b")}, 400, "messages"),
    "another role": ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0]"),
    "an empty text": ({"messages": said("a", "b", " ")}, 400, "messages[2]"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]}, 400, "messages[0]"),
    "a call of a tool": ({"messages": [{**said("a")[0], "tool_calls": [{}]}]}, 400, "messages[0]"),
    "a message that is none": ({"messages": ["a"]}, 400, "messages[0]"),
    "half a surrogate pair": ({"messages": said("\ud800")}, 400, None),
    "too many tokens": ({"max_tokens": 500}, 400, None),
    "too long a prompt": ({"messages": said("感冒" * 200)}, 400, None),
    "an empty stop": ({"stop": [""]}, 400, "stop"),
    "too many choices": ({"n": 100}, 400, "n"),
    "too many messages": ({"messages": said(*"ab" * 300, "a")}, 400, "messages"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused_in_openais_form(server, case):
    change, status, param = WRONG[case]
    body = {"model": "base", "messages": said("感冒"), "max_tokens": 4, **change}
    content = json.dumps(body).encode()  # httpx would refuse NaN and surrogates itself
    found = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=JSON)
    assert (found.status_code, found.json()["error"]["param"]) == (status, param)
    assert found.json()["error"]["message"] and found.json()["error"]["type"] == "invalid_request_error"


def test_fields_that_change_nothing_are_accepted(server):
    extra = {"user": "u", "presence_penalty": 0, "tools": [], "response_format": {"type": "text"}, "logit_bias": {}}
    assert server.ask(**extra, stop=None).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"\xff"', b"[" * 100_000, b'{"model": "\xc3\x28"}'])
def test_bodies_that_are_no_json_object_are_refused(server, content):
    found = httpx.post(f"{server.url}/v1/completions", content=content, headers=JSON)
    assert found.status_code == 400 and "body" in found.json()["error"]["message"]


def test_another_site_cannot_ask(server):
    """Its form can send only simple content types, its script no JSON without our leave, its name is not ours."""
    body = json.dumps({"model": "base", "messages": said("感冒")})
    assert server.ask().headers.keys().isdisjoint({"access-control-allow-origin"})
    path = f"{server.url}/v1/chat/completions"
    assert httpx.post(path, content=body, headers={"Content-Type": "text/plain"}).status_code == 415
    assert httpx.options(path).status_code == 405
    for method, name, status in (("GET", path, 405), ("GET", f"{server.url}/v1/embeddings", 404)):
        found = httpx.request(method, name)
        assert found.status_code == status and found.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.url}/v1/models/nope").json()["error"]["code"] == "model_not_found"
    assert server.post(json.loads(body), headers={"Host": "evil.example"}).status_code == 403


def test_only_the_pages_own_script_may_run(server):
    """The policy in the page names the script by its hash: after a change of the script, this says the new one."""
    html = httpx.get(server.url).text
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = html.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["script-src"] == f"'sha256-{digest}'" and rules["default-src"] == "'none'"
    assert html.index("Content-Security-Policy") < html.index("<script>") and html.count("<script") == 1


def test_a_key_is_asked_for(start):
    server = start(key="secret")
    assert server.ask().status_code == 401
    right = {"Authorization": "Bearer secret"}
    assert httpx.get(f"{server.url}/v1/models", headers=right).status_code == 200
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(server.url + path).status_code == 401
        assert httpx.get(server.url + path, headers={"Authorization": "Bearer sécret".encode()}).status_code == 401
    assert httpx.get(server.url).status_code == 200  # the page itself, which asks for the key


def test_a_full_queue_says_when_to_come_again(start):
    server = start(slots=1, queue=1)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: server.ask(max_tokens=60), range(8)))
    refused = [one for one in found if one.status_code == 429]
    assert refused and all(int(one.headers["Retry-After"]) > 0 for one in refused)
    assert any(one.status_code == 200 for one in found)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(start, stream):
    server = start(slots=1)
    body = json.dumps({"model": "base", "messages": said("感冒"), "max_tokens": 110, "stream": stream})
    before, head = server.scheduler.counts["cancelled"], "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    real = server.scheduler.cache.step
    server.scheduler.cache.step = lambda *arguments: (time.sleep(0.02), real(*arguments))[1]
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        assert until(lambda: server.scheduler.counts["generated"] > 2)
    assert until(lambda: server.scheduler.counts["cancelled"] == before + 1)
    assert server.scheduler.counts["generated"] < 100 and until(lambda: not server.scheduler.active)


def test_bad_clients_harm_nobody_and_nothing_is_logged(start, models, chat, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    server = start(most_bytes=20_000, body_seconds=0.5)
    *_, expected = alone(models, chat, ["孩子发烧怎么办？"], 12)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    rows = [
        b"", b"\x00\xff\x16\x03\x01" * 50, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2**20,
        head + b"Content-Length: 1073741824\r\n\r\n" + b"a" * 100_000, head + b"Content-Length: 500\r\n\r\n{",
        head + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\n", head + b"Content-Length: 3\r\n\r\n\xff\xfe\xfd",
    ]  # fmt: skip
    raws = []
    for number in range(70):
        raws.append(socket.create_connection(("127.0.0.1", server.port)))
        with contextlib.suppress(OSError):
            raws[-1].sendall(rows[number % len(rows)])
    slow = socket.create_connection(("127.0.0.1", server.port))  # it never reads
    body = json.dumps({"model": "base", "messages": said(SECRET), "max_tokens": 60, "stream": True}).encode()
    slow.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.ask().json()["choices"][0]["message"]["content"], range(12)))
    assert answers == [expected] * 12
    assert server.post({"model": "base", "messages": said(SECRET), "max_tokens": 5}).status_code == 200
    assert server.post({"model": "base", "messages": said(SECRET), "max_tokens": "x"}).status_code == 400
    assert server.post({"model": "base", "messages": said(SECRET * 2000)}).status_code == 413
    for raw in (*raws, slow):
        raw.close()
    assert until(lambda: not server.scheduler.active)
    out, err = capfd.readouterr()
    records = [one for one in caplog.records if one.name.startswith(("uvicorn", "starlette", "asyncio"))]
    logged = "".join(one.getMessage() for one in records)
    for told in (out, err, logged):
        assert SECRET not in told and "Traceback" not in told and json.dumps(SECRET)[1:-1] not in told


def test_a_body_that_does_not_arrive_and_an_answer_that_takes_too_long_end(start):
    server = start(slots=1, seconds=0.3, body_seconds=0.2)
    real = server.scheduler.cache.step
    server.scheduler.cache.step = lambda *arguments: (time.sleep(0.05), real(*arguments))[1]
    assert server.ask(max_tokens=100).status_code == 504
    assert until(lambda: server.scheduler.counts["cancelled"] == 1)
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(head + b"Content-Length: 9\r\n\r\n{")
        raw.settimeout(5)
        assert b"408" in raw.recv(200)


def test_a_thousand_connections_harm_nobody(start, models, chat):
    server = start()
    *_, expected = alone(models, chat, ["孩子发烧怎么办？"], 12)
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"[: number % 60])
        assert server.ask().json()["choices"][0]["message"]["content"] == expected
        assert len(server.server.server_state.connections) >= 1000
    assert until(lambda: not server.server.server_state.connections)


def test_a_server_that_stops_tells_each_client(start):
    server = start(slots=1)
    real = server.scheduler.cache.step
    server.scheduler.cache.step = lambda *arguments: (time.sleep(0.02), real(*arguments))[1]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        whole = pool.submit(server.ask, max_tokens=110)
        stream = pool.submit(lambda: server.ask(max_tokens=110, stream=True).text)
        assert until(lambda: server.scheduler.counts["generated"] > 2 and server.scheduler.waiting)
        server.scheduler.close(0)
        assert whole.result().status_code == 503 and '"code": "stopping"' in stream.result()
    assert server.ask().status_code == 503


def test_metrics_count_what_was_done(start):
    server = start()
    usage = [server.ask(text, max_tokens=5).json()["usage"] for text in ("感冒", "肺炎")]
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    found = {name: float(value) for name, value in map(str.split, lines)}
    assert found["pedgpt_generated"] == sum(one["completion_tokens"] for one in usage)
    assert found["pedgpt_prompt"] == sum(one["prompt_tokens"] for one in usage)
    assert found["pedgpt_stop"] + found["pedgpt_length"] == 2 and found["pedgpt_active"] == 0


def test_many_requests_in_random_order_equal_their_answers_alone(server, models, chat):
    rng = random.Random(3)
    texts = ["".join(rng.sample("感冒发烧咳嗽孩子怎么办多喝水", 6)) for _ in range(20)]
    jobs = [(text, rng.randrange(1, 20), rng.choice(list(models))) for text in texts]
    expected = [alone(models, chat, [text], count, model)[2] for text, count, model in jobs]

    def ask(job):
        text, count, model = job
        if rng.random() < 0.3:
            events = server.events(text, max_tokens=count, model=model)
            return "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        return server.ask(text, max_tokens=count, model=model).json()["choices"][0]["message"]["content"]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, jobs)) == expected


def test_reasoning_stands_between_tags_and_a_stream_names_its_role_once(start, chat, monkeypatch):
    class Decoder:
        """Writes a reasoning and an answer, one piece a token."""

        def __init__(self, *_):
            self.pieces, self.stopped = iter(["<think>", "先看", "年龄。</th", "ink>\n\n", "多喝", "水。"]), False

        def push(self, _):
            piece = next(self.pieces)
            self.stopped = piece == "水。"
            return piece

        def finish(self):
            return ""

    monkeypatch.setattr("pedgpt.serving.server.StreamDecoder", Decoder)
    server = start()
    deltas = [event["choices"][0]["delta"] for event in server.events()]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    expected = "<think>先看年龄。</think>\n\n多喝水。"
    assert "".join(delta["content"] for delta in deltas) == expected
    assert server.ask().json()["choices"][0]["message"] == {"role": "assistant", "content": expected}
    # Where the prompt ends with the tag, the answer begins with it all the same.
    monkeypatch.setattr(chat, "opens_thought", True)
    assert server.events()[0]["choices"][0]["delta"] == {"role": "assistant", "content": "<think><think>"}
    assert server.ask().json()["choices"][0]["message"]["content"] == "<think>" + expected
    plain = server.post({"model": "base", "prompt": "感冒", "max_tokens": 2}, "/v1/completions")
    assert plain.json()["choices"][0]["text"] == "<think>先看"
