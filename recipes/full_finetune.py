"""Stage 2, full-parameter supervised fine-tuning on conversations.

    python recipes/full_finetune.py --config recipes/configs/demo/sft.toml --model runs/demo/cpt/model \\
        --output runs/demo/sft --instructions runs/demo/corpus/train/generalist
    torchrun --nproc-per-node 8 recipes/full_finetune.py --config recipes/configs/baichuan2_7b/sft.toml \\
        --model runs/7b/cpt/model --output runs/7b/sft --instructions path/to/instructions

Only the assistant's tokens carry loss. Conversations are packed; attention never crosses from one to another.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from pedgpt import training
from pedgpt.data import (
    ReadSummary,
    chat_format,
    collate,
    encode_conversations,
    fingerprint,
    load_tokenizer,
    pack,
    parse_columns,
    read_conversations,
    utilization,
)
from pedgpt.data.packing import Row
from pedgpt.kernels.cpu import products
from pedgpt.losses import linear_cross_entropy
from pedgpt.models import ModelConfig, load_model, load_weights, model_fingerprint, round_weights, save_model
from pedgpt.training.plan import print_plan


@dataclass(kw_only=True)
class Config(training.TrainingSettings):
    model: str  # folder of the model of stage 1
    instructions: list[str]  # conversations to train on: files or folders
    heldout_instructions: list[str] = field(default_factory=list)  # for the evaluation during training
    chat_format: str = "auto"  # auto, baichuan2, chatml, llama3, or template (the model's own)
    enable_thinking: bool | None = None  # of a thinking model: false leaves reasoning out; unset, the template decides
    template_date: str = ""  # the day that a dated template writes, like 2026-03-31; empty: the day when the run began
    row_length: int = 4096  # tokens a packed row
    columns: list[str] = field(default_factory=list)  # field=column, e.g. question=ask, if the column's name is unknown
    on_bad_row: str = "error"  # "error" stops at a bad row, "skip" counts it and goes on
    on_long_row: str = "error"  # rows that do not fit: "error" names them, "skip" leaves them out, "truncate" cuts them


def model_and_loss(config: Config, world: training.World):
    """What trains, as yet without weights, and its loss."""
    model = load_model(config.model, dtype=torch.float32, device="meta")
    model.config.check_length(config.row_length)
    model.activation_checkpointing = config.activation_checkpointing
    training.shard(model, model.model.layers, world, getattr(torch, config.dtype))

    # Loss: next token at the assistant's positions, summed; the loop divides by the tokens of the global batch.
    def loss_function(model, batch):
        metrics = {}
        hidden = model.hidden_states(batch.tokens, documents=batch.documents)
        loss = linear_cross_entropy(
            hidden,
            model.lm_head.weight,
            batch.labels,
            num_tokens=1,
            normalize=model.config.normalize_head,
            metrics=metrics,
        )
        return loss, metrics

    return model, loss_function


def full_rows(config: Config, count: int):
    """A batch for --plan."""
    return collate([Row(*[[0] * config.row_length] * 3)] * count, range(count))


def main(config: Config) -> None:
    config.check()
    if config.plan:
        return print_plan(config, model_and_loss, full_rows)
    world = training.start(config.device)

    # Data
    tokenizer = load_tokenizer(config.model)
    sizes = ModelConfig.from_hf(config.model)
    tokenizer.check_fits(sizes.vocab_size, config.model)
    sizes.check_length(config.row_length)
    today = config.template_date or training.run_date(config.output, world)
    chat = chat_format(tokenizer, config.chat_format, config.enable_thinking, today)
    config.template_date = chat.today  # goes into the checkpoints, so that the run can be resumed on another day
    summary = ReadSummary()
    read = {"on_bad_row": config.on_bad_row, "summary": summary}

    def packed(paths):
        conversations = read_conversations(paths, columns=parse_columns(config.columns), **read)
        examples = encode_conversations(conversations, chat, config.row_length, on_long_row=config.on_long_row, **read)
        return pack(examples, config.row_length)

    rows, heldout_rows = packed(config.instructions), packed(config.heldout_instructions)
    plan = training.BatchPlan.from_settings(len(rows), config)
    data = f"{fingerprint(rows)} on {model_fingerprint(config.model)}"
    if training.is_finished(config, plan, data, world):
        return
    if world.is_main:
        print(summary.describe())
        print(f"{len(rows):,} rows of {config.row_length}, {utilization(rows, config.row_length):.1%} used")
    choices = training.run_choices(config.output, world, products.settle, products.use)

    model, loss_function = model_and_loss(config, world)
    load_weights(model, config.model, dtype=torch.float32, device=world.device)

    def evaluate():
        def make(indices, ids):
            return collate([heldout_rows[i] for i in indices], ids)

        return training.mean_loss(model, len(heldout_rows), make, loss_function, config, world)

    training.train(
        model,
        plan,
        lambda indices, ids: collate([rows[i] for i in indices], ids),
        loss_function,
        config,
        world,
        evaluate=evaluate if heldout_rows else None,
        fingerprint=data,
        choices=choices,
    )

    def save(weights):
        weights = round_weights(weights, getattr(torch, config.save_dtype or config.dtype), since=config.model)
        save_model(model, Path(config.output) / "model", weights)
        chat.save(Path(config.output) / "model")

    training.gather_weights(model, world, save)
    training.finish(config, plan, data, world)


if __name__ == "__main__":
    training.run_recipe(main, Config)
