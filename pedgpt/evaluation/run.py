"""What a run folder recorded: training metrics and evaluations by stage.

<run>/<stage>/metrics.jsonl      training, one JSON object per logged step
<run>/evaluation/<stage>.json    "tasks", "perplexity", "preference", "gates", "gate_entropy", "samples", "seconds", …
                                 "values" of single questions, documents and pairs, and the "intervals" made of them
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pedgpt.evaluation.agreement import LIMITS, Array, bootstrap, paired_difference, resampled_means

STAGE_LABELS = {
    "base": "untrained base",
    "cpt_text": "CPT, text only",
    "cpt": "CPT, hybrid",
    "sft": "full SFT",
    "dfpo": "DFPO",
    "experts": "experts",
}
PERPLEXITIES = ("pediatric_text", "instructions", "general_medical_text", "general_text")
SHAPES: dict[str, tuple[type, Any]] = {
    "tasks": (dict, dict),
    "perplexity": (dict, float | int | None),
    "preference": (dict, float | int | None),
    "gates": (dict, list),
    "gate_entropy": (dict, float | int | None),
    "samples": (list, dict),
    "values": (dict, dict),
    "intervals": (dict, dict),
}


@dataclass
class Stage:
    """What one stage recorded: training rows by ascending step, and the evaluation file's object."""

    name: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=lambda: {key: outer() for key, (outer, _) in SHAPES.items()})

    @property
    def label(self) -> str:
        return STAGE_LABELS.get(self.name, self.name)

    def number(self, *keys: str) -> float | None:
        """The evaluation's value under these nested keys, None if it wasn't measured."""
        value: Any = self.evaluation
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if _is_number(value) else None

    def interval(self, *keys: str) -> tuple[float, float] | None:
        """The 95 % interval of the number under these keys, None if there is none."""
        value: Any = self.evaluation["intervals"]
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else None

    def values(self, *keys: str) -> Array | None:
        """What that number was computed from, question by question, None if it was not kept."""
        value: Any = self.evaluation["values"]
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return np.array(value) if isinstance(value, list) and value else None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a training metric, where it was logged and finite."""
        return split(
            [(row["step"], row[key]) for row in self.metrics if _is_number(row.get(key)) and math.isfinite(row[key])]
        )


@dataclass
class Run:
    """A run folder's stages by name, in the order in which they follow each other."""

    folder: Path
    stages: dict[str, Stage]

    def number(self, stage: str, *keys: str) -> float | None:
        return self.stages[stage].number(*keys) if stage in self.stages else None

    def difference(self, before: str, after: str, *keys: str) -> tuple[float, float, float] | None:
        """(after − before, low, high) on the same questions, with a paired 95 % interval; None where that is unknown.

        Of perplexities it is the quotient.
        """
        if not {before, after} <= self.stages.keys():
            return None
        stages = self.stages[before], self.stages[after]
        old, new = (stage.values(*keys) for stage in stages)
        asked = [stage.evaluation["tasks"].get(keys[1], {}).get("question_set") for stage in stages]
        if old is None or new is None or old.shape != new.shape or asked[0] != asked[1]:
            return None
        if keys[0] != "perplexity":
            clusters = stages[0].evaluation["values"].get("conversations", {}).get(keys[1])
            return paired_difference(new, old, clusters=clusters if keys[0] == "tasks" else None)
        draws = resampled_means(np.stack([old, new], 1))
        whole = np.stack([old.mean(0), new.mean(0)])
        losses = np.concatenate([whole[None], draws])
        logs = losses[..., 0] / losses[..., 1]  # [1 + draws, (before, after)]
        ratios = np.exp(logs[:, 1] - logs[:, 0])
        low, high = np.quantile(ratios[1:], LIMITS).tolist()
        return float(ratios[0]), low, high

    def names(self, part: str, order: Collection[str]) -> list[str]:
        """Keys found under `part` ("tasks", "perplexity") in any stage: those of `order` first, then the others."""
        return ordered((key for stage in self.stages.values() for key in stage.evaluation[part]), order)


def intervals_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The 95 % intervals of the means, and of the perplexities, of `values` as an evaluation file holds them.

    Answers of one conversation, which `values["conversations"]` numbers by task, are drawn together.
    """
    found: dict[str, Any] = {}
    together = values.get("conversations", {})
    for part in values.keys() - {"conversations"}:
        for name, value in values[part].items():
            if part == "perplexity":
                draws = resampled_means(value)
                ends = np.exp(np.quantile(draws[:, 0] / draws[:, 1], LIMITS)).tolist()
            elif isinstance(value, Mapping):
                rows = np.array(list(value.values())).T
                limits = np.stack(bootstrap(rows, clusters=together.get(name))[1:], -1).tolist()
                ends = dict(zip(value, limits, strict=True))
            else:
                ends = list(bootstrap(value)[1:])
            found.setdefault(part, {})[name] = ends
    return found


def load_run(folder: str | Path) -> Run:
    """Read what a run folder recorded; ValueError names the file and line that can't be read, or what is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    stages: dict[str, Stage] = {}
    for path in sorted(folder.glob("*/metrics.jsonl")):
        if rows := _read_metrics(path):
            stages[path.parent.name] = Stage(path.parent.name, rows)
    for path in sorted(folder.glob("evaluation/*.json")):
        stages.setdefault(path.stem, Stage(path.stem)).evaluation = _read_evaluation(path)
    others = ("answers/*.jsonl", "exams/*.json", "judge/*.json", "doctors/*.json")
    if not stages and not any(found for pattern in others for found in folder.glob(pattern)):
        wanted = f"<stage>/metrics.jsonl, evaluation/<stage>.json, {', '.join(others)}"
        raise ValueError(f"{folder}: nothing recorded, expected {wanted} in it")
    return Run(folder, {name: stages[name] for name in ordered(stages, tuple(STAGE_LABELS))})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def ordered(names: Iterable[str], order: Collection[str]) -> list[str]:
    """The names that are there: those of `order` first, in its order, then the others."""
    found = dict.fromkeys(names)
    return [name for name in order if name in found] + [name for name in found if name not in order]


def split(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """(x, y) points as two lists."""
    xs, ys = zip(*points, strict=True) if (points := list(points)) else ((), ())
    return list(xs), list(ys)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: invalid UTF-8, the file is damaged: write it again") from None


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    rows: dict[float, dict[str, Any]] = {}
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: broken JSON ({error.msg}): fix or delete the line") from None
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            raise ValueError(f'{path}:{number}: expected a JSON object with a number under "step": fix the line')
        # A resumed run logs some steps again: what it says last counts.
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def _read_evaluation(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON ({error.msg}): evaluate the stage again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}:1: expected a JSON object: evaluate the stage again")
    for key, (outer, inner) in SHAPES.items():
        part: Any = content.get(key) or outer()
        content[key] = part
        values = part.values() if isinstance(part, dict) else part
        if not isinstance(part, outer) or not all(isinstance(value, inner) for value in values):
            raise ValueError(f'{path}: unexpected {json.dumps(part)[:60]} under "{key}": evaluate the stage again')
    return content
