"""Build the training and held-out files of all four stages from a folder of sources.

    python recipes/build_corpus.py --source recipes/sample_corpus --output runs/demo/corpus

Writes train/ and heldout/, each with text/ (stage 1), generalist/ and tasks_sample.jsonl (stage 2), preferences.jsonl
(stage 3) and tasks/ (stage 4), and manifest.json.

A folder with a corpus.toml says itself what each file is. In any other folder files are found by their content, and
conversations are sorted into tasks by their words (pedgpt.corpus.classify). Deterministic: building twice gives the
same bytes.
"""

import json
import os
import re
import shutil
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pedgpt import corpus
from pedgpt.data import (
    Conversation,
    Document,
    PreferencePair,
    ReadSummary,
    Triple,
    read_conversations,
    read_documents,
    read_preferences,
    read_triples,
)
from pedgpt.data.records import SUFFIXES, detect_kind
from pedgpt.training import run_recipe

PEDIATRIC, GENERAL_MEDICAL, GENERAL = "pediatric", corpus.GENERAL_MEDICAL, corpus.GENERAL
FILE_NAMES = {corpus.MEDKQA: "medkqa", corpus.EVIDIAG: "evidiag", corpus.TRERECOM: "trerecom"}
READERS = {
    "documents": read_documents,
    "conversations": read_conversations,
    "preferences": read_preferences,
    "triples": read_triples,
}


@dataclass
class Config:
    source: str  # folder of source files
    output: str  # folder for the corpus
    pediatric_share: float = 0.3  # share of the three tasks' training rows that stage 2 sees already, as its dialogues
    heldout_share: float = 0.1  # share of the questions, texts and pairs kept for evaluation
    on_bad_row: str = "skip"  # "skip" counts and lists bad rows, "error" stops at the first
    seed: int = 0  # of the split


@dataclass
class Sources:
    """Everything read, by domain of the text and by task of the conversation."""

    text: dict[str, list[Document]] = field(default_factory=dict)
    graph: list[Triple] = field(default_factory=list)
    conversations: dict[str, list[Conversation]] = field(default_factory=dict)
    preferences: list[PreferencePair] = field(default_factory=list)


def main(config: Config) -> None:
    source, output = Path(config.source), Path(config.output)
    summary = ReadSummary()
    sources = read_sources(source, config.on_bad_row, summary)
    if (output / "manifest.json").is_file():  # files of an earlier corpus must not stay among the new ones
        for part in ("train", "heldout"):
            shutil.rmtree(output / part, ignore_errors=True)

    graph = corpus.diseases(sources.graph)
    builders = {corpus.MEDKQA: corpus.medkqa, corpus.EVIDIAG: corpus.evidiag, corpus.TRERECOM: corpus.trerecom}
    for task, builder in builders.items():
        built = [row for disease in graph for row in builder(disease)]
        if built:
            sources.conversations[task] = built + sources.conversations.get(task, [])

    def divide(rows, question, identity=None):
        return corpus.split(rows, question, identity=identity, heldout_share=config.heldout_share, seed=config.seed)

    counts: dict[str, dict[str, int]] = {}
    instructions = {}
    for task, rows in sorted(sources.conversations.items()):
        train, heldout, repeated = divide(rows, first_question, everything_asked)
        instructions[task] = (train, heldout)
        name = f"tasks/{FILE_NAMES[task]}" if task in FILE_NAMES else f"generalist/{task}"
        counts[name] = write_split(output, name, train, heldout, repeated, conversation_row)
    tasks = [instructions[task] for task in corpus.TASKS if task in instructions]
    train, heldout = ([row for rows in tasks for row in thin(rows[side], config.pediatric_share)] for side in (0, 1))
    counts["tasks_sample"] = write_split(output, "tasks_sample", train, heldout, 0, conversation_row)
    for domain in (PEDIATRIC, GENERAL_MEDICAL, GENERAL):
        train, heldout, repeated = divide(sources.text.get(domain, []), lambda document: document.text)
        if not train:  # a source without running text: the answers of its conversations are text too
            names = corpus.TASKS if domain == PEDIATRIC else (domain,)
            train, said = (
                [text for task in names if task in instructions for text in answers(instructions[task][side])]
                for side in (0, 1)
            )
            known = {document.text for document in train}
            heldout += [document for document in said if document.text not in known]
        if domain == PEDIATRIC:  # the facts themselves are for training; whole passages are held out
            train += [text for disease in graph for text in corpus.verbalize(disease)]
        counts[f"text/{domain}"] = write_split(output, f"text/{domain}", train, heldout, repeated, document_row)
    train, heldout, repeated = divide(
        sources.preferences,
        lambda pair: pair.prompt[-1].content,
        lambda pair: repr((pair.prompt, pair.chosen, pair.rejected)),
    )
    counts["preferences"] = write_split(output, "preferences", train, heldout, repeated, preference_row)

    print(summary.describe())
    print(f"\n{'file':34}{'train':>8}{'held out':>10}{'repeated':>10}")
    for name, count in counts.items():
        print(f"{name:34}{count['train']:>8}{count['heldout']:>10}{count['repeated']:>10}")
    total = sum(len(train) for train, _ in tasks)
    known = {answer for train, _ in tasks for row in train for answer in spoken(row)}
    held = [answer for _, heldout in tasks for row in heldout for answer in spoken(row)]
    repeats = sum(answer in known for answer in held)
    print(f"{repeats:,} of {len(held):,} held-out task answers also answer some training question, word for word")
    print(f"{total:,} training instructions over {', '.join(corpus.TASKS)}; written to {output}")
    manifest = {
        "source": source.name,
        "seed": config.seed,
        "heldout_share": config.heldout_share,
        "rows": counts,
        "read": {os.path.relpath(file, source): rows for file, rows in summary.rows.items()},
        "skipped": [{**asdict(row), "file": os.path.relpath(row.file, source)} for row in summary.skipped],
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not total:
        raise ValueError(f"{source}: no instruction of any task came out of it; see the table above for what was read")


def read_sources(folder: Path, on_bad_row: str, summary: ReadSummary) -> Sources:
    """Read every file of the folder as its corpus.toml says, or else as its content shows."""
    if not folder.is_dir():
        raise ValueError(f"--source {folder}: no such folder")
    listing = folder / "corpus.toml"
    if listing.is_file():
        try:
            entries = tomllib.loads(listing.read_text(encoding="utf-8")).get("source")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{listing}: not valid TOML ({error})") from None
        if not isinstance(entries, list) or not all(map(is_entry, entries)):
            raise ValueError(f"{listing}: expected [[source]] tables of the texts file, kind, domain and task")
    else:
        entries = []
        for path in sorted(folder.iterdir()):
            known = path.is_file() and path.suffix.lower() in SUFFIXES and path.stem.lower() != "readme"
            entries += [{"file": path.name, "kind": detect_kind(path)}] if known else []
            print(f"{path.name:36} {'read as ' + entries[-1]['kind'] if known else 'not read'}")
        print()
    sources = Sources()
    for number, entry in enumerate(entries, 1):
        kind, domain, task = entry.get("kind"), entry.get("domain", PEDIATRIC), entry.get("task")
        if kind not in READERS or "file" not in entry or domain not in (PEDIATRIC, GENERAL_MEDICAL, GENERAL):
            raise ValueError(f"{listing}: source {number}: needs file, kind ({', '.join(READERS)}) and a known domain")
        if task is not None and not is_task_name(task):
            raise ValueError(f"{listing}: source {number}: task {task!r} cannot name a file; choose another")
        rows = READERS[kind](folder / entry["file"], on_bad_row=on_bad_row, summary=summary)
        if kind == "triples":
            sources.graph += rows
        elif kind == "preferences":
            sources.preferences += rows
        elif kind == "documents":
            sources.text.setdefault(domain, []).extend(rows)
        else:
            for row in rows:
                named = row.task if is_task_name(row.task) else None
                sources.conversations.setdefault(task or named or corpus.classify(row), []).append(row)
    return sources


def is_entry(entry) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() <= {"file", "kind", "domain", "task"}
        and all(isinstance(value, str) for value in entry.values())
    )


def is_task_name(task: str) -> bool:
    """Whether rows of this task can have a file of their own; a row's task may be any text."""
    return bool(re.fullmatch(r"[\w&-]{1,60}", task))


def thin(rows: list, share: float) -> list:
    """That share of the rows, evenly spread."""
    return [row for i, row in enumerate(rows) if int((i + 1) * share) > int(i * share)]


def spoken(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages if message.role == "assistant"]


def first_question(conversation: Conversation) -> str:
    return next(message.content for message in conversation.messages if message.role == "user")


def everything_asked(conversation: Conversation) -> str:
    return "".join(message.content for message in conversation.messages if message.role == "user")


def answers(conversations: list[Conversation], at_least: int = 20) -> list[Document]:
    """The answers of some length as running text."""
    return [
        Document(message.content, conversation.source)
        for conversation in conversations
        for message in conversation.messages
        if message.role == "assistant" and len(message.content) >= at_least
    ]


def conversation_row(row: Conversation) -> dict:
    messages = [
        {"role": message.role, "content": message.content} | ({} if message.loss else {"loss": False})
        for message in row.messages
    ]
    return {"messages": messages, "task": row.task} if row.task else {"messages": messages}


def document_row(row: Document) -> dict:
    return {"title": row.title, "text": row.text} if row.title else {"text": row.text}


def preference_row(row: PreferencePair) -> dict:
    prompt = [{"role": message.role, "content": message.content} for message in row.prompt]
    return {"prompt": prompt, "chosen": row.chosen, "rejected": row.rejected}


def write_split(output: Path, name: str, train: list, heldout: list, repeated: int, as_row) -> dict[str, int]:
    for part, rows in (("train", train), ("heldout", heldout)):
        path = output / part / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(as_row(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {"train": len(train), "heldout": len(heldout), "repeated": repeated}


if __name__ == "__main__":
    run_recipe(main, Config)
