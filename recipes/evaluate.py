"""Evaluate a model on held-out data: answers by task, perplexities, preferences, expert weights (PediatricsGPT §4).

    python recipes/evaluate.py --model runs/demo/dfpo/model --adapter runs/demo/experts/adapter \\
        --heldout runs/demo/corpus/heldout --output runs/demo/evaluation/experts.json

`heldout` is a folder as build_corpus.py writes it, with tasks/, text/ and preferences/; what is absent is left out.
Each of tasks/medkqa, text/pediatric and so on may be a folder of JSONL files or one such file.
"""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from pedgpt import data
from pedgpt.adapters import ExpertLoRALinear
from pedgpt.evaluation import routing
from pedgpt.evaluation.generation_metrics import signature
from pedgpt.evaluation.heldout import read_heldout
from pedgpt.evaluation.likelihood import document_losses, pair_logps, preference_values
from pedgpt.evaluation.report import between
from pedgpt.evaluation.responses import Answers, answer, questions_of, read_answers, write_answers
from pedgpt.evaluation.run import scored
from pedgpt.evaluation.system import SystemSettings
from pedgpt.files import write_json, write_text
from pedgpt.models import ModelConfig, load_model
from pedgpt.training import run_recipe, start

PRINTED = ("rouge-1", "rouge-2", "rouge-l", "bleu-1", "bleu-4", "gleu", "distinct-1", "distinct-2")


@dataclass(kw_only=True)
class Config(SystemSettings):
    lock_beside: ClassVar[bool] = True
    heldout: str  # folder of held-out data
    output: str = ""  # JSON file for the results; empty: print only
    answers: str = ""  # JSONL file for the generated answers, which judge.py and doctors.py compare; empty: none
    reference: str = ""  # folder of the model that DFPO started from, for reward accuracy
    limit: int = 60  # answers to generate a task
    text_limit: int = 300  # documents of each text to measure perplexity on
    max_new_tokens: int = 96  # of each answer
    max_thinking_tokens: int = 1024  # additional tokens for the reasoning of a thinking model, which is not scored
    row_length: int = 0  # tokens a row, longer rows are skipped and counted; 0: what the model takes, at most 1024
    batch_size: int = 8  # rows per scoring pass
    generation_batch_size: int = 32  # answers decoded together
    columns: list[str] = field(default_factory=list)  # field=column, e.g. question=ask, if the column's name is unknown


def main(config: Config) -> None:
    if min(config.batch_size, config.generation_batch_size, config.limit, config.text_limit) < 1:
        raise ValueError("batch_size, generation_batch_size, limit and text_limit must be at least 1")
    if not Path(config.heldout).is_dir():
        raise ValueError(f"--heldout {config.heldout}: no such folder")
    signature()  # fails at once without the packages
    began = time.perf_counter()
    chat = config.load_chat()
    about = {"model": config.model, "adapter": config.adapter or None}
    if config.answers and Path(config.answers).exists():  # such a file may have cost money
        if not about.items() <= read_answers(config.answers).about.items():
            raise ValueError(f"--answers {config.answers}: holds another system's answers; delete it, or rename one")
    device = start(config.device).device
    for folder in filter(None, (config.model, config.reference)):
        sizes = ModelConfig.from_hf(folder)
        chat.tokenizer.check_fits(sizes.vocab_size, folder)
        config.row_length = config.row_length or min(1024, sizes.max_position_embeddings)
        sizes.check_length(config.row_length)
    summary = data.ReadSummary()
    limits = {"row_length": config.row_length, "text_limit": config.text_limit}
    columns = data.parse_columns(config.columns)
    tasks, task_rows, rows, pairs = read_heldout(Path(config.heldout), chat, summary, columns, **limits)

    reference_logps = None
    if config.reference:  # first, so that two models are never in memory together
        precision = {"dtype": getattr(torch, config.dtype), "quantize": config.quantize, "device": device}
        reference_logps = pair_logps(load_model(config.reference, **precision), pairs, config.batch_size)
    model = config.load_model(device)

    said = answer_tasks(model, chat, tasks, config)
    losses = {name: document_losses(model, packed, config.batch_size) for name, packed in rows.items() if packed}
    values = {"perplexity": {name: found.tolist() for name, found in losses.items()}}
    if pairs:
        values["preference"] = preference_values(pair_logps(model, pairs, config.batch_size), pairs, reference_logps)
    experts = any(isinstance(layer, ExpertLoRALinear) for layer in model.modules())
    asked = routing.measure(model, task_rows) if experts else {"gates": None, "unused_experts": []}
    results = {**about, "template_date": chat.today or None, **scored(said, **values)}
    results["preference"] = {"pairs": len(pairs), "reward_accuracy": None, **results["preference"]} if pairs else None
    results |= {"seconds": time.perf_counter() - began, **asked}
    results["tokens"] = {name: sum(len(one.tokens) for row in packed for one in row) for name, packed in rows.items()}
    results["skipped"] = len(summary.skipped)
    print_table(results)
    if config.answers and said.questions:  # before the results, whose presence says that all is done
        write_answers(config.answers, said)
    if config.output:
        if experts:
            write_routing(model, chat, task_rows, Path(config.output).with_suffix(".html"))
        write_json(Path(config.output), results)


def answer_tasks(model, chat, tasks, config: Config) -> Answers:
    """The answers to at most `limit` questions of each task."""
    room = {"max_new_tokens": config.max_new_tokens, "max_thinking_tokens": config.max_thinking_tokens}
    questions, answers = [], []
    for task, conversations in tasks.items():
        asked = [dataclasses.replace(one, task=task) for one in questions_of(conversations, config.limit)]
        batches = answer(model, chat, asked, **room, batch_size=config.generation_batch_size)
        found = {number: said for batch in batches for number, said in batch.items()}
        questions += asked
        answers += [found[i] for i in range(len(asked))]
    about = {"model": config.model, "adapter": config.adapter or None, "decoding": {**room, "temperature": 0}}
    return Answers(Path(config.answers).stem, questions, answers, {**about, "seed": 0})


def write_routing(model, chat, task_rows, path: Path) -> None:
    """A page with the first held-out conversation of each task, its tokens in the colors of their experts."""
    texts = {}
    for task, packed in task_rows.items():
        if packed:
            ids = packed[0][0].tokens
            gates = routing.token_gates(model, torch.tensor(ids, device=model.head_weight().device))
            texts[task] = (routing.pieces(chat.tokenizer, ids), gates)
    write_text(path, routing.page(texts))


def print_table(results: dict) -> None:
    print(f"{results['model']}{' + ' + results['adapter'] if results['adapter'] else ''}; 95 % intervals in brackets")
    figures = results["figures"]
    for name, found in figures["tasks"].items():
        scores = ", ".join(f"{metric} {between(found[metric], digits=2)}" for metric in PRINTED)
        about = results["tasks"][name]
        print(f"  {name}, {about['rows']} questions, {about['empty']} empty answers: {scores}")
    print(f"  {results['signature']}")
    for name, found in figures["perplexity"].items():
        print(f"  perplexity of {name}: {between(found, digits=2)}")
    for name, found in figures["preference"].items():
        print(f"  {name.replace('_', ' ')}, {results['preference']['pairs']} pairs: {between(found, digits=3)}")
    for name, weights in (results["gates"] or {}).items():
        shares, found = " ".join(f"{weight:.3f}" for weight in weights), results["gate_entropy"][name]
        print(f"  expert weights on {name}: {shares}, entropy {found:.3f} of at most {math.log(len(weights)):.3f}")
    for line in results["unused_experts"]:
        print(f"  {line}")
    if results["skipped"]:
        print(f"  {results['skipped']} held-out rows skipped as bad or over-long")


if __name__ == "__main__":
    run_recipe(main, Config)
