"""Serve a model and its adapters to OpenAI's clients and to the browser, at http://127.0.0.1:8000.

    python recipes/serve.py --adapters runs/demo/experts/adapter

Each adapter is a model by the name of the folder of its run (here `experts`), and the model without one is `base`.
Where a request does not say how to sample, the model's generation_config.json does. Nothing that is said is logged.
Bound to an address that others can reach, the server wants a key: the environment's PEDGPT_API_KEY.
"""

import copy
import dataclasses
import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pedgpt.adapters import adapter_base, load_adapter, pack_adapters
from pedgpt.evaluation.system import SystemSettings
from pedgpt.models import generation_defaults
from pedgpt.training import run_recipe, start

DISCLAIMER = "仅供研究演示，不能代替医生。For research only; no substitute for a doctor."


@dataclass(kw_only=True)
class Config(SystemSettings):
    adapters: list[str] = field(default_factory=list)  # folders of adapters to serve beside the model, or name=folder
    host: str = "127.0.0.1"  # address to listen on
    port: int = 8000  # port to listen on
    slots: int = 16  # answers that are computed at the same time
    context: int = 0  # tokens of prompt and answer; 0: what the model takes, at most 4096
    queue: int = 64  # requests that may wait
    prefill: int = 256  # tokens of prompts that are read between two tokens of the answers
    timeout: float = 600.0  # seconds for an answer, and for a client to read what was sent
    grace: float = 30.0  # seconds to finish answers in when the server is stopped


def main(config: Config) -> None:
    try:
        import uvicorn

        from pedgpt.serving import Scheduler, Served, Server, is_local
    except ImportError as error:
        raise ValueError(f'{error.name} is missing; `pip install -e ".[serve]"` brings it') from None
    key = os.environ.get("PEDGPT_API_KEY", "")
    local = is_local(config.host)
    if not local and not key:
        raise ValueError(f"--host {config.host} lets others in; set PEDGPT_API_KEY, a secret that clients must give")
    given = [*filter(None, [config.adapter]), *config.adapters]
    named = dict(one.split("=", 1) if "=" in one else (name_of(one), one) for one in given)
    if len(named) < len(given) or "base" in named:
        raise ValueError(f"--adapters: two have one name, or one is called base; give name=folder ({', '.join(named)})")
    config.adapter = ""
    if not config.model and named:
        config.model = adapter_base(next(iter(named.values())))

    systems = {"base": config} | {name: dataclasses.replace(config, adapter=folder) for name, folder in named.items()}
    chats = {name: system.load_chat() for name, system in systems.items()}
    models = {"base": config.load_model(start(config.device).device)}
    for name, folder in named.items():
        models[name] = with_adapter(models["base"], folder, config.uniform_routing)
    served = {}
    for name, system in systems.items():
        defaults = generation_defaults(system.model) | generation_defaults(system.taught)
        stops = frozenset((*chats[name].stop_tokens, *defaults.pop("stop_tokens", ())))
        defaults.pop("max_new_tokens", None)
        served[name] = Served(chats[name], stops, defaults, system.weights())

    window = models["base"].config.max_position_embeddings
    capacity = min(config.context or 4096, window)
    scheduler = Scheduler(models, slots=config.slots, capacity=capacity, queue=config.queue, prefill=config.prefill)
    server = Server(scheduler, served, key=key, local=local, seconds=config.timeout)
    settings = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": int(config.grace) + 5}
    web = uvicorn.Config(server.app, host=config.host, port=config.port, **settings)
    listener = web.bind_socket()
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # A client that no longer reads loses its connection.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * config.timeout))

    class Graceful(uvicorn.Server):
        def handle_exit(self, *signal) -> None:
            threading.Thread(target=scheduler.close, args=(config.grace,)).start()
            super().handle_exit(*signal)

    print(DISCLAIMER)
    print(
        f"{', '.join(models)} at http://{config.host}:{config.port}, {config.slots} answers of up to {capacity} tokens"
    )
    with suppress(KeyboardInterrupt):  # Ctrl-C is how a server ends.
        Graceful(web).run(sockets=[listener])


def name_of(folder: str) -> str:
    """`experts` for runs/demo/experts/adapter."""
    path = Path(folder).resolve()
    return path.parent.name if path.name == "adapter" else path.name


def with_adapter(model, folder: str, uniform_routing: bool):
    """The model with an adapter on it; both share the weights of the base."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    load_adapter(copied, folder, uniform_routing=uniform_routing)
    pack_adapters(copied)
    return copied.eval()


if __name__ == "__main__":
    run_recipe(main, Config)
