"""Stage 1's mixture: shares of tokens, repetition, and completions that are plain running text."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pedgpt.data import Conversation, Message, as_completion, mix
from pedgpt.data.hybrid import SURFACE_FORMS


def source_texts(name, lengths):
    """Text i of a source, recognisable by its first token."""
    base = {"domain": 1000, "general": 2000, "instructions": 3000}[name]
    return [[base + i] + [7] * (n - 1) for i, n in enumerate(lengths)]


SHARES = {"domain": 0.45, "general": 0.05, "instructions": 0.5}


def make_sources(seed=0):
    rng = random.Random(seed)
    return {name: source_texts(name, [rng.randint(1, 40) for _ in range(n)])
            for name, n in (("domain", 90), ("general", 11), ("instructions", 30))}  # fmt: skip


WEIGHTS = st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any)


@given(st.integers(1, 20_000), st.integers(0, 99), WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_shares_are_within_one_text_of_their_target(total, seed, weights):
    sources = make_sources()
    shares = dict(zip(sources, weights, strict=True))
    mixture = mix(sources, shares, total_tokens=total, seed=seed)
    counted = Counter()
    for text, name in zip(mixture.texts, mixture.sources, strict=True):
        assert text in sources[name]
        counted[name] += len(text)
    assert mixture.tokens == {name: counted[name] for name, weight in shares.items() if weight}
    for name, count in mixture.tokens.items():
        target = total * shares[name] / sum(weights)
        longest = max(map(len, sources[name]))
        assert target - 0.5 <= count < target + longest + 0.5


def test_every_text_is_used_before_any_is_repeated():
    sources = make_sources()
    mixture = mix(sources, SHARES, total_tokens=4000, seed=1)
    for name, texts in sources.items():
        used = Counter(text[0] for text, source in zip(mixture.texts, mixture.sources, strict=True) if source == name)
        times = [used[text[0]] for text in texts]
        assert max(times) - min(times) <= 1
        assert mixture.epochs[name] == pytest.approx(sum(times) / len(texts))
    assert mixture.epochs["instructions"] > 2 and mixture.epochs["domain"] < 1.5
    described = mixture.describe()
    assert "instructions" in described and f"{mixture.epochs['instructions']:.2f} epochs" in described


def test_mixture_depends_on_the_seed_alone():
    first, again, other = (mix(make_sources(), SHARES, total_tokens=3000, seed=seed) for seed in (4, 4, 5))
    assert (first.texts, first.sources) == (again.texts, again.sources)
    assert first.texts != other.texts
    # Sources are mixed, not laid end to end: in each tenth of the stream there is text of both large ones.
    size = len(first.sources) // 10
    for start in range(0, 10 * size, size):
        assert {"domain", "instructions"} <= set(first.sources[start : start + size])


def test_one_sources_draw_does_not_depend_on_the_others():
    sources = make_sources()
    alone = mix({"domain": sources["domain"]}, {"domain": 1}, total_tokens=900, seed=3)
    both = mix(sources, {"domain": 1, "general": 1}, total_tokens=1800, seed=3)
    drawn = Counter(text[0] for text, name in zip(both.texts, both.sources, strict=True) if name == "domain")
    assert drawn == Counter(text[0] for text in alone.texts)


def test_source_without_a_share_is_left_out_even_if_empty():
    mixture = mix({"domain": [[1, 2]], "general": []}, {"domain": 1.0, "general": 0.0}, total_tokens=5, seed=0)
    assert mixture.texts == [[1, 2]] * 3 and mixture.epochs == {"domain": 3.0} and mixture.tokens == {"domain": 6}
    skips_empty = mix({"domain": [[], [1], []]}, {"domain": 1.0}, total_tokens=2, seed=0)
    assert skips_empty.texts == [[1], [1]] and skips_empty.epochs == {"domain": 2.0}


@pytest.mark.parametrize(
    ("sources", "shares", "told"),
    [
        ({"domain": [], "general": [[1]]}, {"domain": 0.25, "general": 0.75}, "domain.*25%.*no text"),
        ({"domain": [[]], "general": [[1]]}, {"domain": 0.5, "general": 0.5}, "domain.*no text"),
        ({"domain": [[1]], "general": [[1]]}, {"domain": -0.5, "general": 1.5}, "negative"),
        ({"domain": [[1]]}, {"domain": 0.0}, "all be 0"),
        ({}, {}, "shares"),
    ],
)
def test_impossible_mixtures_are_errors(sources, shares, told):
    with pytest.raises(ValueError, match=told):
        mix(sources, shares, total_tokens=10, seed=0)


TALK = Conversation(
    (
        Message("system", "你是儿科医生"),
        Message("user", "孩子{发烧}怎么办？"),
        Message("assistant", "多喝水{0}。"),
        Message("user", "要吃药吗？"),
        Message("assistant", "先观察体温。"),
    ),
    "f:1",
)


@pytest.mark.parametrize("form", range(2 * len(SURFACE_FORMS)))
def test_completion_holds_questions_and_answers_and_no_role_tokens(form):
    text = as_completion(TALK, form)
    places = [text.find(message.content) for message in TALK.messages[1:]]
    assert -1 not in places and places == sorted(places)
    assert all(text.count(message.content) == 1 for message in TALK.messages[1:])
    assert TALK.messages[0].content not in text
    assert not any(mark in text for mark in ("<reserved_", "<|im_", "</s>", "assistant", "user", "human", "gpt"))


def test_surface_forms_differ_and_repeat_in_turn():
    forms = [as_completion(TALK, form) for form in range(len(SURFACE_FORMS))]
    assert len(set(forms)) == len(forms) >= 4
    assert as_completion(TALK, len(SURFACE_FORMS) + 1) == forms[1]
