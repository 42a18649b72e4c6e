"""The plots of a run: losses, metrics by stage, expert weights, DFPO. matplotlib (extra `plot`) is imported lazily."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pedgpt.data.tasks import TASKS
from pedgpt.evaluation.findings import Findings
from pedgpt.evaluation.run import PERPLEXITIES, Run, Stage, ordered, split
from pedgpt.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VIOLET, INK, FAINT = "#2F6DB5", "#E0772F", "#2A9D7F", "#8559A5", "#2B2F36", "#9AA1AB"
PALETTE = (BLUE, ORANGE, GREEN, VIOLET, "#B8860B", "#C2476A", "#4A90A4")
STYLE: Any = {
    "font.size": 9.5, "text.color": INK, "savefig.dpi": 150, "legend.frameon": False,
    "axes.labelcolor": INK, "axes.edgecolor": FAINT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 10.5, "axes.titlepad": 9,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E7EAEE",
    "xtick.color": INK, "xtick.major.size": 0, "xtick.minor.size": 0,
    "ytick.color": INK, "ytick.major.size": 0, "ytick.minor.size": 0,
    "figure.constrained_layout.h_pad": 0.1, "figure.constrained_layout.w_pad": 0.1,
}  # fmt: skip


def draw(run: Run, findings: Findings) -> list[str] | None:
    """Draw the plots that there are numbers for and return their file names; None without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    drawn = []
    for name, (_, paint) in PLOTS.items():
        with rc_context(STYLE):
            figure = Figure(layout="constrained")
            if paint(findings if paint in (_paint_verdicts, _paint_calibration) else run, figure):
                with atomic_write(run.folder / name, "wb") as file:
                    figure.savefig(file, backend="agg")
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
        path = split((x, y) for x, y, who in known if who != "cpt_text")
        aside = split((x, y) for x, y, who in known if who == "cpt_text")
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
    tasks = ordered(found[-1], TASKS)
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


def _paint_routing(run: Run, figure: Figure) -> bool:
    stage = next((stage for stage in run.stages.values() if stage.series("gates/entropy")[0]), None)
    if stage is None:
        return False
    figure.set_size_inches(9, 3.2)
    weights, entropy = figure.subplots(1, 2)
    experts = sorted({key for row in stage.metrics for key in row if key.startswith("gates/expert_")})
    for color, key in zip(itertools.cycle(PALETTE), experts, strict=False):
        _curve(weights, stage, key, color, key.removeprefix("gates/").replace("_", " "))
    weights.set(title="Mean gate weight while training", xlabel="step")
    weights.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=4)
    _curve(entropy, stage, "gates/entropy", VIOLET)
    entropy.axhline(math.log(len(experts)), color=FAINT, linewidth=1, label="all experts alike")
    entropy.legend(loc="upper left", bbox_to_anchor=(0, -0.2))
    entropy.set(title="Entropy of a token's gates", xlabel="step", ylabel="nats")
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


def _families() -> list[str]:
    """Fonts for the names of systems and tasks, which may be Chinese: those that are installed."""
    from matplotlib.font_manager import fontManager

    known = "Noto Sans CJK SC,Source Han Sans SC,WenQuanYi Micro Hei,Microsoft YaHei,PingFang SC,SimHei".split(",")
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in known if name in installed)]


def _paint_verdicts(findings: Findings, figure: Figure) -> bool:
    """Win, tie and loss of each pair of systems by task, as the paper draws them."""
    rows = [row for row in findings.verdicts() if row["dimension"] == "overall"]
    if not rows:
        return False
    figure.set_size_inches(8.5, 1.3 + 0.42 * len(rows))
    axes = figure.subplots()
    for y, row in enumerate(reversed(rows)):
        left = 0.0
        for kind, color in (("win", BLUE), ("tie", "#C9CFD6"), ("loss", ORANGE)):
            share = 100 * row[kind][0]
            axes.barh(y, share, left=left, color=color, height=0.66, label=kind if not y else None)
            if share >= 5:
                axes.text(
                    left + share / 2,
                    y,
                    f"{share:.0f}",
                    ha="center",
                    va="center",
                    color="white" if kind != "tie" else INK,
                )
            left += share
    names = [
        f"{row['by']}: {row['first']} against {row['second']}, {row['task']} ({row['n']})" for row in reversed(rows)
    ]
    names = [name.replace("$", r"\$") for name in names]  # no formula
    axes.set_yticks(range(len(rows)), names, fontfamily=_families())
    axes.set(xlim=(0, 100), xlabel="share of questions [%]", title="Overall: win, tie and loss of the first system")
    axes.grid(False)
    figure.legend(loc="outside lower center", ncols=3)
    return True


def _paint_calibration(findings: Findings, figure: Figure) -> bool:
    """How often the chosen option is right, against its probability."""
    found = {name: exam["calibration"] for name, exam in findings.likelihoods() if exam.get("calibration")}
    if not found:
        return False
    figure.set_size_inches(4.6, 4.2)
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=FAINT, linewidth=1)
    for color, (name, one) in zip(itertools.cycle(PALETTE), found.items(), strict=False):
        x, y, n = zip(*((100 * b["confidence"], 100 * b["accuracy"], b["questions"]) for b in one["bins"]), strict=True)
        label = f"{name}, ECE {one['ece']:.1f} %".replace("$", r"\$")
        axes.plot(x, y, color=color, linewidth=1.2, label=label)
        axes.scatter(x, y, s=[12 + 3 * count**0.5 for count in n], color=color)
    axes.set(xlim=(0, 102), ylim=(0, 102), xlabel="probability of the chosen option [%]", ylabel="right [%]")
    axes.set_title("Calibration on the exam")
    axes.legend(loc="upper left", prop={"family": _families()})
    return True


PLOTS: dict[str, tuple[str, Callable[[Any, Figure], bool]]] = {
    "loss_by_stage.png": ("Training loss of each stage", _paint_losses),
    "metrics_by_stage.png": ("ROUGE-L and perplexity after each stage", _paint_metrics),
    "expert_weights.png": ("Mean gate weight of each expert by task", _paint_gates),
    "routing.png": ("Gate weights and entropy while the experts train", _paint_routing),
    "verdicts.png": ("Win, tie and loss by judge and doctors", _paint_verdicts),
    "calibration.png": ("Calibration on the exam", _paint_calibration),
    "dfpo.png": ("DFPO: log-probabilities, reward margin, accuracy and loss", _paint_dfpo),
}
