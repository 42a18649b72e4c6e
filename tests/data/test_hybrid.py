"""Stage 1's mixture: the corpus's files; shares, weights and epochs by hand; completions that are plain text."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pedgpt.data import Conversation, Message, TextSource, heldout_files, mix, part_shares, stage_sources
from pedgpt.data.hybrid import SURFACE_FORMS, as_completion
from pedgpt.data.manifest import DOMAIN, GENERAL, INSTRUCTIONS

PARTS = (DOMAIN, GENERAL, INSTRUCTIONS)


def source(name, part=DOMAIN, weight=1.0, epochs=0.0):
    return TextSource(name, part, "conversations" if part == INSTRUCTIONS else "documents", (), weight, epochs)


def ones(*counts):
    """Sizes of documents of one token each, so that any number of tokens can be drawn exactly."""
    return [np.ones(count, int) for count in counts]


def places(mixture, sizes):
    """How often each document of each source was drawn."""
    return np.split(np.bincount(mixture.order, minlength=sum(map(len, sizes))), np.cumsum([*map(len, sizes)])[:-1])


THREE = [source("books"), source("web", GENERAL), source("talks", INSTRUCTIONS)]
SIZES = [np.random.default_rng(0).integers(1, 40, n) for n in (90, 11, 30)]


@given(st.integers(1, 20_000), st.integers(0, 99), st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any))
@settings(max_examples=60, deadline=None)
def test_shares_are_within_one_document_of_their_target(total, seed, weights):
    mixture = mix(THREE, SIZES, dict(zip(PARTS, weights, strict=True)), total_tokens=total, seed=seed)
    for s, sizes, times, weight in zip(THREE, SIZES, places(mixture, SIZES), weights, strict=True):
        if weight == 0:
            assert not times.any() and (s.part, s.name) not in mixture.tokens
            continue
        count = int(times @ sizes)
        assert mixture.tokens[s.part, s.name] == count
        assert mixture.epochs[s.part, s.name] == pytest.approx(count / sizes.sum())
        target = total * weight / sum(weights)
        assert target - 0.5 <= count < target + max(sizes) + 0.5
        assert max(times) - min(times) <= 1  # every document before any again


def test_weights_divide_a_part_by_hand():
    # 50 + 3 x 50 parts of 200 tokens; the rest of the 500 is for the book read three times.
    sources = [source("book", epochs=3), source("guide"), source("atlas", weight=3), source("talks", INSTRUCTIONS)]
    mixture = mix(sources, ones(100, 50, 50, 80), {DOMAIN: 0.5, INSTRUCTIONS: 0.5}, total_tokens=1000, seed=1)
    assert mixture.tokens == {
        (DOMAIN, "book"): 300, (DOMAIN, "guide"): 50, (DOMAIN, "atlas"): 150, (INSTRUCTIONS, "talks"): 500,
    }  # fmt: skip
    assert list(mixture.epochs.values()) == [3.0, 1.0, 3.0, 6.25]
    book, guide, atlas, talks = places(mixture, ones(100, 50, 50, 80))
    assert set(book) == {3} and set(guide) == {1} and set(atlas) == {3} and Counter(talks) == {6: 60, 7: 20}


@pytest.mark.parametrize(
    ("book", "guide", "domain", "talks"),
    [
        ({}, {}, [100, 50], 150),
        ({}, {"weight": 2.0}, [100, 100], 200),
        ({"epochs": 1.5}, {}, [150, 50], 200),
        ({"epochs": 0.25}, {"weight": 0.5}, [25, 25], 50),
        ({"epochs": 2.0}, {"epochs": 1.0}, [200, 50], 250),
        ({"weight": 0.0}, {}, [0, 50], 50),
    ],
)
def test_no_total_uses_the_domain_text_once(book, guide, domain, talks):
    sources = [source("book", **book), source("guide", **guide), source("talks", INSTRUCTIONS)]
    mixture = mix(sources, ones(100, 50, 80), {DOMAIN: 0.5, INSTRUCTIONS: 0.5}, total_tokens=0, seed=0)
    assert list(mixture.tokens.values()) == [*domain, talks]
    times = places(mixture, ones(100, 50, 80))
    assert [int(t.sum()) for t in times] == [*domain, talks] and all(max(t) - min(t) <= 1 for t in times)


def test_no_total_and_uneven_documents_use_each_domain_document_once():
    for share in (0.93, 0.5, 1 / 3, 0.07):
        sources = [source("books"), source("guides"), source("talks", INSTRUCTIONS)]
        shares = {DOMAIN: share, INSTRUCTIONS: 1 - share}
        mixture = mix(sources, SIZES, shares, total_tokens=0, seed=5)
        books, guides, talks = places(mixture, SIZES)
        assert set(books) == set(guides) == {1}
        wanted = (SIZES[0].sum() + SIZES[1].sum()) * (1 - share) / share
        assert wanted - 1 <= talks @ SIZES[2] <= wanted + 41


def test_instructions_alone_are_used_once():
    shares = part_shares(1.0, 9.0, {INSTRUCTIONS})
    mixture = mix(THREE[2:], SIZES[2:], shares, total_tokens=0, seed=3)
    assert mixture.tokens == {(INSTRUCTIONS, "talks"): SIZES[2].sum()} and set(mixture.epochs.values()) == {1.0}
    assert sorted(mixture.order) == list(range(30))


def test_shares_of_the_parts_by_hand():
    assert part_shares(0.5, 9.0, {DOMAIN, GENERAL}) == pytest.approx({DOMAIN: 0.45, GENERAL: 0.05, INSTRUCTIONS: 0.5})
    assert part_shares(0.3, 9.0, {DOMAIN}) == pytest.approx({DOMAIN: 0.7, GENERAL: 0.0, INSTRUCTIONS: 0.3})
    assert part_shares(0.0, 1.0, set(PARTS)) == {DOMAIN: 0.5, GENERAL: 0.5, INSTRUCTIONS: 0.0}
    assert part_shares(1.0, 1.0, set(PARTS)) == {DOMAIN: 0.0, GENERAL: 0.0, INSTRUCTIONS: 1.0}


def test_mixture_depends_on_the_seed_alone_and_is_well_mixed():
    shares = dict(zip(PARTS, (0.45, 0.05, 0.5), strict=True))
    first, again, other = (mix(THREE, SIZES, shares, total_tokens=3000, seed=seed).order for seed in (4, 4, 5))
    assert first.tolist() == again.tolist() != other.tolist()
    for tenth in np.array_split(first, 10):  # not laid end to end
        assert (tenth < 90).any() and (tenth >= 101).any()


def test_the_order_never_changes_across_versions():
    # A run in progress depends on it: these numbers are part of the format.
    mixture = mix([source("a"), source("b")], ones(4, 3), {DOMAIN: 1.0}, total_tokens=9, seed=7)
    assert mixture.order.tolist() == [2, 1, 1, 4, 0, 3, 4, 6, 5]


def test_one_source_s_draw_does_not_depend_on_the_others():
    alone = mix(THREE[:1], SIZES[:1], {DOMAIN: 1.0}, total_tokens=900, seed=3)
    both = mix(THREE, SIZES, {DOMAIN: 1, INSTRUCTIONS: 1, GENERAL: 0}, total_tokens=1800, seed=3)
    assert sorted(alone.order) == sorted(both.order[both.order < 90])


def test_part_without_a_share_is_left_out_even_if_empty_and_empty_documents_are_never_drawn():
    empty = [source("books"), source("web", GENERAL)]
    mixture = mix(empty, [np.array([2]), np.array([], int)], {DOMAIN: 1.0, GENERAL: 0.0}, total_tokens=5, seed=0)
    assert mixture.order.tolist() == [0, 0, 0] and mixture.epochs == {(DOMAIN, "books"): 3.0}
    mixture = mix(empty[:1], [np.array([0, 1, 0])], {DOMAIN: 1.0}, total_tokens=2, seed=0)
    assert mixture.order.tolist() == [1, 1] and mixture.tokens == {(DOMAIN, "books"): 2}


@pytest.mark.parametrize(
    ("sources", "counts", "shares", "told"),
    [
        ([source("a"), source("b", GENERAL)], [0, 1], {DOMAIN: 0.25, GENERAL: 0.75}, "domain text.*25%.*no text"),
        ([source("b", GENERAL)], [1], {DOMAIN: 0.5, GENERAL: 0.5}, "domain text.*50%.*no text"),
        ([source("a", weight=0)], [3], {DOMAIN: 1.0}, "domain text.*100%.*weights in it are 0"),
        # 3 x 40 + 1 x 10 tokens do not go into half of 200; nothing may take what is left of 50.
        ([source("a", epochs=3), source("b", epochs=1), source("c"), source("d", INSTRUCTIONS)], [40, 10, 5, 9],
         {DOMAIN: 0.5, INSTRUCTIONS: 0.5}, "domain text' 100 of 200 tokens.*take 130 .a 3 x 40, b 1 x 10.*change"),
        ([source("a", epochs=2), source("b", weight=0), source("d", INSTRUCTIONS)], [25, 10, 9],
         {DOMAIN: 0.5, INSTRUCTIONS: 0.5}, "domain text' 100 of 200 tokens.*take 50 .a 2 x 25.*a weight"),
    ],
)  # fmt: skip
def test_impossible_mixtures_are_errors(sources, counts, shares, told):
    with pytest.raises(ValueError, match=told):
        mix(sources, ones(*counts), shares, total_tokens=200, seed=0)


def test_description_has_a_line_for_each_source():
    sources = [source("textbook", epochs=2), source("wiki", GENERAL), source("qa", INSTRUCTIONS, 3.0),
               source("chat", INSTRUCTIONS)]  # fmt: skip
    shares = part_shares(0.5, 9.0, set(PARTS))
    lines = mix(sources, ones(900, 500, 400, 800), shares, total_tokens=4000, seed=0).describe().splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "textbook 1,800 tokens 45.0% 2.00 epochs of domain text",
        "wiki 200 tokens 5.0% 0.40 epochs of general text",
        "qa 1,200 tokens 30.0% 3.00 epochs of instructions",
        "chat 800 tokens 20.0% 1.00 epochs of instructions",
    ]
    assert len({line.index(" tokens") for line in lines}) == 1


ROWS = {
    "documents": [{"text": "发热是儿童常见的症状。"}, {"text": "注意补充水分。"}],
    "conversations": [{"question": "孩子发烧怎么办？", "answer": "多喝水。"}],
    "preferences": [{"prompt": "孩子发烧怎么办？", "chosen": "别担心，多喝水。", "rejected": "喝水。"}],
}
FILES = [  # side, table, source, kind, stages
    ("train", "text/pediatric", "textbook", "documents", [1]),
    ("train", "text/pediatric", "graph", "documents", [1]),
    ("train", "text/general_medical", "textbook", "documents", [1]),
    ("train", "text/general", "wiki", "documents", [1]),
    ("train", "tasks/medkqa", "graph", "conversations", [1, 4]),
    ("train", "generalist/chat", "chat", "conversations", [2, 1]),
    ("train", "tasks_sample", "graph", "conversations", [2]),
    ("train", "preferences", "pairs", "preferences", [3]),
    ("heldout", "text/pediatric", "textbook", "documents", [1]),
    ("heldout", "text/general", "wiki", "documents", [1]),
]


@pytest.fixture
def folder(tmp_path):
    """A small corpus with its manifest."""
    entries = []
    for side, table, name, kind, stages in FILES:
        path = f"{side}/{table}/{name}-00000.jsonl"
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS[kind]).encode()
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
        entries.append({"path": path, "side": side, "table": table, "source": name, "kind": kind, "stages": stages,
                        "rows": len(ROWS[kind]), "sha256": hashlib.sha256(data).hexdigest()})  # fmt: skip
    sources = {name: {"weight": 1.0, "epochs": 0.0} for name in ("textbook", "wiki", "chat", "pairs")}
    sources |= {"graph": {"weight": 2, "epochs": 1.5, "licence": "CC0"}}
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "files": entries, "sources": sources}))
    return tmp_path


def test_the_manifest_says_what_stage_1_reads(folder):
    def at(*paths):
        return tuple(str(folder / "train" / path) for path in paths)

    assert stage_sources(folder) == [
        TextSource("graph", DOMAIN, "documents", at("text/pediatric/graph-00000.jsonl"), 2.0, 1.5),
        TextSource("textbook", DOMAIN, "documents",
                   at("text/pediatric/textbook-00000.jsonl", "text/general_medical/textbook-00000.jsonl"), 1.0, 0.0),
        TextSource("wiki", GENERAL, "documents", at("text/general/wiki-00000.jsonl"), 1.0, 0.0),
        TextSource("chat", INSTRUCTIONS, "conversations", at("generalist/chat/chat-00000.jsonl"), 1.0, 0.0),
        TextSource("graph", INSTRUCTIONS, "conversations", at("tasks/medkqa/graph-00000.jsonl"), 2.0, 1.5),
    ]  # fmt: skip
    heldout = str(folder / "heldout/text/pediatric/textbook-00000.jsonl")
    assert heldout_files(folder, "text/pediatric") == [heldout] and heldout_files(folder, "tasks/medkqa") == []


def edited(change):
    def apply(folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return apply


def entry(**values):
    return edited(lambda manifest: manifest["files"][0].update(values))


BOOK = "train/text/pediatric/textbook-00000.jsonl"
FAULTS = {
    "none": (lambda f: (f / "manifest.json").unlink(), "no such file; expected the folder of a corpus"),
    "broken": (lambda f: (f / "manifest.json").write_text("{"), "Expecting property name"),
    "list": (lambda f: (f / "manifest.json").write_text("[]"), "list indices must be integers"),
    "older": (edited(lambda m: m.update(version=0)), "version is 0, expected 1; build the corpus again"),
    "no_files": (edited(lambda m: m.pop("files")), "KeyError('files')"),
    "no_source": (edited(lambda m: m["sources"].pop("wiki")), "KeyError('wiki')"),
    "weight": (edited(lambda m: m["sources"]["wiki"].update(weight="two")), "could not convert string to float: 'two'"),
    "table": (entry(table="text/other"), "KeyError('text/other')"),
    "missing": (lambda f: (f / BOOK).unlink(), BOOK),
    "sha256": (entry(sha256="0" * 64), "expected 000000000000…: it was changed since"),
    "changed": (lambda f: (f / BOOK).write_text((f / BOOK).read_text().replace("儿童", "幼儿")), f"{BOOK}: found SHA"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_manifest_that_is_damaged_or_does_not_fit_its_files_is_refused(folder, fault):
    break_it, told = FAULTS[fault]
    break_it(folder)
    with pytest.raises(ValueError) as error:
        stage_sources(folder)
    assert str(error.value).startswith(f"{folder}/manifest.json: ")
    assert told in str(error.value) and "build" in str(error.value)


def test_a_changed_held_out_file_is_refused(folder):
    (folder / "heldout/text/pediatric/textbook-00000.jsonl").write_text("")
    with pytest.raises(ValueError, match="heldout/text/pediatric/textbook-00000.jsonl: found SHA-256 e3b0c44298fc"):
        heldout_files(folder, "text/pediatric")


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
