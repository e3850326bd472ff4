"""Rank documents by BM25."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlx_retrieval.retrieval.base import RANKS

RankedIds = dict[str, list[str]]  # query id -> document ids, best first


def bm25(documents: Mapping[str, str], queries: Mapping[str, str], depth: int = RANKS) -> RankedIds:
    """Return at most `depth` documents that share a word with each query; equal scores in the order of the ids.

    Both are id -> text. bm25s with its defaults (Lucene's formula, k1 = 1.5, b = 0.75), English stop words, no
    stemming.
    """
    ids = sorted(documents)
    scores_of = bm25_scorer([documents[i] for i in ids])
    ranked: RankedIds = {}
    for query, text in queries.items():
        scores = scores_of(text)
        matches = np.flatnonzero(scores > 0)
        ranked[query] = [ids[i] for i in matches[np.argsort(-scores[matches], kind="stable")[:depth]]]
    return ranked


def bm25_scorer(documents: Sequence[str]) -> Callable[[str], np.ndarray]:
    """Return a function from a query to the BM25 scores of these documents: (D,) float32, 0 = no shared word."""
    import bm25s

    def tokenise(texts: Sequence[str], **options):
        return bm25s.tokenize(texts, stopwords="en", show_progress=False, **options)

    words, retriever = tokenise(documents), bm25s.BM25()
    if not any(words.ids):  # bm25s cannot index documents without words
        return lambda query: np.zeros(len(documents), np.float32)
    retriever.index(words, show_progress=False)

    def scores(query: str) -> np.ndarray:
        terms = tokenise([query], return_ids=False)[0]
        return retriever.get_scores(terms) if terms else np.zeros(len(documents), np.float32)

    return scores
