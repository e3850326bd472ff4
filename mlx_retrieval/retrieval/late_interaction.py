"""Search by late interaction: rank documents by MaxSim between their token vectors and a query's.

Up to EXHAUSTIVE_TOKENS token vectors, every document is scored. In a larger corpus only the CANDIDATES documents whose
mean vector is nearest to the query's are scored. `LateIndex.description` says which of the two applies.
"""

from collections.abc import Sequence

from mlx_retrieval.backend import mx

import numpy as np

from mlx_retrieval.models import maxsim
from mlx_retrieval.models.maxsim import score
from mlx_retrieval.utils.products import product
from mlx_retrieval.utils.text import quantity

EXHAUSTIVE_TOKENS = 20_000_000
CANDIDATES = 1_000
TOKENS_AT_ONCE = 1 << 16  # tokens of documents that are compared at once, padding included
QUERIES_AT_ONCE = 64


class LateIndex:
    """The token vectors of a corpus.

    Args:
        vectors: (L_i, d) float32 for every document. Queries have the same form.
        reduction: how the best similarities of a query's tokens are combined, "mean" or "sum".
        impute: see `maxsim.maxsim`; a query token retrieves from the tokens of all scored documents.
    """

    def __init__(self, vectors: Sequence[np.ndarray], reduction: str = "mean", impute: int = 0):
        self.vectors, self.reduction, self.impute = vectors, reduction, impute
        self.lengths = np.array([len(v) for v in vectors])
        self.exhaustive = int(self.lengths.sum()) <= EXHAUSTIVE_TOKENS
        if not self.exhaustive:
            self.means = np.stack([v.sum(axis=0) / max(1, len(v)) for v in vectors])

    @property
    def description(self) -> str:
        """Size and method of the search, in words."""
        count = f"{quantity(len(self.vectors), 'document')}, {quantity(int(self.lengths.sum()), 'token vector')}"
        if self.exhaustive:
            return f"{count}: all scored by MaxSim"
        return f"{count}: the {CANDIDATES:,} nearest by mean vector scored by MaxSim"

    def search(self, queries: Sequence[np.ndarray], top_k: int) -> list[list[tuple[int, float]]]:
        """Return (document, score) of the `top_k` best documents of every query, best first; equal scores by number."""
        rankings = []
        everything = np.arange(len(self.vectors))
        if self.exhaustive:
            for first in range(0, len(queries), QUERIES_AT_ONCE):
                block = queries[first : first + QUERIES_AT_ONCE]
                rankings += [_best(everything, row, top_k) for row in self._scores(block, everything)]
            return rankings
        for query in queries:
            near = np.argsort(-product(self.means, query.mean(axis=0)), kind="stable")[:CANDIDATES]
            tokens = np.concatenate([self.vectors[i] for i in near])
            scores = score(query, tokens, self.lengths[near], self.reduction, self.impute)
            rankings.append(_best(near, scores, top_k))
        return rankings

    def _scores(self, queries: Sequence[np.ndarray], documents: np.ndarray) -> np.ndarray:
        """Return MaxSim scores, (queries, documents) float32."""
        padded = _pad(queries)
        tokens = maxsim.counted(padded)
        best = np.empty((*padded.shape[:2], len(documents)), np.float32)
        nearest: list[mx.array] = []  # of every query token, over all documents, for imputation
        for block in self._blocks(documents):
            vectors = _pad([self.vectors[i] for i in documents[block]])
            best[:, :, block] = np.array(maxsim.nearest(padded, vectors)[0])
            if self.impute:
                nearest.append(_top(padded, vectors, self.impute))
                nearest = [_highest(mx.concatenate(nearest, axis=-1), self.impute)]
                mx.eval(nearest)
        similarities = mx.array(best)
        if nearest:
            similarities = mx.maximum(similarities, nearest[0].min(axis=-1)[..., None])
        return np.array(maxsim.reduce(similarities, tokens, self.reduction))

    def _blocks(self, documents: np.ndarray) -> list[np.ndarray]:
        """Return positions in `documents`, in blocks of similar length and at most TOKENS_AT_ONCE tokens."""
        lengths = np.maximum(self.lengths[documents], 1)
        order = np.argsort(-lengths, kind="stable")
        blocks, first = [], 0
        while first < len(order):
            count = max(1, TOKENS_AT_ONCE // int(lengths[order[first]]))
            blocks.append(order[first : first + count])
            first += count
        return blocks


def _top(queries: mx.array, documents: mx.array, k: int) -> mx.array:
    """Return (Q, Lq, at most k): the highest similarities of every query token to the tokens of these documents."""
    real = mx.array(np.flatnonzero(np.array(maxsim.counted(documents)).ravel()))
    return _highest(queries @ documents.reshape(-1, documents.shape[-1])[real].T, k)


def _highest(values: mx.array, k: int) -> mx.array:
    return mx.topk(values, min(k, values.shape[-1]), axis=-1)


def _pad(vectors: Sequence[np.ndarray]) -> mx.array:
    """Return (N, longest, d), zero behind the last token of each text."""
    longest = max(1, *(len(v) for v in vectors))
    padded = np.zeros((len(vectors), longest, vectors[0].shape[1]), np.float32)
    for row, v in zip(padded, vectors, strict=True):
        row[: len(v)] = v
    return mx.array(padded)


def _best(documents: np.ndarray, scores: np.ndarray, top_k: int) -> list[tuple[int, float]]:
    order = np.lexsort((documents, -scores))[:top_k]
    return [(int(documents[i]), float(scores[i])) for i in order]
