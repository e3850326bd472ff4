"""Measure what an adaptation costs on this machine, and plan how many chunks there is time for.

costs = measure(job, chunks)
plan = fit(job, costs, total=812, left=1_150.0)
plan.chunks, plan.seconds                 # how many chunks are asked about, and how long each stage will take
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from mlx_retrieval.backend import mx

from mlx_retrieval.adaptation.held import rows_of
from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.adaptation.split import DOCUMENTS
from mlx_retrieval.adaptation.training_settings import (
    MOST_EPOCHS,
    PLANNED_EPOCHS,
    evaluations_in,
    planned_rows,
    settings_of,
    with_held,
)
from mlx_retrieval.dataset import choice
from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.dataset.rows import find_files
from mlx_retrieval.evaluation.retrieval import evaluate
from mlx_retrieval.exporters.blend import SHARES
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.mining.collection import read_rows
from mlx_retrieval.mining.output import write_rows
from mlx_retrieval.mining.questions import without_model
from mlx_retrieval.training import run as training_run
from mlx_retrieval.utils.console import console
from mlx_retrieval.utils.errors import UserError

CALLS = 2  # that are timed, of which the quicker one counts
SAMPLE = 64  # chunks, or texts that are held, that are embedded to measure
PAIRS = 16  # that a reranker scores to measure
QUERY = 0.3  # of a chunk's time: a query's
OPENING = 10.0  # seconds to open models and files, for each of the last stages
FEWEST = 200  # chunks that an adaptation should have questions for


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine."""

    chunk: float  # to embed a chunk
    row: float  # to train on a row: a query, its document and its negatives
    questions: float  # to generate the questions of a chunk
    pair: float = 0.0  # to score a question and a chunk with the reranker
    guards: float = 0.0  # to evaluate a model on the guards
    tasks: float = 0.0  # ... and on the user's tasks
    held_row: float = 0.0  # to embed a row of the texts that are held in place


@dataclass(frozen=True)
class Plan:
    """How much of the documents an adaptation uses, and how long its stages take, in seconds."""

    chunks: int
    total: int
    questions: int  # that will be asked for
    row_seconds: float  # of training on a row
    seconds: dict[str, float]
    search: float = 0.0  # seconds of answering the held-out questions once

    @property
    def all(self) -> float:
        """The seconds of all stages."""
        return sum(self.seconds.values())


def measure(job: Adaptation, chunks: Sequence[Chunk], questions: float) -> Costs:
    """Return what this machine takes, with models opened and closed again.

    The base model is evaluated on the guards and tasks: nothing else tells what that takes.

    Args:
        chunks: a sample, SAMPLE of them if there are so many.
        questions: seconds to generate the questions of a chunk, see `asking.seconds_to_ask`.
    """
    model = embedder.load(job.model, dtype=job.dtype)
    texts = [chunk.embedded for chunk in chunks]
    chunk = _warm_seconds(partial(embedder.embed, model, texts, "document")) / len(texts)
    guards, tasks = (
        _seconds(partial(evaluate, model, names)) if names else 0.0 for names in (job.guard, job.eval_tasks)
    )
    held = _held_seconds(job, model)
    del model
    free()
    return Costs(chunk, _row_seconds(job, chunks), questions, _pair_seconds(job, chunks), guards, tasks, held)


def _seconds(function: Callable[[], object]) -> float:
    """Return the time of a call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _warm_seconds(function: Callable[[], object]) -> float:
    """Return the least time of calls after the first one, which compiles kernels and allocates.

    Other work on the machine makes a call slower, never faster.
    """
    function()
    return min(_seconds(function) for _ in range(CALLS))


def _pair_seconds(job: Adaptation, chunks: Sequence[Chunk]) -> float:
    """Return the seconds of scoring a question and a chunk with the reranker; 0 without one."""
    if not job.reranker:
        return 0.0
    judge, documents = Reranker(job.reranker, dtype=job.dtype), [chunk.embedded for chunk in chunks[:PAIRS]]
    seconds = _warm_seconds(partial(judge.score_groups, [(_query_of(chunks[0]), documents)]))
    del judge
    free()
    return seconds / len(documents)


def _held_seconds(job: Adaptation, model: embedder.Model) -> float:
    """Return the seconds of embedding a row of the texts that are held in place, by a sample; 0 without any."""
    if not job.hold:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        rows = find_files(rows_of(job, Path(folder), SAMPLE))
        examples = [example for _, example in read_rows(rows, None)]
    texts = [*dict.fromkeys(text for one in examples for text in (one.query, one.positive, *one.negatives))]
    return _warm_seconds(partial(embedder.embed, model, texts, "document")) / len(examples)


def _query_of(chunk: Chunk) -> str:
    """Return a query of usual length."""
    return " ".join(chunk.text.split()[: without_model.LONGEST // 2])


def _row_seconds(job: Adaptation, chunks: Sequence[Chunk]) -> float:
    """Return the seconds of a training step for each of its rows, on rows made of a sample of chunks.

    0 for a single chunk, whose row has no other to be told from; nothing is trained on the questions of one.
    """
    if len(chunks) < 2:
        return 0.0
    texts = [chunk.embedded for chunk in chunks]
    rows = []
    for i, chunk in enumerate(chunks):
        others = [texts[(i + 1 + k) % len(texts)] for k in range(min(job.negatives, len(texts) - 1))]
        rows.append({"query": f"{i} {_query_of(chunk)}", "positive": chunk.embedded, "negatives": others})
    with tempfile.TemporaryDirectory() as folder, quiet():
        write_rows(Path(folder) / "rows.jsonl", rows)
        settings = settings_of(job, Path(folder) / "rows.jsonl", [], Path(folder) / "run")
        settings.dry_run, settings.batch_size = True, min(settings.batch_size, len(rows))
        trainer = training_run.prepare(settings).trainer
        seconds = _warm_seconds(partial(trainer.compute_grads, trainer.batches.batch(0), 1)) / settings.batch_size
        del trainer
    free()
    return seconds


def fit(job: Adaptation, costs: Costs, total: int, left: float | None, indexed: bool = True) -> Plan:
    """Return the plan with the most chunks for which the time suffices.

    Args:
        total: chunks of the documents.
        left: seconds; None = all chunks, however long it takes.
        indexed: whether they are indexed in this time as well.

    Raises UserError if it does not suffice for FEWEST chunks, or for all of fewer.
    """
    whole = plan(job, costs, total, total, indexed)
    if left is None or whole.all <= left:
        return whole
    make = partial(plan, job, costs, total=total, indexed=indexed, most_epochs=PLANNED_EPOCHS)
    if (all_chunks := make(total)).all <= left:
        return all_chunks
    fewest = min(FEWEST, total)
    if (smallest := make(fewest)).all > left:
        index = ", and an index of all" if indexed else ""
        raise UserError(
            f"--budget: too short: with questions for {fewest:,} of the {total:,} chunks{index}, what is to be done "
            f"takes about {minutes(smallest.all)}, and {minutes(left)} are left"
        )
    enough, too_many = fewest, total
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        enough, too_many = (middle, too_many) if make(middle).all <= left else (enough, middle)
    return make(enough)


def plan(
    job: Adaptation, costs: Costs, chunks: int, total: int, indexed: bool = True, most_epochs: int = MOST_EPOCHS
) -> Plan:
    """Return the plan for a number of chunks of `total`; `indexed`: see `fit`, `most_epochs`: see `planned_rows`."""
    questions = chunks * job.count
    held = choice.wanted(questions, job.holdout)
    own = planned_rows(job.training, questions - held, bool(job.hold), most_epochs)
    trained = with_held(own) if job.hold else own
    search = min(DOCUMENTS, chunks) * costs.chunk + held * QUERY * costs.chunk
    embedding = (chunks + questions * (1 + QUERY)) * costs.chunk
    judged = questions * min(job.rules.candidates, chunks) * costs.pair
    # Of the base model, and in the worst case at every share that the export may try.
    guarded = (2 + sum(0 < share < job.trained_share for share in SHARES)) * costs.guards
    training = (trained - own) * costs.held_row + trained * costs.row
    seconds = {
        "questions": chunks * costs.questions,
        "filter": embedding + judged + OPENING,
        "negatives": embedding + OPENING if job.negatives else 0.0,
        "train": training + (1 + evaluations_in(training, search)) * search + OPENING,
        "export": guarded + 2 * OPENING,
        "evaluate": 2 * (search + costs.guards + costs.tasks) + OPENING,
        "index": total * costs.chunk + OPENING if indexed else 0.0,
    }
    return Plan(chunks, total, questions, costs.row, seconds, search)


def minutes(seconds: float) -> str:
    """Return a time in words: 40 s, 12 min, 3 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    whole = round(seconds / 60)
    return f"{whole} min" if whole < 120 else f"{whole // 60} h {whole % 60} min"


@contextmanager
def quiet() -> Iterator[None]:
    """Print nothing to the console in this block."""
    before, console().quiet = console().quiet, True
    try:
        yield
    finally:
        console().quiet = before


def free() -> None:
    """Free the models that are no longer used; a run of training has frozen what was there."""
    gc.unfreeze()
    gc.collect()
    mx.clear_cache()


def sample_of(chunks: Iterator[Chunk]) -> list[Chunk]:
    """Return the first chunks, to measure with."""
    return [*islice(chunks, SAMPLE)]
