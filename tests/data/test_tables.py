"""Files as people have them: encodings, shapes of JSON, tables, folders. Every expectation is written by hand."""

import csv
import gzip
import json
import re
import tracemalloc

import openpyxl
import pyarrow as pa
import pytest
from pyarrow import parquet

from pedgpt.data import tables
from pedgpt.data.readers import (
    BadRow,
    NoData,
    detect_kind,
    parse_columns,
    read_conversations,
    read_documents,
    read_preferences,
    read_triples,
)
from pedgpt.data.records import Message, PreferencePair, ReadSummary

QA = [{"question": f"第{n}个问题：孩子发烧怎么办？", "answer": f"第{n}个回答：多喝水，观察体温。"} for n in range(3)]
SAID = [(row["question"], row["answer"]) for row in QA]


def dumps(value, **how):
    return json.dumps(value, ensure_ascii=False, **how)


def said(records):
    """The texts of each conversation."""
    return [tuple(message.content for message in record.messages) for record in records]


def pair(question, answer):
    return (Message("user", question), Message("assistant", answer))


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.csv.gz"])
def test_a_file_is_read_whatever_its_encoding(tmp_path, encoding, name):
    texts = {
        "a.jsonl": "".join(dumps(row) + "\r\n" for row in QA),
        "a.json": dumps(QA, indent=2),
        "a.csv": "question,answer\n" + "".join(f"{q},{a}\n" for q, a in SAID),
        "a.txt": "一二三四五六。\r\n小儿肺炎是常见病，治疗以休息为主。",
    }
    data = texts[name.removesuffix(".gz")].encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    if name == "a.txt":
        assert [each.text for each in read_documents(path)] == [texts[name].replace("\r\n", "\n")]
    else:
        assert said(read_conversations(path)) == SAID and detect_kind(path) == "conversations"


def test_english_utf16_and_ascii_before_chinese_are_told_apart(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"question": "How high is a fever?", "answer": "38 degrees."}\n'.encode("utf-16-be"))
    assert said(read_conversations(path)) == [("How high is a fever?", "38 degrees.")]
    ascii_rows = '{"question": "q", "answer": "a"}\n' * 9_000  # more than is looked at in one piece
    path.write_bytes((ascii_rows + dumps(QA[0]) + "\n").encode("gb18030"))
    assert said(read_conversations(path))[-1] == SAID[0]


def test_a_broken_byte_in_a_gb18030_file_costs_its_own_row(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [(dumps(row) + "\n").encode("gb18030") for row in QA]
    path.write_bytes(rows[0] + rows[1].replace("发烧".encode("gb18030"), b"\xff\xff") + rows[2])
    summary = ReadSummary()
    assert said(read_conversations(path, on_bad_row="skip", summary=summary)) == [SAID[0], SAID[2]]
    assert [row.line for row in summary.skipped] == [2]


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


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_lines_that_end_at_a_carriage_return_are_lines(tmp_path, name):
    path = tmp_path / name
    rows = ["question,answer", *(",".join(texts) for texts in SAID)] if name == "a.csv" else map(dumps, QA)
    path.write_bytes("\r".join(["# 发热", "甲"] if name == "a.txt" else rows).encode())
    if name == "a.txt":
        assert [(row.text, row.title) for row in read_documents(path)] == [("# 发热\n甲", "发热")]
    else:
        assert said(read_conversations(path)) == SAID
        assert [line for line, _ in tables.read_rows(path)] == ([2, 3, 4] if name == "a.csv" else [1, 2, 3])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_of_a_key_that_comes_twice_no_value_is_lost_silently(tmp_path, name):
    rows = [dumps(row) for row in QA]
    rows[1] = rows[1][:-1] + ', "answer": "另一个回答"}'
    path = tmp_path / name
    path.write_text("\n".join(rows) if name == "a.jsonl" else f"[{','.join(rows)}]", encoding="utf-8")
    summary = ReadSummary()
    assert said(read_conversations(path, on_bad_row="skip", summary=summary)) == [SAID[0], SAID[2]]
    assert [(row.line, "the key answer twice" in row.reason) for row in summary.skipped] == [(2, True)]


def test_an_object_by_id_is_named_by_a_few_of_its_keys(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(dumps({str(n): QA[0] for n in range(5_000)}), encoding="utf-8")
    with pytest.raises(NoData, match="found the fields 0, 1, .*, 19, …; if it is data") as error:
        detect_kind(path)
    assert len(str(error.value)) < 400


# Rows of other projects


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
        ({"question": "问", "options": ["甲", "乙"], "answer": "B"}, ("问\nA. 甲\nB. 乙", "B")),
        ({"question": "问", "options": ["A．甲", "B．乙"], "answer": "B"}, ("问\nA．甲\nB．乙", "B")),
        ({"question": "问", "options": [{"key": "A", "value": "甲"}], "answer": "A"}, ("问\nA. 甲", "A")),
        ({"Question": "问", "Options": "A 甲\nB 乙", "Answer": "A"}, ("问\nA 甲\nB 乙", "A")),
        ({"question": "问\nA. 甲", "option": {"A": "甲"}, "answer": "A"}, ("问\nA. 甲", "A")),
        ({"question": "问", "option": {"A": "E.coli", "B": "B.fragilis"}, "answer": "A"},
         ("问\nA. E.coli\nB. B.fragilis", "A")),
        ({"question": "问", "choices": {"label": ["A", "B"], "text": ["甲", "乙"]}, "answer": "B"},
         ("问\nA. 甲\nB. 乙", "B")),
        ({"question": "问", "options": [{"A": "甲"}, {"B": 10.5}], "answer": "B"}, ("问\nA. 甲\nB. 10.5", "B")),
        ({"Question": "问", "A": "5", "B": "50", "C": None, "D": "丁", "Answer": "B"},
         ("问\nA. 5\nB. 50\nD. 丁", "B")),
        ({"question": "问A. 50", "options": {"A": 5, "B": 50}, "answer": "B"}, ("问A. 50\nA. 5\nB. 50", "B")),
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
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_an_answer_that_was_judged_bad_is_never_learnt(tmp_path, label, policy):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "问", "completion": "错", {label}}}\n{dumps(QA[0])}\n', encoding="utf-8")
    summary = ReadSummary()
    assert said(read_conversations(path, on_bad_row=policy, summary=summary)) == [SAID[0]]
    assert [(row.line, row.reason.partition(":")[0]) for row in summary.skipped] == [(1, "an answer judged bad")]
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
        (turns("一", "好"), turns("二", "坏"), "no user turn at the end"),
        (turns("一", "好"), turns("一", "好"), "chosen equals rejected"),
        (turns("一", "甲", "三", "好"), turns("一", "乙", "三", "坏"), "chosen repeats another prompt"),
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
        (["question"], "question= is not of the form field=column; expected the name of a column"),
        (["qestion=ask"], "did you mean 'question'"),
        (["question=a", "question=b"], "a field is given twice"),
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
    told = {row.file.removeprefix(f"{tmp_path}/"): row.reason.removeprefix("left out, ") for row in summary.skipped}
    assert told == {
        "README_zh.md": "about the data, not data", "LICENSE": "about the data, not data",
        "dataset_info.json": "about the data, not data", "sub/.git": "hidden or temporary",
        ".a.jsonl.swp": "hidden or temporary", "~$a.xlsx": "hidden or temporary", "x.zip": "an archive; unpack it",
        "y.png": "not a format that is read", "empty.jsonl": "empty", "broken.jsonl": "not a plain file",
        "link": "a link to a folder; name that folder itself",
    }  # fmt: skip
    assert f"1 left out, an archive; unpack it: {tmp_path}/x.zip" in summary.describe()


def test_all_paths_that_are_wrong_are_told_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError) as error:
        read_conversations([tmp_path / "no.jsonl", tmp_path / "empty", tmp_path / "a.bin"])
    assert [line.partition(": found")[0] for line in str(error.value).splitlines()] == [
        f"{tmp_path}/no.jsonl", f"{tmp_path}/empty", f"{tmp_path}/a.bin",
    ]  # fmt: skip


@pytest.mark.parametrize("content", ['{"a": {"file_name": "b"}}', "[1, 2]", '{"name": "x"}', "q_text,a_text\n问,答\n"])
def test_a_file_without_a_known_field_is_no_data(tmp_path, content):
    path = tmp_path / ("a.csv" if content.startswith("q_text") else "a.json")
    path.write_text(content, encoding="utf-8")
    with pytest.raises(NoData, match="a.*no known field, found "):
        detect_kind(path)
