"""The library stays small: lines by folder, file and function, and no line does the work of several."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "pedgpt").rglob("*.py"))
GOAL = 10_500  # lines of the library
# What each folder may have; `files` are those of the folder pedgpt itself.
GOALS = {
    "kernels": 2_000, "losses": 300, "adapters": 900, "models": 1_300, "data": 2_350, "corpus": 2_100,
    "training": 850, "evaluation": 1_200, "serving": 600, "files": 400,
}  # fmt: skip
# Where a goal is not reached yet: what there is now. No number here may grow, and one that is no longer needed goes.
OWED = {
    "kernels": 2_273, "adapters": 1_212, "models": 1_489, "data": 2_513, "corpus": 2_677, "training": 1_531,
    "evaluation": 2_537, "files": 862, "all": 15_992,
}  # fmt: skip
OWED_FILES = {}


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def by_folder():
    found = Counter()
    for path in FILES:
        parts = path.relative_to(ROOT / "pedgpt").parts
        found[parts[0] if len(parts) > 1 else "files"] += lines(path)
    return found


def test_folders_keep_to_their_lines():
    found = by_folder()
    assert found.keys() == GOALS.keys()
    for name, count in found.items():
        assert count <= OWED.get(name, GOALS[name]), f"{name} has {count} lines"
    total = sum(found.values())
    assert total <= OWED.get("all", GOAL), f"all files have {total} lines"


def test_what_is_owed_shrinks_with_the_code():
    found = by_folder()
    found["all"] = sum(found.values())
    for name, allowed in OWED.items():
        assert GOALS.get(name, GOAL) < found[name] > allowed - 25, f"{name}: lower what is owed to {found[name]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_functions_can_be_read_at_once(path):
    name = str(path.relative_to(ROOT))
    assert lines(path) <= OWED_FILES.get(name, 450)
    functions = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
    for node in functions:
        kernel = any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
        assert node.end_lineno - node.lineno + 1 <= 60 or kernel, node.name


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.name)
def test_a_recipe_reads_from_top_to_bottom(path):
    (main,) = [node for node in ast.parse(path.read_text("utf-8")).body if getattr(node, "name", "") == "main"]
    assert main.end_lineno - main.lineno + 1 <= 110
    assert lines(path) <= (240 if path.name == "build_corpus.py" else 150)


def test_no_line_does_the_work_of_several():
    """Nodes of the syntax tree by line, which packing would raise: 9.13 before the library was shortened.

    Since then guards, messages and imports went, which have few nodes a line (6 to 8); statistics and kernels came,
    which have many (11 to 14).
    """
    nodes = sum(1 for path in FILES for _ in ast.walk(ast.parse(path.read_text("utf-8"))))
    assert nodes / sum(by_folder().values()) <= 9.81
