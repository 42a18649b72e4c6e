"""JSON of several shapes, tables and workbooks, whole and broken. Every expectation is written by hand."""

import csv
import gzip
import json

import openpyxl
import pyarrow as pa
import pytest
from pyarrow import parquet

from pedgpt.data.readers import detect_kind, read_conversations
from pedgpt.data.records import Message, ReadSummary
from pedgpt.data.tables import read_rows

QA = [{"question": f"第{n}个问题：孩子发烧怎么办？", "answer": f"第{n}个回答：多喝水，观察体温。"} for n in range(3)]
SAID = [(row["question"], row["answer"]) for row in QA]


def dumps(value, **how):
    return json.dumps(value, ensure_ascii=False, **how)


def said(records):
    """The texts of each conversation."""
    return [tuple(message.content for message in record.messages) for record in records]


# JSON

SHAPES = {
    "lines": "".join(dumps(row) + "\n" for row in QA),
    "list": dumps(QA),
    "list over lines": dumps(QA, indent=2),
    "list of an object a line": "[" + ",\n".join(map(dumps, QA)) + "]",
    "data": dumps({"data": QA}),
    "data behind other members": dumps({"version": "1.0", "count": 3, "data": QA, "licence": {"name": "x"}}, indent=2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_json_is_read_in_any_shape_under_either_name(tmp_path, shape, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(SHAPES[shape].encode()) if name.endswith(".gz") else SHAPES[shape].encode())
    assert detect_kind(path) == "conversations"
    assert said(read_conversations(path)) == SAID


def test_one_object_alone_is_a_row(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in (dumps(QA[0]), dumps(QA[0], indent=1)):
        path.write_text(text, encoding="utf-8")
        assert said(read_conversations(path)) == SAID[:1]


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_broken_json_list_is_told_with_its_line(tmp_path, policy):
    path = tmp_path / "a.json"
    whole = dumps(QA, indent=2)
    for text, told in ((whole.replace('"question": "第1', '"question": 第1'), "line 7"), (whole[:-3], "delimiter")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"a\.json: cannot be read after line 0: .*{told}"):
            read_conversations(path, on_bad_row=policy)


def test_a_list_in_rows_of_their_own_lines_is_not_the_data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(dumps(row | {"records": [{"text": "别处"}]}) + "\n" for row in QA), encoding="utf-8")
    assert detect_kind(path) == "conversations" and said(read_conversations(path)) == SAID


# Tables


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_table_is_cut_at_the_sign_that_its_header_has(tmp_path, separator):
    path = tmp_path / "a.csv"
    rows = [["编号", "提问", "答复"], ["1", "问，一", "答；一"], ["2", f"问{separator}二", "答"]]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    assert said(read_conversations(path)) == [("问，一", "答；一"), (f"问{separator}二", "答")]


@pytest.mark.parametrize("unnamed", ["0", ""])
def test_a_column_without_a_name_is_ignored(tmp_path, unnamed):
    path = tmp_path / "a.csv"  # as pandas writes the index, and Excel an empty last column
    path.write_text("".join(f"{n},{','.join(row)}\n" for n, row in [("", ("question", "answer")), (unnamed, SAID[0])]))
    (found,) = read_conversations(path)
    assert found.messages == (Message("user", SAID[0][0]), Message("assistant", SAID[0][1]))
    assert detect_kind(path) == "conversations"


def test_a_cell_may_be_longer_than_131072_characters(tmp_path):
    path, long = tmp_path / "a.csv", "长" * 200_000
    path.write_text(f'question,answer\n问,"{long}\n第二行"\n问二,答二\n', encoding="utf-8")
    assert said(read_conversations(path)) == [("问", f"{long}\n第二行"), ("问二", "答二")]


@pytest.mark.parametrize(
    ("lines", "good", "bad"),
    [
        (['一,"引"号"', "二,答"], ["二"], [2]),
        (['"一"后,答', '"二","答\n答"', "三,答"], ["二", "三"], [2]),
        (["一,答,多", "二", "三,答"], ["三"], [2, 3]),
        (['一,"没有结束', '二,"也没有', "三,答"], ["三"], [2, 3]),
        (["零,答", '一,"没有结束', "二,答"], ["零"], [3, 4]),  # what an open quote takes along is counted by its lines
    ],
)
def test_every_line_of_a_bad_row_of_a_table_is_told(tmp_path, lines, good, bad):
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["question,answer", *lines]), encoding="utf-8")
    summary = ReadSummary()
    found = read_conversations(path, on_bad_row="skip", summary=summary)
    assert [record.messages[0].content for record in found] == good
    assert [row.line for row in summary.skipped] == bad


def test_parquet_and_excel_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    parts = [{"role": "user", "content": "问", "weight": None}, {"role": "assistant", "content": "答", "weight": 1}]
    table = {"messages": [parts, None, []], "question": [None, "一", "二"], "answer": [None, "甲", "乙"]}
    parquet.write_table(pa.table(table), path)
    assert said(read_conversations(path)) == [("问", "答"), ("一", "甲"), ("二", "乙")]
    path = tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    for row in ([], ["问题", "回答", "label", None], ["体温", 38.5, True], [], ["一", "甲_x000D_\n乙", False], ["二"]):
        book.active.append(row)
    book.create_sheet("空")
    book.create_sheet("更多").append(["prompt", "completion"])
    book["更多"].append(["三", "丙"])
    book.save(path)
    summary = ReadSummary()
    found = read_conversations(path, on_bad_row="skip", summary=summary)
    assert [(each.messages[1].content, each.source) for each in found] == [
        ("38.5", f"{path}:3"), ("丙", f"{path}:更多:2"),
    ]  # fmt: skip
    assert [(row.line, row.reason.partition(":")[0]) for row in summary.skipped] == [
        (5, "an answer judged bad"), (6, "answer is empty"),
    ]  # fmt: skip


def test_rows_of_any_table_are_read_by_its_header(tmp_path):
    book = openpyxl.Workbook()
    rows = [["questions", "options", "answers"], ["问", "A.甲\nB.乙", "AB"]]
    for row in rows:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    (tmp_path / "a.jsonl").write_text(dumps(dict(zip(*rows, strict=True))), encoding="utf-8")
    for name, line in (("a.xlsx", 2), ("a.csv", 2), ("a.jsonl", 1)):
        assert list(read_rows(tmp_path / name)) == [(line, dict(zip(*rows, strict=True)))]
