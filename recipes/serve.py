"""Serve a model and its adapters to OpenAI's clients and to the browser: http://127.0.0.1:8000.

    python recipes/serve.py --adapters runs/demo/experts/adapter

Each adapter is a model by the name of its run (`experts`), the model without adapter is `base`. Clients give the
answer's settings; where they give none, those of the model's generation_config.json count. Nothing that is said is
logged. Bound to another address than this machine's own, the server wants a key: PEDGPT_API_KEY in the environment.
"""

import copy
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from pedgpt.adapters import adapter_base, load_adapter, pack_adapters
from pedgpt.data import FormatSettings, load_tokenizer, taught_folder
from pedgpt.evaluation.system import SystemSettings
from pedgpt.models import generation_defaults
from pedgpt.training import run_recipe, start


@dataclass(kw_only=True)
class Config(SystemSettings):
    adapters: list[str] = field(default_factory=list)  # folders, or name=folder
    host: str = "127.0.0.1"  # address to listen on
    port: int = 8000  # 0: any that is free
    slots: int = 16  # answers computed at the same time
    context: int = 0  # tokens of prompt and answer; 0: what the model takes, at most 4096
    queue: int = 64  # requests that may wait
    chunk: int = 256  # tokens of prompts read between two tokens of the answers
    timeout: float = 600.0  # seconds for an answer
    grace: float = 30.0  # seconds to finish answers when the server stops


def main(config: Config) -> None:
    import uvicorn

    from pedgpt.serving import Limits, Scheduler, Served, Server, is_local, with_adapter

    key = os.environ.get("PEDGPT_API_KEY", "")
    if not is_local(config.host) and not key:
        raise ValueError(f"--host {config.host} lets others in; set PEDGPT_API_KEY to a secret that clients must give")
    named = dict(one.split("=", 1) if "=" in one else (default_name(one), one) for one in config.adapters)
    if len(named) < len(config.adapters) or "base" in named:
        raise ValueError(f"--adapters: the names {', '.join(named)} repeat, or one is base; write name=folder")
    if not config.model and named:
        config.model = adapter_base(next(iter(named.values())))
    ...


if __name__ == "__main__":
    run_recipe(main, Config)
