"""Questions, the answers of one system to them, and the JSONL file that holds both; all comparisons read such files."""

from __future__ import annotations

import hashlib
import json
import tomllib
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pedgpt.data.chat import ChatFormat
from pedgpt.data.examples import encode_prompt
from pedgpt.data.records import Conversation, Message
from pedgpt.files import write_text
from pedgpt.models.generation import generate
from pedgpt.models.transformer import Transformer

T = TypeVar("T")
KEYS = ("history", "question", "task", "reference", "answer", "reasoning", "question_set")  # of a row, at least
SAME = ("question_set", "model", "adapter", "weights", "seed", "decoding")  # equal in all rows of a file


@dataclass(frozen=True)
class Question:
    """One assistant turn to be written: the true conversation before it, the true answer if it is known, the task."""

    history: tuple[Message, ...]
    reference: str = ""
    task: str = ""

    @property
    def text(self) -> str:
        """What the user asks last."""
        return self.history[-1].content

    @property
    def conversation(self) -> str:
        """What the turns of one conversation have in common: they are not independent of each other."""
        return next(message.content for message in self.history if message.role == "user")


@dataclass(frozen=True)
class Answers:
    """What one system answered to a set of questions, in their order; `about` holds the values of `SAME`."""

    name: str
    questions: list[Question]
    answers: list[Message]
    about: dict[str, Any] = field(default_factory=dict)

    def tasks(self) -> dict[str, list[int]]:
        """The numbers of the questions of each task, from 0."""
        found: dict[str, list[int]] = {}
        for number, question in enumerate(self.questions):
            found.setdefault(question.task, []).append(number)
        return found

    def choose(self, numbers: Sequence[int]) -> Answers:
        """The same for some of the questions."""
        return replace(self, questions=[self.questions[i] for i in numbers], answers=[self.answers[i] for i in numbers])


@cache
def template(name: str) -> dict[str, Any]:
    """templates/NAME.toml."""
    path = files("pedgpt.evaluation").joinpath(f"templates/{name}.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def questions_of(conversations: Iterable[Conversation], limit: int | None = None) -> list[Question]:
    """Every assistant turn of every conversation, thinned evenly to at most `limit`.

    An answer without a letter or digit ("...") cannot be scored by words and is left out.
    """
    found = [
        Question(conversation.messages[:i], message.content, conversation.task)
        for conversation in conversations
        for i, message in enumerate(conversation.messages)
        if message.role == "assistant" and any(map(str.isalnum, message.content))
    ]
    return found if limit is None else thin(found, limit)


def thin(rows: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of the rows, evenly spread."""
    count = min(limit, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def set_hash(questions: Iterable[Question]) -> str:
    """A short name of a set of questions: equal for equal questions in equal order."""
    told = [
        [[(message.role, message.content) for message in question.history], question.reference, question.task]
        for question in questions
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def answer(
    model: Transformer,
    chat: ChatFormat,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    max_thinking_tokens: int = 0,
    batch_size: int = 32,
    seed: int = 0,
    done: Container[int] = (),
    **sampling: Any,
) -> Iterator[dict[int, Message]]:
    """The model's answers by the number of their question, a batch at a time, without the batches that are `done`.

    Prompts of like length are decoded together, greedily unless `sampling` says otherwise. Reasoning is not part of an
    answer. Where the format asks for reasoning, the model may write `max_thinking_tokens` more, as far as its window
    reaches, and the answer after it is cut to `max_new_tokens`. Reasoning that does not end gives an empty answer.
    """
    prompts = [encode_prompt(question.history, chat) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    unfinished = 0
    sampling["stop_tokens"] = {*chat.stop_tokens, *sampling.get("stop_tokens", ())}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        if all(i in done for i in chosen):
            continue
        window = model.config.max_position_embeddings - len(prompts[chosen[-1]])  # of the longest prompt
        room = max(max_new_tokens, min(max_new_tokens + max_thinking_tokens, window)) if chat.thinks else max_new_tokens
        outputs = generate(model, [prompts[i] for i in chosen], max_new_tokens=room, seed=seed + start, **sampling)
        found = {}
        for i, ids in zip(chosen, outputs, strict=True):
            said = chat.read_answer(chat.tokenizer.decode(ids))
            unfinished += bool(said.reasoning and not said.content)
            content = said.content
            if room > max_new_tokens:
                content = chat.tokenizer.decode(chat.tokenizer.encode(content)[:max_new_tokens]).strip()
            found[i] = Message("assistant", content, reasoning=said.reasoning)
        yield found
    if unfinished:
        more = "raise max_thinking_tokens" if chat.thinks else "set enable_thinking, which gives it max_thinking_tokens"
        warnings.warn(
            f"{unfinished} of {len(prompts)} answers are empty: their reasoning did not end; {more}", stacklevel=2
        )


def as_row(question: Question, answer: Message, about: Mapping[str, Any], number: int, count: int) -> dict[str, Any]:
    """A line of a file of answers; `number` counts from 1 to `count`."""
    history = [{"role": message.role, "content": message.content} for message in question.history[:-1]]
    told = {"history": history, "question": question.text, "task": question.task, "reference": question.reference}
    return {"number": number, "of": count, **told, "answer": answer.content, "reasoning": answer.reasoning, **about}


def write_answers(path: str | Path, found: Answers) -> None:
    """Write all answers at once, so that the file is whole or not there."""
    about = {**found.about, "question_set": set_hash(found.questions)}
    count = len(found.questions)
    pairs = enumerate(zip(found.questions, found.answers, strict=True), 1)
    rows = [as_row(question, said, about, number, count) for number, (question, said) in pairs]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_answers(path: str | Path) -> Answers:
    """Read a file of answers, also one that another program wrote with the same keys.

    Raises ValueError naming the line that is no answer or is of another set or system, or what is missing.
    """
    path = Path(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a file of answers ({error})") from None
    found, about, count = _read_lines(path, lines)
    if not found or len(found) < count:
        missing = f"{len(found)} of {count} answers" if found else "no answers"
        raise ValueError(f"{path}: holds {missing}; run answer.py to its end")
    questions, answers = zip(*(found[number] for number in sorted(found)), strict=True)
    about["question_set"] = set_hash(questions)  # another program may have written anything
    return Answers(path.stem, list(questions), list(answers), about)


def _read_lines(
    path: Path, lines: Sequence[str], about: Mapping[str, Any] | None = None
) -> tuple[dict[int, tuple[Question, Message]], dict[str, Any], int]:
    """Questions and answers by number from 1, what all lines have in common, and how many lines there should be.

    Raises ValueError for a line that is no answer, or is of another system or set than `about` or the first line.
    """
    rows: dict[int, tuple[Question, Message]] = {}
    found, count = dict(about or {}), len(lines)
    for line_number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            history = [Message(said["role"], said["content"]) for said in row["history"]]
            texts = [*(row[key] for key in KEYS[1:]), *(said.content for said in history)]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("a text is no string")
            if strange := {said.role for said in history} - {"system", "user", "assistant"}:
                raise ValueError(f"role {min(strange)!r}, expected system, user or assistant")
            "".join(texts).encode()  # half a surrogate pair is no text
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else error
            expected = f"expected the keys {', '.join(KEYS)}"
            raise ValueError(f"{path}:{line_number}: not an answer ({reason}); {expected}") from None
        found, count = found or {key: row.get(key) for key in SAME}, row.get("of", count)
        if differing := [key for key in SAME if found.get(key) != row.get(key)]:
            told = "a file holds one system's answers to one set; delete it, or name another"
            raise ValueError(f"{path}:{line_number}: is of another {differing[0]}; {told}")
        question = Question((*history, Message("user", row["question"])), row["reference"], row["task"])
        rows[row.get("number", line_number)] = question, Message("assistant", row["answer"], reasoning=row["reasoning"])
    return rows, found, count


def read_part(path: Path, about: Mapping[str, Any]) -> dict[int, Message]:
    """The answers, by number from 0, that a stopped run left in `path`, which then holds only whole lines.

    Raises ValueError if they are of another system or set.
    """
    text = path.read_bytes().rpartition(b"\n")[0].decode() if path.exists() else ""  # the last line was being written
    lines = text.split("\n") if text else []
    found, _, _ = _read_lines(path, lines, about)
    write_text(path, "".join(f"{line}\n" for line in lines))
    return {number - 1: said for number, (_, said) in found.items()}


def check_output(output: str | Path, *inputs: str | Path) -> None:
    """Raise ValueError if `output` is a folder, or one of the files that are read, or lies in a folder of them."""
    if output and Path(output).is_dir():
        raise ValueError(f"--output {output}: is a folder; give the name of a file in it")
    whole = Path(output).resolve()
    for path in inputs:
        if output and path and Path(path).resolve() in (whole, *whole.parents):
            raise ValueError(f"--output {output}: is among the files to be read, {path}; choose another place")


def read_systems(paths: Sequence[str | Path]) -> list[Answers]:
    """Files of answers of several systems to the same questions; ValueError for other questions or equal names."""
    systems = [read_answers(path) for path in paths]
    for path, system in zip(paths, systems, strict=True):
        if system.questions != systems[0].questions:
            raise ValueError(f"{path}: answers other questions than {paths[0]}; compare answers to one set")
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two files are named {name}.jsonl, which names the system; rename one")
    return systems
