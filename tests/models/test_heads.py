"""Pooling against numpy on padded rows.

python -m pytest tests/models/test_heads.py
"""

from mlx_retrieval.backend import mx, nn

import numpy as np
import pytest

from mlx_retrieval.models.batching import MicroBatch
from mlx_retrieval.models.heads import POOLING, EmbeddingHead, RetrievalModel, pool

LENGTHS = (5, 1, 3, 7)
# What pooling counts: all tokens, one token, without the outer tokens, without a prompt at the front.
SPANS = ((0, 5), (0, 1), (1, 2), (4, 7))


def micro_batch(spans=SPANS, width: int = 8) -> MicroBatch:
    start, end = zip(*spans, strict=True)
    ids = mx.zeros((len(spans), width), mx.int32)
    return MicroBatch(ids, *(mx.array(column, mx.int32) for column in (LENGTHS[: len(spans)], start, end)))


@pytest.fixture
def states() -> np.ndarray:
    """States of four rows; every padded position holds NaN, as garbage that must not leak."""
    values = np.random.default_rng(0).normal(size=(4, 8, 6)).astype(np.float32)
    for row, length in enumerate(LENGTHS):
        values[row, length:] = np.nan
    return values


def expected(states: np.ndarray, mode: str) -> np.ndarray:
    rows = []
    for row, length, (start, end) in zip(states.astype(np.float64), LENGTHS, SPANS, strict=True):
        counted = row[start:end]
        rows.append({"mean": counted.mean(0), "max": counted.max(0), "cls": row[0], "last": row[length - 1]}[mode])
    return np.stack(rows)


@pytest.mark.parametrize("mode", POOLING)
def test_pooling_equals_numpy(states, mode):
    found = pool(mx.array(states), micro_batch(), mode)
    assert found.dtype == mx.float32 and found.shape == (4, 6)
    np.testing.assert_allclose(np.array(found), expected(states, mode), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", POOLING)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_states_are_pooled_in_float32(states, mode, dtype):
    half = mx.array(states).astype(dtype)
    full = half.astype(mx.float32)
    found = pool(half, micro_batch(), mode)
    assert found.dtype == mx.float32
    assert np.array_equal(np.array(found), np.array(pool(full, micro_batch(), mode)))


@pytest.mark.parametrize("mode", POOLING)
def test_padding_is_without_effect(states, mode):
    """More padding gives the same vector, and each row alone the same as in company."""
    wide = np.full((4, 13, 6), np.inf, np.float32)
    wide[:, :8] = states
    together = np.array(pool(mx.array(states), micro_batch(), mode))
    assert np.array_equal(together, np.array(pool(mx.array(wide), micro_batch(width=13), mode)))
    for row, length in enumerate(LENGTHS):
        one = MicroBatch(mx.zeros((1, length), mx.int32), *(part[row : row + 1] for part in micro_batch()[1:4]))
        alone = np.array(pool(mx.array(states[row : row + 1, :length]), one, mode))
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-6)


@pytest.mark.parametrize("mode", POOLING)
def test_left_out_tokens_and_padding_get_no_gradient(states, mode):
    gradient = np.array(mx.grad(lambda s: pool(s, micro_batch(), mode).sum())(mx.array(states)))
    assert np.isfinite(gradient).all()
    used = np.zeros((4, 8), bool)
    for row, (length, (start, end)) in enumerate(zip(LENGTHS, SPANS, strict=True)):
        used[row, {"cls": 0, "last": length - 1}.get(mode, slice(start, end))] = True
    assert not gradient[~used].any() and (gradient[used] != 0).any(axis=-1).all() == (mode != "max")
    np.testing.assert_allclose(gradient.sum(axis=1), 1, rtol=1e-5)


def test_mean_of_many_tokens_keeps_its_precision():
    """Summed in half precision, 4,096 equal numbers would stop growing at 256 (bfloat16) or 2,048 (float16)."""
    states = mx.full((1, 4096, 2), 1.0, dtype=mx.bfloat16)
    batch = MicroBatch(mx.zeros((1, 4096), mx.int32), mx.array([4096]), mx.array([0]), mx.array([4096]))
    np.testing.assert_allclose(np.array(pool(states, batch, "mean")), 1, rtol=1e-6)


@pytest.mark.parametrize("mode", POOLING)
def test_vectors_have_unit_length(states, mode):
    vectors = EmbeddingHead(mode)(mx.array(states) * 50, micro_batch())
    np.testing.assert_allclose(np.linalg.norm(np.array(vectors), axis=1), 1, rtol=1e-6)
    raw = expected(states, mode)
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(vectors), raw, rtol=1e-4, atol=1e-6)


def test_zero_states_give_a_zero_vector():
    vectors = EmbeddingHead("mean")(mx.zeros((4, 8, 6)), micro_batch())
    assert not vectors.any().item()


def test_a_model_is_its_backbone_and_its_head(states):
    class Backbone(nn.Module):
        def hidden_states(self, ids, lengths):
            assert ids.shape == (4, 8) and lengths.tolist() == list(LENGTHS)
            return mx.array(states)

    found = RetrievalModel(Backbone(), EmbeddingHead("last"))(micro_batch())
    assert np.array_equal(np.array(found), np.array(EmbeddingHead("last")(mx.array(states), micro_batch())))
