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
from pathlib import Path

import torch

from pedgpt import training
from pedgpt.adapters import (
    gate_metrics,
    inject_experts,
    pack_adapters,
    record_gates,
    save_adapter,
    set_noise_rows,
)
from pedgpt.data import ChatSettings, discards_tokens, full_rows, packed_chats, read_summary
from pedgpt.kernels.cpu import products
from pedgpt.losses import IGNORE_INDEX, linear_cross_entropy
from pedgpt.models import ModelConfig, load_model, load_weights, model_fingerprint, weights_fingerprint
from pedgpt.training.plan import print_plan


@dataclass(kw_only=True)
class Config(ChatSettings, training.TrainingSettings):
    model: str  # folder of the model of stage 3
    instructions: list[str]  # conversations of all tasks: files or folders
    heldout_instructions: list[str] = field(default_factory=list)  # for the evaluation during training
    rank: int = 8  # of each expert
    alpha: float = 16.0  # experts are scaled by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank) instead
    num_specific_experts: int = 3  # behind the gate, beside the universal one
    dropout: float = 0.0  # on the experts' input
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])  # names or patterns of linear layers


def model_and_loss(config: Config, world: training.World):
    """What trains, as yet without weights, and its loss."""
    # Model and adapter: the frozen weights stay in the dtype of the computation, the experts train in float32.
    model = load_model(config.model, dtype=getattr(torch, config.dtype), device="meta")
    model.config.check_length(config.row_length)
    torch.manual_seed(config.seed)
    names = inject_experts(
        model,
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        num_specific_experts=config.num_specific_experts,
        dropout=config.dropout,
        target_modules=config.target_modules,
    )
    if world.is_main and not config.plan:
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        share = trainable / sum(parameter.numel() for parameter in model.parameters())
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        print(f"experts on {len(names)} layers ({kinds}), {trainable:,} trainable parameters ({share:.2%})")
    model.activation_checkpointing = config.activation_checkpointing
    training.shard(model, model.model.layers, world, getattr(torch, config.dtype))

    # Loss: as in stage 2; the gate's noise follows the row, so it does not depend on ranks or accumulation.
    def loss_function(model, batch):
        set_noise_rows(model, config.seed, batch.row_ids)
        pack_adapters(model)
        with record_gates(model, where=batch.labels != IGNORE_INDEX) as gates:
            hidden = model.hidden_states(batch.tokens, documents=batch.documents)
        metrics = gate_metrics(gates)
        settings = {"num_tokens": 1, "normalize": model.config.normalize_head, "metrics": metrics}
        return linear_cross_entropy(hidden, model.lm_head.weight, batch.labels, **settings), metrics

    return model, loss_function


@discards_tokens
def main(config: Config) -> None:
    config.check()
    if config.plan:
        return print_plan(config, model_and_loss, full_rows)
    world = training.start(config.device)

    # Data: token ids on disk, made by the first rank and mapped by all, packed into rows, as in stage 2.
    today = config.template_date or training.run_date(config.output, world)
    chat = config.load_chat(today, ModelConfig.from_hf)
    files = {"train": config.instructions, "heldout": config.heldout_instructions}
    rows, heldout_rows = packed_chats(config, chat, lambda steps: training.run_on_main(steps, world), **files)
    plan = training.BatchPlan.from_settings(len(rows), config)
    data = f"{rows.fingerprint} on {model_fingerprint(config.model)}"
    base = {"base_model": config.model, "base_weights": weights_fingerprint(config.model)}
    if training.is_finished(config, plan, data, world):
        return
    choices = training.run_choices(config.output, world, products.settle, products.use)

    if world.is_main:
        print(read_summary(rows.store, heldout_rows.store).describe())
        print(rows.describe())

    model, loss_function = model_and_loss(config, world)
    load_weights(model, config.model, dtype=getattr(torch, config.dtype), device=world.device)

    evaluate = training.evaluation(model, heldout_rows, loss_function, config, world)
    run = {"evaluate": evaluate, "fingerprint": data, "choices": choices}
    training.train(model, plan, rows.batch, loss_function, config, world, **run)

    def save(weights):
        save_adapter(model, Path(config.output) / "adapter", **base, state_dict=dict(weights))
        chat.save(Path(config.output) / "adapter")

    saved = getattr(torch, config.save_dtype or "float32")
    training.gather_weights(model, world, save, trainable_only=True, dtype=saved)
    training.finish(config, plan, data, world)


if __name__ == "__main__":
    training.run_recipe(main, Config)
