"""The families whose checkpoints load: one entry each, with all that sets it apart from Llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """How to read and write a family's config.json."""

    architecture: str  # transformers' name of the class
    biases: tuple[str, ...] = ()  # which switches of biases the file has: attention_bias is for q, k, v and o
    network: Mapping[str, bool] = field(default_factory=dict)  # switches of ModelConfig that no key of the file tells
    defaults: Mapping[str, Any] = field(default_factory=dict)  # for keys that the file lacks
    written: Mapping[str, Any] = field(default_factory=dict)  # for keys that transformers needs
    length_key: str = "max_position_embeddings"
    # Baichuan has no keys for these two: tables tell them by hidden_size and by vocab_size, as the vendor published it.
    positions: str | Mapping[int, str] = "rope"
    normalize_head: bool | Mapping[int, bool] = False


FAMILIES = {
    "baichuan": Family(
        "BaichuanForCausalLM",
        network={"fused_qkv": True},
        length_key="model_max_length",
        positions={4096: "rope", 5120: "alibi"},  # 7B and 13B
        normalize_head={64_000: False, 125_696: True},  # Baichuan-1 and Baichuan2
    ),
    "llama": Family("LlamaForCausalLM", biases=("attention_bias", "mlp_bias")),
    "mistral": Family(  # transformers' default is a window of 4096 tokens on all layers
        "MistralForCausalLM",
        defaults={"use_sliding_window": True, "max_window_layers": 0},
        written={"sliding_window": None},
    ),
    "qwen2": Family("Qwen2ForCausalLM", network={"attention_bias": True}),  # on q, k and v, not on o
    "qwen3": Family(
        "Qwen3ForCausalLM", biases=("attention_bias",), network={"qk_norm": True}, defaults={"head_dim": 128}
    ),
}
