"""Matrix products of NumPy, without its false warnings on Macs."""

import numpy as np


def product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return `first @ second`.

    On an M4, Apple's BLAS leaves the processor's flags set, so that NumPy warns of divisions by zero, overflows and
    invalid values that did not happen (numpy#28687). Results that are not finite are found where they are used.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return first @ second
