"""Stage 3, direct following preference optimization (PediatricsGPT §3.3) on chosen and rejected answers.

    python recipes/dfpo.py --config recipes/configs/demo/dfpo.toml --model runs/demo/sft/model \\
        --output runs/demo/dfpo --preferences runs/demo/corpus/train/preferences.jsonl
    torchrun --nproc-per-node 8 recipes/dfpo.py --config recipes/configs/baichuan2_7b/dfpo.toml \\
        --model runs/7b/sft/model --output runs/7b/dfpo --preferences path/to/pairs.jsonl

The reference is the model as it comes in. Its log-probabilities are computed once, before training, so no second model
is kept. All parameters train, or with `lora_rank` an adapter.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pedgpt import training
from pedgpt.adapters import inject_lora, save_adapter
from pedgpt.data import (
    ReadSummary,
    chat_format,
    collate_pairs,
    encode_pairs,
    fingerprint,
    load_tokenizer,
    read_preferences,
)
from pedgpt.losses import IGNORE_INDEX, dfpo_loss, sequence_logps
from pedgpt.models import ModelConfig, load_model, load_weights, model_fingerprint, save_model
from pedgpt.training.distributed import autocast, gather_rows


@dataclass(kw_only=True)
class Config(training.TrainingSettings):
    model: str  # folder of the model of stage 2, also the reference
    preferences: list[str]  # pairs to train on: files or folders
    heldout_preferences: list[str] = field(default_factory=list)  # for the evaluation during training
    beta: float = 0.1  # how strongly the policy is held to the reference
    mu: float = 1.0  # weight of the likelihood of the chosen answer; 0 is DPO
    label_smoothing: float = 0.0  # assumed share of pairs labelled the wrong way round
    lora_rank: int = 0  # rank of a LoRA on all linear layers; 0 trains all parameters
    lora_alpha: float = 16.0  # the LoRA is scaled by alpha / rank
    lora_rslora: bool = False  # by alpha / sqrt(rank) instead
    chat_format: str = "auto"  # auto, baichuan2, chatml, llama3, or template (the model's own)
    row_length: int = 4096  # most tokens of prompt and answer
    on_bad_row: str = "error"  # "error" stops at a bad row, "skip" counts it and goes on


def main(config: Config) -> None:
    config.check()
    if config.beta < 0 or config.mu < 0 or not 0 <= config.label_smoothing < 0.5:
        raise ValueError("beta and mu must not be negative and label_smoothing must be in [0, 0.5)")
    if config.lora_rslora and not config.lora_rank:
        raise ValueError("lora_rslora is set without lora_rank, so there is no LoRA to scale; give lora_rank too")
    world = training.start(config.device)
    dtype = getattr(torch, config.dtype)

    # Data
    tokenizer = load_tokenizer(config.model)
    sizes = ModelConfig.from_hf(config.model)
    tokenizer.check_fits(sizes.vocab_size, config.model)
    sizes.check_length(config.row_length)
    chat = chat_format(tokenizer, config.chat_format)
    summary = ReadSummary()

    def encoded(paths):
        pairs = read_preferences(paths, on_bad_row=config.on_bad_row, summary=summary)
        return encode_pairs(pairs, chat, config.row_length, config.on_bad_row, summary)

    pairs, heldout_pairs = encoded(config.preferences), encoded(config.heldout_preferences)
    plan = training.BatchPlan.from_settings(len(pairs), config)
    examples = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    data = f"{fingerprint(examples)} on {model_fingerprint(config.model)}"
    if training.is_finished(config, plan, data, world):
        return
    if world.is_main:
        print(f"{summary.describe()}\n{len(pairs):,} pairs, {len(heldout_pairs):,} held out")

    # Model
    stored = dtype if config.lora_rank else torch.float32
    model = load_model(config.model, dtype=stored, device="meta")
    if config.lora_rank:
        torch.manual_seed(config.seed)
        names = inject_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, rslora=config.lora_rslora)
        if world.is_main:
            kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            print(f"LoRA on {len(names)} layers ({kinds})")
    model.activation_checkpointing = config.activation_checkpointing
    training.shard(model, model.model.layers, world, dtype)
    load_weights(model, config.model, dtype=stored, device=world.device)

    # Reference log-probabilities of every pair, [pairs, 2], before the first step: adapters are still the identity.
    def reference_logps(pairs):
        parts = []
        with torch.no_grad(), autocast(world, dtype):
            for i in range(math.ceil(len(pairs) / (world.size * config.micro_batch_size))):
                width = world.size * config.micro_batch_size
                mine = pairs[i * width : (i + 1) * width][world.rank :: world.size]
                batch = collate_pairs(mine, range(len(mine))).to(world.device)
                logps = sequence_logps(model(batch.tokens, documents=batch.documents), batch.labels)
                part = logps.new_zeros(config.micro_batch_size, 2)
                part[: len(mine)] = logps[: 2 * len(mine)].view(2, len(mine)).T
                parts.append(gather_rows(part, world))
        return torch.cat(parts).cpu()[: len(pairs)] if parts else torch.zeros(0, 2)

    reference, heldout_reference = reference_logps(pairs), reference_logps(heldout_pairs)

    # Loss: chosen and rejected in one forward pass; everything summed over pairs, the loop divides by their number.
    def loss_function(model, batch):
        logps = sequence_logps(model(batch.tokens, documents=batch.documents), batch.labels)
        if batch.weight == 0:
            return logps.sum(), dict.fromkeys(METRICS, torch.zeros(()))
        counts = (batch.labels != IGNORE_INDEX).sum(-1)
        chosen, rejected = logps.chunk(2)
        reference_chosen, reference_rejected = batch.reference_logps.chunk(2)
        chosen_counts, rejected_counts = counts.chunk(2)
        result = dfpo_loss(
            chosen, rejected, reference_chosen, reference_rejected,
            chosen_token_counts=chosen_counts, beta=config.beta, mu=config.mu, label_smoothing=config.label_smoothing,
        )  # fmt: skip
        values = (
            result.preference * batch.weight, result.regularization * batch.weight,
            result.chosen_rewards.sum(), result.rejected_rewards.sum(), result.margins.sum(), result.accuracies.sum(),
            chosen.detach().sum(), rejected.detach().sum(),
            (chosen.detach() / chosen_counts).sum(), (rejected.detach() / rejected_counts).sum(),
        )  # fmt: skip
        return result.loss * batch.weight, dict(zip(METRICS, values, strict=True))

    def evaluate():
        def make(indices, ids):
            return collate_pairs([heldout_pairs[i] for i in indices], ids, heldout_reference[list(indices)])

        return training.mean_loss(model, len(heldout_pairs), make, loss_function, config, world)

    training.train(
        model,
        plan,
        lambda indices, ids: collate_pairs([pairs[i] for i in indices], ids, reference[indices]),
        loss_function,
        config,
        world,
        evaluate=evaluate if heldout_pairs else None,
        fingerprint=data,
    )
    adapter = config.lora_rank > 0

    def save(weights):
        if adapter:
            save_adapter(model, Path(config.output) / "adapter", base_model=config.model, state_dict=dict(weights))
        else:
            save_model(model, Path(config.output) / "model", weights)
            tokenizer.save(Path(config.output) / "model")

    training.gather_weights(model, world, save, trainable_only=adapter, dtype=None if adapter else dtype)
    training.finish(config, plan, data, world)


METRICS = (
    "loss/preference", "loss/regularization",
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logps_per_token/chosen", "logps_per_token/rejected",
)  # fmt: skip

if __name__ == "__main__":
    training.run_recipe(main, Config)
