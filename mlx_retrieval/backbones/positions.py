"""How positions enter attention: as a bias that depends on the distance of two tokens, or by rotation."""

import math
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.backend import mx, nn

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.utils.errors import UserError

# --- distances --------------------------------------------------------------------------------------------------------


def buckets(distances: np.ndarray, count: int, farthest: int) -> np.ndarray:
    """Return the bucket of every distance (key's position - query's): int64 of the same shape, from 0 to count - 1.

    T5's and MPNet's. Half of the buckets are for keys to the right. Within each half, the first buckets hold one
    distance each, the others ranges that grow logarithmically; the last range has no end. Computed in float32, as the
    models were trained.
    """
    half = count // 2
    exact = half // 2
    steps = np.abs(distances)
    growth = np.log(np.maximum(steps, 1).astype(np.float32) / exact) / math.log(farthest / exact) * (half - exact)
    ranges = np.minimum(exact + growth.astype(np.int64), half - 1)
    return np.where(distances > 0, half, 0) + np.where(steps < exact, steps, ranges)


def bucket_bias(table: nn.Embedding, length: int, count: int, farthest: int) -> mx.array:
    """Return the bias (heads, L, L) of the score of a query (rows) and a key (columns), by their distance's bucket.

    Args:
        table: (count, heads), the bias of each bucket.
        count, farthest: see `buckets`.
    """
    biases = table(mx.array(buckets(np.arange(1 - length, length), count, farthest)))
    positions = mx.arange(length)
    return biases.T[:, positions - positions[:, None] + (length - 1)]


def hide_padding(bias: mx.array, real: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return a bias of scores (R, heads, L, L) in `dtype` that also masks padding, as attention takes one of the two.

    Args:
        bias: broadcasts to (R, heads, L, L).
        real: (R, L) bool, True for tokens that are not padding.
    """
    return mx.where(real[:, None, None, :], bias.astype(dtype), mx.finfo(dtype).min)


def biased_attention(
    q: mx.array, k: mx.array, v: mx.array, bias: mx.array, scale: float = 1.0, differentiable: bool = False
) -> mx.array:
    """Return softmax(scale q k^T + bias) v.

    Args:
        q, k, v: (R, heads, L, d).
        bias: (R, heads, L, L) in their dtype.
        differentiable: whether the bias needs a gradient, which mlx's kernel for CUDA does not give.
    """
    if differentiable and backend.IS_CUDA:
        return mx.softmax((scale * q) @ k.swapaxes(-1, -2) + bias, axis=-1, precise=True) @ v
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=bias)


def signed_buckets(distances: np.ndarray, count: int, farthest: int) -> np.ndarray:
    """Return DeBERTa's bucket of every distance (query's position - key's): int64, from -count + 1 to count - 1.

    Distances up to count / 2 are their own buckets; others share buckets that grow logarithmically, up to the distance
    farthest - 1. He et al. 2021 (arXiv 2111.09543). Without a count or a farthest, all are their own.
    """
    if count <= 0 or farthest <= 0:
        return distances
    middle = count // 2
    near = np.abs(distances) < middle
    steps = np.where(near, middle - 1, np.abs(distances)).astype(np.float32)
    growth = np.log(steps / np.float32(middle)) / np.log(np.float32((farthest - 1) / middle)) * np.float32(middle - 1)
    far = np.ceil(growth) + middle
    return np.where(steps <= middle, distances, far * np.sign(distances)).astype(np.int64)


def skewed(scores: mx.array) -> mx.array:
    """Return (..., L, L) with [i, j] = scores[i, j - i + L - 1], of scores (..., L, 2L): one column a distance j - i.

    The last column is not used. No index is gathered: a row that begins one number later is one place on.
    """
    *rest, length, width = scores.shape
    flat = scores.reshape(*rest, length * width)[..., length - 1 : length - 1 + length * (width - 1)]
    return flat.reshape(*rest, length, width - 1)[..., :length]


# --- rotary positions -------------------------------------------------------------------------------------------------


class Rope(NamedTuple):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): x (R, heads, L, d) -> the same, rotated.

    Attributes:
        base: of the frequencies.
        scale: factor of all frequencies.
    """

    base: float
    scale: float = 1.0

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=self.base, scale=self.scale, offset=0)


def rope_of(folder: Path, config: dict, width: int, base: float) -> Rope:
    """Return the rotary positions that a config describes, under the names of old and of new versions.

    Args:
        folder: for messages.
        width: d, of a head.
        base: the family's own, for a config without one.

    Raises UserError for a scaling other than "linear" and "ntk".
    """
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for place in (config, settings):
        base = place.get("rope_theta") or base
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return Rope(base)
    factor = settings.get("factor", 1.0)
    if kind == "linear":
        return Rope(base, 1 / factor)
    if kind == "ntk" and settings.get("mixed_b") is None:  # of GTE's `new`: kexue.fm/archives/9706, equation 6
        return Rope(base * factor, factor ** (-2 / width))
    raise UserError(f"{folder / 'config.json'}: rotary positions of type {kind!r} are not supported here")
