"""Compile the passes of a model: one graph for each shape of micro-batch, at most as many as may be kept.

functions = CompiledFunctions(model)
functions("forward", micro_batch, None, functions.weights(), [])        # (R, ...), not evaluated

Every runner that compiles shares this: `cpu_model_runner.py`, and `compiled_model_runner.py` for all other devices.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from mlx_retrieval.backend import cpu_kernels, mx, nn

from mlx_retrieval.backbones import gradient_checkpointing, merged_lora, saved_products
from mlx_retrieval.backbones.saved_products import Products
from mlx_retrieval.models.batching import MicroBatch
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.utils.errors import UserError

# Compiled functions that are kept, each with the graph of one shape: 700 bytes an operation, half a megabyte for three
# layers, and on Metal a buffer for every constant. The least recently used one makes room. 200 batches of 64 rows of
# MedQuAD meet 70 shapes, each with two functions. A server keeps fewer, as it always meets new ones: its models share
# SHAPES_SERVED, each with SHAPES_OF_ONE at least.
SHAPES_KEPT, SHAPES_SERVED, SHAPES_OF_ONE = 128, 24, 6
# While a graph is built the model holds tracers instead of weights; and mlx's random state is shared by all threads.
_building = threading.Lock()


def evaluate(arrays: mx.array | dict) -> None:
    """Evaluate; a kernel that cannot be compiled is a UserError with the compiler's reason."""
    try:
        mx.eval(arrays)
    except RuntimeError as error:
        if (reason := cpu_kernels.failure(error)) is None:
            raise
        raise UserError(f"a CPU kernel could not be compiled: {reason}") from error


def shapes_of(models: int) -> int:
    """Return how many shapes each of a server's models keeps, so that all of them soon have what they keep."""
    return max(SHAPES_OF_ONE, SHAPES_SERVED // models)


class CompiledFunctions:
    """The compiled functions of one model: one for each shape of micro-batch and thread, at most `shapes_kept`.

    Args:
        adapters: the `merged_lora.mergeable` layers whose merged weights are given with each call; () = none.
        trained: the `saved_products.trained_layers`, whose products a pass may keep; () = none.

    mlx keeps every graph of a function until the function is deleted. So each shape has a function of its own.
    """

    def __init__(self, model: RetrievalModel, adapters: Sequence[nn.Module] = (), trained: Sequence[nn.Module] = ()):
        self.model, self.adapters, self.trained, self.shapes_kept = model, adapters, trained, SHAPES_KEPT
        self._compiled: OrderedDict[tuple, Callable] = OrderedDict()  # most recently used last

    def weights(self) -> dict:
        """Return the model's parameters, to be shared by calls: a walk takes a third of a call."""
        with _building:
            return self.model.parameters()

    def __call__(
        self, kind: str, micro_batch: MicroBatch, seed: int | None, weights: dict, *arrays
    ) -> mx.array | list | dict:
        """Build the graph of one pass without computing it.

        Args:
            kind: "forward", "forward_saving" or "gradient", the method to compile.
            seed: of dropout; None = do not seed.
            weights: see `weights`.
            arrays: that method's further arguments before `micro_batch`.
        """
        with _building:
            random = self.model.training and any(isinstance(m, nn.Dropout) and m._p_1 < 1 for m in self.model.modules())
            counts = tuple(len(each) for each in arrays if isinstance(each, list))
            function = self._function(kind, micro_batch, mx.random.state if random else [], counts)
            if seed is not None:
                gradient_checkpointing.seed(seed)
            result = function(weights, *arrays, *micro_batch)
            if random:
                gradient_checkpointing.seed(seed or 0)  # the state that the graph leaves behind belongs to this thread
            return result

    def _function(self, kind: str, micro_batch: MicroBatch, state: list, counts: tuple[int, ...]) -> Callable:
        """Return the function compiled for these shapes and numbers (`counts`) of merged weights and products."""
        past = micro_batch.past[0][0].shape if micro_batch.past else None
        # A graph holds its thread's stream, and mlx deletes a function's graphs only in the thread that called it last.
        key = (threading.get_ident(), kind, self.model.training, counts, micro_batch.ids.shape, past)
        if key not in self._compiled:
            self._compiled[key] = mx.compile(getattr(self, kind), inputs=state, outputs=state)
        self._compiled.move_to_end(key)
        while len(self._compiled) > self.shapes_kept:
            self._compiled.popitem(last=False)
        return self._compiled[key]

    def forward(self, weights: dict, merged: list[mx.array], *micro_batch: mx.array) -> mx.array:
        return self._with(weights, merged, Products(), lambda: self.model(MicroBatch(*micro_batch)))

    def forward_saving(self, weights: dict, merged: list[mx.array], *micro_batch: mx.array) -> list[mx.array]:
        products = Products()
        return [self._with(weights, merged, products, lambda: self.model(MicroBatch(*micro_batch))), *products.computed]

    def gradient(
        self, weights: dict, merged: list, trained: dict, cotangent: mx.array, products: list, *micro_batch: mx.array
    ) -> dict:
        def value(trained: dict) -> mx.array:
            self.model.update(trained)
            return (self.model(MicroBatch(*micro_batch)) * cotangent).sum()

        return self._with(weights, merged, Products(products), lambda: mx.grad(value)(trained))

    def _with(self, weights: dict, merged: list[mx.array], products: Products, function: Callable) -> mx.array | dict:
        """Call `function` while the model holds `weights`, so that a compiled graph has them as inputs, not inside."""
        own = self.model.parameters()
        self.model.update(weights)
        try:
            with merged_lora.merged(self.adapters, merged, products), saved_products.of(self.trained, products):
                return function()
        finally:
            self.model.update(own)
