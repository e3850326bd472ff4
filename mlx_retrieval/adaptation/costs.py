"""Measure what a chunk costs on this machine, and plan how many chunks there is time for.

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

from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.adaptation.split import DOCUMENTS
from mlx_retrieval.adaptation.training_settings import EVALUATIONS, settings_of, with_held
from mlx_retrieval.dataset import choice
from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.inference import embedder
from mlx_retrieval.mining.output import write_rows
from mlx_retrieval.mining.questions import without_model
from mlx_retrieval.training import run as training_run
from mlx_retrieval.utils.console import console
from mlx_retrieval.utils.errors import UserError

SAMPLE = 64  # chunks that are embedded to measure
QUERY = 0.3  # of a chunk's time: a query's
OPENING = 10.0  # seconds to open models and files, for each of the last stages
FEWEST = 200  # chunks that an adaptation should have questions for


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine."""

    chunk: float  # to embed a chunk
    row: float  # to train on a row: a query, its document and its negatives
    questions: float  # to generate the questions of a chunk


@dataclass(frozen=True)
class Plan:
    """How much of the documents an adaptation uses, and how long its stages take, in seconds."""

    chunks: int
    total: int
    questions: int  # that will be asked for
    row_seconds: float  # of training on a row
    seconds: dict[str, float]

    @property
    def all(self) -> float:
        """The seconds of all stages."""
        return sum(self.seconds.values())


def measure(job: Adaptation, chunks: Sequence[Chunk], questions: float) -> Costs:
    """Return what chunks cost, by a sample of them, with models opened and closed again.

    Args:
        chunks: a sample, SAMPLE of them if there are so many.
        questions: seconds to generate the questions of a chunk, see `stages.seconds_to_ask`.
    """
    return Costs(_chunk_seconds(job, chunks), _row_seconds(job, chunks), questions)


def _seconds(function: Callable[[], object]) -> float:
    """Return the time of a second call: the first one compiles kernels and allocates."""
    function()
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _chunk_seconds(job: Adaptation, chunks: Sequence[Chunk]) -> float:
    """Return the seconds of embedding a chunk."""
    model = embedder.load(job.model, dtype=job.dtype)
    seconds = _seconds(partial(embedder.embed, model, [chunk.embedded for chunk in chunks], "document"))
    del model
    free()
    return seconds / len(chunks)


def _row_seconds(job: Adaptation, chunks: Sequence[Chunk]) -> float:
    """Return the seconds of a training step for each of its rows, on rows made of a sample of chunks."""
    texts = [chunk.embedded for chunk in chunks]
    rows = []
    for i, chunk in enumerate(chunks):
        query = " ".join(chunk.text.split()[: without_model.LONGEST // 2])
        others = [texts[(i + 1 + k) % len(texts)] for k in range(min(job.negatives, len(texts) - 1))]
        rows.append({"query": f"{i} {query}", "positive": chunk.embedded, "negatives": others})
    with tempfile.TemporaryDirectory() as folder, quiet():
        write_rows(Path(folder) / "rows.jsonl", rows)
        settings = settings_of(job, Path(folder) / "rows.jsonl", [], Path(folder) / "run")
        settings.dry_run, settings.batch_size = True, min(settings.batch_size, len(rows))
        trainer = training_run.prepare(settings).trainer
        seconds = _seconds(partial(trainer.compute_grads, trainer.batches.batch(0), 1)) / settings.batch_size
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
    make = partial(plan, job, costs, total=total, indexed=indexed)
    whole = make(total)
    if left is None or whole.all <= left:
        return whole
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


def plan(job: Adaptation, costs: Costs, chunks: int, total: int, indexed: bool = True) -> Plan:
    """Return the plan for a number of chunks of `total`; `indexed`: see `fit`."""
    questions = chunks * job.count
    held = choice.wanted(questions, job.holdout)
    trained = with_held(questions - held) if job.hold else questions - held
    searched = min(DOCUMENTS, chunks) * costs.chunk + held * QUERY * costs.chunk
    seconds = {
        "questions": chunks * costs.questions,
        "filter": (chunks + questions * (1 + QUERY)) * costs.chunk + OPENING,
        "negatives": ((chunks + questions * (1 + QUERY)) * costs.chunk + OPENING) if job.negatives else 0.0,
        "train": trained * costs.row + (1 + EVALUATIONS) * searched + OPENING,
        "export": 2 * OPENING,
        "evaluate": 2 * searched + OPENING,
        "index": total * costs.chunk + OPENING if indexed else 0.0,
    }
    return Plan(chunks, total, questions, costs.row, seconds)


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
