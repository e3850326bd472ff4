"""Attention, activations and linear layers with adapters, in forms that are fast on CPUs. On GPUs they are mlx's own.

On CPUs, mlx computes softmax and tanh one number at a time. Here they are written in multiplications, additions and
exponentials, which `mx.compile` fuses into loops that g++ vectorises (see `backend.KERNELS`). Results are equal up to
float32 rounding.
"""

import math

from mlx_retrieval.backend import mx, nn

from mlx_retrieval import backend

HIDDEN = -1e30  # score of a masked key


def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None = None, *, real: mx.array = None
) -> mx.array:
    """Return softmax(scale q k^T) v, as `mx.fast.scaled_dot_product_attention` does.

    Args:
        q: (R, heads, Q, d). k, v: (R, kv heads, K, d); heads / kv heads query heads share a kv head.
        mask: bool, True = seen, broadcasts to (R, heads, Q, K); or "causal". A query that sees nothing gets an
            arbitrary finite state.
        real: (R, K) bool, instead of `mask`: True for keys that are not padding. The first key of every row is real.

    Returns (R, heads, Q, d). No gradient flows to the mask.
    """
    written_out = backend.FUSED and q.dtype == k.dtype == v.dtype == mx.float32
    if not written_out or (isinstance(mask, mx.array) and mask.dtype != mx.bool_):
        mask = real[:, None, None, :] if real is not None else mask
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    rows, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    seen = None
    if mask is not None:
        seen = mx.tri(queries, keys, keys - queries, mx.bool_) if isinstance(mask, str) else mask
        seen = _transposed(seen, kv_heads, heads // kv_heads, queries)
    one = mx.ones((1, 1, 1, 1))
    if real is not None:
        # Padding becomes a copy of the first key, so that no maximum changes, with a value and a count of zero.
        real = real[:, None, :, None]
        k, v, one = mx.where(real, k, k[:, :, :1]), mx.where(real, v, 0.0), real.astype(mx.float32)
    v = mx.concatenate([v, mx.broadcast_to(one, (rows, kv_heads, keys, 1))], axis=-1)
    q = mx.contiguous(q.reshape(rows, kv_heads, heads // kv_heads * queries, d))
    out = _weighted_sums(scale, seen)(q, mx.contiguous(k), v)[0]  # the last column is the sum of weights
    return (out[..., :-1] / out[..., -1:]).reshape(rows, heads, queries, -1)


def _weighted_sums(scale: float, seen: mx.array | None) -> mx.custom_function:
    """Return a function from (q, k, v) to the weighted sums of values, not normalised, and the weights.

    Scores, weights and their gradients are (keys, queries): kernels then read them in the order in which they lie in
    memory, in both passes.
    """

    @mx.custom_function
    def sums(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        scores = k @ mx.swapaxes(q, -1, -2)
        if seen is not None:
            scores = mx.where(seen, scores, HIDDEN)
        weights = mx.exp(scale * (scores - scores.max(axis=-2, keepdims=True)))
        return mx.swapaxes(weights, -1, -2) @ v, weights

    @sums.vjp
    def sums_vjp(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple:
        (q, k, v), slopes, weights = primals, mx.contiguous(cotangents[0]), outputs[1]
        scores = scale * (weights * (v @ mx.swapaxes(slopes, -1, -2)))
        if seen is not None:  # a query that sees nothing gives all keys equal weight, whatever their scores
            scores = mx.where(seen, scores, 0.0)
        return mx.swapaxes(scores, -1, -2) @ k, scores @ q, weights @ slopes

    return sums


def _transposed(mask: mx.array, kv_heads: int, group: int, queries: int) -> mx.array:
    """Turn a mask that broadcasts to (R, heads, Q, K) into one that broadcasts to (R, kv heads, K, group * Q)."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    r, h, _, keys = mask.shape
    mask = mx.broadcast_to(mask, (r, h, queries, keys))
    if h > 1:
        mask = mask.reshape(r, kv_heads, group * queries, keys)
    elif group > 1:
        mask = mx.tile(mask, (1, 1, group, 1))
    return mx.contiguous(mx.swapaxes(mask, -1, -2))


class Linear(nn.Linear):
    """A linear layer whose bias is added apart from the product where functions are fused: (..., in) to (..., out).

    mlx otherwise copies the bias to every row before the product, a twelfth of the time of embedding; added afterwards,
    it is fused with what follows.
    """

    _products = None  # who computes the product, or has kept it: see saved_products.py

    def __call__(self, x: mx.array) -> mx.array:
        if not backend.FUSED:
            return super().__call__(x)
        product = x @ self.weight.T if self._products is None else self._products.trained(x, self.weight)
        return product + self.bias if "bias" in self else product


def gelu_tanh(x: mx.array) -> mx.array:
    """Return the tanh form of gelu (`gelu_new`, `gelu_pytorch_tanh`), by 0.5 (1 + tanh u) = sigmoid(2u). Any shape."""
    if not backend.FUSED:
        return nn.gelu_approx(x)
    c = 2 * math.sqrt(2 / math.pi)
    return x * mx.sigmoid(x * (c + (0.044715 * c) * (x * x)))


# The encoders' activations, by the names of Hugging Face's configs.
ACTIVATIONS = {
    "gelu": nn.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": mx.tanh,
}


@mx.custom_function
def merged_linear(x: mx.array, merged: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """Return x merged^T, for x (..., in) and a linear layer whose weight contains its adapter.

    Args:
        merged: (out, in), the base's weight + (a b)^T; its gradient is zero.
        a, b: (in, r) and (r, out), the adapter (b with its scale); their gradients are those of x a b.
    """
    return x @ merged.T


@mx.custom_function
def saved_linear(x: mx.array, merged: mx.array, a: mx.array, b: mx.array, product: mx.array) -> mx.array:
    """Return `product` (..., out), an earlier result of `merged_linear`, with the gradient of `merged_linear`."""
    return product


def _merged_linear_vjp(primals: tuple, cotangent: mx.array, _) -> tuple:
    x, merged, a, b, *product = primals
    rows, slopes = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    constant = (mx.zeros_like(array) for array in (merged, *product))
    return cotangent @ merged, next(constant), rows.T @ (slopes @ b.T), (rows @ a).T @ slopes, *constant


merged_linear.vjp(_merged_linear_vjp)
saved_linear.vjp(_merged_linear_vjp)


@mx.custom_function
def trained_linear(x: mx.array, weight: mx.array) -> mx.array:
    """Return x weight^T, for x (..., in) and a weight (out, in), with the gradient of `saved_trained_linear`."""
    return x @ weight.T


@mx.custom_function
def saved_trained_linear(x: mx.array, weight: mx.array, product: mx.array) -> mx.array:
    """Return `product` (..., out), an earlier result of `trained_linear`, with the gradient of `trained_linear`."""
    return product


def _trained_linear_vjp(primals: tuple, cotangent: mx.array, _) -> tuple:
    x, weight, *product = primals
    slopes = cotangent.reshape(-1, cotangent.shape[-1])
    return cotangent @ weight, slopes.T @ x.reshape(-1, x.shape[-1]), *map(mx.zeros_like, product)


trained_linear.vjp(_trained_linear_vjp)
saved_trained_linear.vjp(_trained_linear_vjp)
