"""Fused operators with hand-written backward passes, in torch and in Triton; they import nothing of ours."""

from pedgpt.kernels.lora_matmul import lora_linear

__all__ = ["lora_linear"]
