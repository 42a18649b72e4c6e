"""Make a model from scratch: train a tokenizer on a corpus and write random weights beside it.

python recipes/init_model.py --config recipes/configs/demo/base.toml --output runs/demo/base \\
    --text runs/demo/corpus/train/text --instructions runs/demo/corpus/train/tasks
"""

from dataclasses import dataclass, field

import torch

from pedgpt.data import parse_columns, read_conversations, read_documents, train_tokenizer
from pedgpt.models import ModelConfig, Transformer, save_model
from pedgpt.training import run_recipe

# Baichuan2's names, so that its chat format applies.
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]


@dataclass
class Config:
    output: str  # folder for the model and its tokenizer
    text: list[str]  # documents to train the tokenizer on
    instructions: list[str]  # conversations to train the tokenizer on
    columns: list[str] = field(default_factory=list)  # field=column, e.g. text=body, if the column's name is unknown
    vocab_size: int = 4096  # tokens
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 512  # tokens
    positions: str = "rope"  # rope (as Baichuan2-7B) or alibi (as 13B)
    normalize_head: bool = True  # Baichuan2's NormHead
    seed: int = 0  # of the weights


def main(config: Config) -> None:
    columns = parse_columns(config.columns)
    texts = [document.text for document in read_documents(config.text, columns=columns)]
    for conversation in read_conversations(config.instructions, columns=columns):
        texts += [message.content for message in conversation.messages]
    if not texts:
        raise ValueError("nothing to train a tokenizer on: give --text or --instructions, or start from a checkpoint")
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size, special_tokens=SPECIAL_TOKENS)
    characters, tokens = sum(map(len, texts)), sum(map(len, tokenizer.encode_batch(texts)))

    torch.manual_seed(config.seed)
    model = Transformer(
        ModelConfig(
            model_type="baichuan",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            positions=config.positions,
            normalize_head=config.normalize_head,
            fused_qkv=True,
        )
    )
    tokenizer.check_fits(config.vocab_size, config.output)
    save_model(model, config.output)
    tokenizer.save(config.output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    length = characters / tokens
    print(f"{config.output}: {parameters:,} parameters, {tokenizer.vocab_size:,} tokens of {length:.2f} characters")


if __name__ == "__main__":
    run_recipe(main, Config)
