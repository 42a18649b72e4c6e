"""One loop, its settings, optimizer, checkpoints and distribution. Knows no model, no data, no loss."""

from pedgpt.training.batches import BatchPlan
from pedgpt.training.config import TrainingSettings, make_printable, parse_settings, run_recipe
from pedgpt.training.distributed import World, gather_weights, run_on_main, shard, start, stop
from pedgpt.training.loop import evaluation, finish, is_finished, settle_run, train
from pedgpt.training.metrics import ChosenLikelihoodWatch

__all__ = [
    "BatchPlan",
    "ChosenLikelihoodWatch",
    "TrainingSettings",
    "World",
    "evaluation",
    "finish",
    "gather_weights",
    "is_finished",
    "make_printable",
    "parse_settings",
    "run_on_main",
    "run_recipe",
    "settle_run",
    "shard",
    "start",
    "stop",
    "train",
]
