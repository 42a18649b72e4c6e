"""Decoding against the uncached model, transformers' generate and hand-made distributions."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from pedgpt.models import generate, generate_steps, generation_defaults, save_model
from pedgpt.models.cache import KVCache
from pedgpt.models.generation import sample

KINDS = ["llama", "qwen3", "baichuan-rope", "baichuan-alibi"]
PROMPTS = [[5], [17, 3, 99, 4, 61], [130, 0, 0, 7, 12, 55, 8, 9, 101], [0, 2, 0]]


@torch.no_grad()
def uncached(model, prompt, answer):
    """The logits of each token of an answer, from prompt and answer at once: their maxima are a greedy answer."""
    return model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 1, 5], [12], [3, 4, 5]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_match_uncached(make_model, random_tokens, kind, chunks):
    model, tokens = make_model(kind), random_tokens(2, 12)
    cache = KVCache(model, 2, 13)
    with torch.no_grad():
        cached = torch.cat([model(part, cache=cache) for part in tokens.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(cached, model(tokens), atol=1e-5, rtol=0)
    assert cache.ids == tokens.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_cached_bfloat16_is_as_near_the_truth_as_uncached(make_model, random_tokens, kind):
    model, tokens = make_model(kind).bfloat16(), random_tokens(4, 40)
    cache = KVCache(model, 4, 40)
    with torch.no_grad():
        cached = torch.cat([model(part, cache=cache) for part in tokens.split([9, *[1] * 31], dim=1)], dim=1)
        uncached = model(tokens)
        truth = model.float()(tokens)
    assert cached.dtype == torch.bfloat16
    error, budget = ((value.float() - truth).square().mean().sqrt() for value in (cached, uncached))
    assert 0 < error <= 1.1 * budget  # other shapes of product round otherwise, not more


def test_cache_works_while_gradients_are_recorded(make_model, random_tokens):
    """Checkpointed blocks would be run without the cache."""
    model, tokens = make_model("llama"), random_tokens(1, 6)
    model.activation_checkpointing = "block"
    cache = KVCache(model, 1, 6)
    with torch.no_grad():
        expected = model(tokens)
        model(tokens[:, :5], cache=cache)
    torch.testing.assert_close(model(tokens[:, 5:], cache=cache), expected[:, 5:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [*KINDS, "qwen2"])
def test_greedy_matches_uncached_token_by_token(make_model, kind):
    model = make_model(kind)
    answers = [generate(model, [prompt], max_new_tokens=15)[0] for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer == uncached(model, prompt, answer).argmax(-1).tolist() and len(answer) == 15
    assert len({token for answer in answers for token in answer}) > 3


@pytest.mark.parametrize(("kind", "penalty"), [("llama", 1.0), ("qwen2", 1.0), ("qwen3", 1.0), ("llama", 1.3)])
def test_greedy_matches_transformers_generate_for_100_tokens(make_model, tmp_path, kind, penalty):
    """One prompt alone where there is a penalty, otherwise all of them, padded on the left in one batch."""
    model = make_model(kind)
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = PROMPTS if penalty == 1 else [PROMPTS[2]]  # transformers would penalise the padding's id too
    width = max(map(len, batch))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
    expected = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0,
        repetition_penalty=penalty,
    )  # fmt: skip
    got = generate(model, batch, max_new_tokens=100, repetition_penalty=penalty)
    assert got == expected[:, width:].tolist()
    assert {len(answer) for answer in got} == {100}


@pytest.mark.parametrize(("kind", "penalty"), [*zip(KINDS, [1.0, 1.4, 1.0, 0.8], strict=True)])
def test_ragged_batch_matches_one_prompt_at_a_time(make_model, kind, penalty):
    """Padding is neither attended to nor counted as a token already seen."""
    model = make_model(kind)
    together = generate(model, PROMPTS, max_new_tokens=20, repetition_penalty=penalty)
    assert together == [generate(model, [p], max_new_tokens=20, repetition_penalty=penalty)[0] for p in PROMPTS]
    assert [len(answer) for answer in together] == [20] * 4


@pytest.mark.parametrize("kind", ["llama", "baichuan-alibi"])
def test_ragged_logits_match_one_prompt_at_a_time(make_model, kind, monkeypatch):
    """Not only the winner: what is sampled from is the same for a prompt in a batch and alone."""
    model, drawn = make_model(kind), []
    monkeypatch.setattr(
        "pedgpt.models.generation.sample", lambda logits, *_: drawn.append(logits) or torch.full((len(logits),), 7)
    )
    generate(model, PROMPTS, max_new_tokens=4)
    together = torch.stack(drawn)
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            alone = model(torch.tensor([[*prompt, 7, 7, 7]]))[0, -4:]
        torch.testing.assert_close(together[:, row], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "penalty"), [("qwen3", 1.3), ("baichuan-rope", 3.0), ("qwen3", 0.5)])
def test_repetition_penalty_matches_transformers_processor(make_model, kind, penalty, monkeypatch):
    """In the answers, and in the whole distribution: negative logits of tokens seen seldom decide an answer."""
    model, drawn = make_model(kind), []
    monkeypatch.setattr(
        "pedgpt.models.generation.sample", lambda logits, *_: drawn.append(logits) or logits.argmax(-1)
    )
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for prompt in PROMPTS:
        drawn.clear()
        (answer,) = generate(model, [prompt], max_new_tokens=20, repetition_penalty=penalty)
        plain = uncached(model, prompt, answer)
        seen = (torch.tensor([[*prompt, *answer[:i]]]) for i in range(20))
        truth = torch.cat([processor(ids, row[None]) for ids, row in zip(seen, plain, strict=True)])
        torch.testing.assert_close(torch.cat(drawn), truth, atol=3e-5, rtol=0)
        assert answer == truth.argmax(-1).tolist()
    assert answer != plain.argmax(-1).tolist()


def test_sampling_repeats_with_its_seed(make_model):
    model = make_model("llama")
    settings = {"max_new_tokens": 20, "temperature": 1.0}
    first = generate(model, PROMPTS, seed=11, **settings)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert generate(model, PROMPTS, seed=11, **settings) == first
    assert torch.equal(torch.get_rng_state(), state)  # a seed of its own leaves the global generator alone
    assert generate(model, PROMPTS, seed=12, **settings) != first
    assert generate(model, PROMPTS, **settings) != generate(model, PROMPTS, **settings)
    same = generate(model, [PROMPTS[1]] * 3, seed=11, **settings)
    assert same[0] != same[1] != same[2]  # each row draws its own numbers


@pytest.mark.parametrize("restriction", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_narrowest_sampling_is_greedy(make_model, restriction):
    model = make_model("qwen3")
    settings = {"temperature": 1.0, "seed": 0, **restriction}
    greedy = generate(model, PROMPTS, max_new_tokens=15)
    assert generate(model, PROMPTS, max_new_tokens=15, **settings) == greedy


PROBABILITIES = torch.tensor([0.02, 0.5, 0.08, 0.25, 0.15])


@pytest.mark.parametrize(
    ("top_k", "top_p", "support"),
    [
        (None, None, {0, 1, 2, 3, 4}),
        (5, 1.0, {0, 1, 2, 3, 4}),
        (99, None, {0, 1, 2, 3, 4}),
        (1, None, {1}),
        (3, None, {1, 3, 4}),
        (None, 0.3, {1}),
        (None, 0.49, {1}),
        (None, 0.51, {1, 3}),  # the token that crosses top_p stays
        (None, 0.74, {1, 3}),
        (None, 0.76, {1, 3, 4}),
        (None, 0.97, {1, 2, 3, 4}),
        (None, 0.99, {0, 1, 2, 3, 4}),
        (2, 0.6, {1}),  # top_k first: 2/3 and 1/3 remain
        (2, 0.7, {1, 3}),
        (4, 0.9, {1, 3, 4}),
    ],
)
def test_top_k_and_top_p_restrict_the_support(top_k, top_p, support):
    """And inside it, the odds stay as they were. The second row holds the same numbers in another order."""
    order = torch.tensor([3, 4, 0, 1, 2])
    logits = torch.stack([PROBABILITIES.log() + 5, PROBABILITIES[order].log()])
    draws = 4000
    generator = torch.Generator().manual_seed(0)
    ids = sample(logits.repeat_interleave(draws, 0), 1.0, top_k, top_p, generator).view(2, draws)
    expected = torch.where(torch.tensor([i in support for i in range(5)]), PROBABILITIES, 0)
    expected = expected / expected.sum()
    for counted in (ids[0], order[ids[1]]):
        frequencies = torch.bincount(counted, minlength=5) / draws
        assert set(counted.tolist()) == support
        assert ((frequencies - expected).abs() <= 4.5 * (expected * (1 - expected) / draws).sqrt()).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature):
    draws = 20_000
    logits = PROBABILITIES.log().expand(draws, 5)
    ids = sample(logits, temperature, None, None, torch.Generator().manual_seed(0))
    expected = PROBABILITIES ** (1 / temperature) / (PROBABILITIES ** (1 / temperature)).sum()
    frequencies = torch.bincount(ids, minlength=5) / draws
    assert ((frequencies - expected).abs() <= 4.5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_temperature_acts_before_top_p():
    # At temperature 0.5 the odds are 0.25 : 0.0625 : …, so the first token alone holds 0.72.
    ids = sample(PROBABILITIES.log().expand(500, 5), 0.5, None, 0.7, torch.Generator().manual_seed(0))
    assert set(ids.tolist()) == {1}


def test_first_sampled_token_follows_the_models_distribution(make_model):
    model, draws = make_model("baichuan-rope", vocab_size=11), 6000
    with torch.no_grad():
        expected = model(torch.tensor([[4, 2]]))[0, -1].double().div(0.7).softmax(-1)
    answers = generate(model, [[4, 2]] * draws, max_new_tokens=1, temperature=0.7, seed=1)
    frequencies = torch.bincount(torch.tensor(answers)[:, 0], minlength=11) / draws
    assert ((frequencies - expected).abs() <= 4.5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_stop_tokens_end_one_answer_and_not_the_others(make_model):
    model = make_model("llama")
    free = generate(model, PROMPTS, max_new_tokens=30)
    stops = {answer[3 + 4 * row] for row, answer in enumerate(free)}
    expected = []
    for answer in free:
        at = min([i for i, token in enumerate(answer) if token in stops], default=30)
        expected.append(answer[:at])
    lengths = [len(answer) for answer in expected]
    assert len(set(lengths)) > 2 and max(lengths) < 29
    for given in (stops, list(stops), tuple(stops)):
        assert generate(model, PROMPTS, max_new_tokens=30, stop_tokens=given) == expected

    steps = list(generate_steps(model, PROMPTS, max_new_tokens=30, stop_tokens=stops))
    assert len(steps) == max(lengths) + 1  # no step after the last answer has ended
    for row, answer in enumerate(expected):
        column = [step[row] for step in steps]
        end = free[row][len(answer) : len(answer) + 1]  # the stop token itself, once
        assert column == (answer + end + [None] * 30)[: len(steps)]


def test_stop_token_in_the_prompt_does_not_stop(make_model):
    model = make_model("llama")
    free = generate(model, [[5, 6]], max_new_tokens=6)[0]
    unused = next(token for token in range(131) if token not in free)
    prompt = [unused, 5, 6]
    free = generate(model, [prompt], max_new_tokens=6)[0]
    assert unused not in free
    assert generate(model, [prompt], max_new_tokens=6, stop_tokens=[unused]) == [free]


def test_steps_are_the_answers_token_by_token(make_model):
    model = make_model("qwen2")
    answers = generate(model, PROMPTS, max_new_tokens=8, temperature=0.9, seed=3)
    steps = list(generate_steps(model, PROMPTS, max_new_tokens=8, temperature=0.9, seed=3))
    assert [list(column) for column in zip(*steps, strict=True)] == answers
    assert all(type(token) is int for answer in answers for token in answer)


def test_steps_leave_gradient_mode_as_it_was(make_model):
    steps = generate_steps(make_model("llama"), [[1, 2]], max_new_tokens=3)
    next(steps)
    assert torch.is_grad_enabled()


def test_nothing_to_do_gives_nothing(make_model):
    model = make_model("llama")
    assert generate(model, PROMPTS, max_new_tokens=0) == [[], [], [], []]
    assert generate(model, [], max_new_tokens=5) == []
    assert list(generate_steps(model, [], max_new_tokens=5)) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, 131]], {}, "prompt 1 holds an id outside the vocabulary of 131"),
        ([[-1]], {}, "prompt 0 holds an id outside"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens must be at least 0, found -1"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.01}, "top_p"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_errors(make_model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model("llama"), prompts, **{"max_new_tokens": 3, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 1e-38}, "temperature must be 0, .* or at least 1e-20, found 1e-38"),
        ({"repetition_penalty": 1e39}, "not finite for prompts .*repetition_penalty=1e.39 makes them overflow"),
    ],
)
def test_a_setting_that_makes_logits_overflow_is_an_error(make_model, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model("llama"), PROMPTS, max_new_tokens=3, **settings)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_an_error_that_names_the_prompts(make_model, temperature, broken):
    model = make_model("llama")
    settings = {"max_new_tokens": 18, "temperature": temperature, "seed": 0}
    whole = generate(model, [[1, 3], [9]], **settings)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = broken
    with pytest.raises(ValueError, match=r"logits that are not finite for prompts \[1, 2\].*float32"):
        generate(model, [[1, 2], [7, 3], [1, 7], [4]], **settings)
    # A row that has stopped hurts nobody: the one beside it goes on as without it.
    stop = whole[0][0]
    assert stop not in [1, 3, 9, *whole[1][:2]]
    with torch.no_grad():
        model.model.embed_tokens.weight[stop] = broken
    answers = generate(model, [[1, 3], [9]], **{**settings, "max_new_tokens": 2}, stop_tokens=[stop])
    assert answers == [[], whole[1][:2]]


def test_cache_overflow_is_an_error(make_model, random_tokens):
    model = make_model("llama")
    cache = KVCache(model, 2, 8)
    with torch.no_grad():
        model(random_tokens(2, 6), cache=cache)
        with pytest.raises(ValueError, match="have room for 8 tokens each; asked for a batch of 2 up to token 9"):
            model(random_tokens(2, 3), cache=cache)
        with pytest.raises(ValueError, match="asked for a batch of 1 up to token 7"):
            model(random_tokens(1, 1), cache=cache)
        assert len(cache.ids[0]) == 6
        model(random_tokens(2, 2), cache=cache)  # exactly full
    assert len(cache.ids[0]) == 8


def test_a_cache_takes_neither_documents_nor_positions(make_model, random_tokens):
    model, tokens = make_model("baichuan-alibi"), random_tokens(1, 6)
    cache = KVCache(model, 1, 6)
    for name in ("documents", "positions"):
        with pytest.raises(ValueError, match="one text, without positions, documents and branches"):
            model(tokens, **{name: torch.zeros_like(tokens)}, cache=cache)
    assert cache.ids == [[]]


def spell(ids):
    """A made-up tokenizer: ids are letters, every seventh id is silent."""
    return "".join("" if i % 7 == 0 else chr(ord("a") + i % 26) for i in ids)


def test_stop_strings_end_one_answer_and_not_the_others(make_model):
    model = make_model("llama")
    free = generate(model, PROMPTS, max_new_tokens=40)
    texts = [spell(answer) for answer in free]
    stop = texts[1][5:8]  # spans tokens
    answers = generate(model, PROMPTS, max_new_tokens=40, stop_strings=[stop, "?!"], decode=spell)
    for answer, whole, text in zip(answers, free, texts, strict=True):
        cut = next((n for n in range(1, 41) if stop in spell(whole[:n])), 40)
        assert answer == whole[:cut]
        assert (len(answer) < 40) == (stop in text)
    assert len(answers[1]) < 40


@pytest.mark.parametrize("strings", ["。", [""], ["a"]], ids=str)
def test_unusable_stop_strings_are_errors(make_model, strings):
    with pytest.raises(ValueError, match="stop_strings"):
        generate(make_model("llama"), [[1]], max_new_tokens=2, stop_strings=strings)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {"temperature": 0.0, "stop_tokens": (), "repetition_penalty": 1.0}),
        # Baichuan2's own file.
        (
            {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05,
             "max_new_tokens": 2048, "eos_token_id": 2, "user_token_id": 195},
            {"temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05, "max_new_tokens": 2048,
             "stop_tokens": (2,)},
        ),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50, "top_p": 1.0}),
        ({"do_sample": True, "top_k": 0, "eos_token_id": [5, 6]}, {"top_k": None, "stop_tokens": (5, 6)}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
    ],
)  # fmt: skip
def test_generation_config_gives_the_arguments_of_generate(tmp_path, make_model, content, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    found = generation_defaults(tmp_path)
    assert {key: found[key] for key in expected} == expected
    assert "top_k" in found or not content.get("do_sample")
    generate(make_model("llama"), [[1, 2]], **{"max_new_tokens": 3, **found} | {"max_new_tokens": 3})


def test_no_generation_config_asks_for_nothing(tmp_path):
    assert generation_defaults(tmp_path) == {}


@pytest.mark.parametrize(
    "content", [{"do_sample": 1}, {"do_sample": True, "top_p": "x"}, {"eos_token_id": ["2"]}, {"num_beams": 4}, []]
)
def test_unusable_generation_config_is_an_error(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        generation_defaults(tmp_path)
