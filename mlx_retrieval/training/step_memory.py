"""What a training step takes at its peak, beside weights and optimizer: from the memory of a micro-batch to a batch's.

measure_passes(grad_cache, texts).peak(lengths, Cutting(budget=4096))       bytes

memory.py chooses a budget by it, from passes that are measured; estimate.py foresees a run, from passes that are
calculated.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mlx_retrieval.backend import mx

import numpy as np
from mlx.utils import tree_flatten

from mlx_retrieval.models import maxsim
from mlx_retrieval.models.batching import MicroBatch, Texts, pad_rows
from mlx_retrieval.training.cutting import Cutting
from mlx_retrieval.training.gradient_cache import GradientCache

# Copies of all representations that a step holds at once: they, their gradient, and both in the batch's order.
VECTOR_COPIES, TOKEN_COPIES = 4, 6
# Workers are seldom at the peak of their passes at the same moment: the share of the others' that adds to one's. Those
# that begin together with micro-batches of one shape are, with what they keep: SmolLM2's three take 2.8 times one.
OTHERS, EQUALS = 0.7, 0.9
# Of a similarity of two tokens: it, the gradient of the chosen ones, and copies of them in other orders.
SIMILARITY_BYTES = 12
# Times the gradients, while the optimizer updates the weights: they, clipped ones, and new weights and moments.
UPDATE = 3


@dataclass(frozen=True)
class StepMemory:
    """The memory of steps, in bytes, beyond weights and optimizer.

    Attributes:
        of_pass: (rows, tokens of a row with padding) of a micro-batch -> what its passes take for the gradient.
        kept: the same -> those of it that several micro-batches in one graph hold each; the rest is held once.
        representation: of a text, or of a token if `token_vectors`.
        grads: the gradients of the trained weights, which are float32.
        compiled: whether passes are compiled; others compute a batch that fits the budget in one graph.
        workers: micro-batches computed at the same time.
        held: (tokens of a batch, those in the passes at once) -> merged weights and saved products.
        loss: beside the representations, when no passes are computed.
    """

    of_pass: Callable[[int, int], float]
    kept: Callable[[int, int], float]
    representation: float
    grads: int = 0
    token_vectors: bool = False
    compiled: bool = False
    workers: int = 1
    held: Callable[[int, int], int] = lambda tokens, at_once: 0
    loss: int = 0

    def peak(self, lengths: np.ndarray, cutting: Cutting) -> int:
        """Return what a step takes at most on a batch of texts of these lengths (N,)."""
        shapes = cutting.shapes(lengths)
        sizes = sorted((rows * width for rows, width in shapes), reverse=True)
        one_graph = len(shapes) == 1 or (sum(sizes) <= cutting.limit(int(lengths.sum())) and not self.token_vectors)
        if one_graph and not self.compiled:
            once = max(self.of_pass(*shape) - self.kept(*shape) for shape in shapes)
            return int(max(sum(self.kept(*shape) for shape in shapes) + once, UPDATE * self.grads))
        if self.token_vectors:
            representations = TOKEN_COPIES * sum(sizes) * self.representation
        else:
            representations = VECTOR_COPIES * len(lengths) * self.representation
        largest, *others = sorted(shapes, key=lambda shape: self.of_pass(*shape), reverse=True)[: self.workers]
        at_once = self.of_pass(*largest) + sum(self._beside(shape, largest) for shape in others)
        at_once += self.held(sum(sizes), sum(sizes[: self.workers]))
        sums = self.grads if len(shapes) > self.workers else 0  # of the gradient, besides a micro-batch's own
        return int(max(max(at_once + sums, self.loss) + representations, UPDATE * self.grads))

    def _beside(self, shape: tuple[int, int], largest: tuple[int, int]) -> float:
        """Return the bytes that a worker's micro-batch takes while another one's is at its peak."""
        share = OTHERS * self.of_pass(*shape)
        return max(share, EQUALS * self.kept(*shape)) if shape == largest else share


def loss_of_tokens(lengths: np.ndarray, queries: int) -> int:
    """Return the bytes that comparing a batch's token vectors takes: those of a tile of similarities.

    `lengths`: the tokens of each text, those of the queries first.
    """
    wide = int(lengths[:queries].max()) * int(lengths[queries:].max())
    tile = min(maxsim.SIMILARITIES_AT_ONCE, queries * (len(lengths) - queries) * wide)
    return SIMILARITY_BYTES * tile


def measure_passes(grad_cache: GradientCache, texts: Texts, loss: int = 0) -> StepMemory:
    """Measure passes on a few of these texts, the longest among them. Weights stay as they are.

    `loss`: see `StepMemory`; it is not measured.
    """
    runner = grad_cache.runner
    grad_cache.model.train()
    longest = int(texts.lengths.argmax())
    half = int(np.abs(texts.lengths - texts.lengths[longest] / 2).argmin())

    def rows(*numbers: int) -> MicroBatch:
        return pad_rows(texts, np.array(numbers), grad_cache.pad_id)

    mx.clear_cache()
    # The first pass reads the weights, which would count as the pass's own.
    _cost(grad_cache, rows(int(texts.lengths.argmin())))
    one, representations = _cost(grad_cache, rows(longest))
    width, short = rows(longest).ids.size, rows(half).ids.size
    of_halves = _cost(grad_cache, rows(half, half))[0] if short < width else 0
    # Part of the cost is a pass's own, whatever its rows. Where nothing is compiled, the shorter text shows it as well,
    # and sooner: a Mac does this before every run.
    if of_halves and not runner.compiled:
        per_pass = max(0, 2 * _cost(grad_cache, rows(half))[0] - of_halves)
    else:
        per_pass = max(0, 2 * one - _cost(grad_cache, rows(longest, longest))[0])
    # The rest is the tokens', and a token takes more in a longer text, as attention does.
    per_token, growth = max(0, one - per_pass) / width, 0.0
    if of_halves:
        growth = max(0.0, (per_token - (of_halves - per_pass) / (2 * short)) / (width - short))

    def of_pass(rows: int, width_: int) -> float:
        return per_pass + rows * width_ * max(0.0, per_token + growth * (width_ - width))

    layers = len(grad_cache.model.backbone.layers)

    def kept(rows: int, width_: int) -> float:  # by all blocks; about as much as one keeps is there once
        return (of_pass(rows, width_) - per_pass) * layers / (layers + 1)

    return StepMemory(
        of_pass,
        kept,
        representation=representations.nbytes / (width if representations.ndim == 3 else 1),
        grads=sum(mx.float32.size * v.size for _, v in tree_flatten(grad_cache.model.trainable_parameters())),
        token_vectors=representations.ndim == 3,
        compiled=runner.compiled,
        workers=runner.workers,
        held=runner.held_bytes,
        loss=loss if representations.ndim == 3 else 0,
    )


def _cost(grad_cache: GradientCache, micro_batch: MicroBatch) -> tuple[int, mx.array]:
    """Return the bytes that the passes of a micro-batch take at their peak, and its representations."""
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    (representations,) = grad_cache.runner.representations([micro_batch], [0])
    grad_cache.runner.gradient([micro_batch], [0], [mx.zeros_like(representations)])
    return mx.get_peak_memory() - active, representations
