"""A teacher's accounting against a real server, `transformers serve`, and against one that misbehaves on purpose.

    python recipes/export_llama.py --model runs/demo/sft/model --output runs/demo/llama
    python benchmarks/check_teacher.py --model runs/demo/llama

The first run kills itself with SIGKILL midway, the second goes on, the third finds everything in the cache. Between
teacher and server stands a recorder, which counts what was sent and what came back. All traffic is on 127.0.0.1.
Then the same with recipes/build_corpus.py on a part of the sample corpus, and the account of its rows.
Ends with status 1 if a row is lost, doubled, moved, or sent again although its answer was in the cache.
Needs the `corpus` extra and `pip install "transformers[serving]"`.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from pedgpt.corpus.builders.teacher import Teacher
from pedgpt.corpus.rows import Unusable
from pedgpt.endpoint import EndpointSettings, in_order

HERE = Path(__file__).resolve()
DISEASES = ("发热", "咳嗽", "腹泻", "湿疹", "便秘", "鼻塞", "呕吐", "皮疹")
ASPECTS = ("怎么护理？", "什么时候要去医院？", "平时如何预防？", "饮食上注意什么？", "会传染吗？")
QUESTIONS = [f"孩子{disease}{aspect}" for aspect in ASPECTS for disease in DISEASES]


class Recorder(ThreadingHTTPServer):
    """Passes requests on to `target`; `sent` and `answered` hold their keys."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.client = httpx.Client(base_url=target, timeout=120, trust_env=False)
        self.sent: list[str] = []
        self.answered: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A teacher that is killed hangs up."""


class _Pass(BaseHTTPRequestHandler):
    server: Recorder
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        key = self.headers["Idempotency-Key"]
        self.server.sent.append(key)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.server.client.post(self.path, content=body, headers={"Content-Type": "application/json"})
        self.server.answered += [key] * answer.is_success
        try:
            self.send_response(answer.status_code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)
        except OSError:
            self.close_connection = True  # the teacher is dead


def child(options: argparse.Namespace) -> None:
    """One run of a builder, in a process of its own; with --kill-after it dies after so many rows."""
    settings = EndpointSettings(
        url=options.url, model=options.model, key_variable="", concurrency=options.concurrency, max_tokens=32
    )
    rows, unusable = [], ""
    questions = QUESTIONS[: options.questions]
    with Teacher(settings, options.cache) as teacher:

        def work(question: str) -> tuple[str, str]:
            return question, teacher.ask([{"role": "user", "content": question}])

        for row in in_order(questions, work, workers=options.concurrency):
            rows.append(row)
            if len(rows) == options.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
        if options.json:  # an answer that is no JSON must end as Unusable, and nothing else
            try:
                teacher("你是儿科医生。", f"{QUESTIONS[0]} 用 JSON 回答。", {"answer": str})
            except Unusable as error:
                unusable = str(error)
    usage = teacher.usage
    print(json.dumps({"rows": rows, "usage": vars(usage), "said": teacher.describe(), "json": unusable}))


def run_child(options: argparse.Namespace, url: str, cache: Path, *more: str) -> dict[str, Any] | None:
    command = [sys.executable, str(HERE), "--child", "--model", options.model, "--url", url, "--cache", str(cache)]
    command += ["--questions", str(options.questions), "--concurrency", str(options.concurrency), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"NO_PROXY": "127.0.0.1"})
    if done.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"a run ended with status {done.returncode}")
    return json.loads(done.stdout) if done.returncode == 0 else None


@contextlib.contextmanager
def real_server(options: argparse.Namespace, folder: Path) -> Iterator[Recorder]:
    """`transformers serve`, up and behind a recorder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", options.model]
    log = (folder / "serve.log").open("wb")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log, env=environment
    )
    try:
        target, start = f"http://127.0.0.1:{port}", time.perf_counter()
        while True:
            try:
                if httpx.get(f"{target}/health", trust_env=False).is_success:
                    break
            except httpx.HTTPError:
                pass
            if server.poll() is not None or time.perf_counter() - start > 180:
                raise SystemExit(f"transformers serve did not start:\n{(folder / 'serve.log').read_text()[-2000:]}")
            time.sleep(0.2)
        print(f"transformers serve {options.model}: up after {time.perf_counter() - start:.1f} s")
        yield Recorder(target)
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def check_client(options: argparse.Namespace, recorder: Recorder, cache: Path) -> int:
    """Three runs of one builder, a table; returns the number of mistakes."""
    url, mistakes, last = f"http://127.0.0.1:{recorder.server_address[1]}/v1", 0, {}
    print("run     asked  sent  answered  from cache  in the cache  sent twice  sent though cached  seconds  tokens")
    runs = [("killed", ["--kill-after", str(options.questions // 2)]), ("second", []), ("third", ["--json"])]
    for name, more in runs:
        first, answered, known, start = len(recorder.sent), len(recorder.answered), kept(cache), time.perf_counter()
        last = run_child(options, url, cache, *more)
        seconds = time.perf_counter() - start
        time.sleep(1.0)  # what the server still has in hand for a killed run
        sent, usage = recorder.sent[first:], last["usage"] if last else {}
        json_requests = 3 if "--json" in more else 0
        again = len(set(sent) & known)
        twice = len(sent) - len(set(recorder.sent) - set(recorder.sent[:first]))  # in this run or in an earlier one
        tokens = usage["prompt_tokens"] + usage["completion_tokens"] if last else "-"
        asked, cached = options.questions + json_requests, usage.get("cached", "-")
        print(
            f"{name:<7} {asked:>5} {len(sent):>5} {len(recorder.answered) - answered:>9} {cached:>11} "
            f"{len(kept(cache)):>13} {twice:>11} {again:>19} {seconds:>8.1f} {tokens:>7}"
        )
        mistakes += again + (twice > options.concurrency) + (name == "third" and len(sent) != json_requests)
        if last:
            mistakes += [row[0] for row in last["rows"]] != QUESTIONS[: options.questions]
            mistakes += not all(row[1].strip() for row in last["rows"])
        else:
            mistakes += not len(kept(cache)) < options.questions
    assert last is not None
    print(f"the third run also asked for JSON, which this model cannot write: {last['json']}")
    print(f"{last['said']}\nfirst row: {last['rows'][0]}\nmistakes: {mistakes}\n")
    return mistakes


def check_corpus(options: argparse.Namespace, recorder: Recorder, folder: Path) -> int:
    """build_corpus.py on a part of the sample corpus: killed, run to the end, run again; returns the mistakes."""
    source, output = folder / "source", folder / "corpus"
    sample = HERE.parents[1] / "recipes/sample_corpus"
    source.mkdir()
    listing, read, pairs = [], {}, '"preferences"]'
    for name, lines, kind, more in (
        ("textbook.jsonl", 6, "textbook", f'build = ["role_play", {pairs}'),
        ("consultations.jsonl", 4, "dialogues", ""),
        ("general_medical_qa.jsonl", 6, "instructions", f'domain = "general_medical"\nbuild = ["reconstruct", {pairs}'),
        ("knowledge_graph.tsv", 40, "knowledge_graph", ""),
    ):  # fmt: skip
        rows = [line for line in (sample / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        (source / name).write_text("\n".join(rows[:lines]) + "\n", encoding="utf-8")
        listing.append(f'[[source]]\nfile = "{name}"\nkind = "{kind}"\n{more}\n')
        read[name.split(".")[0]] = lines
    (source / "corpus.toml").write_text("".join(listing), encoding="utf-8")
    teacher = {
        "url": f"http://127.0.0.1:{recorder.server_address[1]}/v1", "model": options.model, "key_variable": "",
        "concurrency": options.concurrency, "max_tokens": 32,
    }  # fmt: skip
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in teacher.items()]
    (folder / "teacher.toml").write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, str(HERE.parents[1] / "recipes/build_corpus.py"), "--source", str(source)]
    command += ["--output", str(output), "--teacher", str(folder / "teacher.toml")]

    cache, first, said = folder / "corpus.teacher.sqlite", len(recorder.sent), ""
    mistakes, corpora = 0, []
    print("build_corpus.py with the same server")
    print("run     sent  answered  from cache  in the cache  sent twice  sent though cached  corpus at OUTPUT")
    for name in ("killed", "second", "third"):
        sent, answered, known = len(recorder.sent), len(recorder.answered), kept(cache)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if name == "killed":
            while len(recorder.answered) < answered + options.kill_corpus and process.poll() is None:
                time.sleep(0.002)
            process.kill()
        said, complaint = process.communicate()
        if process.returncode != (-signal.SIGKILL if name == "killed" else 0):
            raise SystemExit(f"the {name} run ended with status {process.returncode}: {complaint[-2000:]}")
        time.sleep(1.0)  # what the server still has in hand for a killed run
        new = recorder.sent[sent:]
        twice = len(new) - len(set(recorder.sent[first:]) - set(recorder.sent[first:sent]))
        again = len(set(new) & known)
        cached = found[1] if (found := re.search(r"(\d+) answers from", said)) else "-"
        print(
            f"{name:<7} {len(new):>4} {len(recorder.answered) - answered:>9} {cached:>11} {len(kept(cache)):>13} "
            f"{twice:>11} {again:>19}  {'whole' if (output / 'manifest.json').is_file() else 'none'}"
        )
        mistakes += again + (twice > options.concurrency) + (output.exists() == (name == "killed"))
        mistakes += (name == "third" and len(new) > 0) + (name == "killed" and not 0 < len(kept(cache)))
        if output.exists():
            corpora.append({path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()})
    mistakes += corpora[0] != corpora[1]
    print(f"the second and the third corpus are {'the same' if corpora[0] == corpora[1] else 'NOT the same'} bytes")
    print(re.findall("^teacher .*", said, re.MULTILINE)[0])
    mistakes += _account(output, read)
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    print(f"left beside it: {', '.join(left) or 'nothing'}; mistakes: {mistakes}\n")
    return mistakes + len(left)


def _account(corpus: Path, read: dict[str, int]) -> int:
    """Of each source, rows read, built, written and listed by reason; what is neither is a mistake."""
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    written, by_teacher, listed = Counter(), Counter(), Counter()
    for file in manifest["files"]:
        if file["table"] == "tasks_sample":  # repeats rows of the tasks
            continue
        for line in (corpus / file["path"]).read_text(encoding="utf-8").splitlines():
            origin = json.dumps(json.loads(line)["origin"])
            written[file["source"]] += 1
            by_teacher[file["source"]] += any(word in origin for word in ('"evidence"', '"teacher"', '"score '))
    for line in (corpus / "reports/dropped.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        listed[row["source"], row["reason"]] += 1
    mistakes = 0
    print("source              read  built  written  by the teacher  listed  unaccounted  listed by reason")
    for name, counts in manifest["sources"].items():
        reasons = {reason: count for (source, reason), count in listed.items() if source == name}
        lost = counts["built"] - written[name] - sum(reasons.values())
        mistakes += abs(lost) + abs(counts["read"] - read[name]) + (counts["skipped"] > 0)
        print(
            f"{name:<19} {counts['read']:>4} {counts['built']:>6} {written[name]:>8} {by_teacher[name]:>15} "
            f"{sum(reasons.values()):>7} {lost:>12}  {', '.join(f'{n} {reason}' for reason, n in reasons.items())}"
        )
    return mistakes


def kept(cache: Path) -> set[str]:
    if not cache.exists():
        return set()
    with sqlite3.connect(cache) as database:
        return {key for (key,) in database.execute("SELECT key FROM answers")}


def check_misbehaving_server(rows: int, folder: Path) -> int:
    """Every kind of fault, at random; prints how often each was injected and what became of the rows."""
    spec = importlib.util.spec_from_file_location("chat_server", HERE.parents[1] / "tests/corpus/chat_server.py")
    chat_server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat_server)
    questions = [f"{i}：{QUESTIONS[i % len(QUESTIONS)]}" for i in range(rows)]
    with chat_server.ChatServer(behave=chat_server.misbehaving(0.5, most=5), slow=2.0) as server:
        settings = EndpointSettings(url=server.url, model="m", key_variable="", timeout=1.0, retry_wait=0.005)
        for name in ("first", "second"):
            before, start = len(server.log), time.perf_counter()
            with Teacher(settings, folder / "misbehaving.sqlite") as teacher:
                given = [
                    (question, answer["answer"])
                    for question, answer in in_order(
                        questions, lambda q, teacher=teacher: (q, teacher("", q, {"answer": str})), workers=8
                    )
                ]
            print(f"{name} run: {len(server.log) - before} requests in {time.perf_counter() - start:.1f} s")
            print(teacher.describe())
    faults = Counter(request.fault for request in server.log)
    print("\nfault               injected")
    for fault in sorted(set(faults) - {"good"}):
        print(f"{fault:<19} {faults[fault]:>8}")
    answered = Counter(request.question for request in server.log if request.answered)
    lost = len(set(questions) - {question for question, _ in given})
    doubled = len(given) - len({question for question, _ in given})
    moved = sum(row != (question, "答：" + question) for question, row in zip(questions, given, strict=False))
    paid_twice = sum(count - 1 for count in answered.values())
    print(f"all faults          {faults.total() - faults['good']:>8}, good answers {faults['good']}")
    print(f"rows in {rows}, rows out {len(given)}, lost {lost}, doubled {doubled}, moved {moved}, ", end="")
    print(f"good answers paid twice {paid_twice}")
    return lost + doubled + moved + paid_twice


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Llama with tokenizer and chat template")
    parser.add_argument("--questions", type=int, default=24, help=f"for the real server, at most {len(QUESTIONS)}")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--rows", type=int, default=300, help="for the misbehaving server")
    parser.add_argument("--kill-corpus", type=int, default=20, help="answers after which build_corpus.py is killed")
    for name in ("--child", "--json"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name in ("--url", "--cache"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--kill-after", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return 0
    os.environ["NO_PROXY"] = "127.0.0.1"
    with tempfile.TemporaryDirectory() as folder:
        with real_server(options, Path(folder)) as recorder:
            mistakes = check_client(options, recorder, Path(folder) / "real.sqlite")
            (Path(folder) / "recipe").mkdir()
            mistakes += check_corpus(options, recorder, Path(folder) / "recipe")
        mistakes += check_misbehaving_server(options.rows, Path(folder))
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
