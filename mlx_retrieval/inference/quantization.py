"""Vectors as they are stored: cut to a Matryoshka dimension, in a byte a dimension, or in a bit.

    short = truncate(vectors, 256)                 # float32, 1,024 bytes a vector
    bounds = ranges(truncate(sample, 256))         # for int8: from a sample of the documents, kept for queries too
    stored = quantise(short, "int8", bounds)       # 256 bytes a vector; "binary": 32
    scores = query @ restore(stored, "int8", bounds).T

Names and bits are those of sentence-transformers' `quantize_embeddings`, so what either stores the other can search.
Truncation comes first: ranges and bits are those of the vectors that are left.
"""

import numpy as np

from mlx_retrieval.utils.errors import UserError

# What each is stored in. `binary` and `ubinary` pack eight dimensions into a number, the first into its highest bit.
PRECISIONS = {"float32": np.float32, "int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}
CALIBRATED = ("int8", "uint8")
FEWEST_TEXTS = 100  # that ranges are taken from without being asked for
CHUNK = 65_536  # vectors quantised at once, for the sake of memory


def truncate(vectors: np.ndarray, dimensions: int | None, normalize: bool = True) -> np.ndarray:
    """The first `dimensions` of vectors (N, D), scaled to unit length again if `normalize`; None: as they are."""
    if dimensions is None or dimensions == vectors.shape[-1]:
        return vectors
    short = vectors[..., :dimensions]
    if not normalize:
        return short
    return short / np.maximum(np.linalg.norm(short, axis=-1, keepdims=True), 1e-12)


def row_bytes(precision: str, dimensions: int) -> int:
    """Bytes of one stored vector."""
    bits = 1 if precision.endswith("binary") else 8 * np.dtype(PRECISIONS[precision]).itemsize
    return -(-dimensions * bits // 8)


def ranges(vectors: np.ndarray) -> np.ndarray:
    """(2, D) float32: the smallest and the largest value that each dimension of vectors (N, D) takes.

    Take them from documents, a few thousand where there are as many, and use them for everything that is compared.
    """
    if vectors.ndim != 2 or len(vectors) < 2:
        raise UserError(f"ranges need two vectors at least, as an array (N, D); this one is {vectors.shape}")
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32)


def check(precision: str, count: int, dimensions: int, bounds: np.ndarray | None) -> None:
    """UserError where `count` vectors of `dimensions` cannot be stored so, before anything is embedded."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown; known: {', '.join(PRECISIONS)}")
    if precision not in CALIBRATED:
        return
    if bounds is None:
        if count < FEWEST_TEXTS:
            raise UserError(
                f"precision {precision!r} needs the ranges of each dimension, and {count} texts are too few to take "
                f"them from (at least {FEWEST_TEXTS}). Queries and documents must share ranges: take them once from "
                "a sample of the documents, precision.ranges(model.encode(sample)), and give them as ranges="
            )
    elif np.shape(bounds) != (2, dimensions):
        raise UserError(
            f"ranges are {np.shape(bounds)}, but vectors of {dimensions} dimensions need (2, {dimensions}): they are "
            "taken after truncation, precision.ranges(model.encode(sample, dimensions=N))"
        )
    elif not (np.isfinite(bounds).all() and (bounds[0] <= bounds[1]).all()):
        raise UserError("ranges: not finite, or a smallest value above its largest")


def quantise(vectors: np.ndarray, precision: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """Vectors in the form in which they are stored.

    Args:
        vectors: (N, D) or (D,), of any float dtype.
        precision: "float32"; "int8", "uint8": each dimension's range cut into 255 equal steps, values beyond it put at
            its ends; "binary", "ubinary": a bit a dimension, set where the value is above 0.
        ranges: (2, D), for int8 and uint8; None takes those of the vectors themselves, of which there must be 100.

    Returns (N, D) float32, int8 (-128 = smallest) or uint8 (0 = smallest), or (N, ceil(D / 8)) int8 or uint8 for
    "binary" (each byte minus 128) and "ubinary"; where D is no multiple of 8, the last byte ends in zero bits.
    Raises UserError for a name or ranges that are wrong, and for vectors that are not finite: the loss would not show.
    """
    rows = vectors.reshape(-1, vectors.shape[-1])
    check(precision, len(rows), rows.shape[1], ranges)
    if not np.issubdtype(rows.dtype, np.floating):
        raise UserError(f"vectors to store are {rows.dtype}, not floating-point numbers: quantised already?")
    if precision == "float32":
        return vectors.astype(np.float32, copy=False)
    if broken := int((~np.isfinite(rows).all(axis=1)).sum()):
        raise UserError(f"{broken} of {len(rows)} vectors are not finite (python embed.py --check MODEL finds out why)")
    if precision in CALIBRATED:
        starts, steps = _steps(_own_ranges(rows) if ranges is None else ranges)
        steps = np.where(steps == 0, np.float32(1), steps)
    stored = np.empty((len(rows), row_bytes(precision, rows.shape[1])), np.uint8)
    for first in range(0, len(rows), CHUNK):
        part = rows[first : first + CHUNK]
        if precision in CALIBRATED:
            stored[first : first + CHUNK] = np.clip(np.floor((part - starts) / steps), 0, 255)
        else:
            stored[first : first + CHUNK] = np.packbits(part > 0, axis=1)
    return _signed(stored, precision).reshape(*vectors.shape[:-1], stored.shape[1])


def restore(
    stored: np.ndarray, precision: str, ranges: np.ndarray | None = None, dimensions: int | None = None
) -> np.ndarray:
    """(N, D) float32 whose dot products rank as the stored form does; not of unit length.

    int8, uint8: the middle of the step that the value fell into (its lower end would rank documents alike: the
    difference is the same for all of them). binary, ubinary: +1 and -1, so that the product of two is D minus twice
    their Hamming distance; `dimensions` tells D where it is no multiple of 8.
    """
    if precision == "float32":
        return stored
    levels = _signed(stored.view(np.uint8), precision).view(np.uint8)
    if precision in CALIBRATED:
        if ranges is None:
            raise UserError(f"precision {precision!r}: vectors are restored with the ranges that they were stored with")
        starts, steps = _steps(ranges)
        return starts + (levels + np.float32(0.5)) * steps
    return np.unpackbits(levels, axis=-1, count=dimensions).astype(np.float32) * 2 - 1


# --- evaluation of stored forms ---


# --- small things ---


def _own_ranges(vectors: np.ndarray) -> np.ndarray:  # `quantise` has an argument of the name
    return ranges(vectors)


def _steps(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(D,) float32 each: where a dimension's range starts, and the 255th part of it."""
    bounds = np.asarray(bounds, np.float32)
    return bounds[0], (bounds[1] - bounds[0]) / 255


def _signed(levels: np.ndarray, precision: str) -> np.ndarray:
    """Bytes 0..255 as the precision's dtype: for int8, 128 less, which is the highest bit turned over (and back)."""
    dtype = np.dtype(PRECISIONS[precision])
    return (levels ^ 0x80).view(np.int8) if dtype == np.int8 else levels
