"""Late interaction: compare two sets of token vectors. Pure functions of arrays, computed in float32.

Token vectors (N, L, d) have unit length if a token counts and are zero if it does not (padding, skipped tokens).
Sources: MaxSim, Khattab and Zaharia 2020 (ColBERT, arXiv 2004.12832); XTR, Lee et al. 2023 (arXiv 2304.01982).
"""

from collections.abc import Iterator

from mlx_retrieval.backend import mx

import numpy as np

from mlx_retrieval.utils.products import product

SIMILARITIES_AT_ONCE = 1 << 24  # token-to-token similarities in one tile of the comparison: 64 MB in float32
NO_TOKEN = -1.0  # similarity to a document without tokens that count: the least possible between unit vectors


def counted(vectors: mx.array) -> mx.array:
    """Return (N, L) bool: whether each token of vectors (N, L, d) counts."""
    return (vectors != 0).any(axis=-1)


def _tiles(queries: mx.array, documents: mx.array) -> Iterator[tuple[slice, slice]]:
    """Yield slices of queries and documents that cover all pairs, with a bounded number of similarities each."""
    (q, query_length, _), (c, length, _) = queries.shape, documents.shape
    columns = max(1, min(c, SIMILARITIES_AT_ONCE // (query_length * length)))
    rows = max(1, min(q, SIMILARITIES_AT_ONCE // (query_length * length * columns)))
    for top in range(0, q, rows):
        for left in range(0, c, columns):
            yield slice(top, top + rows), slice(left, left + columns)


def _first(documents: mx.array) -> mx.array:
    """Return (C,) the position of each document's first token that counts."""
    return counted(documents).argmax(axis=1)


def nearest(queries: mx.array, documents: mx.array) -> tuple[mx.array, mx.array]:
    """Return, for each query token and document, the similarity to the nearest token (Q, Lq, C) and its position.

    It is evaluated tile by tile, so that the (Q, Lq, C, L) similarities never exist at once. That holds only outside
    `mx.grad`, which keeps everything that is computed from its arguments: see `nearest_gradient`.

    Args:
        queries: (Q, Lq, d) float32 token vectors.
        documents: (C, L, d) float32 token vectors. Tokens that do not count are zero, and are never the nearest.
    """
    (_, query_length, d), (count, length, _) = queries.shape, documents.shape
    real, first = counted(documents), _first(documents)
    # Tokens that do not count become copies of one that does: they cannot win, so no similarity needs a mask.
    filler = mx.take_along_axis(documents, first[:, None, None], axis=1)
    vectors = mx.where(real[..., None], documents, filler)
    mx.eval(vectors)
    rows: dict[int, list] = {}
    for q, c in _tiles(queries, documents):
        scores = queries[q].reshape(-1, d) @ vectors[c].reshape(-1, d).T
        scores = scores.reshape(-1, query_length, vectors[c].shape[0], length)
        place = scores.argmax(axis=-1)
        best = mx.take_along_axis(scores, place[..., None], axis=-1)[..., 0]
        mx.eval(best, place)
        rows.setdefault(q.start, []).append((best, place))
    parts = [[mx.concatenate(kind, axis=2) for kind in zip(*row, strict=True)] for row in rows.values()]
    best, place = (mx.concatenate(kind) for kind in zip(*parts, strict=True))
    copied = ~real[mx.arange(count), place]
    return mx.where(real.any(axis=1), best, NO_TOKEN), mx.where(copied, first, place)


def nearest_gradient(
    queries: mx.array, documents: mx.array, place: mx.array, gradient: mx.array
) -> tuple[mx.array, mx.array]:
    """Return gradients of queries and documents from that of `nearest`'s similarities (Q, Lq, C).

    Args:
        place: (Q, Lq, C) positions of the nearest tokens, which alone get a gradient.
    """
    gradient = mx.where(counted(documents).any(axis=1), gradient, 0.0)
    d, positions = queries.shape[-1], mx.arange(documents.shape[1])
    for_queries, for_documents = mx.zeros_like(queries), mx.zeros_like(documents)
    for q, c in _tiles(queries, documents):
        chosen = mx.where(positions == place[q, :, c][..., None], gradient[q, :, c][..., None], 0.0)  # (q, Lq, c, L)
        chosen = chosen.reshape(chosen.shape[0] * chosen.shape[1], -1)
        for_queries[q] += (chosen @ documents[c].reshape(-1, d)).reshape(queries[q].shape)
        for_documents[c] += (chosen.T @ queries[q].reshape(-1, d)).reshape(documents[c].shape)
        mx.eval(for_queries, for_documents)
    return for_queries, for_documents


@mx.custom_function
def token_max(queries: mx.array, documents: mx.array) -> tuple[mx.array, mx.array]:
    """Return `nearest`, differentiable; within `mx.grad` it needs memory for all similarities at once."""
    return nearest(queries, documents)


@token_max.vjp
def _token_max_vjp(primals, cotangents, outputs):
    return nearest_gradient(*primals, outputs[1], cotangents[0])


def reduce(best: mx.array, tokens: mx.array, how: str = "mean") -> mx.array:
    """Return scores (Q, C) from `nearest`'s similarities (Q, Lq, C): their `mean` or `sum` over query tokens.

    Args:
        tokens: (Q, Lq) bool: the query tokens that count.
    """
    summed = mx.where(tokens[..., None], best, 0.0).sum(axis=1)
    return summed if how == "sum" else summed / mx.maximum(tokens.sum(axis=1), 1)[:, None]


def reduce_retrieved(best: mx.array, tokens: mx.array, least: mx.array) -> mx.array:
    """Return XTR's training scores (Q, C) (Lee et al. 2023, equation 4) from `nearest`'s similarities (Q, Lq, C).

    Each query token retrieves the tokens of the batch that are at least as similar as `least` (Q, Lq), its k-th
    highest similarity. A document's score is the mean over the query tokens that retrieved any of its tokens, or 0 if
    none of them did.

    Args:
        tokens: (Q, Lq) bool: the query tokens that count.
    """
    # A margin keeps the k-th token itself, whose similarity comes from another matrix product and rounds differently.
    retrieved = (best >= least[..., None] - 1e-6) & tokens[..., None]
    return mx.where(retrieved, best, 0.0).sum(axis=1) / mx.maximum(retrieved.sum(axis=1), 1)


def maxsim(queries: mx.array, documents: mx.array, how: str = "mean", impute: int = 0) -> mx.array:
    """Return MaxSim scores (Q, C) float32 of token vectors (Q, Lq, d) and (C, L, d).

    Args:
        how: `mean` or `sum` over the query's tokens.
        impute: score as XTR does in inference (section 3.3), with this many retrieved tokens: a query token that
            retrieved no token of a document gets the similarity of the last token it retrieved. 0 = use all
            similarities.
    """
    queries, documents = queries.astype(mx.float32), documents.astype(mx.float32)
    best, _ = token_max(queries, documents)
    if impute:
        best = mx.maximum(best, kth_similarity(queries, documents, impute)[..., None])
    return reduce(best, counted(queries), how)


def kth_similarity(queries: mx.array, documents: mx.array, k: int) -> mx.array:
    """Return (Q, Lq) float32: each query token's k-th highest similarity to the tokens of all documents.

    With fewer than k tokens it is the lowest similarity. It has no gradient.
    """
    queries, documents = mx.stop_gradient(queries), mx.stop_gradient(documents)
    vectors = documents.reshape(-1, documents.shape[-1])
    vectors = vectors[mx.array(np.flatnonzero(np.array(counted(documents)).ravel()))]
    if not len(vectors):
        return mx.full(queries.shape[:2], NO_TOKEN)
    rows = max(1, SIMILARITIES_AT_ONCE // (len(vectors) * queries.shape[1]))
    lowest = []
    for first in range(0, len(queries), rows):
        scores = queries[first : first + rows] @ vectors.T  # (rows, Lq, tokens)
        lowest.append(mx.topk(scores, min(k, len(vectors)), axis=-1).min(axis=-1))
        mx.eval(lowest[-1])
    return mx.concatenate(lowest)


def score(
    query: np.ndarray,
    tokens: np.ndarray,
    lengths: np.ndarray,
    how: str = "mean",
    impute: int = 0,
    least: np.ndarray | float = NO_TOKEN,
) -> np.ndarray:
    """Return the `maxsim` scores, (C,) float32, of one query with a few documents, without padding them.

    Args:
        query: (Lq, d) float32.
        tokens: (T, d) float32 or float16: the token vectors of all documents, one document after another.
        lengths: (C,) tokens of each document.
        how, impute: see `maxsim`.
        least: (Lq,) float32: similarities to documents whose tokens are all less similar, or that have none.
    """
    similarities = product(tokens.astype(np.float32, copy=False), query.T)  # mlx would copy the tokens, and keep a copy
    filled = lengths > 0
    best = np.full((len(lengths), len(query)), least, np.float32)
    if filled.any():
        highest = np.maximum.reduceat(similarities, (np.cumsum(lengths) - lengths)[filled], axis=0)
        best[filled] = np.maximum(highest, least)
        if impute:
            k = min(impute, len(similarities))
            best = np.maximum(best, np.partition(similarities, -k, axis=0)[-k])
    summed = best.sum(axis=1)
    return summed if how == "sum" else summed / max(1, len(query))
