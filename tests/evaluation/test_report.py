"""A run folder written by hand, its page read back: numbers, verdicts both ways, plots, errors that name the line."""

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from unittest.mock import patch

import jieba
import numpy as np
import pytest

from pedgpt.data import Message
from pedgpt.evaluation.judging import DIMENSIONS, summarize, verdict_rows, verdict_table
from pedgpt.evaluation.plots import draw
from pedgpt.evaluation.report import expectations, stage_rows, write_report
from pedgpt.evaluation.responses import Answers, Question, read_answers, read_systems, set_hash, write_answers
from pedgpt.evaluation.run import Run, figures_of, load_run, scored
from pedgpt.training import run_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "report.py"
spec = importlib.util.spec_from_file_location("report_recipe", RECIPE)
recipe = sys.modules["report_recipe"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
TASKS = ("MedKQ&A", "EviDiag", "TreRecom")
KINDS = ("win", "tie", "loss")
PLOTS = ("metrics_by_stage.png", "training.png")

ROUGE = {"base": 1.0, "cpt_text": 8.0, "cpt": 10.0, "sft": 30.25, "dfpo": 31.0, "experts": 38.5}
PEDIATRIC = {"base": 9000.0, "cpt_text": 20.0, "cpt": 22.0, "sft": 24.0, "dfpo": 24.5, "experts": 21.0}
INSTRUCTIONS = {"base": 9500.0, "cpt_text": 40.0, "cpt": 18.0, "sft": 9.0, "dfpo": 9.1, "experts": 8.0}
GENERAL = {"base": 9100.0, "cpt_text": 30.0, "cpt": 31.0, "sft": 30.0, "dfpo": 30.0, "experts": 30.5}
CHOSEN = {"sft": -1.3, "dfpo": -1.25, "experts": -1.4}


def evaluation(stage: str) -> dict:
    return {
        "model": f"runs/demo/{stage}",
        "adapter": None,
        "signature": "words:jieba-0.42.1|bleu:nltk-3.10.4",
        "seconds": 12.5,
        "tasks": {t: {"rows": 40, "rouge-l": ROUGE[stage] + i, "gleu": 50.0} for i, t in enumerate(TASKS)},
        "perplexity": {
            "pediatric_text": PEDIATRIC[stage],
            "instructions": INSTRUCTIONS[stage],
            "general_medical_text": GENERAL[stage],
        },
        "preference": None if stage not in CHOSEN else {
            "pairs": 40,
            "likelihood_accuracy": 0.6,
            "reward_accuracy": 0.875 if stage == "dfpo" else None,
            "chosen_logp_per_token": CHOSEN[stage],
            "rejected_logp_per_token": -1.6,
        },
        "gates": {t: [0.5, 0.3, 0.2] for t in TASKS} if stage == "experts" else None,
        "gate_entropy": dict.fromkeys(TASKS, 0.75) if stage == "experts" else None,
    }  # fmt: skip


def training(stage: str, steps: int = 30) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 3 / step, "tokens": 8192 * step}
        row |= {"tokens_per_second": 1000.0 + step, "seconds": 2.0 * step}
        if step % 10 == 0:
            row["eval_loss"] = 3.1 / step
        if stage == "dfpo":
            row |= {"logps/chosen": -90.0, "logps/rejected": -95.0 - step, "rewards/margins": step / 10}
            row |= {"rewards/accuracies": 0.9, "loss/preference": 0.6, "loss/regularization": 1.2}
        if stage == "experts":
            row |= {"gates/expert_1": 0.5, "gates/expert_2": 0.3, "gates/expert_3": 0.2, "gates/entropy": 1 / step}
        rows.append(row)
    return rows


def write_run(folder: Path, evaluations: dict[str, dict], trained: tuple[str, ...] = ()) -> Path:
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    for stage, content in evaluations.items():
        text = json.dumps(content, ensure_ascii=False)
        (folder / "evaluation" / f"{stage}.json").write_text(text, encoding="utf-8")
    for stage in trained:
        (folder / stage).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in training(stage))
        (folder / stage / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def evaluations() -> dict[str, dict]:
    return {stage: evaluation(stage) for stage in ROUGE}


def called(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of report.py, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", [str(RECIPE), *arguments]),
        patch.object(os, "_exit", sys.exit),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_recipe(recipe.main, recipe.Config)
        except SystemExit as exit:
            code = exit.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    evaluations, folder = {stage: evaluation(stage) for stage in ROUGE}, tmp_path_factory.mktemp("run") / "demo"
    return write_run(folder, evaluations, ("sft", "dfpo", "experts"))


@pytest.fixture(scope="module")
def reported(run_folder):
    """What the recipe says of that run, and its page."""
    return called("--run", str(run_folder)), (run_folder / "report.md").read_text(encoding="utf-8")


@pytest.fixture
def undrawn(monkeypatch):
    """Without plots, which would take most of the time."""
    monkeypatch.setattr("pedgpt.evaluation.report.draw", lambda *_: {})


def test_table_has_the_stages_in_order_and_their_numbers(run_folder):
    rows = stage_rows(load_run(run_folder))
    names = [row[0] for row in rows]
    assert names == ["stage", "untrained base", "CPT, text only", "CPT, hybrid", "full SFT", "DFPO", "experts"]
    base, dfpo, experts = rows[1], rows[-2], rows[-1]
    assert base[1:] == ["1.0", "2.0", "3.0", "9,000", "9,500", "9,100", "–", "–", "–"]
    assert dfpo[1:] == ["31.0", "32.0", "33.0", "24.5", "9.1", "30.0", "87.5", "60.0", "-1.250"]
    assert experts[-3:] == ["–", "60.0", "-1.400"]  # its reward wasn't measured
    assert {len(row) for row in rows} == {10}


def test_unknown_stages_and_names_come_last(tmp_path, evaluations):
    evaluations["sft"]["perplexity"]["poems"] = 77.0
    evaluations["sft"]["tasks"]["Triage"] = {"rouge-l": 12.0}
    folder = write_run(tmp_path / "run", {"a_new_idea": evaluations["base"], "sft": evaluations["sft"]})
    run = load_run(folder)
    assert list(run.stages) == ["sft", "a_new_idea"]
    assert run.names("tasks", TASKS) == [*TASKS, "Triage"]
    assert stage_rows(run)[-1][0] == "a_new_idea"
    assert write_report(load_run(folder)).is_file()


def test_expectations_hold_with_measured_numbers(run_folder):
    checks = expectations(load_run(run_folder))
    assert [check.passed for check in checks] == [True] * 7
    assert checks[0].detail == "pediatric text 9,000 → 22.00 (-99.8%)"
    assert checks[2].detail.startswith("MedKQ&A 10.00 → 30.25 (+20.25), EviDiag 11.00 → 31.25")
    assert checks[3].detail == "87.5 % of 40 pairs"
    assert checks[6].detail == "general medical text 30.00 → 30.50 (+1.7%)"
    assert str(checks[6]).startswith("✓ Experts cost general medicine less than 2 %")


@pytest.mark.parametrize(
    ("index", "stage", "keys", "value"),
    [
        (0, "cpt", ("perplexity", "pediatric_text"), 9000.0),
        (1, "cpt", ("perplexity", "instructions"), 40.5),
        (2, "sft", ("tasks", "TreRecom", "rouge-l"), 11.9),
        (3, "dfpo", ("preference", "reward_accuracy"), 0.79),
        (4, "dfpo", ("preference", "chosen_logp_per_token"), -1.31),
        (5, "experts", ("tasks", "EviDiag", "rouge-l"), 32.0),
        (6, "experts", ("perplexity", "general_medical_text"), 30.6),
        (0, "cpt", ("perplexity", "pediatric_text"), math.nan),
    ],
)
def test_each_expectation_can_fail_and_says_so(tmp_path, evaluations, index, stage, keys, value, undrawn):
    content = evaluations[stage]
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value
    folder = write_run(tmp_path / "run", evaluations)
    checks = expectations(load_run(folder))
    assert [i for i, check in enumerate(checks) if check.passed is False] == [index]
    page = write_report(load_run(folder)).read_text(encoding="utf-8")
    assert "6 of 7 expectations met, 1 missed, 0 not measured or within chance." in page
    assert f"- ✗ {checks[index].label}" in page


def test_absent_data_is_not_measured_rather_than_failed(tmp_path, evaluations):
    del evaluations["experts"], evaluations["cpt_text"]
    del evaluations["sft"]["tasks"]["EviDiag"]
    evaluations["dfpo"]["preference"]["reward_accuracy"] = None
    folder = write_run(tmp_path / "run", evaluations)
    checks = expectations(load_run(folder))
    assert [check.passed for check in checks] == [True, None, None, None, True, None, None]
    assert checks[2].detail == "not measured (EviDiag, sft)"
    assert str(checks[3]).startswith("– Rewards") and "not measured" in str(checks[3])


def test_report_shows_scores_gates_and_throughput(run_folder, reported):
    _, page = reported
    assert page.startswith("# Run report: demo\n\n*") and "no substitute for a doctor" in page
    assert "7 of 7 expectations met" in page
    assert "`words:jieba-0.42.1|bleu:nltk-3.10.4`" in page and "different signatures" not in page
    assert "| full SFT | 40 | – | 30.25 | 50.00 |" in page
    assert "| TreRecom | 0.500 | 0.300 | 0.200 | 0.750 |" in page and "0.333 is an equal share" in page
    assert "| DFPO | 30 | 245,760 | 1,016 | 60.0 | 12.5 |" in page  # median of 1001..1030 is 1015.5
    assert not list(run_folder.glob("*.tmp"))


def test_unequal_signatures_are_pointed_out(tmp_path, evaluations, undrawn):
    evaluations["experts"]["signature"] = "words:other"
    page = write_report(load_run(write_run(tmp_path / "run", evaluations))).read_text(encoding="utf-8")
    assert "different signatures: don't compare" in page and "`words:other`" in page


def test_plots_are_png_and_embedded(run_folder, reported):
    pytest.importorskip("matplotlib")
    _, page = reported
    for name in PLOTS:
        assert (run_folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"]({name})" in page


def test_plots_without_numbers_are_left_out(tmp_path, evaluations):
    pytest.importorskip("matplotlib")
    bare = evaluations["base"] | {"perplexity": {"pediatric_text": 0.0, "instructions": math.inf}}
    folder = write_run(tmp_path / "run", {"base": bare})
    page = write_report(load_run(folder)).read_text(encoding="utf-8")
    assert [path.name for path in folder.glob("*.png")] == ["metrics_by_stage.png"]
    assert page.count("![") == 1


def test_without_matplotlib_the_report_says_so(tmp_path, evaluations, monkeypatch):
    run_folder = write_run(tmp_path / "run", evaluations, ("sft",))
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    page = write_report(load_run(run_folder)).read_text(encoding="utf-8")
    assert 'pip install -e ".[plot]"' in page and "![" not in page
    assert not list(run_folder.glob("*.png"))


def test_a_resumed_run_counts_each_step_once(tmp_path):
    folder = write_run(tmp_path / "run", {}, ("sft",))
    with (folder / "sft" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"step": 2, "loss": 7.0}\n{"step": 31, "loss": NaN}\n')
    steps, losses = load_run(folder).stages["sft"].series("loss")
    assert steps == list(range(1, 31)) and losses[1] == 7.0  # the NaN can't be drawn
    assert write_report(load_run(folder)).is_file()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sft/metrics.jsonl", b'{"step": 1}\n{"step": 2, "lo', "metrics.jsonl:2: no row of metrics .Unterminated"),
        ("sft/metrics.jsonl", b'{"loss": 1}\n', "metrics.jsonl:1: no row of metrics .'step'"),
        ("sft/metrics.jsonl", b'{"step": 1}\n\xff\n', "metrics.jsonl:2: no row of metrics"),
        ("evaluation/sft.json", b'{"model": "m",\n "tasks": }', "sft.json: not valid JSON .Expecting value: line 2"),
        ("evaluation/sft.json", b"[]", "sft.json: expected a JSON object"),
        ("notes/todo.txt", b"", "nothing recorded"),
    ],
)
def test_unreadable_runs_are_refused_by_file_and_line(tmp_path, name, text, message):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path / "run")


def test_recipe_prints_the_checks_and_the_path(run_folder, reported):
    checks = [str(check) for check in expectations(load_run(run_folder))]
    assert reported[0] == (0, "\n".join([*checks, f"report: {run_folder / 'report.md'}"]) + "\n", "")


def test_recipe_fails_in_one_line(tmp_path):
    assert called("--run", str(tmp_path / "absent")) == (2, "", f"error: {tmp_path / 'absent'}: no such run folder\n")


def answers_of(folder, names, count=100):
    """Files of answers: the first system repeats the reference more often than the others. Synthetic."""
    asked = [(Message("user", f"问题{i}"),) for i in range(count)]
    questions = [Question(one, f"孩子发热{i}天，多喝水，及时就医。", TASKS[i % 2]) for i, one in enumerate(asked)]
    (folder / "answers").mkdir(parents=True)
    for place, name in enumerate(names):
        texts = [q.reference if i % (2 * place + 3) < 2 else "观察" for i, q in enumerate(questions)]
        said = [Message("assistant", text) for text in texts]
        about = {"model": name, "question_set": set_hash(questions)}
        write_answers(folder / "answers" / f"{name}.jsonl", Answers(name, questions, said, about))
    return questions


def test_two_files_of_answers_are_compared_by_one_command(tmp_path, monkeypatch, capfd):
    answers_of(tmp_path, ["good", "worse"])
    monkeypatch.setattr(jieba.dt, "initialized", False)  # it reads its dictionary again, and says nothing either
    began = time.perf_counter()
    assert called("--run", str(tmp_path))[::2] == (0, "") and time.perf_counter() - began < 60
    assert jieba.dt.initialized and capfd.readouterr().err == ""
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (good|worse) \| 50 \| 0 \| ([\d.]+) ± ([\d.]+) \|", page)
    assert len(rows) == 4 and page.startswith("# Run report: ") and "What to expect" not in page
    for name, score, half in rows:
        assert 0 < float(half) < 15 and (float(score) > 45) == (name == "good")
    assert "good − worse" in page and "no difference beyond chance" not in page


def test_a_difference_inside_its_interval_is_called_none(tmp_path, evaluations):
    for stage, shift in (("cpt", 0.0), ("sft", 0.5)):
        for name in TASKS:
            values = [10.0 * (i % 7) + shift * (1 if i % 2 else -0.8) for i in range(60)]
            evaluations[stage]["tasks"][name] |= {"rouge-l": sum(values) / 60, "question_set": "x"}
            evaluations[stage].setdefault("values", {}).setdefault("tasks", {})[name] = {"rouge-l": values}
    run = load_run(write_run(tmp_path / "run", evaluations))
    check = expectations(run)[2]
    assert check.passed is None and check.detail.count("no difference beyond chance") == 3
    evaluations["sft"]["tasks"][TASKS[0]]["question_set"] = "other"  # other questions are not paired
    check = expectations(load_run(write_run(tmp_path / "run", evaluations)))[2]
    assert check.detail.count("no difference beyond chance") == 2


def test_intervals_match_a_bootstrap_by_hand(tmp_path):
    losses = [[2.0 * (1 + i % 5), 2.0 + i % 3] for i in range(1, 40)]
    values = {"perplexity": {"text": losses}, "tasks": {"MedKQ&A": {"rouge-l": [float(i) for i in range(50)]}}}
    found = figures_of(values)
    dice = np.random.default_rng(5)
    rows = np.array(losses)
    draws = [rows[dice.integers(39, size=39)].sum(0) for _ in range(4000)]
    expected = np.quantile([np.exp(a / b) for a, b in draws], [0.025, 0.975])
    assert found["perplexity"]["text"][1:] == pytest.approx(expected, rel=0.03)
    half = 1.96 * np.std(range(50)) / 50**0.5
    assert found["tasks"]["MedKQ&A"]["rouge-l"] == pytest.approx([24.5, 24.5 - half, 24.5 + half], abs=0.6)


def test_exams_judge_and_doctors_are_on_the_page(tmp_path, monkeypatch):
    questions = answers_of(tmp_path, ["a", "b"], 40)
    systems = read_systems([tmp_path / "answers" / f"{name}.jsonl" for name in "ab"])
    said = [(dict.fromkeys(DIMENSIONS, winner), "") for _ in questions for winner in "12"]  # the first system, always
    summary = summarize(systems, verdict_table([verdict for verdict, _ in said], 1)) | verdict_rows(systems, said)
    judge = {"judge": "gpt-x", "question_set": set_hash(questions), **summary}
    choices = [{"li": "a", "wang": "b" if i % 4 == 0 else "a"} for i in range(40)]
    majority = ["tie" if choice["wang"] == "b" else "a" for choice in choices]
    votes = [
        {"number": i + 1, "dimension": "overall", "majority": most, "votes": choice}
        for i, (most, choice) in enumerate(zip(majority, choices, strict=True))
    ]
    share = [0.75, 0.6, 0.9]
    row = {"task": "all", "dimension": "overall", "n": 40}
    doctors = {
        "raters": {"li": {}, "wang": {}}, "systems": ["a", "b"], "question_set": set_hash(questions), "votes": votes,
        "comparisons": [{**row, "by": "majority", "first": "a", "second": "b", **dict.fromkeys(KINDS, share)}],
        "agreement": [{**row, **dict.fromkeys(("raw", "cohen", "krippendorff"), share), "fleiss": [None] * 3}],
        "unsafe": [{"number": 3, "system": "b", "raters": ["li"]}],
        "strengths": {"overall": {"a": [0.5, 0.1, 0.9], "b": [-0.5, -0.9, -0.1]}},
    }  # fmt: skip
    one = {"score": [50.0, 40.0, 60.0], "questions": 20, "chance": 25.0}
    bins = [{"questions": 20, "confidence": 0.6, "accuracy": 0.5}]
    likelihood = {"kinds": {"choice": one}, "rotated": one, "total": None, "calibration": {"ece": 10.0, "bins": bins}}
    generated = {"kinds": {"choice": one}, "total": [61.5, 50.0, 70.0], "unread": ["question 1"]}
    exam = {"questions": 20, "likelihood": {"a": likelihood}, "generated": {"b": generated}, "in_corpus": ["x"]}
    for name, value in {"judge/j": judge, "doctors/results": doctors, "exams/sheet": exam}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "doctors" / "key.json").write_text("{}", encoding="utf-8")
    (tmp_path / "doctors" / "ratings_li.json").write_text('{"checksum": "", "ratings": {}}', encoding="utf-8")
    page = write_report(load_run(tmp_path)).read_text(encoding="utf-8")
    assert "| gpt-x | a : b | all | overall | 40 | 100 \\[100, 100\\] | 0 \\[0, 0\\] | 0 \\[0, 0\\] |" in page
    assert "| 2 doctors | a : b | all | overall | 40 | 75 \\[60, 90\\]" in page
    assert "gpt-x and the doctors' majority agree on 75.0 [" in page.replace("\\", "")
    assert "- question 3, b, by li" in page and "total of PediaBench | 61.5 \\[50.0, 70.0\\]" in page
    assert "majority, overall: a 0.50 [0.10, 0.90]" in page
    assert "1 of its 20 questions" in page and "choice, other letters" in page
    assert "- b: 1 answers could not be read or graded." in page
    for name in ("verdicts.png", "calibration.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in page

    other = {**doctors, "systems": ["a", "c"]}  # a's votes against c say nothing of b
    (tmp_path / "doctors/results.json").write_text(json.dumps(other), encoding="utf-8")
    monkeypatch.setattr("pedgpt.evaluation.report.draw", lambda *_: {})  # the plots stay as they are
    assert "majority agree" not in write_report(load_run(tmp_path)).read_text(encoding="utf-8")


@pytest.mark.filterwarnings("error")
def test_a_plot_takes_any_name(tmp_path):
    row = {"first": "$a^", "second": "b", "n": 1, "task": "all", "dimension": "overall"}
    row |= {kind: [share] * 3 for kind, share in zip(KINDS, (1, 0, 0), strict=True)}
    bins = [{"questions": 1, "confidence": 0.5, "accuracy": 1.0}]
    found = {"$x_{": {"calibration": {"ece": 3.0, "bins": bins}}}
    exams = {"e": {"likelihood": found, "generated": {}}}
    run = Run(tmp_path, exams=exams, judge={"j": {"judge": "$m$_$", "comparisons": [row]}})
    assert draw(run) == ["calibration.png", "verdicts.png"]


@pytest.mark.parametrize("name", ["exams/x.json", "judge/x.json", "doctors/x.json"])
def test_a_file_of_something_else_is_refused_by_name_before_answers_are_scored(tmp_path, name, monkeypatch):
    monkeypatch.setattr("pedgpt.evaluation.run.scored", None)  # scoring would take seconds
    answers_of(tmp_path, ["a"], 4)
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text('{"questions": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}: not a result of {name.split('/')[0].rstrip('s')}"):
        load_run(tmp_path)


def test_an_exam_with_nothing_beside_it_has_a_report(tmp_path):
    (tmp_path / "exams").mkdir()
    (tmp_path / "exams/x.json").write_text('{"questions": 3, "likelihood": {}, "generated": {}}', encoding="utf-8")
    assert "## Exam: x" in write_report(load_run(tmp_path)).read_text(encoding="utf-8")


def test_answers_of_a_stage_that_was_not_evaluated_are_scored(tmp_path, undrawn):
    answers_of(tmp_path, ["sft"], 4)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    assert load_run(tmp_path).stages["sft"].at("tasks", "EviDiag", "rows") == 2
    assert "| full SFT | 2 | 0 |" in write_report(load_run(tmp_path)).read_text(encoding="utf-8")


def test_another_system_is_compared_with_the_stages(tmp_path, evaluations, undrawn):
    answers_of(tmp_path, ["sft", "dfpo"], 20)
    for name in ("sft", "dfpo"):
        evaluations[name] |= scored(read_answers(tmp_path / f"answers/{name}.jsonl"))
    write_run(tmp_path, evaluations)
    assert "On the same questions" not in write_report(load_run(tmp_path)).read_text(encoding="utf-8")
    (tmp_path / "answers/other.jsonl").write_bytes((tmp_path / "answers/sft.jsonl").read_bytes())
    page = write_report(load_run(tmp_path)).read_text(encoding="utf-8")
    assert "sft − other" in page and "dfpo − other" in page and "dfpo − sft" not in page


def test_one_question_shows_no_difference(tmp_path, undrawn):
    answers_of(tmp_path, ["a", "b"], 2)
    said = (tmp_path / "answers/b.jsonl").read_text(encoding="utf-8")
    (tmp_path / "answers/b.jsonl").write_text(said.replace('"answer": "孩子', '"answer": "大人'), encoding="utf-8")
    page = write_report(load_run(tmp_path)).read_text(encoding="utf-8")
    assert page.count("no difference beyond chance") == 2 and "a − b: 0.0" not in page
