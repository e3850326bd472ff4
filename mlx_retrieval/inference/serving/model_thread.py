"""The one thread in which a server's models compute, and the queue of jobs for it.

thread = ModelThread(batch=256)
thread.start()
scores = thread.submit(Job(reranker, documents, query="kidney stones")).result()     # float32 (N,)
vectors = thread.submit(Job(model, texts, prompt="document")).result()               # float32 (N, D)

Waiting jobs of one kind are computed in one call. Jobs larger than a call are split and take turns with others, except
with listwise rerankers, where the score of a document depends on the others of the request.
"""

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError, wait
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.inference import finite
from mlx_retrieval.inference.embedder import Model
from mlx_retrieval.inference.reranker import Reranker, raw_scores
from mlx_retrieval.utils.threads import LastingThread

STUCK_S = 30  # seconds that `close` waits for the call in progress
# Characters of the texts of one call, some 16,000 tokens, so that long texts hold up neither other requests nor the
# server's end for half a minute; and characters of one text that count, as models cut longer ones.
CALL, LONG = 1 << 16, 1 << 11
_gpu = threading.Lock()


def alone() -> contextlib.AbstractContextManager:
    """Return a context in which no other thread of the server computes on a GPU; CPUs serve several threads at once."""
    return _gpu if backend.IS_GPU else contextlib.nullcontext()


@dataclass(eq=False)
class Job:
    """Texts to score for `query` or, without one, to embed under the prompt called `prompt`."""

    model: Model | Reranker
    texts: Sequence[str]
    query: str | None = None
    prompt: str | None = None
    dimensions: int | None = None
    # A row a text: an array, of scores those before the activation, or a list of a late-interaction model's (L_i, D).
    # Cancelled if nobody waits for it.
    answer: Future = field(default_factory=Future)
    call: Future | None = None  # the last call that took texts: done once it holds none; None = none has yet
    tokens: int = 0  # tokens of the texts computed so far
    begun: int = 0  # texts that calls have taken so far
    rows: list[np.ndarray | list[np.ndarray]] = field(default_factory=list)  # results so far

    @property
    def kind(self) -> tuple:
        """Jobs of one kind can be computed together."""
        return id(self.model), self.query is None, self.prompt, self.dimensions

    @property
    def unsplit(self) -> bool:
        """Whether all texts must be computed in one call."""
        return self.query is not None and self.model.kind == "listwise"

    def take(self, most: int, characters: int) -> Sequence[str]:
        """Return the next texts to compute: at most `most`, of `characters` or one; all if it must not be split."""
        sizes = [min(len(text), LONG) for text in self.texts[self.begun : self.begun + most]]
        fitting = max(1, int(np.searchsorted(np.cumsum(sizes), characters, side="right")))
        piece = self.texts if self.unsplit else self.texts[self.begun : self.begun + fitting]
        self.begun += len(piece)
        return piece

    def add(self, rows: np.ndarray | list[np.ndarray]) -> None:
        """Add the results of the next texts, in their order; once all are there, set the answer."""
        self.rows.append(rows)
        if sum(map(len, self.rows)) == len(self.texts):
            with contextlib.suppress(InvalidStateError):  # nobody waits any more
                arrays = isinstance(rows, np.ndarray)
                self.answer.set_result(np.concatenate(self.rows) if arrays else [*chain.from_iterable(self.rows)])

    def fail(self, error: BaseException) -> None:
        """Raise `error` where the answer is awaited."""
        with contextlib.suppress(InvalidStateError):
            self.answer.set_exception(error)


Pieces = list[tuple[Job, Sequence[str]]]  # of jobs of one kind


class ModelThread:
    """Compute jobs, the oldest first, in a thread of its own: MLX's state belongs to a thread.

    Args:
        batch: most texts in one call, except for a job that must not be split.
    """

    def __init__(self, batch: int):
        self.batch = batch
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._running: Future | None = None

    def start(self) -> None:
        self._running = LastingThread("model").submit(self._run)

    @property
    def waiting(self) -> int:
        """Jobs that no call has taken, or not whole."""
        return len(self._jobs)

    def submit(self, job: Job) -> Future:
        """Queue a job, and return its answer; cancelling the answer removes the job."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return job.answer

    def cancel(self, job: Job) -> Future | None:
        """Remove a job that is not computed to its end; return the call that still holds it, if one does."""
        with self._changed:
            job.answer.cancel()
            return None if job.call is None or job.call.done() else job.call

    def close(self) -> None:
        """Let the call in progress end, and cancel all waiting jobs."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._running is not None:
            wait([self._running], STUCK_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if self._closing:
                    break
                pieces = self._next()
            if not pieces:
                continue
            call = pieces[0][0].call
            self._work(pieces)
            del pieces  # neither large texts nor an evicted model should live until the next request
            call.set_result(None)
        for job in self._jobs:
            job.answer.cancel()

    def _next(self) -> Pieces:
        """Return pieces of the oldest job and others of its kind; jobs with more texts go to the end of the queue."""
        self._jobs = [job for job in self._jobs if not job.answer.done()]  # cancelled or failed
        room, characters, pieces, waiting, again = self.batch, CALL, [], [], []
        for job in self._jobs:
            too_large = job.unsplit and pieces and len(job.texts) > room
            if room <= 0 or characters <= 0 or too_large or job.kind != self._jobs[0].kind:
                waiting.append(job)
                continue
            pieces.append((job, job.take(room, characters)))
            room -= len(pieces[-1][1])
            characters -= sum(min(len(text), LONG) for text in pieces[-1][1])
            if job.begun < len(job.texts):
                again.append(job)
        self._jobs = waiting + again
        call = Future()
        call.set_running_or_notify_cancel()  # others wait for it too: none of them may cancel it
        for job, _ in pieces:
            job.call = call
        return pieces

    def _work(self, pieces: Pieces) -> None:
        try:
            with alone():
                results = self._compute(pieces)
        except BaseException as error:  # raised where the answer is awaited
            if len(pieces) == 1:
                pieces[0][0].fail(error)
            else:  # one of them caused it, and must not fail the others
                for piece in pieces:
                    self._work([piece])
            return
        for (job, _), rows in zip(pieces, results, strict=True):
            job.add(rows)

    def _compute(self, pieces: Pieces) -> list[np.ndarray | list[np.ndarray]]:
        first, counts = pieces[0][0], [len(texts) for _, texts in pieces]
        model = first.model
        if first.query is not None:
            results = raw_scores(model, [(job.query, texts) for job, texts in pieces])
        else:
            together = [text for _, texts in pieces for text in texts]
            options = {} if first.dimensions is None else {"dimensions": first.dimensions}
            vectors = model.encode(together, prompt=first.prompt, show_progress=False, **options)
            ends = np.cumsum(counts)
            results = [vectors[end - count : end] for end, count in zip(ends, counts, strict=True)]
        if [len(rows) for rows in results] != counts:
            raise ArithmeticError("the model's results are not one row for each text")
        for (job, texts), rows in zip(pieces, results, strict=True):  # of other models than ours, which check
            if job.query is None:
                finite.check_vectors(model.name, texts, rows)
            else:
                finite.check_scores(model.name, texts, rows)
        for job, texts in pieces:
            about = (texts, job.prompt) if job.query is None else (job.query, texts)
            job.tokens += model.count_tokens(*about)
        return results
