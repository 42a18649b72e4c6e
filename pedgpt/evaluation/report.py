"""From a run folder to one page: what each stage was meant to bring, and what it brought.

Writes report.md and its plots into the folder; without matplotlib (extra `plot`) the page has no plots and says so.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import gt, le, lt
from pathlib import Path

from pedgpt.data.tasks import TASKS
from pedgpt.evaluation.findings import (
    escape,
    load_findings,
    markdown_table,
    percent,
    plus_minus,
    sections,
    show,
)
from pedgpt.evaluation.plots import PLOTS, draw
from pedgpt.evaluation.run import PERPLEXITIES, STAGE_LABELS, Run, ordered
from pedgpt.files import write_text

COUNTS = ("rows", "empty")
SCORES = (*COUNTS, *(f"rouge-{n}" for n in "12l"), *(f"bleu-{n}" for n in "1234"), "gleu", "distinct-1", "distinct-2")
PRICES = {  # measure -> whether higher is better
    "perplexity/pediatric_text": False,
    "perplexity/general_text": False,
    "preference/reward_accuracy": True,
    "preference/chosen_logp_per_token": True,
}
SAMPLE_KEYS = ("task", "question", "reference", "answer")
DISCLAIMER = "For research only: no medical advice, no substitute for a doctor. The sample corpus is synthetic."


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
    measured = f"{percent(accuracy)}{f' of {pairs:.0f} pairs' if pairs else ''}"
    measured = "not measured (reward accuracy, dfpo)" if accuracy is None else measured
    preferred = "Rewards after DFPO prefer the chosen answer in at least 80 % of pairs"
    checks.insert(3, Check(preferred, None if accuracy is None else accuracy >= 0.8, measured))
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
        ratio = keys[0] == "perplexity" and old
        change, found = f"{new / old - 1:+.1%}" if ratio else f"{new - old:+.2f}", run.difference(before, after, *keys)
        passed: bool | None = holds(old, new)
        if found:
            low, high = (f"{end - 1:+.1%}" if ratio else f"{end:+.2f}" for end in found[1:])
            change += f" [{low}, {high}]"
            if holds in (gt, lt) and found[1] <= (1 if ratio else 0) <= found[2]:
                passed, change = None, f"{change}: no difference beyond chance"
        parts.append(f"{name} {show(old)} → {show(new)} ({change})")
        results.append(passed)
    return Check(label, False if False in results else None if None in results else True, ", ".join(parts))


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


def write_report(run: Run) -> Path:
    """Write `report.md` and its plots into the run's folder and return the page's path."""
    scored = {name for name, stage in run.stages.items() if stage.evaluation["tasks"]}
    findings = load_findings(run.folder, scored)
    plots = draw(run, findings)
    shown = {name: [f"![{alt}]({name})"] for name, (alt, _) in PLOTS.items() if plots and name in plots}
    page = [
        f"# Run report: {escape(run.folder.resolve().name)}",
        f"*{DISCLAIMER}*",
        *([] if plots is not None else ['No plots: matplotlib is missing, `pip install -e ".[plot]"` brings it.']),
        *(_stage_sections(run, shown) if run.stages else []),
        *sections(findings, shown),
        *_sample_section(run),
    ]
    path = run.folder / "report.md"
    write_text(path, "\n\n".join(page) + "\n")
    return path


def _stage_sections(run: Run, shown: Mapping[str, list[str]]) -> list[str]:
    """What each stage was meant to bring, and brought."""
    checks = expectations(run)
    counted: list[dict[str, int]] = [stage.evaluation.get("tokens", {}) for stage in run.stages.values()]
    sizes = max(counted, key=len)
    measured = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in sizes.items())
    tally = [sum(check.passed is outcome for check in checks) for outcome in (True, False, None)]
    return [
        "## Stage by stage",
        markdown_table(_stage_rows(run)),
        "± is half of a 95 % interval over questions, documents or pairs. ROUGE-L × 100, higher is better; perplexity "
        "per token, lower is better; log-probability in nats. Preference: "
        "share of pairs the chosen answer wins, by *reward* against the reference model or by *likelihood* per token.",
        *([f"Tokens that the perplexities were measured on: {measured}."] if measured else []),
        *shown.get("metrics_by_stage.png", []),
        "## What to expect, and what came out",
        f"{tally[0]} of {len(checks)} expectations met, {tally[1]} missed, {tally[2]} not measured or within chance. "
        "Brackets hold 95 % intervals of differences on the same questions; one that holds no change shows none.",
        "\n".join(f"- {escape(str(check))}" for check in checks),
        *_price_section(run),
        *_task_section(run),
        *_gate_section(run),
        *shown.get("expert_weights.png", []),
        *shown.get("routing.png", []),
        *_training_section(run),
        *shown.get("loss_by_stage.png", []),
        *shown.get("dfpo.png", []),
    ]


def _stage_rows(run: Run) -> list[list[str]]:
    tasks, texts = run.names("tasks", TASKS), run.names("perplexity", PERPLEXITIES)
    heads = ["stage", *(f"ROUGE-L\n{task}" for task in tasks)]
    heads += ["\n".join(["perplexity", *textwrap.wrap(name.replace("_", " "), 12)]) for name in texts]
    rows = [heads + ["preferred\nby reward [%]", "preferred\nby likelihood [%]", "chosen\nlog-prob\nper token"]]
    for stage in run.stages.values():
        scores = [plus_minus(stage, "tasks", task, "rouge-l") for task in tasks]
        scores += [plus_minus(stage, "perplexity", name) for name in texts]
        kinds = [plus_minus(stage, "preference", f"{kind}_accuracy", scale=100) for kind in ("reward", "likelihood")]
        rows.append([stage.label, *scores, *kinds, plus_minus(stage, "preference", "chosen_logp_per_token", digits=3)])
    return rows


def _price_section(run: Run) -> list[str]:
    """Measures that no stage aims at: the best that any stage reached, and where the run ended."""
    lines = []
    for path, higher_is_better in PRICES.items():
        keys = path.split("/")
        values = {stage.label: stage.number(*keys) for stage in run.stages.values()}
        known = {label: value for label, value in values.items() if value is not None}
        if len(known) > 1:
            best = (max if higher_is_better else min)(known, key=known.__getitem__)
            last, name = list(known)[-1], keys[-1].replace("_", " ")
            lines.append(f"- {name}: best {show(known[best], 3)} after {best}, {show(known[last], 3)} after {last}")
    return ["What later stages took away again:", "\n".join(lines)] if lines else []


def _task_section(run: Run) -> list[str]:
    evaluated = [stage for stage in run.stages.values() if stage.evaluation["tasks"]]
    if not evaluated:
        return []
    signatures: dict[str, list[str]] = {}
    for stage in evaluated:
        signatures.setdefault(str(stage.evaluation.get("signature") or "unsigned"), []).append(stage.label)
    page = ["## Every score", "Per answer, then averaged, × 100. Scores compare only under the same signature:"]
    if len(signatures) == 1:
        page.append(f"`{next(iter(signatures))}`")
    else:
        page.append("\n".join(f"- `{signature}`: {'; '.join(labels)}" for signature, labels in signatures.items()))
        page.append("**The stages were scored under different signatures: don't compare across them.**")
    for task in run.names("tasks", TASKS):
        stages = [stage for stage in evaluated if task in stage.evaluation["tasks"]]
        known = (name for stage in stages for name in stage.evaluation["tasks"][task] if name != "question_set")
        scores = ordered(known, SCORES)
        rows = [["stage", *scores]]
        for stage in stages:
            counts = [show(stage.number("tasks", task, name), 0) for name in scores if name in COUNTS]
            measured = [plus_minus(stage, "tasks", task, name, digits=2) for name in scores if name not in COUNTS]
            rows.append([stage.label, *counts, *measured])
        page += [f"### {escape(task)}", markdown_table(rows)]
    return page


def _gate_section(run: Run) -> list[str]:
    page: list[str] = []
    for stage in run.stages.values():
        if gates := stage.evaluation["gates"]:
            experts = len(next(iter(gates.values())))
            rows = [["task", *(f"expert {number}" for number in range(1, experts + 1)), "entropy"]]
            for task in ordered(gates, TASKS):
                entropy = stage.number("gate_entropy", task)
                rows.append([task, *(show(weight, 3) for weight in gates[task]), show(entropy, 3)])
            page += [
                f"Mean weight of each specific expert, {1 / max(experts, 1):.3f} is an equal share; mean entropy of a "
                f"token's gates in nats, {math.log(max(experts, 1)):.3f} where it asks all experts alike."
            ]
            page += [markdown_table(rows)]
    return ["## Which expert answers what", *page] if page else []


def _training_section(run: Run) -> list[str]:
    rows = [["stage", "steps", "tokens", "median tokens/s", "training, s", "evaluation, s"]]
    for stage in run.stages.values():
        last = {key: next(reversed(stage.series(key)[1]), None) for key in ("step", "tokens", "seconds")}
        speeds = stage.series("tokens_per_second")[1]
        counts = (last["step"], last["tokens"], statistics.median(speeds) if speeds else None)
        times = (last["seconds"], stage.number("seconds"))
        rows.append([stage.label, *(show(value, 0) for value in counts), *(show(value, 1) for value in times)])
    return ["## Training", markdown_table(rows)]


def _sample_section(run: Run, per_task: int = 3, characters: int = 800) -> list[str]:
    found: dict[str, dict[str, dict[str, str]]] = {}  # task -> question -> who -> text
    for name in ("sft", "experts"):
        for row in run.stages[name].evaluation["samples"] if name in run.stages else []:
            task, question, reference, answer = (str(row.get(key) or "") for key in SAMPLE_KEYS)
            found.setdefault(task, {}).setdefault(question, {"reference": reference})[STAGE_LABELS[name]] = answer
    page = ["## Answers side by side"] if found else []
    for task in ordered(found, TASKS):
        page.append(f"### {escape(task)}")
        # Questions that both stages answered come first.
        for question, voices in sorted(found[task].items(), key=lambda item: -len(item[1]))[:per_task]:
            page.append("\n".join(f"> {escape(line)}  " for line in question.splitlines()))
            answers = []
            for who, text in voices.items():
                short = text.strip() if len(text) <= characters else text.strip()[:characters] + " …"
                answers.append(f"- **{who}**: " + ("<br>".join(map(escape, short.splitlines())) or "*(empty)*"))
            page.append("\n".join(answers))
    return page
