"""A tiny model with experts beside it, and a server that runs while a module's tests do."""

import copy
import json
import threading
import time

import httpx
import pytest
import torch
import uvicorn

from pedgpt.adapters import ExpertLoRALinear, inject_experts
from pedgpt.data import chat_format, train_tokenizer
from pedgpt.models import ModelConfig, Transformer
from pedgpt.serving import Scheduler, Served, Server

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]
TEXTS = ["感冒常见于婴儿，多喝水。", "孩子发烧怎么办？观察体温，注意休息。", "肺炎要及时就医，听医生的。"] * 8
CAPACITY = 128
SIZES = {"slots": 4, "capacity": CAPACITY, "queue": 64, "prefill": 256}  # of a scheduler


def tiny(**family):
    """A model whose answers depend on what it reads: its weights are large."""
    torch.manual_seed(0)
    settings = {"model_type": "llama", "num_key_value_heads": 2, **family}
    config = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        max_position_embeddings=CAPACITY, initializer_range=0.3, **settings,
    )  # fmt: skip
    return Transformer(config).eval()


def with_experts(model):
    """The same weights with experts whose gates and B are not zero."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    copied = copy.deepcopy(model, shared)
    inject_experts(copied, rank=2)
    generator = torch.Generator().manual_seed(1)
    for layer in copied.modules():
        if isinstance(layer, ExpertLoRALinear):
            for parameter in layer.adapter_parameters().values():
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return copied.eval()


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300, special_tokens=SPECIAL_TOKENS)


@pytest.fixture(scope="session")
def models():
    base = tiny()
    return {"base": base, "experts": with_experts(base)}


@pytest.fixture(scope="session")
def chat(tokenizer):
    return chat_format(tokenizer, "baichuan2")


@pytest.fixture
def make_scheduler(models):
    """make_scheduler(...) with the tiny models; all are closed after the test."""
    made = []

    def make(**settings):
        made.append(Scheduler(models, **{**SIZES, **settings}))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close(0)


class Running:
    """A server on a port of its own, as `with Running(...) as server`."""

    def __init__(self, scheduler, chat, *, stop_tokens=None, **settings):
        self.scheduler = scheduler
        stops = frozenset(chat.stop_tokens if stop_tokens is None else stop_tokens)
        served = {name: Served(chat, stops, {"temperature": 0.0}, f"print of {name}") for name in scheduler.models}
        app = Server(scheduler, served, **settings).app
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self.scheduler.close(0)
        self.server.should_exit = True
        self.thread.join(10)

    def post(self, body, path="/v1/chat/completions", **settings):
        return httpx.post(self.url + path, json=body, timeout=60, **settings)

    def ask(self, text="孩子发烧怎么办？", **settings):
        body = {"model": "base", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
        return self.post({**body, **settings})

    def events(self, text="孩子发烧怎么办？", **settings):
        """The events of a stream, parsed."""
        lines = self.ask(text, stream=True, **settings).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.fixture(scope="module")
def server(models, chat):
    with Running(Scheduler(models, **SIZES), chat) as running:
        yield running
