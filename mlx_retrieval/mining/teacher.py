"""Score the documents of rows with a teacher, for distillation: a reranker, or a bigger embedding model.

python mine.py score --data mined.jsonl --teacher Qwen/Qwen3-Reranker-0.6B --output scored.jsonl
python train.py --data scored.jsonl --loss kl_distill

    from mlx_retrieval.mining.teacher import Teacher
    Teacher("adapters/cross/best").score_groups([("where is Kyoto", ["In Japan.", "In a box."])])
"""

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_retrieval.backbones import resolve
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.mining.cache import ResumableCache
from mlx_retrieval.mining.hard_negatives import Groups
from mlx_retrieval.mining.output import by_row, positives_of, shortened
from mlx_retrieval.models.kinds import detect_kind, is_adapter
from mlx_retrieval.models.rerankers import gives_logits_to_students
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.products import product
from mlx_retrieval.utils.progress import Progress

KINDS = ("reranker", "embedder")
Row = tuple[dict[str, Any], Example]  # the object in the file, and the example that it makes
ROWS = {"reranker": 256, "embedder": 2_048}  # rows of a block: scored at once and stored together


class Teacher:
    """A model that scores documents for a query.

    Args:
        name: adapter folder, base model's folder or GGUF, or hub name.
        kind: one of KINDS; None = by `kinds.detect_kind`.
        max_length: see inference.reranker.Reranker and inference.embedder.load; in tokens.
        reranker_type: the kind of reranker, if its files do not say.
        raw_scores: teach with logits, not with their sigmoid. A cross-encoder whose files name no activation always
            does: its makers distil so.
        dtype: to compute in: see inference.embedder.load.

    Raises UserError if the model cannot be loaded, or is a late-interaction model and `kind` is "embedder".
    """

    def __init__(
        self,
        name: str,
        kind: str | None = None,
        max_length: int | None = None,
        reranker_type: str | None = None,
        raw_scores: bool = False,
        dtype: str | None = None,
    ):
        by_files = "embedder" if not reranker_type and detect_kind(name) == "embed" else "reranker"
        self.kind = kind or by_files
        if self.kind == "reranker":
            from mlx_retrieval.inference.reranker import Reranker

            raw_scores |= not is_adapter(Path(name).expanduser()) and gives_logits_to_students(resolve(name))
            settings = {"max_length": max_length, "raw_scores": raw_scores, "dtype": dtype}
            self.model: Any = Reranker(name, reranker_type=reranker_type, **settings)
            self.score_groups: Callable[[Groups], list[np.ndarray]] = self.model.score_groups
        else:
            from mlx_retrieval.inference import embedder

            self.model = embedder.load(name, dtype=dtype, max_length=max_length)
            if self.model.late:
                raise UserError(f"{name}: a late-interaction model scores as a reranker (--teacher-kind reranker)")
            self.score_groups = self._by_vectors
        self.fingerprint = f"{self.model.fingerprint()} {self.model.dtype}"

    @property
    def cut(self) -> int:
        """The number of documents that were truncated so far; counted by rerankers only."""
        return getattr(self.model, "cut", 0)

    def _by_vectors(self, groups: Groups) -> list[np.ndarray]:
        """Return each group's dot products of query and documents. Every distinct text is embedded once."""
        from mlx_retrieval.inference.embedder import embed

        texts = list(dict.fromkeys(text for _, documents in groups for text in documents))
        place = {text: i for i, text in enumerate(texts)}
        queries = embed(self.model, [query for query, _ in groups], "query")
        vectors = embed(self.model, texts, "document")
        return [
            product(vectors[[place[text] for text in documents]], query)
            for query, (_, documents) in zip(queries, groups, strict=True)
        ]


@dataclass
class Counts:
    """The rows and documents to score, and the scores."""

    rows: int = 0
    documents: int = 0
    digest: str = ""
    positives: array = field(default_factory=lambda: array("f"))  # their scores
    negatives: array = field(default_factory=lambda: array("f"))
    beaten: int = 0  # rows in which some negative scores above the positive


def count(rows: Iterable[Row]) -> Counts:
    """Count the rows and documents, and hash all their texts."""
    counts, digest = Counts(), hashlib.sha256()
    for query, documents in groups_of(rows):
        counts.rows += 1
        counts.documents += len(documents)
        digest.update(json.dumps([query, documents]).encode())
    counts.digest = digest.hexdigest()
    return counts


def groups_of(rows: Iterable[Row]) -> Iterator[tuple[str, list[str]]]:
    """Yield the query and the documents of every row: the positive first, or in their own order."""
    for _, example in rows:
        yield example.query, [example.positive, *example.negatives]


def score(
    groups: Iterable[tuple[str, Sequence[str]]],
    count: int,
    teacher: Teacher,
    cache: ResumableCache,
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """Yield the scores of each of `count` groups. Finished blocks are stored in the cache and not computed again."""
    groups, size = iter(groups), ROWS[teacher.kind]
    for number, first in enumerate(range(0, count, size)):
        block = list(itertools.islice(groups, min(size, count - first)))
        lengths = np.array([len(documents) for _, documents in block])
        arrays = cache.block(number, ("scores", "lengths"))
        if arrays is None:
            arrays = {"scores": np.concatenate(teacher.score_groups(block)), "lengths": lengths}
            cache.store(number, arrays)
        if not np.array_equal(arrays["lengths"], lengths):
            raise UserError("--data: the file was changed during the run")
        if progress:
            progress(first + len(block), count)
        yield from np.split(arrays["scores"], np.cumsum(lengths)[:-1])


def scored_rows(rows: Iterable[Row], scores: Iterable[np.ndarray], counts: Counts) -> Iterator[dict[str, Any]]:
    """Yield the rows with their "scores", in the order that rows.Rows reads, and add the scores to `counts`."""
    for items in by_row((*row, of_row) for row, of_row in zip(rows, scores, strict=True)):
        row, _, of_first = items[0]
        if "documents" in row:
            counts.negatives.extend(of_first)
            yield row | {"scores": shortened(of_first)}
            continue
        for _, _, of_positive in items:
            counts.positives.append(of_positive[0])
            counts.negatives.extend(of_positive[1:])
            counts.beaten += bool((of_positive[1:] > of_positive[0]).any())
        of_positives = [of_positive[0] for _, _, of_positive in items]
        several = positives_of(items) if len(items) > 1 else {}
        yield row | several | {"scores": shortened([*of_positives, *of_first[1:]])}
