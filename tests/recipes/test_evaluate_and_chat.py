"""init_model, evaluate and chat as commands; what they write is read back without pedgpt's readers."""

import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pedgpt.adapters import inject_experts, save_adapter
from pedgpt.data import Message, chat_format, encode_prompt, load_tokenizer
from pedgpt.evaluation.responses import Answers, Question, read_answers, write_answers
from pedgpt.files import printable
from pedgpt.models import ModelConfig, load_model

ROOT = Path(__file__).resolve().parents[2]
RECIPES, SAMPLE = ROOT / "recipes", ROOT / "recipes" / "sample_corpus"


def recipe(name):
    """The recipe as a module of its own name here, so that other tests' copies are left alone."""
    unique = f"evaluate_and_chat_{name}"
    if unique not in sys.modules:
        spec = importlib.util.spec_from_file_location(unique, RECIPES / f"{name}.py")
        sys.modules[unique] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[unique])
    return sys.modules[unique]


def run(name, **settings):
    module = recipe(name)
    module.main(module.Config(**{key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}))


def command(python, name, *arguments, stdin=b"", **environment):
    return subprocess.run(
        [python, str(RECIPES / f"{name}.py"), *map(str, arguments)], input=stdin, capture_output=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Of the first rows of each source of the sample."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(SAMPLE, folder / "sample")
    for path in SAMPLE.glob("*.[jt]s[ov]*"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = 250 if path.suffix == ".tsv" else 68
        (folder / "sample" / path.name).write_text("".join(lines[:kept]), encoding="utf-8")
    run("build_corpus", source=folder / "sample", output=folder / "corpus")
    return folder / "corpus"


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
    "max_position_embeddings": 520,
}  # fmt: skip


def texts_of(corpus):
    return {
        "text": [str(corpus / "train" / "text" / "general")],
        "instructions": [str(corpus / "train" / "generalist" / "safety")],
    }


def test_init_model_gives_identical_bytes_in_another_process(corpus, tmp_path, python):
    run("init_model", **INIT, output=tmp_path / "one", **texts_of(corpus))
    flags = [f"--{name}={value}" for name, value in {**INIT, "output": tmp_path / "two"}.items()]
    files = [flag for name, paths in texts_of(corpus).items() for flag in (f"--{name}", *paths)]
    done = command(python, "init_model", *flags, *files, PYTHONHASHSEED="3")
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
    """A few held-out rows of each kind, one of each too long for a row of 520 tokens."""
    folder = tmp_path_factory.mktemp("heldout")
    for name in ("tasks/medkqa", "tasks/evidiag", "text/general", "preferences"):
        rows = [row for path in sorted((corpus / "heldout" / name).iterdir()) for row in jsonl(path)]
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
            answers=heldout.parent / "answers.jsonl",
            max_new_tokens=6, row_length=520, batch_size=3, reference=model_folder, device="cpu",
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
    fitting = sum(size <= 520 for size in sizes)
    assert 0 < result["preference"]["pairs"] == fitting
    long = sum(
        len(encode_prompt([Message(m["role"], m["content"]) for m in row["messages"][:-1]], chat))
        + len(chat.tokenizer.encode(row["messages"][-1]["content"])) > 520
        for task in ("medkqa", "evidiag")
        for row in jsonl(heldout / "tasks" / f"{task}.jsonl")
    )  # fmt: skip
    assert result["skipped"] == long + len(sizes) - fitting > 0
    asked = {row["messages"][0]["content"]: row for row in jsonl(heldout / "tasks" / "medkqa.jsonl")}
    said = read_answers(heldout.parent / "answers.jsonl")
    for question, found in zip(said.questions, said.answers, strict=True):
        if question.task == "MedKQ&A":
            assert question.reference == asked[question.text]["messages"][1]["content"]
            assert found.content == greedy(model_folder, [Message("user", question.text)], 6).strip()


def test_new_expert_adapter_changes_nothing_and_weighs_its_experts_equally(evaluated, model_folder, heldout, tmp_path):
    model = load_model(model_folder)
    inject_experts(model, rank=2, num_specific_experts=5)
    save_adapter(model, tmp_path / "adapter")
    run(
        "evaluate", model=model_folder, heldout=heldout, output=tmp_path / "result.json", limit=4, max_new_tokens=6,
        row_length=520, batch_size=3, adapter=tmp_path / "adapter", device="cpu",
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


def test_evaluate_keeps_the_answers_of_another_system(model_folder, heldout, tmp_path):
    path = tmp_path / "other.jsonl"
    write_answers(path, Answers("other", [Question((Message("user", "问"),))], [Message("assistant", "答")]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds another system's answers"):
        run("evaluate", model=model_folder, heldout=heldout, answers=path)
    assert path.read_bytes() == before


def test_evaluate_writes_no_file_of_no_answers(model_folder, heldout, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/general.jsonl").write_bytes((heldout / "text/general.jsonl").read_bytes())
    path = tmp_path / "a.jsonl"
    run("evaluate", model=model_folder, heldout=tmp_path, answers=path, row_length=520, device="cpu")
    assert not path.exists()


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


def test_chat_matches_a_plain_loop_and_repeats_itself(model_folder, python):
    stdin = "".join(line + "\n" for line in TYPED).encode()
    expected = transcript(model_folder, 12)
    answers = [said for _, said in expected]
    assert answers[0] == answers[2] == answers[5] and len(set(answers)) == 4
    runs = [
        command(python, "chat", "--model", model_folder, "--max_new_tokens", 12, "--device", "cpu", stdin=stdin)
        for _ in range(2)
    ]
    for done in runs:
        assert done.returncode == 0, done.stderr.decode()  # and it ends where its input ends
    assert runs[0].stdout == runs[1].stdout
    printed = runs[0].stdout.decode()
    assert "不能代替医生" in printed.splitlines()[0]
    spoken = "".join(f"\n家长> {text}\n助手> {printable(said)}\n" for text, said in expected)
    rest = printed.split("/quit)\n", 1)[1]
    assert re.findall(r"^\(a new conversation, .*\)\n", rest, re.MULTILINE) == [
        "(a new conversation, without system text)\n",
        f"(a new conversation, the system text is {SYSTEM!r})\n",
        "(a new conversation, without system text)\n",
    ]
    assert re.sub(r"^\(a new .*\)\n", "", rest, flags=re.MULTILINE) == spoken + "\n"


def test_chat_survives_half_a_character_and_a_full_window(model_folder, python):
    # A terminal's backspace leaves half a character; then a text longer than the model's 520 positions.
    stdin = "发烧".encode() + b"\xe5\n" + ("很长" * 300).encode() + b"\n" + "咳嗽\n/quit\n不再读".encode()
    done = command(python, "chat", "--model", model_folder, "--max_new_tokens", 5, stdin=stdin)
    printed = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert printed.count("助手>") == 2 and "520 tokens" in printed and "不再读" not in printed
    answer = greedy(model_folder, [Message("user", "发烧\ufffd")], 5)
    assert f"家长> 发烧\ufffd\n助手> {printable(answer)}\n" in printed


def test_chat_refuses_what_it_cannot_use(model_folder, tmp_path):
    for wrong in ({"model": tmp_path / "nowhere"}, {"dtype": "float99"}, {"chat_format": "llama"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            run("chat", **{"model": model_folder, **wrong})
