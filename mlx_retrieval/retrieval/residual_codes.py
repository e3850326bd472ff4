"""Store token vectors in few bits: the number of the nearest centroid, and codes of what remains of the vector.

    codebook = train(sample, bits=2)
    centroids, codes = codebook.encode(vectors)     # (T,) uint16, (T, m) uint8
    codebook.decode(centroids, codes)               # (T, d) float32

Residuals over centroids are those of ColBERTv2 (Santhanam et al. 2022, arXiv 2112.01488). It rounds every dimension of
a residual by itself; here a byte stands for 8 / bits dimensions together, of which the 256 most typical values are
learnt: product quantisation (Jégou et al. 2011), which loses less in as many bits. Decoded vectors get back their unit
length: means are shorter than what they stand for, and the more so the farther it lies from its centroid.
"""

import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mlx_retrieval.backend import mx
from mlx_retrieval.backend.device_errors import halved

import numpy as np

from mlx_retrieval.utils import files

BITS = (1, 2, 4, 8)  # of a dimension
VALUES = 256  # of a byte
MOST_CENTROIDS = 1 << 12  # each costs time in learning and in encoding every token
TOKENS_OF_A_CENTROID = 32  # in the sample, at least
ITERATIONS, CODE_ITERATIONS = 4, 12
CODE_SAMPLE = 1 << 16  # residuals from which the values of a byte are learnt
SIMILARITIES_AT_ONCE = 1 << 24  # 64 MB
SHORTEST = 0.1  # decoded vectors are not scaled as if they were shorter: those of zeros stay near zero


@dataclass(frozen=True)
class Codebook:
    """The centroids, and the values that a byte of a code stands for.

    Args:
        centroids: (C, d) float32, at most 65,536.
        values: (m, 256, s) float32; byte i of a code stands for dimensions i * s to (i + 1) * s - 1 of the residual.
            The last ones may lie beyond d, and are 0.
    """

    centroids: np.ndarray
    values: np.ndarray

    @cached_property
    def directions(self) -> np.ndarray:
        """The centroids with unit length, as the vectors around them have: (C, d)."""
        return self.centroids / np.maximum(np.linalg.norm(self.centroids, axis=1, keepdims=True), SHORTEST)

    @property
    def token_bytes(self) -> int:
        """The bytes of a stored token."""
        return 2 + len(self.values)

    def encode(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the centroids (T,) uint16 and codes (T, m) uint8 of vectors (T, d)."""
        nearest = assign(vectors, self.centroids).astype(np.uint16)
        residuals = _parts(vectors - self.centroids[nearest], self.values)
        return nearest, np.stack(
            [assign(part, values).astype(np.uint8) for part, values in zip(residuals, self.values, strict=True)], axis=1
        )

    def decode(self, centroids: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return the vectors (T, d) float32, of unit length, that centroids (T,) and codes (T, m) stand for."""
        m, _, size = self.values.shape
        table = self.values.reshape(m * VALUES, size)
        residuals = table.take(codes + np.arange(0, m * VALUES, VALUES, dtype=np.int32), axis=0)  # (T, m, s)
        vectors = self.centroids.take(centroids, axis=0)
        vectors += residuals.reshape(len(codes), m * size)[:, : vectors.shape[1]]
        lengths = np.sqrt(np.einsum("td,td->t", vectors, vectors))
        vectors /= np.maximum(lengths, SHORTEST)[:, None]
        return vectors

    def save(self, path: Path) -> None:
        """Write the codebook atomically, its centroids in float16."""
        with files.replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, centroids=self.centroids.astype(np.float16), values=self.values)

    @classmethod
    def load(cls, path: Path) -> "Codebook":
        """Read a codebook. Raises OSError or ValueError if the file is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(arrays["centroids"].astype(np.float32), arrays["values"])
        except (zipfile.BadZipFile, EOFError, KeyError) as error:
            raise ValueError(f"{path}: damaged ({error})") from error


def train(sample: np.ndarray, bits: int, seed: int = 0) -> Codebook:
    """Learn a codebook of `bits` bits a dimension, one of BITS, from a sample of token vectors (T, d) float32."""
    rng = np.random.default_rng(seed)
    count = 1 << int(np.log2(max(1, min(MOST_CENTROIDS, len(sample) // TOKENS_OF_A_CENTROID))))
    centroids = k_means(sample, count, ITERATIONS, rng).astype(np.float16).astype(np.float32)  # as they are stored
    chosen = sample[rng.permutation(len(sample))[:CODE_SAMPLE]]
    return Codebook(centroids, train_values(chosen - centroids[assign(chosen, centroids)], bits, rng))


def train_values(residuals: np.ndarray, bits: int, rng: np.random.Generator) -> np.ndarray:
    """Learn the values (m, 256, s) float32 of bytes from residuals (T, d)."""
    size = 8 // bits
    shape = np.empty((-(-residuals.shape[1] // size), VALUES, size), np.float32)
    return np.stack([k_means(part, VALUES, CODE_ITERATIONS, rng) for part in _parts(residuals, shape)])


def k_means(points: np.ndarray, count: int, iterations: int, rng: np.random.Generator) -> np.ndarray:
    """Return `count` means (count, d) float32 of points (n, d), by Lloyd's algorithm; an empty one moves to a point."""
    means = points[rng.choice(len(points), count, replace=len(points) < count)].astype(np.float32)
    for _ in range(iterations):
        nearest = assign(points, means)
        order = np.argsort(nearest, kind="stable")
        sizes = np.bincount(nearest, minlength=count)
        filled = sizes > 0
        starts = (np.cumsum(sizes) - sizes)[filled]
        means[filled] = np.add.reduceat(points[order], starts, axis=0) / sizes[filled, None]
        means[~filled] = points[rng.choice(len(points), count - filled.sum())]
    return means


def assign(points: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Return (n,) int64: the number of the mean (C, d) nearest to each point (n, d), by Euclidean distance."""
    block = max(1, SIMILARITIES_AT_ONCE // len(means))
    device_means, half = mx.array(means).T, mx.array((means**2).sum(axis=1) / 2)

    def nearest(first: int, last: int) -> np.ndarray:
        return np.array((mx.array(points[first:last], mx.float32) @ device_means - half).argmax(axis=1))

    firsts = range(0, len(points), block)
    parts = [part for first in firsts for part in halved(nearest, first, min(first + block, len(points)))]
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def _parts(residuals: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return residuals (T, d) cut as `values` (m, 256, s) are: (m, T, s), with zeros beyond d."""
    m, _, size = values.shape
    padded = np.zeros((len(residuals), m * size), np.float32)
    padded[:, : residuals.shape[1]] = residuals
    return np.ascontiguousarray(padded.reshape(-1, m, size).swapaxes(0, 1))
