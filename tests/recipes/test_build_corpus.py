"""build_corpus as a command; what it writes is read back without pedgpt's readers."""

import csv
import hashlib
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPES, SAMPLE = ROOT / "recipes", ROOT / "recipes" / "sample_corpus"
SHARED = ROOT.parent / "shared" / "data"
TASKS = {"medkqa": "MedKQ&A", "evidiag": "EviDiag", "trerecom": "TreRecom"}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("build_corpus_recipe", RECIPES / "build_corpus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build(recipe):
    def run(**settings):
        recipe.main(recipe.Config(**{key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}))

    return run


@pytest.fixture(scope="module")
def corpus(build, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "corpus"
    build(source=SAMPLE, output=output)
    return output


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def table(folder, name):
    """All rows of a table, or of all that begin like it."""
    return [row for path in sorted((folder / name).rglob("*.jsonl")) for row in jsonl(path)]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def dropped(folder):
    return jsonl(folder / "reports" / "dropped.jsonl")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def key(text):
    """Letters, digits and ideographs of the NFKC form, in lower case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


def first_questions(rows):
    return {key(next(m["content"] for m in row["messages"] if m["role"] == "user")) for row in rows}


def diseases_of(folder):
    return {line.split("\t")[0] for line in (folder / "knowledge_graph.tsv").read_text("utf-8").splitlines()
            if not line.startswith("#")}  # fmt: skip


def assert_no_leak(corpus):
    """No held-out first question is a training one, whatever the file; nor any text or prompt."""
    for names in (("tasks", "generalist"), ("text",), ("preferences",)):
        if not (corpus / "train" / names[0]).exists():
            continue
        train, heldout = (
            [row for name in names for row in table(corpus / side, name)] for side in ("train", "heldout")
        )
        assert len(train) > len(heldout) > 5
        if "messages" in train[0]:
            train, heldout = first_questions(train), first_questions(heldout)
        else:
            train, heldout = ({json.dumps(row.get("text", row.get("prompt"))) for row in rows}
                              for rows in (train, heldout))  # fmt: skip
        assert not train & heldout


def test_sample_corpus_gives_three_thousand_instructions_of_all_tasks(corpus):
    counts = {task: len(table(corpus, f"train/tasks/{task}")) for task in TASKS}
    assert min(counts.values()) >= 300 and sum(counts.values()) >= 3000
    for task, name in TASKS.items():
        for side in ("train", "heldout"):
            rows = table(corpus, f"{side}/tasks/{task}")
            assert len(rows) >= 30 and {row["task"] for row in rows} == {name}
            roles = [[message["role"] for message in row["messages"]] for row in rows]
            assert all(turn == ["user", "assistant"] * (len(turn) // 2) for turn in roles)
            assert (min(map(len, roles)) >= 4) == (task == "evidiag")


def test_all_four_stages_have_files_that_are_what_the_manifest_says(corpus):
    stages = Counter()
    listed = set()
    for file in manifest(corpus)["files"]:
        data = (corpus / file["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file["sha256"] and data.count(b"\n") == file["rows"] > 0
        assert file["path"].startswith(f"{file['side']}/{file['table']}/{file['source']}-")
        listed.add(file["path"])
        if file["side"] == "train":
            stages.update({stage: file["rows"] for stage in file["stages"]})
    assert listed == {name for name in files_of(corpus) if name.startswith(("train/", "heldout/"))}
    assert set(stages) == {1, 2, 3, 4} and min(stages.values()) > 300
    rows = manifest(corpus)["rows"]
    for name, counts in rows.items():
        assert counts == {side: len(table(corpus, f"{side}/{name}")) for side in ("train", "heldout")}


def test_no_disease_and_no_question_is_on_both_sides(corpus):
    assert_no_leak(corpus)
    diseases = diseases_of(SAMPLE)
    sides = {}
    for side in ("train", "heldout"):
        sides[side] = {row["disease"] for row in table(corpus, side) if row.get("disease") in diseases}
    assert not sides["train"] & sides["heldout"] and sides["train"] | sides["heldout"] == diseases
    assert len(sides["heldout"]) == 7  # a tenth of 68
    for name in sides["heldout"]:  # no training row asks about one, or is a text about one
        for row in table(corpus, "train"):
            asked = row.get("title") or (row["messages"][0]["content"] if "messages" in row else "")
            longer = [other for other in diseases if name in other and other != name]
            assert name not in asked or any(other in asked for other in longer), row


def test_facts_of_the_training_diseases_are_in_the_training_text(corpus):
    text = "".join(row["text"] for row in table(corpus, "train/text/pediatric"))
    held = {row["disease"] for row in table(corpus, "heldout") if "disease" in row}
    triples = [line.split("\t") for line in (SAMPLE / "knowledge_graph.tsv").read_text(encoding="utf-8").splitlines()]
    assert all(row[0] in text and row[2] in text for row in triples if len(row) == 3 and row[0] not in held)


def test_generalist_sees_the_asked_share_of_the_tasks(corpus):
    tasks, seen = table(corpus, "train/tasks"), table(corpus, "train/tasks_sample")
    assert len(seen) == pytest.approx(0.3 * len(tasks), abs=3)
    assert {json.dumps(row) for row in seen} <= {json.dumps(row) for row in tasks}
    assert {row["task"] for row in seen} == set(TASKS.values())


def test_every_row_of_the_sample_is_read_and_every_built_row_is_written_or_listed(corpus):
    sources = manifest(corpus)["sources"]
    for path in SAMPLE.glob("*.jsonl"):
        assert sources[path.stem]["read"] == len(jsonl(path)) and sources[path.stem]["skipped"] == 0
    graph = (SAMPLE / "knowledge_graph.tsv").read_text(encoding="utf-8").splitlines()
    assert sources["knowledge_graph"]["read"] == sum(not line.startswith("#") for line in graph)
    listed = Counter(row["source"] for row in dropped(corpus))
    written = Counter()
    for file in manifest(corpus)["files"]:
        written[file["source"]] += file["rows"] * (file["table"] != "tasks_sample")
    for name, source in sources.items():
        assert source["built"] == written[name] + listed[name] > 0
    assert {name: sum(reasons.values()) for name, reasons in manifest(corpus)["dropped"].items()} == dict(listed)


def test_every_row_says_where_it_came_from_and_what_it_was_built_by(corpus):
    builders = Counter()
    for row in table(corpus, "train"):
        assert row["origin"]["place"] and str(ROOT) not in json.dumps(row, ensure_ascii=False)
        builders[row["origin"].get("builder", "as read")] += 1
        if row["origin"].get("builder") == "role_play":
            assert 0.6 <= row["origin"]["support"] <= 1
        if row["origin"].get("builder") == "reconstruct":
            assert all(version["answer"] and version["reason"] for version in row["origin"]["versions"])
    assert set(builders) == {
        "as read", "graph/text", "graph/medkqa", "graph/evidiag", "graph/trerecom", "graph/two_hop", "graph/negative",
        "role_play", "evidiag", "reconstruct", "preferences", "safety", "self_cognition",
    }  # fmt: skip


def test_card_holds_the_statistics_and_the_licences(corpus):
    card = (corpus / "README.md").read_text(encoding="utf-8")
    sums = Counter()
    for line in card.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and "/" in cells[0] and cells[2].replace(",", "").isdigit():
            sums[cells[0]] += int(cells[2].replace(",", ""))
    rows = manifest(corpus)["rows"]
    assert sums == {name: counts["train"] for name, counts in rows.items() if "/" in name}
    assert "Apache-2.0" in card and "no basis for advising" in card
    texts = [row["text"] for row in table(corpus, "train/text/general") + table(corpus, "heldout/text/general")]
    mean = f"{sum(map(len, texts)) / len(texts):,.0f}"
    assert f"| text/general | general_text | {rows['text/general']['train']} |" in card
    (line,) = [line for line in card.splitlines() if line.startswith("| text/general |")]
    assert line.rstrip(" |").endswith(mean)


def test_building_twice_gives_identical_bytes(build, tmp_path, python):
    """The first seventh of every source; the second time in another process, where sets have another order."""
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    for path in SAMPLE.iterdir():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = lines if path.suffix == ".toml" else lines[: len(lines) // 7]
        (tmp_path / "in" / path.name).write_text("".join(kept), encoding="utf-8")
    build(source=tmp_path / "in", output=tmp_path / "out" / "first")
    done = subprocess.run(
        [python, RECIPES / "build_corpus.py", "--config", RECIPES / "configs/demo/corpus.toml",
         "--source", tmp_path / "in", "--output", tmp_path / "out" / "again"],
        cwd=ROOT, capture_output=True, timeout=120,
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    first, again = (files_of(tmp_path / "out" / name) for name in ("first", "again"))
    assert {name for name in first if first[name] != again.get(name)} == set() and again.keys() == first.keys()
    assert "| tasks/medkqa | knowledge_graph |" in done.stdout.decode()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["again", "first"]  # nothing is left beside it


def messages(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def words(i):
    return "".join(random.Random(i).sample("咽扁桃腮腺鼻窦肺泡支气管胸膜心肌肝胆脾胃肠肾盂膀胱皮疹水疱红斑结痂", 30))


def child(i):
    """Rows that do not resemble each other."""
    mixed = words(i)
    return messages(f"孩子{mixed[:8]}，发烧咳嗽怎么办？", f"考虑{mixed[8:]}的问题，多喝水，去医院检查{mixed[::-1]}。")


@pytest.fixture(scope="module")
def mixed(build, tmp_path_factory):
    """A folder without corpus.toml: five formats, with bad rows, files that are none, and hostile task names."""
    folder = tmp_path_factory.mktemp("raw")
    root = folder / "source"
    root.mkdir()
    write(root / "a_talk.jsonl", [
        *(child(i) for i in range(20)),
        {"messages": []},
        messages("写一首诗", "春风拂面。"),
        {**child(30), "task": "../../../evil"},
        {**child(31), "task": "pediatric"},
        {**child(32), "task": "x" * 300},
        {**child(33), "task": "儿科问答"},
        child(0),
    ])  # fmt: skip
    (root / "b_table.CSV").write_text(
        'question,answer\n"高血压患者能喝酒吗？","少喝，按医生要求治疗。"\n缺答案,\n"胃痛怎么治疗？","先检查，排除胃炎。"\n',
        encoding="utf-8",
    )
    (root / "c_book.txt").write_text("小儿肺炎是儿童常见病，多由病毒或细菌引起。", encoding="utf-8")
    (root / "d_graph.tsv").write_text("百日咳\t症状\t咳嗽\n百日咳\t症状\n百日咳\t治疗\t休息\n", encoding="utf-8")
    pairs = [{"prompt": f"宝宝第{i}次咳嗽？", "chosen": f"别急，先看{i}天。", "rejected": "观察。"} for i in range(12)]
    (root / "e_pairs.json").write_text(json.dumps([*pairs, {**pairs[0], "chosen": 3}]), encoding="utf-8")
    (root / "README.md").write_text("# 说明", encoding="utf-8")
    (root / "scan.pdf").write_bytes(b"%PDF")
    build(source=root, output=folder / "corpus", near_duplicate=1.0)
    return folder


def test_folder_without_a_listing_is_read_by_content(mixed):
    corpus = mixed / "corpus"
    sources = manifest(corpus)["sources"]
    assert {name: (s["read"], s["skipped"]) for name, s in sources.items()} == {
        "a_talk": (26, 1), "b_table": (2, 1), "c_book": (1, 0), "d_graph": (2, 1), "e_pairs": (12, 1),
    }  # fmt: skip
    unreadable = [row["place"] for row in dropped(corpus) if row["reason"].startswith("unreadable: ")]
    assert unreadable == ["a_talk.jsonl:21", "b_table.CSV:3", "d_graph.tsv:2", "e_pairs.json:13"]
    assert [row["place"] for row in dropped(corpus) if row["reason"] == "exact duplicate"] == ["a_talk.jsonl:27"]
    assert sum(manifest(corpus)["rows"]["generalist/general_medical"].values()) == 2
    text = [row["text"] for row in table(corpus, "train/text") + table(corpus, "heldout/text")]
    assert any("小儿肺炎" in row for row in text) and any("百日咳" in row for row in text)
    assert sum(manifest(corpus)["rows"]["preferences"].values()) == 12


def test_task_of_a_row_cannot_name_a_file_elsewhere(mixed):
    corpus = mixed / "corpus"
    assert {path.name for path in mixed.iterdir()} == {"source", "corpus"}
    generalist = {name.split("/")[1] for name in manifest(corpus)["rows"] if name.startswith("generalist/")}
    assert generalist == {"general", "general_medical", "pediatric", "儿科问答"}
    # Of a_talk all but the poem, the two named tasks, the bad row and the repeated one are TreRecom by their words.
    rows = [file["rows"] for file in manifest(corpus)["files"]
            if (file["table"], file["source"]) == ("tasks/trerecom", "a_talk")]  # fmt: skip
    assert sum(rows) == 22


def test_mapping_and_files_that_are_not_read_are_told(build, mixed, tmp_path, capsys):
    build(source=mixed / "source", output=tmp_path / "corpus")
    told = capsys.readouterr().out
    for line in ("README.md: not read", "scan.pdf: not read", "b_table.CSV: question, answer",
                 "e_pairs.json: prompt, chosen, rejected", "c_book.txt: text, title"):  # fmt: skip
        assert line in told


def test_bad_row_stops_the_build_when_asked_to(build, mixed, tmp_path):
    with pytest.raises(ValueError, match=r"d_graph.tsv:2|a_talk.jsonl:21"):
        build(source=mixed / "source", output=tmp_path / "x", on_bad_row="error")
    assert not (tmp_path / "x").exists()


def test_chapter_of_a_book_lies_on_the_side_of_its_disease_with_all_that_is_built_from_it(build, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    names = ["水痘", "麻疹", "川崎病", "百日咳", "猩红热", "哮喘", "脚气病", "贫血", "湿疹", "白喉"]
    facts = [f"{name}\t{kind}\t{kind}{i}" for i, name in enumerate(names) for kind in ("症状", "治疗", "检查")]
    (source / "kg.tsv").write_text("\n".join(facts), encoding="utf-8")
    chapters = (
        f"# {name}\n\n## 症状\n\n患儿表现为{words(i)[:15]}疼痛。\n\n## 治疗\n\n治疗以{words(i)[15:]}用药为主。\n"
        for i, name in enumerate(names)
    )
    (source / "book.md").write_text("\n".join(chapters), encoding="utf-8")
    (source / "corpus.toml").write_text(
        '[[source]]\nfile = "kg.tsv"\nkind = "knowledge_graph"\n[[source]]\nfile = "book.md"\nkind = "textbook"\n',
        encoding="utf-8",
    )
    build(source=source, output=tmp_path / "out", heldout_share=0.2, near_duplicate=1.0)
    held = {row["disease"] for row in table(tmp_path / "out", "heldout/tasks") if "disease" in row}
    assert len(held) == 2
    seen = Counter()
    for side in ("train", "heldout"):
        for row in table(tmp_path / "out", side):
            named = {name for name in names if name in json.dumps(row, ensure_ascii=False)}
            assert len(named) == 1 and (named <= held) == (side == "heldout"), row
            seen[side, row["origin"].get("builder", "").split("/")[0]] += "book.md" in row["origin"]["place"]
    assert seen["heldout", ""] == 4 and seen["train", ""] == 16 and seen["train", "role_play"] > 16


def test_names_of_a_graph_are_normalised_and_one_that_is_invisible_is_listed(build, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    lines = ["１型糖尿病\t症状\t多饮&nbsp;多尿", "１型糖尿病\t治疗\t胰岛素", "\u200b\t症状\t发热", "感冒\t症状\t\u200b"]
    (source / "kg.tsv").write_text("\n".join(lines), encoding="utf-8")
    build(source=source, output=tmp_path / "out", heldout_share=0)
    assert {row["disease"] for row in table(tmp_path / "out", "train")} == {"1型糖尿病"}
    assert "多饮 多尿" in json.dumps(table(tmp_path / "out", "train"), ensure_ascii=False)
    assert [row["place"] for row in dropped(tmp_path / "out")] == ["kg.tsv:3", "kg.tsv:4"]
    assert manifest(tmp_path / "out")["sources"]["kg"]["read"] == 2


def test_shards_hold_the_asked_number_of_rows_in_order(build, tmp_path):
    (tmp_path / "source").mkdir()
    write(tmp_path / "source" / "talk.jsonl", [child(i) for i in range(25)])
    build(source=tmp_path / "source", output=tmp_path / "out", heldout_share=0, near_duplicate=1.0, shard_rows=10)
    files = sorted((tmp_path / "out/train/tasks/trerecom").iterdir())
    assert [path.name for path in files] == [f"talk-0000{i}.jsonl" for i in range(3)]
    assert [len(jsonl(path)) for path in files] == [10, 10, 5]
    asked = [row["messages"][0]["content"] for path in files for row in jsonl(path)]
    assert asked == [child(i)["messages"][0]["content"] for i in range(25)]


def test_personal_data_duplicates_and_evaluation_rows_are_found_across_files(build, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    rows = [child(i) for i in range(12)]
    asked = "我叫王小明，电话13812345678，孩子发烧三天不退，夜里咳嗽得厉害，应该看哪个科？"
    write(source / "a.jsonl", [*rows, messages(asked, "建议先到儿科门诊就诊，查血常规。")])
    near = json.loads(json.dumps(rows[3], ensure_ascii=False).replace("多喝水", "多饮水"))
    write(source / "b.jsonl", [near, rows[4], child(100)])
    write(tmp_path / "benchmark.jsonl", [rows[7]])
    settings = {"source": source, "output": tmp_path / "out", "heldout_share": 0}
    build(**settings, evaluation=[str(tmp_path / "benchmark.jsonl")])
    found = {(row["place"], row["reason"]) for row in dropped(tmp_path / "out")}
    assert found >= {
        ("b.jsonl:1", "near duplicate"), ("b.jsonl:2", "exact duplicate"),
        ("a.jsonl:8", "overlaps with evaluation or held-out rows"),
    }  # fmt: skip
    text = json.dumps(table(tmp_path / "out", "train"), ensure_ascii=False)
    assert "王小明" not in text and "13812345678" not in text and "应该看哪个科" in text
    assert sum(manifest(tmp_path / "out")["personal_data_replaced"].values()) == 2
    build(**settings, keep_personal_data=True)
    assert "王小明" in json.dumps(table(tmp_path / "out", "train"), ensure_ascii=False)


def test_new_corpus_replaces_the_old_one_whole_or_not_at_all(build, tmp_path):
    source, output = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write(source / "a.jsonl", [child(i) for i in range(10)])
    build(source=source, output=output)
    before = files_of(output)
    (source / "b.jsonl").write_text('{"question": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="b.jsonl"):
        build(source=source, output=output)
    assert files_of(output) == before
    (source / "b.jsonl").unlink()
    (source / "a.jsonl").rename(source / "c.jsonl")
    build(source=source, output=output)
    assert not any("/a-" in name for name in files_of(output)) and any("/c-" in name for name in files_of(output))
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(ValueError, match="mine: not empty and no corpus"):
        build(source=source, output=other)
    assert (other / "thesis.txt").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"heldout_share": 1.0}, "heldout_share must be at least 0 and below 1"),
        ({"near_duplicate": 1.5}, "near_duplicate must be"),
        ({"pediatric_share": -0.1}, "pediatric_share must be"),
        ({"shard_rows": 0}, "shard_rows must be at least 1"),
        ({"on_bad_row": "ignore"}, "on_bad_row must be"),
        ({"evaluation": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"teacher": "nowhere.toml"}, "nowhere.toml"),
        ({"source": "nowhere"}, "nowhere"),
        ({"domain": "paediatric"}, "domain must be one of pediatric, general_medical, general"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_written(build, tmp_path, wrong, told):
    with pytest.raises(ValueError, match=told):
        build(**{"source": SAMPLE, "output": tmp_path / "out", **wrong})
    assert not list(tmp_path.iterdir())


def adult(i):
    mixed = words(i)
    return messages(f"胃部{mixed[:8]}疼痛要做什么检查？", f"先查胃镜，排除{mixed[8:]}的炎症，清淡饮食。")


@pytest.mark.parametrize(
    ("kind", "tables", "told"),
    [
        ("pairs", {"preferences"}, "no: running text on medicine; conversations; rows of the three pediatric tasks"),
        ("guideline", {"text/pediatric"}, "no: conversations; preference pairs; rows of the three pediatric tasks"),
        ("medicine", {"generalist/general_medical"}, "stage 4 has only general medicine"),
    ],
)
def test_a_corpus_of_one_kind_alone_builds_and_says_what_it_lacks(build, tmp_path, capsys, kind, tables, told):
    (source := tmp_path / "source").mkdir()
    pairs = [{"prompt": f"{words(i)}疼？", "chosen": words(i), "rejected": words(i)[:9]} for i in range(9)]
    rows = {"pairs": pairs, "medicine": [adult(i) for i in range(9)]}
    if kind == "guideline":
        text = "".join(f"患儿{words(i)}时应及时就诊，注意休息。\n\n" for i in range(9))
        (source / "guideline.md").write_text(f"# 儿童肺炎诊疗指南\n\n{text}", encoding="utf-8")
    else:
        write(source / f"{kind}.jsonl", rows[kind])
    build(source=source, output=tmp_path / "out", near_duplicate=1.0)
    said = capsys.readouterr().out
    assert {name for name in manifest(tmp_path / "out")["rows"]} == tables
    if told.startswith("no: "):
        assert all(f"absent: {what}" in said for what in told.removeprefix("no: ").split("; "))
    else:
        assert told in said


def test_files_found_by_content_are_of_the_domain_that_is_stated(build, tmp_path, capsys):
    (source := tmp_path / "source").mkdir()
    write(source / "talk.jsonl", [messages(f"{words(i)[:9]}是什么？", words(i)) for i in range(9)])
    (source / "book.txt").write_text("长江是中国第一长河，流经十一个省市，最后注入东海。", encoding="utf-8")
    build(source=source, output=tmp_path / "found", near_duplicate=1.0)
    assert "book: encyclopedia, general, as it is;" in capsys.readouterr().out
    build(source=source, output=tmp_path / "stated", domain="general_medical", near_duplicate=1.0)
    rows = manifest(tmp_path / "stated")["rows"]
    assert {name: sum(sides.values()) for name, sides in rows.items()} == {
        "generalist/general_medical": 9, "text/general_medical": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="write `domain` in"):
        build(source=SAMPLE, output=tmp_path / "sample", domain="general")


def test_a_source_of_which_every_row_is_left_out_is_an_error_that_shows_where_to_look(build, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "book.txt").write_text("Only English text.", encoding="utf-8")
    with pytest.raises(ValueError, match="no training row came out of it; see .*reports"):
        build(source=tmp_path / "source", output=tmp_path / "out")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the repository")
def test_every_row_of_real_data_is_read_or_counted_as_skipped(build, tmp_path):
    (tmp_path / "in").mkdir()
    for path in SHARED.iterdir():  # the first 60 lines or so of each: a CSV's row may have several
        with path.open(encoding="utf-8", newline="\n") as file:
            lines = list(itertools.islice(file, 60))
        (tmp_path / "in" / path.name).write_text("".join(lines), encoding="utf-8", newline="")
    build(source=tmp_path / "in", output=tmp_path / "out")
    found = manifest(tmp_path / "out")
    rows = {}
    for path in (tmp_path / "in").iterdir():
        if path.suffix == ".jsonl":
            rows[path.stem] = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows[path.stem] = len(list(csv.DictReader(file)))
    assert len(rows) >= 10
    assert {name: s["read"] + s["skipped"] for name, s in found["sources"].items()} == rows
    listed = Counter(row["source"] for row in dropped(tmp_path / "out"))
    written = Counter()
    for file in found["files"]:
        written[file["source"]] += file["rows"] * (file["table"] != "tasks_sample")
    for name, source in found["sources"].items():
        assert source["built"] + source["skipped"] == written[name] + listed[name]
    assert_no_leak(tmp_path / "out")
