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
from pedgpt.data import ChatSettings, discards_tokens, full_rows, packed_chats
from pedgpt.losses import next_token_loss
from pedgpt.models import ModelConfig
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

    # Data: token ids on disk, made by the first rank and mapped by all, packed into rows.
    today = training.settle_run(config.output, world)
    chat = config.load_chat(config.template_date or today, ModelConfig.from_hf)
    files = {"train": config.instructions, "heldout": config.heldout_instructions}
    rows, heldout_rows = packed_chats(config, chat, lambda steps: training.run_on_main(steps, world), **files)
    plan = training.BatchPlan.from_settings(len(rows), config)
    data = f"{rows.fingerprint} on {stage.origin(config)}"
    if training.is_finished(config, plan, data, world):
        return
    if world.is_main:
        print((rows.store.summary + heldout_rows.store.summary).describe())
        print(rows.describe())

    model, loss_function = model_and_loss(config, world)
    stage.fill(model, config, world)

    evaluate = training.evaluation(model, heldout_rows, loss_function, config, world)
    run = {"evaluate": evaluate, "fingerprint": data}
    training.train(model, plan, rows.batch, loss_function, config, world, **run)

    stage.save_result(model, config, world, chat.save)
    training.finish(config, plan, data, world)


if __name__ == "__main__":
    training.run_recipe(main, Config)
