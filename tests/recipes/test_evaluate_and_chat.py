"""build_corpus, init_model, evaluate and chat as commands; what they write is read back without pedgpt's readers."""

import csv
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch

from pedgpt.adapters import inject_experts, save_adapter
from pedgpt.data import Message, chat_format, encode_prompt, load_tokenizer
from pedgpt.models import ModelConfig, load_model

ROOT = Path(__file__).resolve().parents[2]
RECIPES, SAMPLE = ROOT / "recipes", ROOT / "recipes" / "sample_corpus"
SHARED = ROOT.parent / "shared" / "data"
TASKS = ("medkqa", "evidiag", "trerecom")


def recipe(name):
    """The recipe as a module of its own name here, so that other tests' copies are left alone."""
    unique = f"corpus_and_chat_{name}"
    if unique not in sys.modules:
        spec = importlib.util.spec_from_file_location(unique, RECIPES / f"{name}.py")
        sys.modules[unique] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[unique])
    return sys.modules[unique]


def run(name, **settings):
    module = recipe(name)
    module.main(module.Config(**{key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}))


def command(name, *arguments, stdin=b"", **environment):
    return subprocess.run(
        [sys.executable, str(RECIPES / f"{name}.py"), *map(str, arguments)],
        input=stdin, capture_output=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", **environment},
    )  # fmt: skip


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def first_questions(path):
    """Normalised: letters, digits and ideographs of the NFKC form, in lower case."""
    found = set()
    for row in jsonl(path):
        text = next(message["content"] for message in row["messages"] if message["role"] == "user")
        found.add("".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum()))
    return found


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def assert_no_leak(corpus):
    """No held-out first question is a training one, whatever the file; nor any text or pair."""
    sides = {}
    for side in ("train", "heldout"):
        files = [*(corpus / side / "tasks").glob("*.jsonl"), *(corpus / side / "generalist").glob("*.jsonl")]
        assert len(files) >= 4
        sides[side] = set().union(*map(first_questions, files))
        assert len(sides[side]) > 20
    assert not sides["train"] & sides["heldout"]
    for domain in ("pediatric", "general_medical", "general"):
        train, heldout = ({row["text"] for row in jsonl(corpus / s / "text" / f"{domain}.jsonl")} for s in sides)
        assert train and heldout and not train & heldout
    train, heldout = ({json.dumps(row["prompt"]) for row in jsonl(corpus / s / "preferences.jsonl")} for s in sides)
    assert train and heldout and not train & heldout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "corpus"
    run("build_corpus", source=SAMPLE, output=output)
    return output


def test_sample_corpus_gives_three_thousand_instructions_of_all_tasks(corpus):
    counts = {task: len(jsonl(corpus / "train" / "tasks" / f"{task}.jsonl")) for task in TASKS}
    assert min(counts.values()) >= 300 and sum(counts.values()) >= 3000
    for task, name in zip(TASKS, ("MedKQ&A", "EviDiag", "TreRecom"), strict=True):
        for side in ("train", "heldout"):
            rows = jsonl(corpus / side / "tasks" / f"{task}.jsonl")
            assert len(rows) >= 30 and {row["task"] for row in rows} == {name}
            roles = [[message["role"] for message in row["messages"]] for row in rows]
            assert all(turn == ["user", "assistant"] * (len(turn) // 2) for turn in roles)
            assert (min(map(len, roles)) >= 4) == (task == "evidiag")


def test_heldout_shares_no_question_with_training(corpus):
    assert_no_leak(corpus)
    for task in TASKS:  # each file by itself too, so that the share is what was asked for
        train, heldout = (first_questions(corpus / side / "tasks" / f"{task}.jsonl") for side in ("train", "heldout"))
        assert 0.05 < len(heldout) / len(train | heldout) < 0.15


def test_generalist_sees_the_asked_share_of_the_tasks(corpus):
    for side in ("train", "heldout"):
        tasks = [row for task in TASKS for row in jsonl(corpus / side / "tasks" / f"{task}.jsonl")]
        seen = jsonl(corpus / side / "tasks_sample.jsonl")
        assert len(seen) == pytest.approx(0.3 * len(tasks), abs=3)
        assert {json.dumps(row) for row in seen} <= {json.dumps(row) for row in tasks}
        assert {row["task"] for row in seen} == {"MedKQ&A", "EviDiag", "TreRecom"}


def test_facts_of_the_graph_are_in_the_training_text(corpus):
    text = "".join(row["text"] for row in jsonl(corpus / "train" / "text" / "pediatric.jsonl"))
    triples = [line.split("\t") for line in (SAMPLE / "knowledge_graph.tsv").read_text(encoding="utf-8").splitlines()]
    assert all(row[0] in text and row[2] in text for row in triples if len(row) == 3)


def test_building_twice_gives_identical_bytes(corpus, tmp_path):
    done = command("build_corpus", "--source", SAMPLE, "--output", tmp_path / "again", PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr.decode()
    assert files_of(tmp_path / "again") == files_of(corpus)
    total = sum(manifest(corpus)["rows"][f"tasks/{task}"]["train"] for task in TASKS)
    assert f"{total:,} training instructions over MedKQ&A, EviDiag, TreRecom" in done.stdout.decode()


def test_every_row_of_the_sample_is_read(corpus):
    read = manifest(corpus)["read"]
    for path in SAMPLE.glob("*.jsonl"):
        assert read.pop(path.name) == len(jsonl(path))
    graph = (SAMPLE / "knowledge_graph.tsv").read_text(encoding="utf-8").splitlines()
    assert read == {"knowledge_graph.tsv": sum(not line.startswith("#") for line in graph)}
    assert manifest(corpus)["skipped"] == []


def conversations_written(folder):
    rows = manifest(folder)["rows"]
    return sum(
        sum(count.values())
        for name, count in rows.items()
        if name.startswith(("tasks/", "generalist/")) and name != "tasks_sample"
    )


def test_written_rows_are_what_the_manifest_counts(corpus):
    for name, count in manifest(corpus)["rows"].items():
        for side in ("train", "heldout"):
            assert len(jsonl(corpus / side / f"{name}.jsonl")) == count[side]
    assert set(manifest(corpus)["rows"]) == {
        str(path.relative_to(corpus / "train").with_suffix("")) for path in (corpus / "train").rglob("*.jsonl")
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder without corpus.toml: five formats, with bad rows, files that are none, and hostile task names."""
    folder = tmp_path_factory.mktemp("raw")
    root = folder / "source"
    root.mkdir()

    def messages(question, answer):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    def child(i):
        return messages(f"孩子第{i}天发烧咳嗽怎么办？", "多喝水，发热三天去医院检查。")

    write(root / "a_talk.jsonl", [
        *(child(i) for i in range(20)),
        {"messages": []},
        messages("写一首诗", "春风拂面。"),
        {**child(30), "task": "../../../evil"},
        {**child(31), "task": "pediatric"},
        {**child(32), "task": "x" * 300},
        {**child(33), "task": "儿科问答"},
        messages("孩子第0天发烧，咳嗽怎么办", "重复的问题。"),
    ])  # fmt: skip
    (root / "b_table.CSV").write_text(
        'question,answer\n"高血压患者能喝酒吗？","少喝，按医生要求治疗。"\n缺答案,\n"胃痛怎么治疗？","先检查，排除胃炎。"\n',
        encoding="utf-8",
    )
    (root / "c_book.txt").write_text("小儿肺炎是儿童常见病。" * 5, encoding="utf-8")
    (root / "d_graph.tsv").write_text("百日咳\t症状\t咳嗽\n百日咳\t症状\n百日咳\t治疗\t休息\n", encoding="utf-8")
    pairs = [{"prompt": f"宝宝第{i}次咳嗽？", "chosen": "别急，先观察。", "rejected": "观察。"} for i in range(12)]
    (root / "e_pairs.json").write_text(json.dumps([*pairs, {**pairs[0], "chosen": 3}]), encoding="utf-8")
    (root / "README.md").write_text("# 说明", encoding="utf-8")
    (root / "scan.pdf").write_bytes(b"%PDF")
    (root / "more").mkdir()
    write(root / "more" / "nested.jsonl", [child(99)])
    run("build_corpus", source=root, output=folder / "corpus")
    return folder


def test_folder_without_a_listing_is_read_by_content(mixed):
    corpus = mixed / "corpus"
    found = manifest(corpus)
    read = {"a_talk.jsonl": 26, "b_table.CSV": 2, "c_book.txt": 1, "d_graph.tsv": 2, "e_pairs.json": 12}
    assert found["read"] == read
    assert [(row["file"], row["line"]) for row in found["skipped"]] == [
        ("a_talk.jsonl", 21), ("b_table.CSV", 3), ("d_graph.tsv", 2), ("e_pairs.json", 13),
    ]  # fmt: skip
    assert all(row["reason"] for row in found["skipped"])
    rows = found["rows"]
    assert rows["tasks/trerecom"]["repeated"] == 1
    # 28 conversations read, and one question in six forms for each of the two relations of the graph.
    assert conversations_written(corpus) == 28 + 12
    assert sum(rows["generalist/general_medical"].values()) == 2 and sum(rows["generalist/general"].values()) == 1
    text = [row["text"] for side in ("train", "heldout") for row in jsonl(corpus / side / "text" / "pediatric.jsonl")]
    assert any("小儿肺炎" in row for row in text) and any("百日咳" in row for row in text)
    pairs = rows["preferences"]
    assert pairs["train"] + pairs["heldout"] == 12 and pairs["repeated"] == 0


def test_task_of_a_row_cannot_name_a_file_elsewhere(mixed):
    corpus = mixed / "corpus"
    assert {path.name for path in mixed.iterdir()} == {"source", "corpus"}
    generalist = {path.stem for path in (corpus / "train" / "generalist").iterdir()}
    assert generalist == {"general", "general_medical", "pediatric", "儿科问答"}
    # The classified row and the overlong one are TreRecom by their words.
    assert sum(manifest(corpus)["rows"]["tasks/trerecom"].values()) == 20 + 1 + 2


def test_files_that_are_not_read_are_told(mixed, capsys):
    run("build_corpus", source=mixed / "source", output=mixed / "corpus")
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    told = {line[0]: line[1] for line in lines[:8]}
    assert told == {
        "README.md": "not read", "more": "not read", "scan.pdf": "not read", "a_talk.jsonl": "read as conversations",
        "b_table.CSV": "read as conversations", "c_book.txt": "read as documents", "d_graph.tsv": "read as triples",
        "e_pairs.json": "read as preferences",
    }  # fmt: skip


def test_bad_row_stops_the_build_when_asked_to(mixed, tmp_path):
    with pytest.raises(ValueError, match="a_talk.jsonl:21"):
        run("build_corpus", source=mixed / "source", output=tmp_path / "x", on_bad_row="error")


def test_document_is_kept_on_whichever_side_it_falls(tmp_path):
    # Where all text is held out, answers stand in for it in training; the document must stay.
    source, sides = tmp_path / "source", set()
    source.mkdir()
    (source / "book.txt").write_text("甲" * 80, encoding="utf-8")
    answer = "多喝水。" * 20
    write(source / "talk.jsonl", [{"question": f"孩子第{i}天发烧咳嗽怎么办？", "answer": answer} for i in range(20)])
    for seed in range(6):
        run("build_corpus", source=source, output=tmp_path / "out", heldout_share=0.5, seed=seed)
        found = [side for side in ("train", "heldout")
                 if "甲" * 80 in [row["text"] for row in jsonl(tmp_path / "out" / side / "text" / "pediatric.jsonl")]]
        assert len(found) == 1 and jsonl(tmp_path / "out" / "train" / "text" / "pediatric.jsonl")
        sides |= set(found)
    assert sides == {"train", "heldout"}


@pytest.mark.parametrize(
    ("listing", "told"),
    [
        ("[[source]\n", "not valid TOML"),
        ("\xff", "not valid TOML"),
        ("title = 1\n", r"\[\[source\]\]"),
        ("source = 3\n", r"\[\[source\]\]"),
        ("source = ['a.jsonl']\n", r"\[\[source\]\]"),
        ("[source]\nfile = 'a.jsonl'\n", r"\[\[source\]\]"),
        ("[[source]]\nfile = 'a.jsonl'\nkind = 'conversations'\ntaks = 'x'\n", "file, kind, domain and task"),
        ("[[source]]\nfile = 3\nkind = 'conversations'\n", "texts"),
        ("[[source]]\nkind = 'conversations'\n", "source 1: needs file"),
        ("[[source]]\nfile = 'a.jsonl'\n", "source 1: needs file, kind .documents, conversations"),
        ("[[source]]\nfile = 'a.jsonl'\nkind = 'talk'\n", "source 1.*kind"),
        ("[[source]]\nfile = 'a.jsonl'\nkind = 'conversations'\ndomain = 'space'\n", "source 1.*domain"),
        ("[[source]]\nfile = 'a.jsonl'\nkind = 'conversations'\ntask = '../x'\n", "source 1.*'../x'"),
        ("[[source]]\nfile = 'b.jsonl'\nkind = 'conversations'\n", "b.jsonl.*no such file"),
        ("[[source]]\nfile = 'a.jsonl'\nkind = 'documents'\n", "no instruction"),
    ],
)
def test_wrong_corpus_toml_is_an_error_that_says_where(tmp_path, listing, told):
    write(tmp_path / "a.jsonl", [{"text": "甲", "question": "孩子发烧吗？", "answer": "到医院检查。"}])
    (tmp_path / "corpus.toml").write_bytes(listing.encode("latin-1"))
    with pytest.raises(ValueError, match=told) as error:
        run("build_corpus", source=tmp_path, output=tmp_path / "out")
    assert str(tmp_path) in str(error.value)


def test_graph_with_an_unknown_relation_and_a_missing_source_are_errors(tmp_path):
    (tmp_path / "kg.tsv").write_text("感冒\t症状\t发热\n感冒\t别名\t伤风\n", encoding="utf-8")
    with pytest.raises(ValueError, match="kg.tsv:2.*别名"):
        run("build_corpus", source=tmp_path, output=tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere"):
        run("build_corpus", source=tmp_path / "nowhere", output=tmp_path / "out")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the repository")
def test_every_row_of_real_data_is_read_or_counted_as_skipped(tmp_path):
    run("build_corpus", source=SHARED, output=tmp_path)
    found = manifest(tmp_path)
    rows = {}
    for path in SHARED.iterdir():
        if path.suffix == ".jsonl":
            rows[path.name] = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows[path.name] = len(list(csv.DictReader(file)))
    assert len(rows) >= 10
    skipped = Counter(row["file"] for row in found["skipped"])
    assert {name: found["read"][name] + skipped[name] for name in found["read"]} == rows
    pairs = sum(found["rows"]["preferences"].values())
    assert pairs == found["read"]["preference_sharegpt.jsonl"]
    assert conversations_written(tmp_path) == sum(found["read"].values()) - pairs
    assert_no_leak(tmp_path)


@pytest.fixture(scope="module")
def model_folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    # Weights large enough that greedy answers depend on the question.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe("init_model"), "ModelConfig", functools.partial(ModelConfig, initializer_range=0.5))
        run("init_model", **INIT, output=folder, **texts_of(corpus))
    return folder


INIT = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 420,
}  # fmt: skip


def texts_of(corpus):
    return {
        "text": [str(corpus / "train" / "text" / "general.jsonl")],
        "instructions": [str(corpus / "train" / "generalist" / "safety.jsonl")],
    }


def test_init_model_gives_identical_bytes_in_another_process(corpus, tmp_path):
    run("init_model", **INIT, output=tmp_path / "one", **texts_of(corpus))
    flags = [f"--{name}={value}" for name, value in {**INIT, "output": tmp_path / "two"}.items()]
    files = [flag for name, paths in texts_of(corpus).items() for flag in (f"--{name}", *paths)]
    done = command("init_model", *flags, *files, PYTHONHASHSEED="3")
    assert done.returncode == 0, done.stderr.decode()
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(one)
    assert one == two
    tokenizer, model = load_tokenizer(tmp_path / "two"), load_model(tmp_path / "two")
    assert tokenizer.vocab_size <= model.config.vocab_size == 400
    assert chat_format(tokenizer).stop_tokens == (2, 3)
    config = json.loads(one["config.json"])
    assert config["model_type"] == "baichuan" and config["hidden_size"] == 32


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"vocab_size": 100}, "vocabulary of 100 tokens"),  # fewer than the bytes
        ({"positions": "learned"}, "learned"),
        ({"text": ["nowhere.jsonl"]}, "nowhere.jsonl"),
    ],
)
def test_init_model_refuses_what_cannot_work(corpus, tmp_path, wrong, told):
    with pytest.raises(ValueError, match=told):
        run("init_model", **{**INIT, **texts_of(corpus), **wrong}, output=tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def heldout(corpus, tmp_path_factory):
    """A few held-out rows of each kind, one of each too long for a row of 420 tokens."""
    folder = tmp_path_factory.mktemp("heldout")
    for name in ("tasks/medkqa", "tasks/evidiag", "text/general", "preferences"):
        rows = jsonl(corpus / "heldout" / f"{name}.jsonl")
        (folder / name).parent.mkdir(exist_ok=True)
        kept = sorted(rows, key=lambda row: len(json.dumps(row, ensure_ascii=False)))
        write(folder / f"{name}.jsonl", [*kept[:5], kept[-1]])
    return folder


@pytest.fixture(scope="module")
def evaluated(model_folder, heldout, tmp_path_factory):
    """evaluate.py twice: (first, second) results."""
    folder = tmp_path_factory.mktemp("evaluated")
    results = []
    for name in ("one", "two"):
        run(
            "evaluate", model=model_folder, heldout=heldout, output=folder / name / "result.json", limit=4,
            max_new_tokens=6, row_length=420, batch_size=3, reference=model_folder, device="cpu",
        )  # fmt: skip
        results.append(json.loads((folder / name / "result.json").read_text(encoding="utf-8")))
    return results


def test_evaluating_twice_gives_identical_results(evaluated):
    one, two = ({key: value for key, value in result.items() if key != "seconds"} for result in evaluated)
    assert json.dumps(one) == json.dumps(two)
    assert all(result["seconds"] > 0 for result in evaluated)


def test_evaluation_holds_what_was_asked_for(evaluated, heldout, model_folder):
    result = evaluated[0]
    assert {name: scores["rows"] for name, scores in result["tasks"].items()} == {"MedKQ&A": 4, "EviDiag": 4}
    assert set(result["perplexity"]) == {"instructions", "general_text"}
    assert all(1 < value < math.inf for value in result["perplexity"].values())
    assert "jieba" in result["signature"] and result["gates"] is None and result["adapter"] is None
    # A model is its own reference: nothing is gained on it.
    assert result["preference"]["reward_accuracy"] == 0.0
    chat = chat_format(load_tokenizer(model_folder))
    sizes = [
        len(encode_prompt([Message(m["role"], m["content"]) for m in row["prompt"]], chat))
        + max(len(chat.tokenizer.encode(row[answer])) for answer in ("chosen", "rejected"))
        for row in jsonl(heldout / "preferences.jsonl")
    ]
    fitting = sum(size <= 420 for size in sizes)
    assert 0 < result["preference"]["pairs"] == fitting
    long = sum(
        len(encode_prompt([Message(m["role"], m["content"]) for m in row["messages"][:-1]], chat))
        + len(chat.tokenizer.encode(row["messages"][-1]["content"])) > 420
        for task in ("medkqa", "evidiag")
        for row in jsonl(heldout / "tasks" / f"{task}.jsonl")
    )  # fmt: skip
    assert result["skipped"] == long + len(sizes) - fitting > 0
    asked = {row["messages"][0]["content"]: row for row in jsonl(heldout / "tasks" / "medkqa.jsonl")}
    for sample in result["samples"]:
        if sample["task"] == "MedKQ&A":
            row = asked[sample["question"]]
            assert sample["reference"] == row["messages"][1]["content"]
            assert sample["answer"] == greedy(model_folder, [Message("user", sample["question"])], 6).strip()


def test_new_expert_adapter_changes_nothing_and_weighs_its_experts_equally(evaluated, model_folder, heldout, tmp_path):
    model = load_model(model_folder)
    inject_experts(model, rank=2, num_specific_experts=5)
    save_adapter(model, tmp_path / "adapter")
    run(
        "evaluate", model=model_folder, heldout=heldout, output=tmp_path / "result.json", limit=4, max_new_tokens=6,
        row_length=420, batch_size=3, adapter=tmp_path / "adapter", device="cpu",
    )  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["gates"] == {"MedKQ&A": pytest.approx([0.2] * 5), "EviDiag": pytest.approx([0.2] * 5)}
    assert result["gate_entropy"] == dict.fromkeys(result["gates"], pytest.approx(math.log(5)))
    for task in ("MedKQ&A", "EviDiag"):
        assert result["tasks"][task] == evaluated[0]["tasks"][task]
    for name, value in evaluated[0]["perplexity"].items():
        assert result["perplexity"][name] == pytest.approx(value, rel=1e-6)
    assert result["preference"]["reward_accuracy"] is None


def test_evaluate_refuses_what_it_cannot_use(model_folder, heldout, tmp_path):
    for wrong in ({"heldout": tmp_path / "nowhere"}, {"dtype": "float99"}, {"chat_format": "llama"}, {"device": "tpu"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            run("evaluate", **{"model": model_folder, "heldout": heldout, **wrong})


@torch.no_grad()
def greedy(folder, history, max_new_tokens):
    """The answer by a plain loop without cache, as text."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    chat = chat_format(tokenizer)
    tokens, written = encode_prompt(history, chat), []
    while len(written) < max_new_tokens and len(tokens + written) < model.config.max_position_embeddings:
        token = int(model(torch.tensor([tokens + written]))[0, -1].argmax())
        if token in chat.stop_tokens:
            break
        written.append(token)
    return tokenizer.decode(written)


FIRST, SECOND, SYSTEM = "孩子发烧怎么办？", "要吃药吗😀", "你是儿科医生。"
TYPED = ["", FIRST, SECOND, "/reset", FIRST, f"/system {SYSTEM}", FIRST, SECOND, "/system", FIRST]


def transcript(folder, max_new_tokens):
    """What chat.py should print for TYPED, by the plain loop."""
    lines, history, system = [], [], []
    for text in TYPED[1:]:
        if text.startswith("/"):
            history = []
            if text.startswith("/system"):
                content = text.removeprefix("/system").strip()
                system = [Message("system", content)] if content else []
            continue
        history.append(Message("user", text))
        said = greedy(folder, [*system, *history], max_new_tokens)
        history.append(Message("assistant", said.strip()))
        lines.append((text, said))
    return lines


def test_chat_matches_a_plain_loop_and_repeats_itself(model_folder):
    stdin = "".join(line + "\n" for line in TYPED).encode()
    expected = transcript(model_folder, 12)
    answers = [said for _, said in expected]
    assert answers[0] == answers[2] == answers[5] and len(set(answers)) == 4
    runs = [
        command("chat", "--model", model_folder, "--max_new_tokens", 12, "--device", "cpu", stdin=stdin)
        for _ in range(2)
    ]
    for done in runs:
        assert done.returncode == 0, done.stderr.decode()  # and it ends where its input ends
    assert runs[0].stdout == runs[1].stdout
    printed = runs[0].stdout.decode()
    assert "不能代替医生" in printed.splitlines()[0]
    spoken = "".join(f"\n家长> {text}\n助手> {said}\n" for text, said in expected)
    assert printed.split("/quit)\n", 1)[1] == spoken + "\n"


def test_chat_survives_half_a_character_and_a_full_window(model_folder):
    # A terminal's backspace leaves half a character; then a text longer than the model's 420 positions.
    stdin = "发烧".encode() + b"\xe5\n" + ("很长" * 200).encode() + b"\n" + "咳嗽\n/quit\n不再读".encode()
    done = command("chat", "--model", model_folder, "--max_new_tokens", 5, stdin=stdin, LC_ALL="C", PYTHONUTF8="1")
    printed = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert printed.count("助手>") == 2 and "420 tokens" in printed and "不再读" not in printed
    answer = greedy(model_folder, [Message("user", "发烧\ufffd")], 5)
    assert f"家长> 发烧\ufffd\n助手> {answer}\n" in printed


def test_chat_refuses_what_it_cannot_use(model_folder, tmp_path):
    for wrong in ({"model": tmp_path / "nowhere"}, {"dtype": "float99"}, {"chat_format": "llama"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            run("chat", **{"model": model_folder, **wrong})
