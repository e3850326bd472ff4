"""The token vectors of documents, stored one after another: as they are, or as codes of a codebook."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_retrieval.retrieval.residual_codes import Codebook

RELEASED_FROM = 1 << 27  # bytes of a file


@dataclass(frozen=True)
class TokenVectors:
    """Documents and the vectors of their tokens, in memory or mapped from disk.

    Args:
        lengths: (N,) tokens of each document.
        vectors: (T, d) float16 or float32; None = there are codes.
        centroids, codes: (T,) uint16 and (T, m) uint8, see `Codebook`.
    """

    lengths: np.ndarray
    vectors: np.ndarray | None = None
    centroids: np.ndarray | None = None
    codes: np.ndarray | None = None

    @classmethod
    def of(cls, vectors: Sequence[np.ndarray], dtype: np.dtype = np.float32) -> "TokenVectors":
        """Return the vectors (L_i, d) of documents, as they are."""
        return cls(
            np.array([len(each) for each in vectors], np.int64), np.concatenate(vectors).astype(dtype, copy=False)
        )

    @property
    def is_coded(self) -> bool:
        """Whether they are stored as codes."""
        return self.vectors is None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that there are, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    def coded(self, codebook: Codebook) -> "TokenVectors":
        """Return the same documents as codes."""
        centroids, codes = codebook.encode(self.vectors)
        return TokenVectors(self.lengths, None, centroids, codes)

    def take(self, numbers: np.ndarray, of: np.ndarray | None = None) -> "TokenVectors":
        """Return some documents, by their numbers (n,). `of`: (C,) bool, the centroids whose tokens are taken."""
        lengths = self.lengths[numbers]
        places = spans((np.cumsum(self.lengths) - self.lengths)[numbers], lengths)
        if of is not None:
            taken = of[self.centroids[places]]
            counts = np.concatenate([[0], np.cumsum(taken)])
            ends = np.cumsum(lengths)
            places, lengths = places[taken], counts[ends] - counts[ends - lengths]
        tokens = {name: array[places] for name, array in self.arrays.items() if name != "lengths"}
        return TokenVectors(lengths, **tokens)

    def release(self) -> None:
        """Give back the memory of what was read from disk, if that could be much; the system still has it cached."""
        for array in self.arrays.values():
            if isinstance(array, np.memmap) and array.nbytes >= RELEASED_FROM and hasattr(mmap, "MADV_DONTNEED"):
                array._mmap.madvise(mmap.MADV_DONTNEED)

    def decoded(self, codebook: Codebook | None) -> np.ndarray:
        """Return the vectors of all tokens, (T, d) float32 or as they are stored."""
        return codebook.decode(self.centroids, self.codes) if self.is_coded else self.vectors


def spans(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the numbers firsts[0], firsts[0] + 1, ... of every span, one span after another."""
    return np.repeat(firsts - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))
