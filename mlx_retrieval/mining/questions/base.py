"""What the generators of questions have in common: jobs, answers, and counts of dropped questions."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.errors import UserError, near_miss
from mlx_retrieval.utils.text import excerpt, quantity

# A word is a run of signs without a blank; of scripts that are written without blanks, each sign.
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
MOST = 4  # questions a chunk
SHOWN, WIDTH = 3, 70  # examples of a reason that are kept, and their characters
REPEATED = "repeated"  # the reason of a question that was asked before

Notify = Callable[[str], None]


class Question(NamedTuple):
    """A question of a chunk."""

    chunk: str  # its id
    style: str
    text: str
    positive: str | None = None  # the document to learn from; None = the chunk as it is embedded


class Job(NamedTuple):
    """The questions of one style for one chunk, which are made together."""

    chunk: Chunk
    style: str
    count: int = 1


class Answer(NamedTuple):
    """The outcome of a job: its questions, and (reason, text) of each that was dropped."""

    job: Job
    questions: Sequence[Question] = ()
    dropped: Sequence[tuple[str, str]] = ()
    done: bool = True  # False = the generator failed at this job, and a later run should try it again


class Generator(Protocol):
    """A source of questions."""

    name: str  # shown, and kept with each question
    shortened: Collection[str]  # ids of chunks of which only the beginning was read, for want of room

    def jobs(self, chunk: Chunk) -> Sequence[Job]:
        """Return the jobs of a chunk, always the same ones."""

    def prompt_digest(self, job: Job) -> str:
        """Return a hash of everything but the chunk that decides the questions of a job."""

    def answers(self, jobs: Iterable[Job]) -> Iterator[Sequence[Answer]]:
        """Yield the answers to all jobs, in lots that belong together. UserError if no more can be had."""


@dataclass
class Dropped:
    """How many questions were dropped for each reason, with examples."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, text: str) -> None:
        """Count a dropped question; the first ones of a reason are kept as examples."""
        self.counts[reason] += 1
        if len(examples := self.examples.setdefault(reason, [])) < SHOWN and text.strip():
            examples.append(excerpt(text, WIDTH))

    def lines(self) -> Lines:
        """Return a (reason, count and examples) pair for each reason, the most frequent first."""
        return [
            (reason, "; ".join([quantity(count, "question"), *map(repr, self.examples[reason])]))
            for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        ]


def digest(*values: object) -> str:
    """Return a hash of values that JSON can hold, 16 characters."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def chunk_digest(chunk: Chunk) -> str:
    """Return a hash of everything in a chunk that its questions and documents are made of."""
    return digest(chunk.id, chunk.title, chunk.headings, chunk.context, chunk.text)


def rng_of(chunk: Chunk, seed: int, purpose: str) -> np.random.Generator:
    """Return random numbers for one purpose: they depend on the chunk's id and text and the seed, not on others."""
    return np.random.default_rng([seed, int(digest(chunk.id, chunk.text, purpose), 16)])


def drawn(styles: Sequence[str], count: int, chunk: Chunk, seed: int) -> list[str]:
    """Return `count` of the styles in their order, drawn for this chunk; all of them if there are no more."""
    if count >= len(styles):
        return [*styles]
    places = rng_of(chunk, seed, "styles").choice(len(styles), count, replace=False)
    return [styles[i] for i in sorted(places)]


def check_styles(styles: Sequence[str], known: Iterable[str], count: int) -> None:
    """Raise UserError for a style that is not known, or a count of questions a chunk that is not from 1 to MOST."""
    known = [*known]
    for style in styles:
        if style not in known:
            near = near_miss(style, known)
            raise UserError(f"--styles {style}: there are {', '.join(known)}{near}")
    if not 1 <= count <= MOST:
        raise UserError(f"{count} questions a chunk: it must be 1 to {MOST}")
