"""Late interaction: how two sets of token vectors are compared. Pure functions of arrays, float32 inside.

Token vectors (N, L, d) have unit length where a token counts and are zero where it does not (padding, skipped tokens).
Sources: MaxSim, Khattab and Zaharia 2020 (ColBERT, arXiv 2004.12832); XTR, Lee et al. 2023 (arXiv 2304.01982).
"""

from collections.abc import Iterator

from mlx_retrieval.backend import mx

import numpy as np

SIMILARITIES_AT_ONCE = 1 << 24  # of tokens with tokens: what one tile of the comparison holds, 64 MB in float32
NO_TOKEN = -1.0  # the similarity to a document none of whose tokens counts: the least that unit vectors can have


def counted(vectors: mx.array) -> mx.array:
    """(N, L) bool: which tokens of (N, L, d) count."""
    return (vectors != 0).any(axis=-1)


def _tiles(queries: mx.array, documents: mx.array) -> Iterator[tuple[slice, slice]]:
    """Slices of queries and of documents that together cover all pairs, a bounded number of similarities each."""
    (q, query_length, _), (c, length, _) = queries.shape, documents.shape
    columns = max(1, min(c, SIMILARITIES_AT_ONCE // (query_length * length)))
    rows = max(1, min(q, SIMILARITIES_AT_ONCE // (query_length * length * columns)))
    for top in range(0, q, rows):
        for left in range(0, c, columns):
            yield slice(top, top + rows), slice(left, left + columns)


def _first(documents: mx.array) -> mx.array:
    """(C,) the first token of every document that counts."""
    return counted(documents).argmax(axis=1)


def nearest(queries: mx.array, documents: mx.array) -> tuple[mx.array, mx.array]:
    """Of every query token, in every document: the similarity to the nearest token (Q, Lq, C), and its place there.

    Evaluated tile by tile, so the (Q, Lq, C, L) similarities never exist at once. That holds only outside `mx.grad`,
    which keeps whatever was computed of its arguments: see `nearest_gradient`.

    Args:
        queries: (Q, Lq, d) float32 token vectors; documents: (C, L, d). Tokens that do not count are zero, never win.
    """
    (_, query_length, d), (count, length, _) = queries.shape, documents.shape
    real, first = counted(documents), _first(documents)
    # Tokens that do not count become copies of one that does: they cannot win, and no similarity need be masked.
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
    """Gradients of queries and documents, given that of `nearest`'s similarities (Q, Lq, C): it goes to the winners."""
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
    """`nearest`, differentiable by its similarities; it needs memory for all of them while within `mx.grad`."""
    return nearest(queries, documents)


@token_max.vjp
def _token_max_vjp(primals, cotangents, outputs):
    return nearest_gradient(*primals, outputs[1], cotangents[0])


def reduce(best: mx.array, tokens: mx.array, how: str = "mean") -> mx.array:
    """Scores (Q, C) from `nearest`'s (Q, Lq, C): their `mean` or `sum` over the query tokens that count (Q, Lq)."""
    summed = mx.where(tokens[..., None], best, 0.0).sum(axis=1)
    return summed if how == "sum" else summed / mx.maximum(tokens.sum(axis=1), 1)[:, None]


def reduce_retrieved(best: mx.array, tokens: mx.array, least: mx.array) -> mx.array:
    """XTR's training scores (Q, C) (Lee et al. 2023, equation 4) from `nearest`'s (Q, Lq, C).

    Every query token retrieves the tokens of the batch that are at least as near as `least` (Q, Lq), its k-th nearest.
    A document's score is the mean over the query tokens that retrieved any of its tokens; 0 where none did.
    """
    # The k-th itself is retrieved, though it was computed by another product, which rounds in its own way.
    retrieved = (best >= least[..., None] - 1e-6) & tokens[..., None]
    return mx.where(retrieved, best, 0.0).sum(axis=1) / mx.maximum(retrieved.sum(axis=1), 1)


def maxsim(queries: mx.array, documents: mx.array, how: str = "mean", impute: int = 0) -> mx.array:
    """MaxSim scores (Q, C), float32, of token vectors (Q, Lq, d) and (C, L, d).

    Args:
        how: `mean` or `sum` over the query's tokens.
        impute: XTR's scores in use (section 3.3), of so many retrieved tokens: a query token that retrieved nothing of
            a document counts there with the similarity of the last one it retrieved, as no more is known. 0 = all are.
    """
    queries, documents = queries.astype(mx.float32), documents.astype(mx.float32)
    best, _ = token_max(queries, documents)
    if impute:
        best = mx.maximum(best, kth_similarity(queries, documents, impute)[..., None])
    return reduce(best, counted(queries), how)


def kth_similarity(queries: mx.array, documents: mx.array, k: int) -> mx.array:
    """(Q, Lq) float32: the k-th highest similarity of every query token to all tokens of all documents.

    The lowest of all where there are fewer than k. No gradient.
    """
    queries, documents = mx.stop_gradient(queries), mx.stop_gradient(documents)
    vectors = documents.reshape(-1, documents.shape[-1])
    vectors = vectors[mx.array(np.flatnonzero(np.array(counted(documents)).ravel()))]
    if not len(vectors):
        return mx.full(queries.shape[:2], NO_TOKEN)
    rows = max(1, SIMILARITIES_AT_ONCE // (len(vectors) * queries.shape[1]))
    found = []
    for first in range(0, len(queries), rows):
        scores = queries[first : first + rows] @ vectors.T  # (rows, Lq, tokens)
        found.append(mx.topk(scores, min(k, len(vectors)), axis=-1).min(axis=-1))
        mx.eval(found[-1])
    return mx.concatenate(found)


def score(query: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, how: str = "mean", impute: int = 0) -> np.ndarray:
    """`maxsim.maxsim` of one query with a few documents that lie one after another, without padding any.

    Args:
        query: (Lq, d) float32; tokens: (T, d) float32 or float16, of all documents.
        lengths: (C,) how many of them each document has.
        how, impute: see `maxsim.maxsim`.

    Returns: (C,) float32.
    """
    similarities = np.array(mx.array(tokens).astype(mx.float32) @ mx.array(query).T)
    filled = lengths > 0
    best = np.full((len(lengths), len(query)), NO_TOKEN, np.float32)
    if filled.any():
        best[filled] = np.maximum.reduceat(similarities, (np.cumsum(lengths) - lengths)[filled], axis=0)
        if impute:
            k = min(impute, len(similarities))
            best = np.maximum(best, np.partition(similarities, -k, axis=0)[-k])
    summed = best.sum(axis=1)
    return summed if how == "sum" else summed / max(1, len(query))
