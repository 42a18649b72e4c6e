"""From a run folder to one page: what each stage was meant to bring, and what it brought.

    <run>/<stage>/metrics.jsonl      training, one JSON object per logged step
    <run>/evaluation/<stage>.json    "tasks", "perplexity", "preference", "gates", "samples", "signature", "seconds"
    <run>/report.md, *.png           written here; without matplotlib (extra `plot`) the page has no plots and says so
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGE_LABELS = {
    "base": "untrained base", "cpt_text": "CPT, text only", "cpt": "CPT, hybrid",
    "sft": "full SFT", "dfpo": "DFPO", "experts": "experts",
}
TASKS = ("MedKQ&A", "EviDiag", "TreRecom")
PERPLEXITIES = ("pediatric_text", "instructions", "general_medical_text", "general_text")
SCORES = ("rows", *(f"rouge-{n}" for n in "12l"), *(f"bleu-{n}" for n in "1234"), "gleu", "distinct-1", "distinct-2")
SAMPLE_KEYS = ("task", "question", "reference", "answer")
SHAPES: dict[str, tuple[type, Any]] = {
    "tasks": (dict, dict), "perplexity": (dict, float | int | None), "preference": (dict, float | int | None),
    "gates": (dict, list), "samples": (list, dict),
}
DISCLAIMER = "Trained and tested on synthetic text, for research only: no medical advice, no substitute for a doctor."
BLUE, ORANGE, GREEN, VIOLET, INK, FAINT = "#2F6DB5", "#E0772F", "#2A9D7F", "#8559A5", "#2B2F36", "#9AA1AB"
PALETTE = (BLUE, ORANGE, GREEN, VIOLET, "#B8860B", "#C2476A", "#4A90A4")
STYLE: Any = {
    "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.titlesize": 10.5, "axes.titlepad": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E7EAEE", "xtick.color": INK,
    "ytick.color": INK, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "savefig.dpi": 150, "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
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

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a training metric, where it was logged and finite."""
        return _split(
            [(row["step"], row[key]) for row in self.metrics if _is_number(row.get(key)) and math.isfinite(row[key])]
        )


@dataclass
class Run:
    """A run folder's stages by name, in the order in which they follow each other."""

    folder: Path
    stages: dict[str, Stage]

    def number(self, stage: str, *keys: str) -> float | None:
        return self.stages[stage].number(*keys) if stage in self.stages else None

    def names(self, part: str, order: Sequence[str]) -> list[str]:
        """Keys found under `part` ("tasks", "perplexity") in any stage: those of `order` first, then the others."""
        return _ordered((key for stage in self.stages.values() for key in stage.evaluation[part]), order)


@dataclass
class Check:
    """One expectation: passed is None if it wasn't measured."""

    label: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{'–' if self.passed is None else '✓' if self.passed else '✗'} {self.label}: {self.detail}"


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
    if not stages:
        raise ValueError(f"{folder}: nothing recorded, expected <stage>/metrics.jsonl or evaluation/<stage>.json in it")
    return Run(folder, {name: stages[name] for name in _ordered(stages, tuple(STAGE_LABELS))})


def expectations(run: Run) -> list[Check]:
    """What the stages should bring, each held against the measured numbers, whichever way they came out."""
    rouge = [f"tasks/{task}/rouge-l" for task in TASKS]

    def compare(label: str, before: str, after: str, what: list[str], holds: Callable[[float, float], bool]) -> Check:
        parts, results = [], []
        for path in what:
            keys = path.split("/")
            name = keys[1].replace("_", " ")
            old, new = run.number(before, *keys), run.number(after, *keys)
            if old is None or new is None:
                return Check(label, None, f"not measured ({name}, {before if old is None else after})")
            change = f"{new / old - 1:+.1%}" if keys[0] == "perplexity" and old else f"{new - old:+.2f}"
            parts.append(f"{name} {_show(old)} → {_show(new)} ({change})")
            results.append(holds(old, new))
        return Check(label, all(results), ", ".join(parts))

    accuracy, pairs = (run.number("dfpo", "preference", key) for key in ("reward_accuracy", "pairs"))
    preferred = "Rewards after DFPO prefer the chosen answer in at least 80 % of pairs"
    measured = f"{_percent(accuracy)}{f' of {pairs:.0f} pairs' if pairs else ''}"
    measured = "not measured (reward accuracy, dfpo)" if accuracy is None else measured
    return [
        compare("Hybrid CPT lowers the perplexity of pediatric text", "base", "cpt",
                ["perplexity/pediatric_text"], lambda old, new: new < old),
        compare("The hybrid mixture reads instructions better than text alone (perplexity)", "cpt_text", "cpt",
                ["perplexity/instructions"], lambda old, new: new < old),
        compare("SFT raises ROUGE-L on all three tasks", "cpt", "sft", rouge, lambda old, new: new > old),
        Check(preferred, None if accuracy is None else accuracy >= 0.8, measured),
        compare("DFPO doesn't lower the log-probability of chosen answers (nats per token)", "sft", "dfpo",
                ["preference/chosen_logp_per_token"], lambda old, new: new >= old),
        compare("Experts raise ROUGE-L on all three tasks", "dfpo", "experts", rouge, lambda old, new: new > old),
        compare("Experts cost general medicine less than 2 % in perplexity", "dfpo", "experts",
                ["perplexity/general_medical_text"], lambda old, new: new < 1.02 * old),
    ]


def stage_table(run: Run) -> str:
    """The stage-by-stage table as aligned plain text."""
    header, *rows = _stage_rows(run)
    heads = [cell.split("\n") for cell in header]
    tall = max(map(len, heads))
    lines = [*zip(*([""] * (tall - len(head)) + head for head in heads), strict=True), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(tall, tuple("-" * width for width in widths))
    aligned = ([f"{line[0]:<{widths[0]}}", *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def write_report(folder: str | Path) -> Path:
    """Write `report.md` and its plots into a run folder and return the page's path; ValueError as in `load_run`."""
    run = load_run(folder)
    plots = _draw(run)
    shown = {name: [f"![{alt}]({name})"] for name, (alt, _) in PLOTS.items() if plots and name in plots}
    checks = expectations(run)
    tally = [sum(check.passed is outcome for check in checks) for outcome in (True, False, None)]
    page = [
        f"# Run report: {_escape(run.folder.resolve().name)}",
        f"*{DISCLAIMER}*",
        *([] if plots is not None else ['No plots: matplotlib is missing, `pip install "pedgpt[plot]"` brings it.']),
        "## Stage by stage",
        _markdown_table(_stage_rows(run)),
        "ROUGE-L × 100, higher is better; perplexity per token, lower is better; log-probability in nats. Preference: "
        "share of pairs the chosen answer wins, by *reward* against the reference model or by *likelihood* per token.",
        *shown.get("metrics_by_stage.png", []),
        "## What to expect, and what came out",
        f"{tally[0]} of {len(checks)} expectations met, {tally[1]} missed, {tally[2]} not measured.",
        "\n".join(f"- {_escape(str(check))}" for check in checks),
        *_task_section(run),
        *_gate_section(run),
        *shown.get("expert_weights.png", []),
        *_training_section(run),
        *shown.get("loss_by_stage.png", []),
        *shown.get("dfpo.png", []),
        *_sample_section(run),
    ]
    path = run.folder / "report.md"
    draft = path.with_suffix(".md.tmp")
    draft.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return path


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ordered(names: Iterable[str], order: Sequence[str]) -> list[str]:
    found = dict.fromkeys(names)
    return [name for name in order if name in found] + [name for name in found if name not in order]


def _split(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
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
            raise ValueError(f"{path}:{number}: broken JSON ({error.msg}): mend or delete the line") from None
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            raise ValueError(f'{path}:{number}: expected a JSON object with a number under "step": mend the line')
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


def _show(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits if abs(value) < 1000 else 0}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_#~|<>\[\]]|&(?=#?\w+;))", r"\\\1", text)


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ([_escape(cell).replace("\n", "<br>") for cell in row] for row in rows)
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *body))


def _stage_rows(run: Run) -> list[list[str]]:
    tasks, texts = run.names("tasks", TASKS), run.names("perplexity", PERPLEXITIES)
    heads = ["stage", *(f"ROUGE-L\n{task}" for task in tasks)]
    heads += ["\n".join(["perplexity", *textwrap.wrap(name.replace("_", " "), 12)]) for name in texts]
    rows = [heads + ["preference\naccuracy", "chosen\nlog-prob\nper token"]]
    for stage in run.stages.values():
        reward, likelihood = (stage.number("preference", f"{kind}_accuracy") for kind in ("reward", "likelihood"))
        preference = "–" if likelihood is None else f"{_percent(likelihood)} likelihood"
        rows.append([
            stage.label,
            *(_show(stage.number("tasks", task, "rouge-l")) for task in tasks),
            *(_show(stage.number("perplexity", name)) for name in texts),
            preference if reward is None else f"{_percent(reward)} reward",
            _show(stage.number("preference", "chosen_logp_per_token"), 3),
        ])
    return rows


def _task_section(run: Run) -> list[str]:
    evaluated = [stage for stage in run.stages.values() if stage.evaluation["tasks"]]
    if not evaluated:
        return []
    signatures: dict[str, list[str]] = {}
    for stage in evaluated:
        signatures.setdefault(str(stage.evaluation.get("signature") or "unsigned"), []).append(stage.label)
    page = ["## Every score", "Per answer, then averaged, × 100. Scores compare only under the same signature:"]
    if len(signatures) == 1:
        page += [f"`{signature}`" for signature in signatures]
    else:
        page += ["\n".join(f"- `{signature}`: {'; '.join(labels)}" for signature, labels in signatures.items())]
        page += ["**The stages were scored under different signatures: don't compare across them.**"]
    for task in run.names("tasks", TASKS):
        stages = [stage for stage in evaluated if task in stage.evaluation["tasks"]]
        scores = _ordered((name for stage in stages for name in stage.evaluation["tasks"][task]), SCORES)
        rows = [["stage", *scores]]
        for stage in stages:
            values = ((name, stage.number("tasks", task, name)) for name in scores)
            rows.append([stage.label, *(_show(value, 0 if name == "rows" else 2) for name, value in values)])
        page += [f"### {_escape(task)}", _markdown_table(rows)]
    return page


def _gate_section(run: Run) -> list[str]:
    page: list[str] = []
    for stage in run.stages.values():
        if gates := stage.evaluation["gates"]:
            experts = len(next(iter(gates.values())))
            rows = [["task", *(f"expert {number}" for number in range(1, experts + 1))]]
            rows += [[task, *(_show(weight, 3) for weight in gates[task])] for task in _ordered(gates, TASKS)]
            page += [f"Mean weight of each specific expert; {1 / max(experts, 1):.3f} is an equal share."]
            page += [_markdown_table(rows)]
    return ["## Which expert answers what", *page] if page else []


def _training_section(run: Run) -> list[str]:
    rows = [["stage", "steps", "supervised tokens", "median tokens/s", "training, s", "evaluation, s"]]
    for stage in run.stages.values():
        last = {key: next(reversed(stage.series(key)[1]), None) for key in ("step", "tokens", "seconds")}
        speeds = stage.series("tokens_per_second")[1]
        counts = (last["step"], last["tokens"], statistics.median(speeds) if speeds else None)
        times = (last["seconds"], stage.number("seconds"))
        rows.append([stage.label, *(_show(value, 0) for value in counts), *(_show(value, 1) for value in times)])
    return ["## Training", _markdown_table(rows)]


def _sample_section(run: Run, per_task: int = 3, characters: int = 800) -> list[str]:
    found: dict[str, dict[str, dict[str, str]]] = {}  # task -> question -> who -> text
    for name in ("sft", "experts"):
        for row in run.stages[name].evaluation["samples"] if name in run.stages else []:
            task, question, reference, answer = (str(row.get(key) or "") for key in SAMPLE_KEYS)
            found.setdefault(task, {}).setdefault(question, {"reference": reference})[STAGE_LABELS[name]] = answer
    page = ["## Answers side by side"] if found else []
    for task in _ordered(found, TASKS):
        page.append(f"### {_escape(task)}")
        # Questions that both stages answered come first.
        for question, voices in sorted(found[task].items(), key=lambda item: -len(item[1]))[:per_task]:
            page.append("\n".join(f"> {_escape(line)}  " for line in question.splitlines()))
            answers = []
            for who, text in voices.items():
                short = text.strip() if len(text) <= characters else text.strip()[:characters] + " …"
                answers.append(f"- **{who}**: " + ("<br>".join(map(_escape, short.splitlines())) or "*(empty)*"))
            page.append("\n".join(answers))
    return page


def _draw(run: Run) -> list[str] | None:
    """Draw the plots that the run has numbers for and return their file names; None without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    drawn = []
    for name, (_, paint) in PLOTS.items():
        with rc_context(STYLE):
            figure = Figure(layout="constrained")
            if paint(run, figure):
                figure.savefig(run.folder / name, backend="agg")
                drawn.append(name)
    return drawn


def _curve(axes: Axes, stage: Stage, key: str, color: str, label: str | None = None, scale: float = 1) -> None:
    """A running mean (a twentieth of the run wide) over the faint raw values."""
    import numpy as np

    steps, raw = stage.series(key)
    values, index = scale * np.array(raw), np.arange(len(raw))
    half = np.minimum(len(raw) // 40, index)  # narrow at first, so that a steep start isn't flattened
    start, stop = index - half, np.minimum(index + half + 1, len(raw))
    total = np.concatenate([[0.0], np.cumsum(values)])
    mean = (total[stop] - total[start]) / (stop - start)
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, mean, "." if len(raw) == 1 else "-", color=color, linewidth=1.8, label=label)


def _dots(axes: Axes, stage: Stage, key: str, color: str, label: str, scale: float = 1) -> None:
    steps, values = stage.series(key)
    scaled = [scale * value for value in values]
    axes.plot(steps, scaled, "o", color=color, markersize=6, markeredgecolor="white", label=label if steps else None)


def _paint_losses(run: Run, figure: Figure) -> bool:
    stages = [stage for stage in run.stages.values() if stage.series("loss")[0]]
    columns, rows = min(3, len(stages)), math.ceil(len(stages) / 3)
    if not stages:
        return False
    figure.set_size_inches(3.6 * columns + 0.4, 2.7 * rows + 0.5)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, stage in zip(grid, stages, strict=False):
        _curve(axes, stage, "loss", BLUE, "training, running mean over raw")
        _dots(axes, stage, "eval_loss", ORANGE, "held out")
        preference = bool(stage.series("loss/preference")[0])
        axes.set(title=stage.label, xlabel="step", ylabel="DFPO loss [nats]" if preference else "loss [nats per token]")
    for axes in grid[len(stages) :]:
        axes.set_axis_off()
    handles = {line.get_label(): line for axes in grid for line in axes.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside upper right", ncols=2)
    return True


def _paint_metrics(run: Run, figure: Figure) -> bool:
    from matplotlib.ticker import LogFormatter

    stages = [stage for stage in run.stages.values() if stage.evaluation["tasks"] or stage.evaluation["perplexity"]]
    parts = [part for part in ("tasks", "perplexity") if any(stage.evaluation[part] for stage in stages)]
    if not parts:
        return False
    figure.set_size_inches(6 * len(parts), 4.4)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False).flat, parts, strict=True):
        if part == "tasks":
            axes.set(title="Answers: ROUGE-L against the reference", ylabel="ROUGE-L F [%]")
            lines: dict[str, tuple[str, ...]] = {task: (part, task, "rouge-l") for task in run.names(part, TASKS)}
            ends = _paint_path(axes, stages, lines, PALETTE)
            axes.set_ylim(bottom=0)
        else:
            axes.set(title="Language modelling: held-out perplexity", ylabel="perplexity per token, log scale")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.5)))
            lines = {name.replace("_", " "): (part, name) for name in run.names(part, PERPLEXITIES)}
            ends = _paint_path(axes, stages, lines, PALETTE[len(TASKS) :])
        axes.set_xticks(range(len(stages)), [stage.label.replace(" ", "\n", 1) for stage in stages])
        axes.set_xlim(-0.3, len(stages) - 0.8)
        axes.grid(False, axis="x")
        _label_ends(axes, ends)
    if any(stage.name == "cpt_text" for stage in stages):
        figure.supxlabel("hollow: ablation, not on the path to later stages", fontsize=8.5, color="#6B727C")
    return True


def _paint_path(
    axes: Axes, stages: list[Stage], lines: dict[str, tuple[str, ...]], palette: Sequence[str]
) -> list[tuple[float, str, str]]:
    """Draw one line over the stages per measure and return the ends: height, name, color."""
    ends, lowest = [], 0 if axes.get_yscale() == "log" else -math.inf
    for (name, keys), color in zip(lines.items(), itertools.cycle(palette), strict=False):
        values = ((x, stage.number(*keys), stage.name) for x, stage in enumerate(stages))
        known = [(x, y, who) for x, y, who in values if y is not None and lowest < y < math.inf]
        # Nothing is trained on from the text-only ablation, so the line passes it by.
        path = _split((x, y) for x, y, who in known if who != "cpt_text")
        aside = _split((x, y) for x, y, who in known if who == "cpt_text")
        axes.plot(*path, "o-", color=color, linewidth=1.8, markersize=6)
        axes.plot(*aside, "o", color=color, markerfacecolor="white", markersize=6, zorder=3)
        ends += [(known[-1][1], name, color)] if known else []
    return ends


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]], gap: float = 0.065) -> None:
    """Name each line at its right end, names pushed apart to at least `gap` of the axes' height."""
    transform = axes.transScale + axes.transLimits
    heights: list[float] = []
    for y, name, color in sorted(ends):
        height = float(transform.transform((0, y))[1])
        heights.append(max(height, heights[-1] + gap) if heights else height)
        place: Any = {"transform": axes.transAxes, "va": "center", "fontweight": "bold", "fontsize": 9}
        axes.text(1.01, heights[-1], name, color=color, **place)


def _paint_gates(run: Run, figure: Figure) -> bool:
    found = [stage.evaluation["gates"] for stage in run.stages.values() if stage.evaluation["gates"]]
    if not found or not any(found[-1].values()):
        return False
    tasks = _ordered(found[-1], TASKS)
    weights = [found[-1][task] for task in tasks]
    experts, share = len(weights[0]), 1 / len(weights[0])
    reach = max(0.1, *(1.2 * abs(weight - share) for row in weights for weight in row))
    figure.set_size_inches(2.6 + 1.1 * experts, 1.5 + 0.62 * len(tasks))
    axes = figure.subplots()
    image = axes.imshow(weights, cmap="PuOr_r", vmin=share - reach, vmax=share + reach, aspect="auto")
    for y, row in enumerate(weights):
        for x, weight in enumerate(row):
            strong = abs(weight - share) > 0.5 * reach
            axes.text(x, y, f"{weight:.2f}", ha="center", va="center", color="white" if strong else INK)
    axes.set_xticks(range(experts), [f"expert {number}" for number in range(1, experts + 1)])
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xticks([x + 0.5 for x in range(experts - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(tasks) - 1)], minor=True)
    axes.grid(False)
    axes.grid(True, which="minor", color="white", linewidth=3)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Mean gate weight by task")
    bar = figure.colorbar(image, ax=axes, ticks=[share - reach, share, share + reach], format="%.2f")
    bar.outline.set_linewidth(0)
    bar.set_label(f"weight ({share:.2f} = equal share)")
    return True


def _paint_dfpo(run: Run, figure: Figure) -> bool:
    stage = next((stage for stage in run.stages.values() if stage.series("logps/chosen")[0]), None)
    if stage is None:
        return False
    figure.set_size_inches(9, 5.6)
    logps, margin, accuracy, loss = figure.subplots(2, 2, sharex=True).flat
    _curve(logps, stage, "logps/chosen", GREEN, "chosen")
    _curve(logps, stage, "logps/rejected", ORANGE, "rejected")
    logps.set(title="Log-probability of the responses", ylabel="nats per response")
    _curve(margin, stage, "rewards/margins", BLUE)
    margin.set(title="Reward margin, chosen − rejected", ylabel="β × nats")
    margin.axhline(0, color=FAINT, linewidth=1)
    _curve(accuracy, stage, "rewards/accuracies", BLUE, "training", scale=100)
    _dots(accuracy, stage, "eval_rewards/accuracies", ORANGE, "held out", scale=100)
    accuracy.axhline(50, color=FAINT, linewidth=1)
    accuracy.set(title="Pairs in which chosen wins", xlabel="step", ylabel="share of pairs [%]", ylim=(0, 104))
    _curve(loss, stage, "loss/preference", VIOLET, "preference")
    _curve(loss, stage, "loss/regularization", BLUE, "regularization Φ")
    loss.set(title="The two parts of the loss", xlabel="step", ylabel="nats", ylim=(0, None))
    for axes in (logps, accuracy, loss):
        axes.legend(loc="best")
    return True


PLOTS: dict[str, tuple[str, Callable[[Run, Figure], bool]]] = {
    "loss_by_stage.png": ("Training loss of each stage", _paint_losses),
    "metrics_by_stage.png": ("ROUGE-L and perplexity after each stage", _paint_metrics),
    "expert_weights.png": ("Mean gate weight of each expert by task", _paint_gates),
    "dfpo.png": ("DFPO: log-probabilities, reward margin, accuracy and loss", _paint_dfpo),
}
