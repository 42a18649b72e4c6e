"""Fused operators with hand-written backward passes, in torch and in Triton; they import nothing of ours."""

from pedgpt.kernels._transforms import transformed
from pedgpt.kernels.blocked_attention import attention, layers_mask
from pedgpt.kernels.cpu.products import Linear, linear
from pedgpt.kernels.cross_entropy import token_logps
from pedgpt.kernels.linear_logps import linear_nll, linear_token_logps, unit_rows
from pedgpt.kernels.lora_matmul import lora_linear
from pedgpt.kernels.pointwise import rms_norm, swiglu

__all__ = [
    "Linear",
    "attention",
    "layers_mask",
    "linear",
    "linear_nll",
    "linear_token_logps",
    "lora_linear",
    "rms_norm",
    "swiglu",
    "token_logps",
    "transformed",
    "unit_rows",
]
