"""A file of vectors that are found by their texts: a teacher's, to learn from, or a guide's.

    write(Path("teacher.safetensors"), keys, vectors, {"model": "my-teacher", "fingerprint": "..."})
    vectors = TextVectors(Path("teacher.safetensors"))
    vectors.of(keys)                                     # (N, D) float32

The file is safetensors: `vectors` (T, D) float32, and `keys` (T,) int64, the `text_keys.vector_key` of each text
and its prompt. Vectors stay on disk and are mapped; keys take 16 bytes a text in memory.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_retrieval.backbones.hub import tensor_table
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

ENDING = ".safetensors"
ROWS_AT_ONCE = 16_384  # written together
KEYS, VECTORS = "keys", "vectors"


def write(path: Path, keys: Sequence[int], vectors: np.ndarray, about: dict[str, str], name: str = "") -> None:
    """Write a file of vectors, all or nothing; SaveError if it cannot be written.

    Args:
        keys: T of them, each once.
        vectors: (T, D) float32; they may be mapped from disk.
        about: the model that the vectors are from, and its fingerprint.
        name: what an error calls the file.
    """
    keys = np.asarray(keys, "<i8")
    middle, end = keys.nbytes, keys.nbytes + 4 * vectors.size
    header = {
        "__metadata__": about,
        KEYS: {"dtype": "I64", "shape": [len(keys)], "data_offsets": [0, middle]},
        VECTORS: {"dtype": "F32", "shape": [*vectors.shape], "data_offsets": [middle, end]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that numbers begin at multiples of 8 bytes
    with files.replacing(path, name) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + keys.tobytes())
        for first in range(0, len(vectors), ROWS_AT_ONCE):
            file.write(np.ascontiguousarray(vectors[first : first + ROWS_AT_ONCE], "<f4").data)


class TextVectors:
    """The vectors of a file that `write` wrote. UserError for any other file.

    Attributes:
        about: the model that they are from, and its fingerprint.
        dimensions: D, the length of a vector.
    """

    def __init__(self, path: Path):
        self.path = path
        table = tensor_table(path)
        try:
            keys, vectors = table[KEYS], table[VECTORS]
            count, self.dimensions = vectors["shape"]
            right = (keys["dtype"], keys["shape"], vectors["dtype"]) == ("I64", [count], "F32")
        except (KeyError, ValueError):
            right = False
        if not right:
            raise UserError(f"{path}: no file of vectors of texts, as mine.py score --vectors writes it")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.about: dict[str, str] = json.loads(file.read(length)).get("__metadata__", {})
        start, _ = keys["data_offsets"]
        stored = np.fromfile(path, "<i8", count, offset=8 + length + start)
        self._places = np.argsort(stored, kind="stable")
        self._keys = stored[self._places]
        start, _ = vectors["data_offsets"]
        shape = (count, self.dimensions)
        self._vectors = np.memmap(path, "<f4", "r", 8 + length + start, shape) if count else np.empty(shape, np.float32)

    def __len__(self) -> int:
        return len(self._keys)

    def _found(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(self):
            return np.zeros(len(keys), int), np.zeros(len(keys), bool)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        return places, self._keys[places] == keys

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Return whether there is a vector of each key: (N,) int64 -> (N,) bool."""
        return self._found(keys)[1]

    def of(self, keys: np.ndarray) -> np.ndarray:
        """Return the vectors (N, D) of the keys (N,) int64. UserError if one is missing."""
        places, there = self._found(keys)
        if not there.all():
            raise UserError(f"{self.path}: no vector of {int((~there).sum())} of {len(keys)} texts of a batch")
        return self._vectors[self._places[places]]
