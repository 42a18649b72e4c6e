"""The held-out data of a corpus, read and packed for an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pedgpt import data
from pedgpt.data import ChatFormat, Conversation, EncodedPair, ReadSummary
from pedgpt.data.packing import Row
from pedgpt.data.tasks import TASKS
from pedgpt.evaluation.responses import thin


def read_heldout(
    heldout: Path, chat: ChatFormat, summary: ReadSummary, columns: Mapping[str, str], *, row_length: int,
    text_limit: int,
) -> tuple[dict[str, list[Conversation]], dict[str, list[Row]], dict[str, list[Row]], list[EncodedPair]]:  # fmt: skip
    """Conversations by task, their packed rows, packed rows by perplexity, and pairs; at most `text_limit` documents.

    What is too long for a row is left out everywhere, and counted in `summary` beside the bad rows. Raises ValueError
    if nothing is left.
    """
    policy = {"on_bad_row": "skip", "summary": summary}
    fit = {**policy, "on_long_row": "skip"}
    tasks, task_rows, pairs = {}, {}, list[EncodedPair]()
    for name, folder in TASKS.items():
        for path in _table(heldout / folder):
            conversations = data.read_conversations(path, columns=columns, **policy)
            examples = data.encode_conversations(conversations, chat, row_length, **fit)
            fitting = {example.source for example in examples}
            tasks[name] = [conversation for conversation in conversations if conversation.source in fitting]
            task_rows[name] = data.pack(examples, row_length)
    rows = {"instructions": [row for packed in task_rows.values() for row in packed]}
    ends: dict[str, Any] = {"eos_id": chat.tokenizer.eos_id, "prefix": chat.tokenizer.document_prefix}
    for path in (path for path in sorted((heldout / "text").glob("*")) if path.is_dir() or path.suffix == ".jsonl"):
        documents = thin(data.read_documents(path, columns=columns, **policy), text_limit)
        texts = chat.tokenizer.encode_batch([row.text for row in documents])
        pieces = [piece for ids in texts for piece in data.encode_document(ids, row_length=row_length, **ends)]
        rows[f"{path.stem}_text"] = data.pack(pieces, row_length)
    for path in _table(heldout / "preferences"):
        pairs = data.encode_pairs(data.read_preferences(path, columns=columns, **policy), chat, row_length, **fit)
    if not (any(rows.values()) or pairs):
        raise ValueError(f"--heldout {heldout}: holds nothing to evaluate on; expected tasks/, text/ or preferences/")
    return tasks, task_rows, rows, pairs


def _table(path: Path) -> list[Path]:
    """The folder of a table's files, or its one file; nothing if it is absent."""
    return [found for found in (path, path.with_suffix(".jsonl")) if found.exists()][:1]
