"""Decoding: one token at a time by the model's own forward pass over a cache, sampled or greedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pedgpt.files import read_object
from pedgpt.kernels import linear
from pedgpt.kernels.cpu.products import PackedWeights
from pedgpt.models.cache import KVCache
from pedgpt.models.transformer import Transformer

LAY_OUT_FROM = 16  # new tokens; to lay out the weights or to record a graph takes as long as decoding about five
MIN_TEMPERATURE = 1e-20  # a division by less makes usual logits overflow


@torch.no_grad()
def generate_steps(
    model: Transformer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0,
    top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
    stop_tokens: Collection[int] = (), stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None, seed: int | None = None, cache: KVCache | None = None,
) -> Iterator[list[int | None]]:  # fmt: skip
    """Yield, step by step, the next id of every prompt (a list of ids), its stop token too; None once it has stopped.

    `temperature` 0 is greedy; `top_k` and `top_p` restrict sampling; `repetition_penalty` > 1 divides (or multiplies,
    if negative) the logits of tokens already seen (Keskar et al. 2019); `seed` makes sampling repeatable. A row also
    ends once the text that `decode` (a tokenizer's) makes of its ids holds one of `stop_strings`, whose ids are kept:
    the caller cuts the text. No decoded text holds a special token: give the tokenizer's `stop_ids(stop_strings)` as
    `stop_tokens` too. With a `cache` of one row, what it holds of a single prompt is not read again, and afterwards it
    holds prompt and answer. The model is in evaluation mode. From 16 new tokens on, a CPU with enough memory lays out
    the weights, and a GPU records a graph. ValueError: an empty prompt, a wrong setting, logits that are not finite.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, repetition_penalty, stop_strings, decode)
    if not prompts or max_new_tokens == 0:
        return
    room = max(map(len, prompts)) + max_new_tokens
    if cache is None:
        cache = KVCache(model, len(prompts), room)
    elif len(prompts) > 1:
        raise ValueError(f"a cache that is kept serves one prompt at a time, found {len(prompts)}")
    cache.reserve(room)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=cache.keys.device)
    if repetition_penalty != 1.0:
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
    generator = None if seed is None else torch.Generator(seen.device).manual_seed(seed)
    running = [True] * len(prompts)
    # Only the end of a row's text is decoded to look for stop strings; a token may be a single byte.
    ends, reach = [list[int]() for _ in prompts], max((len(text.encode()) for text in stop_strings), default=0) + 8
    reader = _read(model, prompts, cache, for_many=max_new_tokens >= LAY_OUT_FROM)
    logits = next(reader)
    for count in range(1, max_new_tokens + 1):
        ids = _choose(logits, seen, running, repetition_penalty, temperature, top_k, top_p, generator)
        step = [token if goes_on else None for token, goes_on in zip(ids, running, strict=True)]
        for row, token in enumerate(ids):
            running[row] = running[row] and token not in stop_tokens
            if running[row] and stop_strings and decode:
                ends[row] = [*ends[row][-reach:], token]
                text = decode(ends[row])
                running[row] = not any(stop in text for stop in stop_strings)
        yield step
        if not any(running) or count == max_new_tokens:
            return
        logits = reader.send(ids)


def _check(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_k: int | None,
    top_p: float | None, repetition_penalty: float, stop_strings: Sequence[str], decode: Any,
) -> None:  # fmt: skip
    """ValueError for an argument of `generate_steps` that nothing could be decoded with."""
    warm = f"temperature must be 0, for the most probable token, or at least {MIN_TEMPERATURE}, found {temperature}"
    texts = not isinstance(stop_strings, str) and all(stop_strings)
    for fits, expected in (
        (max_new_tokens >= 0, f"max_new_tokens must be at least 0, found {max_new_tokens}"),
        (temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf, warm),
        (top_k is None or top_k >= 1, f"top_k must be at least 1 or None, found {top_k}"),
        (top_p is None or 0 < top_p <= 1, f"top_p must be in (0, 1] or None, found {top_p}"),
        (0 < repetition_penalty < math.inf, f"{repetition_penalty=} must be finite and positive"),
        (texts, f"{stop_strings=} must be a list of texts, none empty"),
        (not stop_strings or decode, "stop_strings needs decode, which makes text of ids: a tokenizer's decode"),
    ):
        if not fits:
            raise ValueError(expected)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty; give at least one token")
        if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
            raise ValueError(f"prompt {i} holds an id outside the vocabulary of {model.config.vocab_size} tokens")


def _read(
    model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache, for_many: bool
) -> Generator[Tensor, Sequence[int], None]:
    """Logits [B, V] of what follows the prompts, then of what follows the ids [B] that are sent.

    `for_many` says that enough tokens follow for laying out the weights or recording a graph to pay.
    """
    if len(prompts) == 1:
        prompts = [prompts[0][cache.share(prompts[0], 0, [0]) :]]
    lengths, head = [len(prompt) for prompt in prompts], model.head_weight()
    width, rows = max(lengths), range(len(prompts))
    # Padding comes last, where no token of the prompt sees it, and is forgotten.
    tokens = cache.index.new_tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    for part in tokens.split(512 if cache.ids[0] else width, dim=1):  # behind held tokens in parts, for small masks
        hidden = model.hidden_states(part, cache=cache)
    hidden = hidden[list(rows), [length - width - 1 for length in lengths]]
    for ids, length in zip(cache.ids, lengths, strict=True):
        del ids[len(ids) - width + length :]
    chosen = yield linear(hidden, head)
    cache.records = for_many and _recordable(model)
    cache.graphs.clear()  # An adapter may have been switched on or off since.
    packed = decoding_weights(model, head, len(prompts) if for_many else 0)
    while True:
        with packed:
            logits = linear(cache.step(model, rows, chosen), head)
        chosen = yield logits


def decoding_weights(model: Transformer, head: Tensor, rows: int) -> PackedWeights:
    """Copies of the weights, laid out for products of `rows` rows, to be used in a `with` block; no copies for 0."""
    weights = [module.weight for module in model.model.modules() if isinstance(module, nn.Linear)]
    return PackedWeights([*weights, head] if rows else [], rows)


def _recordable(model: Transformer) -> bool:
    """Whether a CUDA graph may stand for the model: in evaluation mode, and nobody watches its modules.

    NOTE: `gate_record` is an attribute of expert layers, set by `adapters.record_gates`, which models may not import.
    """
    signs = ("training", "_forward_hooks", "_forward_pre_hooks", "gate_record")
    watched = any(getattr(module, sign, None) for module in model.modules() for sign in signs)
    return model.model.embed_tokens.weight.is_cuda and not watched


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], *, stop_tokens: Collection[int] = (), **settings: Any
) -> list[list[int]]:
    """The continuation of each prompt, without the prompt and without the stop token; arguments as `generate_steps`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in generate_steps(model, prompts, stop_tokens=stop_tokens, **settings):
        for answer, token in zip(answers, step, strict=True):
            if token is not None and token not in stop_tokens:
                answer.append(token)
    return answers


def generation_defaults(folder: str | Path) -> dict[str, Any]:
    """What generation_config.json asks for, as arguments of `generate`; empty if there is no such file.

    `do_sample` false or absent is temperature 0; with it, HF's own defaults (temperature 1, top_k 50) stand for what
    the file leaves out. `eos_token_id` becomes `stop_tokens`. Raises ValueError that names the file and the key for a
    value of the wrong kind, or for another way of decoding than sampling and greedy.
    """
    file = Path(folder) / "generation_config.json"
    if not file.is_file():
        return {}
    raw = read_object(file.parent, file.name)

    def read(key: str, default: float, least: float = 0, most: float = 2**53) -> Any:
        value = default if raw.get(key) is None else raw[key]
        kind = type(default)
        if type(value) not in (kind, int if kind is float else kind) or not least <= value <= most:
            raise ValueError(f"{file}: {key} is {value!r:.40}, which is of the wrong kind or out of range")
        return kind(value)

    for key, plain in (("num_beams", 1.0), ("penalty_alpha", 0.0), ("typical_p", 1.0), ("min_p", 0.0)):
        if read(key, plain) != plain:
            raise ValueError(f"{file}: {key} is {raw[key]!r}; only greedy decoding and plain sampling are supported")
    given = raw.get("eos_token_id")
    ends = [] if given is None else given if isinstance(given, list) else [given]
    if not all(type(end) is int for end in ends):
        raise ValueError(f"{file}: eos_token_id is {given!r}; expected an id or a list of ids")
    penalty = read("repetition_penalty", 1.0, 1e-9)
    found = {"stop_tokens": tuple(ends), "temperature": 0.0, "repetition_penalty": penalty}
    if read("do_sample", False):
        found |= {"temperature": read("temperature", 1.0), "top_p": read("top_p", 1.0, 1e-9, 1)}
        found["top_k"] = read("top_k", 50) or None
    return found | {"max_new_tokens": limit} if (limit := read("max_new_tokens", 0)) else found


def _choose(
    logits: Tensor, seen: Tensor, running: Sequence[bool], penalty: float, temperature: float, *others: Any
) -> list[int]:
    """Ids [B] from logits [B, V]; `seen` [B, V] marks the tokens so far, and is kept.

    ValueError names the rows that run on and whose scores are not finite.
    """
    logits = logits.float()
    if penalty != 1.0:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    finite = (logits.abs().amax(-1) / (temperature or 1.0)).isfinite()  # NaN is the largest of all
    logits = logits.where(finite[:, None], 0.0)  # Rows that have stopped no longer count.
    chosen = sample(logits, temperature, *others)
    if penalty != 1.0:
        seen.scatter_(1, chosen[:, None], True)
    ids, fine = torch.stack((chosen, finite.long())).tolist()  # together, to wait for the device once
    if rows := [row for row, goes_on in enumerate(running) if goes_on and not fine[row]]:
        causes = f"{temperature=} or repetition_penalty={penalty} makes them overflow, the weights are damaged"
        found = f"logits that are not finite for prompts {rows} (counted from 0)"
        raise ValueError(f"{found}: {causes}, or they are too large for float16; load float32 or bfloat16")
    return ids


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Ids [B] drawn from logits [B, V] (float32)."""
    if temperature < MIN_TEMPERATURE:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k and top_k < logits.shape[-1]:
        lowest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the token that crosses top_p stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
