"""Adapters: LoRA, the mixture of universal-specific experts, and their storage."""

from pedgpt.adapters.experts import (
    ExpertLoRALinear,
    GateRecord,
    balance_loss,
    gate_metrics,
    record_gates,
    set_noise_rows,
)
from pedgpt.adapters.inject import (
    active_adapter,
    adapted_layers,
    adapter_names,
    adapters_disabled,
    inject_experts,
    inject_lora,
    merge_lora,
    set_adapter,
    unmerge_lora,
)
from pedgpt.adapters.lora import LoRALinear, pack_adapters
from pedgpt.adapters.storage import (
    adapter_base,
    adapter_fingerprint,
    check_base,
    experts_from_adapters,
    load_adapter,
    save_adapter,
)

__all__ = [
    "ExpertLoRALinear",
    "GateRecord",
    "LoRALinear",
    "active_adapter",
    "adapted_layers",
    "adapter_base",
    "adapter_fingerprint",
    "adapter_names",
    "check_base",
    "adapters_disabled",
    "balance_loss",
    "experts_from_adapters",
    "gate_metrics",
    "inject_experts",
    "inject_lora",
    "load_adapter",
    "merge_lora",
    "pack_adapters",
    "record_gates",
    "save_adapter",
    "set_adapter",
    "set_noise_rows",
    "unmerge_lora",
]
