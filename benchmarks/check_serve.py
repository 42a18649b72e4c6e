"""Thousands of requests to the server: greedy answers equal those alone, and its memory stays flat.

    python benchmarks/check_serve.py

16 clients ask for a small random model (float32) and for experts on it, in random order: whole answers and streams of 1
to 24 tokens; one client in twenty leaves after the first token. What each should be was computed before by `generate`,
one prompt at a time. Prints the number of answers that differ, the requests a second, and the server's memory.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from bench_serve import CORPUS, ROOT, Running, make_model, processor

from pedgpt.adapters import load_adapter
from pedgpt.data import Message, chat_format, encode_prompt, load_tokenizer
from pedgpt.models import generate, load_model


def expected(folder: str, adapter: str, jobs: list[tuple[str, str, int]]) -> list[str]:
    """What `generate` answers to each job alone."""
    tokenizer = load_tokenizer(folder)
    chat = chat_format(tokenizer, "chatml")
    models = {name: load_model(folder).eval() for name in ("base", "experts")}
    load_adapter(models["experts"], adapter)
    found = []
    for name, question, count in jobs:
        prompt = encode_prompt([Message("user", question)], chat)
        (ids,) = generate(models[name].eval(), [prompt], max_new_tokens=count, stop_tokens=chat.stop_tokens)
        found.append(tokenizer.decode(ids))
    return found


def ask(client: httpx.Client, url: str, job: tuple[str, str, int], how: str) -> str | None:
    """The answer to a job, whole or from a stream; None if the client leaves it after the first event."""
    name, question, count = job
    body = {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": count, "temperature": 0}
    if how == "whole":
        reply = client.post(url, json=body)
        reply.raise_for_status()
        return reply.json()["choices"][0]["message"]["content"]
    text = ""
    with client.stream("POST", url, json=body | {"stream": True}) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                if how == "left":
                    return None
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
    return text


def memory(process: int) -> float:
    """Resident memory of a process, in MiB (Linux only)."""
    with open(f"/proc/{process}/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=400, help="different requests")
    arguments = parser.parse_args()
    rng = random.Random(0)
    rows = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    questions = [next(iter(row.values()))[: rng.randrange(4, 60)] for row in rows]
    jobs = [
        (rng.choice(("base", "experts")), rng.choice(questions), rng.randrange(1, 25)) for _ in range(arguments.jobs)
    ]
    with tempfile.TemporaryDirectory() as place:
        folder, adapter = f"{place}/model", f"{place}/experts"
        make_model(folder, adapter, hidden=64, layers=2)
        answers = expected(folder, adapter, jobs)
        command = [sys.executable, str(ROOT / "recipes/serve.py"), "--model", folder, "--adapters", adapter]
        with Running([*command, "--device", "cpu"], "base") as server, httpx.Client(timeout=120) as client:
            url = f"http://127.0.0.1:{server.port}/v1/chat/completions"

            def work(_: int) -> bool:
                number, how = rng.randrange(len(jobs)), rng.choices(("whole", "stream", "left"), (12, 7, 1))[0]
                return ask(client, url, jobs[number], how) in (None, answers[number])

            print(f"{processor()}, {arguments.clients} clients")
            print(f"{'requests':>9}{'different':>11}{'a second':>10}{'MiB':>8}")
            wrong, done = 0, 0
            with ThreadPoolExecutor(arguments.clients) as pool:
                while done < arguments.requests:
                    count, began = min(1000, arguments.requests - done), time.perf_counter()
                    wrong += sum(not equal for equal in pool.map(work, range(count)))
                    done, rate = done + count, count / (time.perf_counter() - began)
                    print(f"{done:9,}{wrong:11}{rate:10.0f}{memory(server.process.pid):8.0f}", flush=True)
            print(httpx.get(f"http://127.0.0.1:{server.port}/metrics").text)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
