"""Tiny models whose every parameter counts: no zero bias, no norm weight of one, attention far from uniform."""

import pytest
import torch

from pedgpt.models import ModelConfig, Transformer

BASE = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 32,
}  # fmt: skip
ALIBI = {
    "model_type": "baichuan", "hidden_size": 40, "num_attention_heads": 5, "pedgpt_positions": "alibi",
    "pedgpt_norm_head": True,
}  # fmt: skip
KINDS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 3, "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12},
    "baichuan-rope": {"model_type": "baichuan", "pedgpt_positions": "rope", "pedgpt_norm_head": True},
    "baichuan-alibi": ALIBI,
}


def _randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + ("norm" in name))
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="session")
def randomize():
    """randomize(model, seed): any torch model with random weights of a size at which every one matters."""
    return _randomize


@pytest.fixture(scope="session")
def raw_config():
    """raw_config(kind, **changes): a tiny config.json of a family."""
    return lambda kind, **changes: {**BASE, **KINDS[kind], **changes}


@pytest.fixture(scope="session")
def make_model(raw_config):
    """make_model(kind, seed=0, **changes): a tiny random model of ours in evaluation mode."""

    def make(kind, seed=0, **changes):
        return _randomize(Transformer(ModelConfig.from_hf(raw_config(kind, **changes))).eval(), seed)

    return make


@pytest.fixture(scope="session")
def random_tokens():
    """random_tokens(*shape, seed=0): ids of the tiny vocabulary."""
    return lambda *shape, seed=0: torch.randint(0, 131, shape, generator=torch.Generator().manual_seed(seed))
