"""Talk to a model, with an adapter if wanted: streaming, several turns.

    python recipes/chat.py --adapter runs/demo/experts/adapter

/reset forgets the conversation, /system TEXT sets the system text, /quit or Ctrl-D ends.
"""

import sys
from dataclasses import dataclass

import torch

from pedgpt.adapters import adapter_base, load_adapter
from pedgpt.data import Message, StreamDecoder, chat_format, encode_prompt, load_tokenizer
from pedgpt.models import generate_steps, load_model
from pedgpt.training import run_recipe, start

DISCLAIMER = "仅供研究演示，不能代替医生。For research only; no substitute for a doctor."


@dataclass
class Config:
    model: str = ""  # folder of the model; empty: the one that the adapter was trained on
    adapter: str = ""  # folder of an adapter to attach
    system: str = ""  # system text
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # sample among so many tokens; 0: all
    top_p: float = 1.0  # sample among the most probable tokens of this total
    repetition_penalty: float = 1.0  # above 1 makes repeated tokens less likely
    max_new_tokens: int = 256  # of each answer
    seed: int = 0  # of the sampling
    chat_format: str = "auto"  # auto, baichuan2, chatml, llama3, or template (the model's own)
    dtype: str = "float32"  # of the weights: float32 or bfloat16
    device: str = "auto"  # auto, cpu or cuda


def main(config: Config) -> None:
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f'dtype must be "float32" or "bfloat16", found {config.dtype!r}')
    if not config.model:
        if not config.adapter:
            raise ValueError("give --model, or --adapter with the model that it names")
        config.model = adapter_base(config.adapter)
    device = start(config.device).device
    tokenizer = load_tokenizer(config.model)
    chat = chat_format(tokenizer, config.chat_format)
    model = load_model(config.model, dtype=getattr(torch, config.dtype), device=device)
    tokenizer.check_fits(model.config.vocab_size, config.model)
    if config.adapter:
        load_adapter(model, config.adapter)
    model.eval()

    for file in (sys.stdin, sys.stdout):
        file.reconfigure(errors="replace")  # a terminal's backspace may leave half a character behind
    system = config.system
    history: list[Message] = []
    print(f"{DISCLAIMER}\n(/reset, /system TEXT, /quit)")
    while True:
        try:
            text = input("\n家长> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if text == "/quit":
            return
        if text == "/reset" or text.startswith("/system"):
            history = []
            system = text.removeprefix("/system").strip() if text.startswith("/system") else system
            continue
        if not text:
            continue
        if not sys.stdin.isatty():
            print(f"\n家长> {text}")
        history.append(Message("user", text))
        prompt = encode_prompt([Message("system", system), *history] if system else history, chat)
        room = model.config.max_position_embeddings - len(prompt)
        if room < 1:
            history.pop()
            print(f"(the conversation has reached the model's {model.config.max_position_embeddings} tokens; /reset)")
            continue
        print("助手> ", end="", flush=True)
        history.append(Message("assistant", stream(model, prompt, tokenizer, chat, config, room)))


def stream(model, prompt, tokenizer, chat, config, room) -> str:
    """Print the answer as it is written; Ctrl-C stops the answer."""
    decoder = StreamDecoder(tokenizer)
    pieces = []
    steps = generate_steps(
        model,
        [prompt],
        max_new_tokens=min(config.max_new_tokens, room),
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        stop_tokens=chat.stop_tokens,
        seed=config.seed,
    )
    try:
        for (token,) in steps:
            if token not in chat.stop_tokens:
                pieces.append(decoder.push(token))
                print(pieces[-1], end="", flush=True)
    except KeyboardInterrupt:
        pass
    pieces.append(decoder.finish())
    print(pieces[-1], flush=True)
    return "".join(pieces).strip()


if __name__ == "__main__":
    run_recipe(main, Config)
