"""recipes/serve.py as a process: several adapters, other tools of ours as its clients, and its end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("uvicorn")


@contextlib.contextmanager
def started(lab, python, *settings):
    port, script = lab.free_port(), Path(lab.script("serve"))
    given = ["--model", str(lab.folder / "model"), "--port", str(port), "--device", "cpu", *settings]
    process = subprocess.Popen(
        [python, str(script), *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            httpx.get(f"{url}/v1/models")
            break
        except httpx.HTTPError:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
    yield url, process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def serving(lab, python):
    adapter = lab.reference("expert_finetune") / "adapter"
    with started(lab, python, "--adapters", str(adapter), f"again={adapter}", "--grace", "5") as found:
        yield found


def ask(url, model, text="孩子感冒怎么办？"):
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()


def test_base_and_adapters_answer_as_answer_py_does(serving, lab, tmp_path):
    url, _ = serving
    assert [row["id"] for row in httpx.get(f"{url}/v1/models").json()["data"]] == ["base", "expert_finetune", "again"]
    adapter = lab.reference("expert_finetune") / "adapter"
    questions = ["--questions", str(lab.folder / "heldout.jsonl"), "--max-new-tokens", "12", "--device", "cpu"]
    for name, settings in {"base": [], "expert_finetune": ["--adapter", str(adapter)]}.items():
        direct, served = tmp_path / f"{name}.jsonl", tmp_path / f"{name}_served.jsonl"
        model = ["--model", str(lab.folder / "model"), *settings]
        assert lab.call("answer", [*model, *questions, "--output", str(direct)]).code == 0
        endpoint = tmp_path / f"{name}.toml"
        endpoint.write_text(f'url = "{url}/v1"\nmodel = "{name}"\nkey_variable = ""\n', encoding="utf-8")
        found = lab.call("answer", ["--endpoint", str(endpoint), *questions[:4], "--output", str(served)])
        assert found.code == 0, found.err
        found, expected = (
            [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()] for path in (served, direct)
        )
        assert found == expected and any(found)
    assert ask(url, "expert_finetune")["choices"] == ask(url, "again")["choices"]


def test_it_refuses_to_let_others_in_without_a_key(lab, monkeypatch):
    monkeypatch.delenv("PEDGPT_API_KEY", raising=False)
    found = lab.call("serve", ["--model", str(lab.folder / "model"), "--host", "0.0.0.0"])
    assert found.code != 0 and "PEDGPT_API_KEY" in found.err


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system cannot end such a connection")
def test_a_client_that_does_not_read_its_stream_loses_its_connection(lab, python):
    body = {"model": "base", "messages": [{"role": "user", "content": "孩子感冒怎么办？"}], "n": 16, "stream": True}
    content = json.dumps(body | {"max_tokens": 64, "temperature": 1}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    with started(lab, python, "--timeout", "1") as (url, _), socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
        raw.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        time.sleep(4)  # It reads nothing.
        with pytest.raises(ConnectionResetError):
            while raw.recv(65536):
                pass


def test_names_that_repeat_are_refused(lab):
    adapter = str(lab.reference("expert_finetune") / "adapter")
    found = lab.call("serve", ["--model", str(lab.folder / "model"), "--adapters", adapter, adapter])
    assert found.code != 0 and "name=folder" in found.err


def test_it_ends_quietly(serving):
    url, process = serving
    ask(url, "base")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    out, err = process.communicate()
    assert "no substitute for a doctor" in out and err == ""
