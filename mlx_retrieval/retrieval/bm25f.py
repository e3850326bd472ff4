"""BM25F over chunks in memory: the scores that an index gives, for any weights of the fields, without writing one.

Robertson, Zaragoza and Taylor 2004, with one length for all fields: see fields.py. It is for tuning: the terms of some
queries are counted once, and then every choice of weights costs a few sums.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mlx_retrieval.retrieval.analyzer import Analyzer
from mlx_retrieval.retrieval.bm25 import K1, B
from mlx_retrieval.retrieval.fields import FIELDS
from mlx_retrieval.utils.products import product


class FieldedBm25:
    """The occurrences of the queries' terms in the fields of N chunks.

    Args:
        chunks: the text of every field of every chunk.
        queries: texts; others cannot be scored.
    """

    def __init__(self, chunks: Iterable[Mapping[str, str]], queries: Iterable[str], analyzer: Analyzer):
        self.analyzer = analyzer
        postings: dict[str, list[tuple[int, int, int]]] = {t: [] for q in queries for t in analyzer.query_terms(q)}
        lengths: list[list[int]] = []
        for number, texts in enumerate(chunks):
            terms = [analyzer.terms(texts[field]) for field in FIELDS]
            lengths.append([len(each) for each in terms])
            for field, each in enumerate(terms):
                for term, count in Counter(each).items():
                    if term in postings:
                        postings[term].append((number, field, count))
        self.lengths = np.array(lengths, float).reshape(-1, len(FIELDS))  # (N, fields)
        self.postings = {term: np.array(rows, int).reshape(-1, 3) for term, rows in postings.items()}

    def scorer(self, weights: Mapping[str, int]) -> "Scorer":
        """Return the scores for these weights of the fields."""
        return Scorer(self, [weights[field] for field in FIELDS])

    @property
    def empty_fields(self) -> set[str]:
        """The fields that no chunk has."""
        return {field for field, total in zip(FIELDS, self.lengths.sum(axis=0), strict=True) if not total}


class Scorer:
    """The scores of the chunks for one choice of weights, in the order of FIELDS."""

    def __init__(self, bm25: FieldedBm25, weights: Sequence[int]):
        self.bm25, self.weights = bm25, np.array(weights, float)
        lengths = product(bm25.lengths, self.weights)
        self.norms = K1 * (1 - B + B * lengths / max(lengths.mean(), 1e-12))  # (N,)

    def scores(self, query: str) -> np.ndarray:
        """Return the scores (N,) of all chunks for a query; 0 = no shared word."""
        count, total = len(self.norms), np.zeros(len(self.norms))
        for term in self.bm25.analyzer.query_terms(query):
            numbers, fields, counts = self.bm25.postings[term].T
            frequency = np.zeros(count)
            np.add.at(frequency, numbers, self.weights[fields] * counts)
            places = np.flatnonzero(frequency)
            idf = np.log1p((count - len(places) + 0.5) / (len(places) + 0.5))
            found = frequency[places]
            total[places] += idf * (K1 + 1) * found / (found + self.norms[places])
        return total
