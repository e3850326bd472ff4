"""A folder of finished work, so that a mining run that was killed continues where it was.

.mined.jsonl.work/        beside --output mined.jsonl, removed when that is written; or --work FOLDER, which stays
  about.json              fingerprints of texts and models, and the settings
  vectors.f32             vectors of the documents so far, float32, one after another
  tokens                  late interaction: the token vectors of the documents so far, see token_store.py
  block-000012.npz        the results of one block of queries or rows

    python -m pytest tests/mining/test_mining_run.py -k resume
"""

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlx_retrieval.mining.collection import TextFile
from mlx_retrieval.retrieval.lance_errors import is_of_system
from mlx_retrieval.retrieval.late_interaction import MEMORY_BITS
from mlx_retrieval.retrieval.token_store import TokenStore
from mlx_retrieval.utils import files, locks
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.outputs import entries
from mlx_retrieval.utils.progress import Progress

ABOUT, VECTORS, TOKENS, LOCK, VERSION = "about.json", "vectors.f32", "tokens", ".lock", 1
BLOCK = re.compile(r"block-\d{6,}\.npz")
OURS = (LOCK, f".{ABOUT}.new")
DOCUMENTS_AT_ONCE = 2_048  # embedded between two writes; a kill loses no more


class ResumableCache:
    """Finished vectors and blocks in a folder. `open` discards those of other texts, models or settings."""

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self, fingerprints: dict[str, Any], for_vectors: Sequence[str] = ()) -> tuple[bool, list[str]]:
        """Return whether an earlier run used the folder, and which fingerprints have changed since.

        Args:
            fingerprints: everything that decides the results: hashes and settings.
            for_vectors: names of those that the documents' vectors depend on.

        Raises UserError if the folder holds other files.
        """
        fingerprints = json.loads(json.dumps(fingerprints | {"version": VERSION}))
        about = self.folder / ABOUT
        try:
            before = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else None
        except ValueError:
            before = {}
        foreign = [name for name in entries(self.folder) if name not in OURS]
        if before == {}:  # cut off, beside the work that it is about
            foreign = [name for name in foreign if name not in (ABOUT, VECTORS, TOKENS) and not BLOCK.fullmatch(name)]
        if foreign and not (isinstance(before, dict) and "version" in before):
            raise UserError(f"{self.folder}: holds other files than those of an earlier run of mine.py")
        changed = [name for name in fingerprints if (before or {}).get(name) != fingerprints[name]]
        if {*for_vectors, "version"} & {*changed}:
            (self.folder / VECTORS).unlink(missing_ok=True)
            shutil.rmtree(self.folder / TOKENS, ignore_errors=True)
        if changed:
            for path in self.folder.glob("block-*.npz"):
                path.unlink()
        _write(about, lambda file: file.write(json.dumps(fingerprints, indent=2).encode()))
        return before is not None, changed

    def vectors(
        self,
        documents: TextFile,
        dimensions: int,
        encode: Callable[[list[str]], np.ndarray],
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Return the vectors of all documents, (D, d) float32 mapped from disk. Only missing ones are computed."""
        path, row = self.folder / VECTORS, 4 * dimensions
        with open(path, "ab") as file:
            # Whole lots only: texts of one lot are padded together, which shows in a vector's last digits.
            done = min(file.tell() // row, len(documents))
            done = done if done == len(documents) else done - done % DOCUMENTS_AT_ONCE
            file.truncate(done * row)
            for first in range(done, len(documents), DOCUMENTS_AT_ONCE):
                if progress:
                    progress(first, len(documents))
                last = min(first + DOCUMENTS_AT_ONCE, len(documents))
                vectors = np.ascontiguousarray(encode(documents.read(range(first, last))), np.float32)
                with files.naming(path):
                    file.write(vectors)
                    file.flush()
                    files.flush(file.fileno())
        return np.memmap(path, np.float32, "r", shape=(len(documents), dimensions))

    def tokens(
        self,
        documents: TextFile,
        encode: Callable[[list[str]], list[np.ndarray]],
        progress: Progress | None = None,
    ) -> TokenStore:
        """Return the token vectors of all documents, by their numbers as slots. Only missing ones are computed.

        Raises UserError if those that are there are damaged.
        """
        store, count = TokenStore(self.folder / TOKENS, MEMORY_BITS), len(documents)
        try:
            store.check()
        except (OSError, ValueError) as error:
            advice = f"; remove {store.folder}, and its vectors are computed again"
            raise UserError(f"{error}{advice * (not is_of_system(error))}") from error
        for first in range(store.count, count, DOCUMENTS_AT_ONCE):
            if progress:
                progress(first, count)
            store.add(encode(documents.read(range(first, min(first + DOCUMENTS_AT_ONCE, count)))))
        store.finish(np.arange(count))
        return store

    def block(self, number: int, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """Return the arrays of a finished block; None if it is missing or broken."""
        try:
            with np.load(self._path(number), allow_pickle=False) as arrays:
                return {name: arrays[name] for name in names}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def store(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        """Write the arrays of a finished block."""
        _write(self._path(number), lambda file: np.savez(file, **arrays))

    @property
    def blocks(self) -> int:
        """The number of finished blocks."""
        return len(list(self.folder.glob("block-*.npz")))

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:06}.npz"


def _write(path: Path, fill: Callable[[Any], Any]) -> None:
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        fill(file)


@contextmanager
def cache_folder(output: Path, folder: str | None) -> Iterator[ResumableCache]:
    """Lock the cache of a run for this process: `folder`, or one beside `output` that is removed after success.

    Raises UserError if another process holds it, or if it is not a folder.
    """
    path = Path(folder).expanduser() if folder else output.with_name(f".{output.name}.work")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: not a folder")
    is_new = not path.exists()
    with locks.only_one(path / LOCK, f"{path}: another process is mining there"):
        finished = False
        try:
            yield ResumableCache(path)
            finished = True
        finally:
            if not folder and (finished or (is_new and not (path / ABOUT).exists())):  # or nothing was begun
                shutil.rmtree(path, ignore_errors=True)
