"""Tiny models, the same for all tests of adapters."""

import pytest
import torch

from pedgpt.models import ModelConfig, Transformer

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "tied": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "baichuan": {"model_type": "baichuan", "pedgpt_positions": "alibi", "pedgpt_norm_head": True},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # faster than two at these sizes


@pytest.fixture
def make_model():
    """make_model(family, seed=0) gives a random base model; the same seed, the same weights."""

    def make(family="llama", seed=0):
        torch.manual_seed(seed)
        return Transformer(ModelConfig.from_hf(SIZES | FAMILIES[family]))

    return make


@pytest.fixture
def tokens():
    return torch.randint(97, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def randomize():
    """Give every trainable tensor (the adapters) random values, so that nothing is zero by initialisation."""

    def fill(model, seed=5, scale=0.3):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.copy_(scale * values)
        return model

    return fill
