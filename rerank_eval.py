"""How much a reranker betters a ranking: the first documents that BM25, or a model, finds, in a new order.

python eval.py --task rerank --model MODEL                                       # the first 100 of BM25, on eval-data/
python eval.py --task rerank --model MODEL --first-stage adapters/final --depth 50 --output results.json

from rerank import Reranker
from rerank_eval import evaluate_reranker
before, after = evaluate_reranker(Reranker("MODEL"), ["eval-data"])              # two eval.Evaluation

Only the first `depth` documents of a query are scored and put in the order of their scores, equal ones as they were.
What the first stage ranks behind them stays there, so Recall@100 and the like mean the same before and after.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from backend import UserError

import numpy as np

import eval as evaluation
from comparison import Evaluation, Scores, compare, print_comparison
from eval import Encoder, Searcher
from eval_tasks import RANKS, Corpus, Rankings

DEPTH = 100
QUERIES_AT_ONCE = 16

Found = dict[str, list[str]]  # query id -> document ids, best first


class Scorer(Protocol):
    """All that evaluation needs of a reranker; `rerank.Reranker` is one."""

    name: str

    def score_groups(self, groups: Sequence[tuple[str, Sequence[str]]]) -> list[np.ndarray]:
        """A score for every document of every (query, documents): (documents,) float32 each, higher is better."""


# --- first stage ---


def bm25(documents: Mapping[str, str], queries: Mapping[str, str], depth: int = RANKS) -> Found:
    """The documents that share a word with a query, at most `depth`; equal scores in the order of the ids.

    Both are id -> text. bm25s as it comes (Lucene's formula, k1 = 1.5, b = 0.75), English stop words, no stemming.
    """
    ids = sorted(documents)
    scores_of = bm25_scores([documents[i] for i in ids])
    found: Found = {}
    for query, text in queries.items():
        scores = scores_of(text)
        hits = np.flatnonzero(scores > 0)
        found[query] = [ids[i] for i in hits[np.argsort(-scores[hits], kind="stable")[:depth]]]
    return found


def bm25_scores(documents: Sequence[str]) -> Callable[[str], np.ndarray]:
    """What gives, for a query, BM25's scores of these documents: (documents,) float32, 0 where no word is shared."""
    import bm25s

    def tokenise(texts: Sequence[str], **how):
        return bm25s.tokenize(texts, stopwords="en", show_progress=False, **how)

    words, retriever = tokenise(documents), bm25s.BM25()
    if not any(words.ids):  # bm25s can not index that
        return lambda query: np.zeros(len(documents), np.float32)
    retriever.index(words, show_progress=False)

    def scores(query: str) -> np.ndarray:
        terms = tokenise([query], return_ids=False)[0]
        return retriever.get_scores(terms) if terms else np.zeros(len(documents), np.float32)

    return scores


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
        searcher = (_Bm25 if stage is _Bm25 else evaluation.searcher_of)(stage, name, show_progress)
        figures = Evaluation(stage.name, {}, {}, {})
        found = {
            part.key: {query: _in_order(ranking) for query, ranking in part.rankings.items()}
            for part in evaluation.add_task(figures, searcher, task)
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
    loaded, unreachable = evaluation.load_tasks(tasks, show_progress)
    before, after = (Evaluation(each.name, {}, {}, unreachable) for each in (stage, reranker))
    for name, task in loaded.items():
        first = _first_stage(stage, name, task, show_progress)
        before.tasks.update(first.figures.tasks)
        before.per_query.update(first.figures.per_query)
        evaluation.add_task(after, _Reranking(reranker, first.found, depth, name, show_progress), task)
    return before, after


# --- what eval.py does with --task rerank ---


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --task and the flags of --task rerank."""
    kinds = "embed: a vector a text; late: a vector a token; rerank: a score a pair (default: embed or late, as saved)"
    parser.add_argument("--task", choices=("embed", "late", "rerank"), help=kinds)
    stage = "rerank: what finds the documents, bm25 or a model of --task embed or late (default: bm25)"
    parser.add_argument("--first-stage", metavar="MODEL", help=stage)
    depth = f"rerank: how many of the documents found for a query are reranked (default: {DEPTH})"
    parser.add_argument("--depth", type=int, metavar="N", help=depth)


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not fit --task."""
    rerank = args.task == "rerank"
    unfit = ("precision", "dimensions", "query_max_length") if rerank else ("first_stage", "depth")
    if given := [f"--{name.replace('_', '-')}" for name in unfit if getattr(args, name) is not None]:
        raise UserError(f"{' and '.join(given)}: {'not' if rerank else 'only'} for --task rerank")
    if args.depth is not None:
        check_depth(args.depth)


def check_depth(depth: int) -> None:
    """Raise UserError for a depth that can not be."""
    if not 0 < depth <= RANKS:
        raise UserError(f"--depth {depth}: from 1 to {RANKS:,} documents are reranked")


def evaluate_flags(args: argparse.Namespace, show_progress: bool) -> tuple[Evaluation, dict[str, Any]]:
    """What the flags ask for, its tables printed: the reranked figures, and what `--output` writes."""
    from rerank import Reranker

    first: Any = "bm25"
    if args.first_stage not in (None, "bm25"):
        from embed import load

        first = load(args.first_stage)
    reranker = Reranker(args.model, args.adapter, max_length=args.max_length)
    depth = args.depth or DEPTH
    before, after = evaluate_reranker(reranker, args.eval_tasks, first, depth, show_progress)
    record = after.to_json() | {"first_stage": {"model": before.model, "depth": depth, "tasks": before.tasks}}
    if after.tasks:
        print_reranked(before, after, depth)
        record["differences"] = {
            metric: {"difference": difference, "low": low, "high": high}
            for metric, _, _, difference, low, high in compare(before, after)
        }
    return after, record


def print_reranked(before: Evaluation, after: Evaluation, depth: int) -> None:
    """Print a table for every task and, where there are several, one for their mean."""
    from reporting import console

    console().print(f"{after.model} reranks the first {depth:,} documents of {before.model}", style="bold")
    if len(after.tasks) > 1:
        for task in after.tasks:
            alone = (Evaluation(e.model, {task: e.tasks[task]}, {task: e.per_query[task]}, {}) for e in (before, after))
            print_comparison(*alone)
    print_comparison(before, after)
