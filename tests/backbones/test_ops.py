"""Attention, activations and merged layers equal mlx's up to rounding, forward and backward.

python -m pytest tests/backbones/test_ops.py
"""

from mlx_retrieval.backend import mx, nn

import numpy as np
import pytest

from mlx_retrieval import backend
from mlx_retrieval.backbones import ops

pytestmark = pytest.mark.compiled
only_cpu = pytest.mark.skipif(not backend.FUSED, reason="GPUs use mlx's own functions")


def arrays(*shapes: tuple[int, ...], scale: float = 1.0) -> list[mx.array]:
    rng = np.random.default_rng(0)
    return [mx.array(scale * rng.standard_normal(shape, dtype=np.float32)) for shape in shapes]


def own(q, k, v, scale, mask=None):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def agree(function, reference, inputs: list[mx.array], weights: mx.array = None, tolerance: float = 2e-5) -> None:
    """Assert equal values and gradients of all inputs, plain and compiled."""
    out = reference(*inputs)
    cotangent = arrays(out.shape)[0] if weights is None else weights
    expected = [out, *mx.vjp(lambda *x: [reference(*x)], inputs, [cotangent])[1]]
    for wrap in (lambda f: f, mx.compile):
        actual = wrap(lambda *x: [function(*x), *mx.vjp(lambda *y: [function(*y)], list(x), [cotangent])[1]])(*inputs)
        for a, b in zip(actual, expected, strict=True):
            largest = float(mx.abs(b).max())
            np.testing.assert_allclose(np.array(a), np.array(b), atol=tolerance * largest, rtol=tolerance)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["none", "causal", "window", "rows", "heads"])
def test_attention_under_every_mask(kind, kv_heads):
    q, k, v = arrays((3, 4, 37, 16), (3, kv_heads, 37, 16), (3, kv_heads, 37, 16))
    distance = np.abs(np.arange(37)[:, None] - np.arange(37))
    real = np.arange(37) < np.array([37, 20, 5])[:, None]
    mask = {
        "none": None,
        "causal": "causal",
        "window": mx.array(distance < 9),
        "rows": mx.array((distance < 9) & real[:, None, None, :] | (distance == 0)),
        "heads": mx.array((distance[None] < np.array([3, 9, 30, 99])[:, None, None])[None]),
    }[kind]
    agree(lambda *x: ops.attention(*x, 0.25, mask), lambda *x: own(*x, 0.25, mask), [q, k, v])


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_padding_has_no_weight_whatever_it_holds(size):
    """Scores are in the hundreds and far from zero, and padding would win."""
    q, k, v = arrays((3, 4, 37, 16), (3, 4, 37, 16), (3, 4, 37, 16), scale=size)
    k = k - 20.0  # as a large bias of the keys' layer would do
    lengths = np.array([37, 20, 1])
    real = mx.array(np.arange(37) < lengths[:, None])
    inside = real[:, None, :, None]
    k, v = mx.where(inside, k, 1e4), mx.where(inside, v, 1e4)
    mask, weights = real[:, None, None, :], mx.where(inside, arrays(q.shape)[0], 0.0)
    agree(
        lambda *x: mx.where(inside, ops.attention(*x, 0.25, real=real), 0.0),
        lambda *x: mx.where(inside, own(*x, 0.25, mask), 0.0),
        [q, k, v],
        weights,
        tolerance=2e-5 * size,
    )


def test_a_query_that_sees_nothing_stays_finite():
    q, k, v = arrays((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    nothing = mx.zeros((5, 5), dtype=mx.bool_)
    assert mx.isfinite(ops.attention(q, k, v, 1.0, nothing)).all()
    slopes = mx.grad(lambda q, k: (ops.attention(q, k, v, 1.0, nothing) * v).sum(), argnums=(0, 1))(q, k)
    assert all(mx.array_equal(slope, mx.zeros(q.shape)) for slope in slopes)


def test_other_dtypes_and_additive_masks_go_to_mlx():
    q, k, v = (x.astype(mx.bfloat16) for x in arrays((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)))
    assert ops.attention(q, k, v, 1.0).dtype == mx.bfloat16
    q, k, v = arrays((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    bias = arrays((5, 5))[0]
    assert mx.array_equal(ops.attention(q, k, v, 1.0, bias), own(q, k, v, 1.0, bias))


def test_gelu_s_tanh_form():
    x = mx.concatenate([arrays((1000,), scale=3.0)[0], mx.array([0.0, 50.0, -50.0, 1e4, -1e4])])
    agree(ops.gelu_tanh, nn.gelu_approx, [x], tolerance=2e-6)


def test_a_merged_layer_is_a_layer_and_its_adapter():
    x, w, a, b = arrays((3, 7, 24), (16, 24), (24, 4), (4, 16))
    merged = w + (a @ b).T
    agree(
        lambda x, a, b: ops.merged_linear(x, merged, a, b),
        lambda x, a, b: x @ w.T + (x @ a) @ b,
        [x, a, b],
        tolerance=1e-5,
    )


@only_cpu
def test_kernels_keep_infinities_and_nan_and_are_exact_enough():
    """The compiler's flags must not let it ignore numbers that are not finite."""
    x = np.concatenate([np.linspace(-90, 90, 10_001), [np.inf, -np.inf, np.nan, 0.0]]).astype(np.float32)
    forms = {
        "exp": (lambda x: mx.exp(x) * 1.5, lambda x: np.exp(x) * 1.5),
        "tanh": (lambda x: mx.tanh(x) * 1.5, lambda x: np.tanh(x) * 1.5),
        "sigmoid": (lambda x: mx.sigmoid(x) * 1.5, lambda x: 1.5 / (1 + np.exp(-x))),
        "log": (lambda x: mx.log(mx.abs(x)) * 1.5, lambda x: np.log(np.abs(x)) * 1.5),
        "isnan": (lambda x: mx.where(mx.isnan(x), 1.0, 2.0) * 1.5, lambda x: np.where(np.isnan(x), 1.0, 2.0) * 1.5),
        "maximum": (lambda x: mx.maximum(x, 0.0) * 1.5, lambda x: np.maximum(x, 0.0) * 1.5),
    }
    for name, (function, reference) in forms.items():
        with np.errstate(all="ignore"):
            expected = reference(x.astype(np.float64)).astype(np.float32)
        actual = np.array(mx.compile(function)(mx.array(x)))
        usual = np.abs(x) < 87  # beyond it exp is 0 or infinity in mlx
        usual |= ~np.isfinite(x)
        np.testing.assert_allclose(actual[usual], expected[usual], rtol=1e-5, atol=1e-37, err_msg=name)


@only_cpu
def test_sums_are_not_reordered_by_the_kernels_compiler():
    x, y = mx.array([1e8] * 64), mx.array([-1e8] * 64)
    assert (mx.compile(lambda x, y: (x + 1.0) + y)(x, y) == mx.array(np.float32(1e8) + np.float32(1.0) - 1e8)).all()
