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

from pedgpt import adapters, data
from pedgpt.data.tasks import TASKS
from pedgpt.evaluation.generation_metrics import generation_scores, signature
from pedgpt.evaluation.likelihood import pair_logps, perplexity, preference_scores
from pedgpt.evaluation.responses import answer, items, thin
from pedgpt.files import write_json
from pedgpt.models import ModelConfig, load_model, weights_fingerprint
from pedgpt.training import run_recipe, start


@dataclass(kw_only=True)
class Config(data.FormatSettings):
    lock_beside: ClassVar[bool] = True
    model: str  # folder of the model
    heldout: str  # folder of held-out data
    output: str = ""  # JSON file for the results; empty: print only
    adapter: str = ""  # folder of an adapter to attach
    any_base: bool = False  # use the adapter although it was trained on another model
    uniform_routing: bool = False  # equal gates where an adapter of the published code lacks its routers
    reference: str = ""  # folder of the model that DFPO started from, for reward accuracy
    limit: int = 60  # answers to generate a task
    text_limit: int = 300  # documents of each text to measure perplexity on
    max_new_tokens: int = 96  # of each answer
    max_thinking_tokens: int = 1024  # additional tokens for the reasoning of a thinking model, which is not scored
    row_length: int = 0  # tokens a row, longer rows are skipped and counted; 0: what the model takes, at most 1024
    batch_size: int = 8  # rows per scoring pass
    generation_batch_size: int = 32  # answers decoded together
    columns: list[str] = field(default_factory=list)  # field=column, e.g. question=ask, if the column's name is unknown
    dtype: str = "float32"  # of the weights: float32 or bfloat16
    device: str = "auto"  # auto, cpu or cuda


def main(config: Config) -> None:
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f'dtype must be "float32" or "bfloat16", found {config.dtype!r}')
    if min(config.batch_size, config.generation_batch_size, config.limit, config.text_limit) < 1:
        raise ValueError("batch_size, generation_batch_size, limit and text_limit must be at least 1")
    scored_with = signature()  # fails at once without the packages
    began = time.perf_counter()
    heldout = Path(config.heldout)
    if not heldout.is_dir():
        raise ValueError(f"--heldout {heldout}: no such folder")
    if config.adapter and not config.any_base:
        adapters.check_base(config.adapter, config.model, weights_fingerprint(config.model))
    device = start(config.device).device
    tokenizer = data.load_tokenizer(data.taught_folder(config.model, config.adapter))
    for folder in filter(None, (config.model, config.reference)):
        sizes = ModelConfig.from_hf(folder)
        tokenizer.check_fits(sizes.vocab_size, folder)
        config.row_length = config.row_length or min(1024, sizes.max_position_embeddings)
        sizes.check_length(config.row_length)
    chat = config.format(tokenizer)
    summary = data.ReadSummary()
    tasks, task_rows, rows, pairs = read_heldout(heldout, config, chat, summary)
    if not (any(tasks.values()) or any(rows.values()) or pairs):
        raise ValueError(f"--heldout {heldout}: nothing to evaluate on; expected tasks/, text/ or preferences/")

    # The reference first, so that two models are never in memory together.
    def load(folder):
        return load_model(folder, dtype=getattr(torch, config.dtype), device=device)

    reference_logps = pair_logps(load(config.reference), pairs, config.batch_size) if config.reference else None
    model = load(config.model)
    if config.adapter:
        adapters.load_adapter(model, config.adapter, uniform_routing=config.uniform_routing)
        adapters.pack_adapters(model)
    model.eval()

    scores, samples, gates, entropy = {}, [], {}, {}
    room = {"max_new_tokens": config.max_new_tokens, "max_thinking_tokens": config.max_thinking_tokens}
    for name, conversations in tasks.items():
        if questions := items(conversations, config.limit):
            answers = answer(model, chat, questions, **room, batch_size=config.generation_batch_size)
            scores[name] = {"rows": len(questions), **generation_scores([q.reference for q in questions], answers)}
            for question, text in list(zip(questions, answers, strict=True))[:: max(1, len(questions) // 3)][:3]:
                asked = {"task": name, "question": question.history[-1].content}
                samples.append({**asked, "reference": question.reference, "answer": text})
    perplexities = {name: perplexity(model, packed, config.batch_size) for name, packed in rows.items() if packed}
    if any(isinstance(layer, adapters.ExpertLoRALinear) for layer in model.modules()):
        for name, packed in task_rows.items():
            if packed:
                gates[name], entropy[name] = expert_weights(model, packed)
    preference = None
    if pairs:
        found = preference_scores(pair_logps(model, pairs, config.batch_size), pairs, reference_logps)
        preference = dataclasses.asdict(found)

    results = {
        "model": config.model,
        "adapter": config.adapter or None,
        "signature": scored_with,
        "template_date": chat.today or None,
        "seconds": time.perf_counter() - began,
        "tasks": scores,
        "perplexity": perplexities,
        "tokens": {name: sum(len(row.tokens) for row in packed) for name, packed in rows.items()},
        "preference": preference,
        "gates": gates or None,
        "gate_entropy": entropy or None,
        "skipped": len(summary.skipped),
        "samples": samples,
    }
    print_table(results)
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(config.output), results)


def read_heldout(heldout: Path, config: Config, chat, summary):
    """Conversations by task, their packed rows, packed rows by perplexity, and pairs.

    What is too long for a row is left out everywhere, and counted.
    """
    policy, columns = {"on_bad_row": "skip", "summary": summary}, data.parse_columns(config.columns)
    tokenizer, length, tasks, task_rows, pairs = chat.tokenizer, config.row_length, {}, {}, []
    for name, folder in TASKS.items():
        for path in table(heldout / folder):
            conversations = data.read_conversations(path, columns=columns, **policy)
            examples = data.encode_conversations(conversations, chat, length, on_long_row="skip", **policy)
            fitting = {example.source for example in examples}
            tasks[name] = [conversation for conversation in conversations if conversation.source in fitting]
            task_rows[name] = data.pack(examples, length)
    rows = {"instructions": [row for packed in task_rows.values() for row in packed]}
    for path in (path for path in sorted((heldout / "text").glob("*")) if path.is_dir() or path.suffix == ".jsonl"):
        documents = thin(data.read_documents(path, columns=columns, **policy), config.text_limit)
        ends = {"eos_id": tokenizer.eos_id, "row_length": length, "prefix": tokenizer.document_prefix}
        texts = tokenizer.encode_batch([row.text for row in documents])
        rows[f"{path.stem}_text"] = data.pack([p for ids in texts for p in data.encode_document(ids, **ends)], length)
    for path in table(heldout / "preferences"):
        found = data.read_preferences(path, columns=columns, **policy)
        pairs = data.encode_pairs(found, chat, length, on_long_row="skip", **policy)
    return tasks, task_rows, rows, pairs


def table(path: Path) -> list[Path]:
    """The folder of a table's files, or its one file; nothing if it is absent."""
    return [found for found in (path, path.with_suffix(".jsonl")) if found.exists()][:1]


def expert_weights(model, rows) -> tuple[list[float], float]:
    """Mean gate weight of each specific expert and mean entropy of the gates [nats] over all layers.

    A row at a time, so that no padding is counted.
    """
    with adapters.record_gates(model) as records:
        perplexity(model, rows, batch_size=1)
    weights = torch.tensor([record.mean() for record in records.values()]).mean(0).tolist()
    return weights, sum(record.entropy() for record in records.values()) / len(records)


def print_table(results: dict) -> None:
    print(f"{results['model']}{' + ' + results['adapter'] if results['adapter'] else ''}")
    columns = ("rouge-1", "rouge-2", "rouge-l", "bleu-1", "bleu-4", "gleu", "distinct-1", "distinct-2")
    print(f"  {'task':12}{'rows':>6}" + "".join(f"{name:>12}" for name in columns))
    for name, scores in results["tasks"].items():
        print(f"  {name:12}{scores['rows']:>6}" + "".join(f"{scores[column]:>12.2f}" for column in columns))
    print(f"  {results['signature']}")
    print("  perplexity: " + ", ".join(f"{name} {value:.2f}" for name, value in results["perplexity"].items()))
    if preference := results["preference"]:
        found = {name.replace("_", " "): value for name, value in preference.items() if value is not None}
        shown = [f"{name} {value:.3f}" for name, value in found.items() if name != "pairs"]
        print(f"  preference on {preference['pairs']} pairs: {', '.join(shown)}")
    for name, weights in (results["gates"] or {}).items():
        shown, most = " ".join(f"{weight:.3f}" for weight in weights), math.log(len(weights))
        print(f"  expert weights on {name}: {shown}, entropy {results['gate_entropy'][name]:.3f} of at most {most:.3f}")
    if results["skipped"]:
        print(f"  {results['skipped']} held-out rows skipped as bad or over-long")


if __name__ == "__main__":
    run_recipe(main, Config)
