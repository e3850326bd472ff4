"""Compute a loss and its gradient over micro-batches (gradient caching; Gao et al. 2021)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlx_retrieval.backend import mx, nn

import numpy as np

from data_loader import Batch
from mlx_retrieval import backend
from mlx_retrieval.backbones.gradient_checkpointing import seed as seed_dropout
from mlx_retrieval.models.batching import MicroBatch, pad_rows, plan, shares
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.training import distributed
from mlx_retrieval.training.clock import Clock
from mlx_retrieval.utils.errors import UserError

# Representations (N, ...) of a batch's N texts -> scalar loss. It may have a method `gradient` with the same arguments
# that returns the loss and its gradient by the representations, where it knows a better way than `mx.value_and_grad`.
Objective = Callable[[mx.array, Batch], mx.array]
PARTS_OF_A_RANK = 2  # micro-batches, at least: of two that differ in size, one rank would have less to do


class Gradient(NamedTuple):
    """What one batch gives."""

    loss: mx.array  # float32 scalar
    gradient: dict  # of the trainable parameters
    representations: mx.array  # (N, ...) float32
    padded_tokens: int  # tokens that went through the backbone once, padding included
    micro_batches: int


def join(parts: Sequence[mx.array], order: np.ndarray) -> mx.array:
    """Representations of micro-batches, (R_i, ...) each, as one array in the batch's order.

    Token representations (R_i, L_i, d) are padded with zeros to the longest.
    """
    if parts[0].ndim == 3:
        longest = max(part.shape[1] for part in parts)
        parts = [mx.pad(part, [(0, 0), (0, longest - part.shape[1]), (0, 0)]) for part in parts]
    return mx.concatenate(parts)[mx.array(np.argsort(order))]


def split(joined: mx.array, parts: Sequence[mx.array], order: np.ndarray) -> list[mx.array]:
    """The rows of a `join`ed array, in the shapes of the micro-batches that they came from."""
    rows = joined[mx.array(order)]
    ends = np.cumsum([len(part) for part in parts])[:-1].tolist()
    return [
        mine[:, : part.shape[1]] if part.ndim == 3 else mine
        for mine, part in zip(mx.split(rows, ends), parts, strict=True)
    ]


class Differentiator:
    """Loss and gradient of whole batches, exact whatever the micro-batches.

    Args:
        model: maps a MicroBatch to representations, one a row.
        objective: the loss of a batch's representations.
        accumulation: cut a batch into at least so many micro-batches; 0 = as many as `budget` asks for.
        budget: most tokens of a micro-batch; 0 = what suits the device. With both, the smaller one counts.
    """

    def __init__(
        self, model: RetrievalModel, objective: Objective, accumulation: int = 0, budget: int = 0, pad_id: int = 0
    ):
        self.model, self.objective, self.runner, self.clock = model, objective, make_runner(model), Clock()
        self.accumulation, self.budget, self.pad_id = accumulation, budget, pad_id

    def _budget(self, batch: Batch) -> float:
        """Most tokens that may be in the backbone at once."""
        wanted = self._wanted
        if wanted == 1 and not self.budget:
            return math.inf
        share = -(-batch.tokens // wanted) if wanted else math.inf
        return min(share, self.budget or (math.inf if self.accumulation else backend.MICRO_BATCH_TOKENS))

    @property
    def _wanted(self) -> int:
        """Micro-batches that there have to be at least."""
        return max(self.accumulation, PARTS_OF_A_RANK * distributed.size() if distributed.size() > 1 else 0)

    def _cut(self, batch: Batch) -> tuple[list[MicroBatch], np.ndarray]:
        """The batch's micro-batches, and the order in which they hold its texts."""
        budget = self._budget(batch)
        if budget == math.inf:
            everything = np.arange(len(batch.texts))
            return [pad_rows(batch.texts, everything, self.pad_id)], everything
        while len(index := plan(batch.texts.lengths, budget)) < min(self._wanted, len(batch.texts)):
            budget *= 0.9  # texts that fill a micro-batch alone leave fewer than there should be
        return [pad_rows(batch.texts, part, self.pad_id) for part in index], np.concatenate(index)

    def __call__(self, batch: Batch, seed: int) -> Gradient:
        rows, order = self._cut(batch)
        padded = sum(part.ids.size for part in rows)
        seeds = np.random.SeedSequence(seed).generate_state(len(rows))
        if len(rows) < distributed.size():
            raise UserError(
                f"a batch of {len(batch.texts)} texts is too small for {distributed.size()} ranks (--batch-size)"
            )
        # What has room at once needs no second pass; but an objective with a gradient of its own saves memory by it.
        room = padded <= self._budget(batch) and not hasattr(self.objective, "gradient")
        if not self.runner.compiled and (len(rows) == 1 or (room and distributed.size() == 1)):
            loss, gradient, parts = self._plain(rows, seeds, batch, order)
        else:
            loss, gradient, parts = self._cached(rows, seeds, batch, order)
        return Gradient(loss, gradient, join(parts, order), padded, len(rows))

    def _plain(self, rows: list[MicroBatch], seeds: np.ndarray, batch: Batch, order: np.ndarray) -> tuple:
        def loss_of() -> tuple[mx.array, list[mx.array]]:
            parts = []
            for part, seed in zip(rows, seeds, strict=True):
                seed_dropout(int(seed))
                parts.append(self.model(part))
            return self.objective(join(parts, order), batch), parts

        with self.clock("forward, loss, backward"):
            (loss, parts), gradient = nn.value_and_grad(self.model, loss_of)()
            mx.eval(loss, gradient, parts)
        return loss, gradient, parts

    def _cached(self, rows: list[MicroBatch], seeds: np.ndarray, batch: Batch, order: np.ndarray) -> tuple:
        # 1. Representations of all micro-batches, without a gradient; of several ranks, each computes its share.
        whose = shares(rows, distributed.size()) if distributed.size() > 1 else [range(len(rows))]
        mine = whose[distributed.rank()]
        my_rows, my_seeds, saved = [rows[i] for i in mine], [seeds[i] for i in mine], {}
        with self.clock("forward"):
            parts = list(self.runner.representations(my_rows, my_seeds, saved))
        if distributed.size() > 1:
            with self.clock("exchange"):
                parts = distributed.exchange(parts, distributed.shapes_of(parts[0], rows), whose)
        # 2. The loss of the whole batch, and its gradient with respect to the representations.
        gradient_of = getattr(self.objective, "gradient", None) or mx.value_and_grad(self.objective)
        with self.clock("loss"):
            loss, cotangent = gradient_of(join(parts, order), batch)
            cotangents = split(cotangent, parts, order)
            cotangents = [cotangents[i] for i in mine]
            mx.eval(loss, cotangents)
        # 3. Every micro-batch again, under the same dropout, with its share of that gradient.
        with self.clock("backward"):
            gradient = self.runner.gradient(my_rows, my_seeds, cotangents, saved)
        if distributed.size() > 1:
            with self.clock("exchange"):
                gradient = distributed.total(gradient)
        return loss, gradient, parts

    def loss(self, batch: Batch) -> float:
        """The loss alone, without dropout or gradient."""
        rows, order = self._cut(batch)
        return self.objective(join(list(self.runner.representations(rows)), order), batch).item()
