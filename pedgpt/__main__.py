"""Run the recipes without a clone of the repository.

python -m pedgpt                      lists the recipes
python -m pedgpt dfpo --help          runs one: `torchrun -m pedgpt dfpo …` on many GPUs
python -m pedgpt demo                 trains a tiny model on $CORPUS (the sample), in $RUN (runs/demo)
python -m pedgpt copy dfpo            copies a recipe here to be changed; `copy all` copies them with their settings
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path

from pedgpt.files import nearest

# A wheel has the recipes inside of the package, and a clone has them beside it.
RECIPES = next(folder for base in Path(__file__).parents[:2] if (folder := base / "recipes").is_dir())


def main(arguments: list[str]) -> None:
    """Run the command; SystemExit for an unknown one, with the nearest name that is known."""
    recipes = {file.stem: file for file in sorted(RECIPES.glob("*.py"))}
    command, rest = (arguments or ["--help"])[0], arguments[1:]
    if command in ("-h", "--help"):
        print(f"{__doc__}\nRecipes:")
        for name, file in recipes.items():
            docstring = file.read_text(encoding="utf-8").split('"""')[1]
            print(f"  {name:20} {docstring.splitlines()[0]}")
    elif command == "copy":
        copy(recipes, rest)
    elif command == "demo":
        os.execvpe("bash", ["bash", str(RECIPES / "pipeline.sh"), *rest], os.environ | {"PYTHON": sys.executable})
    elif command in recipes:
        sys.argv = [str(recipes[command]), *rest]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        raise SystemExit(f"error: unknown recipe {command!r}; {nearest(command, [*recipes, 'copy', 'demo'], 'names')}")


def copy(recipes: dict[str, Path], names: list[str]) -> None:
    """Copy recipes into the working folder, or all of them into its folder `recipes`; nothing is written over."""
    if not names or not {*names} <= {*recipes, "all"}:
        raise SystemExit(f"error: copy takes names of recipes, or all; known: {', '.join(recipes)}")
    for name in names:
        source, target = (RECIPES, Path("recipes")) if name == "all" else (recipes[name], Path(f"{name}.py"))
        if target.exists():
            raise SystemExit(f"error: {target} exists; move it away first, because copying would replace it")
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
        print(f"copied {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
