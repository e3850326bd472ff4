"""Exact top-k search over documents that come in blocks.

    nearest = Nearest(queries, k, count)
    for block in blocks: nearest.add(block)
    numbers, scores = nearest.best()

Memory depends on the queries, k and the size of a block, not on the number of documents. Equal scores have a fixed
order, so the ranking up to rank k never depends on k. Scores are equal if all digits of float32 are; those of a matrix
product depend on its shape, so identical documents may get scores that differ in the last digit.
"""

import numpy as np

from mlx_retrieval.utils.products import product

DOCUMENTS, QUERIES = 8_192, 1_024  # compared at once
NO_DOCUMENT = -1


class Nearest:
    """Exhaustive search by dot product.

    Of documents with equal scores, the one that was added last ranks first. If documents are added in the order of
    their ids, this is the order of trec_eval.

    Args:
        queries: (Q, d) float32, Q > 0.
        k: documents to return for each query, or all of them if there are fewer.
        count: number of documents that will be added.
    """

    def __init__(self, queries: np.ndarray, k: int, count: int):
        self.blocks = [queries[first : first + QUERIES] for first in range(0, len(queries), QUERIES)]
        self.k, self.count, self.left = min(k, count), count, count
        self.keys = [np.empty((len(block), 0), np.int64) for block in self.blocks]

    def add(self, documents: np.ndarray) -> None:
        """Add the next documents, (N, d) float32."""
        for first in range(0, len(documents), DOCUMENTS):
            # Numbered from the last document on (see `pack`); copied once, not in every product.
            block = np.ascontiguousarray(documents[first : first + DOCUMENTS][::-1])
            self.left -= len(block)
            for i, queries in enumerate(self.blocks):
                self.keys[i] = merge(self.keys[i], product(queries, block.T), self.left, self.k)

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (documents, scores), both (Q, at most k), best first. Call it after the last `add`.

        Documents are numbered from 0 in the order in which they were added.
        """
        numbers, scores = zip(*(best_first(keys, self.k) for keys in self.keys), strict=True)
        return self.count - 1 - np.concatenate(numbers), np.concatenate(scores)


def pack(scores: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return int64 keys that sort like float32 scores; of equal scores, the lower number has the greater key.

    No two keys are equal, so a partition of them is exact for any blocks. Shapes broadcast; at most 2**32 documents.
    """
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32).astype(np.int64)  # + 0 turns -0 into 0
    order = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (order << 32) | (0xFFFFFFFF - numbers)


def unpack(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (documents, scores) of keys; a document with the score -inf becomes NO_DOCUMENT."""
    order = keys >> 32
    scores = np.where(order < 0, order ^ 0x7FFFFFFF, order).astype(np.int32).view(np.float32)
    return np.where(np.isneginf(scores), NO_DOCUMENT, 0xFFFFFFFF - (keys & 0xFFFFFFFF)), scores


def largest(keys: np.ndarray, k: int) -> np.ndarray:
    """Return (Q, at most k): the greatest keys of each row, unordered."""
    return keys if keys.shape[1] <= k else np.partition(keys, keys.shape[1] - k, axis=1)[:, -k:]


def merge(best: np.ndarray, scores: np.ndarray, first: int, k: int) -> np.ndarray:
    """Return (Q, at most k): the greatest keys of `best` (Q, any) and of documents `first`, ... with scores (Q, N)."""
    if best.shape[1] < k:
        numbers = np.arange(first, first + scores.shape[1])
        return largest(np.concatenate([best, pack(scores, numbers)], axis=1), k)
    # Few documents of a later block are among the best: compute only their keys.
    rows, columns = np.nonzero(scores >= unpack(best.min(axis=1))[1][:, None])
    counts = np.bincount(rows, minlength=len(scores))
    places = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    more = np.full((len(scores), int(counts.max(initial=0))), np.iinfo(np.int64).min)
    more[rows, places] = pack(scores[rows, columns], first + columns)
    return largest(np.concatenate([best, more], axis=1), k)


def best_first(keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (documents, scores), both (Q, k), best first; short rows are filled with NO_DOCUMENT and -inf."""
    numbers, scores = unpack(-np.sort(-keys, axis=1)[:, :k])
    short = k - numbers.shape[1]
    fill = ((0, 0), (0, short))
    return (
        np.pad(numbers, fill, constant_values=NO_DOCUMENT),
        np.pad(scores, fill, constant_values=-np.inf),
    )
