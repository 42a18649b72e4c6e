"""The changes that docs/extending.md describes are carried out in a copy of the project, as they stand there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:] if "```python" in part}


def apply_diff(project, block):
    """Replace the lines that a diff block shows by those that it wants; they must stand in the file exactly once."""
    name, *lines = block.splitlines()
    assert all(line[:1] in (" ", "+", "-") for line in lines), f"{name}: a line begins with none of ' ', '+', '-'"
    before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kinds) for kinds in (" -", " +"))
    file = project / name
    content = file.read_text(encoding="utf-8")
    assert content.count(before) == 1, f"{name} does not hold these lines once:\n{before}"
    file.write_text(content.replace(before, after), encoding="utf-8")


def test_the_page_has_the_five_tasks():
    assert len(SECTIONS) == 5


@pytest.mark.parametrize("section", SECTIONS)
def test_the_change_works_as_written(section, tmp_path, python):
    for name in ("pedgpt", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)  # with its bytecode
    ran = 0
    for kind, block in re.findall(r"^```(python|diff|bash)\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE):
        new = re.match(r"# new file (\S+)\n", block)
        if kind == "diff":
            apply_diff(tmp_path, block)
        elif new:
            (tmp_path / new[1]).write_text(block[new.end() :], encoding="utf-8")
        else:
            command = ["bash", "-euc", block] if kind == "bash" else [python, "-c", block]
            path = f"{Path(python).parent}:{os.environ['PATH']}"
            environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": path}
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            ran += 1
    assert ran
