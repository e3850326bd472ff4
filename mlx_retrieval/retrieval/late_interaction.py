"""Search by late interaction: rank documents by MaxSim between their token vectors and a query's.

    index = LateIndex(vectors)
    for number, score in index.search(queries, top_k=10)[0]: print(number, score)

Vectors that are stored as they are, are all compared. Documents that are stored as codes are sifted twice by the
PROBES centroids nearest to each token of the query, as in WARP (Scheerer et al. 2025, arXiv 2501.17788). First by these
centroids, so that no vector needs to be decoded; a document without a token there gets the similarity of the last of
them, as in XTR (Lee et al. 2023, arXiv 2304.01982). Of the best SIFTED, only the tokens there are decoded. Of the best
CANDIDATES then, all tokens are compared. `LateIndex.description` says whether documents are sifted.
"""

from collections.abc import Iterable, Sequence

from mlx_retrieval.backend import mx

import numpy as np

from mlx_retrieval.models import maxsim
from mlx_retrieval.retrieval.residual_codes import Codebook, train
from mlx_retrieval.retrieval.token_vectors import TokenVectors
from mlx_retrieval.utils.products import product
from mlx_retrieval.utils.text import quantity

PROBES = 16  # centroids of a query's token
SIFTED = 2_000  # documents whose tokens near the query's are decoded
CANDIDATES = 150  # documents whose tokens are all compared
TOKENS_AT_ONCE = 1 << 16  # tokens of documents that are compared at once, padding included
QUERIES_AT_ONCE = 64
# In memory, vectors beyond so many bytes are stored as codes of so many bits, learnt from so many tokens.
WHOLE_BYTES, MEMORY_BITS, SAMPLE = 1 << 31, 4, 1 << 19


class LateIndex:
    """The token vectors of a corpus.

    Args:
        documents: (L_i, d) float32 for every document; or parts of the corpus, the documents numbered through all.
        reduction: how the best similarities of a query's tokens are combined, "mean" or "sum".
        impute: see `maxsim.maxsim`; a query token retrieves from the tokens of all compared documents.
        codebook: of parts that are stored as codes.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray] | Sequence[TokenVectors],
        reduction: str = "mean",
        impute: int = 0,
        codebook: Codebook | None = None,
    ):
        parts = documents if isinstance(documents[0], TokenVectors) else [TokenVectors.of(documents)]
        self.parts, self.codebook, self.reduction, self.impute = parts, codebook, reduction, impute
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.firsts = np.cumsum([0, *(len(part.lengths) for part in parts)])
        coded = np.repeat([part.is_coded for part in parts], [len(part.lengths) for part in parts])
        self.whole = np.flatnonzero(~coded)  # documents that are stored as they are
        self.lists = CentroidLists(parts, self.firsts, len(codebook.centroids)) if coded.any() else None

    @classmethod
    def of_blocks(cls, blocks: Iterable[Sequence[np.ndarray]], reduction: str = "mean", impute: int = 0) -> "LateIndex":
        """Return the index of documents (L_i, d) float32 that come in blocks; beyond WHOLE_BYTES, they become codes."""
        parts: list[TokenVectors] = []
        codebook = None
        for block in blocks:
            parts.append(TokenVectors.of(block).coded(codebook) if codebook else TokenVectors.of(block))
            if codebook is None and sum(part.vectors.nbytes for part in parts) > WHOLE_BYTES:
                vectors = np.concatenate([part.vectors for part in parts])
                chosen = np.random.default_rng(0).permutation(len(vectors))[:SAMPLE]
                codebook = train(vectors[chosen], MEMORY_BITS)
                parts = [part.coded(codebook) for part in parts]
        return cls(parts, reduction, impute, codebook)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def description(self) -> str:
        """Size and method of the search, in words."""
        count = f"{quantity(len(self), 'document')}, {quantity(int(self.lengths.sum()), 'token vector')}"
        if self.lists is None:
            return f"{count}: all scored by MaxSim"
        return f"{count}: the {CANDIDATES:,} best by their tokens' centroids scored by MaxSim"

    def search(self, queries: Sequence[np.ndarray], top_k: int) -> list[list[tuple[int, float]]]:
        """Return (document, score) of the `top_k` best documents of every query, best first; equal scores by number.

        `queries`: (L_i, d) float32 each.
        """
        if self.lists is None:
            return self._exhaustive(queries, top_k)
        return [self.best(query, top_k) for query in queries]

    def best(self, query: np.ndarray, top_k: int, among: np.ndarray | None = None) -> list[tuple[int, float]]:
        """Return (document, score) of the `top_k` best documents of a query (L, d), best first; equal scores by number.

        `among`: numbers of the documents to look at; None = all.
        """
        numbers = self.candidates(query, max(top_k, CANDIDATES), among)
        best = _best(numbers, self.scores(query, numbers), top_k)
        for part in self.parts:
            part.release()
        return best

    def candidates(self, query: np.ndarray, count: int, among: np.ndarray | None = None) -> np.ndarray:
        """Return the numbers of the documents to compare, ascending: `count` at least, if there are as many."""
        everything = np.arange(len(self)) if among is None else np.sort(among)
        if self.lists is None or len(everything) <= count:
            return everything
        similarities = product(query, self.codebook.directions.T)
        probes = min(PROBES, similarities.shape[1])
        nearest = np.argpartition(-similarities, probes - 1, axis=1)[:, :probes]
        scores = self.lists.scores(similarities, nearest, len(self))
        scores[self.whole] = np.inf
        sifted = _highest_of(everything, scores[everything], max(count, SIFTED))
        if count >= SIFTED:
            return sifted
        least = np.take_along_axis(similarities, nearest, axis=1).min(axis=1)
        return _highest_of(sifted, self._near_scores(query, sifted, nearest, least), count)

    def _near_scores(
        self, query: np.ndarray, numbers: np.ndarray, nearest: np.ndarray, least: np.ndarray
    ) -> np.ndarray:
        """Return scores (n,) float32 of documents, whose numbers ascend, by their tokens at centroids alone.

        Args:
            nearest: (L, P) the centroids.
            least: (L,) the similarity of a document without a token there. One that is stored as it is gets inf.
        """
        is_near = np.zeros(len(self.codebook.centroids), bool)
        is_near[nearest] = True
        scores, edges = np.full(len(numbers), np.inf, np.float32), np.searchsorted(numbers, self.firsts)
        for part, first, a, b in zip(self.parts, self.firsts, edges, edges[1:], strict=False):
            if part.is_coded and b > a:
                some = part.take(numbers[a:b] - first, is_near)
                scores[a:b] = maxsim.score(
                    query, some.decoded(self.codebook), some.lengths, self.reduction, least=least
                )
        return scores

    def scores(self, query: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return the MaxSim scores (n,) float32 of a query (L, d) with documents, by their numbers (n,)."""
        if not len(numbers):
            return np.empty(0, np.float32)
        order = np.argsort(numbers, kind="stable")
        tokens = self._tokens(numbers[order])
        scores = np.empty(len(numbers), np.float32)
        scores[order] = maxsim.score(query, tokens, self.lengths[numbers[order]], self.reduction, self.impute)
        return scores

    def _tokens(self, numbers: np.ndarray) -> np.ndarray:
        """Return the token vectors of documents, whose numbers ascend, one after another."""
        edges = np.searchsorted(numbers, self.firsts)
        parts = zip(self.parts, self.firsts, edges, edges[1:], strict=False)
        return np.concatenate(
            [part.take(numbers[a:b] - first).decoded(self.codebook) for part, first, a, b in parts if b > a]
        )

    def _exhaustive(self, queries: Sequence[np.ndarray], top_k: int) -> list[list[tuple[int, float]]]:
        everything, rankings = np.arange(len(self)), []
        for first in range(0, len(queries), QUERIES_AT_ONCE):
            scores = self._all_scores(queries[first : first + QUERIES_AT_ONCE])
            rankings += [_best(everything, row, top_k) for row in scores]
        return rankings

    def _all_scores(self, queries: Sequence[np.ndarray]) -> np.ndarray:
        """Return the scores of all documents, which are stored as they are: (queries, documents) float32."""
        padded = _pad(queries)
        best = np.empty((*padded.shape[:2], len(self)), np.float32)
        nearest: list[mx.array] = []  # of every query token, over all documents, for imputation
        for block in self._blocks():
            tokens = np.split(self._tokens(block), np.cumsum(self.lengths[block])[:-1])
            vectors = _pad(tokens)
            best[:, :, block] = np.array(maxsim.nearest(padded, vectors)[0])
            if self.impute:
                nearest.append(_top(padded, vectors, self.impute))
                nearest = [_highest(mx.concatenate(nearest, axis=-1), self.impute)]
                mx.eval(nearest)
        similarities = mx.array(best)
        if nearest:
            similarities = mx.maximum(similarities, nearest[0].min(axis=-1)[..., None])
        return np.array(maxsim.reduce(similarities, maxsim.counted(padded), self.reduction))

    def _blocks(self) -> list[np.ndarray]:
        """Return all documents in blocks of similar length and at most TOKENS_AT_ONCE tokens; each ascends."""
        lengths = np.maximum(self.lengths, 1)
        order = np.argsort(-lengths, kind="stable")
        blocks, first = [], 0
        while first < len(order):
            count = max(1, TOKENS_AT_ONCE // int(lengths[order[first]]))
            blocks.append(np.sort(order[first : first + count]))
            first += count
        return blocks


class CentroidLists:
    """For every centroid, the documents that have a token there.

    Args:
        parts, firsts: the documents, those that are stored as codes among them, and the number of each part's first.
        count: of the centroids.
    """

    def __init__(self, parts: Sequence[TokenVectors], firsts: Sequence[int], count: int):
        coded = [(part, first) for part, first in zip(parts, firsts, strict=False) if part.is_coded]
        centroids = np.concatenate([part.centroids for part, _ in coded])
        order = np.argsort(centroids, kind="stable")
        documents = np.concatenate(
            [np.repeat(np.arange(first, first + len(p.lengths), dtype=np.int32), p.lengths) for p, first in coded]
        )[order]
        centroids = centroids[order]
        del order
        is_new = np.ones(len(documents), bool)  # a document counts once, however many of its tokens are there
        is_new[1:] = (documents[1:] != documents[:-1]) | (centroids[1:] != centroids[:-1])
        self.documents = documents[is_new]
        self.edges = np.concatenate([[0], np.cumsum(np.bincount(centroids[is_new], minlength=count))])

    def scores(self, similarities: np.ndarray, nearest: np.ndarray, count: int) -> np.ndarray:
        """Return scores (count,) float32 of documents.

        Args:
            similarities: (L, C) of the query's tokens to centroids.
            nearest: (L, P) the centroids that are looked at, in any order.
        """
        scores, row = np.zeros(count, np.float32), np.empty(count, np.float32)
        for of_token, centroids in zip(similarities, nearest, strict=True):
            # Ascending: of a document at several centroids, the last assignment stays, which is the most similar.
            centroids = centroids[np.argsort(of_token[centroids])]
            firsts, ends = self.edges[centroids], self.edges[centroids + 1]
            row.fill(of_token[centroids[0]])
            documents = np.concatenate([self.documents[a:b] for a, b in zip(firsts, ends, strict=True)])
            row[documents] = np.repeat(of_token[centroids], ends - firsts)
            scores += row
        return scores


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


def _highest_of(documents: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Return the numbers, ascending, of all documents with a score of inf, and of the `count` best of the others."""
    count += int(np.isinf(scores).sum())
    if len(documents) <= count:
        return documents
    return np.sort(documents[np.argpartition(-scores, count)[:count]])


def _best(documents: np.ndarray, scores: np.ndarray, top_k: int) -> list[tuple[int, float]]:
    order = np.lexsort((documents, -scores))[:top_k]
    return [(int(documents[i]), float(scores[i])) for i in order]
