"""Forward and backward passes of micro-batches through a model.

On CPUs they are compiled, adapters are merged into the weights they adapt, and several micro-batches are computed side
by side: mlx's element-wise functions use one core each. Elsewhere they are computed one after the other as they come.
Either way the results are the same up to float32 rounding, and the same bits for the same micro-batches.
"""

import functools
import itertools
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager

import backend
from backend import UserError, mx, nn

from mlx.utils import tree_map

import blas
from heads import MicroBatch, RetrievalModel
from models import lora, remat

# Compiled passes that a worker keeps, each with the graph of one shape: 700 bytes an operation, half a megabyte for
# three layers. What was used longest ago makes room. With lengths on a grid of 4 training meets few more shapes; a
# server keeps fewer, as it meets new ones always.
SHAPES_KEPT = 128
SHAPES_SERVED, SERVED_GRID = 24, 8
# Bytes of products that a step keeps from its forward passes for its gradients, however large the batch: see `Kept`.
KEPT_BYTES = 384 << 20
# Models hold tracers instead of weights while a graph is built, and mlx's random state is one for all.
_building = threading.Lock()


def few_shapes() -> None:
    """For a process that answers requests: its memory must not grow with every length and number of texts it meets."""
    global SHAPES_KEPT
    SHAPES_KEPT = SHAPES_SERVED
    backend.LENGTH_GRID = max(backend.LENGTH_GRID, SERVED_GRID)


class Worker:
    """A thread with a stream of its own. It lives as long as the process: mlx's state of a thread cannot be undone."""

    def __init__(self):
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="passes", daemon=True).start()

    def submit(self, task: Callable) -> Future:
        answer: Future = Future()
        self._tasks.put((task, answer))
        return answer

    def _serve(self) -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            while True:
                task, answer = self._tasks.get()
                try:
                    if answer.set_running_or_notify_cancel():
                        answer.set_result(task())
                except BaseException as error:  # it belongs to whoever waits for the answer
                    answer.set_exception(error)
                del task, answer  # what they hold should not live until the next task comes


@functools.cache
def _workers() -> list[Worker]:
    return [Worker() for _ in range(backend.WORKERS)]


@contextmanager
def _at_work(answers: Collection[Future]) -> Iterator[None]:
    """Whoever leaves, if by an error, leaves no worker behind: while it builds a graph, the model holds its tracers."""
    try:
        yield
    finally:
        for answer in answers:
            answer.cancel()
        wait(answers)


def shares(rows: Sequence[MicroBatch], count: int) -> list[list[int]]:
    """Which micro-batches each of `count` workers computes: equal work as far as possible, and always the same."""
    work, parts = [0] * count, [[] for _ in range(count)]
    for i in sorted(range(len(rows)), key=lambda i: -rows[i].ids.size):
        least = work.index(min(work))
        work[least] += rows[i].ids.size
        parts[least].append(i)
    return parts


def _evaluate(arrays: mx.array | dict) -> None:
    """`mx.eval`, where a kernel that cannot be compiled is the user's business: mostly a full disk."""
    try:
        mx.eval(arrays)
    except RuntimeError as error:
        if "ompile" not in str(error):
            raise
        folder, reason = os.environ.get("TMPDIR", "the folder for temporary files"), str(error).strip().splitlines()[-1]
        raise UserError(f"{folder}: a kernel could not be compiled there ({reason}). Is the disk full?") from error


# Of micro-batches, by number: the matrix products of their forward pass, which the pass for the gradient then need not
# repeat. Emptied as they are used.
Kept = dict[int, list[mx.array]]


class _Functions:
    """The compiled passes of one model on one worker."""

    def __init__(self, model: RetrievalModel, adapters: list[nn.Module]):
        self.model, self.adapters = model, adapters
        self._compiled: OrderedDict[tuple, Callable] = OrderedDict()  # last used last

    def __call__(self, kind: str, rows: MicroBatch, seed: int | None, *arrays) -> mx.array | dict:
        """Build the graph of one pass; nothing is computed yet. `arrays`: see `forward` and `gradient`."""
        random = self.model.training and any(isinstance(m, nn.Dropout) and m._p_1 < 1 for m in self.model.modules())
        given = tuple(len(each) for each in arrays if isinstance(each, list))
        function = self._function(kind, rows, mx.random.state if random else [], given)
        if seed is not None:
            remat.seed(seed)
        result = function(self.model.parameters(), *arrays, *rows)
        if random:
            remat.seed(seed or 0)  # the state that the graph leaves behind belongs to this thread
        return result

    def _function(self, kind: str, rows: MicroBatch, state: list, given: tuple[int, ...]) -> Callable:
        """The compiled pass for rows of these shapes, with or without what may be `given`."""
        past = rows.past[0][0].shape if rows.past else None
        key = (kind, self.model.training, given, rows.ids.shape, past)
        if key not in self._compiled:
            self._compiled[key] = mx.compile(getattr(self, kind), inputs=state, outputs=state)
        self._compiled.move_to_end(key)
        while len(self._compiled) > SHAPES_KEPT:
            self._compiled.popitem(last=False)
        return self._compiled[key]

    def forward(self, weights: dict, merged: list[mx.array], *rows: mx.array) -> mx.array:
        return self._with(weights, merged, lora.Products(), lambda: self.model(MicroBatch(*rows)))

    def forward_keeping(self, weights: dict, merged: list[mx.array], *rows: mx.array) -> list[mx.array]:
        products = lora.Products()
        return [self._with(weights, merged, products, lambda: self.model(MicroBatch(*rows))), *products.noted]

    def gradient(
        self, weights: dict, merged: list, trained: dict, cotangent: mx.array, known: list, *rows: mx.array
    ) -> dict:
        def value(trained: dict) -> mx.array:
            self.model.update(trained)
            return (self.model(MicroBatch(*rows)) * cotangent).sum()

        return self._with(weights, merged, lora.Products(known), lambda: mx.grad(value)(trained))

    def _with(
        self, weights: dict, merged: list[mx.array], products: lora.Products, function: Callable
    ) -> mx.array | dict:
        """Call it while the model holds these weights, so that a compiled graph has them as inputs, not inside."""
        own = self.model.parameters()
        self.model.update(weights)
        try:
            with lora.merged(self.adapters, merged, products):
                return function()
        finally:
            self.model.update(own)


class Passes:
    """What computes representations and gradients of micro-batches.

    Args:
        model: its weights may change between calls; its modules must not.
    """

    def __init__(self, model: RetrievalModel):
        self.model = model
        # Checkpointed blocks draw their dropout seeds in Python, which a compiled function would do only once.
        self.compiled = backend.COMPILED and not remat.checkpointed(model.backbone)
        self._adapters = lora.mergeable(model) if self.compiled else []
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
                    remat.seed(int(seeds[i]))
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
        size, room, found = lora.product_size(self._adapters), KEPT_BYTES, set()
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
            remat.seed(int(seed))
            _, more = gradient_of(part, cotangent)
            total = more if total is None else tree_map(mx.add, total, more)
            mx.eval(total)
        return total

    def held_bytes(self, tokens: int) -> int:
        """What merged weights, and the products kept of a batch of so many tokens, take at most."""
        kept = min(KEPT_BYTES, tokens * lora.product_size(self._adapters))
        return sum(layer.linear.weight.nbytes for layer in self._adapters) + kept

    def _merged(self, tokens: int) -> list[mx.array]:
        """Weights with their adapters in them; none where merging would cost more than it saves."""
        mx.eval(self.model.parameters())  # see `__init__`
        if tokens < backend.MICRO_BATCH_TOKENS:
            return []
        merged = [lora.merge(layer) for layer in self._adapters]
        mx.eval(merged)
        return merged
