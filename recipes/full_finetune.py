"""Stage 2, full-parameter supervised fine-tuning on conversations.

    python recipes/full_finetune.py --config recipes/configs/demo/sft.toml --model runs/demo/cpt/model \\
        --output runs/demo/sft --instructions runs/demo/corpus/train/generalist
    torchrun --nproc-per-node 8 recipes/full_finetune.py --config recipes/configs/baichuan2_7b/sft.toml \\
        --model runs/7b/cpt/model --output runs/7b/sft --instructions path/to/instructions

Only the assistant's tokens carry loss. Conversations are packed; attention never crosses from one to another.
Token ids lie on disk, in OUTPUT/tokens, until the run is finished.
"""

from dataclasses import dataclass, field

from pedgpt import stage, training
from pedgpt.data import ChatSettings, discards_tokens, full_rows
from pedgpt.losses import next_token_loss
from pedgpt.training.plan import print_plan


@dataclass(kw_only=True)
class Config(ChatSettings, stage.StageSettings):
    instructions: list[str]  # conversations to train on: files or folders
    heldout_instructions: list[str] = field(default_factory=list)  # for the evaluation during training


def model_and_loss(config: Config, world: training.World):
    """What trains, as yet without the model's weights, and its loss, at the assistant's positions."""
    return stage.build(config, world), stage.gated(next_token_loss, config)


@discards_tokens
def main(config: Config) -> None:
    config.check()
    if config.plan:
        return print_plan(config, model_and_loss, full_rows)
    world = training.start(config.device)

    # Data: conversations as token ids on disk, packed into rows.
    chat, rows, heldout_rows = stage.chat_rows(config, world)
    about = [(rows.store.summary + heldout_rows.store.summary).describe(), rows.describe()]

    # The model, its loss, the loop from the last checkpoint on, and the result.
    stage.train(config, world, rows, heldout_rows, model_and_loss, chat.save, about=about)


if __name__ == "__main__":
    training.run_recipe(main, Config)
