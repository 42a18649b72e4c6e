"""`python -m pedgpt`, and what a wheel holds for those who have no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


def run(folder, *arguments, root=ROOT, python=sys.executable):
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [python, "-m", "pedgpt", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_without_a_name_every_recipe_is_listed_with_what_it_is_for(tmp_path):
    done = run(tmp_path)
    listed = done.stdout.split("Recipes:")[1].strip().splitlines()
    assert done.returncode == 0 and [line.split()[0] for line in listed] == RECIPES
    assert all(len(line.split()) > 3 for line in listed)


def test_a_recipe_shows_its_settings_and_names_its_mistakes(tmp_path, python):
    shown = run(tmp_path, "dfpo", "--help", python=python)
    assert shown.returncode == 0 and "how strongly the policy is held to the reference" in shown.stdout
    wrong = run(tmp_path, "dfpo", "--bta", "1", python=python)
    assert wrong.returncode == 2 and "did you mean 'beta'" in wrong.stderr and "Traceback" not in wrong.stderr


def test_an_unknown_name_is_told_the_nearest(tmp_path):
    done = run(tmp_path, "dpo")
    assert done.returncode == 1 and "did you mean 'dfpo'" in done.stderr


def test_recipes_are_copied_and_nothing_is_written_over(tmp_path):
    assert run(tmp_path, "copy", "dfpo", "chat").returncode == 0
    assert (tmp_path / "dfpo.py").read_bytes() == (ROOT / "recipes" / "dfpo.py").read_bytes()
    (tmp_path / "dfpo.py").write_text("mine")
    again = run(tmp_path, "copy", "dfpo", "report")
    assert again.returncode == 1 and "dfpo.py exists" in again.stderr
    assert (tmp_path / "dfpo.py").read_text() == "mine" and not (tmp_path / "report.py").exists()
    assert run(tmp_path, "copy", "all").returncode == 0
    assert (tmp_path / "recipes" / "configs" / "demo" / "dfpo.toml").is_file()
    assert "known: answer, build_corpus" in run(tmp_path, "copy", "nothing").stderr


def test_a_wheel_runs_the_recipes_and_holds_the_demo(tmp_path, python):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    for name in ("pedgpt", "recipes", "pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    build = "import setuptools.build_meta, sys; setuptools.build_meta.build_wheel(sys.argv[1])"  # as pip does
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    held = {str(file.relative_to(ROOT)) for file in (ROOT / "pedgpt").rglob("*.py")}
    data = [file for kind in ("toml", "html") for file in (ROOT / "pedgpt").rglob(f"*.{kind}")]
    held |= {str(file.relative_to(ROOT)) for file in data}
    held |= {f"pedgpt/{file.relative_to(ROOT)}" for file in (ROOT / "recipes").rglob("*") if file.is_file()}
    wheels = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    assert wheels - {"pedgpt/py.typed"} == {name for name in held if "__pycache__" not in name}
    assert "how strongly the policy" in run(tmp_path, "dfpo", "--help", root=tmp_path / "site", python=python).stdout
