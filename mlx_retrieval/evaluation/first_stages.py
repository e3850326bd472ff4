"""First stages of reranking: BM25, an embedding or late-interaction model, or a model and BM25 together.

stage = open_stage("hybrid:adapters/final")
result = first_stage_result(stage, "eval-data", task, show_progress=True)
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_retrieval.evaluation import retrieval
from mlx_retrieval.evaluation.results import Evaluation, Scores
from mlx_retrieval.evaluation.retrieval import Encoder, encode_finite
from mlx_retrieval.evaluation.tasks import Corpus, CorpusSearcher, Rankings, Task
from mlx_retrieval.retrieval import fusion
from mlx_retrieval.retrieval.analyzer import ENGLISH, check_language
from mlx_retrieval.retrieval.bm25 import RankedIds, bm25, bm25_scorer
from mlx_retrieval.retrieval.topk import Nearest
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.products import product

HYBRID = "hybrid"


class Bm25:
    """BM25 as a first stage, in the place of a model. `language`: of stems and stop words."""

    name = "BM25"

    def __init__(self, language: str = ENGLISH):
        self.language = check_language(language)


def bm25_stage(language: str = ENGLISH) -> Bm25:
    """Return BM25 as a first stage, the same object each time: tasks keep its rankings."""
    return _bm25_stage(language)


_bm25_stage = functools.cache(Bm25)


class Hybrid:
    """A model and BM25 together as a first stage, fused by scores; see fusion.py."""

    def __init__(self, model: Encoder, language: str = ENGLISH):
        self.model, self.language = model, check_language(language)
        self.name = f"{model.name} with BM25"


Stage = Bm25 | Hybrid


def open_stage(name: str | None, dtype: str | None = None, language: str = ENGLISH) -> Encoder | Stage:
    """Return the first stage that `--first-stage` names: bm25 (or None), hybrid:MODEL, or MODEL.

    Args:
        dtype: that the model computes in: see `embedder.load`.
        language: of BM25's stems and stop words.

    Raises UserError for a model that cannot be loaded, and an unknown language.
    """
    from mlx_retrieval.inference.embedder import load

    check_language(language)
    if name in (None, "bm25"):
        return bm25_stage(language)
    if name == HYBRID:
        raise UserError(f"--first-stage {HYBRID}: the model must be named too, --first-stage {HYBRID}:MODEL")
    if name.startswith(f"{HYBRID}:"):
        return Hybrid(load(name.removeprefix(f"{HYBRID}:"), dtype=dtype), language)
    return load(name, dtype=dtype)


def model_of(stage: Encoder | Stage) -> list[Encoder]:
    """Return the model of a first stage, or []."""
    return [] if isinstance(stage, Bm25) else [stage.model if isinstance(stage, Hybrid) else stage]


class Bm25Searcher(CorpusSearcher):
    """Ranks by BM25; needs no model."""

    def search(self, key: tuple[str, str], corpus: Corpus, queries: dict[str, str], top_k: int) -> Rankings:
        texts = corpus.texts(range(len(corpus.ids)))
        ranked = bm25(dict(zip(corpus.ids, texts, strict=True)), queries, top_k, self.model.language)
        return {query: scores_by_rank(documents) for query, documents in ranked.items()}


class HybridSearcher(CorpusSearcher):
    """Ranks by a model and BM25 together. The vectors of all documents are in memory."""

    def __init__(self, stage: Hybrid, task: str, show_progress: bool = False):
        super().__init__(stage.model, task, show_progress)
        self.language = stage.language

    def search(self, key: tuple[str, str], corpus: Corpus, queries: dict[str, str], top_k: int) -> Rankings:
        texts = corpus.texts(range(len(corpus.ids)))
        words_of = bm25_scorer(texts, self.language)
        index = (LateVectors if getattr(self.model, "late", False) else Vectors)(self, corpus)
        vectors = encode_finite(self, list(queries.values()), "query", list(queries))
        weight, rankings = fusion.WEIGHTS["scores"], {}
        for query, vector, nearest in zip(queries, vectors, index.nearest(vectors, top_k), strict=True):
            words = words_of(queries[query])
            first = np.argsort(-words, kind="stable")[:top_k]
            first = first[words[first] > 0]
            numbers = np.union1d(nearest, first)
            spans = np.isin(numbers, np.concatenate([nearest[: fusion.POOL], first[: fusion.POOL]]))
            scores = fusion.weighted(words[numbers], index.scores(vector, numbers), spans, weight)
            best = np.argsort(-scores, kind="stable")[:top_k]
            rankings[query] = {corpus.ids[numbers[i]]: float(scores[i]) for i in best}
        return rankings


class Vectors:
    """The vectors of a corpus, one a document."""

    def __init__(self, searcher: CorpusSearcher, corpus: Corpus):
        self.vectors = encode_finite(searcher, corpus.texts(range(len(corpus.ids))), "document", corpus.ids)

    def nearest(self, queries: np.ndarray, top_k: int) -> Sequence[np.ndarray]:
        """Return the numbers of the `top_k` best documents of every query, best first."""
        nearest = Nearest(queries, top_k, len(self.vectors))
        nearest.add(self.vectors)
        return nearest.best()[0]

    def scores(self, query: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return the scores of some documents."""
        return product(self.vectors[numbers], query)


class LateVectors:
    """The vectors of a corpus, one a token."""

    def __init__(self, searcher: CorpusSearcher, corpus: Corpus):
        self.index = retrieval.late_index(searcher, corpus)

    def nearest(self, queries: Sequence[np.ndarray], top_k: int) -> Sequence[np.ndarray]:
        """Return the numbers of the `top_k` best documents of every query, best first."""
        return [np.array([number for number, _ in ranking]) for ranking in self.index.search(queries, top_k)]

    def scores(self, query: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return the scores of some documents, whose tokens are all that a token of the query retrieves from."""
        return self.index.scores(query, numbers)


def searcher_of(stage: Encoder | Stage, label: str, show_progress: bool) -> CorpusSearcher:
    """Return the searcher of a first stage."""
    if isinstance(stage, Bm25):
        return Bm25Searcher(stage, label, show_progress)
    if isinstance(stage, Hybrid):
        return HybridSearcher(stage, label, show_progress)
    return retrieval.searcher_for(stage, label, show_progress)


@dataclass(frozen=True)
class FirstStageResult:
    """The documents that a first stage ranks first in a task, and its figures."""

    label: str  # of the task in `figures`
    ranked: dict[tuple[str, str], RankedIds]  # split, subset
    figures: Evaluation


def first_stage_result(stage: Encoder | Stage, label: str, task: Task, show_progress: bool) -> FirstStageResult:
    """Search a task. The task keeps the result for as long as the first stage exists: training asks again and again."""
    result = task.first_stages.get(stage)
    if result is None or result.label != label:
        searcher = searcher_of(stage, label, show_progress)
        figures = Evaluation(stage.name, {}, {}, {})
        ranked = {
            split.key: {query: _ids_by_score(scores) for query, scores in split.rankings.items()}
            for split in retrieval.add_task(figures, searcher, task)
        }
        result = task.first_stages[stage] = FirstStageResult(label, ranked, figures)
    return result


def scores_by_rank(documents: Sequence[str]) -> Scores:
    """Return scores that preserve the order of documents in trec_eval, which sorts by score, and equal scores by id."""
    return {document: float(len(documents) - rank) for rank, document in enumerate(documents)}


def _ids_by_score(scores: Scores) -> list[str]:
    """Return documents best first, as trec_eval sorts them: of equal scores, the last id first."""
    return sorted(scores, key=lambda document: (scores[document], document), reverse=True)
