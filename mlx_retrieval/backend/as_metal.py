"""Compute on a CPU as a Mac does, so that the path of Macs can be tested on any machine. A mode for tests.

    MLX_RETRIEVAL_AS=metal MLX_RETRIEVAL_MEMORY=8 python train.py --dry-run

It covers the choices of `backend`, the memory that a Mac reports, and matrix products in half precision: Metal's
kernels add them up in float32 and round once, and so does the BLAS here. For that, gradients keep float32 copies of the
factors: up to twice a Mac's memory is measured. It shows neither Metal's speed nor its limits of time, nor sums in
bfloat16, which Metal adds up in bfloat16.
"""

import os
from collections.abc import Callable

import mlx.core as mx

GIB = 1 << 30
MEMORY = 16  # GiB, unless MLX_RETRIEVAL_MEMORY says otherwise
# Metal's recommended working set: 5,461 MiB on Macs of 8 GiB, 10,923 of 16, 21,845 of 32 and 49,152 of 64, as llama.cpp
# prints it (its issues 5207, 2011 and 1870).
WORKING_SET, WORKING_SET_LARGE, LARGE = 2 / 3, 3 / 4, 36
LARGEST_BUFFER = 0.56  # of the memory
HALF = (mx.bfloat16, mx.float16)
PRODUCTS = ("matmul", "addmm", "quantized_matmul", "gather_mm", "gather_qmm", "block_masked_mm", "segmented_mm")


def working_set(memory: int) -> int:
    """Return the bytes that Metal recommends to use at most, of a Mac with `memory` bytes."""
    return int(memory * (WORKING_SET if memory < LARGE * GIB else WORKING_SET_LARGE))


def memory() -> int:
    """Return the bytes of memory that MLX_RETRIEVAL_MEMORY says, in GiB. ValueError if it is no such number."""
    given = os.environ.get("MLX_RETRIEVAL_MEMORY") or str(MEMORY)
    try:
        size = int(float(given) * GIB)
    except (ValueError, OverflowError):  # OverflowError: infinite
        size = 0
    if size <= 0:
        raise ValueError(f"MLX_RETRIEVAL_MEMORY={given}: not a number of GB above 0, such as 8")
    return size


def device_info() -> dict[str, str | int]:
    """Return what `mx.device_info` reports on a Mac with MLX_RETRIEVAL_MEMORY GiB."""
    size = memory()
    return {
        "device_name": "Apple M (emulated)",
        "architecture": "applegpu_g14g",
        "memory_size": size,
        "max_recommended_working_set_size": working_set(size),
        "max_buffer_length": int(size * LARGEST_BUFFER),
        "resource_limit": 499_000,
    }


def rounding_once(product: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return the product that computes factors of one half-precision dtype in float32, and rounds its result to it."""

    def function(*args, **kwargs) -> mx.array:
        arrays = [value for value in (*args, *kwargs.values()) if isinstance(value, mx.array)]
        dtypes = {value.dtype for value in arrays if mx.issubdtype(value.dtype, mx.floating)}
        if len(dtypes) != 1 or not dtypes.issubset(HALF):
            return product(*args, **kwargs)
        args = [_widened(value) for value in args]
        kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return product(*args, **kwargs).astype(dtypes.pop())

    return function


def _widened(value: object) -> object:
    return value.astype(mx.float32) if isinstance(value, mx.array) and value.dtype in HALF else value


def attention(attend: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return attention in half precision as Metal's kernels for training compute it; `attend`'s for all other dtypes.

    Scores are rounded once, softmax is computed in float32 and rounded, and so are the weighted sums.
    """

    def function(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask=None, sinks=None, **kwargs) -> mx.array:
        if not (q.dtype == k.dtype == v.dtype and q.dtype in HALF) or sinks is not None:
            return attend(q, k, v, scale=scale, mask=mask, sinks=sinks, **kwargs)
        rows, heads, queries, d = q.shape
        kv_heads, keys = k.shape[1:3]
        grouped = (rows, kv_heads, heads // kv_heads)
        q = (q * mx.array(scale, q.dtype)).reshape(*grouped, queries, d)
        scores = mx.matmul(q, mx.swapaxes(k, -1, -2)[:, :, None])
        if isinstance(mask, str):
            mask = mx.tri(queries, keys, keys - queries, mx.bool_)
        if mask is not None:
            mask = mx.broadcast_to(mask, (rows, heads, queries, keys)).reshape(*grouped, queries, keys)
            least = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
            scores = mx.where(mask, scores, least) if mask.dtype == mx.bool_ else scores + mask.astype(scores.dtype)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return mx.matmul(weights, v[:, :, None]).reshape(rows, heads, queries, -1)

    return function


def install(replace: Callable[[object, str, object], None] = setattr) -> None:
    """Let mlx's products in half precision round once. `replace` is called as `setattr` is, for every function."""
    for name in PRODUCTS:
        replace(mx, name, rounding_once(getattr(mx, name)))
    operator = mx.array.__matmul__
    # Python's own types expect NotImplemented, and not an error, from an operator that does not know the other side.
    replace(mx.array, "__matmul__", lambda a, b: mx.matmul(a, b) if isinstance(b, mx.array) else operator(a, b))
    replace(mx.fast, "scaled_dot_product_attention", attention(mx.fast.scaled_dot_product_attention))
