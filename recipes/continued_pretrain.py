"""Stage 1, continued pre-training on a hybrid of text and instructions rewritten as text (PediatricsGPT §3.2).

    python recipes/continued_pretrain.py --config recipes/configs/demo/cpt.toml --model runs/demo/base \\
        --output runs/demo/cpt --text runs/demo/corpus/train/text --instructions runs/demo/corpus/train/tasks
    torchrun --nproc-per-node 8 recipes/continued_pretrain.py --config recipes/configs/baichuan2_7b/cpt.toml \\
        --model checkpoints/Baichuan2-7B-Base --output runs/7b/cpt \\
        --text path/to/text --instructions path/to/instructions

Every token carries loss. Instructions become plain completions without chat role tokens, in several surface forms.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from pedgpt import training
from pedgpt.data import (
    ReadSummary,
    as_completion,
    collate,
    encode_document,
    fingerprint,
    load_tokenizer,
    mix,
    pack,
    read_conversations,
    read_documents,
    utilization,
)
from pedgpt.losses import linear_cross_entropy
from pedgpt.models import ModelConfig, load_model, load_weights, model_fingerprint, save_model


@dataclass(kw_only=True)
class Config(training.TrainingSettings):
    model: str  # folder of the base model
    text: list[str]  # documents of the domain: files or folders
    general_text: list[str] = field(default_factory=list)  # documents of no domain
    instructions: list[str] = field(default_factory=list)  # conversations that become completions
    heldout_text: list[str] = field(default_factory=list)  # documents for the evaluation during training
    instruction_share: float = 0.5  # of all tokens; 0 trains on text only
    domain_to_general: float = 9.0  # tokens of domain text for each token of general text
    total_tokens: int = 0  # tokens to draw; 0: as many as use the domain text once
    row_length: int = 4096  # tokens a packed row
    on_bad_row: str = "error"  # "error" stops at a bad row, "skip" counts it and goes on


def main(config: Config) -> None:
    config.check()
    if not 0 <= config.instruction_share < 1 or config.domain_to_general <= 0:
        raise ValueError("instruction_share must be in [0, 1) and domain_to_general positive")
    world = training.start(config.device)

    # Data: each source tokenised, mixed by share, packed into rows.
    tokenizer = load_tokenizer(config.model)
    sizes = ModelConfig.from_hf(config.model)
    tokenizer.check_fits(sizes.vocab_size, config.model)
    sizes.check_length(config.row_length)
    summary = ReadSummary()
    read = {"on_bad_row": config.on_bad_row, "summary": summary}
    completions = [as_completion(row, i) for i, row in enumerate(read_conversations(config.instructions, **read))]
    sources = {
        "domain text": tokenizer.encode_batch([row.text for row in read_documents(config.text, **read)]),
        "general text": tokenizer.encode_batch([row.text for row in read_documents(config.general_text, **read)]),
        "instructions": tokenizer.encode_batch(completions),
    }
    text_share = 1 - config.instruction_share
    general = text_share / (1 + config.domain_to_general) if sources["general text"] else 0.0
    shares = {"domain text": text_share - general, "general text": general, "instructions": config.instruction_share}
    once = sum(map(len, sources["domain text"])) / shares["domain text"]
    mixture = mix(sources, shares, total_tokens=config.total_tokens or round(once), seed=config.seed)
    ends = {"eos_id": tokenizer.eos_id, "row_length": config.row_length, "prefix": tokenizer.document_prefix}
    examples = [piece for text in mixture.texts for piece in encode_document(text, **ends)]
    rows = pack(examples, config.row_length)
    heldout = [
        piece
        for row in read_documents(config.heldout_text, **read)
        for piece in encode_document(tokenizer.encode(row.text), source=row.source, **ends)
    ]
    heldout_rows = pack(heldout, config.row_length)
    plan = training.BatchPlan.from_settings(len(rows), config)
    data = f"{fingerprint(rows)} on {model_fingerprint(config.model)}"
    if training.is_finished(config, plan, data, world):
        return
    if world.is_main:
        print(f"{summary.describe()}\n{mixture.describe()}")
        print(f"{len(rows):,} rows of {config.row_length}, {utilization(rows, config.row_length):.1%} used")

    # Model
    model = load_model(config.model, dtype=torch.float32, device="meta")
    model.activation_checkpointing = config.activation_checkpointing
    training.shard(model, model.model.layers, world, getattr(torch, config.dtype))
    load_weights(model, config.model, dtype=torch.float32, device=world.device)

    # Loss: next token at every position, summed; the loop divides by the tokens of the global batch.
    def loss_function(model, batch):
        metrics = {}
        hidden = model.hidden_states(batch.tokens, documents=batch.documents)
        loss = linear_cross_entropy(
            hidden, model.lm_head.weight, batch.labels, num_tokens=1, normalize=sizes.normalize_head, metrics=metrics
        )
        return loss, metrics

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
    )

    def save(weights):
        save_model(model, Path(config.output) / "model", weights)
        tokenizer.save(Path(config.output) / "model")

    training.gather_weights(model, world, save, dtype=getattr(torch, config.dtype))
    training.finish(config, plan, data, world)


if __name__ == "__main__":
    training.run_recipe(main, Config)
