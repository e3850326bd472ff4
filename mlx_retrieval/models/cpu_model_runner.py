"""Run micro-batches on CPUs: compiled functions, worker threads, merged adapters."""

import functools
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

from mlx_retrieval.backend import mx, nn

from mlx_retrieval import backend
from mlx_retrieval.backbones import gradient_checkpointing, merged_lora
from mlx_retrieval.models.batching import MicroBatch
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.utils.errors import UserError

# Compiled passes that a worker keeps, each with the graph of one shape: 700 bytes an operation, half a megabyte for
# three layers. What was used longest ago makes room. With lengths on a grid of 4 training meets few more shapes; a
# server keeps fewer, as it meets new ones always.
SHAPES_KEPT = 128
SHAPES_SERVED, SERVED_GRID = 24, 8
# Bytes of products that a step keeps from its forward passes for its gradients, however large the batch: see `Kept`.
KEPT_BYTES = 384 << 20
# Models hold tracers instead of weights while a graph is built, and mlx's random state is one for all.
_building = threading.Lock()
# Of micro-batches, by number: the matrix products of their forward pass, which the pass for the gradient then need not
# repeat. Emptied as they are used.
Kept = dict[int, list[mx.array]]


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


def _evaluate(arrays: mx.array | dict) -> None:
    """`mx.eval`, where a kernel that cannot be compiled is the user's business: mostly a full disk."""
    try:
        mx.eval(arrays)
    except RuntimeError as error:
        if "ompile" not in str(error):
            raise
        folder, reason = os.environ.get("TMPDIR", "the folder for temporary files"), str(error).strip().splitlines()[-1]
        raise UserError(f"{folder}: a kernel could not be compiled there ({reason}). Is the disk full?") from error


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
            gradient_checkpointing.seed(seed)
        result = function(self.model.parameters(), *arrays, *rows)
        if random:
            gradient_checkpointing.seed(seed or 0)  # the state that the graph leaves behind belongs to this thread
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
        return self._with(weights, merged, merged_lora.Products(), lambda: self.model(MicroBatch(*rows)))

    def forward_keeping(self, weights: dict, merged: list[mx.array], *rows: mx.array) -> list[mx.array]:
        products = merged_lora.Products()
        return [self._with(weights, merged, products, lambda: self.model(MicroBatch(*rows))), *products.noted]

    def gradient(
        self, weights: dict, merged: list, trained: dict, cotangent: mx.array, known: list, *rows: mx.array
    ) -> dict:
        def value(trained: dict) -> mx.array:
            self.model.update(trained)
            return (self.model(MicroBatch(*rows)) * cotangent).sum()

        return self._with(weights, merged, merged_lora.Products(known), lambda: mx.grad(value)(trained))

    def _with(
        self, weights: dict, merged: list[mx.array], products: merged_lora.Products, function: Callable
    ) -> mx.array | dict:
        """Call it while the model holds these weights, so that a compiled graph has them as inputs, not inside."""
        own = self.model.parameters()
        self.model.update(weights)
        try:
            with merged_lora.merged(self.adapters, merged, products):
                return function()
        finally:
            self.model.update(own)
