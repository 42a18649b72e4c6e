"""Stage 2, full-parameter supervised fine-tuning on conversations.

    python recipes/full_finetune.py --config recipes/configs/demo/sft.toml --model runs/demo/cpt/model \\
        --output runs/demo/sft --instructions runs/demo/corpus/train/generalist
    torchrun --nproc-per-node 8 recipes/full_finetune.py --config recipes/configs/baichuan2_7b/sft.toml \\
        --model runs/7b/cpt/model --output runs/7b/sft --instructions path/to/instructions

Only the assistant's tokens carry loss. Conversations are packed; attention never crosses from one to another.
Token ids lie on disk, in OUTPUT/tokens, until the run is finished.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from pedgpt import training
from pedgpt.data import ChatSettings, PackedRows, TokenStore, discards_tokens, full_rows, read_summary, write_chats
from pedgpt.kernels.cpu import products
from pedgpt.losses import linear_cross_entropy
from pedgpt.models import ModelConfig, load_model, load_weights, model_fingerprint, round_weights, save_model
from pedgpt.training.plan import print_plan


@dataclass(kw_only=True)
class Config(ChatSettings, training.TrainingSettings):
    model: str  # folder of the model of stage 1
    instructions: list[str]  # conversations to train on: files or folders
    heldout_instructions: list[str] = field(default_factory=list)  # for the evaluation during training


def model_and_loss(config: Config, world: training.World):
    """What trains, as yet without weights, and its loss."""
    model = load_model(config.model, dtype=torch.float32, device="meta")
    model.config.check_length(config.row_length)
    model.activation_checkpointing = config.activation_checkpointing
    training.shard(model, model.model.layers, world, getattr(torch, config.dtype))

    # Loss: next token at the assistant's positions, summed; the loop divides by the tokens of the global batch.
    def loss_function(model, batch):
        hidden, metrics = model.hidden_states(batch.tokens, documents=batch.documents), {}
        settings = {"num_tokens": 1, "normalize": model.config.normalize_head, "metrics": metrics}
        return linear_cross_entropy(hidden, model.lm_head.weight, batch.labels, **settings), metrics

    return model, loss_function


@discards_tokens
def main(config: Config) -> None:
    config.check()
    if config.plan:
        return print_plan(config, model_and_loss, full_rows)
    world = training.start(config.device)

    # Data: token ids on disk, made by the first rank and mapped by all, packed into rows.
    chat = config.load_chat(config.template_date or training.run_date(config.output, world))
    sizes = ModelConfig.from_hf(config.model)
    chat.tokenizer.check_fits(sizes.vocab_size, config.model)
    sizes.check_length(config.row_length)
    files = {"train": config.instructions, "heldout": config.heldout_instructions}
    tokens = Path(config.output) / "tokens"
    training.run_on_main(write_chats(tokens, "conversations", files, chat, config), world)
    rows, heldout_rows = (PackedRows(TokenStore(tokens / part), None, config.row_length) for part in files)
    plan = training.BatchPlan.from_settings(len(rows), config)
    data = f"{rows.fingerprint} on {model_fingerprint(config.model)}"
    if training.is_finished(config, plan, data, world):
        return
    if world.is_main:
        print(read_summary(rows.store, heldout_rows.store).describe())
        print(rows.describe())
    choices = training.run_choices(config.output, world, products.settle, products.use)

    model, loss_function = model_and_loss(config, world)
    load_weights(model, config.model, dtype=torch.float32, device=world.device)

    def evaluate():
        return training.mean_loss(model, len(heldout_rows), heldout_rows.batch, loss_function, config, world)

    training.train(
        model,
        plan,
        rows.batch,
        loss_function,
        config,
        world,
        evaluate=evaluate if len(heldout_rows) else None,
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
