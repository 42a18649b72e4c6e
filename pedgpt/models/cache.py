"""The keys and values of the tokens that a model has read, so that they are not computed again.

Letters: L layers, B rows, G key-value heads, T new tokens, S tokens of a row, K head_dim, D hidden.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels.attention import Layout

BUCKET = 256  # keys; a CUDA graph reads a multiple of them


class KVCache:
    """Keys and values [L, B, G, S, K]: each row is a text of its own and holds the tokens `ids[b]`, at 0, 1, 2 …

    `model.hidden_states(tokens, cache=cache)` adds equally many tokens to all rows; `read` and `step` add tokens to
    chosen rows. Rows may differ in length. To forget the end of a text, delete it from `ids`. Keys and values grow in
    `reserve` only. Where `records` is set, a step is recorded as a CUDA graph, once for each model and each rounded
    number of keys, and replayed without Python. A model whose code looks at computed numbers runs without a graph.
    """

    def __init__(self, model: Any, batch_size: int, capacity: int) -> None:
        config, weight = model.config, model.model.embed_tokens.weight
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # A NaN there would spread.
        self.values = torch.zeros_like(self.keys)
        self.ids: list[list[int]] = [[] for _ in range(batch_size)]
        self.index = torch.arange(max(shape), device=weight.device)  # numbers tokens, rows and heads
        self.rows: Sequence[int] = range(batch_size)  # those of the forward pass that runs
        self.new: list[list[int]] = []  # their new tokens
        self.target: tuple[Any, ...] = ()  # where it writes in the keys and values [B, G, S, K] of a layer
        self.source: tuple[Any, ...] = ()  # what it reads there: rows side by side in place, others as copies
        self.records = weight.is_cuda
        self.bucket = 0  # how many keys a recorded step reads; 0 outside of one
        self.inputs = torch.zeros(batch_size, 2, dtype=torch.long, device=weight.device)  # tokens and their positions
        self.graphs: dict[tuple[Any, int], tuple[Any, Tensor] | None] = {}  # None where it cannot be recorded

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens in each row. What is held stays."""
        if (more := capacity - self.keys.shape[3]) > 0:
            self.keys, self.values = (F.pad(held, (0, 0, 0, more)) for held in (self.keys, self.values))
            self.index = torch.arange(max(self.keys.shape), device=self.index.device)
            self.graphs.clear()

    def share(self, prompt: Sequence[int], row: int, sources: Iterable[int]) -> int:
        """Let a row hold of a prompt's beginning what one of the rows `sources` holds; returns how many tokens.

        The prompt's last token is never among them, because what follows it must be computed.
        """
        held = [(shared(self.ids[one], prompt), one == row, one) for one in sources]
        count, _, source = max(held, default=(0, False, row))
        for stored in (self.keys, self.values):
            stored[:, row, :, count : len(self.ids[row])] = 0  # A step with a longer row reads these; a NaN would stay.
            stored[:, row, :, :count] = stored[:, source, :, :count]
        self.ids[row] = list(prompt[:count])
        return count

    def read(self, model: Any, rows: Sequence[int], tokens: Any, bucket: int = 0) -> Tensor:
        """Add tokens [rows, T], a list or a tensor, to some rows; the hidden states [rows, D] of the last ones."""
        self.rows, self.bucket = rows, bucket
        try:
            return model.hidden_states(torch.as_tensor(tokens, device=self.index.device), cache=self)[:, -1]
        finally:
            self.rows, self.bucket = range(len(self.ids)), 0

    def step(self, model: Any, rows: Collection[int], tokens: Sequence[int]) -> Tensor:
        """Add one token to each of `rows`; their hidden states [rows, D].

        A graph runs over all rows. In the others it writes behind the text, where the next token overwrites it.
        """
        if not self.records:
            return self.read(model, list(rows), [[token] for token in tokens])
        most, capacity = 1 + max(len(self.ids[row]) for row in rows), self.keys.shape[3]
        if max(map(len, self.ids)) >= capacity:
            raise ValueError(f"a row is full: the rows have room for {capacity} tokens each")
        grain = max(BUCKET, 2 ** most.bit_length() // 8)  # At most a quarter more is read, so that graphs are few.
        bucket = min(-(-most // grain) * grain, capacity)
        asked = dict(zip(rows, tokens, strict=True))
        inputs = [[asked.get(row, 0), len(ids)] for row, ids in enumerate(self.ids)]
        self.inputs.copy_(torch.tensor(inputs))
        run = functools.partial(self.read, model, range(len(self.ids)), self.inputs[:, :1], bucket)
        if (key := (model, bucket)) not in self.graphs:
            self.graphs[key] = record_graph(run, self.inputs.device)
        if found := self.graphs[key]:
            found[0].replay()
        hidden = found[1] if found else run()
        for row, token in asked.items():
            self.ids[row].append(token)
        return hidden[list(rows)]

    def extend(self, tokens: Tensor, slopes: Tensor | None) -> Layout:
        """Begin a forward pass over tokens [rows, T]; returns who sees whom. `append` is then called in each layer."""
        rows = list(self.rows)
        count = tokens.shape[1]
        if self.bucket:
            positions, stop, even = self.inputs[:, 1:], self.bucket, False
        else:
            lengths = [len(self.ids[row]) for row in rows]
            positions = self.index.new_tensor(lengths)[:, None] + self.index[:count]
            stop, even = max(lengths) + count, min(lengths) == max(lengths)
            if len(tokens) != len(rows) or stop > self.keys.shape[3]:
                asked = f"asked for a batch of {len(tokens)} up to token {stop}"
                raise ValueError(f"the {len(rows)} rows have room for {self.keys.shape[3]} tokens each; {asked}")
            self.new = tokens.tolist()
        side = slice(rows[0], rows[-1] + 1)
        picked = side if rows == [*range(side.start, side.stop)] else self.index.new_tensor(rows)
        self.source = (picked, slice(None), slice(stop))
        self.target = (picked, slice(None), slice(stop - count, stop))
        if not even:
            groups = self.index[: self.keys.shape[2], None]
            self.target = (self.index[: len(self.ids)][picked, None, None], groups, positions[:, None])
        first = stop - count if even else positions[:, :1, None]
        return Layout(positions, slopes=slopes, first=first, key_positions=self.index[None, :stop])

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values [rows, G, T, K]; returns all that are read, [rows, G, S, K]."""
        for held, new in ((self.keys[layer], keys), (self.values[layer], values)):
            held[self.target] = new.to(held.dtype)
        if layer == len(self.keys) - 1 and not self.bucket:
            for row, ids in zip(self.rows, self.new, strict=True):
                self.ids[row] += ids
        return self.keys[layer][self.source], self.values[layer][self.source]


def shared(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens at their beginning a row's text and a prompt share; the prompt's last one never counts."""
    return len(os.path.commonprefix([list(ids), list(prompt[:-1])]))  # despite its name, of any two lists


def record_graph(run: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
    """A graph of `run` and the tensor that each replay fills; None if it cannot be recorded."""
    mode, main = torch.cuda.get_sync_debug_mode(), torch.cuda.current_stream(device)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side):
            run()  # Compiles kernels and takes workspaces, which cannot be recorded.
            torch.cuda.set_sync_debug_mode("error")  # What waits for the device cannot be recorded either.
            run()
        torch.cuda.set_sync_debug_mode(mode)
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = run()
        return graph, found
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        main.wait_stream(side)
