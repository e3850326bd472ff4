"""A teacher's scores of the documents that rows have, for distillation: a reranker's, or a bigger embedding model's.

python mine.py score --data mined.jsonl --teacher Qwen/Qwen3-Reranker-0.6B --output scored.jsonl
python train.py --data scored.jsonl --loss kl_distill

from teacher import Teacher
Teacher("adapters/cross/best").score_groups([("where is Kyoto", ["In Japan.", "In a box."])])
"""

import argparse
import hashlib
import itertools
import json
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_retrieval.dataset.rows import find_files
from mlx_retrieval.mining import collection
from mlx_retrieval.mining import output as mining_output
from mlx_retrieval.mining.cache import Work, add_files, print_scores, resumable, tell_begun, work_folder
from mlx_retrieval.models.loading import detect_kind
from mlx_retrieval.utils.console import print_lines
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar

if TYPE_CHECKING:
    from mlx_retrieval.dataset.row_formats import Example
    from mlx_retrieval.mining.hard_negatives import Groups
    from mlx_retrieval.utils.progress import Progress

KINDS = ("reranker", "embedder")
Row = tuple[dict[str, Any], "Example"]  # as it stands in its file, and what rows.py makes of it
ROWS = {"reranker": 256, "embedder": 2_048}  # that are scored at once and finished together


class Teacher:
    """A model that scores documents for a query.

    Args:
        name: adapter folder, base model's folder, or hub name.
        kind: one of KINDS; None = by `loading.detect_kind`.
        max_length: see rerank.Reranker and embed.load.
        reranker_type: the kind of reranker, where the files do not tell.
    """

    def __init__(
        self, name: str, kind: str | None = None, max_length: int | None = None, reranker_type: str | None = None
    ):
        by_files = "embedder" if not reranker_type and detect_kind(name) == "embed" else "reranker"
        self.kind = kind or by_files
        if self.kind == "reranker":
            from mlx_retrieval.inference.reranker import Reranker

            self.model: Any = Reranker(name, reranker_type=reranker_type, max_length=max_length)
            self.score_groups: Callable[[Groups], list[np.ndarray]] = self.model.score_groups
        else:
            from mlx_retrieval.inference import embedder

            self.model = embedder.load(name, max_length=max_length)
            if self.model.late:
                raise UserError(f"{name}: a late-interaction model scores as a reranker (--teacher-kind reranker)")
            self.score_groups = self._by_vectors
        self.mark = self.model.fingerprint()

    @property
    def cut(self) -> int:
        """Documents that were too long, so far; counted by rerankers only."""
        return getattr(self.model, "cut", 0)

    def _by_vectors(self, groups: "Groups") -> list[np.ndarray]:
        """Products of the vectors of every query and its documents; every distinct text is embedded once."""
        from mlx_retrieval.inference.embedder import embed

        texts = list(dict.fromkeys(text for _, documents in groups for text in documents))
        place = {text: i for i, text in enumerate(texts)}
        queries = embed(self.model, [query for query, _ in groups], "query")
        vectors = embed(self.model, texts, "document")
        return [
            vectors[[place[text] for text in documents]] @ query
            for query, (_, documents) in zip(queries, groups, strict=True)
        ]


@dataclass
class Counts:
    """What there was to score, and what came out."""

    rows: int = 0
    documents: int = 0
    digest: str = ""
    positives: array = field(default_factory=lambda: array("f"))  # scores
    negatives: array = field(default_factory=lambda: array("f"))
    beaten: int = 0  # rows in which some negative scores above the positive


def count(rows: Iterable[Row]) -> Counts:
    """How many rows and documents there are, and a hash of all their texts."""
    counts, digest = Counts(), hashlib.sha256()
    for query, documents in groups_of(rows):
        counts.rows += 1
        counts.documents += len(documents)
        digest.update(json.dumps([query, documents]).encode())
    counts.digest = digest.hexdigest()
    return counts


def groups_of(rows: Iterable[Row]) -> Iterator[tuple[str, list[str]]]:
    """The query and the documents of every row: in their order, or the positive and then the negatives."""
    for _, example in rows:
        yield example.query, [example.positive, *example.negatives]


def score(
    groups: Iterable[tuple[str, Sequence[str]]],
    count: int,
    teacher: Teacher,
    work: Work,
    progress: "Progress | None" = None,
) -> Iterator[np.ndarray]:
    """The scores of each of `count` groups. Every finished block is kept in `work`, and not computed again."""
    groups, size = iter(groups), ROWS[teacher.kind]
    for number, first in enumerate(range(0, count, size)):
        block = list(itertools.islice(groups, min(size, count - first)))
        lengths = np.array([len(documents) for _, documents in block])
        kept = work.block(number, ("scores", "lengths"))
        if kept is None:
            kept = {"scores": np.concatenate(teacher.score_groups(block)), "lengths": lengths}
            work.keep(number, kept)
        if not np.array_equal(kept["lengths"], lengths):
            raise UserError("--data: the file was changed during the run")
        if progress:
            progress(first + len(block), count)
        yield from np.split(kept["scores"], np.cumsum(lengths)[:-1])


def scored_rows(rows: Iterable[Row], scores: Iterable[np.ndarray], counts: Counts) -> Iterator[dict[str, Any]]:
    """The rows with their "scores", in rows.Rows' order; `counts` gets them, too."""
    from mlx_retrieval.mining.output import shortened

    for (row, _), found in zip(rows, scores, strict=True):
        if "documents" in row:
            counts.negatives.extend(found)
        else:
            counts.positives.append(found[0])
            counts.negatives.extend(found[1:])
            counts.beaten += bool((found[1:] > found[0]).any())
        yield row | {"scores": shortened(found)}


# --- the command ------------------------------------------------------------------------------------------------------


@resumable()
def run(args: argparse.Namespace) -> None:
    """Write the rows of `args.data` with a teacher's scores to `args.output`."""
    output = Path(args.output).expanduser()
    mining_output.check_output(output, args.overwrite)
    files, skipped = find_files(args.data), [] if args.skip_bad_rows else None

    def rows(bad: list[str] | None) -> Iterator[Row]:
        return collection.read_rows(files, collection.SCORED, bad)

    counts = count(rows(skipped))
    if counts.documents == counts.rows:
        raise UserError("--data: no row has negatives, so there is nothing to compare (mine.py negatives finds some)")
    model = Teacher(args.teacher, args.teacher_kind, args.max_length, args.reranker_type)
    print_lines([("teacher", f"{model.model.name}, {model.kind}")])
    with work_folder(output, args.work) as work:
        marks = {"data": counts.digest, "teacher": model.mark, "teacher kind": model.kind}
        tell_begun(work, *work.begin(marks), skipped)
        again = [] if args.skip_bad_rows else None
        with progress_bar("scoring", "rows") as progress:
            scores = score(groups_of(rows(again)), counts.rows, model, work, progress)
            mining_output.write_rows(output, scored_rows(rows(again), scores, counts))
    if model.cut:
        print(f"mine.py: the reranker cut {model.cut:,} documents at their end (--max-length)", file=sys.stderr)
    if counts.positives:
        print_scores(model.model.name, counts.positives, counts.negatives)
        rivals = f"{counts.beaten:,} rows have a negative that scores above the positive"
        print_lines([("rivals", f"{rivals} ({counts.beaten / len(counts.positives):.1%})")])
    else:
        print_scores(model.model.name, counts.positives, counts.negatives, "documents")
    print_lines(
        [
            ("written", f"{output} ({counts.rows:,} rows, {counts.documents:,} scores)"),
            ("next", f"python train.py --data {output} --loss kl_distill   # --task rerank: margin_mse, too"),
        ]
    )


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `mine.py score`."""
    out = commands.add_parser(
        "score",
        help="a teacher's scores of rows with negatives, for distillation",
        description='Write the rows with "scores" of the positive and then the negatives, or of "documents".',
    )
    add_files(out, "rows with negatives, or with documents")
    out.add_argument("--teacher", required=True, metavar="MODEL", help="a reranker, or an embedding model")
    kind = "default: as its files say; a language model that says nothing is a reranker if its name has 'rerank'"
    out.add_argument("--teacher-kind", choices=KINDS, help=kind)
    out.add_argument("--reranker-type", metavar="KIND", help="where the reranker's files do not tell its kind")
    out.add_argument("--max-length", type=int, metavar="N", help="cut texts after N tokens (default: as saved)")
    out.set_defaults(run=run)
