"""Run micro-batches as compiled functions, one after the other: for GPUs, with --compile on.

A pass of a small model is a thousand operations, each started by Python and the driver. Compiled, the graph is built
once for a shape, and element-wise operations are fused. So that shapes come again, rows are filled up to few numbers
of rows. Neither has been measured on a GPU.
"""

from collections.abc import Callable

from mlx_retrieval.backend import mx

from mlx_retrieval.models.batching import MicroBatch, rounded_rows
from mlx_retrieval.models.compiled import CompiledFunctions, evaluate, shapes_of
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.model_runner import ModelRunner


class CompiledModelRunner(ModelRunner):
    """Compute representations and gradients with compiled functions; see `ModelRunner`."""

    compiled = True
    rounds_rows = True

    def __init__(self, model: RetrievalModel):
        super().__init__(model)
        self._functions = CompiledFunctions(model)

    def limit_shapes(self, models: int = 1) -> None:
        self._functions.shapes_kept = shapes_of(models)

    def _evaluated(self, micro_batch: MicroBatch, seed: int | None = None) -> mx.array:
        weights = self._functions.weights()
        result = self._functions("forward", filled(micro_batch), seed, weights, [])[: len(micro_batch.ids)]
        evaluate(result)
        return result

    def _gradient_function(self) -> Callable[[MicroBatch, int, mx.array], dict]:
        weights, trained = self._functions.weights(), self.model.trainable_parameters()

        def gradient(micro_batch: MicroBatch, seed: int, cotangent: mx.array) -> dict:
            batch = filled(micro_batch)
            missing = len(batch.ids) - len(cotangent)
            cotangent = mx.pad(cotangent, [(0, missing), *[(0, 0)] * (cotangent.ndim - 1)])
            return self._functions("gradient", batch, seed, weights, [], trained, cotangent, [])

        return gradient


def filled(micro_batch: MicroBatch) -> MicroBatch:
    """Fill a micro-batch up to `rounded_rows` by repeating its last row; a repeated row's cotangent has to be zero."""
    missing = int(rounded_rows(len(micro_batch.ids))) - len(micro_batch.ids)
    if not missing:
        return micro_batch

    def fill(array: mx.array) -> mx.array:
        return mx.concatenate([array, mx.broadcast_to(array[-1:], (missing, *array.shape[1:]))])

    rows = {name: fill(array) for name, array in micro_batch._asdict().items() if isinstance(array, mx.array)}
    return micro_batch._replace(**rows)  # `past` is the same for all rows
