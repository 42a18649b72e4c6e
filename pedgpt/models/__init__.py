"""The decoder, its configuration, its checkpoints and its decoding."""

from pedgpt.models.cache import KVCache
from pedgpt.models.checkpoint import load_model, load_weights, round_weights, save_model, weights_format
from pedgpt.models.config import ModelConfig
from pedgpt.models.generation import generate, generate_steps, generation_defaults
from pedgpt.models.transformer import Transformer
from pedgpt.models.weight_files import model_fingerprint, weights_fingerprint

__all__ = [
    "KVCache", "ModelConfig", "Transformer", "generate", "generate_steps", "generation_defaults", "load_model",
    "load_weights", "model_fingerprint", "round_weights", "save_model", "weights_fingerprint",
    "weights_format",
]  # fmt: skip
