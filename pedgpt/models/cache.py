"""The keys and values of the tokens that a model has read, so that they are not computed again.

Letters: L layers, B batch, G key-value heads, T new tokens, S tokens held, K head_dim, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels.attention import Layout

BUCKET = 256  # keys; a static cache reads a multiple of them


class KVCache:
    """Keys and values [L, B, G, capacity, K], positions and document ids [B, capacity] of the tokens that were read.

    `extend` is called once a forward pass, `append` once a layer; both return everything held so far. Only `reserve`
    takes more memory. `ids` are the tokens of a cache of one row, as far as `generate` read them. Where `cursor` (int64
    [1], on the device) is set, one token a row is written there, and the first `bucket` keys are returned, of which no
    query sees those after it: nothing depends on `length`, so a CUDA graph can record it.
    """

    def __init__(self, model: Any, batch_size: int, capacity: int) -> None:
        config, weight = model.config, model.model.embed_tokens.weight
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.empty_like(self.keys)
        self.positions = torch.empty(batch_size, capacity, dtype=torch.long, device=weight.device)
        self.documents = torch.empty_like(self.positions)
        self.isolated = False  # whether any token came with a document id
        self.capacity, self.start, self.length, self.bucket = capacity, 0, 0, 0
        self.ids: list[int] = []
        self.cursor: Tensor | None = None

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens in all. What is held stays."""
        if (more := capacity - self.capacity) > 0:
            for name in ("keys", "values", "positions", "documents"):
                held = getattr(self, name)
                setattr(self, name, F.pad(held, (0, more) if held.ndim == 2 else (0, 0, 0, more)))
            self.capacity = capacity

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length, self.isolated = length, self.isolated and length > 0
        del self.ids[length:]

    def share(self, prompt: Sequence[int]) -> int:
        """Forget what differs from `prompt`; returns how many of its tokens are held. The last one never is."""
        common = len(os.path.commonprefix([self.ids, list(prompt[:-1])]))  # which compares any two lists
        self.truncate(common)
        return common

    def extend(self, shape: torch.Size, positions: Any, documents: Tensor | None, slopes: Tensor | None) -> Layout:
        """Make room for tokens [B, T]; returns who sees whom. Without positions they follow the last one held."""
        (rows, count), most = shape, self.positions.shape
        if rows != most[0] or self.length + count > most[1]:
            asked = f"asked for a batch of {rows} up to token {self.length + count}"
            raise ValueError(f"the cache holds {most[0]} x {most[1]} tokens; {asked}")
        if documents is None and self.isolated:
            raise ValueError("the cache holds document ids; pass `documents` for the new tokens too")
        if positions is None:
            positions = torch.arange(count, device=self.positions.device).expand(shape)
            positions = positions + self.positions[:, self.length - 1 : self.length] + 1 if self.length else positions
        if self.cursor is None:
            self.start, self.length = self.length, self.length + count
        self.isolated = documents is not None
        places = self._write(self.positions, 1, positions)
        ids = self._write(self.documents, 1, positions * 0 if documents is None else documents)
        first = self.start if self.cursor is None else self.cursor[0]
        return Layout(positions, places, documents, ids if self.isolated else None, slopes=slopes, first=first)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values [B, G, T, K]; returns all [B, G, S, K]."""
        return self._write(self.keys[layer], 2, keys), self._write(self.values[layer], 2, values)

    def _write(self, held: Tensor, axis: int, new: Tensor) -> Tensor:
        """Store what is new, along the axis of the tokens; returns what is read from now on."""
        if self.cursor is not None:
            return held.index_copy_(axis, self.cursor, new.to(held.dtype)).narrow(axis, 0, self.bucket)
        held.narrow(axis, self.start, new.shape[axis]).copy_(new)
        return held.narrow(axis, 0, self.length)


class StaticStep:
    """A step of decoding over tensors that stay where they are: `step(tokens, positions[, documents])` [B, 1] → [B, V].

    On CUDA it is recorded as a graph and replayed, once for each number of keys that is read. Python then runs once a
    graph, so nothing in the step may depend on what it computes.
    """

    def __init__(self, step: Callable[..., Tensor], cache: KVCache) -> None:
        self.step, self.cache, self.bucket = step, cache, 0
        self.cursor, self.records = cache.positions.new_zeros(1), cache.positions.is_cuda
        self.inputs: list[Tensor] = []
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        cache = self.cache
        self.inputs = self.inputs or [given.clone() for given in inputs]
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.cursor.fill_(cache.length)
        if cache.length >= self.bucket:  # A quarter more than is held, so that few graphs are recorded.
            self.bucket = min(-(-(5 * cache.length // 4 + 1) // BUCKET) * BUCKET, cache.capacity)
            for held in (cache.keys, cache.values):  # What is read before it is written may be anything but NaN.
                held[:, :, :, cache.length : self.bucket] = 0
            self.graph = self._record() if self.records else None
        if self.graph is not None:
            self.graph.replay()
        else:
            self.logits = self._run()
        cache.length += 1
        return self.logits

    def _run(self) -> Tensor:
        self.cache.cursor, self.cache.bucket = self.cursor, self.bucket
        try:
            return self.step(*self.inputs)
        finally:
            self.cache.cursor = None

    def _record(self) -> torch.cuda.CUDAGraph | None:
        """A graph that leaves its result in `self.logits`; None, now and later, if the step cannot be recorded."""
        mode, main = torch.cuda.get_sync_debug_mode(), torch.cuda.current_stream(self.cursor.device)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.cursor.device)
        side.wait_stream(main)
        try:
            with torch.cuda.stream(side):
                self._run()  # Compiles kernels and takes workspaces, which cannot be recorded.
                torch.cuda.set_sync_debug_mode("error")  # What waits for the device cannot be recorded either.
                self._run()
            torch.cuda.set_sync_debug_mode(mode)
            with torch.cuda.device(self.cursor.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._run()
            return graph
        except RuntimeError:
            self.records = False
            return None
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            main.wait_stream(side)
