"""Rows longer than a row of tokens: told together, left out, or cut without losing an answer. Digits are tokens."""

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


THOUGHT = Conversation(
    (Message("user", "1"), Message("assistant", "2", reasoning="34567890" * 20)), "a.jsonl:1"
)


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


LONG = talk("11", "22", "33", "44", "55", "66", system="9")  # 1 + 3 × 6 tokens


@pytest.mark.parametrize(
    ("length", "text", "taught"),
    [
        (18, "9U33A44U55A66", "44E66E"),  # the oldest turns go, the system text stays
        (13, "9U33A44U55A66", "44E66E"),
        (12, "9U55A66", "66E"),
        (7, "9U55A66", "66E"),
        (6, "9U5A66", "66E"),  # then the beginning of the question
    ],
)
def test_a_long_conversation_loses_its_oldest_turns_and_never_its_answer(chat, length, text, taught):
    assert cut(chat, LONG, length) == [(text, taught)]


def test_a_long_answer_keeps_at_least_half_a_row_and_a_short_one_all(chat):
    assert cut(chat, talk("1", "234567890"), 6) == [("U1A234", "2345")]
    assert cut(chat, talk("123456789", "87654321"), 8) == [("U89A8765", "87654")]
    assert cut(chat, talk("123456789", "8"), 8) == [("U56789A8", "8E")]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (talk("1", "2", system="123456789"), "no question has room beside its system text and half a row of answer"),
        (talk("1", "2", "333", "4", losses=[(3, False)]), "nothing to learn would be left"),
        (THOUGHT, "its reasoning leaves no room for the answer"),
    ],
)
def test_a_row_of_which_nothing_could_be_learnt_is_left_out_and_counted(chat, row, told):
    summary = ReadSummary(rows={"a.jsonl": 1})
    assert encode_conversations([row], chat, 6, "error", summary, on_long_row="truncate") == []
    (skipped,) = summary.skipped
    assert skipped.reason.startswith("over-long: ") and told in skipped.reason and summary.rows == {"a.jsonl": 0}


def test_all_long_rows_are_told_at_once_with_their_number(chat):
    rows = [talk("1" * n, "2", line=n) for n in range(1, 12)]
    told = (
        "a.jsonl:3: over-long: 6 tokens do not fit a row of 5 (9 such rows, the longest of 14: a.jsonl:3, a.jsonl:4, "
        'a.jsonl:5, a.jsonl:6, a.jsonl:7, …); raise row_length, or set on_long_row = "skip" or "truncate"'
    )
    with pytest.raises(ValueError, match=re.escape(told)):
        encode_conversations(rows, chat, 5, "skip", ReadSummary())
    with pytest.raises(ValueError, match="on_long_row is 'cut'"):
        encode_conversations(rows, chat, 5, "skip", ReadSummary(), on_long_row="cut")
    summary = ReadSummary(rows={"a.jsonl": 11})
    assert len(encode_conversations(rows, chat, 5, "error", summary, on_long_row="skip")) == 2
    assert "9 skipped, over-long: a.jsonl:3, a.jsonl:4, a.jsonl:5, ..." in summary.describe()


def test_a_long_pair_loses_the_same_of_its_prompt_for_both_answers(chat):
    turns = [Message("user", "1"), Message("assistant", "2"), Message("user", "34")]
    prompt = (Message("system", "9"), *turns)
    pair = PreferencePair(prompt, "567", "8", "a.jsonl:1")

    def pairs(pair, length):
        summary = ReadSummary(rows={"a.jsonl": 1})
        kept = encode_pairs([pair], chat, length, "error", summary, on_long_row="truncate")
        return [(shown(chat, both.chosen), shown(chat, both.rejected)) for both in kept], summary

    assert pairs(pair, 12)[1].shortened == []
    assert pairs(pair, 11)[0] == [(("9U34A567", "567E"), ("9U34A8", "8E"))]
    assert pairs(pair, 7)[0] == [(("9U4A567", "567E"), ("9U4A8", "8E"))]
    assert pairs(PreferencePair(prompt, "5678", "8", "a.jsonl:1"), 7)[0] == [
        (("9U4A567", "5678"), ("9U4A8", "8E"))  # the longer answer learns no end where it is cut
    ]
    alike, summary = pairs(PreferencePair(prompt, "55555556", "55555557", "a.jsonl:1"), 8)
    assert alike == [] and "its answers differ only in what would be cut" in summary.skipped[0].reason
