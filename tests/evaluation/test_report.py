"""A run folder written by hand, its page read back: numbers, verdicts both ways, plots, errors that name the line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pedgpt.evaluation.report import expectations, stage_table, write_report
from pedgpt.evaluation.run import load_run

RECIPE = Path(__file__).parents[2] / "recipes" / "report.py"
TASKS = ("MedKQ&A", "EviDiag", "TreRecom")
PLOTS = ("metrics_by_stage.png", "loss_by_stage.png", "expert_weights.png", "routing.png", "dfpo.png")

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
        "samples": [
            {"task": t, "question": f"第{n}问\n*发热*?", "reference": "多喝水", "answer": f"{stage} <b> & 答{n}"}
            for t in TASKS for n in range(4)
        ],
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


@pytest.fixture
def run_folder(tmp_path, evaluations):
    return write_run(tmp_path / "demo", evaluations, tuple(stage for stage in ROUGE if stage != "base"))


def test_table_has_the_stages_in_order_and_their_numbers(run_folder):
    lines = stage_table(load_run(run_folder)).splitlines()
    names = [line.split("  ")[0] for line in lines[-6:]]
    assert names == ["untrained base", "CPT, text only", "CPT, hybrid", "full SFT", "DFPO", "experts"]
    base, dfpo, experts = (lines[index].split() for index in (-6, -2, -1))
    assert base[2:] == ["1.0", "2.0", "3.0", "9,000", "9,500", "9,100", "–", "–", "–"]
    assert dfpo[1:] == ["31.0", "32.0", "33.0", "24.5", "9.1", "30.0", "87.5", "60.0", "-1.250"]
    assert experts[-3:] == ["–", "60.0", "-1.400"]  # its reward wasn't measured
    assert len({len(line) for line in lines[-7:]}) == 1  # columns are aligned under the rule


def test_unknown_stages_and_names_come_last(tmp_path, evaluations):
    evaluations["sft"]["perplexity"]["poems"] = 77.0
    evaluations["sft"]["tasks"]["Triage"] = {"rouge-l": 12.0}
    folder = write_run(tmp_path / "run", {"a_new_idea": evaluations["base"], "sft": evaluations["sft"]})
    run = load_run(folder)
    assert list(run.stages) == ["sft", "a_new_idea"]
    assert run.names("tasks", TASKS) == [*TASKS, "Triage"]
    assert stage_table(run).splitlines()[-1].startswith("a_new_idea")
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
def test_each_expectation_can_fail_and_says_so(tmp_path, evaluations, index, stage, keys, value, monkeypatch):
    monkeypatch.setattr("pedgpt.evaluation.report.draw", lambda *_: {})  # plots would take most of the time
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


def test_report_shows_scores_gates_throughput_and_samples(run_folder):
    page = write_report(load_run(run_folder)).read_text(encoding="utf-8")
    assert page.startswith("# Run report: demo\n\n*") and "no substitute for a doctor" in page
    assert "7 of 7 expectations met" in page
    assert "`words:jieba-0.42.1|bleu:nltk-3.10.4`" in page and "different signatures" not in page
    assert "| full SFT | 40 | 30.25 | 50.00 |" in page
    assert "| TreRecom | 0.500 | 0.300 | 0.200 | 0.750 |" in page and "0.333 is an equal share" in page
    assert "| DFPO | 30 | 245,760 | 1,016 | 60.0 | 12.5 |" in page  # median of 1001..1030 is 1015.5
    assert page.count("> 第0问") == page.count("> 第2问") == 3 and "第3问" not in page
    assert r"> \*发热\*?" in page
    assert r"- **full SFT**: sft \<b\> & 答0" in page and r"- **experts**: experts \<b\> & 答0" in page
    assert "base \\<b\\>" not in page
    assert not list(run_folder.glob("*.tmp"))


def test_unequal_signatures_are_pointed_out(tmp_path, evaluations):
    evaluations["experts"]["signature"] = "words:other"
    page = write_report(load_run(write_run(tmp_path / "run", evaluations))).read_text(encoding="utf-8")
    assert "different signatures: don't compare" in page and "- `words:other`: experts" in page


def test_plots_are_png_and_embedded(run_folder):
    pytest.importorskip("matplotlib")
    page = write_report(load_run(run_folder)).read_text(encoding="utf-8")
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


def test_without_matplotlib_the_report_says_so(run_folder, monkeypatch):
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
        ("sft/metrics.jsonl", b'{"step": 1}\n{"step": 2, "lo', "metrics.jsonl:2: broken JSON"),
        ("sft/metrics.jsonl", b'{"loss": 1}\n', 'metrics.jsonl:1: expected a JSON object with a number under "step"'),
        ("sft/metrics.jsonl", b'{"step": 1}\n\xff\n', "metrics.jsonl:2: invalid UTF-8"),
        ("evaluation/sft.json", b'{"model": "m",\n "tasks": }', "sft.json:2: broken JSON"),
        ("evaluation/sft.json", b"[]", "sft.json:1: expected a JSON object"),
        ("evaluation/sft.json", b'{"perplexity": {"a": "low"}}', 'sft.json: unexpected .*low.* under "perplexity"'),
        ("notes/todo.txt", b"", "nothing recorded"),
    ],
)
def test_unreadable_runs_are_refused_by_file_and_line(tmp_path, name, text, message):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path / "run")


def run_recipe(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(RECIPE.parents[1]), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(RECIPE), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")


def test_recipe_prints_the_table_the_checks_and_the_path(run_folder):
    done = run_recipe("--run", str(run_folder))
    assert (done.returncode, done.stderr) == (0, "")
    run = load_run(run_folder)
    checks = [str(check) for check in expectations(run)]
    assert done.stdout == "\n".join([stage_table(run), *checks, f"report: {run_folder / 'report.md'}"]) + "\n"


def test_recipe_fails_in_one_line(tmp_path):
    done = run_recipe("--run", str(tmp_path / "absent"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'absent'}: no such run folder\n"
