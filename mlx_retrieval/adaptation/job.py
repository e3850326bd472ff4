"""The settings of one adaptation: which documents, which model, how questions are made, how long it may take.

job = Adaptation(Path("handbook"), "sentence-transformers/all-MiniLM-L6-v2", Path("handbook-model"))
job.count                                # questions a chunk
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_retrieval.dataset import choice, chunks
from mlx_retrieval.dataset.documents.folder import MAX_FILE_SIZE
from mlx_retrieval.mining.questions import filtering, without_model
from mlx_retrieval.mining.questions.generators import check_generator
from mlx_retrieval.training.settings_file import read_yaml
from mlx_retrieval.utils import files, toolkit
from mlx_retrieval.utils.errors import UserError, flag
from mlx_retrieval.utils.outputs import check_parent, entries, holds_model

FILE, LOCK = "adapt.json", ".lock"  # in the folder of an adaptation: which stages are done, and who works there
GUARD_TOLERANCE = 0.005  # of nDCG@10
# As much of the base model as of the trained one (LM-Cocktail, Xiao et al. 2023): this keeps most of the gain.
TRAINED_SHARE = 0.5
MODEL_QUESTIONS = 2  # a chunk, of a language model
# Settings of train.py that an adaptation decides.
DECIDED = ("data", "sources", "columns", "model", "output", "task", "eval_tasks", "guard", "guard_tolerance", "holdout")
DECIDED += ("resume", "overwrite", "dry_run", "profile", "rounds", "stop_after", "seed")
DECIDED += ("dtype", "compile", "dequantize")
HELD = ("teacher_vectors", "distill_weight", "distill_metric")  # and those that holding texts in place takes

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600}


@dataclass
class Adaptation:
    """One adaptation; its fields are the command's flags. UserError if they contradict each other."""

    documents: Path
    model: str
    output: Path
    generator: str = without_model.NAME
    questions: int | None = None  # a chunk; None = 1 without a model, 2 with one
    styles: Sequence[str] = ()
    prompt: Path | None = None
    chunk_size: int = chunks.MAX_CHARACTERS
    overlap: int = chunks.OVERLAP
    max_file_size: int = MAX_FILE_SIZE  # bytes
    exclude: Sequence[str] = ()
    found_among: int = filtering.K
    reranker: str | None = None
    negatives: int = 1  # mined for each question; 0 = none
    holdout: float = choice.SHARE
    eval_tasks: Sequence[str] = ()
    hold: Sequence[str] | None = None  # files of rows, folders of code; None = the toolkit's own; () = none
    guard: Sequence[str] | None = None  # None = the toolkit's own; () = none
    guard_tolerance: float = GUARD_TOLERANCE
    trained_share: float = TRAINED_SHARE  # of the trained weights, at most; the rest is the base model's
    config: Path | None = None  # YAML of train.py's settings
    budget: float | None = None  # seconds
    seed: int = 0
    dtype: str | None = None
    compile: str = "auto"
    dequantize: str = "auto"
    training: dict = field(init=False)  # what `config` says

    def __post_init__(self):
        for name in ("documents", "output", "prompt", "config"):
            if path := getattr(self, name):
                setattr(self, name, path.expanduser())
        if not self.documents.is_dir():
            raise UserError(f"{self.documents}: {'not a folder' if self.documents.exists() else 'no such folder'}")
        for name, least in (("chunk_size", 1), ("max_file_size", 1), ("found_among", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{flag(name)} {getattr(self, name)}: {least} or more")
        if not 0 <= self.overlap < self.chunk_size:
            raise UserError(f"--overlap {self.overlap}: from 0 to below --chunk-size {self.chunk_size}")
        if self.negatives < 0:
            raise UserError(f"--negatives {self.negatives}: 0 or more")
        if not 0 < self.holdout < 1:
            raise UserError(f"--holdout {self.holdout:g}: above 0 and below 1: the model is judged on these questions")
        if not self.guard_tolerance >= 0:  # nan, too
            raise UserError(f"--guard-tolerance {self.guard_tolerance:g}: 0 or more")
        if not 0 < self.trained_share <= 1:
            raise UserError(f"--trained-share {self.trained_share:g}: above 0, and 1 at most")
        if self.hold is None:
            self.hold = list(toolkit.HELD)
        if self.guard is None:
            self.guard = [toolkit.EVALUATION]
        for name in ("hold", "guard", "eval_tasks"):
            setattr(self, name, [toolkit.find(os.path.expanduser(value)) for value in getattr(self, name)])
        check_generator(self.generator, self.styles, self.count, self.prompt)
        self.training = read_yaml(self.config) if self.config else {}
        if decided := [name for name in DECIDED if name in self.training]:
            raise UserError(f"--config {self.config}: {decided[0]} is decided by adapt.py")
        if self.hold and (taken := [name for name in HELD if name in self.training]):
            raise UserError(f"--config {self.config}: {taken[0]} is what texts are held in place by; see --hold")
        _check_output(self.output, self.documents)

    @property
    def count(self) -> int:
        """Questions a chunk, at most."""
        return self.questions or (1 if self.generator == without_model.NAME else MODEL_QUESTIONS)

    @property
    def rules(self) -> filtering.Rules:
        """How questions are filtered."""
        return filtering.Rules(self.found_among, candidates=max(filtering.CANDIDATES, self.found_among))


def _check_output(output: Path, documents: Path) -> None:
    """Raise UserError if an adaptation could not write into its folder, or would mix its files with others."""
    files.check_name(output, "--output")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: this is a file")
    check_parent(output)
    if holds_model(output.absolute().parent):
        raise UserError(f"--output {output}: {output.absolute().parent} holds a model; name another folder")
    there, source = output.resolve(), documents.resolve()
    if source.is_relative_to(there):
        raise UserError(f"--output {output}: the documents are in there")
    if there.is_relative_to(source):
        raise UserError(f"--output {output}: this folder is among the documents, and would be read as some of them")
    others = set(entries(output)) - {LOCK} if output.is_dir() else set()
    if others and not (output / FILE).is_file():
        raise UserError(f"--output {output}: the folder is not empty, and no adaptation was begun there")


def seconds_of(text: str) -> float:
    """Read a time such as `20m`, `1h30m` or `90s`; a number alone is in seconds. UserError."""
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?(?:s|m|min|h))+|\d+(?:\.\d+)?)", text.strip().lower().replace(" ", ""))
    if parts is None:
        raise UserError(f"--budget {text}: not a time such as 20m, 1h30m or 90s")
    pairs = re.findall(r"(\d+(?:\.\d+)?)(min|[smh]?)", parts[0])
    seconds = sum(float(number) * _UNITS[unit or "s"] for number, unit in pairs)
    if seconds <= 0:
        raise UserError(f"--budget {text}: above 0")
    return seconds
