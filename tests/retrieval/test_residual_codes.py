"""Token vectors in few bits.

python -m pytest tests/retrieval/test_residual_codes.py
"""

import numpy as np
import pytest

from mlx_retrieval.retrieval import residual_codes
from mlx_retrieval.retrieval.residual_codes import BITS, Codebook
from mlx_retrieval.retrieval.token_pooling import pool


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Vectors around forty centres; 20 dimensions, which are no multiple of 8."""
    rng = np.random.default_rng(0)
    return unit(rng.standard_normal((40, 20))[rng.integers(40, size=4_000)] + 0.3 * rng.standard_normal((4_000, 20)))


def test_more_bits_lose_less(vectors):
    errors = []
    for bits in BITS:
        codebook = residual_codes.train(vectors, bits)
        centroids, codes = codebook.encode(vectors)
        assert (centroids.dtype, codes.dtype, codes.shape) == (np.uint16, np.uint8, (4_000, -(-20 * bits // 8)))
        assert codebook.token_bytes == 2 + codes.shape[1]
        errors.append(float(((codebook.decode(centroids, codes) - vectors) ** 2).sum(axis=1).mean()))
    residual = ((vectors - codebook.centroids[centroids]) ** 2).sum(axis=1).mean()
    assert residual > 2 * errors[0] > 4 * errors[1] > 16 * errors[2] > 256 * errors[3]


def test_each_part_has_the_nearest_centroid_and_value():
    rng = np.random.default_rng(1)
    codebook = Codebook(
        rng.standard_normal((5, 6)).astype(np.float32), rng.standard_normal((2, 256, 4)).astype(np.float32)
    )
    vectors = rng.standard_normal((30, 6)).astype(np.float32)
    centroids, codes = codebook.encode(vectors)
    for vector, centroid, code in zip(vectors, centroids, codes, strict=True):
        assert centroid == ((codebook.centroids - vector) ** 2).sum(axis=1).argmin()
        residual = np.pad(vector - codebook.centroids[centroid], (0, 2))
        nearest = [
            ((values - part) ** 2).sum(axis=1).argmin()
            for values, part in zip(codebook.values, residual.reshape(2, 4), strict=True)
        ]
        assert code.tolist() == nearest
    decoded = codebook.decode(centroids, codes)
    first = codebook.centroids[centroids[0]] + np.concatenate([codebook.values[i, codes[0, i]] for i in range(2)])[:6]
    np.testing.assert_allclose(decoded[0], first / np.linalg.norm(first), rtol=1e-6)


def test_decoded_vectors_have_unit_length_and_zeros_stay_small(vectors):
    codebook = residual_codes.train(np.concatenate([vectors, np.zeros((500, 20), np.float32)]), 4)
    lengths = np.linalg.norm(codebook.decode(*codebook.encode(vectors)), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    assert np.abs(codebook.decode(*codebook.encode(np.zeros((1, 20), np.float32)))).max() < 0.5


def test_a_saved_codebook_decodes_alike(vectors, tmp_path):
    codebook = residual_codes.train(vectors[:500], 2)
    codebook.save(tmp_path / "codebook.npz")
    loaded = Codebook.load(tmp_path / "codebook.npz")
    for one, other in zip(codebook.encode(vectors), loaded.encode(vectors), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(codebook.values, loaded.values)


def test_an_empty_mean_moves_to_a_point():
    points = np.array([[0.0, 0.0]] * 50 + [[9.0, 9.0]], np.float32)
    means = residual_codes.k_means(points, 2, 20, np.random.default_rng(0))
    assert sorted(means.tolist()) == [[0.0, 0.0], [9.0, 9.0]]


def test_pooling_merges_what_is_alike():
    """The first vector stays; of the others, neighbours of the same direction become one."""
    rng = np.random.default_rng(0)
    directions = np.eye(4, 8, dtype=np.float32)
    tokens = unit(np.repeat(directions, 2, axis=0) + 0.01 * rng.standard_normal((8, 8)))
    first = unit(np.ones((1, 8)))
    pooled = pool(np.concatenate([first, tokens]), 2)
    assert pooled.shape == (5, 8) and pooled.dtype == np.float32
    np.testing.assert_array_equal(pooled[0], first[0])
    nearest = (pooled[1:] @ directions.T).argmax(axis=1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    expected = unit(tokens.reshape(4, 2, 8).mean(axis=1))[nearest]
    np.testing.assert_allclose(pooled[1:], expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_few_tokens_are_not_pooled_away(length):
    tokens = np.eye(3, 4, dtype=np.float32)[:length]
    np.testing.assert_array_equal(pool(tokens, 3), tokens)
    np.testing.assert_array_equal(pool(tokens, 1), tokens)
