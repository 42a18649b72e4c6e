"""Flags of a message that say whether it is learnt from."""

import json

import pytest

from pedgpt.data.readers import (
    BadRow,
    read_conversations,
    read_preferences,
)
from pedgpt.data.records import Message, PreferencePair, ReadSummary


def user(text):
    return Message("user", text)


def assistant(text):
    return Message("assistant", text)


def system(text):
    return Message("system", text)


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def openai(*turns, **more):
    """A row of (role, text, flags) messages."""
    return {"messages": [{"role": role, "content": text, **flags} for role, text, flags in turns], **more}


FLAGS = {
    "loss": ({"loss": False}, {"loss": True}),
    "weight": ({"weight": 0}, {"weight": 1}),
    "both": ({"loss": False, "weight": 0}, {}),
}


@pytest.mark.parametrize(("first", "second"), FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("names", [("role", "content", "messages"), ("from", "value", "conversations")])
def test_loss_flags_are_read(tmp_path, first, second, names):
    role, content, turns = names
    row = openai(
        ("system", "令", {"loss": False}), ("user", "一", {"weight": 0}), ("assistant", "二", first),
        ("user", "三", {}), ("assistant", "四", second),
    )  # fmt: skip
    renamed = {"role": role, "content": content}
    row = {turns: [{renamed.get(key, key): value for key, value in turn.items()} for turn in row["messages"]]}
    (read,) = read_conversations(write(tmp_path / "a.jsonl", row))
    assert read.messages == (
        system("令"), user("一"), Message("assistant", "二", loss=False), user("三"), assistant("四"),
    )  # fmt: skip
    assert Message("assistant", "二", loss=False) != assistant("二")


BAD_FLAGS = {
    "number for loss": ({"loss": 0}, "loss of a message is unusable: found 0, expected true or false"),
    "string for loss": ({"loss": "false"}, 'loss of a message is unusable: found "false"'),
    "bool for weight": ({"weight": True}, "weight of a message is unusable: found true, expected 0 or 1"),
    "float for weight": ({"weight": 1.0}, "weight of a message is unusable: found 1.0"),
    "share for weight": ({"weight": 0.5}, "weight of a message is unusable: found 0.5"),
    "two for weight": ({"weight": 2}, "weight of a message is unusable: found 2"),
    "list for weight": ({"weight": [1]}, "weight of a message is unusable"),
    "disagreement": ({"loss": True, "weight": 0}, "loss and weight disagree"),
}


@pytest.mark.parametrize(("flags", "told"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_unusable_loss_flags_are_bad_rows_with_their_line(tmp_path, flags, told):
    good = openai(("user", "一", {}), ("assistant", "二", {}))
    bad = openai(("user", "一", {}), ("assistant", "二", flags), ("user", "三", {}), ("assistant", "四", {}))
    path = write(tmp_path / "a.jsonl", good, bad, good)
    with pytest.raises(BadRow) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:2: ") and told in str(caught.value)
    summary = ReadSummary()
    assert len(read_conversations(path, on_bad_row="skip", summary=summary)) == 2
    assert [(row.line, told in row.reason) for row in summary.skipped] == [(2, True)]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (openai(("user", "一", {"loss": True}), ("assistant", "二", {})), "loss asks for loss on another's words"),
        (openai(("user", "一", {"weight": 1}), ("assistant", "二", {})), "weight asks for loss on another's words"),
        (openai(("user", "一", {}), ("assistant", "二", {"loss": False})), "nothing carries loss"),
        (
            openai(("user", "一", {}), ("assistant", "二", {"weight": 0}), ("user", "三", {}),
                   ("assistant", "四", {"loss": False})),
            "nothing carries loss",
        ),
        ({"prompt": "一", "chosen": {"role": "assistant", "content": "二", "loss": False}, "rejected": "三"}, "chosen"),
    ],
)  # fmt: skip
def test_loss_where_it_cannot_be_is_a_bad_row(tmp_path, row, told):
    read = read_preferences if "chosen" in row else read_conversations
    with pytest.raises(BadRow, match=f"a.jsonl:1: {told}"):
        read(write(tmp_path / "a.jsonl", row))


def test_flags_in_a_pairs_prompt_change_nothing(tmp_path):
    turns = [("user", "一", {}), ("assistant", "二", {"loss": False}), ("user", "三", {"weight": 0})]
    prompt = openai(*turns)["messages"]
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    row = {"prompt": prompt, "chosen": [*plain, {"role": "assistant", "content": "好"}], "rejected": "坏"}
    path = write(tmp_path / "a.jsonl", row)
    assert read_preferences(path) == [
        PreferencePair((user("一"), assistant("二"), user("三")), "好", "坏", f"{path}:1")
    ]
