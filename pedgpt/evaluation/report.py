"""From a run folder to one page: what each stage was meant to bring and brought, and how systems compare.

Writes report.md and its plots into the folder; without matplotlib (extra `plot`) the page has no plots and says so.
"""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import gt, le, lt
from pathlib import Path
from typing import Any

from pedgpt.data.tasks import TASKS
from pedgpt.evaluation.agreement import MEASURES, agreement, bootstrap
from pedgpt.evaluation.generation_metrics import METRICS
from pedgpt.evaluation.plots import PLOTS, draw
from pedgpt.evaluation.run import PERPLEXITIES, STAGE_LABELS, Run, Stage, ordered
from pedgpt.files import write_text

DISCLAIMER = "For research only: no medical advice, no substitute for a doctor. The sample corpus is synthetic."


def show(value: float | None, digits: int = 2) -> str:
    """A number for people, – if there is none."""
    return "–" if value is None else f"{value:,.{digits if abs(value) < 1000 else 0}f}"


def between(figures: Sequence[float | None] | None, scale: float = 1, digits: int = 1, unit: str = "") -> str:
    """A figure and its interval, as in 54.2 [48.9, 59.8]."""
    if figures is None or None in figures:
        return "–"
    value, low, high = (f"{scale * (figure or 0):,.{digits}f}" for figure in figures)
    return f"{value} [{low}, {high}]{unit}"


def plus_minus(stage: Stage, *keys: str, scale: float = 1, digits: int = 1) -> str:
    """A stage's number with half of its 95 % interval, where that is known."""
    value, figures = stage.at(*keys), stage.at("figures", *keys)
    if value is None or figures is None:
        return show(None if value is None else scale * value, digits)
    digits = digits if abs(value) < 1000 else 0
    return f"{show(scale * value, digits)} ± {show(scale * (figures[2] - figures[1]) / 2, digits)}"


def escape(text: str) -> str:
    """A text that Markdown shows as it is."""
    return re.sub(r"([\\`*_#~|<>\[\]]|&(?=#?\w+;))", r"\\\1", text)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its header, the first column stands on the left."""
    header, *body = ([escape(cell).replace("\n", "<br>") for cell in row] for row in rows)
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *body))


@dataclass
class Check:
    """One expectation: passed is None if it wasn't measured."""

    label: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{'–' if self.passed is None else '✓' if self.passed else '✗'} {self.label}: {self.detail}"


_ROUGE = tuple(f"tasks/{task}/rouge-l" for task in TASKS)
# (what is expected, the stage before, the stage after, what is measured, whether two numbers keep it)
_EXPECTED: tuple[tuple[str, str, str, tuple[str, ...], Callable[[float, float], bool]], ...] = (
    ("Hybrid CPT lowers the perplexity of pediatric text", "base", "cpt", ("perplexity/pediatric_text",), gt),
    (
        "The hybrid mixture reads instructions better than text alone (perplexity)",
        "cpt_text", "cpt", ("perplexity/instructions",), gt,
    ),
    ("SFT raises ROUGE-L on all three tasks", "cpt", "sft", _ROUGE, lt),
    (
        "DFPO doesn't lower the log-probability of chosen answers (nats per token)",
        "sft", "dfpo", ("preference/chosen_logp_per_token",), le,
    ),
    ("Experts raise ROUGE-L on all three tasks", "dfpo", "experts", _ROUGE, lt),
    (
        "Experts cost general medicine less than 2 % in perplexity",
        "dfpo", "experts", ("perplexity/general_medical_text",), lambda before, after: after < 1.02 * before,
    ),
)  # fmt: skip


def expectations(run: Run) -> list[Check]:
    """What the stages should bring, each held against the measured numbers, whichever way they came out."""
    checks = [_compared(run, *expected) for expected in _EXPECTED]
    accuracy, pairs = (run.number("dfpo", "preference", key) for key in ("reward_accuracy", "pairs"))
    known = accuracy is not None
    measured = f"{100 * accuracy:.1f} % of {pairs} pairs" if known else "not measured (reward accuracy, dfpo)"
    preferred = "Rewards after DFPO prefer the chosen answer in at least 80 % of pairs"
    checks.insert(3, Check(preferred, accuracy >= 0.8 if known else None, measured))
    return checks


def _compared(
    run: Run, label: str, before: str, after: str, what: Sequence[str], holds: Callable[[float, float], bool]
) -> Check:
    parts, results = [], []
    for path in what:
        keys = path.split("/")
        name = keys[1].replace("_", " ")
        old, new = run.number(before, *keys), run.number(after, *keys)
        if old is None or new is None:
            return Check(label, None, f"not measured ({name}, {before if old is None else after})")
        ratio = keys[0] == "perplexity"
        change, found = f"{new / old - 1:+.1%}" if ratio else f"{new - old:+.2f}", run.difference(before, after, *keys)
        passed: bool | None = holds(old, new)
        if found:
            low, high = (f"{end - 1:+.1%}" if ratio else f"{end:+.2f}" for end in found[1:])
            change += f" [{low}, {high}]"
            if holds in (gt, lt) and found[1] <= ratio <= found[2]:
                passed, change = None, f"{change}: no difference beyond chance"
        parts.append(f"{name} {show(old)} → {show(new)} ({change})")
        results.append(passed)
    return Check(label, False if False in results else None if None in results else True, ", ".join(parts))


def stage_rows(run: Run) -> list[list[str]]:
    """The table of all stages and other systems, header first; what was measured of none has no column."""
    columns: dict[str, tuple[tuple[str, ...], float, int]] = {  # heading -> where it stands, its scale and digits
        f"ROUGE-L\n{task}": (("tasks", task, "rouge-l"), 1, 1) for task in run.names("tasks", TASKS)
    }
    for name in run.names("perplexity", PERPLEXITIES):
        heading = "\n".join(["perplexity", *textwrap.wrap(name.replace("_", " "), 12)])
        columns[heading] = ("perplexity", name), 1, 1
    for kind in ("reward", "likelihood"):
        columns[f"preferred\nby {kind} [%]"] = ("preference", f"{kind}_accuracy"), 100, 1
    columns["chosen\nlog-prob\nper token"] = ("preference", "chosen_logp_per_token"), 1, 3
    stages = run.stages.values()
    columns = {name: one for name, one in columns.items() if any(stage.at(*one[0]) is not None for stage in stages)}
    rows = [["stage", *columns]]
    for stage in stages:
        cells = [plus_minus(stage, *keys, scale=scale, digits=digits) for keys, scale, digits in columns.values()]
        rows.append([stage.label, *cells])
    return rows


def write_report(run: Run) -> Path:
    """Write `report.md` and its plots into the run's folder and return the page's path."""
    drawn = draw(run)
    page = [f"# Run report: {escape(run.folder.resolve().name)}", f"*{DISCLAIMER}*"]
    page += ['No plots: matplotlib is missing, `pip install -e ".[plot]"` brings it.'] if drawn is None else []
    for section in (_stages, _scores, _differences, _gates, _training, _exams, _verdicts, _doctors):
        page += section(run)
        plots = {name: plot for name, plot in PLOTS.items() if name in (drawn or ())}
        page += [f"![{alt}]({name})" for name, (alt, where, _) in plots.items() if where == section.__name__[1:]]
    path = run.folder / "report.md"
    write_text(path, "\n\n".join(page) + "\n")
    return path


def _stages(run: Run) -> list[str]:
    """What each stage was meant to bring, and brought."""
    if not run.stages:
        return []
    sizes = max((stage.at("tokens") or {} for stage in run.stages.values()), key=len)
    measured = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in sizes.items())
    page = [
        "## Stage by stage",
        markdown_table(stage_rows(run)),
        "± is half of a 95 % interval over questions, documents or pairs. ROUGE-L × 100, higher is better; perplexity "
        "per token, lower is better; log-probability in nats. Preference: "
        "share of pairs the chosen answer wins, by *reward* against the reference model or by *likelihood* per token.",
        *([f"Tokens that the perplexities were measured on: {measured}."] if measured else []),
    ]
    if run.stages.keys() & STAGE_LABELS.keys():
        checks = expectations(run)
        tally = [sum(check.passed is outcome for check in checks) for outcome in (True, False, None)]
        page += [
            "## What to expect, and what came out",
            f"{tally[0]} of {len(checks)} expectations met, {tally[1]} missed, {tally[2]} not measured or within "
            "chance. Brackets hold 95 % intervals of differences on the same questions; one that holds no change shows "
            "none.",
            "\n".join(f"- {escape(str(check))}" for check in checks),
        ]
    return page


def _scores(run: Run) -> list[str]:
    evaluated = [stage for stage in run.stages.values() if stage.at("tasks")]
    signatures = dict.fromkeys(f"`{stage.at('signature') or 'unsigned'}`" for stage in evaluated)
    page = ["## Every score", f"Per answer, then averaged, × 100, by {', '.join(signatures)}."] if evaluated else []
    if len(signatures) > 1:
        page.append("**The stages were scored under different signatures: don't compare across them.**")
    for task in run.names("tasks", TASKS):
        stages = [stage for stage in evaluated if stage.at("tasks", task)]
        scores = [name for name in METRICS if any(stage.at("tasks", task, name) is not None for stage in stages)]
        rows = [["stage", "rows", "empty", *scores]]
        for stage in stages:
            counts = [show(stage.at("tasks", task, name), 0) for name in ("rows", "empty")]
            rows.append([stage.label, *counts, *(plus_minus(stage, "tasks", task, one, digits=2) for one in scores)])
        page += [f"### {escape(task or 'all')}", markdown_table(rows)]
    return page


def _gates(run: Run) -> list[str]:
    page: list[str] = []
    for stage in run.stages.values():
        if gates := stage.at("gates"):
            experts = len(next(iter(gates.values())))
            rows = [["task", *(f"expert {number}" for number in range(1, experts + 1)), "entropy"]]
            for task in ordered(gates, TASKS):
                rows.append([task, *(show(share, 3) for share in (*gates[task], stage.at("gate_entropy", task)))])
            about = (
                f"Mean weight of each specific expert, {1 / experts:.3f} is an equal share; mean entropy of a token's "
                f"gates in nats, {math.log(experts):.3f} where it asks all experts alike."
            )
            page += [about, markdown_table(rows)]
            page += ["\n".join(f"- {escape(line)}" for line in stage.at("unused_experts") or ())]
            page += [f"Token by token: [evaluation/{stage.name}.html](evaluation/{stage.name}.html)."]
    return ["## Which expert answers what", *page] if page else []


def _training(run: Run) -> list[str]:
    rows = [["stage", "steps", "tokens", "median tokens/s", "training, s", "evaluation, s"]]
    for stage in run.stages.values():
        if stage.metrics:
            last = [max(stage.series(key)[1], default=None) for key in ("step", "tokens", "seconds")]
            speed = statistics.median(stage.series("tokens_per_second")[1] or [math.nan])
            counts = [show(value, 0) for value in (*last[:2], speed)]
            rows.append([stage.label, *counts, *(show(value, 1) for value in (last[2], stage.at("seconds")))])
    return ["## Training", markdown_table(rows)] if len(rows) > 1 else []


def _differences(run: Run) -> list[str]:
    """Each system that is no stage against every other one, on the same questions."""
    lines = []
    for one, two in combinations(run.stages, 2):
        for task in run.names("tasks", TASKS) if {one, two} - STAGE_LABELS.keys() else ():
            if figures := run.difference(two, one, "tasks", task, "rouge-l"):
                one_talk = len({*run.number(one, "values", "conversations", task)}) < 2  # its interval has no width
                told = ": no difference beyond chance" if one_talk or figures[1] <= 0 <= figures[2] else ""
                about = f"- ROUGE-L on {escape(task or 'all')}, {escape(one)} − {escape(two)}: "
                lines.append(f"{about}{between(figures)}{told}")
    return ["On the same questions:", "\n".join(lines)] if lines else []


def _exams(run: Run) -> list[str]:
    page: list[str] = []
    for name, exam in run.exams.items():
        rows, unread = [["system", "answered by", "kind", "score, % of points", "questions", "guessing"]], []
        for way in ("likelihood", "generated"):
            for system, result in exam[way].items():
                kinds = {kind.replace("_", " "): one for kind, one in result["kinds"].items()}
                kinds |= {"choice, other letters": result["rotated"]} if "rotated" in result else {}
                for kind, one in kinds.items():
                    counts = [str(one["questions"]), show(one["chance"], 1)]
                    rows.append([system, way, kind, between(one["score"]), *counts])
                if result.get("total"):
                    rows.append([system, way, "total of PediaBench", between(result["total"]), "–", "–"])
                if result.get("unread"):
                    unread.append(f"- {escape(system)}: {len(result['unread'])} answers could not be read or graded.")
        page += [f"## Exam: {escape(name)}", markdown_table(rows), *unread]
        if "in_corpus" in exam:
            page.append(f"{len(exam['in_corpus'])} of its {exam['questions']} questions stand in the training corpus.")
    return page


def _verdicts(run: Run) -> list[str]:
    rows = [["judged by", "systems", "task", "aspect", "questions", "win, %", "tie, %", "loss, %"]]
    for row in run.comparisons():
        shares = [between(row[kind], 100, 0) for kind in ("win", "tie", "loss")]
        who = [row["by"], f"{row['first']} : {row['second']}", row["task"], row["dimension"]]
        rows.append([*who, str(row["n"]), *shares])
    page = ["## Compared by judge and doctors", markdown_table(rows)] if len(rows) > 1 else []
    for result in run.judge.values():
        judge = escape(result["judge"])
        for pair in [pair for pair in result.get("pairs", ()) if pair["n"]]:
            habits = ("shown_first", "longer", "win_rate", "length_controlled")
            first, longer, wins, equal = (between(pair[name], 100, unit=" %") for name in habits)
            page.append(
                f"{judge}, {escape(pair['first'])} against {escape(pair['second'])}: {show(100 * pair['flips'], 1)} % "
                f"of the pairs change with the order. Of its decisions, {first} prefer the answer shown first and "
                f"{longer} the longer one. A tie as half a win, the first system wins {wins}, and {equal} if both "
                "answers are equally long."
            )
        page += _strengths(f"by {judge}", result.get("bradley_terry", {}))
        for system, scores in result.get("scores", {}).items():
            told = ", ".join(f"{escape(task)} {between(figures, digits=2)}" for task, figures in scores.items())
            page.append(f"- {judge} gives {escape(system)} of {result['points']} points: {told}")
        page += [f"**{escape(warning)}**" for warning in result.get("warnings", ())]
        if planted := result.get("found_planted"):
            found_right = f"{between(planted['right'], 100, unit=' %')} of the right references"
            unreadable = f"{planted['unreadable']} without a readable verdict"
            page.append(f"In {planted['pairs']} planted pairs, {unreadable}, the judge found {found_right}.")
    return page


def _strengths(by: str, found: Mapping[str, Sequence[float]]) -> list[str]:
    listed = ", ".join(f"{escape(system)} {between(one, digits=2)}" for system, one in found.items())
    return [f"Bradley-Terry strengths {by}: {listed}."] if found else []


def _doctors(run: Run) -> list[str]:
    page = []
    for result in run.doctors.values():
        rows = [["task", "aspect", "questions", "raw", "Cohen κ", "Fleiss κ", "Krippendorff α"]]
        for row in result["agreement"]:
            figures = [between(row[name], digits=2) for name in MEASURES]
            rows.append([row["task"], row["dimension"], str(row["n"]), *figures])
        page += ["### Agreement of the doctors", markdown_table(rows)]
        for name, strengths in result.get("strengths", {}).items():
            page += _strengths(f"by the doctors' majority, {name}", strengths)
        unsafe = [
            f"- question {row['number']}, {escape(row['system'])}, by {', '.join(row['raters'])}"
            for row in result["unsafe"]
        ]
        page += ["Answers that a doctor calls unsafe:", "\n".join(unsafe)] if unsafe else []
        for judge in run.judge.values():
            page += _judge_against(judge, result)
    return page


def _judge_against(judge: Mapping[str, Any], doctors: Mapping[str, Any]) -> list[str]:
    """Agreement of a judge with the doctors' majority, overall, on the questions that both compared."""
    overall = {row["number"]: row["majority"] for row in doctors["votes"] if row["dimension"] == "overall"}
    lines = []
    for pair in judge.get("pairs", ()) if judge.get("question_set") == doctors.get("question_set") else ():
        names = [pair["first"], pair["second"], "tie"]
        rows = [row for row in judge["verdicts"] if row["systems"] == names[:2]]
        both = [(row["verdict"]["overall"], overall.get(row["number"])) for row in rows]
        codes = [[names.index(one), names.index(other)] for one, other in both if other in names]
        # Doctors who compared one of the two with another system say nothing of this pair.
        if codes and {*names[:2]} <= {*doctors["systems"]}:
            raw, kappa, *_ = bootstrap(codes, statistic=agreement)
            lines.append(
                f"{escape(judge['judge'])} and the doctors' majority agree on {between(raw, 100, unit=' %')} of "
                f"{len(codes)} questions ({escape(' : '.join(names[:2]))}), κ {between(kappa, digits=2)}."
            )
    return lines
