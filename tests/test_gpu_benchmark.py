"""The GPU's benchmark runs with toy sizes where there is no GPU, so that it does not rot until somebody has one."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_toy_sizes_run_and_a_second_call_measures_nothing_again(tmp_path):
    arguments = ("limits", "attention", "--tiny", "--output", tmp_path)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["form"] for row in rows} >= {"cuBLAS", "copy", "dense mask", "pedgpt"}
    before = (tmp_path / "results.jsonl").read_bytes()
    assert run(*arguments).returncode == 0 and (tmp_path / "results.jsonl").read_bytes() == before
    assert "| 2 heads of 32, RoPE | pedgpt |" in run("--table", "--output", tmp_path).stdout


def test_an_unknown_group_is_named_with_those_that_exist(tmp_path):
    done = run("stage5", "--output", tmp_path)
    assert done.returncode == 2 and "no such group: stage5; there are tests, limits" in done.stderr
