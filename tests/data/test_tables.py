"""JSON of every shape, tables and workbooks, whole and broken. Every expectation is written by hand."""

import csv
import gzip
import json
import tracemalloc

import openpyxl
import pyarrow as pa
import pytest
from pyarrow import parquet

from pedgpt.data import tables
from pedgpt.data.readers import (
    detect_kind,
    read_conversations,
)
from pedgpt.data.records import ReadSummary

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
    "lines with a byte-order mark inside": "\ufeff".join(dumps(row) + "\n" for row in QA),
    "list": dumps(QA),
    "list over lines": dumps(QA, indent=2),
    "objects over lines": "\n".join(dumps(row, indent=1) for row in QA),
    "data": dumps({"data": QA}),
    "data behind other members": dumps({"version": "1.0", "count": 3, "data": QA, "licence": {"name": "x"}}, indent=2),
    "data behind an object": dumps({"about": {"x": 1}, "data": QA}),
    "parts": dumps({"train": QA[:2], "about": {"x": ["y"]}, "test": QA[2:], "n": 3}, indent=1),
    "parts behind an object": dumps({"about": {"x": 1}, "train": QA[:2], "test": QA[2:]}),
    "two lists": dumps(QA[:1]) + "\n" + dumps(QA[1:]),
    "comma at the end": dumps(QA)[:-1] + ",]",
}


# The shape is told by the first block; what follows may be cut anywhere.
CUT = [(shape, "a.json", 5) for shape in SHAPES if "data" not in shape and "parts" not in shape]


@pytest.mark.parametrize(
    ("shape", "name", "block"), [*CUT, *((shape, f"a.json{x}", 2**20) for shape in SHAPES for x in ("", "l", ".gz"))]
)
def test_json_is_read_in_any_shape_under_either_name(tmp_path, monkeypatch, shape, name, block):
    path = tmp_path / name
    path.write_bytes(gzip.compress(SHAPES[shape].encode()) if name.endswith(".gz") else SHAPES[shape].encode())
    assert detect_kind(path) == "conversations"
    monkeypatch.setattr(tables, "BLOCK", block)
    assert said(read_conversations(path)) == SAID


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("fault", ['"answer": "第1', '"question": 第1', '"question", "第1'])
@pytest.mark.parametrize("block", [5, 2**20])
def test_a_broken_element_of_a_json_list_costs_only_itself(tmp_path, monkeypatch, indent, fault, block):
    whole = dumps([{"question": q, "answer": a} for q, a in SAID], indent=indent)
    good = {"answer": '"answer": "第1', "quest": '"question": "第1'}[fault[1:6] if "answer" not in fault else "answer"]
    broken = fault if fault != good else '"answer": "第"1'
    assert whole.count(good) == 1
    path = tmp_path / "a.json"
    path.write_text(whole.replace(good, broken), encoding="utf-8")
    monkeypatch.setattr(tables, "BLOCK", block)
    summary = ReadSummary()
    assert said(read_conversations(path, on_bad_row="skip", summary=summary)) == [SAID[0], SAID[2]]
    assert [(row.line, row.reason.partition(":")[0]) for row in summary.skipped] == [(2, "invalid JSON")]


@pytest.mark.parametrize("more", [0, 300_000])
def test_what_is_passed_over_after_a_broken_element_is_counted(tmp_path, more):
    """On one line nothing shows where the next row begins if its keys are in another order."""
    lost = '{"question":"二","answer":bad},{"answer":"' + "三" * (more + 1) + '","question":"三"},'
    text = '[{"question":"一","answer":"一"},' + lost + '{"question":"四","answer":"四"}]'
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    summary = ReadSummary()
    found = [row.messages[0].content for row in read_conversations(tmp_path, on_bad_row="skip", summary=summary)]
    assert found == ["一", "四"] and f"({len(lost):,} characters are left out)" in summary.skipped[0].reason


@pytest.mark.parametrize("indent", [None, 2])
def test_a_broken_element_costs_no_row_whose_first_key_is_another(tmp_path, indent):
    talk = [{"messages": turns("问", "答")}, {"id": 1, "messages": turns("甲", "乙")}, {"messages": turns("丙", "丁")}]
    path = tmp_path / "a.json"
    text = dumps(talk, indent=indent) if indent else "[\n" + ",\n".join(map(dumps, talk)) + "\n]"
    path.write_text(text.replace('"问"', '"问', 1), encoding="utf-8")
    summary = ReadSummary()
    found = read_conversations(path, on_bad_row="skip", summary=summary)
    assert said(found) == [("甲", "乙"), ("丙", "丁")] and len(summary.skipped) == 1


def test_a_json_list_that_ends_too_early_is_told(tmp_path):
    path = tmp_path / "a.json"
    for cut in (1, 12):
        path.write_text(dumps(QA)[:-cut], encoding="utf-8")
        summary = ReadSummary()
        assert said(read_conversations(path, on_bad_row="skip", summary=summary)) == SAID[: 3 if cut == 1 else 2]
        assert [row.reason.partition(":")[0] for row in summary.skipped] == ["invalid JSON"]


def test_a_list_in_rows_of_their_own_lines_is_not_the_data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(dumps(row | {"records": [{"text": "别处"}]}) + "\n" for row in QA), encoding="utf-8")
    assert detect_kind(path) == "conversations" and said(read_conversations(path)) == SAID


@pytest.mark.parametrize("around", ["{}", '{{"about": {{"x": [1]}}, "data": {}}}'])
def test_a_large_json_list_is_not_held_twice(tmp_path, around):
    path = tmp_path / "a.json"
    text = around.format(dumps([{"text": "文" * 10_000}] * 1_000))  # 10 million characters
    path.write_text(text, encoding="utf-8")
    tracemalloc.start()
    rows = sum(1 for _ in tables.read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 1_000 and peak < 12_000_000  # a block of two-byte characters, its copy and its bytes


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
    assert said(read_conversations(path)) == [SAID[0]] and detect_kind(path) == "conversations"


def test_a_cell_may_be_longer_than_131072_characters(tmp_path):
    path, long = tmp_path / "a.csv", "长" * 200_000
    path.write_text(f'question,answer\n问,"{long}\n第二行"\n问二,答二\n', encoding="utf-8")
    assert said(read_conversations(path)) == [("问", f"{long}\n第二行"), ("问二", "答二")]


@pytest.mark.parametrize(
    ("lines", "good", "bad"),
    [
        (['一,"没有结束', "二,答", "三,答"], ["二", "三"], [2]),
        (['一,"没有结束', "二,答", '三,"答"', "四,答"], ["二", "三", "四"], [2]),
        (['一,"没有结束', '二,"也没有', "三,答"], ["三"], [2, 3]),
        (['一,"引"号"', "二,答"], ["二"], [2]),
        (['"一"后,答', '"二","答\n答"', "三,答"], ["二", "三"], [2]),
        (['一,"甲', '乙 "丙" 丁, 戊', '己",庚', "二,答"], ["二"], [2, 3, 4]),  # no part of a cell becomes a row
        (["一,答,多", "二", "三,答"], ["三"], [2, 3]),
    ],
)
def test_a_bad_row_of_a_table_never_takes_the_good_one_after_it_along(tmp_path, lines, good, bad):
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
        (5, "an answer judged bad"), (6, "回答 is empty"),
    ]  # fmt: skip


def test_a_title_above_the_header_and_a_sheet_of_sums_cost_no_row(tmp_path):
    path = tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    for row in (["儿科问答", None], ["问题", "回答"], ["一", "甲"]):
        book.active.append(row)
    book.active.merge_cells("A1:B1")
    book.create_sheet("统计").append(["合计", "合计"])
    book.create_sheet("更多").append(["question", "answer"])
    book["更多"].append(["二", "乙"])
    book.save(path)
    summary = ReadSummary()
    assert said(read_conversations(path, on_bad_row="skip", summary=summary)) == [("一", "甲"), ("二", "乙")]
    assert [(row.file, row.reason.partition(",")[0]) for row in summary.skipped] == [
        (f"{path}:统计", "a sheet that is not read: found the column 合计 twice")
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_of_a_key_that_comes_twice_no_value_is_lost_silently(tmp_path, name):
    rows = [dumps(row) for row in QA]
    rows[1] = rows[1][:-1] + ', "answer": "另一个回答"}'
    path = tmp_path / name
    path.write_text("\n".join(rows) if name == "a.jsonl" else f"[{','.join(rows)}]", encoding="utf-8")
    summary = ReadSummary()
    assert said(read_conversations(path, on_bad_row="skip", summary=summary)) == [SAID[0], SAID[2]]
    assert [(row.line, "the key answer twice" in row.reason) for row in summary.skipped] == [(2, True)]


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
