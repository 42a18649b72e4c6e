"""Stage 3, direct following preference optimization (PediatricsGPT §3.3) on chosen and rejected answers.

    python recipes/dfpo.py --config recipes/configs/demo/dfpo.toml --model runs/demo/sft/model \\
        --output runs/demo/dfpo --preferences runs/demo/corpus/train/preferences
    torchrun --nproc-per-node 8 recipes/dfpo.py --config recipes/configs/baichuan2_7b/dfpo.toml \\
        --model runs/7b/sft/model --output runs/7b/dfpo --preferences path/to/pairs.jsonl

The reference is the model as it comes in. Its log-probabilities are computed once, before training, and kept in a file
that other runs on the same pairs can share (`reference_logps`), so there is never a second model. The prompt of a pair
is computed once for both answers. All parameters train, or an adapter.
Token ids lie on disk, in OUTPUT/tokens, until the run is finished.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from pedgpt import data, stage, training
from pedgpt.losses import check_dfpo_settings, linear_dfpo_loss, linear_sequence_logps
from pedgpt.models import ModelConfig
from pedgpt.training.distributed import all_values, autocast, sum_over_ranks
from pedgpt.training.plan import print_plan

METRICS = (  # means over pairs; the last two over both responses of a pair, each the mean of its tokens
    "loss/preference", "loss/regularization",
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logps_per_token/chosen", "logps_per_token/rejected",
    "entropy", "mean_token_accuracy",
)  # fmt: skip


@dataclass(kw_only=True)
class Config(data.ChatSettings, stage.StageSettings):
    preferences: list[str]  # pairs to train on: files or folders
    heldout_preferences: list[str] = field(default_factory=list)  # for the evaluation during training
    beta: float = 0.1  # how strongly the policy is held to the reference
    mu: float = 1.0  # weight of the likelihood of the chosen answer; 0 is DPO
    label_smoothing: float = 0.0  # assumed share of pairs labelled the wrong way round
    shared_prompt: bool = True  # compute the prompt of a pair once, for both answers
    reference_logps: str = ""  # file that keeps the reference's log-probabilities for further runs; empty: in output


def model_and_loss(config: Config, world: training.World):
    """What trains, as yet without weights, and its loss."""

    # Loss: everything summed over pairs, the loop divides by their number.
    def loss_function(model, batch):
        if batch.weight == 0:
            return response_logps(model, batch).sum(), dict.fromkeys(METRICS, torch.zeros(()))
        head = {}
        operands, settings = states_and_head(model, batch)
        result = linear_dfpo_loss(
            *operands, *batch.reference_logps.chunk(2), **settings,
            beta=config.beta, mu=config.mu, label_smoothing=config.label_smoothing, metrics=head,
        )  # fmt: skip
        logps = torch.stack((result.chosen_logps, result.rejected_logps))
        per_token = logps / batch.counts.view(2, -1).clamp(min=1)
        values = (
            result.preference * batch.weight, result.regularization * batch.weight,
            result.chosen_rewards.sum(), result.rejected_rewards.sum(), result.margins.sum(), result.accuracies.sum(),
            *logps.sum(-1), *per_token.sum(-1), *(value.sum() / 2 for value in head.values()),
        )  # fmt: skip
        return result.loss * batch.weight, dict(zip(METRICS, values, strict=True))

    return stage.build(config, world), stage.gated(loss_function, config)


def states_and_head(model, batch):
    hidden = model.hidden_states(batch.tokens, documents=batch.documents, branches=batch.branches)
    settings = {"sequences": batch.sequences, "normalize": model.config.normalize_head}
    return (hidden, model.lm_head.weight, batch.labels), settings


def response_logps(model, batch):
    """Summed log-probabilities, [2P]: chosen responses, then rejected ones."""
    operands, settings = states_and_head(model, batch)
    return linear_sequence_logps(*operands, num_sequences=len(batch.counts), **settings)[0]


def reference_logps(model, pairs, config: Config, world: training.World):
    """Log-probabilities of the chosen and the rejected responses, [pairs, 2]: each rank computes a part of them."""
    parts = []
    width = world.size * config.micro_batch_size
    with torch.no_grad(), autocast(world, getattr(torch, config.dtype)):
        for start in range(0, len(pairs), width):
            mine = range(start, min(start + width, len(pairs)))[world.rank :: world.size]
            logps = response_logps(model, pairs.batch(mine, range(len(mine))).to(world.device))
            part = logps.new_zeros(config.micro_batch_size, 2)
            part[: len(mine)] = logps[: 2 * len(mine)].view(2, len(mine)).T
            parts.append(part)
    mine = torch.cat(parts).cpu() if parts else torch.zeros(0, 2)
    return torch.stack(all_values(mine, world), 1).flatten(0, 1)[: len(pairs)]


@data.discards_tokens
def main(config: Config) -> None:
    config.check()
    check_dfpo_settings(config.beta, config.mu, config.label_smoothing)
    if config.plan:
        return print_plan(config, model_and_loss, data.full_pairs)
    world = training.start(config.device)
    dtype = getattr(torch, config.dtype)

    # Data: token ids on disk, made by the first rank and mapped by all.
    today = training.settle_run(config.output, world)
    chat = config.load_chat(config.template_date or today, ModelConfig.from_hf)
    files = {"train": config.preferences, "heldout": config.heldout_preferences}
    tokens = Path(config.output) / "tokens"
    training.run_on_main(data.write_chats(tokens, "preferences", files, chat, config), world)
    pairs, heldout_pairs = (
        data.StoredPairs(data.TokenStore(tokens / part), shared_prompt=config.shared_prompt) for part in files
    )
    about = [
        (pairs.store.summary + heldout_pairs.store.summary).describe(),
        f"{len(pairs):,} pairs, {len(heldout_pairs):,} held out",
    ]

    # Reference log-probabilities, [pairs, 2]: of the model as it comes in, with its adapter if it goes on from one.
    def add_reference(model, origin):
        stored = config.stored_dtype
        stream = dtype if world.size > 1 else stored  # FSDP2 gathers weights in `dtype`, which the key must say
        dtypes = f"products {dtype}, weights {stored}, residual stream {stream}"
        dtypes += f", base in {config.quantize}" * (config.quantize != "none")
        key = data.reference_key(model=origin, chat=chat, data=pairs.fingerprint, dtype=dtypes)
        # A file that --reference_logps names must fit this run. The one in OUTPUT is made anew if it does not.
        cache = Path(config.reference_logps or Path(config.output) / "reference_logps.safetensors")
        reference = data.load_reference(cache, key, len(pairs), must_fit=bool(config.reference_logps))
        if sum_over_ranks([reference is None], world)[0]:  # if one rank has none, all compute: they share the model
            reference = reference_logps(model, pairs, config, world)
            if world.is_main:
                data.save_reference(cache, reference, key)
        elif world.is_main:
            print(f"reference log-probabilities from {cache}")
        pairs.reference_logps = reference
        heldout_pairs.reference_logps = reference_logps(model, heldout_pairs, config, world)

    # The model, its loss, the reference, the loop from the last checkpoint on, and the result.
    steps = training.BatchPlan.from_settings(len(pairs), config).total_steps
    watch = training.ChosenLikelihoodWatch(beta=config.beta, mu=config.mu, window=max(10, steps // 20))
    run = {"about": about, "prepare": add_reference, "watch": watch}
    stage.train(config, world, pairs, heldout_pairs, model_and_loss, chat.save, **run)


if __name__ == "__main__":
    training.run_recipe(main, Config)
