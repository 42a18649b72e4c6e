"""Rows into a corpus: filtered, compared, split and written, through one file on disk, so that memory stays small.

A row passes once, as it is built, through the filters and the search for exact duplicates into a spool. When all are
there, near duplicates and what overlaps with evaluation data are left out, and the rest becomes JSONL shards. Every row
left out is listed with its reason in reports/dropped.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from pedgpt.corpus.build import Step, stages, table_of
from pedgpt.corpus.builders.role_play import subject
from pedgpt.corpus.builders.sections import BETWEEN
from pedgpt.corpus.decontaminate import Decontaminator
from pedgpt.corpus.duplicates import Contradictions, NearDuplicates, digest
from pedgpt.corpus.quality import fault, normalize, scrub
from pedgpt.corpus.rows import Built, Dropped, map_texts, question, texts
from pedgpt.corpus.sources import Source
from pedgpt.corpus.split import Names, Split, question_key
from pedgpt.data.records import Conversation, Document, Message, PreferencePair, ReadSummary, Record

KINDS = {Document: "documents", Conversation: "conversations", PreferencePair: "preferences"}
# Builders whose rows resemble others on purpose: the same fact in several phrasings, an answer as text. They are split
# by disease and compared exactly alone.
VARIANTS = ("graph/", "role_play", "preferences", "safety", "self_cognition", "answer")
LONGEST_NAME = 20  # characters of a disease's or a drug's name; a longer title or fact is a sentence


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


@dataclass
class Statistics:
    """What the corpus card tells of one table and source."""

    rows: int = 0
    heldout: int = 0
    turns: int = 0
    asked: int = 0  # characters
    answered: int = 0  # characters; of running text, its own


@dataclass
class Assembly:
    """Rows on their way into the corpus in `folder`, which must not exist; `finish` writes it."""

    folder: Path
    limits: Limits
    split: Split
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)  # by source and reason
    built: Counter[str] = field(default_factory=Counter)  # readable rows by source, each written or listed in the end
    tables: Counter[str] = field(default_factory=Counter)  # rows in the spool, by table
    replaced: Counter[str] = field(default_factory=Counter)  # personal data, by kind
    names: set[str] = field(default_factory=set)  # of diseases, drugs; rows that name different ones are different

    def __post_init__(self) -> None:
        (self.folder / "reports").mkdir(parents=True)
        self._list = (self.folder / "reports" / "dropped.jsonl").open("w", encoding="utf-8")
        self._spool = (self.folder / "spool").open("w+b")
        self._offsets = array("q")
        self._heldout = bytearray()
        self._seen: dict[bytes, int] = {}
        self._near = NearDuplicates(self.folder, threshold=self.limits.near_duplicate, seed=self.limits.seed)
        self._compared = array("q")  # the row behind each text of _near
        self._decontaminator = Decontaminator()

    def __len__(self) -> int:
        return len(self._offsets)

    def clean(self, records: Iterable[Record], source: Source) -> Iterator[Record]:
        """Records with normalised texts and without personal data; one that is left with too little is left out."""
        for record in records:
            cleaned = replace(
                map_texts(record, self._cleaned),
                source=_place(record.source, source),
                disease=self._cleaned(record.disease),
                department=self._cleaned(record.department),
            )
            if found := self._fault(cleaned):
                self.drop(Dropped(cleaned.source, *found), source.name)
            else:
                yield cleaned

    def side_of(self, disease: str) -> str:
        """The side of the split, "train" or "heldout", on which all rows of a disease lie."""
        return self.split.side(f"disease/{disease}")

    def unreadable(self, summary: ReadSummary, source: Source) -> None:
        """List the rows that a source's reader skipped."""
        for row in summary.skipped:
            fault, _, detail = row.reason.partition(": ")
            self.drop(
                Dropped(_place(f"{row.file}:{row.line}", source), f"unreadable: {fault}", detail), source.name, True
            )

    def take(self, steps: Iterable[Step], source: Source) -> None:
        """What was made of one input of a source; what was built from a row that is left out is left out too."""
        numbers: list[int] = []
        for step in steps:
            row, parent = step.row, -1 if step.parent < 0 else numbers[step.parent]
            if step.parent >= 0 and parent < 0 and isinstance(row, Built):
                row = Dropped(row.record.source, "built from a row that was left out")
            if isinstance(row, Dropped):
                numbers.append(self.drop(row, source.name))
            else:
                numbers.append(self.add(row, table_of(row.record, source), source.name, step.builder, parent))

    def add(self, row: Built, table: str, source: str, builder: str = "", parent: int = -1, group: str = "") -> int:
        """The row's number, or -1 if it was left out; `parent` is the number of the row that it was built from.

        `group` overrides the one that the record itself shows.
        """
        record = row.record
        if builder:  # what a reader gave is clean already
            record = map_texts(record, self._cleaned)
        if found := self._fault(record):
            return self.drop(Dropped(record.source, *found), source)
        if not (group := group or self.split.group(record)):
            return self.drop(Dropped(record.source, "is about diseases of both sides of the split"), source)
        everything = "\n".join(texts(record))
        key = digest(f"{KINDS[type(record)]}\n{everything}")
        if (first := self._seen.setdefault(key, len(self))) < len(self):
            return self.drop(Dropped(record.source, "exact duplicate", f"of {self._place(first)}"), source)
        self.names.add(record.disease)
        if isinstance(record, Document):
            headings = (record.title, *record.source.split(BETWEEN)[1:])
            self.names.update(subject(Document("", "", heading)) for heading in headings)
        if not builder.startswith(VARIANTS):
            self._near.add(everything)
            self._compared.append(len(self))
        self.built[source] += 1
        self.tables[table] += 1
        held = self.split.side(group) == "heldout"
        origin = {"place": record.source, **({"builder": builder} if builder else {}), **row.details}
        topic = group.removeprefix("disease/") if group.startswith("disease/") else record.department
        head = [table, source, builder, parent, topic]
        self._offsets.append(self._spool.tell())
        self._heldout.append(held)
        self._spool.write(_line([head, {**_as_row(record), "origin": origin}]))
        return len(self) - 1

    def drop(self, row: Dropped, source: str, counted: bool = False) -> int:
        """List a row that is left out; -1, for the number that it has not. `counted`: it is in `built` already."""
        self.built[source] += not counted
        self.dropped[source, row.reason] += 1
        listed = {"source": source, "place": row.source, "reason": row.reason, "detail": row.detail}
        self._list.write(json.dumps(listed, ensure_ascii=False) + "\n")
        return -1

    def protect(self, records: Iterable[Record]) -> None:
        """Evaluation data: no training row may hold what it asks or answers."""
        for record in records:
            record = map_texts(record, lambda text: self._cleaned(text, count=False))
            for text in items(record):
                self._decontaminator.add(
                    record.source, text, not isinstance(record, Document) and text == question(record)
                )

    def answers_as_text(self, table: str, conversations: tuple[str, ...], at_least: int = 20) -> None:
        """The answers of some tables' conversations as running text too, for a corpus that has no other."""
        for number, (found, source, *_), row in self._rows(range(len(self))):
            if found in conversations:
                record = _conversation(row)
                for message in record.messages:
                    if message.role == "assistant" and message.loss and len(message.content) >= at_least:
                        text = Document(message.content, record.source, "", record.disease, record.department)
                        group = self.split.group(record)
                        self.add(Built(text), table, source, "answer", number, group)

    def finish(self, sample_share: float) -> Corpus:
        """Write the shards and reports. `sample_share` of the tasks' training rows go to stage 2 as well."""
        gone = bytearray(len(self))
        names = Names(question_key(name) for name in self.names | self.split.diseases if 1 < len(name) <= LONGEST_NAME)
        similar = {self._compared[i]: (self._compared[j], share) for i, j, share in self._near.find(names)}
        self._decontaminator.names = names
        asked = set()  # diseases share first questions: 孩子发热、头痛，是怎么回事
        for _, (*_, builder, _, _), row in self._rows(
            i for i in range(len(self)) if self._heldout[i] and i not in similar
        ):
            record = _record(row)
            if (first := self._asked(record)) is not None:
                asked.add(first)
            if not builder.startswith(VARIANTS):  # those share their wording, not their facts, with training rows
                self.protect([record])
        for _, _, row in self._rows(i for i in range(len(self)) if not self._heldout[i] and i not in similar):
            self._decontaminator.count(messages(_record(row)))
        corpus = Corpus(self.folder, self.limits.shard_rows)
        contradictions = Contradictions(self.folder)
        for number, head, row in self._rows(range(len(self))):
            table, source, builder, parent, topic = head
            record = _record(row)
            reason = detail = ""
            if number in similar:
                reason, detail = "near duplicate", f"{similar[number][1]:.2f} of {self._place(similar[number][0])}"
            elif parent >= 0 and gone[parent]:
                reason, detail = "built from a row that was left out", self._place(parent)
            elif self._heldout[number]:
                pass
            elif self._asked(record) in asked:
                reason, detail = "asks a held-out question", question(record)
            elif match := self._decontaminator.match(messages(record)):
                reason, detail = "overlaps with evaluation or held-out rows", f"{match[1]:.2f} of {match[0]}"
            if reason:
                gone[number] = 1
                self.drop(Dropped(record.source, reason, detail), source, counted=True)
                continue
            part = "heldout" if self._heldout[number] else "train"
            corpus.write(part, table, source, record, row, topic)
            if table.startswith("tasks/") and part == "train" and corpus.sampled(table, sample_share):
                corpus.write(part, "tasks_sample", source, record, row, topic)
            if isinstance(record, Conversation) and len(record.messages) == 2 and not builder.startswith(VARIANTS):
                contradictions.add(record.source, question(record), record.messages[-1].content)
        with (self.folder / "reports" / "contradictions.jsonl").open("w", encoding="utf-8") as file:
            for group in contradictions.groups():
                file.write(json.dumps(group, ensure_ascii=False) + "\n")
                corpus.contradictions += 1
        corpus.close()
        self.close()
        return corpus

    def close(self) -> None:
        """Delete what was only needed on the way."""
        self._list.close()
        self._spool.close()
        (self.folder / "spool").unlink(missing_ok=True)
        self._near.close()

    def _cleaned(self, text: str, count: bool = True) -> str:
        text = normalize(text)
        if not self.limits.keep_personal_data:
            text, found = scrub(text)
            self.replaced += found if count else Counter()
        return text

    @staticmethod
    def _asked(record: Record) -> bytes | None:
        """The first question, if it asks something: 医生您好 does not."""
        asked = "" if isinstance(record, Document) else question(record)
        return digest(asked) if len(question_key(asked)) > len("医生您好请问") else None

    def _fault(self, record: Record) -> tuple[str, str] | None:
        low, high = self.limits.min_characters, self.limits.max_characters
        return fault(record, min_characters=low, max_characters=high, min_chinese=self.limits.min_chinese)

    def _place(self, number: int) -> str:
        return next(self._rows([number]))[2]["origin"]["place"]

    def _rows(self, numbers: Iterable[int]) -> Iterator[tuple[int, list[Any], dict[str, Any]]]:
        self._spool.flush()
        with Path(self._spool.name).open("rb") as file:
            after = -1
            for number in numbers:
                if number != after:
                    file.seek(self._offsets[number])
                head, row = json.loads(file.readline())
                yield number, head, row
                after = number + 1


@dataclass
class Corpus:
    """The files of a corpus as they are written: FOLDER/train/tasks/medkqa/textbook-00000.jsonl."""

    folder: Path
    shard_rows: int
    files: list[dict[str, Any]] = field(default_factory=list)  # the manifest's
    statistics: dict[tuple[str, str], Statistics] = field(default_factory=dict)  # by table and source
    topics: Counter[str] = field(default_factory=Counter)  # rows by disease or department
    lengths: dict[str, Counter[int]] = field(default_factory=dict)  # rows by floor(2 log2 characters), by table
    contradictions: int = 0

    def __post_init__(self) -> None:
        self._open: dict[tuple[str, str, str], tuple[dict[str, Any], Any]] = {}  # entries and checksums of shards
        self._handles: dict[tuple[str, str, str], IO[bytes]] = {}  # not of all: a process may open a few hundred files
        self._shards: Counter[tuple[str, str, str]] = Counter()
        self._tasks: Counter[str] = Counter()

    def write(self, part: str, table: str, source: str, record: Record, row: dict[str, Any], topic: str) -> None:
        """One row into its shard, and into the statistics."""
        key = (part, table, source)
        if key in self._open and self._open[key][0]["rows"] == self.shard_rows:
            self._finish(key)
        if key not in self._open:
            name = f"{part}/{table}/{source}-{self._shards[key]:05}.jsonl"
            self._shards[key] += 1
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            entry: dict[str, Any] = {
                "path": name, "side": part, "table": table, "source": source, "stages": stages(table),
                "kind": KINDS[type(record)], "rows": 0,
            }  # fmt: skip
            self.files.append(entry)
            self._open[key] = entry, hashlib.sha256()
        counts, checksum = self._open[key]
        if key not in self._handles:
            if len(self._handles) >= 100:
                self._handles.pop(next(iter(self._handles))).close()
            self._handles[key] = (self.folder / counts["path"]).open("ab")
        line = _line(row)
        self._handles[key].write(line)
        checksum.update(line)
        counts["rows"] += 1

        counted = self.statistics.setdefault((table, source), Statistics())
        counted.rows += 1
        counted.heldout += part == "heldout"
        asked, answered = 0, len(record.text) if isinstance(record, Document) else 0
        if isinstance(record, Conversation):
            for message in record.messages:
                counted.turns += message.role == "user"
                asked += len(message.content) * (message.role == "user")
                answered += len(message.content) * (message.role == "assistant")
        elif isinstance(record, PreferencePair):
            counted.turns += sum(message.role == "user" for message in record.prompt)
            asked, answered = sum(len(message.content) for message in record.prompt), len(record.chosen)
        counted.asked += asked
        counted.answered += answered
        self.lengths.setdefault(table, Counter())[int(2 * math.log2(max(1, asked + answered)))] += 1
        if table != "tasks_sample":  # it repeats others
            self.topics[topic] += 1

    def sampled(self, table: str, share: float) -> bool:
        """Whether the next row of this table is one of an evenly spread share."""
        i = self._tasks[table]
        self._tasks[table] += 1
        return int((i + 1) * share) > int(i * share)

    def close(self) -> None:
        """Finish all files; they are listed in an order that depends on their names alone."""
        for key in list(self._open):
            self._finish(key)
        self.files.sort(key=lambda file: file["path"])

    def _finish(self, key: tuple[str, str, str]) -> None:
        entry, checksum = self._open.pop(key)
        entry["sha256"] = checksum.hexdigest()
        if key in self._handles:
            self._handles.pop(key).close()


def _place(place: str, source: Source) -> str:
    """ "file:line" with the file's path in the source's folder, or its name, or its last two parts: a path of this
    machine is never written."""
    for file in source.files:
        if place.startswith(str(file)):
            alike = sum(other.name == file.name for other in source.files) > 1
            parts = file.relative_to(source.root).parts if source.root else file.parts[-2 if alike else -1 :]
            place = "/".join(parts) + place[len(str(file)) :]
            break
    return place.encode(errors="replace").decode()  # a file's name may be no UTF-8


def _line(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _as_row(record: Record) -> dict[str, Any]:
    topic = {key: value for key in ("disease", "department") if (value := getattr(record, key))}
    if isinstance(record, Document):
        return {**({"title": record.title} if record.title else {}), "text": record.text, **topic}
    if isinstance(record, PreferencePair):
        return {"prompt": _turns(record.prompt), "chosen": record.chosen, "rejected": record.rejected, **topic}
    return {"messages": _turns(record.messages), **({"task": record.task} if record.task else {}), **topic}


def items(record: Record) -> list[str]:
    """What an evaluation row asks and answers.

    What a patient says later is left out, as it means little by itself: 好的，谢谢医生的建议 is in many dialogues.
    """
    if isinstance(record, Document):
        return [record.text]
    if isinstance(record, PreferencePair):
        return [question(record), record.chosen, record.rejected]
    return [question(record), *(message.content for message in record.messages if message.role == "assistant")]


def messages(record: Record) -> list[str]:
    """The texts of a record, each once, beginning with its question."""
    return list(dict.fromkeys([question(record), *texts(record)]))


def _turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [
        {"role": message.role, "content": message.content}
        | ({} if message.loss else {"loss": False})
        | ({"reasoning_content": message.reasoning} if message.reasoning else {})
        for message in messages
    ]


def _message(turn: dict[str, Any]) -> Message:
    return Message(turn["role"], turn["content"], turn.get("loss", True), turn.get("reasoning_content", ""))


def _record(row: dict[str, Any]) -> Record:
    if "messages" in row:
        return _conversation(row)
    place, topic = row["origin"]["place"], (row.get("disease", ""), row.get("department", ""))
    if "text" in row:
        return Document(row["text"], place, row.get("title", ""), *topic)
    prompt = tuple(map(_message, row["prompt"]))
    return PreferencePair(prompt, row["chosen"], row["rejected"], place, *topic)


def _conversation(row: dict[str, Any]) -> Conversation:
    messages = tuple(map(_message, row["messages"]))
    topic = (row.get("disease", ""), row.get("department", ""))
    return Conversation(messages, row["origin"]["place"], row.get("task", ""), *topic)
