"""The loss of a whole batch and its gradient, computed in micro-batches (gradient caching; Gao et al. 2021).

grad_cache = GradientCache(model, objective, budget=4096)
result = grad_cache(batch, seed=0)              # StepResult(loss, grads, ...)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlx_retrieval.backend import mx, nn

import numpy as np

from data_loader import Batch
from mlx_retrieval.backbones.gradient_checkpointing import seed as seed_dropout
from mlx_retrieval.models.batching import MicroBatch, pad_rows, shares
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.model_runner import in_float32
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.training import distributed, loss_scale
from mlx_retrieval.training.clock import Clock
from mlx_retrieval.training.cutting import Cutting
from mlx_retrieval.utils.errors import UserError

# Representations (N, ...) of a batch's N texts -> scalar loss. An objective may have a method `loss_and_grad` with the
# same arguments that returns the loss and its gradient with respect to the representations, where it knows a better way
# than `mx.value_and_grad`. If it has a module `projection`, the model has it under the same name, and does not use it;
# the gradient of that module is computed as well.
Objective = Callable[[mx.array, Batch], mx.array]
MICRO_BATCHES_PER_RANK = 2  # at least: of two that differ in size, one rank would have less to do


class StepResult(NamedTuple):
    """The loss of one batch, and what was computed on the way to it."""

    loss: mx.array  # float32 scalar
    grads: dict  # of the trainable parameters, float32
    representations: mx.array  # (N, ...) float32
    padded_tokens: int  # tokens that went through the backbone once, padding included
    micro_batches: int


def join(representations: Sequence[mx.array], order: np.ndarray) -> mx.array:
    """Concatenate the representations of micro-batches, (R_i, ...) each, in the batch's order.

    Token representations (R_i, L_i, d) are padded with zeros to the longest.
    """
    if representations[0].ndim == 3:
        longest = max(r.shape[1] for r in representations)
        representations = [mx.pad(r, [(0, 0), (0, longest - r.shape[1]), (0, 0)]) for r in representations]
    return mx.concatenate(representations)[mx.array(np.argsort(order))]


def split(joined: mx.array, representations: Sequence[mx.array], order: np.ndarray) -> list[mx.array]:
    """Undo `join`: return the rows of an array in the shapes of the micro-batches that they came from."""
    rows = joined[mx.array(order)]
    ends = np.cumsum([len(r) for r in representations])[:-1].tolist()
    return [
        piece[:, : r.shape[1]] if r.ndim == 3 else piece
        for piece, r in zip(mx.split(rows, ends), representations, strict=True)
    ]


def representation_shapes(one: mx.array, micro_batches: Sequence[MicroBatch]) -> list[tuple[int, ...]]:
    """Return the representations' shapes of all micro-batches, given those of one: (R, D), or (R, L, d) for tokens."""
    if one.ndim == 3:
        return [(*m.ids.shape, one.shape[2]) for m in micro_batches]
    return [(len(m.ids), *one.shape[1:]) for m in micro_batches]


class GradientCache:
    """Computes loss and gradient of whole batches.

    The result is the same however a batch is cut into micro-batches, but for dropout, which draws for each of them.

    Args:
        model: maps a MicroBatch to representations, one a row.
        objective: maps a batch's representations to its loss.
        accumulation: cut a batch into at least this many micro-batches; 0 = as many as `budget` requires.
        budget: tokens of a micro-batch at most; 0 = as suits the device. If both are given, the smaller one counts.
        pad_id: the token that fills shorter rows.
        compile: whether passes are compiled; see `make_runner`.
    """

    def __init__(
        self,
        model: RetrievalModel,
        objective: Objective,
        accumulation: int = 0,
        budget: int = 0,
        pad_id: int = 0,
        compile: str = "auto",
    ):
        self.model = model
        self.objective = objective
        self.runner = make_runner(model, compile)
        self.clock = Clock()
        self.accumulation = accumulation
        self.budget = budget
        self.pad_id = pad_id
        self.scaled = loss_scale.is_needed(model)
        self.at_once = 0  # tokens, padding included, of the last batch's largest micro-batch

    @property
    def cutting(self) -> Cutting:
        """How batches are cut into micro-batches."""
        ranks = distributed.size()
        least = max(self.accumulation, MICRO_BATCHES_PER_RANK * ranks if ranks > 1 else 0)
        runner = self.runner
        return Cutting(self.accumulation, self.budget, least, round_rows=runner.rounds_rows, overhead=runner.overhead)

    def plan(self, batch: Batch) -> tuple[list[MicroBatch], np.ndarray]:
        """Return the batch's micro-batches, and the order in which they hold its texts: (N,) int."""
        indices = self.cutting.indices(batch.texts.lengths)
        micro_batches = [pad_rows(batch.texts, index, self.pad_id) for index in indices]
        self.at_once = max(micro_batch.ids.size for micro_batch in micro_batches)
        return micro_batches, np.concatenate(indices)

    def __call__(self, batch: Batch, seed: int) -> StepResult:
        """Compute loss and gradient of a batch; `seed` is that of dropout. Everything returned is evaluated."""
        micro_batches, order = self.plan(batch)
        ranks = distributed.size()
        if len(micro_batches) < ranks:
            raise UserError(f"a batch of {len(batch.texts)} texts is too small for {ranks} ranks (--batch-size)")
        padded_tokens = sum(m.ids.size for m in micro_batches)
        seeds = np.random.SeedSequence(seed).generate_state(len(micro_batches))
        # What fits at once needs no second pass; but an objective with a gradient of its own saves memory by it.
        fits = padded_tokens <= self.cutting.limit(batch.tokens) and not hasattr(self.objective, "loss_and_grad")
        plain = not self.runner.compiled and (len(micro_batches) == 1 or (fits and ranks == 1))
        compute = self._plain if plain else self._cached
        for largest in loss_scale.LARGEST:
            loss, grads, representations = compute(micro_batches, seeds, batch, order, largest)
            if not self.scaled or not loss_scale.overflowed(loss, grads):
                break
        return StepResult(loss, grads, join(representations, order), padded_tokens, len(micro_batches))

    def _plain(
        self, micro_batches: list[MicroBatch], seeds: np.ndarray, batch: Batch, order: np.ndarray, largest: float
    ) -> tuple:
        """One forward and one backward pass over everything; in float16 scaled, see `loss_scale.scale_of`."""

        def loss_and_representations() -> tuple[mx.array, mx.array, list[mx.array], mx.array, dict]:
            representations = []
            for micro_batch, seed in zip(micro_batches, seeds, strict=True):
                seed_dropout(int(seed))
                representations.append(self.model(micro_batch))
            joined = join(representations, order)
            if not self.scaled:
                loss = self.objective(joined, batch)
                return loss, loss, representations, mx.array(1.0), {}
            # The loss's own gradient decides the scale, and its product with the representations passes it on.
            loss, grad, of_projection = self._loss_and_grad(mx.stop_gradient(joined), batch)
            scale = loss_scale.scale_of(grad, largest)
            return (joined * mx.stop_gradient(grad * scale)).sum(), loss, representations, scale, of_projection

        with self.clock("forward, loss, backward"):
            (_, loss, representations, scale, of_projection), grads = nn.value_and_grad(
                self.model, loss_and_representations
            )()
            grads = in_float32(grads)
            if self.scaled:
                grads = loss_scale.unscaled(grads, scale) | of_projection
            mx.eval(loss, grads, representations)
        return loss, grads, representations

    def _cached(
        self, micro_batches: list[MicroBatch], seeds: np.ndarray, batch: Batch, order: np.ndarray, largest: float
    ) -> tuple:
        """Gradient caching: forward, the loss's gradient by the representations, forward again and backward.

        `largest`: in float16 that gradient is scaled, see `loss_scale.scale_of`.
        """
        # 1. Representations of all micro-batches, without a gradient; of several ranks, each computes its share.
        ranks = distributed.size()
        by_rank = shares(micro_batches, ranks) if ranks > 1 else [range(len(micro_batches))]
        own = by_rank[distributed.rank()]
        own_micro_batches = [micro_batches[i] for i in own]
        own_seeds = [seeds[i] for i in own]
        saved = {}  # products of the forward passes that the backward passes use again
        with self.clock("forward"):
            representations = list(self.runner.representations(own_micro_batches, own_seeds, saved))
        if ranks > 1:
            with self.clock("exchange"):
                shapes = representation_shapes(representations[0], micro_batches)
                representations = distributed.all_gather(representations, shapes, by_rank)
        # 2. The loss of the whole batch, and its gradient with respect to the representations.
        with self.clock("loss"):
            loss, grad, of_projection = self._loss_and_grad(join(representations, order), batch)
            scale = loss_scale.scale_of(grad, largest) if self.scaled else None
            grad = grad if scale is None else grad * scale
            cotangents = split(grad, representations, order)
            own_cotangents = [cotangents[i] for i in own]
            mx.eval(loss, own_cotangents, of_projection)
        # 3. Every micro-batch again, under the same dropout, with its share of that gradient.
        with self.clock("backward"):
            grads = self.runner.gradient(own_micro_batches, own_seeds, own_cotangents, saved)
            if scale is not None:
                grads = loss_scale.unscaled(grads, scale)
                mx.eval(grads)
        if ranks > 1:
            with self.clock("exchange"):
                grads = distributed.all_sum(grads)
        return loss, grads | of_projection, representations  # the latter are of the whole batch on every rank

    def _loss_and_grad(self, representations: mx.array, batch: Batch) -> tuple[mx.array, mx.array, dict]:
        """Return the loss, its gradient by the representations, and that of the objective's projection, {} = none."""
        projection = getattr(self.objective, "projection", None)
        if projection is None:
            loss_and_grad = getattr(self.objective, "loss_and_grad", None) or mx.value_and_grad(self.objective)
            return *loss_and_grad(representations, batch), {}
        weights = projection.parameters()

        def loss_of(representations: mx.array, weights: dict) -> mx.array:
            projection.update(weights)
            return self.objective(representations, batch)

        try:
            loss, (grad, of_projection) = mx.value_and_grad(loss_of, argnums=(0, 1))(representations, weights)
        finally:
            projection.update(weights)
        return loss, grad, {"projection": of_projection}

    def loss(self, batch: Batch, objective: Objective | None = None) -> float:
        """Return the loss alone, without dropout or gradient. `objective`: None = that of training."""
        micro_batches, order = self.plan(batch)
        representations = join(list(self.runner.representations(micro_batches)), order)
        return (objective or self.objective)(representations, batch).item()
