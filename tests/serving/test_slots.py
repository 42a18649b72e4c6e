"""Slots against the model's own forward pass over each text alone."""

import pytest
import torch

from pedgpt.serving.slots import SlotCache

from .conftest import CAPACITY, tiny

FAMILIES = {
    "rope": {},
    "grouped": {"num_key_value_heads": 1, "qk_norm": True},
    "alibi": {"positions": "alibi", "num_key_value_heads": 4},
}


class Replayed:
    """Stands for a CUDA graph where there is none: a replay runs the step and fills the same tensor."""

    def __init__(self, run):
        self.run, self.found = run, run()

    def replay(self):
        self.found.copy_(self.run())


@pytest.fixture
def make_cache(way, monkeypatch):
    def recorded(run, _):
        graph = Replayed(run)
        return (graph, graph.found) if way == "graph" else None

    def make(model, slots):
        cache = SlotCache(model, slots, CAPACITY)
        cache.records = way != "step"
        return cache

    monkeypatch.setattr("pedgpt.serving.slots.record_graph", recorded)
    monkeypatch.setattr("pedgpt.serving.slots.BUCKET", 8)
    return make


WAYS, ROWS = ("step", "graph", "step that cannot be recorded"), ([0, 1, 2], [3, 0, 2], [1])


# Each pair of a way, a family and the rows occurs once.
@pytest.mark.parametrize(
    ("way", "family", "rows"),
    [(way, family, ROWS[(i + j) % 3]) for i, way in enumerate(WAYS) for j, family in enumerate(FAMILIES)],
    ids=str,
)
def test_hidden_states_match_those_of_each_text_alone(family, rows, make_cache):
    model = tiny(**FAMILIES[family]).double()
    cache, texts = make_cache(model, 4), torch.randint(0, 300, (4, 40)).tolist()
    lengths = [7, 1, 20, 12]
    with torch.no_grad():
        for slot, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            for start in range(0, length, 5):  # in pieces
                hidden = cache.read(model, slot, text[start : min(start + 5, length)])
            assert torch.allclose(hidden, model.hidden_states(torch.tensor([text[:length]]))[:, -1], atol=1e-10)
        for _ in range(9):
            hidden = cache.step(model, rows, [texts[row][len(cache.ids[row])] for row in rows])
            for found, row in zip(hidden, rows, strict=True):
                alone = model.hidden_states(torch.tensor([texts[row][: len(cache.ids[row])]]))[0, -1]
                assert torch.allclose(found, alone, atol=1e-10)


def test_a_slot_begins_with_what_another_shares_and_leaves_that_one_alone():
    model, prompt = tiny().double(), list(range(30))
    cache = SlotCache(model, 3, CAPACITY)
    with torch.no_grad():
        cache.read(model, 0, prompt[:20])
        cache.read(model, 1, [9] * 40)
        assert cache.fork(1, prompt, range(3)) == 20 and cache.ids[1] == prompt[:20]
        hidden = cache.read(model, 1, prompt[20:])
        assert torch.allclose(hidden, model.hidden_states(torch.tensor([prompt]))[:, -1], atol=1e-10)
        assert cache.fork(2, prompt[:20], range(3)) == 19  # the last token is always read
        assert cache.fork(0, [*prompt[:5], 7], range(3)) == 5
        hidden = cache.read(model, 0, [7])
        assert torch.allclose(hidden, model.hidden_states(torch.tensor([[*prompt[:5], 7]]))[:, -1], atol=1e-10)
