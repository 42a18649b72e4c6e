"""Rows longer than a row of tokens: told together, left out, or cut at their end. Digits are tokens."""

import re

import pytest

from pedgpt.data import (
    Conversation,
    Message,
    PreferencePair,
    ReadSummary,
    chat_format,
    encode_conversations,
    encode_pairs,
)

IGNORED = -100


@pytest.fixture
def chat(tokenizers_by_name):
    return chat_format(tokenizers_by_name["baichuan"])


def talk(*texts, system="", line=1, losses=()):
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    for i, loss in losses:
        turns[i] = Message(turns[i].role, turns[i].content, loss)
    return Conversation((*([Message("system", system)] if system else []), *turns), f"a.jsonl:{line}")


def shown(chat, example):
    """The text of an example, U and A for the roles, and what carries loss, E for the end of an answer."""
    user, assistant = map(chat.tokenizer.token_id, chat.role_tokens)
    names = {user: "U", assistant: "A", chat.tokenizer.eos_id: "E"}
    text = "".join(names.get(t) or chat.tokenizer.decode([t]) for t in example.tokens)
    taught = [label for label in example.labels if label != IGNORED]
    return text, "".join(names.get(t) or chat.tokenizer.decode([t]) for t in taught)


def cut(chat, row, length):
    summary = ReadSummary(rows={"a.jsonl": 1})
    kept = encode_conversations([row], chat, length, "error", summary, on_long_row="truncate")
    assert summary.shortened == ["a.jsonl:1"] * len(kept) and summary.rows == {"a.jsonl": len(kept)}
    assert all(len(example.tokens) <= length and example.source == "a.jsonl:1" for example in kept)
    return [shown(chat, example) for example in kept]


@pytest.mark.parametrize(
    ("length", "text", "taught"),
    [
        (12, "9U11A22U33A4", "22E44"),  # the end of an answer is not taught where it is cut
        (11, "9U11A22U33A", "22E4"),
        (10, "9U11A22U33", "22E"),  # of the last answer nothing is left
        (4, "9U11", ""),
    ],
)
def test_the_end_of_a_long_conversation_is_cut_off(chat, length, text, taught):
    assert cut(chat, talk("11", "22", "33", "44", system="9"), length) == ([(text, taught)] if taught else [])


def test_a_row_of_which_nothing_could_be_learnt_is_left_out_and_counted(chat):
    summary = ReadSummary(rows={"a.jsonl": 2})
    rows = [talk("123456", "2"), talk("1", "2", "333", "4", losses=[(1, False)], line=2)]
    assert encode_conversations(rows, chat, 6, "error", summary, on_long_row="truncate") == []
    assert [row.reason[:10] for row in summary.skipped] == ["over-long:"] * 2 and summary.rows == {"a.jsonl": 0}


def test_all_long_rows_are_told_at_once_with_their_number(chat):
    rows = [talk("1" * n, "2", line=n) for n in range(1, 12)]
    told = "a.jsonl:3: over-long: 14 tokens do not fit a row of 5 (9 such rows); raise row_length, or set on_long_row"
    with pytest.raises(ValueError, match=re.escape(told)):
        encode_conversations(rows, chat, 5, "skip", ReadSummary())
    with pytest.raises(ValueError, match="on_long_row is 'cut'"):
        encode_conversations(rows, chat, 5, "skip", ReadSummary(), on_long_row="cut")
    summary = ReadSummary(rows={"a.jsonl": 11})
    assert len(encode_conversations(rows, chat, 5, "error", summary, on_long_row="skip")) == 2
    assert "9 skipped, over-long: a.jsonl:3, a.jsonl:4, a.jsonl:5, ..." in summary.describe()


def test_the_longer_answer_of_a_pair_is_cut(chat):
    def pairs(chosen, rejected, length):
        pair = PreferencePair((Message("user", "12"),), chosen, rejected, "a.jsonl:1")
        summary = ReadSummary(rows={"a.jsonl": 1})
        kept = encode_pairs([pair], chat, length, "error", summary, on_long_row="truncate")
        return [(shown(chat, both.chosen), shown(chat, both.rejected)) for both in kept], summary

    assert pairs("567", "8", 7)[1].shortened == []
    kept, summary = pairs("5678", "8", 6)
    assert kept == [(("U12A56", "567"), ("U12A8", "8E"))] and summary.shortened == ["a.jsonl:1"]
