"""The GPU's benchmark runs with toy sizes where there is no GPU, so that it does not rot until somebody has one."""

import csv
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(python):
    def run(*arguments):
        command = [python, ROOT / "benchmarks/gpu.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})

    return run


def test_toy_sizes_run_and_a_second_call_measures_nothing_again(run, tmp_path):
    arguments = ("limits", "attention", "--tiny", "--output", tmp_path)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["form"] for row in rows} >= {"cuBLAS", "copy", "dense mask", "pedgpt"}
    before = (tmp_path / "results.jsonl").read_bytes()
    assert run(*arguments).returncode == 0 and (tmp_path / "results.jsonl").read_bytes() == before
    assert "| 2 heads of 32, RoPE | pedgpt |" in run("--table", "--output", tmp_path).stdout


def test_an_unknown_group_is_named_with_those_that_exist(run, tmp_path):
    done = run("stage5", "--output", tmp_path)
    assert done.returncode == 2 and "no such group: stage5; there are tests, limits" in done.stderr
