"""Objectives of the four stages: pure functions of tensors."""

from pedgpt.losses.causal_lm import (
    IGNORE_INDEX,
    causal_lm_loss,
    linear_cross_entropy,
    linear_sequence_logps,
    next_token_loss,
    sequence_logps,
)
from pedgpt.losses.dfpo import DFPOLoss, check_dfpo_settings, dfpo_loss, linear_dfpo_loss

__all__ = [
    "IGNORE_INDEX",
    "DFPOLoss",
    "causal_lm_loss",
    "check_dfpo_settings",
    "dfpo_loss",
    "linear_cross_entropy",
    "linear_dfpo_loss",
    "linear_sequence_logps",
    "next_token_loss",
    "sequence_logps",
]
