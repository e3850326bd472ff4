"""What the stages of an adaptation work with: its files, its plan, the models that it opens.

shop = Workshop(job)
shop.path("chunks.jsonl"), shop.model
"""

import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mlx_retrieval.adaptation import chunk_file, costs
from mlx_retrieval.adaptation.chunk_file import Chunks
from mlx_retrieval.adaptation.costs import Plan
from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.adaptation.keys import generator_of
from mlx_retrieval.inference import embedder
from mlx_retrieval.mining.questions import without_model
from mlx_retrieval.mining.questions.base import Generator, digest
from mlx_retrieval.mining.questions.generators import open_generator
from mlx_retrieval.utils.errors import UserError

Figures = dict[str, Any]  # what a stage returns, for the stages after it and the report

# Patterns of what a stage has written, to be removed before it is done with other documents or settings. Questions are
# kept.
WRITTEN = {
    "read": ("chunks.jsonl", "unread.jsonl"),
    "filter": ("rows.jsonl", "held-out"),
    "negatives": ("mined.jsonl",),
    "train": ("run", "held.safetensors", "held-*.jsonl"),
    "export": ("model",),
    "evaluate": ("evaluation.json",),
    "index": ("index",),
}


class TooFewQuestionsError(UserError):
    """The documents gave too few questions to train on: they can be indexed with the base model alone."""


@dataclass
class Workshop:
    """What the stages work with.

    Attributes:
        job: the adaptation.
        plan: how many chunks are asked about; None = all.
        deadline: of the whole adaptation, by time.monotonic(); None = there is none.
        figures: of the stages before.
        is_kept: whether the files stay: not those of a dry run.
        is_trained: whether a model is to come of it; False = there were too few questions.
    """

    job: Adaptation
    plan: Plan | None = None
    deadline: float | None = None
    figures: dict[str, Figures] = field(default_factory=dict)
    is_kept: bool = True
    is_trained: bool = True
    _generator: Generator | None = None

    def path(self, name: str) -> Path:
        """Return a file or folder of the adaptation."""
        return self.job.output / name

    @cached_property
    def questions(self) -> Path:
        """The file of questions: one for each generator and its settings; see `other_questions`."""
        job = self.job
        prompt = job.prompt.read_text(encoding="utf-8-sig", errors="replace") if job.prompt else ""
        name = re.sub(r"\W+", "-", job.generator).strip("-")[:40]
        return (
            self.path("questions")
            / f"{name}-{digest(generator_of(job), job.count, [*job.styles], prompt, job.seed)[:4]}.jsonl"
        )

    @property
    def other_questions(self) -> list[Path]:
        """The files of questions of other settings, which may have done some of the same jobs."""
        return sorted({*self.questions.parent.glob("*.jsonl")} - {self.questions})

    @property
    def generator(self) -> Generator:
        """The generator of questions, opened when it is first needed."""
        if self._generator is None:
            job = self.job
            self._generator = open_generator(job.generator, job.styles, job.count, job.seed, job.prompt)
        return self._generator

    def close_generator(self) -> None:
        """Free the language model."""
        self._generator = None
        costs.free()

    def chosen(self) -> Chunks:
        """Return the chunks that questions are asked about: all, or as many as the plan has.

        Those with a question of their own come first where no model asks: theirs are the best that can be had.
        """
        if self.plan is None or self.plan.chunks >= self.plan.total:
            return Chunks(self.path("chunks.jsonl"))
        return self.drawn(self.plan.chunks, self._asking)

    @cached_property
    def _asking(self) -> frozenset[str]:
        """The ids of the chunks that ask a question themselves, if this is what questions are made of."""
        if self.job.generator != without_model.NAME or without_model.QUESTION not in (
            self.job.styles or without_model.STYLES
        ):
            return frozenset()
        return frozenset(chunk.id for chunk in Chunks(self.path("chunks.jsonl")) if without_model.asks(chunk))

    def drawn(self, count: int, first: Collection[str] = ()) -> Chunks:
        """Return so many chunks, drawn by their ids: of two counts, the larger one has the chunks of the other.

        Args:
            first: ids of chunks that come before all others.
        """
        path = self.path("chunks.jsonl")
        ids = sorted(chunk_file.read_ids(path), key=lambda name: (name not in first, self._draw(name)))
        return Chunks(path, frozenset(ids[:count]))

    def _draw(self, name: str) -> bytes:
        return blake2b(f"{self.job.seed} {name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()

    def base_model(self) -> embedder.Model:
        """Open the model that is to be trained. UserError if it is no embedding model of one vector a text."""
        model = embedder.load(self.job.model, dtype=self.job.dtype)
        if model.late:
            raise UserError(f"--model {self.job.model}: a late-interaction model; adapt.py trains one vector a text")
        return model

    @property
    def model(self) -> str:
        """The model to use in the end: the exported one, or the base model if there is none or nothing was gained."""
        exported = self.path("model")
        return str(exported) if self.is_trained and exported.is_dir() else self.job.model


def clear(shop: Workshop, name: str) -> None:
    """Remove what a stage has written."""
    for path in (path for pattern in WRITTEN.get(name, ()) for path in shop.job.output.glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
