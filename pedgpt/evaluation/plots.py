"""The plots of a run: metrics by stage, curves of the training, verdicts, calibration; they need the extra `plot`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pedgpt.data.tasks import TASKS
from pedgpt.evaluation.routing import layer_number, mean_by_expert
from pedgpt.evaluation.run import PERPLEXITIES, Run, split
from pedgpt.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ["#2F6DB5", "#E0772F", "#2A9D7F", "#8559A5", "#B8860B", "#C2476A", "#4A90A4"]
INK, FAINT = "#2B2F36", "#9AA1AB"
# Fonts for the names of systems and tasks, which may be Chinese.
CHINESE = "Noto Sans CJK SC,Source Han Sans SC,WenQuanYi Micro Hei,Microsoft YaHei,PingFang SC,SimHei".split(",")
STYLE: Any = {
    "font.size": 9.5, "text.color": INK, "savefig.dpi": 150, "legend.frameon": False, "text.parse_math": False,
    "axes.labelcolor": INK, "axes.edgecolor": FAINT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 10.5, "axes.titlepad": 9,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E7EAEE",
    "xtick.color": INK, "xtick.major.size": 0, "xtick.minor.size": 0,
    "ytick.color": INK, "ytick.major.size": 0, "ytick.minor.size": 0,
    "figure.constrained_layout.h_pad": 0.1, "figure.constrained_layout.w_pad": 0.1,
}  # fmt: skip
LOGGED = ("loss", "logps", "rewards", "gates")  # groups of metrics that are drawn


def draw(run: Run) -> list[str] | None:
    """Draw the plots that there are numbers for and return their file names; None without matplotlib."""
    try:
        from cycler import cycler
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.font_manager import fontManager
    except ImportError:
        return None
    installed = {font.name for font in fontManager.ttflist}
    style = STYLE | {"font.family": ["DejaVu Sans", *(name for name in CHINESE if name in installed)]}
    drawn = []
    for name, (_, _, paint) in PLOTS.items():
        with rc_context(style | {"axes.prop_cycle": cycler(color=COLORS)}):
            figure = Figure(layout="constrained")
            if paint(run, figure):
                with atomic_write(run.folder / name, "wb") as file:
                    figure.savefig(file, backend="agg")
                drawn.append(name)
    return drawn


def _paint_training(run: Run, figure: Figure) -> bool:
    """A panel for each stage and group of metrics, such as loss/… or gates/…; points are measured on held-out data."""
    panels: dict[tuple[str, str], dict[str, tuple[list[float], list[float]]]] = {}
    for stage in run.stages.values():
        for key in sorted({key for row in stage.metrics for key in row}):
            if (group := key.removeprefix("eval_").partition("/")[0]) in LOGGED:
                panels.setdefault((stage.label, group), {})[key] = stage.series(key)
    rows = math.ceil(len(panels) / 3)
    figure.set_size_inches(12, 3.3 * max(1, rows))
    for place, ((label, group), series) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, 3, place, title=f"{label}: {group}", xlabel="step")
        colors: dict[str, Any] = {}
        for key, (steps, values) in sorted(series.items(), key=lambda item: item[0].startswith("eval_")):
            name = key.removeprefix("eval_").rpartition("/")[2].replace("_", " ")
            if key.startswith("eval_"):
                axes.plot(steps, values, "o", color=colors.get(name), markeredgecolor="white", markersize=5)
            elif values:  # a running mean over the faint raw values, narrow at first so that a steep start stays one
                index, total = np.arange(len(values)), np.concatenate([[0.0], np.cumsum(values)])
                half = np.minimum(len(values) // 40, index)
                start, stop = index - half, np.minimum(index + half + 1, len(values))
                means = (total[stop] - total[start]) / (stop - start)
                (line,) = axes.plot(steps, means, "." if len(values) == 1 else "-", label=name)
                colors[name] = line.get_color()
                axes.plot(steps, values, color=colors[name], alpha=0.25, linewidth=0.8)
        axes.plot([], [], "o", color=FAINT, label="held out")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, columnspacing=1, handlelength=1)
    return bool(panels)


def _paint_metrics(run: Run, figure: Figure) -> bool:
    from matplotlib.ticker import LogLocator, NullLocator

    stages = [stage for stage in run.stages.values() if stage.at("tasks") or stage.at("perplexity")]
    lines: dict[str, dict[str, tuple[str, ...]]] = {
        "ROUGE-L F [%]": {task: ("tasks", task, "rouge-l") for task in run.names("tasks", TASKS)},
        "perplexity per token": {
            name.replace("_", " "): ("perplexity", name) for name in run.names("perplexity", PERPLEXITIES)
        },
    }
    parts = [(unit, keys) for unit, keys in lines.items() if keys]
    figure.set_size_inches(6 * len(parts), 4.4)
    for place, (unit, keys) in enumerate(parts, 1):
        axes, least = figure.add_subplot(1, len(parts), place, ylabel=unit), -1
        if "perplexity" in unit:
            least = 0
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_minor_locator(NullLocator())
        for color, (name, path) in zip(COLORS * len(keys), keys.items(), strict=False):
            values = [(x, stage.at(*path), stage.name) for x, stage in enumerate(stages)]
            known = [(x, y, who) for x, y, who in values if y is not None and least < y < math.inf]
            # Nothing is trained on from the text-only ablation, so the line passes it by.
            axes.plot(*split((x, y) for x, y, who in known if who != "cpt_text"), "o-", color=color, label=name)
            aside = split((x, y) for x, y, who in known if who == "cpt_text")
            axes.plot(*aside, "o", color=color, markerfacecolor="white")
        axes.set_xticks(range(len(stages)), [stage.label.replace(" ", "\n", 1) for stage in stages])
        axes.legend(loc="best")
    return bool(parts)


def _paint_experts(run: Run, figure: Figure) -> bool:
    """What mean gates exceed an equal share by, for each task, decoder layer and expert, and how alike experts are."""
    stages = [stage for stage in run.stages.values() if stage.at("layer_gates")]
    if not stages:
        return False
    panels: dict[str, Any] = {}
    for task, gates in stages[-1].at("layer_gates").items():
        by_layer: dict[int, list[list[float]]] = {}
        for name, weights in gates.items():
            by_layer.setdefault(layer_number(name), []).append(weights)
        rows = [mean_by_expert(found) for _, found in sorted(by_layer.items())]
        width = max(map(len, rows))  # Layers may have different numbers of experts.
        panels[task] = [[one - 1 / len(row) for one in row] + [math.nan] * (width - len(row)) for row in rows]
    reach = max(0.1, *(1.2 * abs(one) for rows in panels.values() for row in rows for one in row if one == one))
    panels |= {"similarity (cosine)": stages[-1].at("similarity")} if stages[-1].at("similarity") else {}
    figure.set_size_inches(3.2 * len(panels), 3.6)
    for place, (title, values) in enumerate(panels.items(), 1):
        axes, cosine = figure.add_subplot(1, len(panels), place, title=title), "cosine" in title
        low, high = (-1, 1) if cosine else (-reach, reach)
        image = axes.imshow(values, cmap="PuOr_r", vmin=low, vmax=high, aspect="auto")
        axes.set(xlabel="expert, universal first" if cosine else "expert", ylabel="" if cosine else "decoder layer")
        axes.set_xticks(range(len(values[0])), [str(number) for number in range(1, len(values[0]) + 1)])
        if cosine:
            axes.set_yticks(range(len(values)), [str(number) for number in range(1, len(values) + 1)])
        else:
            axes.locator_params("y", integer=True)
        axes.grid(False)
        figure.colorbar(image, ax=axes, ticks=[low, (low + high) / 2, high], format="%.2f")
    return True


def _paint_verdicts(run: Run, figure: Figure) -> bool:
    """Win, tie and loss of each pair of systems by task, as the paper draws them."""
    rows = [row for row in run.comparisons() if row["dimension"] == "overall"][::-1]
    figure.set_size_inches(8.5, 1.3 + 0.42 * len(rows))
    axes = figure.add_subplot(xlim=(0, 100), xlabel="share of questions [%]", title="Overall, of the first system")
    left = np.zeros(len(rows))
    for kind, color in (("win", COLORS[0]), ("tie", "#C9CFD6"), ("loss", COLORS[1])):
        shares = np.array([100 * row[kind][0] for row in rows])
        bars = axes.barh(range(len(rows)), shares, left=left, color=color, height=0.66, label=kind)
        axes.bar_label(
            bars,
            [f"{share:.0f}" if share >= 5 else "" for share in shares],
            label_type="center",
            color="white" if kind != "tie" else INK,
        )
        left += shares
    names = ["{by}: {first} against {second}, {task} ({n})".format(**row) for row in rows]
    axes.set_yticks(range(len(rows)), names)
    figure.legend(loc="outside lower center", ncols=3)
    return bool(rows)


def _paint_calibration(run: Run, figure: Figure) -> bool:
    """How often the chosen option is right, against its probability."""
    results = [(name, one) for exam in run.exams.values() for name, one in exam["likelihood"].items()]
    figure.set_size_inches(4.6, 4.2)
    axes = figure.add_subplot(title="Calibration on the exam", xlim=(0, 102), ylim=(0, 102))
    axes.set(xlabel="probability of the chosen option [%]", ylabel="right [%]")
    axes.plot([0, 100], [0, 100], color=FAINT, label="as often as said")
    for name, one in results:
        bins = one["calibration"]["bins"]
        x, y = ([100 * b[key] for b in bins] for key in ("confidence", "accuracy"))
        (line,) = axes.plot(x, y, label=f"{name}, ECE {one['calibration']['ece']:.1f} %")
        axes.scatter(x, y, s=[12 + 3 * b["questions"] ** 0.5 for b in bins], color=line.get_color())
    axes.legend(loc="upper left")
    return bool(results)


PLOTS: dict[str, tuple[str, str, Callable[[Run, Figure], bool]]] = {  # what it shows, and in which section
    "metrics_by_stage.png": (
        "ROUGE-L and perplexity after each stage; hollow is off the path",
        "stages",
        _paint_metrics,
    ),
    "experts.png": ("Mean gates above an equal share, and the experts' similarity", "gates", _paint_experts),
    "training.png": ("Losses, rewards and gates while training", "training", _paint_training),
    "calibration.png": ("Calibration on the exam", "exams", _paint_calibration),
    "verdicts.png": ("Win, tie and loss by judge and doctors", "verdicts", _paint_verdicts),
}
