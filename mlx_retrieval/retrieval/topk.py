"""The k documents with the greatest scores, exactly, of documents that come in blocks: see `search` and `merge`.

    nearest = Nearest(queries, k, count)
    for block in blocks: nearest.add(block)
    numbers, scores = nearest.best()

Memory depends on the queries, k and a block, not on how many documents there are. The order of equal scores is settled,
so that what lies behind rank k never decides what lies before it. Equal means to the last digit of float32, which in a
matrix product depends on its shape: documents that are the same may differ there.
"""

import numpy as np

DOCUMENTS, QUERIES = 8_192, 1_024  # that are compared at once
NO_DOCUMENT = -1


class Nearest:
    """Exhaustive search by dot product. Of equal scores the document that came last ranks first: where documents come
    sorted by their ids, that is how trec_eval has them.

    Args:
        queries: (Q, d) float32, Q > 0.
        k: how many documents each query is to find.
        count: of the documents that will come; fewer of them than k are found.
    """

    def __init__(self, queries: np.ndarray, k: int, count: int):
        self.parts = [queries[first : first + QUERIES] for first in range(0, len(queries), QUERIES)]
        self.k, self.count, self.left = min(k, count), count, count
        self.keys = [np.empty((len(part), 0), np.int64) for part in self.parts]

    def add(self, documents: np.ndarray) -> None:
        """The next documents, (N, d) float32."""
        for first in range(0, len(documents), DOCUMENTS):
            # Numbered from the last one on (see `pack`), and laid out so once, not in every product.
            block = np.ascontiguousarray(documents[first : first + DOCUMENTS][::-1])
            self.left -= len(block)
            for i, part in enumerate(self.parts):
                self.keys[i] = merge(self.keys[i], part @ block.T, self.left, self.k)

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """(documents, scores), both (Q, at most k), best first, once all have come. Documents are counted from 0."""
        numbers, scores = zip(*(best_first(keys, self.k) for keys in self.keys), strict=True)
        return self.count - 1 - np.concatenate(numbers), np.concatenate(scores)


def pack(scores: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """int64 keys that sort like the float32 scores of documents; of equal scores, the lower number is the greater key.

    Their partition is thus exact, whatever the blocks. Shapes as numpy broadcasts them; at most 2**32 documents.
    """
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32).astype(np.int64)  # + 0: there is no -0
    order = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (order << 32) | (0xFFFFFFFF - numbers)


def unpack(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(documents, scores) of keys; a score of -inf makes it NO_DOCUMENT."""
    order = keys >> 32
    scores = np.where(order < 0, order ^ 0x7FFFFFFF, order).astype(np.int32).view(np.float32)
    return np.where(np.isneginf(scores), NO_DOCUMENT, 0xFFFFFFFF - (keys & 0xFFFFFFFF)), scores


def largest(keys: np.ndarray, k: int) -> np.ndarray:
    """(Q, at most k): the greatest keys of each row, in no order."""
    return keys if keys.shape[1] <= k else np.partition(keys, keys.shape[1] - k, axis=1)[:, -k:]


def merge(best: np.ndarray, scores: np.ndarray, first: int, k: int) -> np.ndarray:
    """(Q, at most k): the greatest keys of `best` (Q, any) and of documents `first`, ... with scores (Q, N)."""
    if best.shape[1] < k:
        numbers = np.arange(first, first + scores.shape[1])
        return largest(np.concatenate([best, pack(scores, numbers)], axis=1), k)
    # Few documents of a later block are among the best: only their keys are made.
    rows, columns = np.nonzero(scores >= unpack(best.min(axis=1))[1][:, None])
    counts = np.bincount(rows, minlength=len(scores))
    places = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    more = np.full((len(scores), int(counts.max(initial=0))), np.iinfo(np.int64).min)
    more[rows, places] = pack(scores[rows, columns], first + columns)
    return largest(np.concatenate([best, more], axis=1), k)


def best_first(keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(documents, scores), both (Q, k): rows of fewer keys are filled up."""
    numbers, scores = unpack(-np.sort(-keys, axis=1)[:, :k])
    short = k - numbers.shape[1]
    fill = ((0, 0), (0, short))
    return (
        np.pad(numbers, fill, constant_values=NO_DOCUMENT),
        np.pad(scores, fill, constant_values=-np.inf),
    )
