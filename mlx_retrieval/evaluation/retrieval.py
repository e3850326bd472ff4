"""Evaluate retrieval: embed queries and documents, search, score."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_retrieval.dataset import beir
from mlx_retrieval.evaluation import mteb_tasks
from mlx_retrieval.evaluation import tasks as evaluation_tasks
from mlx_retrieval.evaluation.quantized import Memory, Stored
from mlx_retrieval.evaluation.results import METRICS, Evaluation, Form, Scores
from mlx_retrieval.evaluation.tasks import Corpus, Part, Rankings
from mlx_retrieval.retrieval.topk import Nearest
from mlx_retrieval.utils.errors import UserError

DOCUMENTS = 50_000  # that are embedded at once, so that memory need not hold the vectors of a large corpus


class Encoder(Protocol):
    """All that evaluation needs of a model; `embed.Model` is one."""

    name: str

    def encode(self, texts: list[str], prompt: str | None, show_progress: bool) -> np.ndarray:
        """Vectors (n, D), float32, in the texts' order; `prompt` is "query" or "document"."""


class Searcher(ABC):
    """Finds documents for queries; what evaluation needs beside figures.

    Args:
        model: what it searches with.
        task: its name, for messages.
        show_progress: bars.
    """

    def __init__(self, model: Any, task: str, show_progress: bool = False):
        self.model, self.task, self.show_progress = model, task, show_progress

    @abstractmethod
    def search(self, part: tuple[str, str], corpus: Corpus, queries: dict[str, str], top_k: int) -> Rankings:
        """query id -> document id -> score of at most `top_k` documents. `part`: split and subset of the task."""


class _DenseSearcher(Searcher):
    """One vector a text, compared with all others."""

    def encode(self, texts: list[str], prompt: str) -> np.ndarray:
        vectors = self.model.encode(texts, prompt=prompt, show_progress=self.show_progress)
        if not np.isfinite(vectors).all():  # they would be ranked, and well
            rows = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            count = f"{len(rows)} of {len(texts)} {prompt} embeddings"
            raise FloatingPointError(f"{self.task}: {count} are not finite")
        return vectors

    def search(self, part: tuple[str, str], corpus: Corpus, queries: dict[str, str], top_k: int) -> Rankings:
        count = len(corpus.ids)
        nearest = Nearest(self.encode(list(queries.values()), "query"), top_k, count)
        for first in range(0, count, DOCUMENTS):
            nearest.add(self.encode(corpus.texts(range(first, min(first + DOCUMENTS, count))), "document"))
        best_numbers, best_scores = nearest.best()
        if not np.isfinite(best_scores).all():
            raise FloatingPointError(f"{self.task}: products of query and document embeddings are not finite")
        return {
            query: {corpus.ids[i]: score for i, score in zip(numbers, scores, strict=True)}
            for query, numbers, scores in zip(queries, best_numbers.tolist(), best_scores.tolist(), strict=True)
        }


class _LateSearcher(Searcher):
    """A vector a token, MaxSim from `late_index`."""

    def _encode(self, texts: list[str], prompt: str) -> list[np.ndarray]:
        return self.model.encode(texts, prompt=prompt, show_progress=self.show_progress)

    def search(self, part: tuple[str, str], corpus: Corpus, queries: dict[str, str], top_k: int) -> Rankings:
        from mlx_retrieval.retrieval.late_interaction import LateIndex

        vectors, config = self._encode(corpus.texts(range(len(corpus.ids))), "document"), self.model.config
        index = LateIndex(vectors, config.maxsim, config.impute)
        if self.show_progress:
            print(f"late interaction: {index.how}", file=sys.stderr)
        found = index.search(self._encode(list(queries.values()), "query"), top_k)
        return {
            query: {corpus.ids[i]: score for i, score in ranking} for query, ranking in zip(queries, found, strict=True)
        }


def searcher_of(model: Encoder, *about) -> Searcher:
    """The search that suits the model; `about`: what Searcher takes after it."""
    return (_LateSearcher if getattr(model, "late", False) else _DenseSearcher)(model, *about)


def score_rankings(qrels: dict[str, dict[str, int]], rankings: Rankings) -> dict[str, Scores]:
    """metric -> query id -> score, from the library that mteb takes."""
    import pytrec_eval

    names = dict(zip(METRICS, ("ndcg_cut_10", "recip_rank", "recall_100", "P_1"), strict=True))
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "recall.100", "P.1"})
    found = evaluator.evaluate(rankings)
    scores = {metric: {query: found[query][name] for query in found} for metric, name in names.items()}
    scores["mrr_at_10"] = {query: rr if rr >= 1 / 10 else 0.0 for query, rr in scores["mrr_at_10"].items()}
    return scores


def load_tasks(names: Sequence[str], show_progress: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """({label: task}, {name: why it is unreachable}); settled once a process, so later calls cost nothing.

    A folder's label is its last part, or the whole path where another task would have the same. Raises UserError for a
    folder or a name that is wrong.
    """
    loaded, unreachable = {}, {}
    of_mteb = beir.check_folders(names)
    # A folder that is named twice, in whatever way, is one task.
    asked = dict.fromkeys(name if name in of_mteb else Path(name).expanduser().resolve() for name in names)
    short = [each.name if isinstance(each, Path) else each for each in asked]
    for each, label in zip(asked, short, strict=True):
        if isinstance(each, Path):
            loaded[label if short.count(label) == 1 else str(each)] = evaluation_tasks.load(each)
            continue
        task, why_not = mteb_tasks.load(each, show_progress)
        if task is None:
            unreachable[each] = why_not
        else:
            loaded[each] = task
    return loaded, unreachable


def evaluate(model: Encoder, tasks: Sequence[str], show_progress: bool = False) -> Evaluation:
    """Evaluate a model.

    Args:
        model: see `Encoder`. Scores are dot products of its vectors.
        tasks: folders in BEIR layout and names of MTEB tasks of type Retrieval.
        show_progress: bars for downloads and embedding.

    Raises UserError for a folder or a name that is wrong, before anything is embedded, and FloatingPointError for
    vectors that are not finite. Hub tasks that can not be had are no error: see `Evaluation.unreachable`.
    """
    loaded, unreachable = load_tasks(tasks, show_progress)
    result = Evaluation(model.name, {}, {}, unreachable)
    for name, task in loaded.items():
        add_task(result, searcher_of(model, name, show_progress), task)
    return result


def add_task(result: Evaluation, searcher: Searcher, task: Any) -> list[Part]:
    """Search a task, add the figures to `result`, and give back what was found."""
    parts = task.evaluate(searcher)
    for part in parts:
        label = searcher.task if len(parts) == 1 else "/".join((searcher.task, *part.key))
        by_query = result.per_query[label] = score_rankings(part.qrels, part.rankings)
        means = part.figures or {metric: sum(scores.values()) / len(scores) for metric, scores in by_query.items()}
        result.tasks[label] = {metric: round(means[metric], 5) for metric in METRICS}
    return parts


def evaluate_stored(
    model: Encoder, tasks: Sequence[str], forms: Sequence[Form], show_progress: bool = False
) -> tuple[Evaluation, dict[Form, Evaluation]]:
    """Evaluate a model as it is, and with its vectors stored in several forms; every text is embedded once.

    int8 and uint8 take their ranges from all documents of a task, and queries stay float32. In binary and ubinary both
    sides are bits, compared by Hamming distance. Memory holds the float32 vectors of one task. Raises as `evaluate`.
    """
    if getattr(model, "late", False):
        raise UserError("--precision and --dimensions are for models of one vector a text, not for late interaction")
    loaded, unreachable = load_tasks(tasks, show_progress)
    whole = Evaluation(model.name, {}, {}, unreachable)
    stored = {form: Evaluation(model.name, {}, {}, unreachable) for form in forms}
    for name, task in loaded.items():
        memory = Memory(model)
        add_task(whole, searcher_of(memory, name, show_progress), task)
        for form, result in stored.items():
            add_task(result, searcher_of(Stored(memory, *form), name), task)
    return whole, stored


def forms_of(precisions: Sequence[str] | None, dimensions: Sequence[int] | None, whole: int) -> list[Form]:
    """Every combination of the two flags, the model's whole vectors where neither says otherwise."""
    if too_long := [d for d in dimensions or () if not 0 < d <= whole]:
        raise UserError(f"--dimensions {too_long[0]}: the model's vectors have {whole}")
    pairs = [(p, d) for d in dimensions or [whole] for p in precisions or ["float32"]]
    return list(dict.fromkeys(pairs))
