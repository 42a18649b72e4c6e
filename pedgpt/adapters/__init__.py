"""Adapters: LoRA, the mixture of universal-specific experts, and their storage."""

from pedgpt.adapters.experts import ExpertLoRALinear, record_gates, set_noise_rows
from pedgpt.adapters.inject import adapted_layers, adapters_disabled, inject_experts, inject_lora
from pedgpt.adapters.lora import LoRALinear
from pedgpt.adapters.storage import adapter_base, load_adapter, save_adapter

__all__ = [
    "ExpertLoRALinear",
    "LoRALinear",
    "adapted_layers",
    "adapter_base",
    "adapters_disabled",
    "inject_experts",
    "inject_lora",
    "load_adapter",
    "record_gates",
    "save_adapter",
    "set_noise_rows",
]
