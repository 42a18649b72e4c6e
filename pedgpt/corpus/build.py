"""From one input, as it was read, to the rows that its source's builders make of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from pedgpt.corpus.builders import knowledge_graph as graph
from pedgpt.corpus.builders.dialogues import evidiag_dialogue
from pedgpt.corpus.builders.knowledge_graph import Disease
from pedgpt.corpus.builders.preferences import humane_pair
from pedgpt.corpus.builders.reconstruct import reconstruct
from pedgpt.corpus.builders.role_play import role_play
from pedgpt.corpus.builders.safety import safety, self_cognition
from pedgpt.corpus.builders.sections import passages
from pedgpt.corpus.classify import PEDIATRIC, classify
from pedgpt.corpus.rows import Ask, Built, Row, asked
from pedgpt.corpus.sources import Source, is_name
from pedgpt.data.records import Conversation, Document, PreferencePair, Record
from pedgpt.data.tasks import EVIDIAG, TASKS

# The stages that train on a table, or on those of a folder (PediatricsGPT §3: text and completions, generalist, pairs,
# tasks).
STAGES = {
    "text": [1],
    "tasks": [1, 4],
    "tasks_sample": [2],
    "generalist": [1, 2],
    "generalist/general_medical": [1, 2, 4],
    "preferences": [3],
}


@dataclass(frozen=True, slots=True)
class Step:
    """What a builder gave; `parent` is the place in the list of the row that it was built from, or -1."""

    builder: str  # "" for a row as it was read
    row: Row
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
    steps = (
        list(_of_conversation(record, source, ask)) if isinstance(record, Conversation) else [Step("", Built(record))]
    )
    if isinstance(record, Document) and "role_play" in source.build:
        steps += _steps("role_play", role_play(record, ask), source, parent=0)
    for place, step in enumerate(steps[:] if "preferences" in source.build else []):
        # A parent's question is answered humanely; a colleague's needs no comfort.
        if isinstance(row := step.row, Built) and row.details.get("role", "parent") == "parent":
            if isinstance(row.record, Conversation):
                steps += [Step("preferences", pair, place) for pair in humane_pair(row.record, ask, plain)]
    return steps


def build_graph(diseases: Sequence[Disease], source: Source) -> Iterator[Step]:
    """The instructions of a graph's diseases; all of them on one side of the split, see `two_hop`."""
    each = {"medkqa": graph.medkqa, "evidiag": graph.evidiag, "trerecom": graph.trerecom}
    rows: dict[str, Iterable[Conversation]] = {name: chain(*map(builder, diseases)) for name, builder in each.items()}
    for name, made in {**rows, "two_hop": graph.two_hop(diseases), "negative": graph.negative(diseases)}.items():
        if name in source.build:
            yield from _steps(f"graph/{name}", map(Built, made), source)


def build_disease(disease: Disease, source: Source, ask: Ask | None = None, plain: Ask | None = None) -> list[Step]:
    """The facts of a disease of a graph as running text, and pairs."""
    texts = graph.verbalize(disease) if "text" in source.build else ()
    steps = [Step("graph/text", Built(text)) for text in texts]
    for row in graph.trerecom(disease) if "preferences" in source.build else ():
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


def stages(table: str) -> list[int]:
    """The stages that train on a table."""
    return STAGES.get(table) or STAGES[table.split("/")[0]]


def _steps(builder: str, rows: Iterable[Row], source: Source, parent: int = -1) -> Iterator[Step]:
    """The three tasks are pediatric: what another domain's text or graph gives is that domain's conversation."""
    for row in rows:
        if isinstance(row, Built) and isinstance(row.record, Conversation) and source.domain not in ("", PEDIATRIC):
            row = replace(row, record=replace(row.record, task=source.domain))
        yield Step(builder, row, parent)


def _of_conversation(record: Conversation, source: Source, ask: Ask | None) -> Iterator[Step]:
    task = source.task or (record.task if is_name(record.task) else "") or _task_by_domain(record, source)
    builder = ""
    rows: Iterable[Row] = [Built(record)]
    if "evidiag" in source.build and len(asked(record)) > 1:
        builder, rows = "evidiag", evidiag_dialogue(record, ask)
    elif "reconstruct" in source.build:
        builder, rows = "reconstruct", reconstruct(record, ask)
    for row in rows:
        if isinstance(row, Built) and isinstance(row.record, Conversation):
            # What is left of a dialogue may be a question and its answer.
            is_short = task == EVIDIAG and len(asked(row.record)) < 2 and not source.task
            named = _task_by_domain(row.record, source) if is_short else task
            row = replace(row, record=replace(row.record, task=named))
        yield Step(builder, row)


def _task_by_domain(record: Conversation, source: Source) -> str:
    """By the domain that the listing states, and where it leaves a choice by the row's words."""
    if source.domain not in ("", PEDIATRIC):
        return source.domain
    return classify(record, pediatric=bool(source.domain))
