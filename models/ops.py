"""Activations and attention that are quick on CPUs; on a GPU they are mlx's own.

mlx's exp, erf, tanh and softmax take one number at a time on Linux CPUs, 10 to 40 ns each. The forms here are equal but
made of what gcc vectorises, about 1 ns each: multiplications, additions, one division and selections, in `mx.compile`d
kernels of at most eleven operations in a row (mlx cuts deeper ones). Gradients are written by hand. float32 only: other
dtypes, and every call on a GPU, go to mlx itself. Without g++ nothing is fused: equal results, slower.

Largest errors: activations 5e-7 max(1, |x|), their slopes 1e-6; an attention weight 1e-6 of the row's largest, 2e-6 of
itself. NaN and infinity in give NaN or infinity out.

    python -m pytest tests/test_ops.py
"""

import functools
import math
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import backend
from backend import mx, nn

# Attention scores computed at once: they should fit into the caches, and arrays above 32 MB (where malloc maps fresh
# pages) cost page faults each time.
CHUNK = 1 << 18
KEPT = 1 << 25  # attention weights of one call that wait for the gradient; of more, all are computed again
HIDDEN = -1e30  # added to the score of a key that must not be seen
# Bounds are arrays: with literals, gcc turns a clamp into a branch and no longer vectorises the loop around it.
_END, _SIGNS = mx.array(16.0), (mx.array(0.0), mx.array(1.0), mx.array(-1.0))


def _plain(x: mx.array) -> bool:
    """Whether mlx's own function is the right one."""
    return backend.IS_GPU or x.dtype != mx.float32


# --- kernels that stay fused under mx.grad -----------------------------------------------------------------------

_CAN_FUSE = not backend.IS_GPU and shutil.which("g++") is not None
_probed: list[int] = []
_wanted: queue.SimpleQueue = queue.SimpleQueue()


@mx.compile
def _probe(x: mx.array) -> mx.array:
    _probed.append(1)
    return x + 1.0


def _fusing() -> bool:
    """Whether `mx.compile` compiles here and now: while a gradient is built, it only calls the function."""
    _probed.clear()
    _probe(_END)
    if _probed:  # either that, or the first call
        _probed.clear()
        _probe(_END)
    return not _probed


def _serve() -> None:
    while True:
        function, arrays, stream, answer = _wanted.get()
        try:
            with mx.stream(stream):
                answer.set_result(function(*arrays))
        except BaseException as error:  # it belongs to the caller, who is waiting for it
            answer.set_exception(error)


@functools.cache
def _helper() -> threading.Thread:
    # A daemon: it is never joined, since mlx's state of a thread does not survive its end.
    thread = threading.Thread(target=_serve, name="ops", daemon=True)
    thread.start()
    return thread


def _fused(function: Callable) -> Callable:
    """Let the compiled kernels that `function` calls be fused, whatever is being traced around it.

    mlx does not fuse what depends on a traced array, nor anything in a thread that is going backwards. An alias out of
    a finished transformation is not traced; and another thread is not going backwards.
    """

    def call(*arrays: mx.array):
        if not _CAN_FUSE:
            return function(*arrays)
        if _fusing():
            return function(*mx.vjp(lambda *aliases: aliases, arrays, arrays)[0])
        _helper()
        answer: Future = Future()
        _wanted.put((function, arrays, mx.default_stream(mx.default_device()), answer))
        return answer.result()

    return call


def _kernel(function: Callable) -> Callable:
    """`mx.compile` for element-wise functions of at most eleven operations in a row.

    mlx writes results over inputs that are not needed any more. gcc's loop then takes its slow way, made for arrays
    that overlap, so the inputs are kept until the result is there.
    """
    compiled = mx.compile(function)

    def call(*arrays: mx.array) -> mx.array:
        return mx.depends([compiled(*arrays)], list(arrays))[0]

    return call


# --- activations -------------------------------------------------------------------------------------------------

# exp(u) is close to q(u)^8 for u >= 0. No coefficient is negative: nothing cancels, and what overflows is infinity.
# Relative error at most 2e-6 (root mean square 4e-7) up to u = 10; exp(-u) is below 1e-10 wrong behind it.
_Q = (1.0, 0.12499998618609803, 0.007812535968440924, 0.00032549374351716987, 1.0180242432568684e-05,
      2.536818626576756e-07, 5.20804033091735e-09, 1.1551586990771906e-10, 0.0, 6.195849297326887e-14)  # fmt: skip
# With a = |x|: gelu(x) = max(x, 0) - a T(a), where T(a) = 1 - Phi(a) is close to 1 / (2 p(a)^8); and gelu'(x) is D(a)
# for x < 0, 1 - D(a) for x > 0, where D(a) = T(a) - a phi(a) is close to n(a) / p(a)^8. Both polynomials have the least
# largest error on [0, 6.5], weighted with what they contribute to the result; behind it p^8 is above 1e10 and grows.
_P = (1.0, 0.0997366535844831, 0.04475145890125316, 0.008716535557758635, 0.0007708431859023198,
      0.0003092180401824085, -1.1385820061239801e-05, 1.7885435885121192e-05, -2.9295026920814224e-06,
      4.0758664569227465e-07)  # fmt: skip
_N = (0.5, -0.3989396650630165, -0.31832821117736515, -0.05446497160986355, 0.00954774266528324,
      5.5799427539952354e-05, -0.0005918781013287463, 0.00017689686014263744, -2.4767970980520358e-05,
      1.4158828031539271e-06)  # fmt: skip
# silu(x) = max(x, 0) - a d, and so is gelu_tanh(x), with d = 1 / (1 + exp(u)), u = a in silu, u = 2 v(a) in gelu_tanh
# (0.5 (1 + tanh v) is sigmoid(2 v)). The slope is s = 1 - d + (a u') d (1 - d) for x > 0, and 1 - s for x < 0.
_U1 = 2 * math.sqrt(2 / math.pi)
_U3, _RISE3 = mx.array(0.044715 * _U1), mx.array(3 * 0.044715 * _U1)


def _polynomial(c: tuple[float, ...], u: mx.array) -> mx.array:
    """Ten coefficients, lowest first, in seven steps (Estrin's scheme)."""
    z = u * u
    square = z * z
    middle = (c[4] + c[5] * u) + z * (c[6] + c[7] * u)
    return (((c[0] + c[1] * u) + z * (c[2] + c[3] * u)) + square * middle) + (square * square) * (c[8] + c[9] * u)


def _eighth(x: mx.array) -> mx.array:
    fourth = (x * x) * (x * x)
    return fourth * fourth


def _size(x: mx.array, end: mx.array) -> mx.array:
    return mx.where(mx.abs(x) > end, end, mx.abs(x))


@_kernel
def _exp_minus(u: mx.array) -> mx.array:
    """exp(-u) for u >= 0."""
    return 1.0 / _eighth(_polynomial(_Q, u))


@_kernel
def _q(x: mx.array) -> mx.array:
    return _polynomial(_Q, mx.abs(x))


@_kernel
def _p(x: mx.array, end: mx.array) -> mx.array:
    return _polynomial(_P, _size(x, end))


@_kernel
def _n(x: mx.array, end: mx.array) -> mx.array:
    return _polynomial(_N, _size(x, end))


@_kernel
def _cubic(x: mx.array, end: mx.array, third: mx.array) -> mx.array:
    a = _size(x, end)
    return a * (_U1 + third * (a * a))


@_kernel
def _gelu_value(x: mx.array, p: mx.array) -> mx.array:
    a = mx.abs(x)
    return (0.5 * x + 0.5 * a) - (0.5 * a) / _eighth(p)


@_kernel
def _gelu_slope(
    x: mx.array, p: mx.array, n: mx.array, dy: mx.array, zero: mx.array, plus: mx.array, minus: mx.array
) -> mx.array:
    return dy * (0.5 + mx.where(x > zero, plus, minus) * (0.5 - n / _eighth(p)))


@_kernel
def _gated_value(x: mx.array, q: mx.array) -> mx.array:
    a = mx.abs(x)
    return (0.5 * x + 0.5 * a) - a / (1.0 + _eighth(q))


@_kernel
def _gated_slope(
    x: mx.array, rise: mx.array, q: mx.array, dy: mx.array, zero: mx.array, plus: mx.array, minus: mx.array
) -> mx.array:
    d = 1.0 / (1.0 + _eighth(q))
    return dy * (0.5 + mx.where(x > zero, plus, minus) * ((0.5 - d) + (rise * d) * (1.0 - d)))


def _activation(value: Callable, slope: Callable) -> Callable:
    function = mx.custom_function(_fused(value))
    backward = _fused(slope)
    function.vjp(lambda x, dy, _: backward(x, dy))
    return function


_gelu = _activation(
    lambda x: _gelu_value(x, _p(x, _END)), lambda x, dy: _gelu_slope(x, _p(x, _END), _n(x, _END), dy, *_SIGNS)
)
_silu = _activation(lambda x: _gated_value(x, _q(x)), lambda x, dy: _gated_slope(x, mx.abs(x), _q(x), dy, *_SIGNS))
_gelu_tanh = _activation(
    lambda x: _gated_value(x, _q(_cubic(x, _END, _U3))),
    lambda x, dy: _gated_slope(x, _cubic(x, _END, _RISE3), _q(_cubic(x, _END, _U3)), dy, *_SIGNS),
)


def gelu(x: mx.array) -> mx.array:
    """x Phi(x), the exact form: `gelu` in Hugging Face configs. Any shape."""
    return nn.gelu(x) if _plain(x) else _gelu(x)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh form of gelu: `gelu_pytorch_tanh`, `gelu_new`. Any shape."""
    return nn.gelu_approx(x) if _plain(x) else _gelu_tanh(x)


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x). Any shape."""
    return nn.silu(x) if _plain(x) else _silu(x)


# --- attention ---------------------------------------------------------------------------------------------------


def _cuts(rows: int, heads: int, queries: int, keys: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of rows, heads and queries, in order, whose score matrices hold at most CHUNK numbers."""
    most = max(1, CHUNK // keys)  # queries at once
    n = min(queries, most)
    h = min(heads, most // queries) or 1
    r = min(rows, most // (queries * heads)) or 1
    for i in range(0, rows, r):
        for j in range(0, heads, h):
            for k in range(0, queries, n):
                yield slice(i, i + r), slice(j, j + h), slice(k, k + n)


def _joined(parts: list[mx.array], shape: tuple[int, ...]) -> mx.array:
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    return (flat[0] if len(flat) == 1 else mx.concatenate(flat)).reshape(shape)


def _bias_of(mask: mx.array, groups: int, length: int) -> mx.array:
    """0 or HIDDEN, (R or 1, kv heads or 1, K, groups * L or 1), from a mask that broadcasts to (R, heads, L, K)."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    bias = mx.where(mask, 0.0, HIDDEN)
    r, h, queries, keys = bias.shape
    if groups > 1 and h > 1:
        bias = mx.broadcast_to(bias, (r, h, length, keys)).reshape(r, h // groups, groups * length, keys)
    elif groups > 1 and queries > 1:
        bias = mx.tile(bias, (1, 1, groups, 1))
    return mx.swapaxes(bias, -1, -2)


def _attention(q: mx.array, k: mx.array, v: mx.array, scale: float, bias: mx.array | None) -> mx.array:
    """q (R, H, Q, d), k (R, H, K, d), v (R, H, K, e), bias (R or 1, H or 1, K, Q or 1) -> (R, H, Q, e).

    Scores are held transposed, (K, Q): maxima over keys, and their subtraction, then run along contiguous queries.
    """
    rows, heads, queries = q.shape[:3]
    cuts = list(_cuts(rows, heads, queries, k.shape[2]))
    by_key = bias is not None and bias.shape[-1] == 1  # such a bias is one more column of the product
    kept: list[tuple[mx.array, ...]] = []

    def part(x: mx.array, i: slice, j: slice) -> mx.array:
        return x[i if x.shape[0] > 1 else slice(None), j if x.shape[1] > 1 else slice(None)]

    @_fused
    def forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, list]:
        q = q * scale
        if by_key:
            q = mx.concatenate([q, mx.ones((*q.shape[:3], 1))], axis=-1)
            k = mx.concatenate([k, mx.broadcast_to(bias, (*k.shape[:3], 1))], axis=-1)
        else:
            q, k = mx.contiguous(q), mx.contiguous(k)
        v = mx.contiguous(v)
        parts = []
        for i, j, n in cuts:
            scores = k[i, j] @ mx.swapaxes(q[i, j, n], -1, -2)
            if bias is not None and not by_key:
                scores = scores + part(bias, i, j)[..., n]
            weights = _exp_minus(scores.max(axis=-2, keepdims=True) - scores)
            sums = mx.swapaxes(weights.sum(axis=-2, keepdims=True), -1, -2)
            parts.append((weights, sums, (mx.swapaxes(weights, -1, -2) @ v[i, j]) / sums))
        return _joined([out for _, _, out in parts], (rows, heads, queries, v.shape[-1])), parts

    @mx.custom_function
    def run(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        out, parts = forward(q, k, v)
        if rows * heads * queries * k.shape[2] <= KEPT:
            kept[:] = parts
        return out

    @run.vjp
    def backward(primals, dy, _):
        q, k, v = primals
        parts = kept or forward(q, k, v)[1]
        q, k = mx.contiguous(q), mx.contiguous(k)
        v = mx.concatenate([v, mx.ones((*v.shape[:3], 1))], axis=-1)
        dy = mx.contiguous(dy)
        dq, dk, dv = [], [], []
        for (i, j, n), (weights, sums, out) in zip(cuts, parts, strict=True):
            # With P the normalised weights: dS = P (dP - sum(P dP)) and sum(P dP) = sum(out dout), per query.
            dout = dy[i, j, n] / sums
            total = (dout * out) @ mx.ones((out.shape[-1], 1))
            dscores = weights * (v[i, j] @ mx.swapaxes(mx.concatenate([dout, -total], axis=-1) * scale, -1, -2))
            dq.append(mx.swapaxes(dscores, -1, -2) @ k[i, j])
            more_k, more_v = dscores @ q[i, j, n], weights @ dout
            if n.start:  # further queries of the same keys
                dk[-1], dv[-1] = dk[-1] + more_k, dv[-1] + more_v
            else:
                dk.append(more_k)
                dv.append(more_v)
        return _joined(dq, q.shape), _joined(dk, k.shape), _joined(dv, (*v.shape[:3], v.shape[-1] - 1))

    return run(q, k, v)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None) -> mx.array:
    """softmax(scale q k^T) v, as `mx.fast.scaled_dot_product_attention`.

    Args:
        q: (R, heads, L, d). k, v: (R, kv heads, L, d); every kv head serves heads / kv heads query heads.
        mask: bool, True = seen, broadcasts to (R, heads, L, L). A query that sees nothing gets an arbitrary state.

    Returns (R, heads, L, d). No gradient flows to the mask.
    """
    if _plain(q) or q.dtype != k.dtype or q.dtype != v.dtype or (mask is not None and mask.dtype != mx.bool_):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    rows, heads, length, d = q.shape
    groups = heads // k.shape[1]
    bias = None if mask is None else _bias_of(mask, groups, length)
    q = q.reshape(rows, heads // groups, groups * length, d)  # queries that share keys follow one another
    return _attention(q, k, v, scale, bias).reshape(rows, heads, length, v.shape[-1])
