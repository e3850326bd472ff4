"""Half precision in tests. On GPUs a model computes in its checkpoint's dtype, and in MLX_RETRIEVAL_AS=metal as well.

assert_same(states, expected, 2e-5)
"""

from mlx_retrieval.backend import mx

import numpy as np

# How far a vector may be from another, as a share of its length. Random models of four layers magnify one rounding
# some ten times.
SHARES = {mx.bfloat16: 0.15, mx.float16: 0.02}


def to_numpy(array: mx.array) -> np.ndarray:
    """Return an array for numpy, which knows no bfloat16: half precision as float32, without a loss."""
    return np.array(array.astype(mx.float32) if array.dtype in SHARES else array)


def assert_same(actual: mx.array, expected: mx.array, atol: float) -> None:
    """Assert that two arrays (..., D) are the same up to the rounding of their dtype.

    Args:
        atol: largest difference of float32 numbers; 0 = none in any dtype. Else, in half precision, each vector
            counts as a whole: see SHARES.
    """
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    actual, expected, share = to_numpy(actual), to_numpy(expected), SHARES.get(actual.dtype)
    if share is None or atol == 0:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
    else:
        distances = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert distances.max() <= share
