"""metrics.jsonl: one JSON object per optimizer step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to a file of one JSON line per step; on resuming, lines after the checkpoint's step are dropped."""

    def __init__(self, path: Path, after_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line that a killed run was writing
                if record["step"] > after_step:
                    break
                kept.append(record)
        self.last = kept[-1] if kept else None
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(temporary, path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one step."""
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")

    def totals(self) -> tuple[int, float]:
        """(tokens, seconds) spent so far."""
        return (self.last["tokens"], self.last["seconds"]) if self.last else (0, 0.0)
