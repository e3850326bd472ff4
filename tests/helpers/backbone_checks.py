"""Comparisons for the tests of all backbones: states by row, padded or alone, and gradients."""

from mlx_retrieval.backend import mx, nn

import numpy as np
import pytest
from mlx.utils import tree_flatten
from random_models import shake

from mlx_retrieval.backbones import Backbone, gradient_checkpointing, lora


def rows_of(backbone, ids: mx.array, lengths: mx.array) -> list[np.ndarray]:
    states = np.array(backbone.hidden_states(ids, lengths))
    return [states[row, :length] for row, length in enumerate(lengths.tolist())]


def alone(backbone, ids: mx.array, lengths: mx.array) -> list[np.ndarray]:
    return [rows_of(backbone, ids[i : i + 1, :n], lengths[i : i + 1])[0] for i, n in enumerate(lengths.tolist())]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row.shape == other.shape
        np.testing.assert_allclose(row, other, rtol=0, atol=tolerance)


def assert_quantised(backbone, whole, exact: list[np.ndarray], ids: mx.array, lengths: mx.array, bits: int) -> None:
    """States of a file are those of the weights in memory to the last bit, alone as padded, and near the exact ones."""
    actual = rows_of(backbone, ids, lengths)
    assert_close(actual, rows_of(whole, ids, lengths), 0)
    assert_close(actual, alone(backbone, ids, lengths), 1e-4)
    assert np.corrcoef(actual[0].ravel(), exact[0].ravel())[0, 1] > {4: 0.7, 8: 0.99}[bits]


def trainable(backbone: Backbone) -> dict[str, mx.array]:
    return dict(tree_flatten(backbone.adapted.trainable_parameters()))


def pooled_loss(backbone: Backbone, ids: mx.array, lengths: mx.array) -> mx.array:
    """Mean of the real tokens' states of each row against a fixed direction."""
    states = backbone.hidden_states(ids, lengths)
    real = (mx.arange(ids.shape[1]) < lengths[:, None])[..., None]
    means = (states * real).sum(axis=1) / lengths[:, None]
    return (means * direction(means.shape)).sum()


def direction(shape) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(9))


def gradient(backbone: Backbone, *batch: mx.array) -> tuple[float, dict[str, mx.array]]:
    loss, tree = nn.value_and_grad(backbone, lambda *batch: pooled_loss(backbone, *batch))(*batch)
    return loss.item(), dict(tree_flatten(tree))


def assert_checkpointing_changes_nothing(load, train_type: str, *batch: mx.array) -> None:
    """`load` gives the same backbone every time."""
    results = []
    for checkpointed in (False, True):
        backbone = load()
        gradient_checkpointing.seed(0)
        lora.adapt(backbone, train_type, rank=4)
        shake(backbone)
        if checkpointed:
            gradient_checkpointing.checkpoint_blocks(backbone)
        backbone.train()
        results.append(gradient(backbone, *batch))
    (loss, grads), (loss_again, grads_again) = results
    assert loss == pytest.approx(loss_again, rel=1e-6)
    assert list(grads) == list(grads_again)
    for name, value in grads.items():
        assert mx.abs(value - grads_again[name]).max() <= 1e-5 * mx.maximum(mx.abs(value).max(), 1e-3), name
