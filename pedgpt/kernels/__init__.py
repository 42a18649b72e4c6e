"""Fused operators with hand-written backward passes, in torch and in Triton; they import nothing of ours."""

from pedgpt.kernels.attention import attention
from pedgpt.kernels.linear import Linear, linear
from pedgpt.kernels.lora_matmul import lora_linear

__all__ = ["Linear", "attention", "linear", "lora_linear"]
