"""Talk to a model, with an adapter if wanted: streaming, several turns.

    python recipes/chat.py --adapter runs/demo/experts/adapter

Text that is pasted at once is one question, with all its lines; /help lists the commands. On a terminal, the arrow keys
edit a line and bring back earlier ones, which are kept only in memory, because medical questions are private.
How to sample is read from the model's generation_config.json where no setting says otherwise.
"""

import re
import select
import sys
from contextlib import suppress
from dataclasses import dataclass, field

from pedgpt.data import Message, StreamDecoder, encode_prompt
from pedgpt.evaluation.system import SystemSettings
from pedgpt.files import nearest, printable
from pedgpt.models import KVCache, generate_steps, generation_defaults
from pedgpt.training import run_recipe, start

DISCLAIMER = "仅供研究演示，不能代替医生。For research only; no substitute for a doctor."
COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the conversation",
    "/system": "TEXT: begin anew, with this system text or, without TEXT, with none",
    "/quit": "end, as Ctrl-D does (Ctrl-C stops an answer)",
}


@dataclass(kw_only=True)
class Config(SystemSettings):
    system: str = ""  # system text
    temperature: float | None = None  # 0 is greedy
    top_k: int | None = None  # sample among this many most probable tokens; 0: all
    top_p: float | None = None  # sample among the most probable tokens of this total
    repetition_penalty: float | None = None  # above 1 makes repeated tokens less likely
    max_new_tokens: int | None = None  # of each answer; unset: what the model's files say, else 256
    max_thinking_tokens: int = 1024  # additional tokens for the reasoning of a thinking model
    stop_strings: list[str] = field(default_factory=list)  # texts that end an answer, beside the format's own tokens
    seed: int = 0  # of the sampling


def main(config: Config) -> None:
    chat = config.load_chat()
    sampling = {"max_new_tokens": 256, **generation_defaults(config.model), **generation_defaults(config.taught)}
    for name in ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens"):
        if (value := getattr(config, name)) is not None:
            sampling[name] = value
    sampling["top_k"] = sampling.get("top_k") or None
    model = config.load_model(start(config.device).device)
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
        written = stream(steps, StreamDecoder(chat.tokenizer, config.stop_strings), sampling["stop_tokens"])
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
