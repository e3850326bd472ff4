"""Operations on vectors that both losses and models need; neither may import the other."""

from mlx_retrieval.backend import mx


def unit(vectors: mx.array) -> mx.array:
    """Return vectors (..., D) at unit length, in float32. A zero vector stays zero, with a zero gradient."""
    vectors = vectors.astype(mx.float32)
    squared = vectors.square().sum(axis=-1, keepdims=True)
    # A floor under the length alone would multiply a zero vector's gradient by 1e12.
    return vectors * mx.where(squared > 1e-24, mx.rsqrt(mx.maximum(squared, 1e-24)), 0.0)
