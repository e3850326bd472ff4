"""Run micro-batches through a model: representations and gradients, one micro-batch after the other.

This is the path of Metal and CUDA. `compiled_model_runner.py` has the same methods for compiled passes on GPUs, and
`cpu_model_runner.py` for CPUs, where several micro-batches are computed side by side; `runners.make_runner` chooses.
All give the same results up to float32 rounding, and each gives the same bits for the same micro-batches.
"""

from collections.abc import Callable, Iterator, Sequence

from mlx_retrieval.backend import device_memory, mx, nn
from mlx_retrieval.backend.device_errors import halved

import numpy as np
from mlx.utils import tree_map

from mlx_retrieval import backend
from mlx_retrieval.backbones import gradient_checkpointing, layer_size
from mlx_retrieval.models import batching
from mlx_retrieval.models.batching import MicroBatch, Texts
from mlx_retrieval.models.compiled import evaluate
from mlx_retrieval.models.heads import RetrievalModel, YesNoHead

# By the number of a micro-batch: the matrix products of its forward pass, which the backward pass then need not
# repeat. The backward pass empties it.
SavedProducts = dict[int, list[mx.array]]


def evaluate_weights(model: RetrievalModel) -> None:
    """Compute the weights and constants that a pass needs: only the thread that made them lazily can do that.

    The output layer of a language model stays unread where the head does not judge by its logits.
    """
    trunk = model.backbone if isinstance(model.head, YesNoHead) else model.backbone.trunk
    modules = [*trunk.modules(), *model.head.modules()]
    mx.eval([[v for v in (*m.values(), *vars(m).values()) if isinstance(v, mx.array)] for m in modules])


def in_float32(grads: dict) -> dict:
    """Return gradients in float32. In half precision, sums of them would lose what is small beside them."""
    return tree_map(lambda grad: grad.astype(mx.float32), grads)


class ModelRunner:
    """Compute representations and gradients of micro-batches.

    Args:
        model: its weights may change between calls; its modules must not.

    Attributes:
        compiled: whether passes run as compiled functions.
        rounds_rows: whether micro-batches are filled up to `batching.rounded_rows`.
        workers: micro-batches computed at the same time.
        length_grid: padded lengths are multiples of this.
        most_tokens: what the device could compute at once, padding included, after it failed; None = it has not.
    """

    compiled = False
    rounds_rows = False

    def __init__(self, model: RetrievalModel):
        self.model = model
        self.workers = 1
        self.length_grid = backend.LENGTH_GRID
        self.most_tokens: int | None = None
        self._cpu_overhead = batching.cpu_overhead(layer_size(model.backbone))
        evaluate_weights(model)
        device_memory.bound_cache()

    @property
    def overhead(self) -> int:
        """The cost of a micro-batch, in tokens."""
        return backend.MICRO_BATCH_OVERHEAD if backend.IS_GPU else self._cpu_overhead

    def limit_shapes(self, models: int = 1) -> None:
        """Keep fewer graphs from now on, so that a server's memory does not grow with every length and batch size.

        Args:
            models: of the server, which share what is kept.
        """

    def micro_batches(self, texts: Texts, budget: int, pad_id: int = 0) -> Iterator[tuple[np.ndarray, MicroBatch]]:
        """Yield the micro-batches that suit this runner; see `batching.micro_batches`."""
        return batching.micro_batches(texts, budget, pad_id, self.length_grid, self.rounds_rows, self.overhead)

    def representations(
        self,
        micro_batches: Sequence[MicroBatch],
        seeds: Sequence[int] | None = None,
        saved: SavedProducts | None = None,
    ) -> Iterator[mx.array]:
        """Yield the representations of each micro-batch, (R, ...), in order, evaluated and without a gradient.

        Args:
            seeds: dropout seed of each micro-batch; None = do not seed.
            saved: filled with products that `gradient` of the same micro-batches can reuse; unused by this class.

        Without seeds, what the device cannot compute at once is computed in parts; DeviceError if one row is too much.
        With seeds RuntimeError: the gradient must see the same micro-batches, and a trainer repeats the whole step.
        """
        for i, micro_batch in enumerate(micro_batches):
            if seeds is None:
                yield self._in_parts(micro_batch)
            else:
                yield self._evaluated(micro_batch, int(seeds[i]))
        device_memory.bound_cache()

    def _evaluated(self, micro_batch: MicroBatch, seed: int | None = None) -> mx.array:
        """Return the representations of a micro-batch, computed; `seed` is that of dropout, None = do not seed."""
        if seed is not None:
            gradient_checkpointing.seed(seed)
        result = mx.stop_gradient(self.model(micro_batch))
        mx.eval(result)
        return result

    def _in_parts(self, micro_batch: MicroBatch) -> mx.array:
        """Return the representations of a micro-batch, computed in as many parts as the device needs."""
        rows, length = micro_batch.ids.shape
        most = rows if self.most_tokens is None else max(1, self.most_tokens // length)

        def overloaded(fewer: int) -> None:
            self.most_tokens = min(fewer * length, self.most_tokens or fewer * length)

        parts = list(halved(lambda *part: self._evaluated(micro_batch.rows(*part)), 0, rows, most, overloaded))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def gradient(
        self,
        micro_batches: Sequence[MicroBatch],
        seeds: Sequence[int],
        cotangents: Sequence[mx.array],
        saved: SavedProducts | None = None,
    ) -> dict:
        """Return the gradient of sum(representations * cotangents) over all micro-batches, float32, evaluated.

        Args:
            seeds: dropout seed of each micro-batch.
            cotangents: of each micro-batch, an array in the shape of its representations.
            saved: as `representations` filled it, for the same micro-batches and weights; unused by this class.
        """
        gradient_of = self._gradient_function()
        total = None
        for micro_batch, seed, cotangent in zip(micro_batches, seeds, cotangents, strict=True):
            gradient = in_float32(gradient_of(micro_batch, int(seed), cotangent))
            total = gradient if total is None else tree_map(mx.add, total, gradient)
            evaluate(total)
        return total

    def _gradient_function(self) -> Callable[[MicroBatch, int, mx.array], dict]:
        """Return a function from a micro-batch, its dropout seed and its cotangents to its gradient, not evaluated."""
        value_and_grad = nn.value_and_grad(self.model, lambda batch, cotangent: (self.model(batch) * cotangent).sum())

        def gradient(micro_batch: MicroBatch, seed: int, cotangent: mx.array) -> dict:
            gradient_checkpointing.seed(seed)
            return value_and_grad(micro_batch, cotangent)[1]

        return gradient

    def held_bytes(self, tokens: int, in_passes: int) -> int:
        """Return the bytes held during a step, beside weights and activations, at most.

        Args:
            tokens: of the step's micro-batches, with padding.
            in_passes: those of the micro-batches that are computed at the same time.
        """
        return 0
