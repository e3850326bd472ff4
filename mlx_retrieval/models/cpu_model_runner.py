"""Run micro-batches on CPUs: compiled functions, several worker threads, LoRA adapters merged into their weights.

mlx's element-wise functions use one core each, so several micro-batches are computed side by side, each on a thread
with a stream of its own.
"""

import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager

from mlx_retrieval.backend import blas, device_memory, mx

from mlx.utils import tree_map

from mlx_retrieval import backend
from mlx_retrieval.backbones import merged_lora, saved_products
from mlx_retrieval.models.batching import MicroBatch, shares
from mlx_retrieval.models.compiled import CompiledFunctions, evaluate, shapes_of
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.model_runner import ModelRunner, SavedProducts, in_float32
from mlx_retrieval.utils.threads import LastingThread


class Worker(LastingThread):
    """A thread with a stream of its own."""

    def _serve(self) -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            super()._serve()


@functools.cache
def _workers() -> list[Worker]:
    return [Worker("model runner") for _ in range(backend.WORKERS)]


@contextmanager
def _finishing(futures: Collection[Future]) -> Iterator[None]:
    """On exit, cancel or wait for all tasks: a worker that still builds a graph would leave tracers in the model."""
    try:
        yield
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def held_bytes(merged: int, product: int, tokens: int, in_passes: int, room: int) -> int:
    """Return what `CpuModelRunner.held_bytes` says, for a model of these sizes.

    Args:
        merged: bytes of the weights of the `merged_lora.mergeable` layers.
        product: bytes that their products take for each token.
        room: most bytes of products that a step keeps.
    """
    if tokens < backend.MICRO_BATCH_TOKENS:  # then nothing is merged
        return 0
    return merged + max(0, min(room, tokens * product) - in_passes * product)


class CpuModelRunner(ModelRunner):
    """Compute representations and gradients with compiled functions on worker threads; see `ModelRunner`."""

    compiled = True

    def __init__(self, model: RetrievalModel):
        super().__init__(model)
        self.workers = backend.WORKERS
        self._adapters = merged_lora.mergeable(model)
        trained = [] if self._adapters else saved_products.trained_layers(model.backbone)
        self._product_size = saved_products.size(self._adapters or trained)  # bytes of a token
        self._functions = [CompiledFunctions(model, self._adapters, trained) for _ in range(self.workers)]

    def limit_shapes(self, models: int = 1) -> None:
        for functions in self._functions:
            functions.shapes_kept = shapes_of(models)

    def representations(
        self,
        micro_batches: Sequence[MicroBatch],
        seeds: Sequence[int] | None = None,
        saved: SavedProducts | None = None,
    ) -> Iterator[mx.array]:
        """See `ModelRunner`; `saved` takes products up to `device_memory.for_products()`."""
        tokens = sum(micro_batch.ids.size for micro_batch in micro_batches)
        weights, merged = self._weights(tokens)
        saves = saved is not None and self._product_size and tokens >= backend.MICRO_BATCH_TOKENS
        saving = self._worth_saving(micro_batches) if saves else ()

        def task(functions: CompiledFunctions, i: int) -> mx.array:
            kind = "forward_saving" if i in saving else "forward"
            result = functions(kind, micro_batches[i], None if seeds is None else int(seeds[i]), weights, merged)
            evaluate(result)
            if i in saving:
                result, *saved[i] = result
            return result

        with blas.one_thread(len(micro_batches)):
            futures = {}
            for worker, functions, share in self._spread(micro_batches):
                for i in share:
                    futures[i] = worker.submit(functools.partial(task, functions, i))
            with _finishing(futures.values()):
                for i in range(len(micro_batches)):
                    yield futures[i].result()
                    del futures[i]

    def gradient(
        self,
        micro_batches: Sequence[MicroBatch],
        seeds: Sequence[int],
        cotangents: Sequence[mx.array],
        saved: SavedProducts | None = None,
    ) -> dict:
        saved = {} if saved is None else saved
        weights, merged = self._weights(sum(micro_batch.ids.size for micro_batch in micro_batches))
        trained = self.model.trainable_parameters()
        mx.eval(cotangents)

        def task(functions: CompiledFunctions, share: list[int]) -> dict | None:
            total = None
            for i in sorted(share, key=lambda i: i not in saved):  # first those whose products take memory
                products = saved.pop(i, [])
                seed = int(seeds[i])
                arrays = weights, merged, trained, cotangents[i], products
                gradient = in_float32(functions("gradient", micro_batches[i], seed, *arrays))
                total = gradient if total is None else tree_map(mx.add, total, gradient)
                del arrays, products
                evaluate(total)
            return total

        with blas.one_thread(len(micro_batches)):
            futures = [
                worker.submit(functools.partial(task, functions, share))
                for worker, functions, share in self._spread(micro_batches)
            ]
            with _finishing(futures):
                sums = [gradient for future in futures if (gradient := future.result()) is not None]
        total = functools.reduce(functools.partial(tree_map, mx.add), sums)
        mx.eval(total)
        return total

    def held_bytes(self, tokens: int, in_passes: int) -> int:
        """Return the bytes of merged weights, and of saved products; those in the passes are activations of theirs."""
        merged = merged_lora.weight_size(self._adapters)
        return held_bytes(merged, self._product_size, tokens, in_passes, device_memory.for_products())

    def _spread(self, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[Worker, CompiledFunctions, list[int]]]:
        """Yield each worker, its functions, and the numbers of its micro-batches."""
        return zip(_workers(), self._functions, shares(micro_batches, self.workers), strict=True)

    def _worth_saving(self, micro_batches: Sequence[MicroBatch]) -> set[int]:
        """Return the micro-batches whose products there is room for, about equally many of each worker."""
        size, room, chosen = self._product_size, device_memory.for_products(), set()
        for turn in itertools.zip_longest(*shares(micro_batches, self.workers)):
            for i in turn:
                if i is not None and (needed := micro_batches[i].ids.size * size) <= room:
                    room -= needed
                    chosen.add(i)
        return chosen

    def _weights(self, tokens: int) -> tuple[dict, list[mx.array]]:
        """Return all weights, and those with adapters added to them; of these none where it would not be worth it."""
        weights = self._functions[0].weights()
        mx.eval(weights)  # see `model_runner.evaluate_weights`
        if tokens < backend.MICRO_BATCH_TOKENS:
            return weights, []
        merged = [merged_lora.merge(layer) for layer in self._adapters]
        mx.eval(merged)
        return weights, merged
