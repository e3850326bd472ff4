"""How much a reranker betters a ranking: the first documents that BM25, or a model, finds, in a new order.

python eval.py --task rerank --model MODEL                                       # the first 100 of BM25, on eval-data/
python eval.py --task rerank --model MODEL --first-stage adapters/final --depth 50 --output results.json

from rerank import Reranker
from rerank_eval import evaluate_reranker
before, after = evaluate_reranker(Reranker("MODEL"), ["eval-data"])              # two eval.Evaluation

Only the first `depth` documents of a query are scored and put in the order of their scores, equal ones as they were.
What the first stage ranks behind them stays there, so Recall@100 and the like mean the same before and after.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mlx_retrieval.evaluation import retrieval
from mlx_retrieval.evaluation.results import Evaluation, Scores, print_comparison
from mlx_retrieval.evaluation.retrieval import Encoder, Searcher
from mlx_retrieval.evaluation.tasks import Corpus, Rankings
from mlx_retrieval.inference.reranker import Scorer
from mlx_retrieval.retrieval.base import RANKS
from mlx_retrieval.retrieval.bm25 import Found, bm25
from mlx_retrieval.utils.errors import UserError

DEPTH = 100
QUERIES_AT_ONCE = 16


# --- first stage ---


def by_rank(documents: Sequence[str]) -> Scores:
    """Scores that keep an order as it is: trec_eval sorts by them, and equal ones by id."""
    return {document: float(len(documents) - rank) for rank, document in enumerate(documents)}


class _Bm25(Searcher):
    """The first stage that is no model: its own class stands in a model's place."""

    name = "BM25"

    def search(self, part: tuple[str, str], corpus: Corpus, queries: dict[str, str], top_k: int) -> Rankings:
        texts = corpus.texts(range(len(corpus.ids)))
        found = bm25(dict(zip(corpus.ids, texts, strict=True)), queries, top_k)
        return {query: by_rank(documents) for query, documents in found.items()}


@dataclass(frozen=True)
class _FirstStage:
    """What a first stage found in one task, and its figures under the task's name."""

    name: str
    found: dict[tuple[str, str], Found]  # split, subset
    figures: Evaluation


# First stage -> task -> what it found, as long as both are alive: eval_tasks keeps a bounded number of folders.
_kept: WeakKeyDictionary[Any, WeakKeyDictionary[Any, _FirstStage]] = WeakKeyDictionary()


def _first_stage(stage: Any, name: str, task: Any, show_progress: bool) -> _FirstStage:
    """Search a task, once a process."""
    known = _kept.setdefault(stage, WeakKeyDictionary())
    if task not in known or known[task].name != name:
        searcher = (_Bm25 if stage is _Bm25 else retrieval.searcher_of)(stage, name, show_progress)
        figures = Evaluation(stage.name, {}, {}, {})
        found = {
            part.key: {query: _in_order(ranking) for query, ranking in part.rankings.items()}
            for part in retrieval.add_task(figures, searcher, task)
        }
        known[task] = _FirstStage(name, found, figures)
    return known[task]


def _in_order(ranking: Scores) -> list[str]:
    """Best first, as trec_eval has them: by score, equal ones by id, the last id first."""
    return sorted(ranking, key=lambda document: (ranking[document], document), reverse=True)


# --- second stage ---


class _Reranking(Searcher):
    """The first stage's rankings, their first `depth` documents ordered by a reranker."""

    def __init__(self, reranker: Scorer, first: dict[tuple[str, str], Found], depth: int, *about):
        super().__init__(reranker, *about)
        self.first, self.depth = first, depth

    def search(self, part: tuple[str, str], corpus: Corpus, queries: dict[str, str], top_k: int) -> Rankings:
        found = self.first[part]
        heads = {query: found[query][: self.depth] for query in queries if found[query]}
        wanted = set().union(*heads.values())
        numbers = [i for i, document in enumerate(corpus.ids) if document in wanted]
        texts = dict(zip((corpus.ids[i] for i in numbers), corpus.texts(numbers), strict=True))
        rankings: Rankings = {query: {} for query in queries}
        names = list(heads)
        with _bar(len(names), self.show_progress) as advance:
            for first in range(0, len(names), QUERIES_AT_ONCE):
                block = names[first : first + QUERIES_AT_ONCE]
                groups = [(queries[query], [texts[document] for document in heads[query]]) for query in block]
                for query, scores in zip(block, self.model.score_groups(groups), strict=True):
                    order = np.argsort(-self._checked(scores, query, len(heads[query])), kind="stable")
                    head = [heads[query][i] for i in order]
                    rankings[query] = by_rank(head + found[query][self.depth :])
                advance(len(block))
        return rankings

    def _checked(self, scores: Any, query: str, count: int) -> np.ndarray:
        scores = np.asarray(scores, np.float64)
        if scores.shape != (count,):
            raise ValueError(f"{self.model.name}: scores of shape {scores.shape} for {count} documents")
        if bad := int((~np.isfinite(scores)).sum()):
            raise FloatingPointError(f"{self.task}: query {query}: {bad} of {count} scores are not finite")
        return scores


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar on standard error, where that is a terminal."""
    if not (show and total and sys.stderr.isatty()):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("reranking", BarColumn(), MofNCompleteColumn(), "queries", TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=total)
        yield lambda count: progress.advance(bar, count)


def evaluate_reranker(
    reranker: Scorer,
    tasks: Sequence[str],
    first_stage: str | Encoder = "bm25",
    depth: int = DEPTH,
    show_progress: bool = False,
) -> tuple[Evaluation, Evaluation]:
    """Evaluate the first stage alone, and what the reranker makes of it; `eval.compare` compares the two.

    Args:
        reranker: see `Scorer`; it is given the titles and texts of 16 queries' documents at once.
        tasks: folders in BEIR layout and names of MTEB tasks of type Retrieval.
        first_stage: "bm25", or a model that `embed.load` gave, of either kind. Each task is searched once a process,
            and the ranking kept: a model whose weights change meanwhile is not asked again.
        depth: how many documents a query has scored, 1 to 1,000; fewer where the first stage finds fewer.
        show_progress: bars for downloads, embedding and reranking.

    A query for which BM25 finds nothing scores 0 before and after.
    Raises UserError as `eval.evaluate` and for a depth or a first stage that can not be, ValueError where
    `score_groups` gives other than a score a document, and FloatingPointError, with the query's id, for scores that
    are not finite.
    """
    check_depth(depth)
    if isinstance(first_stage, str) and first_stage != "bm25":
        raise UserError(f'first stage {first_stage!r}: "bm25", or a model from embed.load')
    stage = _Bm25 if isinstance(first_stage, str) else first_stage
    loaded, unreachable = retrieval.load_tasks(tasks, show_progress)
    before, after = (Evaluation(each.name, {}, {}, unreachable) for each in (stage, reranker))
    for name, task in loaded.items():
        first = _first_stage(stage, name, task, show_progress)
        before.tasks.update(first.figures.tasks)
        before.per_query.update(first.figures.per_query)
        retrieval.add_task(after, _Reranking(reranker, first.found, depth, name, show_progress), task)
    return before, after


# --- what eval.py does with --task rerank ---


def check_depth(depth: int) -> None:
    """Raise UserError for a depth that can not be."""
    if not 0 < depth <= RANKS:
        raise UserError(f"--depth {depth}: from 1 to {RANKS:,} documents are reranked")


def print_reranked(before: Evaluation, after: Evaluation, depth: int) -> None:
    """Print a table for every task and, where there are several, one for their mean."""
    from mlx_retrieval.utils.console import console

    console().print(f"{after.model} reranks the first {depth:,} documents of {before.model}", style="bold")
    if len(after.tasks) > 1:
        for task in after.tasks:
            alone = (Evaluation(e.model, {task: e.tasks[task]}, {task: e.per_query[task]}, {}) for e in (before, after))
            print_comparison(*alone)
    print_comparison(before, after)
