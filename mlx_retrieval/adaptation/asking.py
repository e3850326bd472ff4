"""The stage that makes questions, and how long a chunk's take; see stages.py.

shop.figures["questions"] = questions(shop)
"""

import sys
import time
from collections.abc import Iterator

from mlx_retrieval.adaptation import costs
from mlx_retrieval.adaptation.record import UNFINISHED
from mlx_retrieval.adaptation.workshop import Figures, TooFewQuestionsError, Workshop
from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.mining.questions import without_model
from mlx_retrieval.mining.questions.base import Generator
from mlx_retrieval.mining.questions.store import QuestionStore, generate, open_store
from mlx_retrieval.utils import files
from mlx_retrieval.utils.console import WARNING, print_lines
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar
from mlx_retrieval.utils.text import quantity

ASKED, MORE = 4, 28  # chunks to measure a generator by, and further ones if the first took less than QUICK seconds
QUICK = 30.0


def seconds_to_ask(shop: Workshop) -> float:
    """Return the seconds of making the questions of a chunk, by a few chunks whose questions are kept.

    They are chunks that were not asked about before; 0 if there are none left. A generator makes many questions at the
    same time, and the first ones wait for kernels or a server's start: where they were quick, others tell the truth.
    """
    if shop.generator.name == without_model.NAME:
        return 0.0
    seconds, count = _measured(shop, ASKED)
    if count and seconds < QUICK:
        more, further = _measured(shop, MORE)
        seconds, count = (more, further) if further else (seconds, count)
    return seconds / count if count else 0.0


def _measured(shop: Workshop, wanted: int) -> tuple[float, int]:
    """Ask about `wanted` new chunks. Return the seconds that it took, and of how many there were."""
    generator, sample = shop.generator, set()
    files.make_folder(shop.questions.parent)
    began = time.monotonic()
    with open_store(shop.questions, shop.other_questions) as store:

        def new_chunks() -> Iterator[Chunk]:
            for count in (ASKED + MORE, costs.FEWEST, sys.maxsize):  # the first ones that are drawn are in every plan
                for chunk in shop.drawn(count):
                    if len(sample) == wanted:
                        return
                    if chunk.id not in sample and not _is_done(chunk, generator, store):
                        sample.add(chunk.id)
                        yield chunk

        for _ in generate(new_chunks(), generator, store, notify=lambda line: None):
            pass
    return time.monotonic() - began, len(sample)


def questions(shop: Workshop) -> Figures:
    """Make the questions of the chosen chunks.

    A generator that gives up after its first questions leaves the stage unfinished: the stages after it work with what
    is there, and the next call asks for the rest.
    """
    generator, chunks = shop.generator, shop.chosen()
    total = sum(len(generator.jobs(chunk)) for chunk in chunks)
    # Half of the time that is left is for what comes after, however slow the generator turns out to be.
    deadline = None if shop.deadline is None else time.monotonic() + (shop.deadline - time.monotonic()) / 2
    late, reason = False, ""
    files.make_folder(shop.questions.parent)
    with open_store(shop.questions, shop.other_questions) as store, progress_bar("asking", "jobs", total) as progress:

        def in_time() -> Iterator[Chunk]:
            nonlocal late
            for chunk in chunks:
                if deadline is not None and time.monotonic() > deadline and not _is_done(chunk, generator, store):
                    late = True
                    return
                yield chunk

        try:
            for _ in generate(in_time(), generator, store, progress, lambda line: print_lines([("questions", line)])):
                pass
        except UserError as error:
            if not store.count:
                raise
            reason = str(error)
        count, dropped = store.count, store.dropped.lines()
    name, shortened = generator.name, len(generator.shortened)
    shop.close_generator()
    if not count:
        reasons = "".join(f"; {what}: {text}" for what, text in dropped)
        raise TooFewQuestionsError(f"--generator {name}: no question was made{reasons}; try another one, or a --prompt")
    lines = [("questions", f"{count:,} by {name}" + "; stopped, as the time is short" * late), *dropped]
    if shortened:
        lines.append(("shortened", f"{quantity(shortened, 'chunk')}: the model's window holds only the beginning"))
    if reason:
        lines.append((WARNING, f"{reason}; for now, the work goes on with these"))
    print_lines(lines)
    return {"questions": count, "generator": name, "lines": lines} | ({UNFINISHED: reason} if reason else {})


def _is_done(chunk: Chunk, generator: Generator, store: QuestionStore) -> bool:
    """Return whether all questions of a chunk have been asked for."""
    return all(store.is_done(job, generator) for job in generator.jobs(chunk))
