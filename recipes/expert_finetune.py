"""Stage 4, parameter-efficient secondary fine-tuning with the mixture of universal-specific experts (§3.4).

    python recipes/expert_finetune.py --config recipes/configs/demo/experts.toml --model runs/demo/dfpo/model \\
        --output runs/demo/experts --instructions runs/demo/corpus/train/tasks
    torchrun --nproc-per-node 8 recipes/expert_finetune.py --config recipes/configs/baichuan2_7b/experts.toml \\
        --model runs/7b/dfpo/model --output runs/7b/experts --instructions path/to/tasks

The model is frozen; each adapted layer gets one universal expert and several specific ones behind a noisy soft gate.
Only the assistant's tokens carry loss.
Token ids lie on disk, in OUTPUT/tokens, until the run is finished.
"""

from dataclasses import dataclass, field
from typing import Literal

from pedgpt import stage, training
from pedgpt.data import ChatSettings, discards_tokens, full_rows
from pedgpt.losses import next_token_loss
from pedgpt.training.plan import print_plan


@dataclass(kw_only=True)
class Config(ChatSettings, stage.StageSettings):
    instructions: list[str]  # conversations of all tasks: files or folders
    heldout_instructions: list[str] = field(default_factory=list)  # for the evaluation during training
    adapter: Literal["none", "lora", "experts"] = "experts"  # what trains: all parameters (none), a LoRA or experts


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
