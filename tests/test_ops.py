"""models/ops.py against float64 and against mlx's own functions: values, gradients, extremes, masks, transformations.

python -m pytest tests/test_ops.py
"""

import io
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import backend
from backend import mx, nn

import numpy as np
import pytest

from models import ops

erfc = np.vectorize(math.erfc)
ROOT = Path(__file__).resolve().parents[1]
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None or backend.IS_GPU, reason="nothing is fused here")


def gelu64(x):
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return x * erfc(-x / math.sqrt(2)) / 2, erfc(-x / math.sqrt(2)) / 2 + x * density


def silu64(x):
    s = 1 / (1 + np.exp(-x))
    return x * s, s + x * s * (1 - s)


def gelu_tanh64(x):
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)


ACTIVATIONS = {"gelu": (ops.gelu, gelu64), "silu": (ops.silu, silu64), "gelu_tanh": (ops.gelu_tanh, gelu_tanh64)}
OWN = {"gelu": "gelu", "silu": "silu", "gelu_tanh": "gelu_approx"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_slope_against_float64(name):
    function, exact = ACTIVATIONS[name]
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-20, 20, 20_001), rng.normal(size=5_000), [0.0, 1e-30, -1e-30]]).astype(np.float32)
    value, slope = exact(x.astype(np.float64))
    dy = rng.normal(size=x.shape).astype(np.float32)
    (got,), (gradient,) = mx.vjp(function, [mx.array(x)], [mx.array(dy)])
    assert np.all(np.abs(np.array(got) - value) <= 5e-7 * np.maximum(1, np.abs(x)))
    assert np.all(np.abs(np.array(gradient) - slope * dy) <= 1e-6 * np.maximum(1, np.abs(dy)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_extremes(name):
    function, _ = ACTIVATIONS[name]
    x = mx.array([1e4, 1e15, 3e38, -1e4, -1e15, -3e38])
    values, slopes = np.array(function(x)), np.array(mx.grad(lambda x: function(x).sum())(x))
    np.testing.assert_array_equal(values[:3], np.array(x)[:3])
    np.testing.assert_allclose(values[3:] / np.array(x)[3:], 0, atol=1e-7)
    np.testing.assert_allclose(slopes, [1, 1, 1, 0, 0, 0], atol=1e-6)
    sick = np.array(function(mx.array([np.nan, np.inf, -np.inf, 1.0])))
    assert not np.isfinite(sick[:3]).any() and np.isfinite(sick[3])
    assert np.isnan(np.array(mx.grad(lambda x: function(x).sum())(mx.array([np.nan, 1.0])))[0])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5, 7), (17,), (2, 1001)])
def test_activation_shapes(shape):
    x = mx.random.normal(shape)
    for function, _ in ACTIVATIONS.values():
        assert function(x).shape == shape


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_mlx_own(name, dtype):
    x = mx.random.normal((64,)).astype(dtype)
    assert mx.array_equal(ACTIVATIONS[name][0](x), getattr(nn, OWN[name])(x))


def attention64(q, k, v, scale, mask, dout):
    """Output and gradients; k and v are repeated over the query heads that share them."""
    groups = q.shape[1] // k.shape[1]
    many_k, many_v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    scores = scale * q @ many_k.swapaxes(-1, -2)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out, dp = p @ many_v, dout @ many_v.swapaxes(-1, -2)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))

    def shared(x):
        return x.reshape(k.shape[0], k.shape[1], groups, *x.shape[2:]).sum(2)

    return out, ds @ many_k, shared(ds.swapaxes(-1, -2) @ q), shared(p.swapaxes(-1, -2) @ dout)


def masks(rows, heads, length):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, length + 1, rows)
    real = np.arange(length)[None] < lengths[:, None]
    near = np.abs(np.arange(length)[:, None] - np.arange(length)[None]) < 3
    anything = rng.random((rows, heads, length, length)) < 0.5
    anything[..., 0] = True
    return {
        "none": None,
        "padding": real[:, None, None, :],
        "causal": np.tril(np.ones((length, length), bool)),
        "window and padding": (near[None] & real[:, None])[:, None] | np.eye(length, dtype=bool)[None, None],
        "by head and key": anything[:, :, :1],
        "anything": anything,
    }


def check_attention(rows, heads, kv_heads, length, d, mask, size=1.0, tolerance=3e-6):
    rng = np.random.default_rng(2)

    def draw(heads, size=1.0):  # as models make them: (R, L, heads, d), seen as (R, heads, L, d)
        return (size * rng.normal(size=(rows, length, heads, d))).astype(np.float32).transpose(0, 2, 1, 3)

    q, k, v, dout = draw(heads, size), draw(kv_heads), draw(kv_heads), draw(heads)
    scale = d**-0.5
    expected = attention64(*(x.astype(np.float64) for x in (q, k, v)), scale, mask, dout.astype(np.float64))
    mask = None if mask is None else mx.array(mask)
    (out,), gradients = mx.vjp(
        lambda q, k, v: ops.attention(q, k, v, scale, mask), [mx.array(x) for x in (q, k, v)], [mx.array(dout)]
    )
    for got, exact in zip((out, *gradients), expected, strict=True):
        np.testing.assert_allclose(np.array(got), exact, atol=tolerance * max(1, np.abs(exact).max()))


@pytest.mark.parametrize("kind", masks(1, 1, 1))
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_attention_against_float64(kind, heads, kv_heads):
    for rows, length, d in ((3, 17, 8), (1, 1, 4), (2, 64, 5)):
        check_attention(rows, heads, kv_heads, length, d, masks(rows, heads, length)[kind])


@pytest.mark.parametrize("chunk", [1, 20, 19 * 19, 3 * 19 * 19, 10 * 19 * 19])
@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_attention_in_pieces(monkeypatch, chunk, kept):
    """Cut within a head, between heads, between rows; weights kept for the gradient, and computed again."""
    monkeypatch.setattr(ops, "CHUNK", chunk)
    monkeypatch.setattr(ops, "KEPT", kept)
    for kind in ("none", "padding", "anything"):
        check_attention(3, 4, 2, 19, 6, masks(3, 4, 19)[kind])


def test_attention_with_large_scores():
    """Scores in the hundreds: sums neither overflow nor vanish."""
    check_attention(2, 2, 2, 33, 16, masks(2, 2, 33)["padding"], size=300.0, tolerance=1e-4)


def test_hidden_keys_do_not_count():
    q, k, v = (mx.random.normal((2, 3, 8, 4)) for _ in range(3))
    real = mx.arange(8) < 5
    k_far = mx.where(real[:, None], k, 1e4)
    v_far = mx.where(real[:, None], v, 1e4)
    mask = real[None, None, None, :]
    assert mx.array_equal(ops.attention(q, k, v, 0.5, mask), ops.attention(q, k_far, v_far, 0.5, mask))
    nothing = ops.attention(q, k, v, 0.5, mx.zeros((2, 1, 1, 8), dtype=mx.bool_))
    assert mx.isfinite(nothing).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_sick_input_shows(bad, which):
    inputs = [np.random.default_rng(3).normal(size=(1, 1, 4, 4)).astype(np.float32) for _ in range(3)]
    inputs[which][0, 0, 1, 2] = bad
    q, k, v = (mx.array(x) for x in inputs)
    own = np.array(mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5))
    for mask in (None, mx.ones((1, 1, 1, 4), dtype=mx.bool_), mx.ones((4, 4), dtype=mx.bool_)):
        finite = np.isfinite(np.array(ops.attention(q, k, v, 0.5, mask)))
        assert not finite.all() and np.array_equal(finite, np.isfinite(own))


def test_attention_fallbacks_are_mlx_own(monkeypatch):
    own = mx.fast.scaled_dot_product_attention
    q, k, v = (mx.random.normal((2, 4, 8, 16)) for _ in range(3))
    half = [x.astype(mx.float16) for x in (q, k, v)]
    assert mx.array_equal(ops.attention(*half, 0.25, None), own(*half, scale=0.25))
    monkeypatch.setattr(backend, "IS_GPU", True)
    assert mx.array_equal(ops.attention(q, k, v, 0.25, None), own(q, k, v, scale=0.25))
    assert mx.array_equal(ops.gelu(q), nn.gelu(q))


def block(x, w, mask):
    """A little of everything, as a transformer block uses it."""
    q = (x @ w).reshape(2, 16, 4, 8).transpose(0, 2, 1, 3)
    y = ops.attention(q, q, q, 0.3, mask).transpose(0, 2, 1, 3).reshape(2, 16, 32)
    return ops.gelu(ops.silu(y @ w) + ops.gelu_tanh(x))


@pytest.fixture
def plain_block():
    mask = (mx.arange(16)[None] < mx.array([[16], [9]]))[:, None, None, :]
    x, w = mx.random.normal((2, 16, 32), key=mx.random.key(0)), 0.2 * mx.random.normal((32, 32), key=mx.random.key(1))

    def loss(x, w):
        return block(x, w, mask).square().sum()

    return loss, x, w, mx.value_and_grad(loss, argnums=(0, 1))(x, w)


def same(a, b):
    for x, y in zip((a[0], *a[1]), (b[0], *b[1]), strict=True):
        np.testing.assert_allclose(np.array(x), np.array(y), rtol=1e-5, atol=1e-5 * float(mx.abs(y).max()))


def test_under_checkpoint_and_compile(plain_block):
    loss, x, w, expected = plain_block
    same(mx.value_and_grad(mx.checkpoint(loss), argnums=(0, 1))(x, w), expected)
    same(mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))(x, w), expected)
    np.testing.assert_allclose(mx.compile(loss)(x, w).item(), expected[0].item(), rtol=1e-5)
    np.testing.assert_allclose(loss(x, w).item(), expected[0].item(), rtol=1e-5)


def test_gradient_by_differences(plain_block):
    loss, x, w, (_, (dx, _)) = plain_block
    direction = mx.random.normal(x.shape, key=mx.random.key(2))
    slope = (loss(x + 1e-2 * direction, w) - loss(x - 1e-2 * direction, w)).item() / 2e-2
    assert slope == pytest.approx((dx * direction).sum().item(), rel=2e-3)


def operations(*arrays: mx.array) -> set[str]:
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return set(re.findall(r'label ="(\w+)", shape=rectangle', text.getvalue()))


@needs_gcc
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kernels_stay_fused_in_gradients(name):
    """Under mx.grad, mlx calls the functions inside `mx.compile` one operation at a time: ten times slower."""
    function, x = ACTIVATIONS[name][0], mx.random.normal((8, 8))
    mx.eval(x)
    for transformed in (function, mx.checkpoint(function)):
        for arrays in mx.vjp(transformed, [x], [x]):
            found = operations(*arrays)
            assert any(kind.startswith("Compiled") for kind in found)
            assert not found & {"Multiply", "Divide", "Add", "Select"}


def test_on_other_threads(plain_block):
    import threading

    loss, x, w, expected = plain_block
    mx.eval(expected)
    results = []

    def work():
        with mx.stream(mx.new_stream(mx.default_device())):
            result = mx.value_and_grad(loss, argnums=(0, 1))(x, w)
            mx.eval(result)
            results.append(result)
        mx.clear_streams()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        same(result, expected)
    assert len(results) == 2


def test_without_gcc_and_at_exit(tmp_path):
    """No g++ on PATH: nothing is fused, results stay. The process ends cleanly after gradients, too."""
    code = (
        "import backend; from backend import mx, nn; from models import ops\n"
        "x = mx.linspace(-5, 5, 999)\n"
        "for a, b in ((ops.gelu, nn.gelu), (ops.silu, nn.silu), (ops.gelu_tanh, nn.gelu_approx)):\n"
        "    for p, q in zip(mx.vjp(a, [x], [x]), mx.vjp(b, [x], [x])):\n"
        "        assert mx.abs(p[0] - q[0]).max() < 1e-5\n"
        "print('same')"
    )
    for path in (os.environ["PATH"], str(tmp_path)):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout == "same\n", done.stderr
