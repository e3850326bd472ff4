"""Evaluate rerankers: the first documents of a first stage (first_stages.py), put in a new order.

python eval.py --task rerank --model MODEL                                       # the first 100 of BM25, on eval-data/
python eval.py --task rerank --model MODEL --first-stage adapters/final --depth 50 --output results.json

from mlx_retrieval.evaluation.reranking import evaluate_reranker
from rerank import Reranker
before, after = evaluate_reranker(Reranker("MODEL"), ["eval-data"])              # two results.Evaluation

The first `depth` documents of a query are scored and sorted by score; equal scores keep the order of the first stage.
The documents behind them stay where they are, so Recall@100 and the like mean the same before and after.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_retrieval.dataset.beir import TOLERANT, FolderRules
from mlx_retrieval.evaluation import pairs, retrieval
from mlx_retrieval.evaluation.first_stages import Bm25, Stage, bm25_stage, first_stage_result, scores_by_rank
from mlx_retrieval.evaluation.results import Evaluation, print_comparison
from mlx_retrieval.evaluation.retrieval import Encoder
from mlx_retrieval.evaluation.tasks import Corpus, CorpusSearcher, Rankings
from mlx_retrieval.inference.reranker import Scorer, raw_scores
from mlx_retrieval.retrieval.base import RANKS
from mlx_retrieval.retrieval.bm25 import RankedIds
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar
from mlx_retrieval.utils.text import quantity

DEPTH = 100
QUERIES_AT_ONCE = 16


class RerankingSearcher(CorpusSearcher):
    """Ranks like the first stage, with its first `depth` documents sorted by a reranker.

    Args:
        reranker: see `Scorer`.
        ranked: the first stage's ranking of every split and subset.
        depth: documents of a query that are scored.
        task, show_progress: see `CorpusSearcher`.
    """

    def __init__(
        self,
        reranker: Scorer,
        ranked: dict[tuple[str, str], RankedIds],
        depth: int,
        task: str,
        show_progress: bool = False,
    ):
        super().__init__(reranker, task, show_progress)
        self.ranked, self.depth = ranked, depth

    def search(self, key: tuple[str, str], corpus: Corpus, queries: dict[str, str], top_k: int) -> Rankings:
        ranked = self.ranked[key]
        heads = {query: ranked[query][: self.depth] for query in queries if ranked[query]}
        needed = set().union(*heads.values())
        numbers = [i for i, document in enumerate(corpus.ids) if document in needed]
        texts = dict(zip((corpus.ids[i] for i in numbers), corpus.texts(numbers), strict=True))
        rankings: Rankings = {query: {} for query in queries}
        names = list(heads)
        show = self.show_progress and sys.stderr.isatty()
        with progress_bar("reranking", "queries", len(names), show) as progress:
            for first in range(0, len(names), QUERIES_AT_ONCE):
                block = names[first : first + QUERIES_AT_ONCE]
                groups = [(queries[query], [texts[document] for document in heads[query]]) for query in block]
                for query, scores in zip(block, raw_scores(self.model, groups), strict=True):
                    order = np.argsort(-self._checked(scores, query, len(heads[query])), kind="stable")
                    head = [heads[query][i] for i in order]
                    rankings[query] = scores_by_rank(head + ranked[query][self.depth :])
                progress(first + len(block))
        return rankings

    def _checked(self, scores: Any, query: str, count: int) -> np.ndarray:
        scores = np.asarray(scores, np.float64)
        if scores.shape != (count,):
            raise ValueError(f"{self.model.name}: scores of shape {scores.shape} for {count} documents")
        if bad := int((~np.isfinite(scores)).sum()):
            raise FloatingPointError(f"{self.task}: query {query}: {bad} of {count} scores are not finite")
        return scores


def evaluate_reranker(
    reranker: Scorer,
    tasks: Sequence[str],
    first_stage: str | Encoder | Stage = "bm25",
    depth: int = DEPTH,
    show_progress: bool = False,
    rules: FolderRules = TOLERANT,
) -> tuple[Evaluation, Evaluation]:
    """Return the figures of the first stage alone and of the reranker on top of it; see `results.compare`.

    Args:
        reranker: see `Scorer`. It is given the titles and texts of the documents of 16 queries at once.
        tasks: folders in BEIR layout and names of MTEB tasks of type Retrieval.
        first_stage: "bm25", a model from `embedder.load`, of one vector a text or a token, or another one of
            first_stages.py. Each task is searched once a process and the ranking is kept, so later changes of the
            model's weights have no effect.
        depth: documents of a query that are scored, 1 to 1,000; fewer if the first stage finds fewer.
        show_progress: show progress bars for downloads, embedding and reranking.
        rules: how folders are read.

    A query for which BM25 finds nothing scores 0 before and after.
    Raises UserError like `retrieval.evaluate` and for an invalid depth or first stage, ValueError if `score_groups`
    does not return one score a document, and FloatingPointError, with the query's id, for scores that are not finite.
    """
    check_depth(depth)
    if isinstance(first_stage, str) and first_stage != "bm25":
        raise UserError(f'first stage {first_stage!r}: "bm25", or a model from embedder.load')
    stage = bm25_stage() if isinstance(first_stage, str) else first_stage
    loaded, unreachable = retrieval.load_tasks(tasks, show_progress, rules)
    pairs.refuse(loaded, "which a reranker has not")
    before, after = (Evaluation(name, {}, {}, unreachable) for name in (stage.name, reranker.name))
    for label, task in loaded.items():
        first = first_stage_result(stage, label, task, show_progress)
        for name in ("tasks", "per_query", "top_documents", "digests"):
            getattr(before, name).update(getattr(first.figures, name))
        retrieval.add_task(after, RerankingSearcher(reranker, first.ranked, depth, label, show_progress), task)
    return before, after


def check_depth(depth: int) -> None:
    """Raise UserError for an invalid depth."""
    if not 0 < depth <= RANKS:
        raise UserError(f"--depth {depth}: from 1 to {RANKS:,} documents are reranked")


def print_reranked(before: Evaluation, after: Evaluation, depth: int) -> None:
    """Print a table for every task and, if there are several, one for their average, and whether reranking helps."""
    from mlx_retrieval.utils.console import console

    names = (before.model if before.model == Bm25.name else "first stage", "reranked")
    console().print(f"{after.model} reranks the first {quantity(depth, 'document')} of {before.model}", style="bold")
    if len(after.tasks) > 1:
        for task in after.tasks:
            alone = (Evaluation(e.model, {task: e.tasks[task]}, {task: e.per_query[task]}, {}) for e in (before, after))
            print_comparison(*alone, names)
    print_comparison(before, after, names)
    if line := harm(before, after):
        console().print(line)


def harm(first: Evaluation, reranked: Evaluation) -> str:
    """Return a line if a reranker's order is worse than the one that it was given, by nDCG@10; else ""."""
    metric = "ndcg_at_10"
    before, after = first.average().get(metric, 0.0), reranked.average().get(metric, 0.0)
    if after >= before:
        return ""
    return f"reranking does not help: nDCG@10 {after:.4f}, and {before:.4f} in the order of {first.model}"
