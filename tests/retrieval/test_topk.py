"""Exact top-k of documents that come in blocks: against a plain sort, with equal scores, in blocks of any size.

python -m pytest tests/retrieval/test_topk.py
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_retrieval.retrieval import topk
from mlx_retrieval.retrieval.topk import Nearest


def found(queries: np.ndarray, blocks: list[np.ndarray], k: int) -> tuple[list, list]:
    nearest = Nearest(queries, k, sum(map(len, blocks)))
    for block in blocks:
        nearest.add(block)
    return tuple(each.tolist() for each in nearest.best())


@given(
    st.integers(1, 30),
    st.integers(1, 12),
    st.lists(st.integers(0, 30), max_size=4),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_nearest_are_those_of_a_plain_sort(documents, k, cuts, size, seed):
    """Small whole numbers: many scores are equal, and their sums exact. Of equal ones the last is first."""
    rng = np.random.default_rng(seed)
    queries, vectors = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (5, documents))
    blocks = np.split(vectors, sorted(min(cut, documents) for cut in cuts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "DOCUMENTS", size)
        patch.setattr(topk, "QUERIES", 2)
        numbers, scores = found(queries, blocks, k)
    for query, row, values in zip(queries, numbers, scores, strict=True):
        all_scores = vectors @ query
        order = sorted(range(documents), key=lambda i: (all_scores[i], i), reverse=True)[:k]
        assert row == order and values == all_scores[order].tolist()


def test_what_lies_behind_rank_k_decides_nothing():
    rng = np.random.default_rng(0)
    queries, vectors = rng.integers(-1, 2, (20, 2)).astype(np.float32), rng.integers(-1, 2, (500, 2)).astype(np.float32)
    all_numbers, _ = found(queries, [vectors], 500)
    numbers, _ = found(queries, [vectors], 10)
    assert numbers == [row[:10] for row in all_numbers]
