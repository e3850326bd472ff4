"""Hard negatives: documents that a retriever ranks high for a query without their being an answer to it.

python mine.py negatives --data pairs.jsonl --corpus corpus.jsonl --model M --output mined.jsonl

Documents are searched in blocks, and the best of all blocks are merged, so that memory depends on neither the number of
queries nor that of documents. Rules follow NV-Retriever (Moreira et al. 2024, arXiv 2407.15831) in the meanings that
sentence-transformers' `mine_hard_negatives` gives them. Everything here works on numbers of queries and documents; what
is read, kept and written is in mining.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mlx_retrieval.backend import mx

import numpy as np

from mlx_retrieval.retrieval.base import reciprocal_rank_fusion
from mlx_retrieval.retrieval.topk import DOCUMENTS, NO_DOCUMENT, QUERIES, best_first, merge
from mlx_retrieval.utils.errors import UserError

if TYPE_CHECKING:
    from mlx_retrieval.mining.cache import Work
    from mlx_retrieval.mining.collection import Collection
    from mlx_retrieval.utils.progress import Progress

JUDGED_QUERIES = 128  # that are searched at once and finished together with a reranker as the judge, QUERIES without
BY, SAMPLING = ("model", "bm25", "both"), ("top", "random")

REASONS = {
    "known positive": "or the query itself, found among the best; equal but for case and white space",
    "absolute margin": "not so far below the query's lowest positive",
    "relative margin": "not so far below the query's lowest positive, as a share of its score",
    "max score": "above --max-score",
    "min score": "below --min-score",
    "skip": "the first of what is left",
}

Groups = Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Rules:
    """Which of the documents found become negatives.

    Of a query's `depth` best documents that are no known positive, those that `passing` keeps are taken in the order of
    their rank: the first `skip` are left out, and `take` of the others are the first ("top") or any ("random").

    Raises UserError for what can not be.
    """

    by: str = "model"  # one of BY; both: reciprocal rank fusion
    skip: int = 0
    take: int = 4
    range_max: int | None = None  # documents of a query that are looked at; None = skip + 10 * take
    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    sampling: str = "top"
    seed: int = 0

    def __post_init__(self):
        if self.take < 1:
            raise UserError(f"--take {self.take}: at least 1")
        if self.skip < 0 or self.seed < 0:
            raise UserError(f"--skip {self.skip} --seed {self.seed}: neither is below 0")
        if self.depth < self.skip + self.take:
            raise UserError(
                f"--range-max {self.depth}: with --skip {self.skip} --take {self.take} it is at least "
                f"{self.skip + self.take}"
            )
        for name in ("absolute_margin", "relative_margin"):
            if (margin := getattr(self, name)) is not None and not 0 <= margin < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} {margin}: 0 or more, or off")
        if None not in (self.min_score, self.max_score) and not self.min_score <= self.max_score:
            raise UserError(f"--min-score {self.min_score} --max-score {self.max_score}: nothing lies between")

    @property
    def depth(self) -> int:
        return self.skip + 10 * self.take if self.range_max is None else self.range_max


class Sources(NamedTuple):
    """What finds and what judges. Scores are the judge's; without one the vectors'; without those BM25's."""

    encode: Callable[[list[str]], np.ndarray] | None = None  # queries -> vectors (Q, d) float32
    vectors: np.ndarray | None = None  # (D, d) float32 of the documents, in memory or mapped
    words: Callable[[str], np.ndarray] | None = None  # query -> BM25's scores (D,)
    judge: Callable[[Groups], list[np.ndarray]] | None = None  # as rerank.Reranker.score_groups


class Mined(NamedTuple):
    """The negatives of Q queries, best first, and the scores of their positives."""

    numbers: np.ndarray  # (Q, take) int64: documents; NO_DOCUMENT = no more
    scores: np.ndarray  # (Q, take) float32
    known: np.ndarray  # (K,) float32: of every known positive, in the order of `Collection.known`
    counts: np.ndarray  # (2 + len(REASONS),) int64: known positives, candidates, and those left out by each reason


class Ranking(NamedTuple):
    """What one retriever found."""

    numbers: np.ndarray  # (Q, depth) int64, best first; NO_DOCUMENT = no more
    scores: np.ndarray  # (Q, depth) float32
    barred: np.ndarray  # (B,) float32: of the pairs that were not to be found


# --- search -----------------------------------------------------------------------------------------------------------


def by_vectors(
    queries: np.ndarray, documents: np.ndarray, k: int, rows: np.ndarray, barred: np.ndarray, block: int = DOCUMENTS
) -> Ranking:
    """The `k` documents with the greatest dot products for each query.

    Args:
        queries: (Q, d) float32; documents: (D, d) float32, of which `block` are in memory at once.
        rows, barred: (B,) each: query rows[i] is not to find document barred[i].
    """
    best = np.empty((len(queries), 0), np.int64)
    device_queries = mx.array(queries)
    for first in range(0, len(documents), block):
        part = np.asarray(documents[first : first + block])
        scores = np.array(device_queries @ mx.array(part).T)
        here = (barred >= first) & (barred < first + len(part))
        scores[rows[here], barred[here] - first] = -np.inf
        best = merge(best, scores, first, k)
    numbers, _ = best_first(best, k)
    # The products of a block depend, in their last digits, on its size. What is kept is computed anew, more exactly.
    scores = dots(queries, documents, numbers)
    order = np.lexsort((numbers, -scores), axis=1)
    numbers, scores = (np.take_along_axis(each, order, axis=1) for each in (numbers, scores))
    pairs = [queries[row].astype(np.float64) @ documents[i] for row, i in zip(rows, barred, strict=True)]
    return Ranking(numbers, scores, np.array(pairs, np.float32))


def dots(queries: np.ndarray, documents: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(Q, k) float32 products of each query with its documents, summed in float64; -inf for NO_DOCUMENT."""
    scores = np.full(numbers.shape, -np.inf, np.float32)
    for i, query in enumerate(queries.astype(np.float64)):
        real = numbers[i] >= 0
        scores[i, real] = documents[numbers[i, real]].astype(np.float64) @ query
    return scores


def by_words(
    queries: Sequence[str], words: Callable[[str], np.ndarray], k: int, rows: np.ndarray, barred: np.ndarray
) -> Ranking:
    """The `k` documents that BM25 ranks first, of those that share a word with the query; else as `by_vectors`."""
    found, pairs = [], []
    for row, query in enumerate(queries):
        scores = np.array(words(query), np.float32)
        out = barred[rows == row]
        pairs.append(scores[out])
        scores[out] = -np.inf
        scores[scores <= 0] = -np.inf
        found.append(best_first(merge(np.empty((1, 0), np.int64), scores[None], 0, k), k))
    numbers, scores = (np.concatenate(each) for each in zip(*found, strict=True))
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
    """Which candidates the filters keep, and how many each of the four took, one after another.

    Args:
        there: (Q, n) bool, False where a query has no more candidates; scores: (Q, n).
        floor: (Q,) the score of the query's lowest known positive.
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
    kept, counts = there.copy(), []
    for fails in tests:
        counts.append(int((kept & fails).sum()))
        kept &= ~fails
    return kept, counts


def choose(kept: np.ndarray, rules: Rules, first: int = 0) -> tuple[np.ndarray, int]:
    """Places of the chosen candidates, (Q, take) int64 in their order, -1 = no more; and how many `skip` left out.

    `first`: the number of the first query; each has random numbers of its own, whatever block it is in.
    """
    chosen, skipped = np.full((len(kept), rules.take), -1, np.int64), 0
    for row, mask in enumerate(kept):
        places = np.flatnonzero(mask)
        skipped += min(len(places), rules.skip)
        places = places[rules.skip :]
        if rules.sampling == "random" and len(places) > rules.take:
            rng = np.random.default_rng([rules.seed, first + row])
            places = np.sort(rng.choice(places, rules.take, replace=False))
        chosen[row, : len(places)] = places[: rules.take]
    return chosen, skipped


# --- mining -----------------------------------------------------------------------------------------------------------


def mine_block(first: int, last: int, collection: "Collection", sources: Sources, rules: Rules) -> Mined:
    """The negatives of queries `first` to `last` - 1."""
    texts = collection.queries.read(range(first, last))
    barred_keys = collection.part(collection.barred, first, last)
    rows, barred = (barred_keys >> 32) - first, barred_keys & 0xFFFFFFFF
    known = np.isin(barred_keys, collection.part(collection.known, first, last))  # the others are the queries' own text
    vectors = sources.encode(texts) if sources.encode else None
    rankings = []
    if rules.by != "bm25":
        rankings.append(by_vectors(vectors, sources.vectors, rules.depth, rows, barred))
    if rules.by != "model":
        rankings.append(by_words(texts, sources.words, rules.depth, rows, barred))
    # BM25's 0 means that no word is shared; such pairs are not among the best even where there are too few of them.
    found = np.any([(r.barred > r.scores[rows, -1]) & (r.barred != 0) for r in rankings], axis=0)
    numbers, scores, pairs = rankings[0]
    if len(rankings) > 1:
        numbers = fuse_rankings([ranking.numbers for ranking in rankings], rules.depth)
    if sources.judge:
        scores, pairs = judged(texts, numbers, rows, barred, collection, sources.judge)
        order = np.lexsort((np.broadcast_to(np.arange(numbers.shape[1]), numbers.shape), -scores), axis=1)
        numbers, scores = (np.take_along_axis(each, order, axis=1) for each in (numbers, scores))
    elif vectors is not None and rules.by != "model":
        scores = dots(vectors, sources.vectors, numbers)
        pairs = dots(vectors[rows], sources.vectors, barred[:, None])[:, 0]
    floor = np.full(last - first, np.inf, np.float32)
    np.minimum.at(floor, rows[known], pairs[known])
    there = numbers >= 0
    kept, counts = passing(there, scores, floor, rules)
    chosen, skipped = choose(kept, rules, first)
    real = chosen >= 0
    return Mined(
        np.where(real, np.take_along_axis(numbers, chosen, axis=1), NO_DOCUMENT),
        np.where(real, np.take_along_axis(scores, chosen, axis=1), np.nan).astype(np.float32),
        pairs[known],
        np.array([len(rows), there.sum(), found.sum(), *counts, skipped], np.int64),
    )


def judged(
    texts: Sequence[str],
    numbers: np.ndarray,
    rows: np.ndarray,
    barred: np.ndarray,
    collection: "Collection",
    judge: Callable[[Groups], list[np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """The judge's scores of candidates (Q, n), -inf for NO_DOCUMENT, and of the barred pairs (B,)."""
    groups = []
    for row, text in enumerate(texts):
        documents = [*numbers[row][numbers[row] >= 0].tolist(), *barred[rows == row].tolist()]
        groups.append((text, collection.documents.read(documents)))
    scores, pairs = np.full(numbers.shape, -np.inf, np.float32), np.empty(len(rows), np.float32)
    for row, found in enumerate(judge(groups)):
        real = numbers[row] >= 0
        scores[row, real], pairs[rows == row] = np.split(np.asarray(found, np.float32), [int(real.sum())])
    return scores, pairs


def mine(
    collection: "Collection", sources: Sources, rules: Rules, work: "Work", progress: "Progress | None" = None
) -> Mined:
    """The negatives of all queries. Every finished block is kept in `work`, and not computed again."""
    blocks, count = [], len(collection.queries)
    size = JUDGED_QUERIES if sources.judge else QUERIES
    for number, first in enumerate(range(0, count, size)):
        last = min(first + size, count)
        if (block := work.block(number, Mined._fields)) is None:
            block = mine_block(first, last, collection, sources, rules)
            work.keep(number, block._asdict())
            blocks.append(block)
        else:
            blocks.append(Mined(**block))
        if progress:
            progress(last, count)
    numbers, scores, known, counts = zip(*blocks, strict=True)
    return Mined(np.concatenate(numbers), np.concatenate(scores), np.concatenate(known), np.sum(counts, axis=0))
