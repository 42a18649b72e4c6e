"""Write one system's answers to a set of questions: what judge.py, exam.py, doctors.py and report.py compare.

    python recipes/answer.py --adapter runs/demo/experts/adapter --questions runs/demo/corpus/heldout/tasks \\
        --output runs/demo/answers/experts.jsonl
    python recipes/answer.py --endpoint other.toml --exam path/to/PediaBench/data --output answers/other.jsonl

The system is a model of ours, with an adapter if wanted, or any OpenAI-compatible endpoint, whose TOML file is like
recipes/configs/judge.toml. Each line holds question, history, task, reference, answer, reasoning, and what made the
answer. The name of the file names the system. A run that was stopped goes on where it ended.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

from pedgpt.data import Message, parse_columns, read_conversations
from pedgpt.data.tasks import TASKS
from pedgpt.endpoint import Endpoint, Unusable, in_order, load_endpoint
from pedgpt.evaluation.exams import as_questions, read_exam
from pedgpt.evaluation.responses import (
    Answers,
    Question,
    answer,
    as_row,
    check_output,
    questions_of,
    read_answers,
    read_part,
    set_hash,
    write_answers,
)
from pedgpt.evaluation.system import SystemSettings
from pedgpt.training import run_recipe, start


@dataclass(kw_only=True)
class Config(SystemSettings):
    lock_beside: ClassVar[bool] = True
    output: str  # JSONL file to write; its name, without .jsonl, names the system
    questions: list[str] = field(default_factory=list)  # files or folders of conversations
    exam: str = ""  # file or folder of an exam, instead of questions
    limit: int = 0  # questions of each task, evenly spread; 0: all
    endpoint: str = ""  # TOML file of an endpoint that answers, instead of a model
    temperature: float = 0.0  # 0 takes the most probable token
    top_k: int | None = None  # sample among this many most probable tokens; of a model only
    top_p: float | None = None  # sample among the most probable tokens of this total; of a model only
    repetition_penalty: float = 1.0  # above 1 makes repeated tokens less likely; of a model only
    max_new_tokens: int = 256  # of each answer; of an endpoint that reasons, of reasoning and answer together
    max_thinking_tokens: int = 1024  # additional tokens for the reasoning of a thinking model; of a model only
    seed: int = 0  # of the sampling; of a model only
    batch_size: int = 32  # answers decoded together
    columns: list[str] = field(default_factory=list)  # field=column, e.g. question=ask, if the column's name is unknown


def main(config: Config) -> None:
    if bool(config.questions) == bool(config.exam) or bool(config.endpoint) == bool(config.model or config.adapter):
        raise ValueError("give --questions or --exam, and --endpoint or --model and --adapter")
    for name in ("top_k", "top_p", "repetition_penalty", "seed") if config.endpoint else ():
        if getattr(config, name) != getattr(Config, name):
            raise ValueError(f"{name} is not sent to an endpoint, so its answers would not follow it; leave it out")
    check_output(config.output, config.exam, *config.questions)
    questions = read_questions(config)
    decoding = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    decoding |= {name: getattr(config, name) for name in ("max_new_tokens", "max_thinking_tokens")}
    output, part = Path(config.output), Path(f"{config.output}.part")
    if config.endpoint:
        settings = load_endpoint(config.endpoint)
        settings.temperature, settings.max_tokens = config.temperature, config.max_new_tokens
        about = {"model": settings.model, "adapter": None, "weights": settings.url}
    else:
        chat = config.load_chat()
        about = {"model": config.model, "adapter": config.adapter or None, "weights": config.weights()}
        names = ("chat_format", "enable_thinking", "template_date", "uniform_routing", "dtype", "quantize")
        about["decoding"] = decoding | {name: getattr(config, name) for name in names}
    about = {"decoding": decoding, **about, "seed": config.seed, "question_set": set_hash(questions)}
    if output.exists() and read_answers(output).about == about:
        return print(f"{output}: answered already")
    if output.exists():
        other = "answers of another system or set, or by other settings"
        raise ValueError(f"{output}: holds {other}; delete it, or give another --output")
    found = read_part(part, about)  # which makes the file if there is none
    with (
        part.open("a", encoding="utf-8") as file,
        tqdm(total=len(questions), initial=len(found), desc=output.stem) as bar,
    ):
        if config.endpoint:
            batches = ask_endpoint(settings, f"{output}.sqlite", questions, found)
        else:
            model = config.load_model(start(config.device).device)
            batches = answer(
                model, chat, questions, batch_size=config.batch_size, seed=config.seed, done=found, **decoding
            )
        for batch in batches:
            for number, said in batch.items():
                row = as_row(questions[number], said, about, number + 1, len(questions))
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch.keys() - found.keys()))
            found |= batch
    write_answers(output, Answers(output.stem, questions, [found[i] for i in range(len(questions))], about))
    part.unlink()
    empty = sum(not said.content for said in found.values())
    print(f"{output}: {len(questions)} answers, {empty} of them empty")


def read_questions(config: Config) -> list[Question]:
    if config.exam:
        return as_questions(read_exam(config.exam))
    columns, questions = parse_columns(config.columns), []
    names = {path.rpartition("/")[2]: task for task, path in TASKS.items()}
    for path in map(Path, config.questions):
        folders = [child for child in sorted(path.glob("*")) if child.stem in names] if path.is_dir() else []
        for place in folders or [path]:  # a folder of tasks is one task after the other
            rows = questions_of(read_conversations(place, columns=columns), config.limit or None)
            task = names.get(place.stem, "")
            questions += [Question(row.history, row.reference, row.task or task) for row in rows]
    if not questions:
        raise ValueError(f"{', '.join(config.questions)}: holds no answer to ask for")
    return questions


def ask_endpoint(settings, cache, questions, found):
    """Each answer of an endpoint, with its number; one that it refuses is empty, and its reasoning says why."""

    def ask(number):
        messages = [{"role": said.role, "content": said.content} for said in questions[number].history]
        try:
            said = endpoint.ask(messages)
            if said.startswith("<think>") and "</think>" not in said:
                return {number: Message("assistant", "", reasoning=said)}  # as of a model: it never came to an answer
            return {number: Message("assistant", said)}
        except Unusable as error:
            return {number: Message("assistant", "", reasoning=f"[no answer: {error}]")}

    with Endpoint(settings, cache) as endpoint:
        missing = [i for i in range(len(questions)) if i not in found]
        yield from in_order(missing, ask, workers=settings.concurrency)
        print(endpoint.describe())


if __name__ == "__main__":
    run_recipe(main, Config)
