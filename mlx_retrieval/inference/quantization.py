"""Store vectors in less space: truncated to fewer dimensions (Matryoshka), in a byte a dimension, or in a bit.

    short = truncate(vectors, 256)                 # float32, 1,024 bytes a vector
    bounds = ranges(truncate(sample, 256))         # for int8: from a sample of the documents, and used for queries too
    stored = quantise(short, "int8", bounds)       # 256 bytes a vector; "binary": 32
    scores = query @ restore(stored, "int8", bounds).T

Names and bits are those of sentence-transformers' `quantize_embeddings`, so each library can search what the other
stored. Truncate first: ranges and bits are those of the truncated vectors.
"""

import numpy as np

from mlx_retrieval.utils.errors import UserError

# The dtype of each. `binary` and `ubinary` pack eight dimensions into a number, the first into its highest bit.
PRECISIONS = {"float32": np.float32, "int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}
CALIBRATED = ("int8", "uint8")
FEWEST_TEXTS = 100  # fewest texts that ranges can be taken from
CHUNK = 65_536  # vectors quantised at once, to save memory


def truncate(vectors: np.ndarray, dimensions: int | None, normalize: bool = True) -> np.ndarray:
    """Return the first `dimensions` of vectors (N, D), scaled to unit length again if `normalize`; None = all."""
    if dimensions is None or dimensions == vectors.shape[-1]:
        return vectors
    short = vectors[..., :dimensions]
    return scaled_to_unit(short) if normalize else short


def scaled_to_unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (..., D) scaled to unit length; a vector of zeros stays one."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def row_bytes(precision: str, dimensions: int) -> int:
    """Return the bytes of one stored vector."""
    bits = 1 if precision.endswith("binary") else 8 * np.dtype(PRECISIONS[precision]).itemsize
    return -(-dimensions * bits // 8)


def ranges(vectors: np.ndarray) -> np.ndarray:
    """Return (2, D) float32: the smallest and the largest value of each dimension of vectors (N, D).

    Take them from a few thousand documents if possible, and use them for all vectors that are compared.
    """
    if vectors.ndim != 2 or len(vectors) < 2:
        raise UserError(f"ranges need an array (N, D) of at least two vectors; this one is {vectors.shape}")
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32)


def check(precision: str, count: int, dimensions: int, bounds: np.ndarray | None) -> None:
    """Raise UserError if `count` vectors of `dimensions` cannot be stored in this precision with these ranges."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown; known: {', '.join(PRECISIONS)}")
    if precision not in CALIBRATED:
        return
    if bounds is None:
        if count < FEWEST_TEXTS:
            raise UserError(
                f"precision {precision!r} needs the ranges of each dimension, and {count} texts are too few to take "
                f"them from (at least {FEWEST_TEXTS}). Queries and documents must share ranges: take them once from "
                "a sample of the documents, quantization.ranges(model.encode(sample)), and pass them as ranges="
            )
    elif np.shape(bounds) != (2, dimensions):
        raise UserError(
            f"ranges are {np.shape(bounds)}, but vectors of {dimensions} dimensions need (2, {dimensions}): they are "
            "taken after truncation, quantization.ranges(model.encode(sample, dimensions=N))"
        )
    elif not (np.isfinite(bounds).all() and (bounds[0] <= bounds[1]).all()):
        raise UserError("ranges: not finite, or a smallest value above its largest")


def quantise(vectors: np.ndarray, precision: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """Return vectors in the form in which they are stored.

    Args:
        vectors: (N, D) or (D,), of any float dtype.
        precision: "float32"; "int8" or "uint8": each dimension's range is divided into 255 equal steps, and values
            beyond it are clipped; "binary" or "ubinary": a bit a dimension, set if the value is above 0.
        ranges: (2, D), for int8 and uint8; None = those of the vectors themselves, at least 100.

    Returns (N, D) float32, int8 (-128 = smallest) or uint8 (0 = smallest), or (N, ceil(D / 8)) int8 or uint8 for
    "binary" (each byte minus 128) and "ubinary"; if D is no multiple of 8, the last byte ends in zero bits.
    Raises UserError for an unknown precision, for wrong ranges, and for vectors that are not finite, as that could no
    longer be seen afterwards.
    """
    rows = vectors.reshape(-1, vectors.shape[-1])
    check(precision, len(rows), rows.shape[1], ranges)
    if not np.issubdtype(rows.dtype, np.floating):
        raise UserError(f"vectors to store are {rows.dtype}, not floating-point numbers: already quantised?")
    if precision == "float32":
        return vectors.astype(np.float32, copy=False)
    if count := int((~np.isfinite(rows).all(axis=1)).sum()):
        raise UserError(f"{count} of {len(rows)} vectors are not finite (python embed.py --check MODEL finds out why)")
    if precision in CALIBRATED:
        starts, steps = _steps(_own_ranges(rows) if ranges is None else ranges)
        steps = np.where(steps == 0, np.float32(1), steps)
    stored = np.empty((len(rows), row_bytes(precision, rows.shape[1])), np.uint8)
    for first in range(0, len(rows), CHUNK):
        chunk = rows[first : first + CHUNK]
        if precision in CALIBRATED:
            stored[first : first + CHUNK] = np.clip(np.floor((chunk - starts) / steps), 0, 255)
        else:
            stored[first : first + CHUNK] = np.packbits(chunk > 0, axis=1)
    return _signed(stored, precision).reshape(*vectors.shape[:-1], stored.shape[1])


def restore(
    stored: np.ndarray, precision: str, ranges: np.ndarray | None = None, dimensions: int | None = None
) -> np.ndarray:
    """Return (N, D) float32 vectors whose dot products rank as the stored form does; they are not of unit length.

    int8 and uint8 give the middle of each step (its lower end would give the same ranking, as it differs by the same
    amount for all documents). binary and ubinary give +1 and -1, so that the dot product of two vectors is D minus
    twice their Hamming distance.

    Args:
        ranges: (2, D), as given to `quantise`; only for int8 and uint8.
        dimensions: D, needed for binary and ubinary if it is no multiple of 8.
    """
    if precision == "float32":
        return stored
    levels = _signed(stored.view(np.uint8), precision).view(np.uint8)
    if precision in CALIBRATED:
        if ranges is None:
            raise UserError(
                f"precision {precision!r}: vectors can only be restored with the ranges that they were stored with"
            )
        starts, steps = _steps(ranges)
        return starts + (levels + np.float32(0.5)) * steps
    return np.unpackbits(levels, axis=-1, count=dimensions).astype(np.float32) * 2 - 1


# --- small things ---


def _own_ranges(vectors: np.ndarray) -> np.ndarray:  # `quantise` has an argument of the name
    return ranges(vectors)


def _steps(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the start of each dimension's range, and 1/255 of its width: (D,) float32 each."""
    bounds = np.asarray(bounds, np.float32)
    return bounds[0], (bounds[1] - bounds[0]) / 255


def _signed(levels: np.ndarray, precision: str) -> np.ndarray:
    """Return bytes 0..255 in the precision's dtype: int8 is 128 less, which flips the highest bit (and back)."""
    dtype = np.dtype(PRECISIONS[precision])
    return (levels ^ 0x80).view(np.int8) if dtype == np.int8 else levels
