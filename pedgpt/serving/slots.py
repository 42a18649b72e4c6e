"""Keys and values of many conversations at once: each has a slot, and slots are read and written independently.

Letters: L layers, B slots, G key-value heads, S tokens of a slot, K head_dim, D hidden.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pedgpt.kernels.attention import Layout
from pedgpt.models.cache import BUCKET, record_graph


class SlotCache:
    """Keys and values [L, B, G, S, K]; slot b holds those of the tokens `ids[b]`, at positions 0, 1, 2 …

    A forward pass reads either a part of one slot's text (`read`) or one token of each of several slots (`step`).
    `Transformer.hidden_states` calls `extend` once and `append` in each layer, as with `models.KVCache`.
    """

    def __init__(self, model: Any, slots: int, capacity: int) -> None:
        config, weight = model.config, model.model.embed_tokens.weight
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # zeros, because NaN would spread
        self.values = torch.zeros_like(self.keys)
        self.ids: list[list[int]] = [[] for _ in range(slots)]
        self.index = torch.arange(capacity, device=weight.device)
        self.rows: list[int] = []  # the slots of the forward pass that runs
        self.start, self.stop = 0, 0  # of the tokens in `read`; the keys used in `step`
        self.places: tuple[Tensor, Tensor] | None = None  # slots and positions of a step's new tokens
        self.records = weight.is_cuda  # steps as graphs, by model and number of keys
        self.graphs: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        self.inputs = torch.zeros(slots, 3, dtype=torch.long, device=weight.device)

    def fork(self, slot: int, prompt: Sequence[int], sources: Iterable[int]) -> int:
        """Let a slot begin with what one of `sources`, read by the same model, shares with the prompt.

        Returns how many tokens; the prompt's last one is never shared, because what follows it must be computed.
        """
        count, _, source = max(
            ((shared(self.ids[one], prompt), one == slot, one) for one in sources), default=(0, 0, slot)
        )
        if source != slot:
            for stored in (self.keys, self.values):
                stored[:, slot, :, :count] = stored[:, source, :, :count]
        self.ids[slot] = list(prompt[:count])
        return count

    def clear(self, slot: int) -> None:
        """Forget a slot's text, and what was computed of it: NaN would reach others that read beyond their own text."""
        self.ids[slot] = []
        self.keys[:, slot] = self.values[:, slot] = 0

    def read(self, model: Any, slot: int, tokens: Sequence[int]) -> Tensor:
        """Read tokens at the end of a slot; the last one's hidden state [1, D]."""
        self.rows, self.places, self.start = [slot], None, len(self.ids[slot])
        self.stop = self.start + len(tokens)
        positions = self.index[None, self.start : self.stop]
        hidden = model.hidden_states(self.index.new_tensor(tokens)[None], positions=positions, cache=self)
        self.ids[slot] += tokens
        return hidden[:, -1]

    def step(self, model: Any, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Read one token at the end of each of the slots `rows`; their hidden states [rows, D].

        On CUDA one graph runs over all slots. In the other slots it writes behind their text, where the next token
        overwrites it before use.
        """
        stop, asked = max(len(self.ids[row]) for row in rows) + 1, dict(zip(rows, tokens, strict=True))
        self.rows = list(range(len(self.ids)) if self.records else rows)
        inputs = [[asked.get(row, 0), len(self.ids[row]), row] for row in self.rows]
        for row, token in asked.items():
            self.ids[row].append(token)
        if not self.records:
            return self._read_tokens(model, self.index.new_tensor(inputs), stop)
        stop = min(BUCKET * math.ceil(stop / BUCKET), len(self.index))
        self.inputs.copy_(torch.tensor(inputs))
        if (key := (id(model), stop)) not in self.graphs:
            found = record_graph(lambda: self._read_tokens(model, self.inputs, stop), self.index.device)
            self.graphs[key] = found or (None, self.keys)
        graph, hidden = self.graphs[key]
        if graph is None:
            hidden = self._read_tokens(model, self.inputs, stop)
        else:
            graph.replay()
        return hidden[list(rows)]

    def _read_tokens(self, model: Any, inputs: Tensor, stop: int) -> Tensor:
        """Hidden states [B, D] of tokens at positions in slots (`inputs` [B, 3]); the first `stop` keys are used."""
        tokens, positions, slots = inputs.unbind(1)
        self.places, self.stop = (slots, positions), stop
        return model.hidden_states(tokens[:, None], positions=positions[:, None], cache=self)[:, -1]

    def extend(self, shape: torch.Size, positions: Tensor, documents: None, slopes: Tensor | None) -> Layout:
        """Who sees whom in this pass: in a step a slot's token sees what the slot holds, and itself."""
        assert documents is None and shape[0] == len(self.rows)
        keys = self.index[None, : self.stop]
        if self.places is None:
            return Layout(positions, keys, slopes=slopes, first=self.start)
        ahead = keys > positions  # what an earlier conversation left there
        return Layout(positions, keys.expand_as(ahead), positions * 0, ahead.long(), slopes=slopes, first=self.stop - 1)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values [B, G, T, K]; returns all that are read, [B, G, S, K]."""
        return self._write(self.keys[layer], keys), self._write(self.values[layer], values)

    def _write(self, stored: Tensor, new: Tensor) -> Tensor:
        first = self.rows[0]
        if self.places is None:
            stored[first, :, self.start : self.stop] = new[0]
            return stored[first : first + 1, :, : self.stop]
        slots, positions = self.places
        stored[slots, :, positions] = new[:, :, 0].to(stored.dtype)
        if self.rows == list(range(first, first + len(self.rows))):  # Slots side by side are read where they lie.
            return stored[first : first + len(self.rows), :, : self.stop]
        return stored[slots, :, : self.stop]


def shared(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens at their beginning a slot's text and a prompt share; the prompt's last one never counts."""
    return len(os.path.commonprefix([list(ids), list(prompt[:-1])]))  # which compares any two lists
