"""What losses and models both do to vectors: neither may import the other."""

from mlx_retrieval.backend import mx


def unit(vectors: mx.array) -> mx.array:
    """Vectors (..., D) scaled to length 1 in float32; a zero vector stays zero, with a zero gradient."""
    vectors = vectors.astype(mx.float32)
    squared = vectors.square().sum(axis=-1, keepdims=True)
    # Not merely a floor under the length: that would multiply a zero vector's gradient by 1e12.
    return vectors * mx.where(squared > 1e-24, mx.rsqrt(mx.maximum(squared, 1e-24)), 0.0)
