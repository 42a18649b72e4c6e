"""A folder as people have it: 20 files of all encodings, formats and layouts, built in one go with one report."""

import gzip
import json
import random
import re
import zipfile

import openpyxl
import pyarrow as pa
import pytest
from pyarrow import parquet

WORDS = "咽扁桃腮腺鼻窦肺泡支气管胸膜心肌肝胆脾胃肠肾盂膀胱皮疹水疱红斑结痂"
BUILD = ["--heldout_share", "0", "--near_duplicate", "1", "--min_characters", "1"]


def asked(n):
    """A question and an answer that no other row has, nor any that is like them."""
    mixed = "".join(random.Random(n).sample(WORDS, 30))
    return f"孩子{mixed[:8]}，发烧咳嗽怎么办？", f"考虑{mixed[8:]}的问题，多喝水，去医院检查{mixed[::-1]}。"


def turns(n, user="user", assistant="assistant", role="role", content="content"):
    question, answer = asked(n)
    return [{role: user, content: question}, {role: assistant, content: answer}]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """The 20 files; rows are numbered, and row n is asked(n)."""
    top = tmp_path / "从 同事 那里"
    for name in ("export", "其他 项目", "指南"):
        (top / name).mkdir(parents=True)
    other = top / "其他 项目"
    book = openpyxl.Workbook()
    sheets = [book.active, book.create_sheet("第二页")]
    for sheet, rows in zip(sheets, ((0, 1, 2), (3, 4)), strict=True):
        sheet.append(["编号", "问题", "回答", "科室"])
        for n in rows:
            sheet.append([n, *asked(n), "儿科"])
    book.save(top / "儿科 问答 (最终版).xlsx")
    (top / "~$儿科 问答 (最终版).xlsx").write_bytes(b"lock")
    table = "\r\n".join(["提问;答复", *(";".join(asked(n)) for n in (5, 6, 7)), '问;"没有结束', ""])
    (top / "门诊导出.csv").write_bytes(table.encode("gb18030"))
    table = "question\tanswer\n" + "".join("\t".join(asked(n)) + "\n" for n in (8, 9, 10))
    (top / "export" / "excel.csv").write_bytes(table.encode("utf-16"))
    row = [{"question": asked(n)[0], "answer": asked(n)[1]} for n in range(160)]
    (top / "export" / "notepad.jsonl").write_bytes(lines(row[11:14]).encode("utf-16"))
    talk = {"messages": [turns(14), None], "instruction": [None, asked(15)[0]], "output": [None, asked(15)[1]]}
    parquet.write_table(pa.table(talk), top / "export" / "part-0.parquet")
    packed = lines(row[16:18]) + '{"question": "问' + "\n" + lines(row[18:19])
    (top / "export" / "talk.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    alpaca = [{"instruction": asked(n)[0], "input": "", "output": asked(n)[1], "history": None} for n in (19, 20)]
    (other / "alpaca.json").write_text(lines(alpaca), encoding="utf-8")
    sharegpt = [{"conversations": turns(n, "human", "gpt", "from", "value")} for n in (21, 22, 28)]
    sharegpt[2]["conversations"][0]["value"] = [{"type": "text", "text": asked(28)[0]}]
    (other / "sharegpt.jsonl").write_text(json.dumps(sharegpt, ensure_ascii=False, indent=1), encoding="utf-8")
    data = {"version": 1, "data": [{"conversation": turns(n, "患者", "医生")} for n in (23, 24)]}
    (other / "data.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    kto = [{"prompt": asked(n)[0], "completion": asked(n)[1], "label": n == 25} for n in (25, 26)]
    (other / "kto.jsonl").write_text(lines(kto), encoding="utf-8")
    worse = [turns(27)[0], {"role": "assistant", "content": "不知道。"}]
    (other / "dpo.jsonl").write_text(lines([{"chosen": turns(27), "rejected": worse}]), encoding="utf-8")
    (other / "dataset_info.json").write_text('{"mine": {"file_name": "alpaca.json"}}', encoding="utf-8")
    exam = [{"question": asked(29)[0], "option": {"A": "先测体温", "B": "立即用药"}, "answer": "A"}]
    (top / "exam.json").write_text(json.dumps(exam, ensure_ascii=False), encoding="utf-8")
    (top / "graph.tsv").write_text("小儿肺炎\t症状\t气促\n小儿肺炎\t检查\t胸片\n", encoding="utf-8")
    (top / "指南" / "小儿肺炎.md").write_text("# 小儿肺炎\n\n小儿肺炎常有发热、咳嗽和气促。\n", encoding="utf-8")
    (top / "README.md").write_text("# 说明", encoding="utf-8")
    (top / ".DS_Store").write_bytes(b"\0")
    (top / "scan.png").write_bytes(b"\x89PNG")
    with zipfile.ZipFile(top / "backup.zip", "w") as archive:
        archive.writestr("a.jsonl", "{}")
    assert sum(path.is_file() for path in top.rglob("*")) == 20
    return top


def test_a_messy_folder_of_twenty_files_builds_in_one_go_with_one_report(lab, folder, tmp_path):
    result = lab.call("build_corpus", ["--source", str(folder), "--output", str(tmp_path / "corpus"), *BUILD])
    assert result.code == 0, result.err
    for told in (
        "儿科 问答 (最终版).xlsx: 问题 → question, 回答 → answer, 科室 → department; ignored: 编号",
        "门诊导出.csv: 提问 → question, 答复 → answer",
        "export/part-0.parquet: messages",
        "其他 项目/dataset_info.json: not read: about the data, not data",
        "README.md: not read: about the data, not data",
        "backup.zip: not read: no file of a format that is read",
        "scan.png: not read: no file of a format that is read",
        "files not read: 4, listed above",
        "export_talk: left out 1 unreadable: invalid JSON",
        "门诊导出: left out 1 unreadable: invalid CSV",
        "其他_项目_kto: left out 1 unreadable: an answer judged bad",
    ):
        assert told in result.out, told

    # Every row is in the corpus, but for the one that was judged bad; the two broken ones are listed with their line.
    kept = {}
    for side in ("train", "heldout"):
        for path in (tmp_path / "corpus" / side).rglob("*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                for n in range(30):
                    if asked(n)[0] in line:
                        kept.setdefault(n, json.loads(line)["origin"]["place"])
                if asked(29)[0] in line:
                    assert f"{asked(29)[0]}\\nA. 先测体温\\nB. 立即用药" in line
    assert sorted(kept) == [n for n in range(30) if n != 26]
    assert [kept[n] for n in (2, 3, 7, 12, 15, 18, 24, 27)] == [
        "儿科 问答 (最终版).xlsx:4", "儿科 问答 (最终版).xlsx:第二页:2", "门诊导出.csv:4", "export/notepad.jsonl:2",
        "export/part-0.parquet:2", "export/talk.jsonl.gz:4", "其他 项目/data.json:2", "其他 项目/dpo.jsonl:1",
    ]  # fmt: skip
    dropped = [json.loads(line) for line in (tmp_path / "corpus/reports/dropped.jsonl").read_text("utf-8").splitlines()]
    assert [row["place"] for row in dropped if "unreadable" in row["reason"]] == [
        "export/talk.jsonl.gz:3", "其他 项目/kto.jsonl:2", "门诊导出.csv:5",
    ]  # fmt: skip


def test_problems_of_a_folder_are_told_together_with_what_the_readers_know(lab, tmp_path, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.csv").write_bytes("問題,回答\n孩子發燒怎麼辦,請多喝開水並觀察體溫\n".encode("big5"))
    (source / "b.jsonl").write_text('{"question": "问"}\n', encoding="utf-8")
    (source / "d.parquet").write_bytes(b"PAR1")
    (source / "e.jsonl.gz").write_bytes(gzip.compress(b'{"question": "q", "answer": "a"}\n' * 9)[:-20])
    (source / "good.jsonl").write_text('{"question": "问", "answer": "答"}\n', encoding="utf-8")
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (source / "f.xlsx").write_bytes(b"PK")
    result = lab.call("build_corpus", ["--source", str(source), "--output", str(tmp_path / "corpus")])
    assert result.code == 2 and not (tmp_path / "corpus").exists()
    for told in (
        "a.csv: cannot be read after line 0: found neither UTF-8 nor UTF-16 nor GB18030; convert it, perhaps by iconv ",
        "b.jsonl: rows of no known kind, found the fields question; if it is data, name its fields by `columns`",
        "d.parquet: cannot be read after line 0: ",
        "e.jsonl.gz: cannot be read after line 0: ",
        'f.xlsx: reading it needs openpyxl: pip install -e ".[tables]"',
    ):
        assert told in result.err, told
    assert len(result.err.splitlines()) == 5 and "found no row" not in result.err


def test_one_file_is_a_source_and_its_columns_can_be_named(lab, tmp_path):
    path = tmp_path / "我的 数据.jsonl"
    rows = [{"q_text": asked(n)[0], "a_text": asked(n)[1]} for n in range(40)]
    path.write_text(lines(rows), encoding="utf-8")
    arguments = ["--source", str(path), "--output", str(tmp_path / "corpus"), *BUILD]
    unnamed = lab.call("build_corpus", arguments)
    told = "数据.jsonl: not read: rows of no known kind, found the fields q_text, a_text; if it is data, name"
    assert unnamed.code == 2 and told in unnamed.err
    wrong = lab.call("build_corpus", [*arguments, "--columns", "question=q_text", "answer=nowhere"])
    assert wrong.code == 2 and told.replace("not read: ", "") in wrong.err
    named_columns = ["--columns", "question=q_text", "answer=a_text"]
    named = lab.call("build_corpus", [*arguments, *named_columns])
    assert named.code == 0 and "我的 数据.jsonl: q_text → question, a_text → answer" in named.out
    (tmp_path / "corpus.toml").write_text(
        f'[[source]]\nkind = "instructions"\nfile = "{path.name}"\nname = "mine"\n'
        'columns = ["question=q_text", "answer=a_text"]\n', encoding="utf-8",
    )  # fmt: skip
    listing, output = tmp_path / "corpus.toml", tmp_path / "two"
    listed = lab.call("build_corpus", ["--source", str(listing), "--output", str(output), *BUILD])
    assert listed.code == 0, listed.err
    assert json.loads((output / "manifest.json").read_text("utf-8"))["sources"]["mine"]["read"] == 40
    listing.unlink()  # two corpora now lie in the folder of the file that they were built from: they are no sources
    again = lab.call("build_corpus", ["--source", str(tmp_path), "--output", str(output), *BUILD, *named_columns])
    assert again.code == 0 and "corpus: not read: a corpus that was built from sources" in again.out
    assert json.loads((output / "manifest.json").read_text("utf-8"))["sources"]["我的_数据"]["read"] == 40


STAGES = {
    "continued_pretrain": ("text", {"body": "孩子发烧要多喝水。"}, ["text=body"]),
    "full_finetune": ("instructions", {"ask": "怎么办？", "reply": "多喝水。"}, ["question=ask", "answer=reply"]),
    "dfpo": ("preferences", {"ask": "怎么办？", "good": "别急。", "bad": "等。"},
             ["prompt=ask", "chosen=good", "rejected=bad"]),
    "expert_finetune": ("instructions", {"ask": "怎么办？", "reply": "多喝水。"}, ["question=ask", "answer=reply"]),
}  # fmt: skip


@pytest.mark.parametrize("recipe", STAGES)
def test_every_stage_takes_named_columns_and_cuts_long_rows(lab, tmp_path, recipe):
    data, row, columns = STAGES[recipe]
    last = list(row)[-1]
    long = {**row, last: row[last] + "长" * 500}
    path = tmp_path / "rows.csv"
    path.write_text("".join(",".join(each) + "\n" for each in (row, row.values(), long.values())), encoding="gb18030")
    settings = {data: path, "columns": columns, "max_steps": 1, "instruction_share": 0, "instructions": None}
    if recipe != "continued_pretrain":  # there a long text goes on in the next row
        settings = {data: path, "columns": columns, "max_steps": 1, "on_long_row": "truncate"}
    with pytest.warns(UserWarning, match="heldout.*found none of the columns .*, so the file's own names are used"):
        result = lab.run(recipe, tmp_path / "run", **settings)
    assert result.code == 0, result.err
    assert ("1 over-long, cut to fit" in result.out) == (recipe != "continued_pretrain")
    assert re.search(rf"{path} +2 +0\n", result.out)
