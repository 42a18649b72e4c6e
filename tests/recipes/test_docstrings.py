"""The commands that the recipes' docstrings and the README name are commands that the recipes take."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from pedgpt.training import parse_settings

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
START = r"^\s*(?:python|torchrun --nproc-per-node \d+) recipes/(\w+)\.py "
COMMAND = re.compile(START + r"((?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)


def config_of(recipe):
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe}", ROOT / "recipes" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Config, module.__doc__


def parsed(recipe, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    return parse_settings(config_of(recipe)[0], shlex.split(arguments.replace("\\\n", " ")))


@pytest.mark.parametrize("recipe", RECIPES)
def test_commands_of_the_docstring_parse(recipe, monkeypatch):
    commands = COMMAND.findall(config_of(recipe)[1])
    assert recipe in {name for name, _ in commands}
    for name, arguments in commands:  # exam.py also shows how answer.py makes what it grades
        parsed(name, arguments, monkeypatch)


def test_commands_of_the_documents_parse(monkeypatch):
    # test_extending.py runs the commands of extending.md, some of them on a recipe that is made there.
    pages = [ROOT / "README.md", *(page for page in (ROOT / "docs").glob("*.md") if page.stem != "extending")]
    commands = [found for page in pages for found in COMMAND.findall(page.read_text(encoding="utf-8"))]
    assert {name for name, _ in commands} >= {"build_corpus", "expert_finetune", "evaluate", "chat"}
    for recipe, arguments in commands:
        parsed(recipe, arguments, monkeypatch)


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "recipes" / "configs").iterdir()))
def test_shipped_settings_are_settings_of_their_recipe(folder, monkeypatch):
    recipes = {
        "base": "init_model", "cpt": "continued_pretrain", "sft": "full_finetune", "dfpo": "dfpo",
        "experts": "expert_finetune", "evaluate": "evaluate", "corpus": "build_corpus",
    }  # fmt: skip
    required = "--model m --output o --text t --instructions i --preferences p --heldout h".split()
    for path in sorted((ROOT / "recipes" / "configs" / folder).glob("*.toml")):
        cls, _ = config_of(recipes[path.stem])
        known = [word for pair in zip(required[::2], required[1::2], strict=True) for word in pair
                 if pair[0][2:] in cls.__dataclass_fields__]  # fmt: skip
        settings = parse_settings(cls, ["--config", str(path), *known])
        if hasattr(settings, "check"):
            settings.check()
