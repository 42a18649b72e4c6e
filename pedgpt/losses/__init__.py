"""Objectives of the four stages: pure functions of tensors."""

from pedgpt.losses.causal_lm import IGNORE_INDEX, causal_lm_loss, sequence_logps
from pedgpt.losses.dfpo import DFPOLoss, dfpo_loss

__all__ = ["IGNORE_INDEX", "DFPOLoss", "causal_lm_loss", "dfpo_loss", "sequence_logps"]
