"""Build PedCorpus: from one's own textbooks, guidelines, graphs and dialogues to the files of all four stages.

    python recipes/build_corpus.py --config recipes/configs/demo/corpus.toml
    python recipes/build_corpus.py --source path/to/folder --output runs/mine/corpus
    python recipes/build_corpus.py --source path/to/listing.toml --output runs/mine/corpus \\
        --teacher recipes/configs/teacher.toml

Writes train/ and heldout/ (JSONL by table and source), manifest.json, README.md (the corpus card) and reports/ (every
row left out with its reason). A TOML file lists the sources, as recipes/sample_corpus/corpus.toml does; in a folder
without one files are found by their content, see docs/corpus.md. What is not read is listed with the reason.

Without a teacher everything is made by templates and building twice gives the same bytes. With one, what it answered is
kept beside the output (OUTPUT.teacher.sqlite, and OUTPUT.plain_teacher.sqlite): a run that was killed goes on without
asking anything twice.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from pedgpt.corpus import Split, diseases, read_listing
from pedgpt.corpus.assemble import Assembly, Limits
from pedgpt.corpus.build import build, build_disease, build_graph, build_templates, divided
from pedgpt.corpus.builders.knowledge_graph import Disease
from pedgpt.corpus.builders.teacher import Teacher
from pedgpt.corpus.card import statistics_table, write_card
from pedgpt.corpus.classify import DOMAINS
from pedgpt.corpus.quality import normalize
from pedgpt.corpus.sources import describe_sources, is_corpus
from pedgpt.data import ReadSummary, Triple, iter_records
from pedgpt.data.readers import detect_kind, parse_columns
from pedgpt.endpoint import EndpointFailure, in_order, load_endpoint
from pedgpt.files import sync
from pedgpt.training import run_recipe

# What a corpus without tables that begin in one of these ways lacks for one of the four stages.
LACKS = {
    ("text/pediatric", "text/general_medical"): "running text on medicine, so stage 1 has only instructions, if any",
    ("generalist/", "tasks_sample"): "conversations, so stage 1 has only text, if any, and stage 2 nothing to train on",
    ("preferences",): "preference pairs, so stage 3 has nothing to train on",
    ("tasks/",): "rows of the three pediatric tasks, so stage 4 has {}",
}


@dataclass
class Config:
    lock_beside: ClassVar[bool] = True
    source: str  # TOML that lists the sources, or a folder of them, or one file
    output: str  # folder for the corpus; an earlier corpus in it is replaced once the new one is complete
    domain: str = ""  # of files found by content: pediatric, general_medical or general; empty: told by their words
    teacher: str = ""  # TOML of an OpenAI-compatible chat endpoint; empty: offline, by templates
    plain_teacher: str = ""  # TOML of the model whose plain answers become the rejected ones of pairs
    columns: list[str] = field(default_factory=list)  # field=column, e.g. question=ask, for files found by content
    evaluation: list[str] = field(default_factory=list)  # evaluation files: no training row may hold what is in them
    pediatric_share: float = 0.3  # share of the three tasks' training rows that stage 2 sees already, as its dialogues
    heldout_share: float = 0.1  # share of the diseases (of the questions, where no disease is named) held out
    near_duplicate: float = 0.8  # Jaccard similarity of character 5-grams from which a row repeats an earlier one
    min_characters: int = 2  # of a text, or of a conversation's answers together
    max_characters: int = 20000  # of a conversation or pair
    min_chinese: float = 0.3  # share of Han characters among a row's letters
    keep_personal_data: bool = False  # true leaves telephone and identity numbers, e-mails and names as they are
    on_bad_row: str = "skip"  # "skip" counts and lists rows that cannot be read, "error" stops at the first
    shard_rows: int = 50000  # rows a file
    seed: int = 0  # of the split and the search for near duplicates

    def check(self) -> None:
        """Raise ValueError for a value out of range, before anything is read."""
        domains, positive = f"one of {', '.join(DOMAINS)}, or empty", ("min_characters", "max_characters", "shard_rows")
        for name, fits, expected in (
            ("domain", self.domain in ("", *DOMAINS), domains),
            ("pediatric_share", 0 <= self.pediatric_share <= 1, "between 0 and 1"),
            ("min_chinese", 0 <= self.min_chinese <= 1, "between 0 and 1"),
            ("near_duplicate", 0 < self.near_duplicate <= 1, "above 0 and at most 1"),
            ("heldout_share", 0 <= self.heldout_share < 1, "at least 0 and below 1"),
            ("on_bad_row", self.on_bad_row in ("skip", "error"), '"skip" or "error"'),
            *((name, getattr(self, name) >= 1, "at least 1") for name in positive),
        ):
            if not fits:
                raise ValueError(f"{name} must be {expected}, found {getattr(self, name)!r}")


def main(config: Config) -> None:
    config.check()
    chosen = {"teacher": config.teacher, "plain_teacher": config.plain_teacher}
    endpoints = {role: load_endpoint(Path(path)) for role, path in chosen.items() if path}
    for endpoint in endpoints.values():
        endpoint.read_key()  # a missing one is told before anything is read
    listing, output = Path(config.source), Path(config.output).resolve()
    left_out: dict[Path, str] = {}
    sources = read_listing(listing, parse_columns(config.columns), left_out, config.domain)
    print(f"{describe_sources(sources, listing, left_out)}\n")
    read_files = [file for source in sources for file in source.files]
    check_output(output, listing, [*read_files, *map(Path, config.evaluation)])
    building, old = (output.with_name(f".{output.name}.{what}") for what in ("building", "old"))
    shutil.rmtree(building, ignore_errors=True)
    if old.exists() and not output.exists():  # a run died between taking the old corpus away and giving the new one
        os.rename(old, output)
    kinds = {path: detect_kind(path) for path in config.evaluation}
    if "triples" in kinds.values():
        raise ValueError("--evaluation: found a knowledge graph, expected questions and answers, pairs or texts")
    summaries = {source.name: ReadSummary() for source in sources}

    def read(source):
        policy = {"on_bad_row": config.on_bad_row, "summary": summaries[source.name], "columns": source.columns}
        return iter_records(source.files, source.reads, **policy)

    # The graphs first: their diseases are what the split goes by.
    graphs = {}
    for source in (source for source in sources if source.kind == "knowledge_graph"):
        graphs[source.name] = diseases(normalized(read(source), config.on_bad_row, summaries[source.name]))
    known = [disease for graph in graphs.values() for disease in graph]
    split = Split((disease.name for disease in known), heldout_share=config.heldout_share, seed=config.seed)
    limits = Limits(**{name: getattr(config, name) for name in Limits.__dataclass_fields__})
    with contextlib.ExitStack() as stack:
        teachers = {  # each with a cache of its own: budgets and prices are of one model
            role: stack.enter_context(Teacher(endpoint, output.with_name(f"{output.name}.{role}.sqlite")))
            for role, endpoint in endpoints.items()
        }
        ask, plain = teachers.get("teacher"), teachers.get("plain_teacher")
        workers = max((endpoint.concurrency for endpoint in endpoints.values()), default=0)

        def in_turn(inputs, work, source):
            work = partial(placed, partial(work, source=source, ask=ask, plain=plain))
            return in_order(inputs, work, workers=workers, desc=source.name, endpoints=[*teachers.values()])

        assembly = stack.enter_context(contextlib.closing(Assembly(building, limits, split)))
        assembly.names.update(name for disease in known for tails in disease.facts.values() for name in tails)
        for path, kind in kinds.items():
            assembly.protect(iter_records(path, kind))

        # Each input through its source's builders; a teacher is asked about several at a time, the order stays.
        def made(source):
            if source.kind == "knowledge_graph":
                for part in ("train", "heldout"):  # apart, so that no row joins facts of both sides
                    graph = [each for each in graphs[source.name] if split.side(f"disease/{each.name}") == part]
                    yield from in_turn(graph, build_disease, source)
                    yield build_graph(graph, source)
            elif source.reads:
                yield from in_turn(assembly.clean(divided(read(source), source), source), build, source)
            else:
                yield build_templates(source)

        for source in sources:
            for steps in made(source):
                assembly.take(steps, source)
            assembly.unreadable(summaries[source.name], source)
        for teacher in teachers.values():
            print(teacher.describe())

        assembly.finish(config.pediatric_share)

    settings = asdict(config) | {role: endpoint.model for role, endpoint in endpoints.items()}
    settings["evaluation"] = [Path(path).name for path in config.evaluation]
    del settings["source"], settings["output"]
    manifest = assembly.write_manifest(sources, settings, summaries)
    write_card(building, assembly.statistics, manifest)
    print(statistics_table(assembly.statistics))
    if not any(file["side"] == "train" for file in manifest["files"]):
        raise ValueError(f"{listing}: no training row came out of it; see {building / 'reports'}")
    replace_folder(output, building)
    tell(manifest, left_out)
    print(f"written to {config.output}; README.md in it is the corpus card")


def tell(manifest: dict, left_out: dict) -> None:
    """Print what came of it, and what the corpus lacks for one of the four stages."""
    for name, reasons in manifest["dropped"].items():
        print(f"{name}: left out " + ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()))
    replaced = ", ".join(f"{kind} {count:,}" for kind, count in manifest["personal_data_replaced"].items())
    print(f"personal data replaced: {replaced or 'none found'}")
    if left_out:
        print(f"files not read: {len(left_out):,}, listed above")
    for part in ("train", "heldout"):
        rows = sum(file["rows"] for file in manifest["files"] if file["side"] == part)
        print(f"{part}: {rows:,} rows")
    tables = [file["table"] for file in manifest["files"] if file["side"] == "train"]
    for beginnings, lack in LACKS.items():
        if not any(table.startswith(beginnings) for table in tables):
            other = "only general medicine" if "generalist/general_medical" in tables else "nothing to train on"
            print(f"absent: {lack.format(other)}")
    if all(file["side"] == "train" for file in manifest["files"]):
        print("absent: held-out rows, so there is nothing to evaluate on; more rows or a higher --heldout_share help")


def normalized(triples: Iterable[Triple], on_bad_row: str, summary: ReadSummary) -> list[Triple]:
    """Triples as the rest of the corpus is written; one with nothing visible in its head or tail is a bad row."""
    kept = []
    for triple in triples:
        named = {name: normalize(getattr(triple, name)) for name in ("head", "relation", "tail")}
        reason = "head, relation or tail is empty: found nothing visible, expected some text"
        if all(named.values()):
            kept.append(replace(triple, **named))
        elif on_bad_row == "error":
            raise ValueError(f"{triple.source}: {reason}")
        else:
            summary.drop(triple.source, reason)
    return kept


def placed(work, item):
    """`work` of an input; where a teacher gives no answer, the error says which input it was asked about."""
    try:
        return work(item)
    except EndpointFailure as error:
        raise EndpointFailure(
            f"{error} (asked about {item.name if isinstance(item, Disease) else item.source})"
        ) from None


def check_output(output: Path, listing: Path, inputs: list[Path]) -> None:
    """Refuse a folder whose replacement would lose something that is no corpus, or that is read."""
    for path in (path.resolve() for path in (listing, *inputs)):
        inside = path != listing.resolve() and path in output.parents  # of a folder all files are read
        if output == path or output in path.parents or inside:
            raise ValueError(f"--output {output}: lies in, or holds, the input {path}; choose another folder")
    if output.is_file() or (output.exists() and any(output.iterdir()) and not is_corpus(output)):
        raise ValueError(f"--output {output}: not empty and no corpus; choose another folder")


def replace_folder(output: Path, complete: Path) -> None:
    """Put a complete corpus, safe on disk, in the place of an earlier one: at no moment is there half of one."""
    for path in filter(Path.is_file, complete.rglob("*")):
        sync(path)
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    os.rename(complete, output)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    run_recipe(main, Config)
