"""From one input, as it was read, to the rows that its source's builders make of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from pedgpt.corpus.builders.dialogues import evidiag_dialogue
from pedgpt.corpus.builders.knowledge_graph import (
    Disease,
    evidiag,
    medkqa,
    negative,
    trerecom,
    two_hop,
    verbalize,
    verbalize_with,
)
from pedgpt.corpus.builders.preferences import humane_pair
from pedgpt.corpus.builders.reconstruct import reconstruct
from pedgpt.corpus.builders.role_play import role_play
from pedgpt.corpus.builders.safety import safety, self_cognition
from pedgpt.corpus.builders.sections import passages
from pedgpt.corpus.classify import PEDIATRIC, classify
from pedgpt.corpus.rows import Ask, Built, Dropped
from pedgpt.corpus.sources import Source, is_name
from pedgpt.data.records import Conversation, Document, PreferencePair, Record
from pedgpt.data.tasks import EVIDIAG, TASKS


@dataclass(frozen=True, slots=True)
class Step:
    """What a builder gave; `parent` is the place in the list of the row that it was built from, or -1."""

    builder: str  # "" for a row as it was read
    row: Built | Dropped
    parent: int = -1


def divided(records: Iterable[Record], source: Source) -> Iterator[Record]:
    """Records, but of a book its passages, so that each can be compared, held out and asked about by itself."""
    for record in records:
        if isinstance(record, Document) and (source.kind in ("textbook", "guideline") or "role_play" in source.build):
            yield from passages(record)
        else:
            yield record


def build(record: Record, source: Source, ask: Ask | None = None, plain: Ask | None = None) -> list[Step]:
    """The rows of one passage, conversation or pair. `plain` is the model whose plain answers become rejected ones."""
    if isinstance(record, PreferencePair):
        return [Step("", Built(record))]
    if isinstance(record, Document):
        return _of_document(record, source, ask, plain)
    return _of_conversation(record, source, ask, plain)


def build_graph(diseases: Sequence[Disease], source: Source) -> Iterator[Step]:
    """The instructions of a graph's diseases; all of them on one side of the split, see `two_hop`."""
    rows: dict[str, Iterable[Conversation]] = {
        "medkqa": (row for disease in diseases for row in medkqa(disease)),
        "evidiag": (row for disease in diseases for row in evidiag(disease)),
        "trerecom": (row for disease in diseases for row in trerecom(disease)),
        "two_hop": two_hop(diseases),
        "negative": negative(diseases),
    }
    for builder, built in rows.items():
        if builder in source.build:
            yield from (Step(f"graph/{builder}", _in_domain(Built(row), source)) for row in built)


def build_disease(disease: Disease, source: Source, ask: Ask | None = None, plain: Ask | None = None) -> list[Step]:
    """What a teacher is asked about a disease of a graph: its facts as running text, and pairs."""
    steps = []
    if "text" in source.build:
        told = verbalize_with(disease, ask) if ask else map(Built, verbalize(disease))
        steps += [Step("graph/text", row) for row in told]
    for row in trerecom(disease) if "preferences" in source.build else ():
        steps += [Step("graph/preferences", pair) for pair in humane_pair(row, ask, plain)]
    return steps


def build_templates(source: Source) -> list[Step]:
    """The rows of a source that has no files."""
    rows = safety() if source.kind == "safety" else self_cognition(source.assistant, source.developer)
    return [Step(source.kind, row) for row in rows]


def table_of(record: Record, source: Source) -> str:
    """The table of the corpus that a row belongs to, such as "text/pediatric", "tasks/medkqa" or "preferences"."""
    if isinstance(record, Document):
        return f"text/{source.domain or PEDIATRIC}"
    if isinstance(record, PreferencePair):
        return "preferences"
    return TASKS.get(record.task) or f"generalist/{record.task}"


def stages(name: str) -> list[int]:
    """The stages that train on a table (PediatricsGPT §3: text and completions, generalist, pairs, tasks)."""
    if name.startswith("text/"):
        return [1]
    if name.startswith("tasks/"):
        return [1, 4]
    if name.startswith("generalist/"):
        return [1, 2, 4] if name == "generalist/general_medical" else [1, 2]
    return {"tasks_sample": [2], "preferences": [3]}[name]


def _of_document(passage: Document, source: Source, ask: Ask | None, plain: Ask | None) -> list[Step]:
    steps = [Step("", Built(passage))]
    for row in role_play(passage, ask) if "role_play" in source.build else ():
        steps.append(Step("role_play", _in_domain(row, source), 0))
        # A parent's question is answered humanely; a colleague's needs no comfort.
        if isinstance(row, Built) and row.details["role"] == "parent":
            steps += _pairs(row, source, ask, plain, len(steps) - 1)
    return steps


def _in_domain(row: Built | Dropped, source: Source) -> Built | Dropped:
    """The three tasks are pediatric: what another domain's text or graph gives is that domain's conversation."""
    if isinstance(row, Built) and isinstance(row.record, Conversation) and source.domain not in ("", PEDIATRIC):
        return replace(row, record=replace(row.record, task=source.domain))
    return row


def _of_conversation(record: Conversation, source: Source, ask: Ask | None, plain: Ask | None) -> list[Step]:
    task = source.task or (record.task if is_name(record.task) else "") or _task_by_domain(record, source)
    builder = ""
    rows: Iterable[Built | Dropped] = (Built(record),)
    turns = sum(message.role == "user" for message in record.messages)
    if "evidiag" in source.build and turns > 1:
        builder, rows = "evidiag", evidiag_dialogue(record, ask)
    elif "reconstruct" in source.build:
        builder, rows = "reconstruct", reconstruct(record, ask)
    steps: list[Step] = []
    for row in rows:
        if isinstance(row, Built) and isinstance(row.record, Conversation):
            left = sum(message.role == "user" for message in row.record.messages)
            named = task
            if task == EVIDIAG and left < 2 and not source.task:  # what is left of it is a question and its answer
                named = _task_by_domain(row.record, source)
            row = replace(row, record=replace(row.record, task=named))
        steps.append(Step(builder, row))
        if isinstance(row, Built):
            steps += _pairs(row, source, ask, plain, len(steps) - 1)
    return steps


def _pairs(row: Built, source: Source, ask: Ask | None, plain: Ask | None, parent: int) -> list[Step]:
    if "preferences" not in source.build or not isinstance(row.record, Conversation):
        return []
    return [Step("preferences", pair, parent) for pair in humane_pair(row.record, ask, plain)]


def _task_by_domain(record: Conversation, source: Source) -> str:
    """By the domain that the listing states, and where it leaves a choice by the row's words."""
    if source.domain not in ("", PEDIATRIC):
        return source.domain
    if source.domain and source.kind == "dialogues" and len(record.messages) > 3:
        return EVIDIAG
    return classify(record, pediatric=bool(source.domain))
