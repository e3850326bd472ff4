"""Rank documents by BM25."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlx_retrieval.retrieval.base import RANKS

Found = dict[str, list[str]]  # query id -> document ids, best first


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
