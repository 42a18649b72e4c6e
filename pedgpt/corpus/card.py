"""The corpus card: what the corpus holds, where it came from, and what was left out."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from pedgpt.corpus.assemble import Corpus
from pedgpt.files import __version__

STAGES = {1: "continued pre-training", 2: "full fine-tuning", 3: "DFPO", 4: "experts"}


def write_card(corpus: Corpus, manifest: Mapping[str, Any]) -> None:
    """Write README.md, with plots if matplotlib is there."""
    total, stage_rows = Counter[str](), Counter[int]()
    for file in corpus.files:
        total[file["side"]] += file["rows"] if file["table"] != "tasks_sample" else 0
        stage_rows.update({stage: file["rows"] for stage in file["stages"] if file["side"] == "train"})
    sources = [
        [name, s["kind"], s["licence"], s["read"], s["skipped"], s["built"],
         f"{s['epochs']:g} epochs" if s["epochs"] else f"{s['weight']:g}"]
        for name, s in manifest["sources"].items()
    ]  # fmt: skip
    dropped = [[name, *counted] for name, reasons in manifest["dropped"].items() for counted in reasons.items()]
    replaced = ", ".join(f"{kind} {count:,}" for kind, count in manifest["personal_data_replaced"].items())
    columns = ["source", "kind", "licence", "rows read", "unusable", "rows built", "weight in stage 1"]
    parts = [
        "# Corpus card",
        f"{total['train']:,} rows for training and {total['heldout']:,} held out, built by pedgpt {__version__} from"
        f" {len(sources)} sources. For research; nothing here was reviewed by clinicians unless its source"
        " says so, and it is no basis for advising anyone.",
        "## Rows by source and table",
        "Lengths are means in characters: of questions and answers in conversations and pairs (the preferred answer),"
        " of the whole text in running text. `tasks_sample` repeats rows of `tasks` for stage 2.",
        statistics_table(corpus),
        "## Rows by stage",
        _table(["stage", "training rows"], [[f"{n} {name}", stage_rows[n]] for n, name in STAGES.items()]),
        "## Sources",
        _table(columns, sources),
        "## Left out",
        "Each row is listed in reports/dropped.jsonl with its place and reason.",
        _table(["source", "reason", "rows"], dropped) if dropped else "Nothing.",
        "## Checks",
        f"- Personal data replaced: {replaced or 'none found'}\n"
        f"- Questions that were answered in different ways: {corpus.contradictions:,} (reports/contradictions.jsonl)\n"
        "- All rows about one disease, or with one question, lie on one side of the split.",
        *_plots(corpus),
    ]
    (corpus.folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def statistics_table(corpus: Corpus) -> str:
    """Source × table × rows × mean lengths, as Markdown."""
    rows = []
    for (table, source), counted in sorted(corpus.statistics.items()):
        asked = [f"{counted.turns / counted.rows:.1f}", f"{counted.asked / counted.rows:,.0f}"]
        sides, answered = [counted.rows - counted.heldout, counted.heldout], f"{counted.answered / counted.rows:,.0f}"
        rows.append([table, source, *sides, *(asked if counted.turns else "––"), answered])
    return _table(["table", "source", "train", "held out", "turns", "question", "answer or text"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str | int]]) -> str:
    told = [[cell if isinstance(cell, str) else f"{cell:,}" for cell in row] for row in rows]
    numbers = [all(re.fullmatch(r"[\d,.]+|–", row[i]) for row in told) for i in range(len(header))]
    lines = [header, ["--:" if number else ":--" for number in numbers], *told]
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
        for y, x in product(range(len(tables)), range(len(bins))):
            if (share := shares[y][x]) >= 1:
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
