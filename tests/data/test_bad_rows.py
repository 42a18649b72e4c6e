"""Rows and settings that cannot be used: what is told, with file and line, and what is counted."""

import json
import warnings

import pytest

from pedgpt.data.readers import (
    BadRow,
    iter_records,
    read_conversations,
    read_documents,
    read_preferences,
)
from pedgpt.data.records import ReadSummary


def read_triples(path, **settings):
    return list(iter_records(path, "triples", **settings))


READERS = {
    "documents": read_documents,
    "conversations": read_conversations,
    "preferences": read_preferences,
    "triples": read_triples,
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


PROMPT_LIST = [{"role": "user", "content": "问"}]
QA = {"question": "问", "answer": "答"}
PAIR = {"prompt": "问", "chosen": "好", "rejected": "坏"}


def turns(*roles):
    return {"messages": [{"role": role, "content": "言"} for role in roles]}


BAD_ROWS = {
    "invalid_json": ("conversations", '{"question": "问"', ["invalid JSON"]),
    "deep_json": ("conversations", "[" * 100_000, ["invalid JSON"]),
    "a_list": ("conversations", "[1]", ["the row", "list", "dict"]),
    "null": ("conversations", "null", ["the row", "null", "dict"]),
    "answer_of_wrong_type": ("conversations", QA | {"answer": 5}, ["answer has the wrong type", "int", "str"]),
    "answer_null": ("conversations", QA | {"answer": None}, ["missing field", "question", "answer"]),
    "system_of_wrong_type": ("conversations", QA | {"system": ["x"]}, ["system", "wrong type", "list"]),
    "missing_answer": ("conversations", {"question": "问", "id": "7"}, ["missing field", "id, question", "answer"]),
    "another_kind": ("conversations", {"text": "文"}, ["missing field", "text"]),
    "no_fields": ("conversations", {}, ["missing field"]),
    "empty_answer": ("conversations", QA | {"answer": ""}, ["answer is empty"]),
    "white_answer": ("conversations", QA | {"answer": " \n\u3000"}, ["answer is empty"]),
    "white_question": ("conversations", QA | {"question": "\t"}, ["question is empty"]),
    "half_a_pair": ("conversations", '{"question": "\\ud83d", "answer": "答"}', ["invalid UTF-8", "ud83d"]),
    "history_of_one": ("conversations", QA | {"history": [["一"]]}, ["history", "['一']"]),
    "history_of_strings": ("conversations", QA | {"history": ["一"]}, ["history", "'一'"]),
    "history_empty_answer": ("conversations", QA | {"history": [["一", ""]]}, ["history is empty"]),
    "messages_a_string": ("conversations", {"messages": "问"}, ["messages has the wrong type", "str"]),
    "message_a_string": ("conversations", {"messages": ["问"]}, ["message", "wrong type", "str"]),
    "message_without_role": ("conversations", {"messages": [{"content": "问"}]}, ["missing field", "content", "role"]),
    "message_without_text": ("conversations", {"messages": [{"role": "user"}]}, ["missing field", "role"]),
    "content_empty": ("conversations", {"messages": [{"role": "user", "content": " "}]}, ["content is empty"]),
    "unknown_role": ("conversations", turns("user", "tool"), ["unknown role", "tool"]),
    "no_messages": ("conversations", {"messages": []}, ["missing field", "messages", "question"]),
    "ends_with_user": ("conversations", turns("user", "assistant", "user"), ["roles out of turn", "assistant, user"]),
    "two_users": ("conversations", turns("user", "user", "assistant"), ["roles out of turn", "user, user, assistant"]),
    "starts_with_assistant": ("conversations", turns("assistant"), ["roles out of turn", "assistant"]),
    "two_systems": ("conversations", turns("system", "system", "user", "assistant"), ["roles out of turn"]),
    "late_system": ("conversations", turns("user", "system", "assistant"), ["roles out of turn"]),
    "equal_replies": ("preferences", PAIR | {"rejected": "好"}, ["chosen equals rejected"]),
    "replies_equal_but_for_space": ("preferences", PAIR | {"rejected": "好 \n"}, ["chosen equals rejected"]),
    "missing_rejected": (
        "preferences",
        {"prompt": "问", "chosen": "好"},
        ["missing field", "prompt, chosen", "rejected"],
    ),
    "missing_prompt": ("preferences", {"chosen": "好", "rejected": "坏"}, ["missing field", "prompt"]),
    "empty_chosen": ("preferences", PAIR | {"chosen": ""}, ["chosen is empty"]),
    "chosen_a_number": ("preferences", PAIR | {"chosen": 1}, ["chosen", "wrong type", "int"]),
    "chosen_no_messages": ("preferences", PAIR | {"chosen": []}, ["chosen is empty"]),
    "chosen_by_user": ("preferences", PAIR | {"chosen": PROMPT_LIST}, ["roles out of turn", "user, user"]),
    "chosen_of_another_prompt": (
        "preferences",
        PAIR | {"chosen": [{"role": "user", "content": "别的"}, {"role": "assistant", "content": "好"}]},
        ["chosen repeats another prompt"],
    ),
    "prompt_ends_with_assistant": (
        "preferences",
        PAIR | {"prompt": [*PROMPT_LIST, {"role": "assistant", "content": "答"}]},
        ["roles out of turn", "user at the end"],
    ),
    "triple_without_tail": (
        "triples",
        {"head": "感冒", "relation": "症状"},
        ["missing field", "head, relation", "tail"],
    ),
    "triple_empty": ("triples", {"head": "感冒", "relation": " ", "tail": "热"}, ["relation is empty"]),
    "document_empty": ("documents", {"text": ""}, ["text is empty"]),
    "document_a_list": ("documents", {"text": ["文"]}, ["text has the wrong type", "list"]),
    "title_a_number": ("documents", {"text": "文", "title": 1}, ["title has the wrong type", "int"]),
}
GOOD = {
    "documents": {"text": "文"},
    "conversations": QA,
    "preferences": PAIR,
    "triples": {"head": "感冒", "relation": "症状", "tail": "发热"},
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_named_with_its_line_or_skipped_and_counted(tmp_path, fault):
    kind, bad, words = BAD_ROWS[fault]
    good = json.dumps(GOOD[kind], ensure_ascii=False)
    bad = bad if isinstance(bad, str) else json.dumps(bad, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n\n{bad}\n{good}\n", encoding="utf-8")

    with pytest.raises(BadRow) as raised:
        READERS[kind](path)
    message = str(raised.value)
    assert message.startswith(f"{path}:3: ")
    assert all(word in message for word in [*words, "found ", "expected ", "; "])

    summary = ReadSummary()
    found = READERS[kind](path, on_bad_row="skip", summary=summary)
    assert [record.source for record in found] == [f"{path}:1", f"{path}:4"]
    assert summary.rows == {str(path): 2}
    assert [(row.file, row.line, f"{path}:3: {row.reason}") for row in summary.skipped] == [(str(path), 3, message)]


@pytest.mark.parametrize(("row", "count"), [("问", 1), ("问,答,多", 3), ("问,答,,", 4)])
def test_a_csv_row_with_another_number_of_columns_is_bad(tmp_path, row, count):
    path = tmp_path / "a.csv"
    path.write_text(f"question,answer\n{row}\n问,答\n", encoding="utf-8")
    with pytest.raises(BadRow, match=rf"a\.csv:2: wrong number of columns: found {count}, expected 2"):
        read_conversations(path)
    summary = ReadSummary()
    assert [each.source for each in read_conversations(path, on_bad_row="skip", summary=summary)] == [f"{path}:3"]
    assert len(summary.skipped) == 1


def test_a_triple_line_with_two_columns_is_bad(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("感冒\t症状\n", encoding="utf-8")
    with pytest.raises(BadRow, match=r"a\.tsv:1: wrong number of columns: found 2, expected 3"):
        read_triples(path)


def test_a_quoted_empty_cell_is_a_bad_row_and_not_a_blank_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text\n\n""\n文\n', encoding="utf-8")
    with pytest.raises(BadRow, match=r"a\.csv:3: text is empty"):
        read_documents(path)


@pytest.mark.parametrize("content", ['{"a": 1}', '"text"', "3"])
def test_a_json_file_that_is_no_list_of_rows_is_reported(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadRow, match=r"a\.json:1: "):
        read_documents(path)


@pytest.mark.parametrize("kind", READERS)
def test_a_wrong_setting_is_refused_before_reading(tmp_path, kind):
    path = write(tmp_path / "a.jsonl", GOOD[kind])
    with pytest.raises(ValueError, match='on_bad_row is \'ignore\', expected "error" or "skip"'):
        READERS[kind](path, on_bad_row="ignore")


@pytest.mark.parametrize("kind", READERS)
def test_a_missing_path_an_empty_folder_and_an_unknown_file_are_named(tmp_path, kind):
    good = write(tmp_path / "a.jsonl", GOOD[kind])
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name in ("nowhere.jsonl", "empty", "a.parquet"):
        with pytest.raises(ValueError, match=name):
            READERS[kind]([good, tmp_path / name])
    assert READERS[kind]([]) == []


def test_a_text_file_among_conversations_is_a_bad_row(tmp_path):
    write(tmp_path / "a.jsonl", QA)
    (tmp_path / "book.md").write_text("# 说明", encoding="utf-8")
    with pytest.raises(BadRow, match=r"book\.md:1: missing field: found the keys text, title, "):
        read_conversations(tmp_path)
    summary = ReadSummary()
    assert len(read_conversations(tmp_path, on_bad_row="skip", summary=summary)) == 1
    assert summary.rows == {f"{tmp_path}/book.md": 0, f"{tmp_path}/a.jsonl": 1}


def test_rows_skipped_without_a_summary_are_told_in_a_warning(tmp_path):
    path = write(tmp_path / "a.jsonl", QA, {"question": "问"})
    with pytest.warns(UserWarning, match=r"1 skipped, missing field: .*a\.jsonl:2"):
        assert len(read_conversations(path, on_bad_row="skip")) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_conversations(path, on_bad_row="skip", summary=ReadSummary())


def test_the_summary_tells_rows_and_skips_by_file_and_by_reason():
    summary = ReadSummary(rows={"a.jsonl": 3, "b.jsonl": 0})
    for line in (2, 5, 7, 8):
        summary.skip(f"a.jsonl:{line}", f"over-long: found {line} characters, expected at most 1; split it")
    summary.skip("b.jsonl:1", "invalid JSON: found nothing, expected one object; mend it")
    summary.skip("c.txt", "a text file: found .txt, expected rows; name the files")
    assert [(row.file, row.line) for row in summary.skipped][-2:] == [("b.jsonl", 1), ("c.txt", 0)]
    assert [line.split() for line in summary.describe().splitlines()[:3]] == [
        ["file", "rows", "skipped"],
        ["a.jsonl", "3", "4"],
        ["b.jsonl", "0", "1"],
    ]
    assert summary.describe().splitlines()[3:] == [
        "4 skipped, over-long: a.jsonl:2, a.jsonl:5, a.jsonl:7, ...",
        "1 skipped, invalid JSON: b.jsonl:1",
        "1 skipped, a text file: c.txt",
    ]
