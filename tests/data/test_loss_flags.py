"""Flags of a message that say whether it is learnt from."""

import json

import pytest

from pedgpt.data.readers import BadRow, read_conversations
from pedgpt.data.records import Message, ReadSummary


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
    "string": ({"loss": "false"}, "loss or weight is unusable: found ['false', True], expected true, false, 1 or 0"),
    "share": ({"weight": 0.5}, "loss or weight is unusable: found [True, 0.5]"),
    "two": ({"weight": 2}, "loss or weight is unusable: found [True, 2]"),
    "list": ({"weight": [1]}, "loss or weight is unusable"),
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
        (openai(("user", "一", {}), ("assistant", "二", {"loss": False})), "nothing carries loss"),
        (
            openai(("user", "一", {}), ("assistant", "二", {"weight": 0}), ("user", "三", {}),
                   ("assistant", "四", {"loss": False})),
            "nothing carries loss",
        ),
    ],
)  # fmt: skip
def test_a_row_without_loss_is_a_bad_row(tmp_path, row, told):
    with pytest.raises(BadRow, match=f"a.jsonl:1: {told}"):
        read_conversations(write(tmp_path / "a.jsonl", row))
