"""The server beside `transformers serve`: the same weights, questions and clients, in one run.

    pip install "transformers[serving]" && python benchmarks/bench_serve.py

A Llama of 33M parameters (hidden 512, 8 layers, vocabulary 8,000) with random weights, float32, greedy. 1, 4 and 16
clients ask one question after the other, as streams. Printed are the time to the first token, the time between two
tokens (medians) and the tokens a second of all clients, ours also with experts of rank 8, and the share of answers that
are equal in both servers. `--model FOLDER` takes a model of yours that transformers can load.
"""

import argparse
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch

from pedgpt.adapters import inject_experts, save_adapter
from pedgpt.data import chat_format, train_tokenizer
from pedgpt.models import ModelConfig, Transformer, save_model

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "recipes/sample_corpus/general_medical_qa.jsonl"


def make_model(folder: str, adapter: str, hidden: int = 512, layers: int = 8) -> None:
    """Random weights, a tokenizer of the sample corpus, and experts that are not zero."""
    texts = CORPUS.read_text(encoding="utf-8").splitlines()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = train_tokenizer(texts, vocab_size=8000, special_tokens=special)
    torch.manual_seed(0)
    config = ModelConfig(
        model_type="llama", vocab_size=8000, hidden_size=hidden, intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64,
        max_position_embeddings=2048,
    )  # fmt: skip
    model = Transformer(config)
    save_model(model, folder)
    chat_format(tokenizer, "chatml").save(folder)
    inject_experts(model, rank=8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(model, adapter, base_model=folder)


class Running:
    """A server as a process of its own, until the block ends."""

    def __init__(self, command: list[str], name: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command, self.name = [*command, "--port", str(self.port)], name

    def __enter__(self) -> "Running":
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.log: deque[str] = deque(maxlen=20)
        threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()), daemon=True).start()
        for _ in range(600):
            if self.process.poll() is not None:
                sys.exit(f"{' '.join(self.command)} ended:\n{''.join(self.log)}")
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/v1/models")
                return self
            except httpx.HTTPError:
                time.sleep(0.2)
        sys.exit(f"{' '.join(self.command)} does not answer")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def ask(self, question: str, tokens: int) -> tuple[str, float, list[float]]:
        """(the answer, seconds to its first token, seconds between the others)."""
        body = {"model": self.name, "messages": [{"role": "user", "content": question}], "stream": True}
        body |= {"max_tokens": tokens, "temperature": 0}
        text, times, began = "", [], time.perf_counter()
        with httpx.stream("POST", f"http://127.0.0.1:{self.port}/v1/chat/completions", json=body, timeout=600) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    if choices and (piece := choices[0]["delta"].get("content")):
                        text += piece
                        times.append(time.perf_counter())
        gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        text = text.replace("\ufffd", "")  # Random weights write broken characters, which not everyone streams alike.
        return text, (times[0] if times else time.perf_counter()) - began, gaps

    def measure(self, questions: list[str], clients: int, tokens: int) -> tuple[list[str], str, float]:
        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(lambda question: self.ask(question, tokens), questions))
        seconds = time.perf_counter() - began
        answers, first, gaps = zip(*found, strict=True)
        rate = tokens * len(questions) / seconds
        gap = statistics.median([one for row in gaps for one in row] or [0.0])
        return list(answers), f"{statistics.median(first):9.3f}{1000 * gap:9.1f}{rate:9.1f}", rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with its chat template, instead of random weights")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--transformers", default=str(Path(sys.executable).parent / "transformers"), help="the program")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, adapter = f"{place}/model", f"{place}/experts"
        make_model(folder, adapter)
        model = arguments.model or folder
        adapters = [] if arguments.model else ["--adapters", adapter]
        ours = [sys.executable, str(ROOT / "recipes/serve.py"), "--model", model, *adapters, "--device", "cpu"]
        theirs = [arguments.transformers, "serve", model, "--device", "cpu", "--dtype", "float32"]
        rows = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
        questions = [next(iter(row.values()))[:60] for row in rows[: arguments.questions]]
        print(f"{processor()}, {torch.get_num_threads()} threads, {arguments.tokens} tokens an answer")
        print(f"{'':36}{'clients':>8}{'first s':>9}{'token ms':>9}{'tokens/s':>9}{'ratio':>7}{'equal':>7}")
        systems = [("transformers serve", theirs, model)]
        systems += [("with continuous batching", [*theirs, "--continuous-batching"], model)]
        systems += [("pedgpt", ours, "base")] + [("pedgpt, experts", ours, "experts")] * (not arguments.model)
        rates: dict[int, float] = {}
        expected: list[str] = []
        for title, command, name in systems:
            with Running(command, name) as server:
                server.ask(questions[0], 8)
                for clients in arguments.clients:
                    asked = questions[: max(4, 2 * clients)]
                    answers, shown, rate = server.measure(asked, clients, arguments.tokens)
                    expected = expected if len(expected) >= len(answers) else answers
                    same = sum(a == b for a, b in zip(answers, expected, strict=False)) / len(answers)
                    equal = "–" if name == "experts" else f"{same:.0%}"  # the others answer without experts
                    ratio = rate / rates.setdefault(clients, rate)
                    print(f"{title:36}{clients:8}{shown}{ratio:7.2f}{equal:>7}", flush=True)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


if __name__ == "__main__":
    main()
