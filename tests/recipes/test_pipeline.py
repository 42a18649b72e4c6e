"""pipeline.sh, with a stand-in for Python, so that nothing is trained here."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = ROOT / "recipes" / "pipeline.sh"
# A Python that only notes its commands, and makes the corpus' folders.
NOTES = """#!/usr/bin/env bash
echo "$*" >> "$RUN/commands"
[[ $* != *build_corpus* ]] || for folder in $TABLES; do mkdir -p "$RUN/corpus/$folder"; done
"""
HELD = "heldout/text"


@pytest.mark.parametrize("end", ["", "trap 'exit 130' INT; "])  # killed by Ctrl-C, or told and gone by itself
def test_after_ctrl_c_the_demo_says_that_the_same_command_goes_on(tmp_path, end):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n{end}echo started\nsleep 30\nsleep 30\n")
    python.chmod(0o755)
    process = subprocess.Popen(
        ["bash", str(PIPELINE)], start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHON": str(python), "RUN": str(tmp_path / "run")},
    )  # fmt: skip
    while "started" not in process.stdout.readline():
        pass
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode in (130, -signal.SIGINT)
    assert err.count("stopped; the same command goes on from here") == 1


@pytest.fixture
def pipeline(tmp_path):
    """Run it for a corpus of these tables: what it said, and the commands that it gave."""

    def run(tables):
        (tmp_path / "python").write_text(NOTES, encoding="utf-8")
        (tmp_path / "python").chmod(0o755)
        env = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"), "RUN": str(tmp_path), "TABLES": tables}
        command = ["bash", "recipes/pipeline.sh"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout, (tmp_path / "commands").read_text(encoding="utf-8").replace(f"{tmp_path}/", "").splitlines()

    return run


@pytest.mark.parametrize(
    ("tables", "evaluated", "left_out"),
    [
        (f"text/pediatric generalist/general tasks tasks_sample preferences {HELD}",
         "base cpt_text cpt sft dfpo experts", ""),
        (f"text/general_medical generalist/general_medical {HELD}", "base cpt_text cpt sft experts", "3"),
        (f"text/pediatric {HELD}", "base cpt_text cpt", "2 3 4"),
        ("preferences heldout/preferences", "base dfpo", "1 2 4"),
        (f"generalist/general {HELD}", "base cpt sft", "3 4"),
        ("preferences", "", "1 2 4"),
    ],
)  # fmt: skip
def test_stages_without_data_are_left_out_with_a_line(pipeline, tables, evaluated, left_out):
    tables = " ".join(name if name.startswith("heldout") else f"train/{name}" for name in tables.split())
    said, commands = pipeline(tables)
    assert [line.split("evaluation/")[1].split(".json")[0] for line in commands if "evaluate.py" in line] == (
        evaluated.split()
    )
    assert [line[:1] for line in said.split("Stage ")[1:] if "is left out" in line.split("\n")[0]] == left_out.split()
    # Every model that a stage starts from was made by a stage that ran, or is the base; every folder is there.
    used = {line.split("--model ")[1].split()[0] for line in commands if "--model " in line}
    assert used <= {"base", *(f"{stage}/model" for stage in evaluated.split())}
    read = {word for line in commands for word in line.split() if word.startswith(("corpus/train/", "corpus/heldout/"))}
    assert all(any(f"corpus/{name}".startswith(folder) for name in tables.split()) for folder in read)


def test_answers_of_an_earlier_training_go_and_pages_that_doctors_may_have_stay(pipeline, tmp_path):
    for name in ("answers/sft.jsonl", "answers/experts.jsonl", "exam_answers/experts.jsonl", "experts/done.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "experts/adapter").mkdir()
    os.utime(tmp_path / "exam_answers/experts.jsonl", (1, 1))
    assert "doctors.py" in " ".join(pipeline("train/preferences")[1])
    assert not (tmp_path / "exam_answers/experts.jsonl").exists()
    for name in ("exam_answers/experts.jsonl.part", "doctors/doctor2.html", "commands"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    said, commands = pipeline("train/preferences")
    assert "doctors.py" not in " ".join(commands) and "they are there already" in said
    assert "report.py" in commands[-1] and (tmp_path / "exam_answers/experts.jsonl.part").exists()
