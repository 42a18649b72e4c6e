"""Stage 1 on a corpus: shares as told, killed at any moment and resumed bit for bit, other data refused."""

import hashlib
import json
import re
import shutil
import signal

import pytest
import torch

from pedgpt.data import Tokenizer

TIMES = ("seconds", "tokens_per_second")
RUN = {"text": None, "instructions": None, "heldout_text": None, "epochs": None, "max_steps": 7, "checkpoint_every": 1}
HALF = {"checkpoint_every": 2, "keep_checkpoints": 9}
LISTS = (  # side, table, source, kind, file of the lab, rows of it
    ("train", "text/pediatric", "textbook", "documents", "text.jsonl", slice(0, 12)),
    ("train", "text/pediatric", "graph", "documents", "text.jsonl", slice(12, 17)),
    ("train", "text/general", "wiki", "documents", "text.jsonl", slice(17, None)),
    ("train", "tasks/medkqa", "graph", "conversations", "train.jsonl", slice(0, 4)),
    ("train", "generalist/chat", "chat", "conversations", "train.jsonl", slice(4, None)),
    ("heldout", "text/pediatric", "textbook", "documents", "heldout_text.jsonl", slice(None)),
)


def make_corpus(lab, folder, replace=("", "")):
    """A corpus of the lab's rows, with one word replaced in them."""
    files = []
    for side, table, name, kind, file, rows in LISTS:
        path = folder / side / table / f"{name}-00000.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (lab.folder / file).read_text(encoding="utf-8").splitlines()[rows]
        path.write_text("".join(line.replace(*replace) + "\n" for line in lines), encoding="utf-8")
        files.append({
            "path": str(path.relative_to(folder)), "side": side, "table": table, "source": name, "kind": kind,
            "stages": [1, 4], "rows": len(lines), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        })  # fmt: skip
    sources = {name: {"weight": 1.0, "epochs": 0.0} for name in ("textbook", "wiki", "chat")}
    sources["graph"] = {"weight": 1.0, "epochs": 2.0}
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": files, "sources": sources}))
    return folder


@pytest.fixture(scope="module")
def corpus(lab):
    return make_corpus(lab, lab.folder / "corpus")


@pytest.fixture(scope="module")
def whole(lab, corpus):
    """The output of an uninterrupted run, and what it printed."""
    output = lab.folder / "references" / "hybrid"
    result = lab.run("continued_pretrain", output, corpus=corpus, **RUN)
    assert result.code == 0, result.err
    return output, result.out


def run(lab, corpus, output, **settings):
    return lab.run("continued_pretrain", output, corpus=corpus, **{**RUN, **settings})


def assert_as_if_nothing_happened(lab, output, expected, exactly=True):
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()}
    mine, theirs = (
        [{name: value for name, value in line.items() if name not in TIMES} for line in lab.metrics(folder)]
        for folder in (output, expected)
    )
    tensors = lab.weights(output)
    if exactly:
        assert mine == theirs
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in lab.weights(expected).items())
        return
    for a, b in zip(mine, theirs, strict=True):  # another order of summation
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"]) and a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    for name, tensor in lab.weights(expected).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-4)


def test_the_run_mixes_the_sources_of_the_manifest(lab, whole):
    output, out = whole
    table = re.findall(r"^ +(\w+) +([\d,]+) tokens +[\d.]+% +([\d.]+) epochs of ([\w ]+)$", out, flags=re.MULTILINE)
    assert [name for name, *_ in table] == ["graph", "textbook", "wiki", "chat", "graph"]
    parts = ["domain text", "domain text", "general text", "instructions", "instructions"]
    assert [part for *_, part in table] == parts
    epochs = [float(value) for *_, value, _ in table]
    assert epochs[:2] == [2.0, 1.0] and epochs[-1] == 2.0  # the domain text once, but for what has epochs of its own
    tokens = [int(count.replace(",", "")) for _, count, *_ in table]
    assert sum(tokens[:2]) / sum(tokens) == pytest.approx(0.45, abs=0.03)
    assert sum(tokens[3:]) / sum(tokens) == pytest.approx(0.5, abs=0.03)
    assert re.search(r"^\d+ rows of 96, \d+\.\d% used$", out, flags=re.MULTILINE)
    metrics = lab.metrics(output)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.2 and "eval_loss" in metrics[-1]
    assert {path.name for path in output.iterdir()} == {"done.json", "metrics.jsonl", "model"}  # no tokens are left


@pytest.mark.parametrize("step", [1, 2, 5, 6])  # the first and the last, with tokens made again and used again
def test_a_run_killed_after_any_step_goes_on_bit_for_bit(lab, corpus, whole, step, tmp_path, monkeypatch):
    assert run(lab, corpus, tmp_path, die_after=step).code == -9
    assert (tmp_path / "tokens" / "train" / "store.json").exists()
    with monkeypatch.context() as patched:
        if step % 2:
            shutil.rmtree(tmp_path / "tokens")  # made again
        else:
            patched.setattr(Tokenizer, "encode_batch", None)  # used again
        result = run(lab, corpus, tmp_path)
    assert result.code == 0 and f"at step {step} of 7" in result.err
    assert_as_if_nothing_happened(lab, tmp_path, whole[0])


# The recipe, but something kills the process: the third batch of texts, or the fourth step's rows.
KILLED = """
import os, runpy, signal, sys
from pedgpt.data import PackedRows, Tokenizer
kind, calls = sys.argv[1], []
def dying(function, limit):
    def call(*arguments):
        calls.append(1)
        if len(calls) == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
if kind == "tokens":
    Tokenizer.encode_batch = dying(Tokenizer.encode_batch, 3)
else:
    PackedRows.row = dying(PackedRows.row, 18)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("moment", ["tokens", "rows"])
def test_a_process_that_is_killed_leaves_a_run_that_goes_on(lab, corpus, whole, moment, tmp_path):
    flags = lab.arguments("continued_pretrain", tmp_path, corpus=corpus, **RUN)
    (lab.folder / "killed.py").write_text(KILLED, encoding="utf-8")
    result = lab.ended(lab.fork(lab.folder / "killed.py", [moment, lab.script("continued_pretrain"), *flags]))
    assert result.code == -signal.SIGKILL, result.err
    left = {path.name for path in (tmp_path / "tokens").iterdir()}
    assert left == ({".train.tmp"} if moment == "tokens" else {"train", "heldout"})
    result = lab.call("continued_pretrain", flags)
    assert result.code == 0 and ("resuming" in result.err) == (moment == "rows")
    assert_as_if_nothing_happened(lab, tmp_path, whole[0])


@pytest.fixture(scope="module")
def two_ranks(lab, corpus):
    """Two ranks that run through, that go on where one died, and that die, in one launch."""
    folder = lab.folder / "hybrid_two_ranks"
    assert run(lab, corpus, folder / "1_to_2", die_after=2, **HALF).code == -9
    given = {**RUN, **HALF, "corpus": str(corpus)}
    jobs = [("continued_pretrain", folder / name, given, end) for name, end in
            (("2", None), ("1_to_2", None), ("2_to_1", 4))]  # fmt: skip
    result = lab.two_ranks(jobs)
    assert result.code == 0, result.err
    assert result.out.count("died as asked") == 2 and result.err.count("resuming from") == 1
    return folder


@pytest.mark.parametrize("way", ["2", "1_to_2", "2_to_1"])
def test_another_number_of_ranks_reads_the_same(lab, corpus, whole, two_ranks, way):
    output = two_ranks / way
    if way == "2_to_1":
        result = run(lab, corpus, output, **HALF)
        assert result.code == 0 and "at step 4 of 7" in result.err
    assert_as_if_nothing_happened(lab, output, whole[0], exactly=False)


def test_another_corpus_is_refused_by_name_and_the_first_one_goes_on_wherever_it_lies(lab, corpus, whole, tmp_path):
    output, mine = tmp_path / "run", tmp_path / "corpus"
    shutil.copytree(corpus, mine)
    assert run(lab, mine, output, die_after=3).code == -9
    result = lab.run("continued_pretrain", output, **{**RUN, "text": "text.jsonl", "instructions": "train.jsonl"})
    assert result.code == 2 and "rows_and_base_model was" in result.err
    assert f"corpus was '{mine}', is ''" in result.err and "text was [], is " in result.err
    make_corpus(lab, mine, ("多喝水", "多饮水"))  # other rows under the same name
    result = run(lab, mine, output)
    assert result.code == 2 and "rows_and_base_model was" in result.err and result.err.count(" was ") == 1
    result = run(lab, corpus, output)  # the same rows elsewhere
    assert result.code == 0 and "at step 3 of 7" in result.err
    assert_as_if_nothing_happened(lab, output, whole[0])


def test_a_finished_run_says_so_and_leaves_no_tokens(lab, corpus, whole):
    output, _ = whole
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    result = run(lab, corpus, output)
    assert (result.code, result.out, result.err) == (0, f"{output}: finished already\n", "")
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    result = run(lab, corpus, output, learning_rate=1.0)
    assert result.code == 2 and "learning_rate was" in result.err and not (output / "tokens").exists()


def test_held_out_text_of_the_corpus_is_the_default_and_changes_nothing_trained(lab, corpus, whole, tmp_path):
    file = corpus / "heldout" / "text" / "pediatric" / "textbook-00000.jsonl"
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "孩子咳嗽要多喝水。"}\n', encoding="utf-8")
    assert run(lab, corpus, tmp_path / "died", die_after=2).code == -9
    for heldout, same in ((file, True), (other, False)):
        shutil.copytree(tmp_path / "died", output := tmp_path / heldout.stem)
        result = run(lab, corpus, output, heldout_text=heldout)
        assert result.code == 0 and "at step 2 of 7" in result.err
        found, expected = lab.metrics(output)[-1], lab.metrics(whole[0])[-1]
        assert found["loss"] == expected["loss"] and (found["eval_loss"] == expected["eval_loss"]) == same


def test_instructions_alone_are_used_once(lab, corpus, tmp_path):
    settings = {"instruction_share": 1, "max_steps": None, "epochs": 1}
    result = run(lab, make_corpus(lab, tmp_path / "c"), tmp_path / "graph", **settings)
    assert result.code == 0, result.err
    assert "domain text" not in result.out and re.search(r"chat .* 1\.00 epochs", result.out)
    assert re.search(r"graph .* 2\.00 epochs", result.out)
    result = lab.run("continued_pretrain", tmp_path / "lists", text=None, instruction_share=1, max_steps=2)
    assert result.code == 0 and re.search(r"\n  files .* 100\.0%  1\.00 epochs of instructions\n", result.out)
    result = run(lab, corpus, tmp_path / "text", instruction_share=0, max_steps=2)
    assert result.code == 0 and "instructions" not in result.out and "chat" not in result.out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "text.jsonl"}, "corpus and lists of files are given; give corpus, or text, general_text and instr"),
        ({"instructions": "train.jsonl"}, "corpus and lists of files are given"),
        ({"corpus": None}, "missing setting: text; give --text and --instructions with files, or --corpus with a"),
        ({"corpus": "nowhere"}, "nowhere/manifest.json: no such file; expected the folder of a corpus"),
        ({"heldout_text": "nowhere.jsonl"}, "nowhere.jsonl: found no such file or folder"),
        ({"total_tokens": 100}, "the mixture gives 'domain text' 45 of 100 tokens, but the fixed epochs of its"),
        ({"total_tokens": -1}, "instruction_share must be in [0, 1], domain_to_general positive, total_tokens not"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(lab, corpus, settings, message, tmp_path):
    result = lab.run("continued_pretrain", tmp_path / "run", **{**RUN, "corpus": corpus, **settings})
    (line,) = result.err.splitlines()
    assert result.code == 2 and line.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_a_damaged_corpus_leaves_nothing(lab, tmp_path):
    corpus = make_corpus(lab, tmp_path / "corpus")
    file = corpus / "train" / "text" / "general" / "wiki-00000.jsonl"
    file.write_text(file.read_text(encoding="utf-8") * 2, encoding="utf-8")
    result = run(lab, corpus, tmp_path / "run")
    assert result.code == 2 and f"{file}: found SHA-256 " in result.err and "it was changed since" in result.err
    assert not (tmp_path / "run").exists()


def test_a_bad_row_ends_all_ranks(lab, tmp_path):
    # Only the first rank reads; the others wait for it.
    (tmp_path / "text.jsonl").write_text('{"title": "发热"}\n', encoding="utf-8")
    arguments = lab.arguments("continued_pretrain", tmp_path / "run", text=tmp_path / "text.jsonl")
    result = lab.ended(lab.fork(lab.script("continued_pretrain"), arguments, ranks=2))
    assert result.code != 0 and not (tmp_path / "run").exists()
    assert f"error: {tmp_path}/text.jsonl:1: missing field: found the keys title" in result.err
    assert "RuntimeError" not in result.err and "the first rank met a mistake in the data" in result.err
