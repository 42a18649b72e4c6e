"""Rows into a corpus: filtered, compared, split and written, through one file on disk, so that memory stays small.

A row passes once, as it is built, through the filters and the search for exact duplicates into a spool. When all are
there, near duplicates and what overlaps with evaluation data are left out, and the rest becomes JSONL shards. Every row
left out is listed with its reason in reports/dropped.jsonl.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pedgpt.corpus.build import Step, stages, table_of
from pedgpt.corpus.builders.role_play import subject
from pedgpt.corpus.builders.sections import BETWEEN
from pedgpt.corpus.decontaminate import Decontaminator
from pedgpt.corpus.duplicates import NearDuplicates, Spool, digest
from pedgpt.corpus.quality import fault, normalize, scrub
from pedgpt.corpus.rows import Built, Dropped, answers, asked, map_texts, question, texts
from pedgpt.corpus.sources import Source, inside
from pedgpt.corpus.split import Names, Split, question_key
from pedgpt.data.manifest import write_manifest
from pedgpt.data.records import Conversation, Document, Message, PreferencePair, ReadSummary, Record

KINDS = {Document: "documents", Conversation: "conversations", PreferencePair: "preferences"}
# Builders whose rows resemble others on purpose: the same fact in several phrasings. They are split
# by disease, and only exact copies of them are left out.
VARIANTS = ("graph/", "role_play", "preferences", "safety", "self_cognition")
LONGEST_NAME = 20  # characters of a disease's or a drug's name; a longer title or fact is a sentence
BUILT_FROM = "built from a row that was left out"
# Of each table and source: rows, heldout (those among them), turns, and the characters asked and answered.
Statistics = dict[tuple[str, str], Counter[str]]


@dataclass(frozen=True)
class Limits:
    """What a row must keep to."""

    min_characters: int  # of a text, or of a conversation's answers together
    max_characters: int  # of a conversation or pair; running text may be of any length
    min_chinese: float  # share of Han characters among letters
    near_duplicate: float  # Jaccard similarity from which a row repeats another
    shard_rows: int  # rows a file
    keep_personal_data: bool
    seed: int


class _Row(NamedTuple):
    record: Record
    details: dict[str, Any]
    table: str
    source: str
    builder: str
    parent: int


@dataclass
class Assembly:
    """Rows on their way into the corpus in `folder`, which must not exist; `finish` writes it."""

    folder: Path
    limits: Limits
    split: Split
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)  # by source and reason
    built: Counter[str] = field(default_factory=Counter)  # readable rows by source, each written or listed in the end
    replaced: Counter[str] = field(default_factory=Counter)  # personal data, by kind
    names: set[str] = field(default_factory=set)  # of diseases, drugs; rows that name different ones are different
    files: list[dict[str, Any]] = field(default_factory=list)  # the manifest's
    statistics: Statistics = field(default_factory=lambda: defaultdict(Counter))

    def __post_init__(self) -> None:
        (self.folder / "reports").mkdir(parents=True)
        self._list = (self.folder / "reports" / "dropped.jsonl").open("wb")
        self._rows = Spool(self.folder)
        self._heldout = bytearray()
        self._seen: dict[bytes, int] = {}
        self._near = NearDuplicates(self.folder, threshold=self.limits.near_duplicate, seed=self.limits.seed)
        self._compared = array("q")  # the row behind each text of _near
        self._decontaminator = Decontaminator()
        names = ("min_characters", "max_characters", "min_chinese")
        self._bounds: dict[str, Any] = {name: getattr(self.limits, name) for name in names}

    def clean(self, records: Iterable[Record], source: Source) -> Iterator[Record]:
        """Records with normalised texts and without personal data; one that is left with too little is left out."""
        for record in records:
            cleaned = replace(map_texts(record, self._cleaned), source=_place(record.source, source))
            if found := fault(cleaned, **self._bounds):
                self.built[source.name] += 1
                self.drop(source.name, cleaned.source, *found)
            else:
                yield cleaned

    def unreadable(self, summary: ReadSummary, source: Source) -> None:
        """List the rows that a source's reader skipped."""
        for row in summary.skipped:
            fault, _, detail = row.reason.partition(": ")
            self.drop(source.name, _place(f"{row.file}:{row.line}", source), f"unreadable: {fault}", detail)

    def take(self, steps: Iterable[Step], source: Source) -> None:
        """What was made of one input of a source; what was built from a row that is left out is left out too."""
        numbers: list[int] = []
        for step in steps:
            self.built[source.name] += 1
            row, parent = step.row, -1 if step.parent < 0 else numbers[step.parent]
            if isinstance(row, Dropped):
                numbers.append(self.drop(source.name, row.source, row.reason, row.detail))
            elif step.parent >= 0 and parent < 0:
                numbers.append(self.drop(source.name, row.record.source, BUILT_FROM))
            else:
                numbers.append(self._add(row, table_of(row.record, source), source.name, step.builder, parent))

    def drop(self, source: str, place: str, reason: str, detail: str = "") -> int:
        """List a row that is left out; -1, for the number that it has not."""
        self.dropped[source, reason] += 1
        self._list.write(_line({"source": source, "place": place, "reason": reason, "detail": detail}))
        return -1

    def protect(self, records: Iterable[Record]) -> None:
        """Evaluation data: no training row may hold what it asks or answers."""
        for record in records:
            record = map_texts(record, lambda text: self._cleaned(text, counted=False))
            for text in items(record):
                self._decontaminator.add(record.source, text, bool(asked(record)) and text == question(record))

    def finish(self, sample_share: float) -> None:
        """Write the shards and reports. `sample_share` of the tasks' training rows go to stage 2 as well."""
        names = Names(question_key(name) for name in self.names | self.split.diseases if 1 < len(name) <= LONGEST_NAME)
        similar = {self._compared[i]: (self._compared[j], share) for i, j, share in self._near.find(names)}
        self._decontaminator.names = names
        asked_heldout = self._protect_heldout(similar)
        tables: dict[tuple[str, str, str], array[int]] = defaultdict(lambda: array("q"))  # numbers of rows
        gone: set[int] = set()
        sampled: Counter[str] = Counter()
        for number in range(len(self._rows)):
            row: _Row = self._rows[number]
            record, held = row.record, self._heldout[number]
            found: tuple[str, str] | None = None
            if number in similar:
                other, share = similar[number]
                found = "near duplicate", f"{share:.2f} of {self._source_of(other)}"
            elif row.parent in gone:
                found = BUILT_FROM, self._source_of(row.parent)
            elif not held and _asked(record) in asked_heldout:
                found = "asks a held-out question", question(record)
            elif not held and (match := self._decontaminator.match(messages(record))):
                found = "overlaps with evaluation or held-out rows", f"{match[1]:.2f} of {match[0]}"
            if found:
                gone.add(number)
                self.drop(row.source, record.source, *found)
                continue
            part = "heldout" if held else "train"
            tables[part, row.table, row.source].append(number)
            if row.table.startswith("tasks/") and not held:
                sampled[row.table] += 1  # an evenly spread share of each task
                if int(sampled[row.table] * sample_share) > int((sampled[row.table] - 1) * sample_share):
                    tables[part, "tasks_sample", row.source].append(number)
        for (part, table, source), numbers in tables.items():
            for shard, start in enumerate(range(0, len(numbers), self.limits.shard_rows)):
                chosen = numbers[start : start + self.limits.shard_rows]
                path = f"{part}/{table}/{source}-{shard:05}.jsonl"
                file = {"path": path, "side": part, "table": table, "source": source, "rows": len(chosen)}
                self._write(file, map(self._rows.__getitem__, chosen))
        self.files.sort(key=lambda file: file["path"])
        self.close()

    def write_manifest(
        self, sources: Sequence[Source], settings: Mapping[str, Any], summaries: Mapping[str, ReadSummary]
    ) -> dict[str, Any]:
        """Write manifest.json and return it. `summaries` say of each source what was read and what could not be."""
        about = {
            source.name: {
                "kind": source.kind, "domain": source.domain or "by words", "licence": source.licence,
                "weight": source.weight, "epochs": source.epochs, "build": list(source.build),
                "read": sum(summaries[source.name].rows.values()), "skipped": len(summaries[source.name].skipped),
                "built": self.built[source.name],
            }
            for source in sources
        }  # fmt: skip
        left_out: dict[str, dict[str, int]] = {}
        for (name, reason), count in sorted(self.dropped.items()):
            left_out.setdefault(name, {})[reason] = count
        found = {"dropped": left_out, "personal_data_replaced": dict(sorted(self.replaced.items()))}
        return write_manifest(self.folder, settings=settings, sources=about, files=self.files, found=found)

    def close(self) -> None:
        """Delete what was only needed on the way."""
        for file in (self._list, self._rows, self._near):
            file.close()

    def _add(self, row: Built, table: str, source: str, builder: str, parent: int) -> int:
        """The row's number, or -1 if it was left out; `parent` is the number of the row that it was built from."""
        record = row.record
        if builder:  # what a reader gave is clean already
            record = map_texts(record, self._cleaned)
            if found := fault(record, **self._bounds):
                return self.drop(source, record.source, *found)
        if not (group := self.split.group(record)):
            return self.drop(source, record.source, "is about diseases of both sides of the split")
        number, everything = len(self._rows), "\n".join(texts(record))
        first = self._seen.setdefault(digest(f"{KINDS[type(record)]}\n{everything}"), number)
        if first < number:
            return self.drop(source, record.source, "exact duplicate", f"of {self._source_of(first)}")
        self.names.add(record.disease)
        if isinstance(record, Document):
            headings = (record.title, *record.source.split(BETWEEN)[1:])
            self.names.update(subject(Document("", "", heading)) for heading in headings)
        if not builder.startswith(VARIANTS):
            self._near.add(everything)
            self._compared.append(number)
        self._heldout.append(self.split.side(group) == "heldout")
        return self._rows.append(_Row(record, row.details, table, source, builder, parent))

    def _protect_heldout(self, similar: Mapping[int, Any]) -> set[bytes | None]:
        """Take in held-out rows as evaluation data, and count training rows; what held-out rows ask first."""
        asked_heldout = set()  # diseases share first questions: 孩子发热、头痛，是怎么回事
        kept = [number for number in range(len(self._rows)) if number not in similar]
        for row in (self._rows[number] for number in kept if self._heldout[number]):
            asked_heldout.add(_asked(row.record))
            if not row.builder.startswith(VARIANTS):  # those share their wording, not their facts, with training rows
                self.protect([row.record])
        for row in (self._rows[number] for number in kept if not self._heldout[number]):
            self._decontaminator.count(messages(row.record))
        return asked_heldout - {None}

    def _write(self, file: dict[str, Any], rows: Iterable[_Row]) -> None:
        """Write the rows of one file, and count them."""
        path, counted = self.folder / file["path"], self.statistics[file["table"], file["source"]]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w+b") as handle:
            for row in rows:
                builder = {"builder": row.builder} if row.builder else {}
                origin = {"place": row.record.source, **builder, **row.details}
                handle.write(_line({**_as_row(row.record), "origin": origin}))
                questions, replies = asked(row.record), answers(row.record)
                if isinstance(row.record, PreferencePair):
                    replies.remove(row.record.rejected)
                counted.update(rows=1, heldout=file["side"] == "heldout", turns=len(questions))
                counted.update(asked=sum(map(len, questions)), answered=sum(map(len, replies)))
                file["kind"] = KINDS[type(row.record)]
            handle.seek(0)
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        self.files.append({**file, "stages": stages(file["table"]), "sha256": digest})

    def _cleaned(self, text: str, counted: bool = True) -> str:
        text = normalize(text)
        if not self.limits.keep_personal_data:
            text, found = scrub(text)
            self.replaced += found if counted else Counter()
        return text

    def _source_of(self, number: int) -> str:
        return self._rows[number].record.source


def _asked(record: Record) -> bytes | None:
    """The first question, if it asks something: 医生您好 does not."""
    first = question(record) if asked(record) else ""
    return digest(first) if len(question_key(first)) > len("医生您好请问") else None


def _place(place: str, source: Source) -> str:
    """ "file:line" with the file's path in the source's folder, or its name: a path of this machine is not written."""
    found = next((file for file in source.files if place.startswith(str(file))), None)
    return inside(found, source.root) + place[len(str(found)) :] if found else place


def _line(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode(errors="replace")  # a file's name may be no UTF-8


def _as_row(record: Record) -> dict[str, Any]:
    names = ("title", "text", "messages", "task", "prompt", "chosen", "rejected", "disease", "department")
    found = {name: value for name in names if (value := getattr(record, name, ""))}
    return {name: [_turn(m) for m in value] if isinstance(value, tuple) else value for name, value in found.items()}


def _turn(message: Message) -> dict[str, Any]:
    loss = {} if message.loss else {"loss": False}
    reasoning = {"reasoning_content": message.reasoning} if message.reasoning else {}
    return {"role": message.role, "content": message.content, **loss, **reasoning}


def items(record: Record) -> list[str]:
    """What an evaluation row asks and answers.

    What a patient says later is left out, as it means little by itself: 好的，谢谢医生的建议 is in many dialogues.
    """
    return [question(record)] * bool(asked(record)) + answers(record)


def messages(record: Record) -> list[str]:
    """The texts of a record, each once, beginning with its question."""
    return list(dict.fromkeys([question(record), *texts(record)]))
