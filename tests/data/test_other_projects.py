"""Rows, columns and folders as other projects write them. Every expectation is written by hand."""

import gzip
import json
import re

import pyarrow as pa
import pytest
from pyarrow import parquet

from pedgpt.data.readers import (
    BadRow,
    NoData,
    detect_kind,
    iter_records,
    parse_columns,
    read_conversations,
    read_documents,
    read_preferences,
)
from pedgpt.data.records import Message, PreferencePair, ReadSummary


def read_triples(path, **settings):
    return list(iter_records(path, "triples", **settings))


QA = [{"question": f"第{n}个问题：孩子发烧怎么办？", "answer": f"第{n}个回答：多喝水，观察体温。"} for n in range(3)]
SAID = [(row["question"], row["answer"]) for row in QA]


def dumps(value, **how):
    return json.dumps(value, ensure_ascii=False, **how)


def said(records):
    """The texts of each conversation."""
    return [tuple(message.content for message in record.messages) for record in records]


def pair(question, answer):
    return (Message("user", question), Message("assistant", answer))


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"问题": "问", "回答": "答"}, ("问", "答")),
        ({"提问": "问", "答复": "答", "科室": "儿科"}, ("问", "答")),
        ({"Question": "问", "Answer": "答"}, ("问", "答")),
        ({"question": "问", "answer": "答", "system": None, "history": None, "messages": None}, ("问", "答")),
        ({"conversation": [{"role": "患者：", "content": "问"}, {"role": "医生", "content": "答"}]}, ("问", "答")),
        ({"conversation": [{"role": "病人", "content": "问"}, {"role": "大夫", "content": "答"}]}, ("问", "答")),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "甲"}, {"type": "text", "text": "乙"}]},
                          {"role": "assistant", "content": "答", "name": None}]},
            ("甲\n乙", "答"),
        ),
        ({"prompt": [{"role": "user", "content": "问"}], "completion": [{"role": "assistant", "content": "答"}]},
         ("问", "答")),
        ({"prompt": "问", "completion": "答", "label": True}, ("问", "答")),
        ({"question": "问", "option": {"A": "甲", "B": "乙", "C": ""}, "answer": "A"}, ("问\nA. 甲\nB. 乙", "A")),
        ({"Question": "问", "Options": "A 甲\nB 乙", "Answer": "A"}, ("问\nA 甲\nB 乙", "A")),
        ({"question": "问", "answer": "答", "input": float("nan"), "system": float("nan")}, ("问", "答")),
    ],
)  # fmt: skip
def test_rows_of_other_projects_are_understood(tmp_path, row, texts):
    path = tmp_path / "a.jsonl"
    path.write_text(dumps(row), encoding="utf-8")
    assert said(read_conversations(path)) == [texts] and detect_kind(path) == "conversations"


@pytest.mark.parametrize(
    "label", ['"label": false', '"kto_tag": false', '"label": "False"', '"label": 0', '"Label": "0"']
)
def test_an_answer_that_was_judged_bad_is_never_learnt(tmp_path, label):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "问", "completion": "错", {label}}}\n{dumps(QA[0])}\n', encoding="utf-8")
    summary = ReadSummary()
    assert said(read_conversations(path, on_bad_row="skip", summary=summary)) == [SAID[0]]
    assert [(row.line, row.reason.partition(":")[0]) for row in summary.skipped] == [(1, "an answer judged bad")]
    with pytest.raises(BadRow, match=r"a\.jsonl:1: an answer judged bad"):
        read_conversations(path)
    assert "1 skipped, an answer judged bad" in summary.describe() and detect_kind(path) == "conversations"


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "问", "response_chosen": "好", "response_rejected": "坏", "history": [["一", "二"]]},
         (*pair("一", "二"), Message("user", "问"))),
        ({"instruction": "问", "input": "入", "chosen": "好", "rejected": "坏"}, (Message("user", "问\n入"),)),
        ({"chosen": turns("问", "好"), "rejected": turns("问", "坏"), "prompt": None}, (Message("user", "问"),)),
        ({"chosen": turns("一", "二", "问", "好"), "rejected": turns("一", "二", "问", "坏"), "score": 1},
         (*pair("一", "二"), Message("user", "问"))),
    ],
)  # fmt: skip
def test_pairs_of_other_projects_are_understood(tmp_path, row, prompt):
    path = tmp_path / "a.jsonl"
    path.write_text(dumps(row), encoding="utf-8")
    assert read_preferences(path) == [PreferencePair(prompt, "好", "坏", f"{path}:1")]
    assert detect_kind(path) == "preferences"


@pytest.mark.parametrize(
    ("chosen", "rejected", "told"),
    [
        (turns("一", "好"), turns("二", "坏"), "rejected repeats another prompt"),
        (turns("一", "好"), turns("一", "好"), "chosen equals rejected"),
        (turns("一", "甲", "三", "好"), turns("一", "乙", "三", "坏"), "rejected repeats another prompt"),
    ],
)
def test_lists_without_one_prompt_are_bad_rows(tmp_path, chosen, rejected, told):
    path = tmp_path / "a.jsonl"
    path.write_text(dumps({"chosen": chosen, "rejected": rejected}), encoding="utf-8")
    with pytest.raises(BadRow, match=told):
        read_preferences(path)


# Columns


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_columns_may_have_any_name(tmp_path, name):
    path = tmp_path / name
    row = {"q text": "问", "a=text": "答", "question": "别的"}
    if name == "a.parquet":
        parquet.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(dumps(row) if name == "a.jsonl" else ",".join(row) + "\n问,答,别的\n", encoding="utf-8")
    columns = parse_columns(["question=q text", "answer = a=text", "text=body"])  # the last is another kind's
    assert said(read_conversations(path, columns=columns)) == [("问", "答")]
    assert detect_kind(path, columns) == "conversations"
    with pytest.raises(ValueError, match="nowhere"):
        read_conversations(path, columns={"question": "q text", "answer": "nowhere"})
    with pytest.warns(UserWarning, match="found none of the columns body, so the file's own names are used"):
        with pytest.raises(ValueError, match="missing field"):
            read_conversations(path, columns={"answer": "body"})


def test_other_kinds_have_columns_too(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"ask": "问", "good": "好", "bad": "坏", "h": "感冒", "r": "症状", "t": "热"}
    path.write_text(dumps(row), encoding="utf-8")
    columns = parse_columns(["prompt=ask", "chosen=good", "rejected=bad", "text=ask", "head=h", "relation=r", "tail=t"])
    assert [each.chosen for each in read_preferences(path, columns=columns)] == ["好"]
    assert [each.text for each in read_documents(path, columns=columns)] == ["问"]
    assert [each.tail for each in read_triples(path, columns=columns)] == ["热"]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (["question"], "found 'question', expected field=column"),
        (["qestion=ask"], "did you mean 'question'"),
        (["question=a", "question=b"], "found 'question=b', expected field=column, each field once"),
    ],
)
def test_wrong_columns_are_told(columns, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        parse_columns(columns)


# Folders


def test_what_is_no_data_in_a_folder_is_listed_and_left_out(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "a.jsonl").write_text(dumps(QA[0]), encoding="utf-8")
    (tmp_path / "sub" / "b.JSONL.gz").write_bytes(gzip.compress(dumps(QA[1]).encode()))
    for name in (
        "README_zh.md", "LICENSE", "dataset_info.json", "sub/.git/x.jsonl", ".a.jsonl.swp", "~$a.xlsx", "x.zip",
        "y.png",
    ):  # fmt: skip
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    summary = ReadSummary()
    assert said(read_conversations(tmp_path, summary=summary)) == SAID[:2]
    told = {row.file.removeprefix(f"{tmp_path}/"): row.reason for row in summary.skipped}
    assert told == {
        "README_zh.md": "about the data, not data", "LICENSE": "about the data, not data",
        "dataset_info.json": "about the data, not data", "x.zip": "no file of a format that is read",
        "y.png": "no file of a format that is read", "empty.jsonl": "empty",
        "broken.jsonl": "no file of a format that is read", "link": "no file of a format that is read",
    }  # fmt: skip
    assert f"4 skipped, no file of a format that is read: {tmp_path}/broken.jsonl" in summary.describe()


def test_all_paths_that_are_wrong_are_told_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError) as error:
        read_conversations([tmp_path / "no.jsonl", tmp_path / "empty", tmp_path / "a.bin"])
    assert [line.partition(": found")[0] for line in str(error.value).splitlines()] == [
        f"{tmp_path}/no.jsonl", f"{tmp_path}/empty", f"{tmp_path}/a.bin",
    ]  # fmt: skip


# Which kind of records a file holds, by its content

GOOD = {
    "documents": {"text": "文"},
    "conversations": {"question": "问", "answer": "答"},
    "preferences": {"prompt": "问", "chosen": "好", "rejected": "坏"},
    "triples": {"head": "感冒", "relation": "症状", "tail": "发热"},
}


@pytest.mark.parametrize("kind", GOOD)
def test_the_kind_is_found_by_content_after_bad_rows(tmp_path, kind):
    path = tmp_path / "misleading_name.jsonl"
    path.write_text("not JSON\n{}\n" + dumps(GOOD[kind]), encoding="utf-8")
    assert detect_kind(path) == kind


def test_the_kind_of_text_and_tables_is_found(tmp_path):
    contents = {
        "a.txt": ("文", "documents"),
        "a.md": ("# 题", "documents"),
        "a.csv": ("title,ask,answer\n题,问,答", "conversations"),
        "a.tsv": ("感冒\t症状\t发热", "triples"),
        "b.tsv": ("text\ttitle\tpage\n文\t题\t1", "documents"),
        "a.json": ('[{"head": "感冒", "relation": "症状", "tail": "发热"}]', "triples"),
    }
    for name, (content, kind) in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert detect_kind(tmp_path / name) == kind


def test_a_file_of_no_kind_is_named(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(dumps({"a": 1}), encoding="utf-8")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for wrong in (path, tmp_path / "empty.jsonl", tmp_path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(ValueError, match=wrong.name):
            detect_kind(wrong)


def test_an_object_by_id_is_named_by_a_few_of_its_keys(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(dumps({str(n): QA[0] for n in range(5_000)}), encoding="utf-8")
    with pytest.raises(NoData, match="found the fields 0, 1, .*, 19; if it is data") as error:
        detect_kind(path)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", ['{"a": {"file_name": "b"}}', "[1, 2]", '{"name": "x"}', "q_text,a_text\n问,答\n"])
def test_a_file_without_a_known_field_is_no_data(tmp_path, content):
    path = tmp_path / ("a.csv" if content.startswith("q_text") else "a.json")
    path.write_text(content, encoding="utf-8")
    with pytest.raises(NoData, match="a.*rows of no known kind, found the fields "):
        detect_kind(path)
