"""The cache: rows of their own lengths, cut back, enlarged, kept between answers, and recorded as a CUDA graph."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pedgpt.adapters import inject_experts, record_gates
from pedgpt.models import cache as cache_module
from pedgpt.models import generate, generate_steps, generation
from pedgpt.models.cache import KVCache

KINDS = ["llama", "qwen2", "qwen3", "baichuan-rope", "baichuan-alibi"]
PROMPTS = [[5], [17, 3, 99, 4, 61], [130, 0, 0, 7, 12, 55, 8, 9, 101], [0, 2, 0]]
WITH_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=WITH_GPU)]


@pytest.fixture
def with_experts(make_model):
    """with_experts(kind): a tiny model whose experts and routers matter, in evaluation mode."""

    def make(kind):
        model = make_model(kind)
        inject_experts(model, rank=3, num_specific_experts=2)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name or "router" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        return model.eval()

    return make


class Replayed:
    """Stands for a CUDA graph where there is none: a replay runs the step and fills the same tensor."""

    def __init__(self, run):
        self.run, self.found = run, run()

    def replay(self):
        self.found.copy_(self.run())


@pytest.fixture
def graphs(monkeypatch):
    """graphs(device, records=True): steps are recorded from now on; the list of what was recorded, None if nothing was.

    On the CPU a stand-in records them.
    """

    def enable(device, records=True):
        made, real = [], cache_module.record_graph

        def record(run, where):
            found = real(run, where) if device == "cuda" else None
            if device == "cpu" and records:
                graph = Replayed(run)
                found = graph, graph.found
            made.append(found)
            return found

        monkeypatch.setattr(cache_module, "record_graph", record)
        monkeypatch.setattr(cache_module, "BUCKET", 8)
        if device == "cpu":
            monkeypatch.setattr(generation, "_recordable", lambda model: True)
        return made

    return enable


@torch.no_grad()
def greedy(model, prompt, answer):
    """The likeliest token at each place of an answer, from prompt and answer at once: a greedy answer itself."""
    return model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_was_cut_back_and_enlarged_goes_on_as_if_new(make_model, random_tokens, kind):
    model, tokens, other = make_model(kind), random_tokens(2, 12), random_tokens(2, 12, seed=1)
    cache = KVCache(model, 2, 9)
    with torch.no_grad():
        model(torch.cat((tokens[:, :5], other[:, 5:9]), dim=1), cache=cache)
        for ids in cache.ids:
            del ids[5:]
        cache.reserve(12)
        found = torch.cat([model(part, cache=cache) for part in tokens[:, 5:].split([4, 1, 2], dim=1)], dim=1)
        torch.testing.assert_close(found, model(tokens)[:, 5:], atol=1e-5, rtol=0)
        assert cache.ids == tokens.tolist() and cache.keys.shape[3] == 12
        for ids in cache.ids:
            ids.clear()
        torch.testing.assert_close(model(other, cache=cache), model(other), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_length_match_each_text_alone(make_model, random_tokens, kind):
    """Several tokens are added to rows that hold unequally many; float64."""
    model, tokens = make_model(kind).double(), random_tokens(3, 30)
    cache, held = KVCache(model, 3, 30), [7, 0, 12]
    with torch.no_grad():
        for row, count in enumerate(held):
            if count:
                cache.read(model, [row], tokens[row : row + 1, :count])
        for count in (1, 6, 1):
            new = torch.stack([tokens[row, at : at + count] for row, at in enumerate(held)])
            found = model(new, cache=cache)
            held = [at + count for at in held]
            for row, at in enumerate(held):
                alone = model(tokens[row : row + 1, :at])[0, -count:]
                torch.testing.assert_close(found[row], alone, atol=1e-10, rtol=0)
    assert cache.ids == [tokens[row, :at].tolist() for row, at in enumerate(held)]


WAYS, ROWS = ("step", "graph", "step that cannot be recorded"), ([0, 1, 2], [3, 0, 2], [1])
# Each pair of a way, a kind and the rows occurs once.
STEPS = [
    (way, kind, ROWS[(i + j) % 3])
    for i, way in enumerate(WAYS)
    for j, kind in enumerate(("qwen2", "qwen3", "baichuan-alibi"))
]


@pytest.mark.parametrize(("way", "kind", "rows"), STEPS, ids=str)
def test_steps_of_some_rows_match_each_text_alone(make_model, random_tokens, graphs, way, kind, rows):
    model, texts, lengths = make_model(kind).double(), random_tokens(4, 40).tolist(), [7, 1, 20, 12]
    made, cache = graphs("cpu", records=way == "graph"), KVCache(model, 4, 40)
    cache.records = way != "step"
    with torch.no_grad():
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            for start in range(0, length, 5):  # in pieces
                hidden = cache.read(model, [row], [text[start : min(start + 5, length)]])
            assert torch.allclose(hidden, model.hidden_states(torch.tensor([text[:length]]))[:, -1], atol=1e-10)
        for _ in range(9):
            hidden = cache.step(model, rows, [texts[row][len(cache.ids[row])] for row in rows])
            for found, row in zip(hidden, rows, strict=True):
                alone = model.hidden_states(torch.tensor([texts[row][: len(cache.ids[row])]]))[0, -1]
                assert torch.allclose(found, alone, atol=1e-10)
    assert len(made) == (0 if way == "step" else 2)  # two numbers of keys


def test_a_row_begins_with_what_another_shares_and_leaves_that_one_alone(make_model):
    model, prompt = make_model("llama").double(), list(range(30))
    cache = KVCache(model, 3, 40)
    with torch.no_grad():
        cache.read(model, [0], [prompt[:20]])
        cache.read(model, [1], [[9] * 40])
        assert cache.share(prompt, 1, range(3)) == 20 and cache.ids[1] == prompt[:20]
        hidden = cache.read(model, [1], [prompt[20:]])
        assert torch.allclose(hidden, model.hidden_states(torch.tensor([prompt]))[:, -1], atol=1e-10)
        assert cache.share(prompt[:20], 2, range(3)) == 19  # the last token is always read
        assert cache.share([*prompt[:5], 7], 0, range(3)) == 5
        hidden = cache.read(model, [0], [[7]])
        assert torch.allclose(hidden, model.hidden_states(torch.tensor([[*prompt[:5], 7]]))[:, -1], atol=1e-10)
        assert cache.share(prompt, 0, []) == 0 and cache.ids[0] == []  # Nobody read it with this model.


def test_a_full_row_is_an_error_also_where_steps_are_recorded(make_model, graphs):
    model, cache = make_model("llama"), KVCache(make_model("llama"), 2, 8)
    graphs("cpu")
    with torch.no_grad():
        cache.read(model, [0], [[5] * 8])
        for cache.records in (False, True):
            with pytest.raises(ValueError, match="have room for 8 tokens each"):
                cache.step(model, [0], [3])
    assert cache.ids == [[5] * 8, []]


def test_a_kept_cache_serves_again_after_numbers_that_are_not_finite(make_model, graphs):
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    graphs("cpu")
    cache = KVCache(model, 1, 1)
    with pytest.raises(ValueError, match="not finite"):
        generate(model, [[5, 9, 3, 4, 6]], max_new_tokens=20, cache=cache)
    (answer,) = generate(model, [[60, 61]], max_new_tokens=20, cache=cache)
    assert answer == greedy(model, [60, 61], answer)


def test_reserve_takes_nothing_where_there_is_room(make_model):
    cache = KVCache(make_model("llama"), 1, 9)
    before = cache.keys
    cache.reserve(9)
    assert cache.keys is before


@pytest.mark.parametrize("kind", KINDS)
def test_answers_with_a_kept_cache_are_those_without(make_model, kind):
    """Turns that continue the last, change its end, leave some of it out, repeat it, or share nothing with it."""
    model, cache = make_model(kind), KVCache(make_model(kind), 1, 1)
    prompt, read = [5, 17, 3], []
    for turn in range(7):
        read.append(cache.share(prompt, 0, [0]))
        answer = generate(model, [prompt], max_new_tokens=20 if turn % 2 else 9, cache=cache)[0]
        assert answer == greedy(model, prompt, answer) and len(answer) > 8
        assert cache.ids == [[*prompt, *answer[:-1]]]
        prompt = {
            0: [*prompt, *answer, 9, 4],  # the next turn
            1: [*prompt, *answer[:5], 8, 8, 8],  # what was said is changed
            2: prompt[:4],  # and taken back
            3: prompt,  # the same again
            4: [99, *prompt],
            5: [*prompt, *answer],  # nothing new is said
        }.get(turn, prompt)
    # Nobody needed the keys of an answer's last token, and of a prompt that is held whole the last is read again.
    assert read == [0, 11, 19, 3, 3, 0, 24]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_turn_is_read_in_parts(make_model, kind):
    """Behind other tokens a turn of 1,100 is three parts, and what follows it is what the whole text gives."""
    model, text = make_model(kind), torch.randint(0, 131, (1160,), generator=torch.Generator().manual_seed(2)).tolist()
    cache, read = KVCache(model, 1, 1), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
    generate(model, [text[:60]], max_new_tokens=1, cache=cache)
    (answer,) = generate(model, [text], max_new_tokens=3, cache=cache)
    assert read == [60, 512, 512, 76, 1, 1] and cache.ids[0] == [*text, *answer[:-1]]
    assert answer == greedy(model, text, answer)


def test_only_what_differs_is_read(make_model, monkeypatch):
    model, read = make_model("llama"), []
    forward = model.hidden_states
    def counted(tokens, **rest):
        read.append(tokens.shape[1])
        return forward(tokens, **rest)

    monkeypatch.setattr(model, "hidden_states", counted)
    cache = KVCache(model, 1, 40)
    prompt = [5, 17, 3, 4, 8]
    answer = generate(model, [prompt], max_new_tokens=4, cache=cache)[0]
    assert read == [5, 1, 1, 1]
    read.clear()
    generate(model, [[*prompt, *answer, 6]], max_new_tokens=1, cache=cache)
    assert read == [2]  # the answer's last token, and the new one


@pytest.mark.parametrize("how", ["closed", "dropped", "interrupted", "interrupted within"])
def test_an_interrupted_answer_leaves_the_cache_usable(make_model, how, monkeypatch):
    model, cache = make_model("qwen3"), KVCache(make_model("qwen3"), 1, 1)
    prompt = [5, 17, 3]
    steps = generate_steps(model, [prompt], max_new_tokens=30, cache=cache)
    said = [next(steps)[0] for _ in range(5)]
    if how == "closed":
        steps.close()
    elif how == "dropped":
        del steps
        gc.collect()
    elif how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            steps.throw(KeyboardInterrupt)
    else:  # after the first layer has stored what the second has not

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(steps)
        handle.remove()
    prompt = [*prompt, *said, 7, 7]
    (answer,) = generate(model, [prompt], max_new_tokens=20, cache=cache)
    assert answer == greedy(model, prompt, answer) and len(answer) == 20


def test_a_kept_cache_serves_one_prompt(make_model):
    model = make_model("llama")
    with pytest.raises(ValueError, match="one prompt at a time, found 2"):
        generate(model, [[1], [2]], max_new_tokens=2, cache=KVCache(model, 2, 9))
    with pytest.raises(ValueError, match="the 2 rows have room for"):
        generate(model, [[1]], max_new_tokens=2, cache=KVCache(model, 2, 9))


# Experts where layers have biases (qwen2) and where three projections are one (baichuan).
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "experts"), [*zip(KINDS, [False, True, False, False, True], strict=True)])
def test_recorded_steps_give_the_same_answers(make_model, with_experts, graphs, kind, experts, device):
    """Ragged and alone, sampled and greedy, over several numbers of keys."""
    model = (with_experts if experts else make_model)(kind).to(device)
    sampled = {"temperature": 0.8, "top_k": 20, "seed": 3, "repetition_penalty": 1.2}
    runs = [(PROMPTS, sampled), ([PROMPTS[1]], {})]
    expected = [generate(model, prompts, max_new_tokens=15, **settings) for prompts, settings in runs]
    made = graphs(device)
    found = [generate(model, prompts, max_new_tokens=24, **settings) for prompts, settings in runs]
    assert [[answer[:15] for answer in answers] for answers in found] == expected
    assert len(made) == 7 and None not in made  # 10 to 32 keys, then 6 to 28, by eight


@pytest.mark.parametrize("device", DEVICES)
def test_a_kept_cache_and_recorded_steps_work_together(make_model, graphs, device):
    model, prompt = make_model("llama").to(device), [5, 17, 3]
    cache, made = KVCache(model, 1, 1), graphs(device)
    for _ in range(3):
        answer = generate(model, [prompt], max_new_tokens=18, cache=cache)[0]
        assert answer == greedy(model.cpu(), prompt, answer) and len(answer) == 18
        model.to(device)
        prompt = [*prompt, *answer, 8]
    assert len(made) == 9


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_asks_the_device_while_it_runs_is_not_recorded(make_model, graphs, device):
    class Undecided(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x) if x.sum().item() > 0 else 2 * self.mlp(x)

    model = make_model("llama").to(device)
    model.model.layers[0].mlp = Undecided(model.model.layers[0].mlp).eval()
    made = graphs(device, records=False)
    (answer,) = generate(model, [[5, 17, 3]], max_new_tokens=20)
    assert answer == greedy(model.cpu(), [5, 17, 3], answer) and len(answer) == 20
    assert made == [None] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_makes_no_tensor_from_the_hosts_numbers_and_reads_none(with_experts, kind):
    """Neither can be recorded: a graph would repeat the number of the first time."""

    class NoHost(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            assert function.overloadpacket not in (
                torch.ops.aten.lift_fresh, torch.ops.aten.lift_fresh_copy, torch.ops.aten._local_scalar_dense,
                torch.ops.aten.nonzero,
            ), function  # fmt: skip
            return function(*arguments, **(keywords or {}))

    model = with_experts(kind)
    cache = KVCache(model, 2, 9)
    with torch.no_grad(), NoHost():
        cache.read(model, range(2), cache.inputs[:, :1], bucket=9)


def test_models_that_are_watched_or_noisy_are_not_recorded(with_experts, monkeypatch):
    model = with_experts("llama")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert generation._recordable(model)
    with record_gates(model):
        assert not generation._recordable(model)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not generation._recordable(model)
    handle.remove()
    model.model.layers[1].mlp.up_proj.train()
    assert not generation._recordable(model)
    model.eval()
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    assert not generation._recordable(model)
