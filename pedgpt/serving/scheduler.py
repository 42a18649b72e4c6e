"""One thread that computes for all clients: requests join and leave between two tokens.

Each turn reads up to `prefill` tokens of prompts, so that a long one does not stall the others, and then one token of
every answer, one model after the other. Base and adapters are models that share the base's weights.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Full
from typing import NamedTuple

import torch
from torch import Tensor

from pedgpt.data import StreamDecoder
from pedgpt.kernels import linear
from pedgpt.models import KVCache, Transformer
from pedgpt.models.cache import shared
from pedgpt.models.generation import decoding_weights, sample


class Piece(NamedTuple):
    """What one token adds to an answer, or its end."""

    text: str  # it may be empty: characters of several tokens, and what may begin a stop string, are held back
    token: int | None = None  # None where the answer ends without a token of its own
    logprob: float = 0.0
    top: Sequence[tuple[int, float]] = ()  # the most probable tokens and their log-probabilities
    finish: str | None = None  # "stop", "length", "error" or "cancelled"


@dataclass(eq=False)
class Request:
    """One answer to compute. The scheduler calls `deliver` with it and each of its pieces, from its own thread."""

    model: str
    prompt: list[int]
    max_tokens: int
    decoder: StreamDecoder
    stop_tokens: frozenset[int]
    deliver: Callable[[Request, Piece], None]
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None  # how many; None: no log-probabilities
    cancelled: bool = False  # set it, and its slot is free before the next token
    slot: int = -1  # -1 until it gets one
    cached: int = 0  # tokens of the prompt that its slot did not have to read
    answer: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    generator: torch.Generator | None = None


class Scheduler:
    """Computes requests for the models by name, `slots` at a time; `queue` more may wait."""

    def __init__(
        self, models: Mapping[str, Transformer], *, slots: int, capacity: int, queue: int, prefill: int
    ) -> None:
        if min(slots, prefill, queue, capacity) < 1:
            raise ValueError(f"{slots=}, {prefill=}, {queue=} and the context, {capacity}, must be at least 1")
        self.models, self.queue, self.prefill, self.capacity = dict(models), queue, prefill, capacity
        first = next(iter(self.models.values()))
        self.cache = KVCache(first, slots, capacity)
        self.head = first.head_weight()  # Adapters do not change it.
        self.owner: list[str | None] = [None] * slots  # the model whose keys a slot holds
        self.free = list(range(slots))  # the slot that has been free for longest comes first
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []
        self.closing = False
        counts = "prompt cached generated stop length error cancelled"  # tokens, and how answers ended
        self.counts = dict.fromkeys(counts.split(), 0)
        self.changed = threading.Condition()
        self.packed = decoding_weights(first, self.head, slots)
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none; queue.Full if there is no room, or no more are taken."""
        with self.changed:
            room = self.queue + len(self.owner) - len(self.active) - len(self.waiting)
            if self.closing or len(requests) > room:
                raise Full
            self.waiting.extend(requests)
            self.changed.notify()

    def close(self, seconds: float) -> None:
        """Take no more requests, finish those that are here, and after `seconds` tell the rest that they end."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(seconds)
        for request in (*self.waiting, *self.active):
            request.cancelled = True

    def _run(self) -> None:
        """Take turns until there is nothing left to do; whatever ends this, every client is told."""
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.waiting or self.active or self.closing)
                    if not (self.waiting or self.active):
                        return
                with torch.no_grad(), self.packed:
                    self._take_turn()
        finally:
            with self.changed:
                self.closing = True
            for request in (*self.active, *self.waiting):
                self._tell(request, Piece("", finish="error"))

    def _take_turn(self) -> None:
        """Read some of the prompts, then a token of each answer."""
        with self.changed:
            left = [one for one in (*self.active, *self.waiting) if one.cancelled]
        for one in left:
            self._tell(one, Piece("", finish="cancelled"))
        room = self.prefill
        while room > 0 and (request := self._next_to_read()) is not None:
            with self._isolated([request]):
                if request.slot < 0:
                    self._take_slot(request)
                held = self.cache.ids[request.slot]  # the row's own list, to which `cache.read` appends
                tokens = request.prompt[len(held) :][:room]
                room -= len(tokens)
                hidden = self.cache.read(self.models[request.model], [request.slot], [tokens])
                if len(held) == len(request.prompt):
                    self._choose([request], hidden)
        for name, model in self.models.items():
            running = sorted((one for one in self.active if one.model == name and one.answer), key=lambda one: one.slot)
            if running:
                with self._isolated(running):
                    slots = [one.slot for one in running]
                    self._choose(running, self.cache.step(model, slots, [one.answer[-1] for one in running]))

    def _next_to_read(self) -> Request | None:
        """The first request whose prompt is not read to its end, or else one that waits, if a slot is free."""
        reading = next((one for one in self.active if not one.answer), None)
        with self.changed:
            if reading is None and self.free and self.waiting:
                self.active.append(reading := self.waiting.popleft())
        return reading

    def _take_slot(self, request: Request) -> None:
        """Give a request the slot that is free longest, first of those whose text is mostly the prompt's beginning."""
        ids, mine = self.cache.ids, [slot for slot, owner in enumerate(self.owner) if owner == request.model]
        again = [one for one in self.free if one in mine and 2 * shared(ids[one], request.prompt) > len(ids[one])]
        request.slot = (again or self.free)[0]
        self.free.remove(request.slot)
        request.cached = self.cache.share(request.prompt, request.slot, mine)
        self.owner[request.slot] = request.model
        self.counts["prompt"] += len(request.prompt)
        self.counts["cached"] += request.cached

    def _choose(self, requests: Sequence[Request], hidden: Tensor) -> None:
        """Choose the next token of each request from its hidden state [requests, D], and deliver it."""
        logits = linear(hidden, self.head).float()
        greedy, finite = logits.argmax(-1).tolist(), logits.isfinite().all(-1).tolist()
        for request, row, token, usable in zip(requests, logits, greedy, finite, strict=True):
            with self._isolated([request]):
                if not usable:
                    raise ValueError("logits that are not finite")
                self._deliver(request, row, token)

    def _deliver(self, request: Request, row: Tensor, token: int) -> None:
        """Add the next token to an answer: the most probable `token`, or one drawn from the logits `row` [V]."""
        if request.temperature or request.repetition_penalty != 1.0:
            token = _drawn(request, row)
        logprob, top = 0.0, []
        if request.top_logprobs is not None:
            logps = row.log_softmax(-1)
            values, ids = logps.topk(request.top_logprobs)
            logprob, top = logps[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True))
        request.answer.append(token)
        self.counts["generated"] += 1
        stops = token in request.stop_tokens
        text = "" if stops else request.decoder.push(token)
        stops = stops or request.decoder.stopped
        finish = "stop" if stops else "length" if len(request.answer) == request.max_tokens else None
        text += request.decoder.finish() if finish else ""
        self._tell(request, Piece(text, token, logprob, top, finish))

    def _tell(self, request: Request, piece: Piece) -> None:
        """Give a client its next piece; the last one frees the slot."""
        if piece.finish:
            with self.changed:
                (self.active if request in self.active else self.waiting).remove(request)
            if request.slot >= 0:
                self.free.append(request.slot)
            self.counts[piece.finish] += 1
        request.pieces.append(piece)
        request.deliver(request, piece)

    @contextmanager
    def _isolated(self, requests: Sequence[Request]) -> Iterator[None]:
        """An error ends these requests and tells their clients; the others go on."""
        try:
            yield
        except Exception as error:
            for request in requests:
                if request in self.active:
                    self.owner[request.slot] = None  # Nobody goes on with what may be damaged.
                    self._tell(request, Piece("", finish="error"))
            with suppress(OSError):
                print(f"{len(requests)} requests failed: {type(error).__name__}", file=sys.stderr, flush=True)


def _drawn(request: Request, logits: Tensor) -> int:
    """A token chosen as the request asks; an equal seed draws from equal logits the same, whoever else is served."""
    if request.repetition_penalty != 1.0:
        seen = torch.tensor(request.prompt + request.answer, device=logits.device)
        found, penalty = logits[seen], request.repetition_penalty
        logits = logits.index_put((seen,), torch.where(found > 0, found / penalty, found * penalty))
    if request.generator is None and request.seed is not None:
        request.generator = torch.Generator(logits.device).manual_seed(request.seed)
    return int(sample(logits[None], request.temperature, request.top_k, request.top_p, request.generator))
