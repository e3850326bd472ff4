"""Scored pairs of texts as evaluation tasks: how the cosines of their vectors follow the scores (STS).

task = load(Path("pairs.jsonl"))                 # rows of two texts and a score from 0 to 1, in any format of rows
add_task(evaluation, model, "pairs.jsonl", task)

A folder that a run has held out holds such a file, `pairs.jsonl`. MTEB's tasks of type STS are loaded by mteb_tasks.py.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.beir import TOLERANT, FolderRules
from mlx_retrieval.dataset.held_out_pairs import FILE
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.evaluation.correlation import correlations
from mlx_retrieval.evaluation.results import PAIR_METRICS, Evaluation
from mlx_retrieval.inference import finite
from mlx_retrieval.inference.quantization import scaled_to_unit
from mlx_retrieval.utils import toolkit
from mlx_retrieval.utils.errors import UserError

Prompts = tuple[str | None, str | None]  # of the first and the second text; None = no prompt


class ScoredTexts(NamedTuple):
    """N pairs of texts, and the score of each."""

    first: list[str]
    second: list[str]
    scores: list[float]


class PairTask:
    """Scored pairs, in one split or several.

    Args:
        splits: (split, subset) -> its pairs.
        prompts: of the two texts of a pair.
        digest: see `tasks.Task`; "" = a hash of the pairs.
    """

    def __init__(
        self, splits: dict[tuple[str, str], ScoredTexts], prompts: Prompts = ("query", "document"), digest: str = ""
    ):
        self.splits, self.prompts = splits, prompts
        content = json.dumps([[*key, *pairs] for key, pairs in splits.items()])
        self.digest = digest or hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def file_of(name: str) -> Path | None:
    """Return the file of scored pairs that an evaluation task of this name is; None = it is another task."""
    path = Path(name).expanduser()
    if (path / FILE).is_file():
        return path / FILE
    return path if path.is_file() else None


def check_tasks(names: Sequence[str], rules: FolderRules = TOLERANT) -> list[str]:
    """Read the folders and files among `names`, and return the other names, which are MTEB tasks.

    Raises UserError for the first that is missing or has errors.
    """
    files = {name: file for name in map(toolkit.find, names) if (file := file_of(name))}
    for file in files.values():
        load(file)
    return beir.check_folders([name for name in map(toolkit.find, names) if name not in files], rules)


def load(file: Path) -> PairTask:
    """Return a file of scored pairs as a task, the same object until it changes. UserError if it holds none."""
    state = file.stat()
    return _load(file.resolve(), (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=16)
def _load(file: Path, state: tuple[int, int]) -> PairTask:
    rows = Rows([file])
    if rows.format != "label":
        raise UserError(f"{file}: not scored pairs: an evaluation file has rows of two texts and a score from 0 to 1")
    examples = [rows[i] for i in range(len(rows))]
    pairs = ScoredTexts(
        [e.query for e in examples], [e.positive for e in examples], [float(e.scores[0]) for e in examples]
    )
    check(str(file), pairs)
    return PairTask({("test", "default"): pairs})


def check(name: str, pairs: ScoredTexts) -> None:
    """Raise UserError if all pairs have the same score."""
    if len({*pairs.scores}) < 2:
        raise UserError(f"{name}: all pairs have the same score, so there is no order to measure")


def add_task(evaluation: Evaluation, model: Any, label: str, task: PairTask, show_progress: bool = False) -> None:
    """Embed the pairs of a task, and add its figures to `evaluation`.

    `model`: see `retrieval.Encoder`; cosines are those of its vectors. UserError for one of late interaction.
    """
    if getattr(model, "late", False):
        raise UserError(f"{label}: scored pairs are judged by cosines, and late interaction has none")
    for key, pairs in task.splits.items():
        name = label if len(task.splits) == 1 else "/".join((label, *key))
        sides = []
        for texts, prompt in zip((pairs.first, pairs.second), task.prompts, strict=True):
            vectors = model.encode(texts, prompt=prompt, show_progress=show_progress)
            finite.check_vectors(model.name, texts, vectors)
            vectors = vectors.astype(np.float64)
            sides.append(scaled_to_unit(vectors))
        # Not by a product, whose rounding would put pairs of equal vectors into an order; mteb does the same.
        cosines = 1 - np.square(sides[0] - sides[1]).sum(axis=1) / 2
        figures = correlations(cosines, np.array(pairs.scores))
        evaluation.tasks[name] = {metric: round(figures[metric], 5) for metric in PAIR_METRICS}
        ids = [str(number) for number in range(1, len(cosines) + 1)]
        evaluation.per_query[name] = {
            "cosine": dict(zip(ids, cosines.tolist(), strict=True)),
            "score": dict(zip(ids, pairs.scores, strict=True)),
        }
        evaluation.digests[name] = task.digest


def check_alike(tasks: dict[str, Any]) -> None:
    """Raise UserError if a model would be judged by some tasks' Spearman and others' nDCG@10."""
    kinds = {isinstance(task, PairTask): label for label, task in tasks.items()}
    if len(kinds) > 1:
        raise UserError(
            f"{kinds[True]} is judged by Spearman and {kinds[False]} by nDCG@10; judge a run by one of them, and name "
            "the others as --guard"
        )


def refuse(tasks: dict[str, Any], reason: str) -> None:
    """Raise UserError, for this reason, if one of these tasks is of scored pairs."""
    if label := next((label for label, task in tasks.items() if isinstance(task, PairTask)), None):
        raise UserError(f"{label}: scored pairs are judged by cosines, {reason}")
