"""Talk to a model, with an adapter if wanted: streaming, several turns.

    python recipes/chat.py --adapter runs/demo/experts/adapter

Text that is pasted at once is one question, with all its lines; /help lists the commands. On a terminal, the arrow keys
edit a line and bring back earlier ones, which are kept only in memory, because medical questions are private.
How to sample is read from the model's generation_config.json where no setting says otherwise.
"""

import os
import re
import select
import sys
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from pedgpt.adapters import adapter_base, check_base, load_adapter, pack_adapters
from pedgpt.data import FormatSettings, Message, StreamDecoder, encode_prompt, load_tokenizer, taught_folder
from pedgpt.files import nearest, printable
from pedgpt.models import KVCache, generate_steps, generation_defaults, load_model, weights_fingerprint
from pedgpt.training import run_recipe, start

DISCLAIMER = "仅供研究演示，不能代替医生。For research only; no substitute for a doctor."
COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the conversation",
    "/system": "TEXT: begin anew, with this system text or, without TEXT, with none",
    "/quit": "end, as Ctrl-D does (Ctrl-C stops an answer)",
}


@dataclass(kw_only=True)
class Config(FormatSettings):
    model: str = ""  # folder of the model; empty: the one that the adapter was trained on
    adapter: str = ""  # folder of an adapter to attach
    any_base: bool = False  # use the adapter although it was trained on another model
    uniform_routing: bool = False  # equal gates where an adapter of the published code lacks its routers
    system: str = ""  # system text
    temperature: float | None = None  # 0 is greedy
    top_k: int | None = None  # sample among this many most probable tokens; 0: all
    top_p: float | None = None  # sample among the most probable tokens of this total
    repetition_penalty: float | None = None  # above 1 makes repeated tokens less likely
    max_new_tokens: int | None = None  # of each answer; unset: what the model's files say, else 256
    max_thinking_tokens: int = 1024  # additional tokens for the reasoning of a thinking model
    stop_strings: list[str] = field(default_factory=list)  # texts that end an answer, beside the format's own tokens
    seed: int = 0  # of the sampling
    dtype: str = "float32"  # of the weights: float32 or bfloat16
    device: str = "auto"  # auto, cpu or cuda


def main(config: Config) -> None:
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f'dtype must be "float32" or "bfloat16", found {config.dtype!r}')
    if not config.model:
        if not config.adapter:
            raise ValueError("give --model, or --adapter with the model that it names")
        config.model = adapter_base(config.adapter)
        if not os.path.isdir(config.model):
            raise ValueError(f"{config.adapter}: was trained on {config.model}, which is not there; give its --model")
    if config.adapter and not config.any_base:
        check_base(config.adapter, config.model, weights_fingerprint(config.model))
    taught = taught_folder(config.model, config.adapter)
    sampling = {"max_new_tokens": 256, **generation_defaults(config.model), **generation_defaults(taught)}
    for name in ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens"):
        if (value := getattr(config, name)) is not None:
            sampling[name] = value
    sampling["top_k"] = sampling.get("top_k") or None
    device = start(config.device).device
    tokenizer = load_tokenizer(taught)
    chat = config.format(tokenizer)
    model = load_model(config.model, dtype=getattr(torch, config.dtype), device=device)
    tokenizer.check_fits(model.config.vocab_size, config.model)
    if config.adapter:
        load_adapter(model, config.adapter, uniform_routing=config.uniform_routing)
        pack_adapters(model)
    model.eval()
    sampling["stop_tokens"] = {*chat.stop_tokens, *sampling.get("stop_tokens", ())}
    limit = sampling["max_new_tokens"] + (config.max_thinking_tokens if chat.thinks else 0)

    sys.stdin.reconfigure(errors="replace")  # a terminal's backspace may leave half a character behind
    system = config.system
    history: list[Message] = []
    cache = KVCache(model, 1, 0)  # what the model has read is not read again in the next turn
    print(f"{DISCLAIMER}\n(/help, /reset, /system TEXT, /quit)")
    while True:
        try:
            text = read_question()
        except (EOFError, KeyboardInterrupt):
            return print()
        if re.match("/[A-Za-z]", text):
            command, said = (*text.split(maxsplit=1), "")[:2]
            if command == "/quit":
                return
            elif command == "/help":
                print(*(f"{name:8} {meaning}" for name, meaning in COMMANDS.items()), sep="\n")
            elif command not in COMMANDS:
                print(f"({command} is no command; {nearest(command, COMMANDS, 'commands')})")
            else:
                history, system = [], said if command == "/system" else system
                cache = KVCache(model, 1, 0)
                print(f"(a new conversation, {f'the system text is {system!r}' if system else 'without system text'})")
            continue
        if not text:
            continue
        if not sys.stdin.isatty():
            print(f"\n家长> {text}")
        history.append(Message("user", text))
        try:
            prompt = encode_prompt([Message("system", system), *history] if system else history, chat)
        except ValueError as error:  # a template that has no place for a system text, say
            history.pop()
            print(f"({error})")
            continue
        room = model.config.max_position_embeddings - len(prompt)
        if room < 1:
            history.pop()
            print(f"(the conversation has reached the model's {model.config.max_position_embeddings} tokens; /reset)")
            continue
        print("助手> ", end="", flush=True)
        sampling["max_new_tokens"] = min(limit, room)
        steps = generate_steps(model, [prompt], seed=config.seed, cache=cache, **sampling)
        written = stream(steps, StreamDecoder(tokenizer, config.stop_strings), sampling["stop_tokens"])
        answer = chat.read_answer(written)
        if answer.content or not answer.reasoning:
            history.append(answer)
        else:
            history.pop()
            print("(the reasoning did not end, so there is no answer; --max_thinking_tokens gives it more room)")


def read_question() -> str:
    """The next line of the input; on a terminal also the lines that were pasted with it. EOFError: there is none."""
    if not sys.stdin.isatty():
        return input().strip()
    with suppress(ImportError):
        import readline  # noqa: F401  (from now on, input() edits lines and remembers them)
    print()
    lines = [input("家长> ")]
    with suppress(EOFError):
        while select.select([sys.stdin], [], [], 0.05)[0]:  # terminals that do not mark what is pasted
            lines.append(input())
    return "\n".join(lines).strip()


def stream(steps, decoder, stop_tokens) -> str:
    """Print the answer as it is written; Ctrl-C stops the answer."""
    pieces = []
    try:
        for (token,) in steps:
            if token not in stop_tokens:
                pieces.append(decoder.push(token))
                print(printable(pieces[-1]), end="", flush=True)
            if decoder.stopped:
                break
    except KeyboardInterrupt:
        pass
    pieces.append(decoder.finish())
    print(printable(pieces[-1]), flush=True)
    return "".join(pieces).strip()


if __name__ == "__main__":
    run_recipe(main, Config)
