"""Conversations and pairs through the token store: the rows that lists in memory give, made once, in bounded memory."""

import bisect
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pedgpt.data import (
    ChatSettings,
    PackedRows,
    StoredPairs,
    TokenStore,
    chat_format,
    write_chats,
)
from pedgpt.data.chat import IGNORE_INDEX

WORDS = ("孩子", "发烧", "咳嗽", "三天", "多喝水", "请就医", "38.5", "龘", "，", "。", "\n", " fever ")


@pytest.fixture
def chat(tokenizers_by_name):
    return chat_format(tokenizers_by_name["baichuan"])


def said(draw, longest=12):
    return "问" + "".join(draw.choices(WORDS, k=draw.randint(0, longest)))


def talks_of(draw, count):
    """Conversations of one to three turns, some with a system text, some with an answer that is not learnt."""
    rows = []
    for _ in range(count):
        messages = [{"role": "system", "content": said(draw)}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": said(draw)})
            messages.append({"role": "assistant", "content": said(draw), "loss": draw.random() < 0.8})
        messages[-1]["loss"] = True
        rows.append({"messages": messages})
    return rows


def pairs_of(draw, count):
    return [{"prompt": said(draw), "chosen": said(draw), "rejected": said(draw) + "坏"} for _ in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def made(folder, kind, files, chat, **settings):
    """Write the store of these files, by name, and open each; and how many documents were encoded."""
    chosen = ChatSettings(model="", **{"row_length": 256, **settings})
    done = sum(write_chats(folder, kind, files, chat, chosen))
    return [TokenStore(folder / name) for name in files], done


def by_hand(messages, chat):
    """Baichuan2's tokens of a conversation and what each of them predicts, written down from its description."""
    tokens, targets, end = [], [], chat.tokenizer.eos_id
    user, assistant = map(chat.tokenizer.token_id, chat.role_tokens)
    for message in messages:
        ids = chat.tokenizer.encode(message["content"])
        learnt = message["role"] == "assistant" and message.get("loss", True)
        if message["role"] != "system":
            ended = bool(tokens) and message["role"] == "user" and targets[-1] != IGNORE_INDEX
            tokens.append(user if message["role"] == "user" else assistant)
            targets.append(end if ended else IGNORE_INDEX)
        tokens += ids
        targets += ids if learnt else [IGNORE_INDEX] * len(ids)
    return tokens, [*targets[1:], end if targets[-1] != IGNORE_INDEX else IGNORE_INDEX]


def packed_by_insertion(examples, row_length):
    """Best-fit decreasing over one sorted list of (free tokens, row): tokens, labels and documents of each row."""
    rows, room = [], []
    for tokens, labels in sorted(examples, key=lambda example: -len(example[0])):
        at = bisect.bisect_left(room, (len(tokens), -1))
        free, number = room.pop(at) if at < len(room) else (row_length, len(rows))
        if number == len(rows):
            rows.append(([], [], []))
        row = rows[number]
        documents = [row[2][-1] + 1 if row[2] else 0] * len(tokens)
        for values, more in zip(row, (tokens, labels, documents), strict=True):
            values.extend(more)
        bisect.insort(room, (free - len(tokens), number))
    return rows


def columns(row):
    """Tokens, labels and documents of a row's examples end to end."""
    numbers = [number for number, one in enumerate(row) for _ in one.tokens]
    return [token for one in row for token in one.tokens], [label for one in row for label in one.labels], numbers


@pytest.mark.parametrize("row_length", [24, 40, 96])
def test_rows_match_lists_in_memory_packed_by_insertion(tmp_path, chat, row_length):
    talks = talks_of(random.Random(row_length), 1200)  # more than one batch
    examples = [by_hand(row["messages"], chat) for row in talks]
    expected = packed_by_insertion([one for one in examples if len(one[0]) <= row_length], row_length)
    paths = [write(tmp_path / "a.jsonl", talks[:500]), write(tmp_path / "b.jsonl", talks[500:])]
    settings = {"row_length": row_length, "on_long_row": "skip"}
    (opened, none), _ = made(tmp_path, "conversations", {"train": paths, "heldout": []}, chat, **settings)
    rows = PackedRows(opened, None, row_length)
    found = [rows.row(i) for i in range(len(rows))]
    assert [columns(row) for row in found] == expected and len(found) > 50
    assert len(PackedRows(none, None, row_length)) == 0
    batch = rows.batch([3, 0], [7, 8])
    assert batch.row_ids.tolist() == [7, 8] and batch.tokens[1, : len(expected[0][0])].tolist() == expected[0][0]
    assert rows.describe() == f"{len(rows):,} rows of {row_length}, {rows.utilization:.1%} used"


def test_pairs_match_lists_in_memory_in_their_order(tmp_path, chat):
    written = pairs_of(random.Random(0), 1300)
    files = {"train": [write(tmp_path / "a.jsonl", written)]}
    (opened,), done = made(tmp_path, "preferences", files, chat)
    pairs = StoredPairs(opened)
    assert done == 2 * len(pairs) == 2600
    for i, row in enumerate(written):
        answers = pairs[i].chosen, pairs[i].rejected
        for example, name in zip(answers, ("chosen", "rejected"), strict=True):
            talk = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
            assert (example.tokens, example.labels) == by_hand(talk, chat)


@pytest.mark.parametrize(("name", "bytes_each"), [("small", 2), ("large", 4)])
def test_a_token_takes_at_most_eight_bytes(tmp_path, chat, monkeypatch, name, bytes_each):
    if name == "large":
        monkeypatch.setattr(type(chat.tokenizer), "vocab_size", 125_696)
    files = {"train": [write(tmp_path / "a.jsonl", talks_of(random.Random(1), 5))]}
    (opened,), _ = made(tmp_path, "conversations", files, chat)
    sizes = {file.name: file.stat().st_size / len(opened.tokens) for file in (tmp_path / "train").glob("*s.bin")}
    assert sizes.pop("offsets.bin") < 1 and sizes == {"tokens.bin": bytes_each, "labels.bin": 4}


def test_a_store_is_used_again_exactly_if_nothing_it_depends_on_has_changed(tmp_path, chat, tokenizers_by_name):
    paths = [write(tmp_path / "a.jsonl", talks_of(random.Random(2), 9))]
    other = chat_format(tokenizers_by_name["qwen"])
    silent = chat_format(tokenizers_by_name["baichuan"], enable_thinking=False)
    ended = chat_format(tokenizers_by_name["baichuan"])
    ended.today = "2026-03-31"
    usual = {"kind": "conversations", "files": {"train": paths}, "chat": chat}

    def done(**changes):
        return made(tmp_path, **{**usual, **changes})[1]

    assert done() == 9 and done() == 0
    for changes in (
        {"row_length": 257}, {"on_bad_row": "skip"}, {"on_long_row": "skip"}, {"columns": ["text=body"]},
        {"chat": other}, {"chat": silent}, {"chat": ended}, {"files": {"train": [*paths, *paths]}},
    ):  # fmt: skip
        assert done(**changes) > 0 and done(**changes) == 0, changes
        assert done() == 9
    before = TokenStore(tmp_path / "train")
    moved = shutil.copy(paths[0], tmp_path / "moved.jsonl")
    assert done(files={"train": [moved]}) == 9  # made again, but the same rows
    rows = [PackedRows(one, None, 256).fingerprint for one in (before, TokenStore(tmp_path / "train"))]
    assert rows[0] == rows[1]
    write(tmp_path / "moved.jsonl", talks_of(random.Random(3), 9))
    assert done(files={"train": [moved]}) == 9
    assert PackedRows(TokenStore(tmp_path / "train"), None, 256).fingerprint != rows[0]


def test_a_training_file_s_store_stays_when_only_held_out_files_change(tmp_path, chat):
    draw = random.Random(4)
    train, held, other = (write(tmp_path / f"{n}.jsonl", talks_of(draw, 5)) for n in ("train", "held", "other"))
    assert made(tmp_path / "s", "conversations", {"train": [train], "heldout": [held]}, chat)[1] == 10
    assert made(tmp_path / "s", "conversations", {"train": [train], "heldout": [other]}, chat)[1] == 5


def test_labels_are_part_of_the_fingerprint(tmp_path, chat):
    rows = talks_of(random.Random(5), 9)
    (first,), _ = made(tmp_path / "a", "conversations", {"train": [write(tmp_path / "a.jsonl", rows)]}, chat)
    rows.append({"messages": [dict(message) for message in rows[0]["messages"]]})
    turn = {"role": "user", "content": "孩子"}, {"role": "assistant", "content": "好", "loss": False}
    for loss in (True, False):
        rows[-1] = {"messages": [*turn, turn[0], {"role": "assistant", "content": "好"}]}
        rows[-1]["messages"][1] = {**turn[1], "loss": loss}
        files = {"train": [write(tmp_path / "b.jsonl", rows)]}
        (second,), _ = made(tmp_path / str(loss), "conversations", files, chat)
    names = [TokenStore(tmp_path / str(loss) / "train") for loss in (True, False)]
    assert names[0].tokens.tolist() == names[1].tokens.tolist() != first.tokens.tolist()
    assert len({one.digest for one in (*names, first, second)}) == 3
    assert len({StoredPairs(one).fingerprint for one in names}) == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


DAMAGE = {
    "labels": lambda f: cut(f / "labels.bin"),
    "no_labels": lambda f: (f / "labels.bin").unlink(),
    "tokens": lambda f: cut(f / "tokens.bin"),
    "old_json": lambda f: (f / "store.json").write_text((f / "store.json").read_text().replace("labelled", "other")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_refused_and_made_again(tmp_path, chat, damage):
    files = {"train": [write(tmp_path / "a.jsonl", talks_of(random.Random(6), 9))]}
    (whole,), _ = made(tmp_path, "conversations", files, chat)
    digest = whole.digest
    DAMAGE[damage](tmp_path / "train")
    with pytest.raises(ValueError, match="train: no complete token store.*the next run makes it again"):
        TokenStore(tmp_path / "train")
    (again,), done = made(tmp_path, "conversations", files, chat)
    assert done == 9 and again.digest == digest


@pytest.mark.parametrize("kind", ["conversations", "preferences"])
def test_what_was_skipped_and_cut_is_told_again_by_a_store_that_was_there(tmp_path, chat, kind):
    good, bad = (talks_of, "messages") if kind == "conversations" else (pairs_of, "chosen")
    rows = good(random.Random(7), 4)
    rows.insert(1, {name: value for name, value in rows[0].items() if name != bad})
    asked = {"question": "问"} if kind == "conversations" else {"prompt": "问", "rejected": "坏"}
    rows.append(asked | {"answer" if kind == "conversations" else "chosen": "水" * 600})
    path = write(tmp_path / "a.jsonl", rows)
    settings = {"on_bad_row": "skip", "on_long_row": "truncate"}
    told = []
    for expected in (5 if kind == "conversations" else 10, 0):
        stores, done = made(tmp_path, kind, {"train": [path], "heldout": []}, chat, **settings)
        assert done == expected
        told.append((stores[0].summary + stores[1].summary).describe())
    assert told[0] == told[1] and re.search(rf"{path} +5 +1\n1 skipped, .*{path}:2\n", told[0])
    assert told[0].endswith(f"1 over-long, cut to fit: {path}:6")
    with pytest.raises(ValueError, match=f"{path}:2: "):
        made(tmp_path, kind, {"train": [path]}, chat, on_long_row="truncate")
    with pytest.raises(ValueError, match=rf"{path}:6: over-long: \d+ tokens do not fit a row of 256 \(1 such rows"):
        made(tmp_path, kind, {"train": [path]}, chat, on_bad_row="skip")


def test_a_format_with_several_examples_a_conversation_keeps_each(tmp_path, chat):
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "<think>想</think>答"}]
    files = {"train": [write(tmp_path / "a.jsonl", [{"messages": [*turns, *turns]}])]}
    (opened,), done = made(tmp_path, "conversations", files, chat)
    assert done == 2 and len(opened) == 2  # each reasoning is learnt once


def peak():  # MB
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


def write_and_read(rank, folder, model, count):
    """By how much the peak of memory has grown when the store of a file is written, and when it has been read."""
    settings, sizes = ChatSettings(model=model, row_length=4096), SimpleNamespace(vocab_size=10**6)
    sizes.check_length = lambda tokens: None
    chat = settings.load_chat("", lambda model: sizes)
    before = peak()
    for _ in write_chats(folder, "conversations", {"train": [str(folder / "talks.jsonl")]}, chat, settings):
        pass
    written = peak()
    rows = PackedRows(TokenStore(folder / "train"), None, 4096)
    tokens = sum(rows.batch([i], [i]).num_tokens for i in range(0, len(rows), 4))
    assert len(rows.store) == count and 4 * tokens > 0.98 * len(rows.store.tokens) > 20 * count
    (folder / "peaks").write_text(f"{written - before} {peak() - before}")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory as Linux tells it")
def test_many_conversations_take_little_memory(tmp_path, folders, start_ranks):
    # As lists of ids and labels they take 80 MB.
    with open(tmp_path / "talks.jsonl", "w", encoding="utf-8") as file:
        for i in range(20_000):
            question = f"{i}孩子发烧三天了，{'有点咳嗽，' * (i % 7)}怎么办？"
            file.write(f'{{"question": "{question}", "answer": "多喝水{i}。"}}\n')
    start_ranks(write_and_read, tmp_path, str(folders["baichuan"]), 20_000, ranks=1)
    written, read = map(int, (tmp_path / "peaks").read_text().split())
    assert written < 50 and read < 70, (written, read)
