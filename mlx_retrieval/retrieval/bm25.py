"""Rank documents by BM25."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlx_retrieval.retrieval.analyzer import ENGLISH, analyzer
from mlx_retrieval.retrieval.base import RANKS

RankedIds = dict[str, list[str]]  # query id -> document ids, best first
K1, B = 1.2, 0.75  # as in LanceDB and Elasticsearch


def bm25(
    documents: Mapping[str, str], queries: Mapping[str, str], depth: int = RANKS, language: str = ENGLISH
) -> RankedIds:
    """Return at most `depth` documents that share a word with each query; equal scores in the order of the ids.

    Both are id -> text. Terms are those of `analyzer`, as in an index; the formula is Lucene's.
    """
    ids = sorted(documents)
    scores_of = bm25_scorer([documents[i] for i in ids], language)
    ranked: RankedIds = {}
    for query, text in queries.items():
        scores = scores_of(text)
        matches = np.flatnonzero(scores > 0)
        ranked[query] = [ids[i] for i in matches[np.argsort(-scores[matches], kind="stable")[:depth]]]
    return ranked


def bm25_scorer(documents: Sequence[str], language: str = ENGLISH) -> Callable[[str], np.ndarray]:
    """Return a function from a query to the BM25 scores of these documents: (D,) float32, 0 = no shared word."""
    import bm25s

    analysis, vocabulary = analyzer(language), {}
    words = [[vocabulary.setdefault(term, len(vocabulary)) for term in analysis.terms(text)] for text in documents]
    if not vocabulary:  # bm25s cannot index documents without words
        return lambda query: np.zeros(len(documents), np.float32)
    retriever = bm25s.BM25(k1=K1, b=B)
    retriever.index(bm25s.tokenization.Tokenized(words, vocabulary), show_progress=False)

    def scores(query: str) -> np.ndarray:
        terms = [vocabulary[term] for term in analysis.query_terms(query) if term in vocabulary]
        return retriever.get_scores(terms) if terms else np.zeros(len(documents), np.float32)

    return scores
