"""Forward and backward passes of micro-batches through a model.

On CPUs they are compiled, adapters are merged into the weights they adapt, and several micro-batches are computed side
by side: mlx's element-wise functions use one core each. Elsewhere they are computed one after the other as they come.
Either way the results are the same up to float32 rounding, and the same bits for the same micro-batches.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

from mlx_retrieval.backend import blas, mx, nn

from mlx.utils import tree_map

from mlx_retrieval import backend
from mlx_retrieval.backbones import gradient_checkpointing, merged_lora
from mlx_retrieval.models.batching import MicroBatch
from mlx_retrieval.models.cpu_model_runner import (
    KEPT_BYTES,
    Kept,
    Worker,
    _at_work,
    _building,
    _evaluate,
    _Functions,
    _workers,
)
from mlx_retrieval.models.heads import RetrievalModel


def shares(rows: Sequence[MicroBatch], count: int) -> list[list[int]]:
    """Which micro-batches each of `count` workers computes: equal work as far as possible, and always the same."""
    work, parts = [0] * count, [[] for _ in range(count)]
    for i in sorted(range(len(rows)), key=lambda i: -rows[i].ids.size):
        least = work.index(min(work))
        work[least] += rows[i].ids.size
        parts[least].append(i)
    return parts


class Passes:
    """What computes representations and gradients of micro-batches.

    Args:
        model: its weights may change between calls; its modules must not.
    """

    def __init__(self, model: RetrievalModel):
        self.model = model
        # Checkpointed blocks draw their dropout seeds in Python, which a compiled function would do only once.
        self.compiled = backend.COMPILED and not gradient_checkpointing.checkpointed(model.backbone)
        self._adapters = merged_lora.mergeable(model) if self.compiled else []
        if self.compiled:
            # A worker can compute nothing that another thread left uncomputed, such as constants made with the model.
            mx.eval([[v for v in (*m.values(), *vars(m).values()) if isinstance(v, mx.array)] for m in model.modules()])
        self._functions = [_Functions(model, self._adapters) for _ in range(backend.WORKERS)]

    def representations(
        self, rows: Sequence[MicroBatch], seeds: Sequence[int] | None = None, kept: Kept | None = None
    ) -> Iterator[mx.array]:
        """Representations of every micro-batch, in their order, without a gradient.

        Args:
            seeds: of dropout.
            kept: takes what `gradient` of the same rows can use, as far as KEPT_BYTES reach.
        """
        if not self.compiled:
            for i, part in enumerate(rows):
                if seeds is not None:
                    gradient_checkpointing.seed(int(seeds[i]))
                result = mx.stop_gradient(self.model(part))
                mx.eval(result)
                yield result
            return
        merged = self._merged(sum(part.ids.size for part in rows))
        keeping = self._worth_keeping(rows) if merged and kept is not None else ()

        def task(functions: _Functions, i: int) -> mx.array:
            with _building:
                kind = "forward_keeping" if i in keeping else "forward"
                result = functions(kind, rows[i], None if seeds is None else int(seeds[i]), merged)
            _evaluate(result)
            if i in keeping:
                result, *kept[i] = result
            return result

        with blas.one_thread():
            answers = {}
            for worker, functions, share in self._spread(rows):
                for i in share:
                    answers[i] = worker.submit(functools.partial(task, functions, i))
            with _at_work(answers.values()):
                for i in range(len(rows)):
                    yield answers[i].result()
                    del answers[i]

    def _worth_keeping(self, rows: Sequence[MicroBatch]) -> set[int]:
        """Micro-batches whose products find room, as many of every worker's as of the others'."""
        size, room, found = merged_lora.product_size(self._adapters), KEPT_BYTES, set()
        for turn in itertools.zip_longest(*shares(rows, backend.WORKERS)):
            for i in turn:
                if i is not None and (needed := rows[i].ids.size * size) <= room:
                    room -= needed
                    found.add(i)
        return found

    def gradient(
        self, rows: Sequence[MicroBatch], seeds: Sequence[int], cotangents: Sequence[mx.array], kept: Kept | None = None
    ) -> dict:
        """Gradient of the sum of representations times cotangents, of all micro-batches together, evaluated.

        `kept`: what `representations` left there, of the same rows and weights.
        """
        if not self.compiled:
            return self._uncompiled_gradient(rows, seeds, cotangents)
        kept = {} if kept is None else kept
        merged = self._merged(sum(part.ids.size for part in rows))
        trained = self.model.trainable_parameters()
        mx.eval(cotangents)

        def task(functions: _Functions, share: list[int]) -> dict | None:
            total = None
            for i in sorted(share, key=lambda i: i not in kept):  # what takes memory first
                known = kept.pop(i, [])
                with _building:
                    more = functions("gradient", rows[i], int(seeds[i]), merged, trained, cotangents[i], known)
                total = more if total is None else tree_map(mx.add, total, more)
                del known
                _evaluate(total)
            return total

        with blas.one_thread():
            answers = [
                worker.submit(functools.partial(task, functions, share))
                for worker, functions, share in self._spread(rows)
            ]
            with _at_work(answers):
                parts = [part for answer in answers if (part := answer.result()) is not None]
        total = functools.reduce(functools.partial(tree_map, mx.add), parts)
        mx.eval(total)
        return total

    def _spread(self, rows: Sequence[MicroBatch]) -> Iterator[tuple[Worker, _Functions, list[int]]]:
        """Workers, their functions, and the micro-batches that are theirs."""
        return zip(_workers(), self._functions, shares(rows, backend.WORKERS), strict=True)

    def _uncompiled_gradient(self, rows: Sequence[MicroBatch], seeds: Sequence[int], cotangents: Sequence) -> dict:
        gradient_of = nn.value_and_grad(self.model, lambda rows, cotangent: (self.model(rows) * cotangent).sum())
        total = None
        for part, seed, cotangent in zip(rows, seeds, cotangents, strict=True):
            gradient_checkpointing.seed(int(seed))
            _, more = gradient_of(part, cotangent)
            total = more if total is None else tree_map(mx.add, total, more)
            mx.eval(total)
        return total

    def held_bytes(self, tokens: int) -> int:
        """What merged weights, and the products kept of a batch of so many tokens, take at most."""
        kept = min(KEPT_BYTES, tokens * merged_lora.product_size(self._adapters))
        return sum(layer.linear.weight.nbytes for layer in self._adapters) + kept

    def _merged(self, tokens: int) -> list[mx.array]:
        """Weights with their adapters in them; none where merging would cost more than it saves."""
        mx.eval(self.model.parameters())  # see `__init__`
        if tokens < backend.MICRO_BATCH_TOKENS:
            return []
        merged = [merged_lora.merge(layer) for layer in self._adapters]
        mx.eval(merged)
        return merged
