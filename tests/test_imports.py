"""Imports go one way: records → tokens → model → loss → step → evaluation, and nothing looks back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each part of the library may import of the others.
ALLOWED = {
    "kernels": set(),
    "data": set(),
    "models": {"kernels"},
    "adapters": {"kernels"},
    "losses": {"kernels"},
    "corpus": {"data", "endpoint"},
    "training": {"kernels"},  # the optimizer's update
    "evaluation": {"models", "adapters", "data", "kernels", "endpoint"},
    "serving": {"models", "data", "kernels"},
    "stage": {"adapters", "data", "kernels", "losses", "models", "training"},
    "files": set(),
    "endpoint": set(),
    "__init__": set(),
    "__main__": set(),
}
EVERYWHERE = {"files"}  # the ground floor
# Oracles and baselines of the tests and benchmarks, never dependencies.
FORBIDDEN = {"transformers", "peft", "trl", "sentencepiece", "accelerate", "recipes", "tests", "benchmarks"}


def imported(source: str, package: str) -> set[str]:
    """Full names of the modules that `source`, a module in `package`, imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            # A name imported from the root may be one of its folders.
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "pedgpt" else {base}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
    return names


def part(path: Path) -> str:
    return path.relative_to(ROOT / "pedgpt").parts[0].removesuffix(".py")


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def parts_imported(source: str, package: str) -> set[str]:
    ours = [name.split(".") for name in imported(source, package) if name.split(".")[0] == "pedgpt"]
    return {name[1] if len(name) > 1 else "everything" for name in ours} - {"__version__"}


MODULES = sorted((ROOT / "pedgpt").rglob("*.py"))
SCRIPTS = sorted((ROOT / "recipes").glob("*.py"))


def test_every_part_of_the_library_has_a_rule():
    assert {part(path) for path in MODULES} <= set(ALLOWED)
    assert len(MODULES) > 30 and len(SCRIPTS) >= 8


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_library_imports_go_one_way(path):
    own = part(path)
    assert parts_imported(path.read_text(encoding="utf-8"), package_of(path)) - {own} - EVERYWHERE <= ALLOWED[own]


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_recipes_or_an_oracle(path):
    others = {script.stem for script in SCRIPTS}
    roots = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"), package_of(path))}
    assert not roots & (FORBIDDEN | others)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pedgpt.models", {"models"}),
        ("import pedgpt.models.config as c, json", {"models"}),
        ("from pedgpt import losses, data", {"losses", "data"}),
        ("from pedgpt import __version__", set()),
        ("import pedgpt", {"everything"}),
        ("from pedgpt.data.chat import Example", {"data"}),
        ("def f():\n    if True:\n        from pedgpt.models import Transformer", {"models"}),
        ("if TYPE_CHECKING:\n    from pedgpt.corpus import split", {"corpus"}),
        ("from . import loop", {"training"}),
        ("from .. import models", {"models"}),
        ("from ..models.config import ModelConfig", {"models"}),
        ("import importlib\nimportlib.import_module('pedgpt.losses')", {"losses"}),
        ("import pedgptx, torch", set()),
    ],
)
def test_the_walk_finds_every_kind_of_import(source, found):
    assert parts_imported(source, "pedgpt.training") == found


def test_a_command_that_does_not_train_waits_for_no_library_of_training():
    """FSDP2 and DTensor take a second and 57 MB; matplotlib and a compiler come when they are used."""
    training = {"continued_pretrain.py", "dfpo.py", "expert_finetune.py", "full_finetune.py"}
    others = [str(path) for path in sorted((ROOT / "recipes").glob("*.py")) if path.name not in training]
    code = f"import runpy, sys\nfor path in {others}: runpy.run_path(path)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    heavy = {"torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "matplotlib"}
    assert heavy & {*done.stdout.split()} == set()
