"""Fuse a search by words with one by meaning.

By scores (the default): w * minmax(meaning) + (1 - w) * minmax(words), over the candidates of both searches. A
candidate that only one search found is scored by the other as well, so no score is missing. By ranks: reciprocal rank
fusion (Cormack, Clarke and Büttcher 2009), which forgets how much better the first hit was than the second.

for hit in hybrid(index, "read line", vector, top=10): print(hit.path, hit.score)
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from mlx_retrieval.retrieval.base import EVERYWHERE, Hit, IndexInfo, Within, among, sort_hits
from mlx_retrieval.utils.errors import UserError

FUSIONS = ("scores", "ranks")
WEIGHTS = {"scores": 0.8, "ranks": 0.5}  # of the meaning, unless an index has its own (search.py tune)
POOL = 100  # hits of each search whose scores span the range; a search for more hits keeps the order of the first ones
RRF_K = 60  # Cormack, Clarke and Büttcher 2009
Key = TypeVar("Key", bound=Hashable)


class Index(Protocol):
    """An index that can be searched in both ways."""

    info: IndexInfo

    def bm25(self, query: str, top: int, within: Within = EVERYWHERE) -> list[Hit]:
        """Return the best chunks by words; those that share no word with the query are left out."""

    def semantic(self, vector: np.ndarray, top: int, within: Within = EVERYWHERE) -> list[Hit]:
        """Return the best chunks by meaning."""


class Candidate(NamedTuple):
    """A chunk with its scores by words and by meaning; `spans`: among the first POOL of either search."""

    hit: Hit
    words: float
    meaning: float
    spans: bool = True


def weight_of(info: IndexInfo, fusion: str = "scores", weight: float | None = None) -> float:
    """Return the share of the meaning: `weight`, else the one that was learnt for the index, else the default.

    Raises UserError for an unknown fusion, and for a weight out of range.
    """
    if fusion not in FUSIONS:
        raise UserError(f"fusion {fusion!r} is unknown; known: {', '.join(FUSIONS)}")
    if weight is None:
        learnt = info.weight if fusion == "scores" else None
        weight = WEIGHTS[fusion] if learnt is None else learnt
    if not 0 <= weight <= 1:
        raise UserError(f"--weight {weight}: between 0 and 1")
    return weight


def hybrid(
    index: Index,
    query: str,
    vector: np.ndarray,
    top: int,
    weight: float | None = None,
    fusion: str = "scores",
    within: Within = EVERYWHERE,
) -> list[Hit]:
    """Return the best chunks by words and meaning together, best first.

    Args:
        vector: of the query, (D,); late interaction: (L, D).
        weight: share of the meaning, from 0 (words only) to 1 (meaning only); None = `weight_of` the index.
        fusion: one of FUSIONS.
    """
    weight, pool = weight_of(index.info, fusion, weight), max(POOL, top)
    words, meaning = index.bm25(query, pool, within), index.semantic(vector, pool, within)
    return fuse(index, query, vector, words, meaning, weight, fusion, pool)[:top]


def fuse(
    index: Index,
    query: str,
    vector: np.ndarray,
    words: Sequence[Hit],
    meaning: Sequence[Hit],
    weight: float,
    fusion: str = "scores",
    pool: int = POOL,
) -> list[Hit]:
    """Return the hits of both searches, of at most `pool` each, fused; best first."""
    if fusion == "ranks":
        return fuse_ranks(words, meaning, weight)
    return fuse_scores(complete(index, query, vector, words, meaning, pool), weight)


# --- by scores ---


def complete(
    index: Index, query: str, vector: np.ndarray, words: Sequence[Hit], meaning: Sequence[Hit], pool: int = POOL
) -> list[Candidate]:
    """Return the hits of both searches with both scores: the index computes those that are missing.

    Args:
        words, meaning: the best of each search, best first, at most `pool`.
    """
    hits = {hit.id: hit for hit in (*words, *meaning)}
    by_words, by_meaning = ({hit.id: hit.score for hit in found} for found in (words, meaning))
    if len(words) == pool and (missing := [hit for hit in meaning if hit.id not in by_words]):
        by_words |= {hit.id: hit.score for hit in index.bm25(query, len(missing), among(missing))}
    if missing := [hit for hit in words if hit.id not in by_meaning]:
        # What a token of the query is imputed depends on all candidates.
        some = list(hits.values()) if index.info.impute else missing
        by_meaning |= {hit.id: hit.score for hit in index.semantic(vector, len(some), among(some))}
    first = {hit.id for found in (words, meaning) for hit in found[:POOL]}
    # Words: a chunk that the index does not return shares none with the query, and BM25 gives it 0.
    return [
        Candidate(hit, by_words.get(name, 0.0), by_meaning[name], name in first)
        for name, hit in hits.items()
        if name in by_meaning  # a chunk that was removed in between has none
    ]


def fuse_scores(candidates: Sequence[Candidate], weight: float) -> list[Hit]:
    """Return the candidates' hits, scored by the weighted sum of both scores, each scaled to 0 to 1; best first.

    At weight 0, candidates that share no word with the query are left out, as in a search by words.
    """
    if not candidates:
        return []
    _, words, meaning, spans = zip(*candidates, strict=True)
    scores = weighted(np.array(words), np.array(meaning), np.array(spans), weight)
    return sort_hits(
        dataclasses.replace(candidate.hit, score=float(score))
        for candidate, score in zip(candidates, scores, strict=True)
        if weight or candidate.words
    )


def weighted(words: np.ndarray, meaning: np.ndarray, spans: np.ndarray, weight: float) -> np.ndarray:
    """Return the fused scores (n,) of candidates; `spans`: see `minmax`."""
    return weight * minmax(meaning, spans) + (1 - weight) * minmax(words, spans)


def minmax(scores: np.ndarray, spans: np.ndarray | None = None) -> np.ndarray:
    """Return scores (n,) scaled so that those marked in `spans` lie from 0 to 1; all 0 if these are equal."""
    marked = scores if spans is None else scores[spans]
    low, high = float(marked.min()), float(marked.max())
    return (scores - low) / (high - low) if high > low else np.zeros(len(scores))


# --- by ranks ---


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[Key]], weights: Sequence[float] | None = None, k: int = RRF_K
) -> dict[Key, float]:
    """Return the fused score of every key: the sum of `weight / (k + rank)` over the rankings that hold it.

    Cormack, Clarke and Büttcher 2009. Ranks count from 1. A ranking of weight 0 adds nothing, not even its keys.

    Args:
        rankings: keys, best first; each key at most once a ranking.
        weights: one a ranking; None = 1 each.
    """
    scores: dict[Key, float] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, key in enumerate(ranking if weight else (), start=1):
            scores[key] = scores.get(key, 0.0) + weight / (k + rank)
    return scores


def fuse_ranks(words: Sequence[Hit], meaning: Sequence[Hit], weight: float = 0.5) -> list[Hit]:
    """Return the hits of both searches, fused by reciprocal rank; best first.

    `weight` is the share of the meaning, from 0 to 1; at 0 or 1 only the hits of one search are left.
    """
    hits = {hit.id: hit for hit in (*words, *meaning)}
    rankings = [[hit.id for hit in ranking] for ranking in (meaning, words)]
    scores = reciprocal_rank_fusion(rankings, (weight, 1 - weight))
    return sort_hits(dataclasses.replace(hits[name], score=score) for name, score in scores.items())
