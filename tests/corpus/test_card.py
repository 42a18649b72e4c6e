"""The manifest and the card say what is in the files, by hand arithmetic; and a build depends on its input alone."""

import importlib.util
import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from pedgpt.corpus.assemble import Assembly, Limits
from pedgpt.corpus.build import Step
from pedgpt.corpus.card import statistics_table, write_card
from pedgpt.corpus.rows import Built, Dropped
from pedgpt.corpus.sources import Source
from pedgpt.corpus.split import Split
from pedgpt.data import Conversation, Document, Message, PreferencePair, ReadSummary

ROOT = Path(__file__).resolve().parents[2]
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 2500)]
SPLIT = Split(["肺炎", "水痘"], heldout_share=0.5, seed=0)
HELD = next(name for name in ("肺炎", "水痘") if SPLIT.side(f"disease/{name}") == "heldout")
TRAINED = ({"肺炎", "水痘"} - {HELD}).pop()
TALK = Source("instructions", "talk", licence="CC BY 4.0 | 学术用途\n仅限", weight=2.0, build=("reconstruct",))
BOOK = Source("encyclopedia", "book", domain="", epochs=1.5)
TEMPLATES = Source("safety", "safety")


def words(seed, n):
    return "".join(random.Random(seed).sample(HAN, n))


def talk(asked, answered, disease=TRAINED, task="MedKQ&A"):
    messages = Message("user", words(asked, asked)), Message("assistant", words(answered, answered))
    return Conversation(messages, f"talk.jsonl:{asked}", task, disease)


def pair(disease=TRAINED):
    return PreferencePair((Message("user", words(90, 20)),), words(91, 50), words(92, 10), "talk.jsonl:9", disease)


def made(folder, inputs, summaries=None):
    """Build a corpus of (source, row) and write its manifest and card."""
    limits = Limits(1, 5000, 0.0, 0.9, 100, False, 0)
    assembly = Assembly(folder, limits, SPLIT)
    for source, row in inputs:
        assembly.take([Step("", row)], source)
    assembly.finish(0.5)
    summaries = summaries or {source.name: ReadSummary() for source in (TALK, BOOK, TEMPLATES)}
    settings = {"seed": 0, "evaluation": ["e.jsonl"]}
    written = assembly.write_manifest([TALK, BOOK, TEMPLATES], settings, summaries)
    write_card(folder, assembly.statistics, written)
    return assembly, written


INPUTS = [
    *((TALK, Built(talk(20 + i, 100 + i))) for i in range(4)),
    (TALK, Built(talk(30, 200, HELD))),
    (TALK, Built(talk(41, 301, task="safety"))),
    (TALK, Built(pair())),
    (BOOK, Built(Document(words(1, 1000), "book.txt", "", TRAINED))),
    (BOOK, Built(Document(words(2, 1500), "book.txt", "", TRAINED))),
    (BOOK, Built(Document(words(2, 1500), "book.txt", "", TRAINED))),
    (BOOK, Dropped("book.txt", "cannot | be\nused", "why")),
    (TEMPLATES, Built(talk(43, 303, task="safety"))),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    summary = ReadSummary({"a/talk.jsonl": 5, "a/more.jsonl": 3})
    summary.skip("a/talk.jsonl:3", "invalid JSON: found [, expected one object")
    summaries = {"talk": summary, "book": ReadSummary({"book.txt": 4}), "safety": ReadSummary()}
    folder = tmp_path_factory.mktemp("card") / "corpus"
    return folder, *made(folder, INPUTS, summaries)


def cells(text, heading):
    """The rows of the first table under a heading."""
    lines = text.split(f"## {heading}\n", 1)[1].split("\n## ")[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    rows = [line.replace("\\|", "\0").strip("|").split("|") for line in table]
    return [[cell.strip().replace("\0", "|") for cell in row] for row in rows[2:]]


def test_manifest_counts_by_hand(corpus):
    folder, _, written = corpus
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8")) == written
    assert written["rows"] == {
        "generalist/safety": {"train": 2, "heldout": 0}, "preferences": {"train": 1, "heldout": 0},
        "tasks/medkqa": {"train": 4, "heldout": 1}, "tasks_sample": {"train": 2, "heldout": 0},
        "text/pediatric": {"train": 2, "heldout": 0},
    }  # fmt: skip
    assert written["dropped"] == {"book": {"cannot | be\nused": 1, "exact duplicate": 1}}
    counts = {name: (s["read"], s["skipped"], s["built"]) for name, s in written["sources"].items()}
    assert counts == {"talk": (8, 1, 7), "book": (4, 0, 4), "safety": (0, 0, 1)}
    talk, book = written["sources"]["talk"], written["sources"]["book"]
    assert (talk["licence"], talk["weight"], talk["epochs"]) == (TALK.licence, 2.0, 0.0)
    assert (book["licence"], book["weight"], book["epochs"]) == ("not stated", 1.0, 1.5)
    for file in written["files"]:
        assert (folder / file["path"]).read_bytes().count(b"\n") == file["rows"]
    assert [file["path"] for file in written["files"]] == sorted(file["path"] for file in written["files"])
    assert str(folder.parent) not in json.dumps(written, ensure_ascii=False)
    assert "20" + "26" not in json.dumps({k: v for k, v in written.items() if k != "files"})  # nor a date


def test_card_counts_by_hand(corpus):
    folder, *_ = corpus
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "9 rows for training and 1 held out" in card and "from 3 sources" in card
    assert cells(card, "Rows by source and table") == [
        ["generalist/safety", "safety", "1", "0", "1.0", "43", "303"],
        ["generalist/safety", "talk", "1", "0", "1.0", "41", "301"],
        ["preferences", "talk", "1", "0", "1.0", "20", "50"],
        # Questions of 20 to 23 and 30 characters, answers of 100 to 103 and 200.
        ["tasks/medkqa", "talk", "4", "1", "1.0", "23", "121"],
        ["tasks_sample", "talk", "2", "0", "1.0", "22", "102"],
        ["text/pediatric", "book", "2", "0", "–", "–", "1,250"],
    ]
    assert [row[:1] + row[3:] for row in cells(card, "Sources")] == [
        ["talk", "8", "1", "7", "2"], ["book", "4", "0", "4", "1.5 epochs"], ["safety", "0", "0", "1", "1"],
    ]  # fmt: skip
    assert cells(card, "Left out")[1] == ["book", "exact duplicate", "1"]


def test_names_with_bars_and_line_breaks_leave_the_tables_whole(corpus):
    folder, *_ = corpus
    card = (folder / "README.md").read_text(encoding="utf-8")
    blocks = [block.splitlines() for block in card.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3
    for lines in blocks:
        assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
        widths = {line.replace("\\|", "").count("|") for line in lines}
        assert len(widths) == 1
    (licence,) = [row[2] for row in cells(card, "Sources") if row[0] == "talk"]
    assert licence.startswith("CC BY 4.0 | 学术用途") and licence.endswith("仅限")


def test_statistics_of_nothing_and_a_card_without_rows(tmp_path):
    assembly, written = made(tmp_path / "corpus", [])
    assert len(statistics_table(assembly.statistics).splitlines()) == 2 and written["files"] == []
    card = (tmp_path / "corpus" / "README.md").read_text(encoding="utf-8")
    assert "Nothing." in card and "0 rows for training and 0 held out" in card


def talks(rng, count):
    names = "咽扁桃腮腺鼻窦肺泡支气管胸膜心肌肝胆脾胃肠肾盂膀胱皮疹水疱红斑结痂"
    for _ in range(count):
        text = "".join(rng.sample(names, 30))
        yield {"messages": [
            {"role": "user", "content": f"孩子{text[:8]}，发烧咳嗽怎么办？"},
            {"role": "assistant", "content": f"考虑{text[8:]}的问题，多喝水，去医院检查{text[::-1]}。"},
        ]}  # fmt: skip


LISTING = """
[[source]]
file = "图谱.tsv"
kind = "knowledge_graph"
build = ["text", "medkqa", "evidiag", "trerecom", "two_hop", "negative", "preferences"]
[[source]]
file = "book.md"
kind = "textbook"
build = ["role_play", "preferences"]
[[source]]
file = ["my talks/a.jsonl", "more"]
name = "talks"
kind = "instructions"
build = ["reconstruct", "preferences"]
[[source]]
kind = "self_cognition"
"""


def test_bytes_depend_neither_on_hash_seeds_nor_on_where_the_sources_lie(tmp_path, python):
    """Built in this process and in another one, whose hash seed is another."""
    recipe, seed, made = ROOT / "recipes" / "build_corpus.py", "12345", []
    assert os.environ.get("PYTHONHASHSEED") != seed
    spec = importlib.util.spec_from_file_location("build_corpus", recipe)
    here = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(here)
    for place in ("one", "another place/深"):
        source = tmp_path / place / "source"
        (source / "more").mkdir(parents=True)
        (source / "my talks").mkdir()
        rng = random.Random(0)
        (source / "corpus.toml").write_text(LISTING, encoding="utf-8")
        for path in ("my talks/a.jsonl", "more/b.jsonl"):
            lines = [json.dumps(row, ensure_ascii=False) for row in talks(rng, 30)]
            (source / path).write_text("\n".join([*lines, lines[0], "{"]), encoding="utf-8")
        facts = ["症状 头痛", "症状 咳嗽", "症状 皮疹", "好发年龄 幼儿", "检查 血常规", "治疗 休息", "预防 洗手"]
        facts += ["并发症 脱水"]
        graph = [f"{name}\t{relation}\t{name[0]}{tail}\n" for name in "百日咳 手足口病 水痘 麻疹 风疹 肺炎".split()
                 for relation, tail in map(str.split, facts)]  # fmt: skip
        (source / "图谱.tsv").write_text("".join(graph), encoding="utf-8")
        book = "# 肺炎\n\n## 治疗\n\n患儿应注意休息，多饮水，保持呼吸道通畅。必要时住院治疗。\n"
        (source / "book.md").write_text(book, encoding="utf-8")
        folder = tmp_path / place / "out"
        if place == "one":
            here.main(here.Config(source=str(source), output=str(folder), heldout_share=0.3))
        else:
            command = [python, str(recipe), "--source", source, "--output", folder, "--heldout_share", "0.3"]
            env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, env=env)
            assert done.returncode == 0, done.stderr.decode()
        made.append({str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})
    assert made[0].keys() == made[1].keys() and len(made[0]) > 15
    assert {name for name in made[0] if made[0][name] != made[1][name]} == set()
    assert not any(str(tmp_path).encode() in data for data in made[0].values())
