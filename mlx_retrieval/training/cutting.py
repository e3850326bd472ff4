"""How the texts of a batch are cut into micro-batches: under a budget of tokens, and into as many as are asked for.

Cutting(budget=4096).indices(lengths)
"""

import math
from dataclasses import dataclass

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.models import batching


@dataclass(frozen=True)
class Cutting:
    """How batches are cut.

    Attributes:
        accumulation: cut a batch into at least this many micro-batches; 0 = as many as `budget` requires.
        budget: tokens of a micro-batch at most; 0 = `default`. If both are given, the smaller one counts.
        least: micro-batches that a batch is cut into at least, for accumulation and several ranks; 0 = any number.
        default: tokens of a micro-batch at most where neither is given; 0 = as suits this device.
        grid: padded lengths are multiples of this; 0 = as suits this device.
        round_rows: whether micro-batches are filled up to `batching.rounded_rows`, as compiled passes on GPUs need it.
        overhead: the cost of a micro-batch, in tokens; 0 = as suits this device.
    """

    accumulation: int = 0
    budget: int = 0
    least: int = 0
    default: int = 0
    grid: int = 0
    round_rows: bool = False
    overhead: int = 0

    def limit(self, tokens: int) -> float:
        """Return how many tokens of a batch of `tokens` tokens may be in the backbone at once."""
        if self.least == 1 and not self.budget:
            return math.inf
        share = -(-tokens // self.least) if self.least else math.inf
        default = math.inf if self.accumulation else self.default or backend.MICRO_BATCH_TOKENS
        return min(share, self.budget or default)

    def indices(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Return the numbers of the texts of each micro-batch, given the tokens of each text (N,)."""
        limit = self.limit(int(lengths.sum()))
        if limit == math.inf:
            return [np.arange(len(lengths))]
        least = min(self.least, len(lengths))
        # Where long texts fill micro-batches alone there are too few. How many a limit gives is known by planning only.
        grid, overhead = self.grid or None, self.overhead or None
        while len(indices := batching.plan(lengths, limit, grid, self.round_rows, overhead)) < least:
            limit *= 0.9
        return indices

    def shapes(self, lengths: np.ndarray) -> list[tuple[int, int]]:
        """Return (rows, tokens of a row with padding) of each micro-batch."""
        indices = self.indices(lengths)
        rows = np.array([len(index) for index in indices])
        rows = batching.rounded_rows(rows) if self.round_rows else rows
        widths = batching.padded(np.array([lengths[index].max() for index in indices]), self.grid or None)
        return list(zip(rows.tolist(), widths.tolist(), strict=True))
