"""The families whose checkpoints load: one entry each, with all that sets it apart from Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """How to read and write a family's config.json."""

    architecture: str  # transformers' name of the class
    biases: tuple[str, ...] = ()  # which switches of biases the file has: attention_bias is for q, k, v and o
    network: Mapping[str, bool] = {}  # fields of ModelConfig that no key of the file tells
    by_size: Mapping[str, Mapping[int, Mapping[str, Any]]] = {}  # those that only a size tells
    defaults: Mapping[str, Any] = {}  # for keys that the file lacks
    written: Mapping[str, Any] = {}  # for keys that transformers needs
    length_key: str = "max_position_embeddings"


FAMILIES = {
    "baichuan": Family(
        "BaichuanForCausalLM",
        network={"fused_qkv": True},
        by_size={
            "hidden_size": {4096: {"positions": "rope"}, 5120: {"positions": "alibi"}},  # 7B and 13B
            "vocab_size": {64_000: {"normalize_head": False}, 125_696: {"normalize_head": True}},  # Baichuan 1 and 2
        },
        length_key="model_max_length",
    ),
    "llama": Family("LlamaForCausalLM", biases=("attention_bias", "mlp_bias")),
    # A Mistral whose file has no other word on it has a window of 4096 tokens on all layers, says transformers.
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"use_sliding_window": True, "max_window_layers": 0},
        written={"sliding_window": None},
    ),
    "qwen2": Family("Qwen2ForCausalLM", network={"attention_bias": True}),  # on q, k and v, not on o
    "qwen3": Family("Qwen3ForCausalLM", ("attention_bias",), network={"qk_norm": True}, defaults={"head_dim": 128}),
}
