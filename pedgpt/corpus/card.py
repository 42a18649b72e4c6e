"""The corpus card: what the corpus holds, where it came from, and what was left out."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pedgpt import __version__
from pedgpt.corpus.assemble import Corpus

STAGES = {1: "continued pre-training", 2: "full fine-tuning", 3: "DFPO", 4: "experts"}


def write_card(corpus: Corpus, manifest: Mapping[str, Any]) -> None:
    """Write README.md, with plots if matplotlib is there."""
    plots = _plots(corpus)
    stage_rows: Counter[int] = Counter()
    for file in corpus.files:
        for stage in file["stages"] if file["side"] == "train" else ():
            stage_rows[stage] += file["rows"]
    total = {side: sum(f["rows"] for f in corpus.files if f["side"] == side and f["table"] != "tasks_sample")
             for side in ("train", "heldout")}  # fmt: skip
    parts = [
        "# Corpus card",
        f"{total['train']:,} rows for training and {total['heldout']:,} held out, built by pedgpt {__version__} from"
        f" {len(manifest['sources'])} sources. For research; nothing here was reviewed by clinicians unless its source"
        " says so, and it is no basis for advising anyone.",
        "## Rows by source and table",
        "Lengths are means in characters: of questions and answers in conversations and pairs (the preferred answer),"
        " of the whole text in running text. `tasks_sample` repeats rows of `tasks` for stage 2.",
        statistics_table(corpus),
        "## Rows by stage",
        _table(["stage", "training rows"], [[f"{n} {STAGES[n]}", f"{stage_rows[n]:,}"] for n in STAGES]),
        "## Sources",
        _table(
            ["source", "kind", "licence", "rows read", "unusable", "rows built", "weight in stage 1"],
            [
                [name, s["kind"], s["licence"], f"{s['read']:,}", f"{s['skipped']:,}", f"{s['built']:,}",
                 f"{s['epochs']:g} epochs" if s["epochs"] else f"{s['weight']:g}"]
                for name, s in manifest["sources"].items()
            ],
        ),
        "## Left out",
        "Each row is listed in reports/dropped.jsonl with its place and reason.",
        _table(
            ["source", "reason", "rows"],
            [[name, reason, f"{count:,}"] for name, reasons in manifest["dropped"].items()
             for reason, count in reasons.items()],
        )
        if manifest["dropped"]
        else "Nothing.",
        "## Checks",
        "- Personal data replaced: "
        + (", ".join(f"{kind} {count:,}" for kind, count in manifest["personal_data_replaced"].items()) or "none found")
        + "\n- Questions that were answered in different ways: "
        + f"{manifest['contradictory_questions']:,} (reports/contradictions.jsonl)\n"
        + "- All rows about one disease, or with one question, lie on one side of the split.",
        *plots,
    ]  # fmt: skip
    (corpus.folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def statistics_table(corpus: Corpus) -> str:
    """Source × table × rows × mean lengths, as Markdown."""
    rows = []
    for (table, source), counted in sorted(corpus.statistics.items()):
        turns = f"{counted.turns / counted.rows:.1f}" if counted.turns else "–"
        asked = f"{counted.asked / counted.rows:,.0f}" if counted.turns else "–"
        train, heldout = counted.rows - counted.heldout, counted.heldout
        rows.append(
            [table, source, f"{train:,}", f"{heldout:,}", turns, asked, f"{counted.answered / counted.rows:,.0f}"]
        )
    return _table(["table", "source", "train", "held out", "turns", "question", "answer or text"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numbers = [all(re.fullmatch(r"[\d,.]+|–", row[i]) for row in rows) for i in range(len(header))]
    lines = [header, ["--:" if number else ":--" for number in numbers], *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _plots(corpus: Corpus) -> list[str]:
    """Topics and lengths as SVG: text stays text in it, so that Chinese names need no font here."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return ['No plots: matplotlib is missing (pip install -e ".[plot]").']
    # In a name that a row gave: nothing that XML cannot hold, and not too much.
    named = [("".join(filter(str.isprintable, name))[:40], count) for name, count in corpus.topics.items() if name]
    shown = sorted(named, key=lambda item: (-item[1], item[0]))[:30]
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "pedgpt", "font.size": 9, "text.parse_math": False}
    (corpus.folder / "reports").mkdir(exist_ok=True)
    with warnings.catch_warnings(), rc_context(settings):
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        if shown:
            figure = Figure(figsize=(8, 0.6 + 0.2 * len(shown)), layout="constrained")
            axes = figure.subplots()
            axes.barh([name for name, _ in shown][::-1], [count for _, count in shown][::-1], color="#2F6DB5")
            axes.margins(y=0.01)
            axes.set_xlabel(
                f"rows; {corpus.topics['']:,} more name no topic, {max(0, len(named) - len(shown))} topics not shown"
            )
            axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(corpus.folder / "reports" / "topics.svg", metadata={"Date": None})
        tables = sorted(corpus.lengths)[::-1]
        bins = sorted(set().union(*corpus.lengths.values()))
        bins = list(range(bins[0], bins[-1] + 1)) if bins else [0]
        shares = [[100 * corpus.lengths[t][b] / corpus.lengths[t].total() for b in bins] for t in tables]
        figure = Figure(figsize=(8, 0.8 + 0.3 * len(tables)), layout="constrained")
        axes = figure.subplots()
        if shares:
            axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=100)
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if share >= 1:
                    color = "white" if share > 60 else "black"
                    axes.text(x + 0.5, y + 0.5, f"{share:.0f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_yticks([y + 0.5 for y in range(len(tables))], tables)
        axes.set_xticks(range(len(bins)), [f"{2 ** (b / 2):,.0f}" for b in bins])
        axes.set_xlabel("characters a row, from; numbers are % of the table's rows")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.savefig(corpus.folder / "reports" / "lengths.svg", metadata={"Date": None})
    parts = ["## Topics", "![rows by disease or department](reports/topics.svg)"] if shown else []
    return [*parts, "## Lengths", "![lengths of rows by table](reports/lengths.svg)"]
