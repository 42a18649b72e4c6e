"""Fused operators with hand-written backward passes, in torch and in Triton; they import nothing of ours."""

from pedgpt.kernels._dispatch import transformed
from pedgpt.kernels.attention import Layout, attention
from pedgpt.kernels.cpu.products import Linear, linear
from pedgpt.kernels.linear_logps import linear_nll, linear_token_logps, unit_rows
from pedgpt.kernels.lora_matmul import lora_linear
from pedgpt.kernels.pointwise import add_rms_norm, rms_norm, rotary, swiglu
from pedgpt.kernels.quantized import Quantization, Quantized, QuantizedLinear

__all__ = [
    "Layout", "Linear", "Quantization", "Quantized", "QuantizedLinear", "add_rms_norm", "attention", "linear",
    "linear_nll", "linear_token_logps", "lora_linear", "rms_norm", "rotary", "swiglu", "transformed", "unit_rows",
]  # fmt: skip
