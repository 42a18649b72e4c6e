"""The decoder, its configuration, its checkpoints and its decoding."""

from pedgpt.models.cache import KVCache
from pedgpt.models.checkpoint import (
    export_llama,
    load_model,
    load_weights,
    model_fingerprint,
    round_weights,
    save_model,
    weights_fingerprint,
)
from pedgpt.models.config import ModelConfig
from pedgpt.models.generation import generate, generate_steps, generation_defaults
from pedgpt.models.transformer import Transformer

__all__ = [
    "KVCache",
    "ModelConfig",
    "Transformer",
    "export_llama",
    "generate",
    "generate_steps",
    "generation_defaults",
    "load_model",
    "load_weights",
    "model_fingerprint",
    "round_weights",
    "save_model",
    "weights_fingerprint",
]
