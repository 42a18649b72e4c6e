"""What the synthetic sample corpus promises, read from its files without pedgpt."""

import csv
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "sample_corpus"
RELATIONS = {"症状", "好发年龄", "病因", "检查", "治疗", "预防", "并发症"}
JSONL = sorted(path.name for path in FOLDER.glob("*.jsonl"))
DOSE = re.compile(
    r"毫克|微克|毫升|国际单位|[/每](kg|公斤|千克)|\d\s*(mg|ml|IU|g)\b|每次.{0,3}[片粒袋滴支]", re.IGNORECASE
)


def rows(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def asked_and_said(row):
    """All user texts and all other texts of a row of any format."""
    if "conversations" in row or "messages" in row:
        turns = [(t.get("from", t.get("role")), t.get("value", t.get("content")))
                 for t in row.get("conversations", row.get("messages"))]  # fmt: skip
        asked = [text for role, text in turns if role in ("human", "user")]
        return asked, [text for role, text in turns if role not in ("human", "user")]
    asked = [row[key] for key in ("prompt", "question", "instruction", "input", "title") if row.get(key)]
    return asked, [row[key] for key in ("chosen", "rejected", "answer", "output", "text") if row.get(key)]


@pytest.fixture(scope="module")
def graph():
    facts = defaultdict(lambda: defaultdict(list))
    with (FOLDER / "knowledge_graph.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.reader((line for line in file if not line.startswith("#")), delimiter="\t"):
            head, relation, tail = row
            facts[head][relation].append(tail)
    return facts


def test_graph_has_sixty_diseases_with_all_seven_relations(graph):
    assert len(graph) >= 60
    for head, relations in graph.items():
        assert set(relations) == RELATIONS, head
        assert len(relations["症状"]) >= 3, head
        for tails in relations.values():
            assert len(set(tails)) == len(tails) and all(tail == tail.strip() != "" for tail in tails), head


@pytest.mark.parametrize(("name", "least"), [("textbook", 60), ("guidelines", 30), ("consultations", 60),
                                             ("preferences", 300)])  # fmt: skip
def test_sources_are_as_large_as_promised(name, least):
    assert len(rows(f"{name}.jsonl")) >= least


def test_consultations_have_several_turns_and_preferences_two_answers(graph):
    for row in rows("consultations.jsonl"):
        asked, said = asked_and_said(row)
        assert len(asked) == len(said) >= 2 and row["disease"] in graph
    for row in rows("preferences.jsonl"):
        assert row["chosen"] != row["rejected"] and len(row["chosen"]) > 10 < len(row["rejected"])
        assert row["disease"] in graph


@pytest.mark.parametrize("name", [*JSONL, "knowledge_graph.tsv"])
def test_no_answer_gives_a_dose(name, graph):
    if name.endswith("jsonl"):
        said = [text for row in rows(name) for text in asked_and_said(row)[1]]
    else:
        said = [tail for relations in graph.values() for tails in relations.values() for tail in tails]
    assert said and not [text for text in said if DOSE.search(text)]


def test_dose_pattern_finds_doses():
    for text in ("每次10毫克/千克", "5 mg", "每公斤体重", "10ml", "每次两片", "400IU"):
        assert DOSE.search(text)
    assert not DOSE.search("收缩压140毫米汞柱，每天两次，三片红斑")


@pytest.mark.parametrize("name", JSONL)
def test_files_are_clean_and_prompts_unique(name):
    raw = (FOLDER / name).read_bytes()
    text = raw.decode("utf-8")  # strictly
    assert not raw.startswith(b"\xef\xbb\xbf") and b"\r" not in raw and raw.endswith(b"\n") and b"\n\n" not in raw
    assert "\ufffd" not in text and not re.search(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]", text)
    first = ["".join(asked_and_said(row)[0]) for row in rows(name)]
    assert len(set(first)) == len(first)
    assert all(text.strip() for row in rows(name) for texts in asked_and_said(row) for text in texts)


def test_listing_names_every_file():
    listed = re.findall(r'^file = "(.+)"$', (FOLDER / "corpus.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == sorted([*JSONL, "knowledge_graph.tsv"])
