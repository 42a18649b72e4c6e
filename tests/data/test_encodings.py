"""Bytes as people save them: encodings, byte-order marks, line ends, broken characters."""

import gzip
import json

import pytest

from pedgpt.data.readers import (
    BadRow,
    detect_kind,
    iter_records,
    read_conversations,
    read_documents,
)
from pedgpt.data.records import Conversation, Document, Message, ReadSummary, Triple


def read_triples(path, **settings):
    return list(iter_records(path, "triples", **settings))


QA = [{"question": f"第{n}个问题：孩子发烧怎么办？", "answer": f"第{n}个回答：多喝水，观察体温。"} for n in range(3)]
SAID = [(row["question"], row["answer"]) for row in QA]


def dumps(value, **how):
    return json.dumps(value, ensure_ascii=False, **how)


def said(records):
    """The texts of each conversation."""
    return [tuple(message.content for message in record.messages) for record in records]


def user(text):
    return Message("user", text)


def assistant(text):
    return Message("assistant", text)


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
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


def test_utf16_of_either_order_and_late_chinese_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"question": "How high is a fever?", "answer": "38 degrees."}\n'.encode("utf-16-be"))
    assert said(read_conversations(path)) == [("How high is a fever?", "38 degrees.")]
    ascii_rows = '{"question": "q", "answer": "a"}\n' * 9_000  # more than is looked at in one piece
    path.write_text(ascii_rows + dumps(QA[0]) + "\n", encoding="utf-8")
    assert said(read_conversations(path))[-1] == SAID[0]


def test_a_broken_byte_in_a_gb18030_file_costs_its_own_row(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [(dumps(row) + "\n").encode("gb18030") for row in QA]
    path.write_bytes(rows[0] + rows[1].replace("发烧".encode("gb18030"), b"\xff\xff") + rows[2])
    summary = ReadSummary()
    assert said(read_conversations(path, on_bad_row="skip", summary=summary)) == [SAID[0], SAID[2]]
    assert [row.line for row in summary.skipped] == [2]


ENCODED = {
    "a.jsonl": (read_conversations, ['{"question": "问", "answer": "答"}'] * 3, 2),
    "a.json": (
        read_conversations,
        ['[{"question": "问", "answer": "答"}', ',{"question": "问", "answer": "答"}', "]"],
        2,
    ),
    "a.csv": (read_conversations, ["question,answer", '问,"答', '二"', "问,答"], 3),
    "a.tsv": (read_triples, ["感冒\t症状\t发热"] * 3, 2),
}


@pytest.mark.parametrize("name", ENCODED)
def test_gb18030_bytes_in_one_line_cost_that_row_alone(tmp_path, name):
    reader, lines, bad_line = ENCODED[name]
    path = tmp_path / name
    path.write_bytes(
        b"\n".join(line.encode("gb18030" if n == bad_line else "utf-8") for n, line in enumerate(lines, 1))
    )
    row_line = 2  # where the row begins that holds the bad line; in a.json, the element's number
    with pytest.raises(BadRow, match=rf"{name}:{row_line}: invalid UTF-8: .*iconv"):
        reader(path)
    summary = ReadSummary()
    good = reader(path, on_bad_row="skip", summary=summary)
    assert [row.line for row in summary.skipped] == [row_line]
    assert len(good) == {"a.json": 1, "a.csv": 1}.get(name, 2)


@pytest.mark.parametrize("encoding", ["big5", "utf-16-le"])  # the second without its mark
def test_a_file_of_another_encoding_is_refused_under_either_policy(tmp_path, encoding):
    path = tmp_path / "a.csv"
    path.write_bytes("醫師,question,answer\n劉大夫,咳嗽發燒怎麼辦,請多喝開水\n".encode(encoding))
    for policy in ("error", "skip"):
        with pytest.raises(ValueError, match=rf"{path}: cannot be read .*found neither UTF-8 .* iconv -f BIG5"):
            read_conversations(path, on_bad_row=policy)


def test_a_report_can_be_written_as_utf8_whatever_the_row_holds(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"\\ud83d": 1}\n{"messages": [{"role": "\\ud83d", "content": "a"}]}\n')
    summary = ReadSummary()
    assert read_conversations(path, on_bad_row="skip", summary=summary) == []
    assert len(summary.skipped) == 2
    assert all(row.reason.encode() for row in summary.skipped)


def test_invalid_utf8_in_a_text_file_is_reported_at_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("一\n二\n".encode() + "三\n".encode("gb18030"))
    with pytest.raises(BadRow, match=r"a\.txt:3: invalid UTF-8"):
        read_documents(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.md"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_and_crlf_are_accepted(tmp_path, name, newline):
    contents = {
        "a.jsonl": ['{"question": "问", "answer": "答"}', ""],
        "a.json": ["[", '{"question": "问", "answer": "答"}', "]"],
        "a.csv": ["question,answer", "问,答", ""],
        "a.tsv": ["head\trelation\ttail", "感冒\t症状\t发热", ""],
        "a.md": ["# 题", "文"],
    }
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + newline.join(contents[name]).encode())
    if name == "a.md":
        assert read_documents(path) == [Document("# 题\n文", str(path), "题")]
    elif name == "a.tsv":
        assert read_triples(path) == [Triple("感冒", "症状", "发热", f"{path}:2")]
    else:
        line = 2 if name == "a.csv" else 1
        assert read_conversations(path) == [Conversation((user("问"), assistant("答")), f"{path}:{line}")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1e"])
def test_unicode_line_separators_inside_text_do_not_split_a_row(tmp_path, separator):
    text = f"前{separator}后"
    table = tmp_path / "a.csv"
    table.write_text(f"question,answer\n{text},答\n问,答\n", encoding="utf-8", newline="")
    assert [each.source for each in read_conversations(table)] == [f"{table}:2", f"{table}:3"]
    assert read_conversations(table)[0].messages[0] == user(text)
    graph = tmp_path / "a.tsv"
    graph.write_text(f"{text}\t症状\t发热\n", encoding="utf-8", newline="")
    assert read_triples(graph) == [Triple(text, "症状", "发热", f"{graph}:1")]
    if separator >= "\x80":  # JSON allows these bare; the control characters it does not
        rows = write(tmp_path / "a.jsonl", {"question": text, "answer": "答"}, {"question": "问", "answer": "答"})
        assert [each.source for each in read_conversations(rows)] == [f"{rows}:1", f"{rows}:2"]
        assert read_conversations(rows)[0].messages[0] == user(text)


def test_a_late_bad_row_has_its_exact_line_number(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "x\xe2\x80\xa8"}\n'
    path.write_bytes(good * 20_000 + b"\n" * 10_000 + b'{"text": 1}\n' + good)  # more than is looked at in one piece
    with pytest.raises(BadRow, match=r"a\.jsonl:30001: text has the wrong type"):
        read_documents(path)
    table = tmp_path / "a.csv"
    table.write_bytes(b"question,answer\n" + b'q,"%s\nb"\n' % (b"a" * 25) * 10_000 + b"q\n")
    with pytest.raises(BadRow, match=r"a\.csv:20002: wrong number of columns"):
        read_conversations(table)
