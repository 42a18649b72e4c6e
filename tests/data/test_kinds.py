"""Which kind of records a file holds, by its content."""

import json

import pytest

from pedgpt.data.readers import (
    NoData,
    detect_kind,
)


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


GOOD = {
    "documents": {"text": "文"},
    "conversations": {"question": "问", "answer": "答"},
    "preferences": {"prompt": "问", "chosen": "好", "rejected": "坏"},
    "triples": {"head": "感冒", "relation": "症状", "tail": "发热"},
}


@pytest.mark.parametrize("kind", GOOD)
def test_the_kind_is_found_by_content_after_bad_rows(tmp_path, kind):
    path = tmp_path / "misleading_name.jsonl"
    path.write_text("not JSON\n{}\n" + json.dumps(GOOD[kind], ensure_ascii=False), encoding="utf-8")
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
    path = write(tmp_path / "odd.jsonl", {"a": 1})
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for wrong in (path, tmp_path / "empty.jsonl", tmp_path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(ValueError, match=wrong.name):
            detect_kind(wrong)


def dumps(value, **how):
    return json.dumps(value, ensure_ascii=False, **how)


QA = {"question": "问", "answer": "答"}


def test_an_object_by_id_is_named_by_a_few_of_its_keys(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(dumps({str(n): QA for n in range(5_000)}), encoding="utf-8")
    with pytest.raises(NoData, match="found the fields 0, 1, .*, 19; if it is data") as error:
        detect_kind(path)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", ['{"a": {"file_name": "b"}}', "[1, 2]", '{"name": "x"}', "q_text,a_text\n问,答\n"])
def test_a_file_without_a_known_field_is_no_data(tmp_path, content):
    path = tmp_path / ("a.csv" if content.startswith("q_text") else "a.json")
    path.write_text(content, encoding="utf-8")
    with pytest.raises(NoData, match="a.*rows of no known kind, found the fields "):
        detect_kind(path)
