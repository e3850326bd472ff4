"""Hard negatives: documents that a retriever ranks high for a query although they do not answer it.

python mine.py negatives --data pairs.jsonl --corpus corpus.jsonl --model M --output mined.jsonl

Documents are searched in blocks and the best of all blocks are merged, so memory depends neither on the number of
queries nor on that of documents. The rules follow NV-Retriever (Moreira et al. 2024, arXiv 2407.15831), with the
meanings that sentence-transformers' `mine_hard_negatives` gives them. Queries and documents are numbers here:
collection.py holds their texts, cache.py finished blocks, and output.py writes the rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from mlx_retrieval.backend import mx
from mlx_retrieval.backend.device_errors import halved

import numpy as np

from mlx_retrieval.mining.cache import ResumableCache
from mlx_retrieval.mining.collection import Collection
from mlx_retrieval.retrieval.analyzer import ENGLISH, check_language
from mlx_retrieval.retrieval.fusion import reciprocal_rank_fusion
from mlx_retrieval.retrieval.late_interaction import LateIndex
from mlx_retrieval.retrieval.topk import DOCUMENTS, NO_DOCUMENT, QUERIES, best_first, merge
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.products import product
from mlx_retrieval.utils.progress import Progress

QUERIES_OF_A_JUDGE = 128  # queries of a block that a judge scores; without a judge a block has QUERIES
RELATIVE_MARGIN = 0.05  # the best of NV-Retriever's experiments
BY, SAMPLING = ("model", "bm25", "both"), ("top", "random")

REASONS = {
    "known positive": "or the query itself, among the best; case and white space do not count",
    "absolute margin": "too close to the score of the query's lowest positive, or above it",
    "relative margin": "the same, as a share of that score",
    "max score": "above --max-score",
    "min score": "below --min-score",
    "skip": "the first of the rest",
}

Vectors = np.ndarray | list[np.ndarray]  # (Q, d) float32; late interaction: Q arrays (L, d)
Groups = Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Rules:
    """The rules by which documents become negatives.

    Of a query's `depth` best documents, known positives aside, `passing` filters some out. The rest keep the order of
    their rank: the first `skip` are left out, and `take` of the others are taken, the first ("top") or any ("random").

    Raises UserError for values that are out of range or exclude each other.
    """

    by: str = "model"  # one of BY; both: reciprocal rank fusion
    skip: int = 0
    take: int = 4
    range_max: int | None = None  # documents of a query to look at; None = skip + 10 * take
    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    sampling: str = "top"
    seed: int = 0
    language: str = ENGLISH  # of stems and stop words, for BM25

    def __post_init__(self):
        check_language(self.language)
        if self.take < 1:
            raise UserError(f"--take {self.take}: must be at least 1")
        if self.skip < 0 or self.seed < 0:
            raise UserError(f"--skip {self.skip} --seed {self.seed}: must not be negative")
        if self.depth < self.skip + self.take:
            raise UserError(
                f"--range-max {self.depth}: with --skip {self.skip} --take {self.take} it must be at least "
                f"{self.skip + self.take}"
            )
        for name in ("absolute_margin", "relative_margin"):
            if (margin := getattr(self, name)) is not None and not 0 <= margin < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} {margin}: must be 0 or more, or off")
        if None not in (self.min_score, self.max_score) and not self.min_score <= self.max_score:
            raise UserError(f"--min-score {self.min_score} --max-score {self.max_score}: nothing lies between")

    @property
    def depth(self) -> int:
        """The number of documents of a query to look at."""
        return self.skip + 10 * self.take if self.range_max is None else self.range_max


class Retrievers(NamedTuple):
    """The functions that rank and score documents. Scores are the judge's, else those of vectors, else BM25's."""

    encode: Callable[[list[str]], Vectors] | None = None  # queries -> their vectors
    vectors: np.ndarray | None = None  # (D, d) float32 of the documents, in memory or mapped
    tokens: LateIndex | None = None  # late interaction: the token vectors of the documents instead
    words: Callable[[str], np.ndarray] | None = None  # query -> BM25 scores (D,)
    judge: Callable[[Groups], list[np.ndarray]] | None = None  # as inference.reranker.Reranker.score_groups


class Mined(NamedTuple):
    """The negatives of Q queries, best first, and the scores of their positives."""

    numbers: np.ndarray  # (Q, take) int64: documents; NO_DOCUMENT = no more
    scores: np.ndarray  # (Q, take) float32
    known: np.ndarray  # (K,) float32: every known positive's, in the order of `Collection.known`
    counts: np.ndarray  # (2 + len(REASONS),) int64: known positives, candidates, and those left out by each reason


class Ranking(NamedTuple):
    """The documents that one retriever ranks best."""

    numbers: np.ndarray  # (Q, depth) int64, best first; NO_DOCUMENT = no more
    scores: np.ndarray  # (Q, depth) float32
    excluded: np.ndarray  # (B,) float32: scores of the excluded pairs


# --- search -----------------------------------------------------------------------------------------------------------


def by_vectors(
    queries: np.ndarray, documents: np.ndarray, k: int, rows: np.ndarray, excluded: np.ndarray, block: int = DOCUMENTS
) -> Ranking:
    """Rank the `k` documents with the greatest dot products for each query.

    Args:
        queries: (Q, d) float32.
        documents: (D, d) float32, in memory or mapped from disk.
        rows, excluded: (B,) each: document excluded[i] is left out for query rows[i].
        block: documents in memory at once.
    """
    best = np.empty((len(queries), 0), np.int64)
    device_queries = mx.array(queries)
    for first in range(0, len(documents), block):
        part = np.asarray(documents[first : first + block])
        scores = np.concatenate([*halved(partial(_scores, device_queries, part), 0, len(part))], axis=1)
        here = (excluded >= first) & (excluded < first + len(part))
        scores[rows[here], excluded[here] - first] = -np.inf
        best = merge(best, scores, first, k)
    numbers, _ = best_first(best, k)
    # The last digits of a block's products depend on its size: the products of the best are computed again in float64.
    scores = dots(queries, documents, numbers)
    order = np.lexsort((numbers, -scores), axis=1)
    numbers, scores = (np.take_along_axis(each, order, axis=1) for each in (numbers, scores))
    pairs = [product(queries[row].astype(np.float64), documents[i]) for row, i in zip(rows, excluded, strict=True)]
    return Ranking(numbers, scores, np.array(pairs, np.float32))


def _scores(queries: mx.array, documents: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return (Q, last - first): the dot products of the queries and documents `first` to `last` - 1."""
    return np.array(queries @ mx.array(documents[first:last]).T)


def dots(queries: np.ndarray, documents: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the dot products of each query and its documents, (Q, k) float32, summed in float64; -inf: NO_DOCUMENT."""
    scores = np.full(numbers.shape, -np.inf, np.float32)
    for i, query in enumerate(queries.astype(np.float64)):
        real = numbers[i] >= 0
        scores[i, real] = product(documents[numbers[i, real]].astype(np.float64), query)
    return scores


def by_tokens(
    queries: Sequence[np.ndarray], documents: LateIndex, k: int, rows: np.ndarray, excluded: np.ndarray
) -> Ranking:
    """Rank the `k` best documents by MaxSim; otherwise as `by_vectors`."""
    numbers, scores = np.full((len(queries), k), NO_DOCUMENT, np.int64), np.full((len(queries), k), -np.inf, np.float32)
    pairs = np.empty(len(rows), np.float32)
    most = k + int(np.bincount(rows, minlength=1).max())
    for row, ranking in enumerate(documents.search(queries, most)):
        out = excluded[rows == row]
        best = np.array([number for number, _ in ranking if number not in out][:k], np.int64)
        # Scored together: with imputation, a score depends on the documents that are compared.
        scores[row, : len(best)], pairs[rows == row] = np.split(
            documents.scores(queries[row], np.concatenate([best, out])), [len(best)]
        )
        numbers[row, : len(best)] = best
    order = np.lexsort((numbers, -scores), axis=1)
    numbers, scores = (np.take_along_axis(each, order, axis=1) for each in (numbers, scores))
    return Ranking(numbers, scores, pairs)


def token_scores(
    queries: Sequence[np.ndarray], documents: LateIndex, numbers: np.ndarray, rows: np.ndarray, excluded: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the MaxSim scores of each query and its documents (Q, k), -inf: NO_DOCUMENT; and of the excluded pairs."""
    scores, pairs = np.full(numbers.shape, -np.inf, np.float32), np.empty(len(rows), np.float32)
    for row, query in enumerate(queries):
        real = numbers[row] >= 0
        both = np.concatenate([numbers[row, real], excluded[rows == row]])
        scores[row, real], pairs[rows == row] = np.split(documents.scores(query, both), [int(real.sum())])
    return scores, pairs


def by_words(
    queries: Sequence[str], words: Callable[[str], np.ndarray], k: int, rows: np.ndarray, excluded: np.ndarray
) -> Ranking:
    """Rank the `k` best documents by BM25, among those that share a word with the query; otherwise as `by_vectors`."""
    rankings, pairs = [], []
    for row, query in enumerate(queries):
        scores = np.array(words(query), np.float32)
        out = excluded[rows == row]
        pairs.append(scores[out])
        scores[out] = -np.inf
        scores[scores <= 0] = -np.inf
        rankings.append(best_first(merge(np.empty((1, 0), np.int64), scores[None], 0, k), k))
    numbers, scores = (np.concatenate(each) for each in zip(*rankings, strict=True))
    return Ranking(numbers, scores, np.concatenate(pairs))


def fuse_rankings(rankings: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Return the best `k` documents (Q, k) by reciprocal rank fusion of rankings (Q, any); equal scores by number."""
    fused = np.full((len(rankings[0]), k), NO_DOCUMENT, np.int64)
    for row in range(len(fused)):
        scores = reciprocal_rank_fusion([ranking[row][ranking[row] >= 0].tolist() for ranking in rankings])
        best = sorted(scores, key=lambda number: (-scores[number], number))[:k]
        fused[row, : len(best)] = best
    return fused


# --- rules ------------------------------------------------------------------------------------------------------------


def passing(there: np.ndarray, scores: np.ndarray, floor: np.ndarray, rules: Rules) -> tuple[np.ndarray, list[int]]:
    """Return the mask of the candidates that pass the filters, (Q, n) bool, and how many each of the four removed.

    Args:
        there: (Q, n) bool, False if a query has no more candidates.
        scores: (Q, n).
        floor: (Q,): the score of the query's lowest known positive.
    """
    scores, floor = scores.astype(np.float64), floor.astype(np.float64)[:, None]
    tests = []
    if rules.absolute_margin is not None:
        tests.append(scores + rules.absolute_margin > floor)
    else:
        tests.append(np.zeros_like(there))
    if rules.relative_margin is not None:  # of |floor|: a positive's score may be negative
        tests.append(scores > floor - np.abs(floor) * rules.relative_margin)
    else:
        tests.append(np.zeros_like(there))
    tests.append(scores > (np.inf if rules.max_score is None else rules.max_score))
    tests.append(scores < (-np.inf if rules.min_score is None else rules.min_score))
    mask, counts = there.copy(), []
    for fails in tests:
        counts.append(int((mask & fails).sum()))
        mask &= ~fails
    return mask, counts


def choose(mask: np.ndarray, rules: Rules, first: int = 0) -> tuple[np.ndarray, int]:
    """Return the places of the chosen candidates, (Q, take) int64, -1 = no more, and how many `skip` left out.

    Args:
        mask: (Q, n) bool: the candidates that passed.
        first: the number of the first query. It seeds the sampling, so that blocks of any size give the same result.
    """
    chosen, skipped = np.full((len(mask), rules.take), -1, np.int64), 0
    for row, passed in enumerate(mask):
        places = np.flatnonzero(passed)
        skipped += min(len(places), rules.skip)
        places = places[rules.skip :]
        if rules.sampling == "random" and len(places) > rules.take:
            rng = np.random.default_rng([rules.seed, first + row])
            places = np.sort(rng.choice(places, rules.take, replace=False))
        chosen[row, : len(places)] = places[: rules.take]
    return chosen, skipped


# --- mining -----------------------------------------------------------------------------------------------------------


def mine_block(first: int, last: int, collection: Collection, retrievers: Retrievers, rules: Rules) -> Mined:
    """Mine the negatives of queries `first` to `last` - 1."""
    texts = collection.queries.read(range(first, last))
    excluded_pairs = collection.part(collection.excluded, first, last)
    rows, excluded = (excluded_pairs >> 32) - first, excluded_pairs & 0xFFFFFFFF
    known = np.isin(excluded_pairs, collection.part(collection.known, first, last))  # the rest: the queries' own text
    vectors = retrievers.encode(texts) if retrievers.encode else None
    rankings = []
    if rules.by != "bm25":
        search, documents = (by_tokens, retrievers.tokens) if retrievers.tokens else (by_vectors, retrievers.vectors)
        rankings.append(search(vectors, documents, rules.depth, rows, excluded))
    if rules.by != "model":
        rankings.append(by_words(texts, retrievers.words, rules.depth, rows, excluded))
    # A BM25 score of 0 means that no word is shared: such pairs are never among the best, however few there are.
    in_reach = np.any([(r.excluded > r.scores[rows, -1]) & (r.excluded != 0) for r in rankings], axis=0)
    numbers, scores, pairs = rankings[0]
    if len(rankings) > 1:
        numbers = fuse_rankings([ranking.numbers for ranking in rankings], rules.depth)
    if retrievers.judge:
        scores, pairs = judge_scores(texts, numbers, rows, excluded, collection, retrievers.judge)
        order = np.lexsort((np.broadcast_to(np.arange(numbers.shape[1]), numbers.shape), -scores), axis=1)
        numbers, scores = (np.take_along_axis(each, order, axis=1) for each in (numbers, scores))
    elif retrievers.tokens and rules.by != "model":
        scores, pairs = token_scores(vectors, retrievers.tokens, numbers, rows, excluded)
    elif vectors is not None and rules.by != "model":
        scores = dots(vectors, retrievers.vectors, numbers)
        pairs = dots(vectors[rows], retrievers.vectors, excluded[:, None])[:, 0]
    floor = np.full(last - first, np.inf, np.float32)
    np.minimum.at(floor, rows[known], pairs[known])
    there = numbers >= 0
    mask, counts = passing(there, scores, floor, rules)
    chosen, skipped = choose(mask, rules, first)
    real = chosen >= 0
    return Mined(
        np.where(real, np.take_along_axis(numbers, chosen, axis=1), NO_DOCUMENT),
        np.where(real, np.take_along_axis(scores, chosen, axis=1), np.nan).astype(np.float32),
        pairs[known],
        np.array([len(rows), there.sum(), in_reach.sum(), *counts, skipped], np.int64),
    )


def judge_scores(
    texts: Sequence[str],
    numbers: np.ndarray,
    rows: np.ndarray,
    excluded: np.ndarray,
    collection: Collection,
    judge: Callable[[Groups], list[np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the judge's scores of candidates (Q, n), -inf for NO_DOCUMENT, and of the excluded pairs (B,)."""
    groups = []
    for row, text in enumerate(texts):
        documents = [*numbers[row][numbers[row] >= 0].tolist(), *excluded[rows == row].tolist()]
        groups.append((text, collection.documents.read(documents)))
    scores, pairs = np.full(numbers.shape, -np.inf, np.float32), np.empty(len(rows), np.float32)
    for row, group_scores in enumerate(judge(groups)):
        real = numbers[row] >= 0
        scores[row, real], pairs[rows == row] = np.split(np.asarray(group_scores, np.float32), [int(real.sum())])
    return scores, pairs


def mine(
    collection: Collection,
    retrievers: Retrievers,
    rules: Rules,
    cache: ResumableCache,
    progress: Progress | None = None,
) -> Mined:
    """Mine the negatives of all queries. Finished blocks are stored in the cache and not computed again."""
    blocks, count = [], len(collection.queries)
    size = QUERIES_OF_A_JUDGE if retrievers.judge else QUERIES
    for number, first in enumerate(range(0, count, size)):
        last = min(first + size, count)
        if (block := cache.block(number, Mined._fields)) is None:
            block = mine_block(first, last, collection, retrievers, rules)
            cache.store(number, block._asdict())
            blocks.append(block)
        else:
            blocks.append(Mined(**block))
        if progress:
            progress(last, count)
    numbers, scores, known, counts = zip(*blocks, strict=True)
    return Mined(np.concatenate(numbers), np.concatenate(scores), np.concatenate(known), np.sum(counts, axis=0))
