"""The judge and the corpus teacher as clients of our server; a scripted decoder says what a trained model would."""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pedgpt.corpus.builders.teacher import Teacher
from pedgpt.data import Message
from pedgpt.endpoint import EndpointSettings, Unusable
from pedgpt.evaluation.judging import DIMENSIONS
from pedgpt.evaluation.responses import Answers, Question, write_answers
from pedgpt.serving import Scheduler

from .conftest import SIZES, Running

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("judge_for_our_server", ROOT / "recipes/judge.py")
judge = importlib.util.module_from_spec(spec)
spec.loader.exec_module(judge)


@pytest.fixture
def saying(models, chat, monkeypatch):
    """saying(text, …): a server whose answers are that text, a few characters a token."""
    running = []

    def start(text, **settings):
        class Decoder:
            def __init__(self, *_):
                self.pieces, self.stopped = [text[i : i + 7] for i in range(0, len(text), 7)], False

            def push(self, _):
                piece = self.pieces.pop(0)
                self.stopped = not self.pieces
                return piece

            def finish(self):
                return ""

        monkeypatch.setattr("pedgpt.serving.server.StreamDecoder", Decoder)
        scheduler = Scheduler(models, **{**SIZES, "capacity": 4096, **settings})
        running.append(Running(scheduler, chat, stop_tokens=()))
        return running[-1].__enter__()

    yield start
    for server in running:
        server.__exit__()


def asked(server, **settings):
    return {"url": f"{server.url}/v1", "model": "base", "key_variable": "", "retry_wait": 0.01, **settings}


def test_the_teacher_asks_and_asks_again_where_the_queue_is_full(saying, tmp_path):
    server = saying('好的：{"answer": "多喝水，注意休息。", "score": 5}', slots=1, queue=2)
    settings = EndpointSettings(**asked(server, concurrency=8, max_retries=50))
    with Teacher(settings, tmp_path / "cache.sqlite") as teacher, ThreadPoolExecutor(8) as pool:
        fields = {"answer": str, "score": int}
        found = list(pool.map(lambda i: teacher("你是医生。", f"问题{i}", fields), range(6)))
        assert found == [{"answer": "多喝水，注意休息。", "score": 5}] * 6
        with pytest.raises(Unusable, match="question"):
            teacher("", "问题", {"question": str})


def test_the_judges_verdicts_arrive(saying, tmp_path):
    server = saying(json.dumps(dict.fromkeys(DIMENSIONS, "1")))
    questions = [Question((Message("user", f"问题{i}"),), f"参考{i}", "MedKQ&A") for i in range(6)]
    for name in "ab":
        found = [Message("assistant", f"{name} 的回答 {i}") for i in range(6)]
        write_answers(tmp_path / f"{name}.jsonl", Answers(name, questions, found))
    toml = "".join(f"{name} = {json.dumps(value)}\n" for name, value in asked(server).items())
    (tmp_path / "judge.toml").write_text(toml, encoding="utf-8")
    answers = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    output = tmp_path / "judge.json"
    judge.main(judge.Config(answers=answers, endpoint=str(tmp_path / "judge.toml"), output=str(output)))
    result = json.loads(output.read_text("utf-8"))
    (pair,) = result["pairs"]
    assert pair["n"] == 6 and result["usage"]["requests"] == server.scheduler.counts["stop"] == 12
    assert all(row["tie"] == [1, 1, 1] for row in result["comparisons"])  # It always prefers the first.
