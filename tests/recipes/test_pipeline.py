"""pipeline.sh, with a stand-in for Python, so that nothing is trained here."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

PIPELINE = Path(__file__).resolve().parents[2] / "recipes" / "pipeline.sh"


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
