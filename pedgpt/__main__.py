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
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(f"{__doc__}\nRecipes:")
        for name, file in recipes.items():
            print(f"  {name:20} {file.read_text(encoding='utf-8').splitlines()[0][3:]}")
    elif command == "copy":
        for name in rest or [""]:
            copy(name, recipes | {"all": RECIPES})
    elif command == "demo":
        os.execvpe("bash", ["bash", str(RECIPES / "pipeline.sh"), *rest], os.environ | {"PYTHON": sys.executable})
    elif command in recipes:
        sys.argv = [str(recipes[command]), *rest]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        raise SystemExit(f"error: unknown recipe {command!r}; {nearest(command, [*recipes, 'copy', 'demo'], 'names')}")


def copy(name: str, known: dict[str, Path]) -> None:
    """Copy a recipe, or the folder of all, into the working folder; nothing is written over."""
    if name not in known:
        raise SystemExit(f"error: copy takes names of recipes, or all; known: {', '.join(known)}")
    source, target = known[name], Path(known[name].name)
    if target.exists():
        raise SystemExit(f"error: {target} exists; move it away first, because copying would replace it")
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    print(f"copied {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
