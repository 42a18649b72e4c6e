"""Token stores on disk and the rows read from them: whole documents, exact resumption, bounded memory."""

import json
import random
import re
import shutil
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pedgpt.data import (
    PackedRows,
    TextSource,
    TokenStore,
    discards_tokens,
    load_tokenizer,
    mix,
    part_shares,
    read_conversations,
    read_documents,
    train_tokenizer,
    write_tokens,
)
from pedgpt.data.hybrid import SURFACE_FORMS, as_completion
from pedgpt.data.manifest import DOMAIN, INSTRUCTIONS
from pedgpt.data.readers import detect_kind, iter_records
from pedgpt.training import BatchPlan

SAMPLE = Path(__file__).parents[2] / "recipes" / "sample_corpus"
BOS, EOS = 1, 2


class Counting:
    """A tokenizer whose text "7+3" is the tokens 7, 8, 9."""

    def __init__(self, vocab_size=65_536, eos_id=EOS, prefix=()):
        self.vocab_size, self.eos_id, self.document_prefix = vocab_size, eos_id, list(prefix)
        self.encoded = 0

    def description(self):
        return "counting"

    def encode_batch(self, texts):
        self.encoded += len(texts)
        pairs = [tuple(map(int, text.split("+"))) for text in texts]
        return [list(range(first, first + count)) for first, count in pairs]


def documents_of(folder, *files):
    """A file of documents for each list of (first token, count), as a source each."""
    sources = []
    for number, pairs in enumerate(files):
        path = Path(folder) / f"{number}.jsonl"
        path.write_text("".join(f'{{"text": "{first}+{count}"}}\n' for first, count in pairs), encoding="utf-8")
        sources.append(TextSource(f"s{number}", DOMAIN, "documents", (str(path),)))
    return sources


def store_of(folder, sources, tokenizer=None, **settings):
    """Write, and open, the store of these sources."""
    done = sum(write_tokens(Path(folder) / "store", sources, tokenizer or Counting(), **settings))
    return TokenStore(Path(folder) / "store"), done


def parts(row):
    """(tokens, labels) of each document of a row."""
    return [(tuple(one.tokens), tuple(one.labels)) for one in row]


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(1, 40), st.sampled_from([None, EOS]),
    st.sampled_from([(), (BOS,)]), st.data(),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_documents_come_out_whole_once_in_some_row(counts, row_length, eos, prefix, data):
    order = data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=40))
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(100 * (i + 1), count) for i, count in enumerate(counts)]
        store, done = store_of(folder, documents_of(folder, pairs[:3], pairs[3:]), Counting(9000, eos, prefix))
        assert done == len(counts) == sum(store.counts)
        rows = PackedRows(store, np.array(order), row_length)
        found = [rows.row(i) for i in range(len(rows))]
    expected = Counter()
    for i in order:
        first, count = pairs[i]
        stream = list(prefix) * (count > 0) + list(range(first, first + count)) + [eos] * (eos is not None)
        for start in range(0, len(stream) - 1, row_length):
            piece = stream[start : start + row_length + 1]
            expected[tuple(piece[:-1]), tuple(piece[1:])] += 1
    assert Counter(part for row in found for part in parts(row)) == expected
    for row in found:
        assert 0 < sum(len(one.tokens) for one in row) == sum(len(one.labels) for one in row) <= row_length
    total = sum(len(one.tokens) for row in found for one in row)
    assert rows.utilization == pytest.approx(total / max(1, len(found) * row_length))


@pytest.mark.parametrize(("vocab_size", "bytes_each"), [(65_536, 2), (65_537, 4), (125_696, 4)])
def test_a_token_takes_two_bytes_where_the_vocabulary_allows(tmp_path, vocab_size, bytes_each):
    store, _ = store_of(tmp_path, documents_of(tmp_path, [(vocab_size - 3, 3)]), Counting(vocab_size))
    assert store.tokens.tolist() == [vocab_size - 3, vocab_size - 2, vocab_size - 1, EOS]
    assert (tmp_path / "store" / "tokens.bin").stat().st_size == 4 * bytes_each
    (one,) = PackedRows(store, np.array([0]), 9).row(0)
    assert (one.tokens, one.labels) == ([vocab_size - 3, vocab_size - 2, vocab_size - 1],
                                        [vocab_size - 2, vocab_size - 1, EOS])  # fmt: skip


def test_a_store_of_nothing_has_no_rows(tmp_path):
    store, done = store_of(tmp_path, [])
    rows = PackedRows(store, np.arange(0), 8)
    assert (done, len(rows), rows.utilization, store.sizes(), store.parts()) == (0, 0, 0.0, [], set())
    blank = documents_of(tmp_path, [], [(5, 1)])
    store, _ = store_of(tmp_path, blank)
    assert store.counts == [0, 1] and [s.tolist() for s in store.sizes()] == [[], [1]] and store.parts() == {DOMAIN}


def test_rows_are_well_used_on_realistic_lengths(tmp_path):
    draw = random.Random(0)
    for number, (row_length, median, spread) in enumerate(((4096, 300, 1.2), (512, 90, 0.8), (2048, 3000, 1.0))):
        pairs = [(3, min(50_000, int(draw.lognormvariate(0, spread) * median) + 1)) for _ in range(2000)]
        (folder := tmp_path / str(number)).mkdir()
        store, _ = store_of(folder, documents_of(folder, pairs))
        rows = PackedRows(store, np.arange(2000), row_length)
        assert rows.utilization == sum(count for _, count in pairs) / (len(rows) * row_length) >= 0.99


def test_rows_of_the_sample_corpus_are_well_used(tmp_path):
    """Its text, conversations, and triples as short sentences, as build_corpus.py makes such of them too."""
    triples = iter_records(SAMPLE / "knowledge_graph.tsv", "triples")
    facts = [f"{fact.head}的{fact.relation}：{fact.tail}。" for fact in triples]
    (tmp_path / "facts.jsonl").write_text("".join(f'{{"text": "{fact}"}}\n' for fact in facts), encoding="utf-8")
    kinds = {path: detect_kind(path) for path in (*sorted(SAMPLE.glob("*.jsonl")), tmp_path / "facts.jsonl")}
    parts = {"documents": DOMAIN, "conversations": INSTRUCTIONS}
    sources = [
        TextSource(path.stem, parts[kind], kind, (str(path),)) for path, kind in kinds.items() if kind in parts
    ]
    texts = [row.text for path, kind in kinds.items() if kind == "documents" for row in read_documents(path)]
    tokenizer = train_tokenizer(texts, vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>"])
    store, done = store_of(tmp_path, sources, tokenizer)
    assert set(kinds.values()) == {"documents", "conversations", "preferences"}
    assert done == sum(store.summary.rows.values()) == sum(store.counts) > 1000
    for total in (0, 320_000):
        mixture = mix(store.sources, store.sizes(), part_shares(0.5, 9.0, store.parts()), total_tokens=total, seed=0)
        for row_length in (256, 384, 512):
            rows = PackedRows(store, mixture.order, row_length)
            assert rows.utilization >= 0.99 and len(rows) > 100


def test_conversations_take_a_form_by_their_number_and_the_seed(tmp_path):
    path = tmp_path / "talks.jsonl"
    rows = [{"question": f"第{i}个问题？", "answer": "多喝水。"} for i in range(700)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    sources = [TextSource("talks", INSTRUCTIONS, "conversations", (str(path),))]
    tokenizer = train_tokenizer(["第个问题多喝水"], vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])

    def forms(seed):
        store, _ = store_of(tmp_path, sources, tokenizer, seed=seed)
        texts = [tokenizer.decode(store.tokens[a:b].tolist()) for a, b in zip(store.offsets, store.offsets[1:])]  # noqa: B905
        known = [[as_completion(talk, form) for form in range(len(SURFACE_FORMS))] for talk in read_conversations(path)]
        return [names.index(text) for names, text in zip(known, texts, strict=True)]

    first = forms(0)
    assert first == forms(0) != forms(1)
    assert all(70 <= count <= 135 for count in Counter(first).values()) and len(set(first)) == len(SURFACE_FORMS)


def test_skipped_rows_are_counted_and_remembered(tmp_path):
    path = tmp_path / "0.jsonl"
    path.write_text('{"text": "5+2"}\n{"title": "x"}\n\n{"text": "9+1"}\n', encoding="utf-8")
    sources = [TextSource("s", DOMAIN, "documents", (str(path),))]
    with pytest.raises(ValueError, match="0.jsonl:2: missing field"):
        store_of(tmp_path, sources)
    assert not (tmp_path / "store").exists()
    for expected in (2, 0):  # written, and found
        store, done = store_of(tmp_path, sources, on_bad_row="skip")
        assert done == expected and store.summary.rows == {str(path): 2}
        assert "1 skipped, missing field: " in store.summary.describe() and store.tokens.tolist() == [5, 6, 2, 9, 2]


def test_a_store_is_used_again_exactly_if_nothing_it_depends_on_has_changed(tmp_path):
    sources = documents_of(tmp_path, [(5, 3), (9, 2)])
    settings = {"sources": sources, "tokenizer": Counting(), "seed": 0, "on_bad_row": "error"}

    def made(**changes):
        chosen = {**settings, **changes}
        chosen["tokenizer"].encoded = 0
        store, done = store_of(tmp_path, **chosen)
        assert done == chosen["tokenizer"].encoded
        return done

    def change(**values):
        return [TextSource(**{**vars(sources[0]), **values})]

    assert made() == 2 and made() == 0
    other = Counting()
    other.description = lambda: "other"
    for changes in (
        {"seed": 1}, {"on_bad_row": "skip"}, {"tokenizer": other}, {"tokenizer": Counting(eos_id=3)},
        {"tokenizer": Counting(prefix=[1])}, {"sources": change(weight=2.0)}, {"sources": change(epochs=2.0)},
        {"sources": change(name="other")}, {"sources": [*sources, *change(name="again")]},
    ):  # fmt: skip
        assert made(**changes) > 0 and made(**changes) == 0
        assert made() == 2
    path = Path(sources[0].paths[0])
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace("9+2", "9+4"), encoding="utf-8")
    assert made() == 2 and TokenStore(tmp_path / "store").tokens.tolist()[-3:] == [11, 12, EOS]
    path.write_text(before, encoding="utf-8")
    assert made() == 2 and made() == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.jsonl", "store"]  # nothing aside


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


DAMAGE = {
    "tokens": lambda f: cut(f / "tokens.bin"),
    "offsets": lambda f: cut(f / "offsets.bin"),
    "no_tokens": lambda f: (f / "tokens.bin").unlink(),
    "no_json": lambda f: (f / "store.json").unlink(),
    "half_json": lambda f: cut(f / "store.json"),
    "other_json": lambda f: (f / "store.json").write_text("{}"),
    "nothing": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_refused_and_made_again(tmp_path, damage):
    sources = documents_of(tmp_path, [(5, 3), (9, 2)])
    whole, _ = store_of(tmp_path, sources)
    expected, digest = whole.tokens.tolist(), whole.digest
    DAMAGE[damage](tmp_path / "store")
    with pytest.raises(ValueError, match="store: no complete token store.*the next run makes it again"):
        TokenStore(tmp_path / "store")
    store, done = store_of(tmp_path, sources)
    assert done == 2 and store.tokens.tolist() == expected and store.digest == digest


def test_a_store_that_was_not_finished_is_no_store(tmp_path):
    sources = documents_of(tmp_path, [(5, 1)] * 2500)
    writing = write_tokens(tmp_path / "store", sources, Counting())
    assert next(writing) == 1000 and next(writing) == 1000
    assert not (tmp_path / "store").exists()
    writing.close()  # as if the process had died
    store, done = store_of(tmp_path, sources)
    assert done == 2500 and len(store.offsets) == 2501
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.jsonl", "store"]


@pytest.mark.parametrize("before", ["nothing", "tokens"])
@pytest.mark.parametrize(("end", "stays"), [(None, False), (ValueError, False), (OSError, False),
                                            (KeyboardInterrupt, True), (SystemExit, True)])  # fmt: skip
def test_tokens_go_when_a_run_is_finished_or_the_start_that_made_them_fails(tmp_path, end, stays, before):
    tokens = tmp_path / "tokens"
    (tmp_path / "metrics.jsonl").write_text("mine")
    if before == "tokens":  # of a start before this one
        tokens.mkdir()

    @discards_tokens
    def main(config):
        tokens.mkdir(exist_ok=True)
        if end:
            raise end("mistake")

    with pytest.raises(end, match="mistake") if end else nullcontext():
        main(SimpleNamespace(output=str(tmp_path)))
    assert tokens.exists() == (stays or (before != "nothing" and end is not None))
    assert (tmp_path / "metrics.jsonl").exists()


def plan_of(rows, epochs=2.0):
    total = round(epochs * rows)
    return BatchPlan(rows, 7, micro_batch_size=2, total_steps=-(-total // 7), total_rows=total, seed=3)


def step_of(plan, rows, step, size):
    """What all of `size` ranks together read in a step, by row id."""
    batches = [batch for rank in range(size) for batch in plan.micro_batches(step, rank, size)]
    read = {i: rows.row(row) for numbers, ids in batches for row, i in zip(numbers, ids, strict=True)}
    assert len(read) == sum(len(numbers) for numbers, _ in batches)  # none twice
    return [(i, parts(row)) for i, row in sorted(read.items())]


def test_a_run_resumed_at_any_step_on_any_number_of_ranks_reads_exactly_the_rest(tmp_path):
    draw = random.Random(1)
    files = [[(draw.randrange(3, 60_000), draw.randrange(1, 90)) for _ in range(n)] for n in (70, 40)]
    sources = documents_of(tmp_path, *files)
    sources[1] = TextSource("talk", INSTRUCTIONS, "documents", sources[1].paths)

    def begin():
        """All that a process starts from: the files, through the store, the mixture and the rows, to the plan."""
        store, _ = store_of(tmp_path, sources)
        shares = part_shares(0.5, 9.0, store.parts())
        mixture = mix(store.sources, store.sizes(), shares, total_tokens=0, seed=11)
        rows = PackedRows(store, mixture.order, 50)
        return plan_of(len(rows)), rows

    plan, rows = begin()
    whole = [step_of(plan, rows, step, 1) for step in range(plan.total_steps)]
    name = rows.fingerprint
    assert plan.total_steps > 20 and sum(map(len, whole)) == 2 * len(rows)
    for first in range(plan.total_steps):
        if first % 9 == 4:
            shutil.rmtree(tmp_path / "store")  # lost on the way, so made again
        plan, rows = begin()
        assert rows.fingerprint == name
        for step in range(first, plan.total_steps):
            assert step_of(plan, rows, step, 1 + (first + step) % 3) == whole[step]


def test_the_fingerprint_names_exactly_these_rows(tmp_path):
    sources = documents_of(tmp_path, [(5, 3), (20, 4), (40, 3)])
    store, _ = store_of(tmp_path, sources)
    names = {
        PackedRows(store, np.array(order), length).fingerprint
        for order in ([0, 1, 2], [2, 1, 0], [0, 1], [0, 1, 2, 2])
        for length in (8, 4)
    }
    assert len(names) == 8
    same = PackedRows(store, np.array([0, 1, 2]), 8).fingerprint
    moved = [TextSource("renamed", INSTRUCTIONS, "documents", sources[0].paths)]
    assert PackedRows(store_of(tmp_path, moved)[0], np.array([0, 1, 2]), 8).fingerprint == same  # the same tokens
    other = documents_of(tmp_path, [(5, 3), (20, 4), (41, 3)])
    assert PackedRows(store_of(tmp_path, other)[0], np.array([0, 1, 2]), 8).fingerprint != same


def peak():  # MB
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


def write_and_read(rank, folder, model, count):
    """By how much the peak of memory has grown when the store of a file is written, and when it has been read."""
    tokenizer, sources = load_tokenizer(model), [TextSource("s", DOMAIN, "documents", (str(folder / "texts.jsonl"),))]
    before = peak()
    for _ in write_tokens(folder / "store", sources, tokenizer):
        pass
    written = peak()
    store = TokenStore(folder / "store")
    mixture = mix(store.sources, store.sizes(), part_shares(0.0, 9.0, store.parts()), total_tokens=0, seed=0)
    rows = PackedRows(store, mixture.order, 4096)
    assert sum(store.counts) == count and rows.utilization > 0.99
    tokens = sum(len(one.tokens) for i in range(0, len(rows), 4) for one in rows.row(i))
    assert 4 * tokens > 0.98 * sum(mixture.tokens.values()) and sum(mixture.tokens.values()) > 20 * count
    (folder / "peaks").write_text(f"{written - before} {peak() - before}")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory as Linux tells it")
def test_many_documents_take_little_memory(tmp_path, folders, start_ranks):
    # As lists of ids they take 106 MB.
    with open(tmp_path / "texts.jsonl", "w", encoding="utf-8") as file:
        for i in range(25_000):
            file.write(f'{{"text": "孩子发烧三天了，{"有点咳嗽，" * (i % 7)}体温{i}度。"}}\n')
    start_ranks(write_and_read, tmp_path, str(folders["baichuan"]), 25_000, ranks=1)
    written, read = map(int, (tmp_path / "peaks").read_text().split())
    assert written < 60 and read < 100, (written, read)
