"""Which rows a step trains on, and which of them this rank takes. The order never depends on the number of ranks."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from pedgpt.training.config import TrainingSettings


@dataclass(frozen=True)
class BatchPlan:
    """The order of `num_rows` rows over the whole training: every epoch its own shuffle, end to end, cut into steps."""

    num_rows: int
    global_batch_size: int
    micro_batch_size: int
    total_steps: int
    total_rows: int
    seed: int

    @classmethod
    def from_settings(cls, num_rows: int, settings: TrainingSettings) -> BatchPlan:
        """The plan that `epochs` or `max_steps` asks for; the last step takes what is left of the last epoch."""
        if num_rows == 0:
            raise ValueError("there is nothing to train on: no row is left after reading and filtering the data")
        size = settings.global_batch_size
        total_rows = settings.max_steps * size or max(1, round(settings.epochs * num_rows))
        steps = math.ceil(total_rows / size)
        return cls(num_rows, size, settings.micro_batch_size, steps, total_rows, settings.seed)

    def micro_batches(self, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[list[int], list[int]]]:
        """(rows, row ids) of each forward pass of this rank; all ranks get equally many, at the end perhaps empty ones.

        Row ids number the rows over the whole training.
        """
        ids = range(step * self.global_batch_size, min((step + 1) * self.global_batch_size, self.total_rows))
        mine = ids[rank::world_size]
        size = self.micro_batch_size
        rounds = math.ceil(math.ceil(len(ids) / world_size) / size)
        chunks = [mine[i * size : (i + 1) * size] for i in range(rounds)]
        return [([self._row(row_id) for row_id in chunk], list(chunk)) for chunk in chunks]

    def _row(self, row_id: int) -> int:
        epoch, place = divmod(row_id, self.num_rows)
        return _order(self.num_rows, self.seed, epoch)[place]


@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
