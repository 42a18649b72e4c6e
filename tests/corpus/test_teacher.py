"""A teacher's answers are JSON objects with the fields that were asked for, or the question is given up."""

import importlib.util
import json
from pathlib import Path

import pytest

from pedgpt.corpus.builders.teacher import Teacher
from pedgpt.corpus.rows import Unusable
from pedgpt.endpoint import EndpointSettings

spec = importlib.util.spec_from_file_location("chat_server", Path(__file__).with_name("chat_server.py"))
chat_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chat_server)
ChatServer = chat_server.ChatServer


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(Path(__file__).parent))  # reading all certificates takes long


def settings(server):
    return EndpointSettings(url=server.url, model="tiny", key_variable="", retry_wait=0.002, timeout=5.0)


WANTED = {"question": str, "score": int}
RIGHT = {"question": "孩子发烧怎么办？", "score": 4}
JSON = json.dumps(RIGHT, ensure_ascii=False)


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        f"```json\n{JSON}\n```", f"```\n{JSON}```", f"好的，如下：\n{JSON}\n希望有帮助。", f"用 {{x}} 表示：{JSON}",
        f"<think>也许 {{\"question\": \"\"}}</think>{JSON}", json.dumps(RIGHT | {"more": {"a": [{"b": 1}]}}, indent=2),
        f"[{JSON}]",
    ],
)  # fmt: skip
def test_the_object_is_found_in_what_stands_around_it(tmp_path, text):
    with ChatServer(answer=lambda payload: text) as server, Teacher(settings(server), tmp_path / "c") as teacher:
        assert teacher("你是医生。", "出题", WANTED) == RIGHT
        assert len(server.log) == 1


@pytest.mark.parametrize(
    "text",
    [
        "没有", JSON[:-1], JSON + JSON, "{}", '{"question": "", "score": 1}', '{"question": " \\n", "score": 1}',
        '{"question": "问", "score": "1"}', '{"question": "问", "score": true}', '{"question": "问", "score": 1.5}',
        '{"question": ["问"], "score": 1}', '{"question": null, "score": 1}', '{"question": "问"}', "[" * 5000,
        '{"question": "问", "score": NaN}', '{"question": "\\ud83d", "score": 1}', '{"a":' * 5000, "{'question': '问'}",
        '{"question": "问", "inner": {"question": "问", "score": 1}', '["question", "score"]',
    ],
)  # fmt: skip
def test_another_answer_is_asked_for_three_times_at_most(tmp_path, text):
    with ChatServer(answer=lambda payload: text) as server:
        for _ in range(2):
            with Teacher(settings(server), tmp_path / "c") as teacher, pytest.raises(Unusable, match="3 answers"):
                teacher("你是医生。", "出题", WANTED)
        assert len(server.log) == 3 == len({request.key for request in server.log})
    with ChatServer(answer=lambda payload: JSON if len(server.log) == 3 else text) as server:
        with Teacher(settings(server), tmp_path / "d") as teacher:
            assert teacher("你是医生。", "出题", WANTED) == RIGHT


def test_numbers_and_line_breaks_are_read_as_teachers_write_them(tmp_path):
    text = '{"a": "一\n二 ", "b": 3, "c": [1], "d": {}, "e": false, "f": 0.5}'
    fields = {"a": str, "b": int, "c": list, "d": dict, "e": bool, "f": float}
    with ChatServer(answer=lambda payload: text) as server, Teacher(settings(server), tmp_path / "c") as teacher:
        found = teacher("", "问", fields)
    with ChatServer(answer=lambda payload: '{"b": NaN}') as server:
        with Teacher(settings(server), tmp_path / "d") as teacher, pytest.raises(Unusable):
            teacher("", "问", {"b": float})
    assert found == {"a": "一\n二", "b": 3, "c": [1], "d": {}, "e": False, "f": 0.5}
