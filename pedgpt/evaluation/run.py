"""What a run folder holds: the stages' training metrics and evaluations, and what was compared beside them.

<run>/<stage>/metrics.jsonl      training, one JSON object per logged step
<run>/evaluation/<stage>.json    "tasks", "perplexity", "preference", "gates", "gate_entropy", "seconds", …
                                 "values" of single questions, documents and pairs, and their "figures" with intervals
<run>/answers/<system>.jsonl     written by answer.py or evaluate.py
<run>/exams/<name>.json          written by exam.py
<run>/judge/<name>.json          written by judge.py
<run>/doctors/<name>.json        the merged ratings, written by doctors.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pedgpt.evaluation.agreement import Array, bootstrap, mean, perplexity_of
from pedgpt.evaluation.generation_metrics import score_answers, signature
from pedgpt.evaluation.responses import Answers, read_answers
from pedgpt.files import read_object

STAGE_LABELS = {
    "base": "untrained base",
    "cpt_text": "CPT, text only",
    "cpt": "CPT, hybrid",
    "sft": "full SFT",
    "dfpo": "DFPO",
    "experts": "experts",
}
PERPLEXITIES = ("pediatric_text", "instructions", "general_medical_text", "general_text")
Results = dict[str, dict[str, Any]]  # by the name of their file
KEYS = {  # of a result, at least
    "exams": {"likelihood", "generated", "questions"},
    "judge": {"judge", "question_set"},
    "doctors": {"raters", "systems", "comparisons", "agreement", "votes", "unsafe"},
}


@dataclass
class Stage:
    """What one stage recorded: training rows by ascending step, and the evaluation file's object."""

    name: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return STAGE_LABELS.get(self.name, self.name)

    def at(self, *keys: str) -> Any:
        """What the evaluation holds under these nested keys, None if it was not measured."""
        value: Any = self.evaluation
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a training metric, where it was logged and finite."""
        return split([(row["step"], row[key]) for row in self.metrics if math.isfinite(row.get(key, math.nan))])


@dataclass
class Run:
    """Stages by name, in the order in which they follow each other, then other systems, and the results beside them."""

    folder: Path
    stages: dict[str, Stage] = field(default_factory=dict)
    exams: Results = field(default_factory=dict)
    judge: Results = field(default_factory=dict)
    doctors: Results = field(default_factory=dict)

    def number(self, stage: str, *keys: str) -> Any:
        return self.stages[stage].at(*keys) if stage in self.stages else None

    def difference(self, before: str, after: str, *keys: str) -> list[float] | None:
        """[after − before, low, high] on the same questions, paired; None where that is unknown.

        Of perplexities it is the quotient.
        """
        old, new = (self.number(stage, "values", *keys) for stage in (before, after))
        asked = {self.number(stage, "tasks", keys[1], "question_set") for stage in (before, after)}
        if not old or not new or len(old) != len(new) or len(asked) > 1:
            return None
        clusters = self.number(before, "values", "conversations", keys[1]) if keys[0] == "tasks" else None
        statistic = _quotient if keys[0] == "perplexity" else _change
        return bootstrap(np.stack([old, new], 1), clusters, statistic=statistic)

    def names(self, part: str, order: Collection[str]) -> list[str]:
        """Keys found under `part` ("tasks", "perplexity") in any stage: those of `order` first, then the others."""
        return ordered((key for stage in self.stages.values() for key in stage.at(part) or ()), order)

    def comparisons(self) -> list[dict[str, Any]]:
        """A row for each judge or the doctors' majority, pair of systems, task and dimension, with win, tie, loss."""
        rows = [{**row, "by": found["judge"]} for found in self.judge.values() for row in found.get("comparisons", ())]
        for found in self.doctors.values():
            majority = [row for row in found["comparisons"] if row["by"] == "majority"]
            rows += [{**row, "by": f"{len(found['raters'])} doctors"} for row in majority]
        return [row for row in rows if row["n"]]


def _change(values: Array, weights: Array) -> Array:
    return np.diff(mean(values, weights), axis=1)[:, 0]


def _quotient(values: Array, weights: Array) -> Array:
    found = perplexity_of(values, weights)
    return found[:, 1] / found[:, 0]


def figures_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The means, and the perplexities, of `values` as an evaluation file holds them, each [value, low, high].

    Answers of one conversation, which `values["conversations"]` numbers by task, are drawn together.
    """
    found: dict[str, Any] = {"tasks": {}}
    for task, scores in values.get("tasks", {}).items():
        rows = bootstrap(np.array([*scores.values()]).T, values.get("conversations", {}).get(task))
        found["tasks"][task] = dict(zip(scores, rows, strict=True))
    for part, statistic in (("perplexity", perplexity_of), ("preference", mean)):
        found[part] = {name: bootstrap(rows, statistic=statistic) for name, rows in values.get(part, {}).items()}
    return found


def scored(answers: Answers, **others: Any) -> dict[str, Any]:
    """What an evaluation file holds of a system's answers and of `others`, values of "perplexity" and "preference"."""
    tasks = score_answers(answers)
    values: dict[str, Any] = {"tasks": {task: found.pop("values") for task, found in tasks.items()}, **others}
    values["conversations"] = {task: found.pop("conversations") for task, found in tasks.items()}
    figures = figures_of(values)
    for task, found in figures["tasks"].items():
        tasks[task] |= {name: one[0] for name, one in found.items()}
    results = {part: {name: one[0] for name, one in figures[part].items()} for part in ("perplexity", "preference")}
    return {"signature": signature(), "tasks": tasks, **results, "values": values, "figures": figures}


def load_run(folder: str | Path) -> Run:
    """Read what a run folder holds; ValueError names the file that can't be read, or what is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    run = Run(folder)
    for path in sorted(folder.glob("*/metrics.jsonl")):
        if rows := _read_metrics(path):
            run.stages[path.parent.name] = Stage(path.parent.name, rows)
    for path in sorted(folder.glob("evaluation/*.json")):
        run.stages.setdefault(path.stem, Stage(path.stem)).evaluation = read_object(path.parent, path.name)
    for name, keys in KEYS.items():
        for path in sorted((folder / name).glob("*.json")):
            result = read_object(path.parent, path.name)
            if path.name == "key.json" or (name == "doctors" and "checksum" in result):
                continue  # it tells which system stands behind a letter, or is one rater's
            if not keys <= result.keys():
                recipe = "exam" if name == "exams" else name
                raise ValueError(f"{path}: not a result of {recipe}.py; move it to another folder")
            getattr(run, name)[path.stem] = result
    for path in sorted(folder.glob("answers/*.jsonl")):  # last, because scoring them takes seconds
        stage = run.stages.setdefault(path.stem, Stage(path.stem))
        if not stage.at("tasks"):
            stage.evaluation |= scored(read_answers(path))
    run.stages = {name: run.stages[name] for name in ordered(run.stages, STAGE_LABELS)}
    if not (run.stages or run.exams or run.judge or run.doctors):
        wanted = "<stage>/metrics.jsonl, evaluation/<stage>.json, answers/*.jsonl, exams/, judge/ or doctors/*.json"
        raise ValueError(f"{folder}: nothing recorded, expected {wanted} in it")
    return run


def ordered(names: Iterable[str], order: Collection[str]) -> list[str]:
    """The names that are there: those of `order` first, in its order, then the others."""
    found = dict.fromkeys(names)
    return [name for name in order if name in found] + [name for name in found if name not in order]


def split(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """(x, y) points as two lists."""
    xs, ys = zip(*points, strict=True) if (points := list(points)) else ((), ())
    return list(xs), list(ys)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    rows: dict[float, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                rows.setdefault(row["step"], {}).update(row)  # what a resumed run logs again counts
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: no row of metrics ({error}): fix or delete the line") from None
    return [rows[step] for step in sorted(rows)]
