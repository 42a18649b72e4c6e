"""The corpus card: what the corpus holds, where it came from, and what was left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pedgpt.corpus.assemble import Statistics
from pedgpt.files import __version__


def write_card(folder: Path, statistics: Statistics, manifest: Mapping[str, Any]) -> None:
    """Write README.md."""
    total = Counter[str]()
    for file in manifest["files"]:
        total[file["side"]] += file["rows"] if file["table"] != "tasks_sample" else 0
    columns = ["source", "kind", "licence", "rows read", "unusable", "rows built", "weight in stage 1"]
    sources = [
        [name, *(source[key] for key in ("kind", "licence", "read", "skipped", "built")),
         f"{source['epochs']:g} epochs" if source["epochs"] else f"{source['weight']:g}"]
        for name, source in manifest["sources"].items()
    ]  # fmt: skip
    dropped = [[name, *counted] for name, reasons in manifest["dropped"].items() for counted in reasons.items()]
    replaced = ", ".join(f"{kind} {count:,}" for kind, count in manifest["personal_data_replaced"].items())
    parts = [
        "# Corpus card",
        f"{total['train']:,} rows for training and {total['heldout']:,} held out, built by pedgpt {__version__} from"
        f" {len(sources)} sources. For research; nothing here was reviewed by clinicians unless its source"
        " says so, and it is no basis for advising anyone.",
        "## Rows by source and table",
        "Lengths are means in characters: of questions and answers in conversations and pairs (the preferred answer),"
        " of the whole text in running text. `tasks_sample` repeats rows of `tasks` for stage 2.",
        statistics_table(statistics),
        "## Sources",
        _table(columns, sources),
        "## Left out",
        "Each row is listed in reports/dropped.jsonl with its place and reason.",
        _table(["source", "reason", "rows"], dropped) if dropped else "Nothing.",
        "## Checks",
        f"- Personal data replaced: {replaced or 'none found'}\n"
        "- All rows about one disease, or with one question, lie on one side of the split.",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def statistics_table(statistics: Statistics) -> str:
    """Source × table × rows × mean lengths, as Markdown."""
    rows: list[list[str | int]] = []
    for (table, source), counted in sorted(statistics.items()):
        turns, asked, answered = (counted[name] / counted["rows"] for name in ("turns", "asked", "answered"))
        questions = [f"{turns:.1f}", f"{asked:,.0f}"] if turns else ["–", "–"]
        sides = counted["rows"] - counted["heldout"], counted["heldout"]
        rows.append([table, source, *sides, *questions, f"{answered:,.0f}"])
    return _table(["table", "source", "train", "held out", "turns", "question", "answer or text"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str | int]]) -> str:
    told = [[cell if isinstance(cell, str) else f"{cell:,}" for cell in row] for row in rows]
    numbers = [all(re.fullmatch(r"[\d,.]+|–", row[i]) for row in told) for i in range(len(header))]
    lines = [header, ["--:" if number else ":--" for number in numbers], *told]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
