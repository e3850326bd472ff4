"""The token vectors of an index on disk, for late interaction: a folder of segments, memory-mapped by searches.

    store = TokenStore(Path(".index/tokens"), bits=2)
    slots = store.add(vectors)                      # a number for each document, which its row in the index keeps
    store.finish(live)                              # the slots that rows still have
    index, slots = store.open("mean", impute=0)     # a LateIndex, and the slots of its documents

000012/          a segment: slots.npy, lengths.npy, and vectors.npy (float16) or centroids.npy and codes.npy
codebook.npz     once there are enough tokens to learn from; segments are written as codes from then on

A segment is written in one piece before the rows that name its slots, and is never changed but for being put in codes.
A kill at any moment leaves at worst slots without a row, which `finish` removes.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_retrieval.retrieval import residual_codes
from mlx_retrieval.retrieval.late_interaction import LateIndex
from mlx_retrieval.retrieval.residual_codes import Codebook
from mlx_retrieval.retrieval.token_vectors import TokenVectors
from mlx_retrieval.utils import files

CODEBOOK = "codebook.npz"
CODED_FROM = 1 << 17  # tokens; fewer stay as they are, and all are compared
SAMPLE = 1 << 19  # tokens from which a codebook is learnt, at most
SEGMENTS = 8  # more of them are merged
GARBAGE = 0.2  # share of tokens without a row from which on segments are merged
MAPPED_FROM = 1 << 16  # bytes of a file
DOCUMENTS_AT_ONCE = 10_000
TRIES = 3  # to open segments that another process merges meanwhile


class Segment:
    """A folder of documents: their slots, which ascend, and their token vectors.

    Raises OSError or ValueError if it is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            arrays = {path.stem: _read(path) for path in sorted(folder.glob("*.npy"))}
            self.slots = arrays.pop("slots")
            self.tokens = TokenVectors(**arrays)
            counts = {len(array) for name, array in self.tokens.arrays.items() if name != "lengths"}
        except (EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: damaged ({error})") from error
        if counts != {int(self.tokens.lengths.sum())} or len(self.slots) != len(self.tokens.lengths):
            raise ValueError(f"{folder}: damaged (its files do not belong together)")

    @classmethod
    def write(cls, folder: Path, slots: np.ndarray, tokens: TokenVectors) -> None:
        """Write a segment in one piece, in place of one of that name."""

        def fill(where: Path) -> None:
            for name, array in {"slots": slots, **tokens.arrays}.items():
                np.save(where / f"{name}.npy", array)

        files.write_folder(folder, fill)


class TokenStore:
    """The token vectors of an index.

    Args:
        folder: it need not exist.
        bits: of a dimension in codes, one of residual_codes.BITS.
    """

    def __init__(self, folder: Path, bits: int):
        self.folder, self.bits = folder, bits

    @property
    def codebook(self) -> Codebook | None:
        """The codebook, if there is one. Raises ValueError if it is lost: another one would decode other vectors."""
        return self._codebook(self.segments())

    def _codebook(self, segments: Sequence[Segment]) -> Codebook | None:
        path = self.folder / CODEBOOK
        if path.exists():
            return Codebook.load(path)
        if any(segment.tokens.is_coded for segment in segments):
            raise ValueError(f"{path} is missing, and token vectors are stored as its codes")
        return None

    def check(self) -> None:
        """Raise OSError or ValueError if a file is damaged or lost."""
        self._codebook(self.segments())

    @property
    def count(self) -> int:
        """The number of documents, garbage included."""
        return sum(len(segment.slots) for segment in self.segments())

    def segments(self) -> list[Segment]:
        """Return all segments, the oldest first."""
        return [Segment(path) for path in sorted(self.folder.glob("[0-9]*"))]

    def add(self, vectors: Sequence[np.ndarray]) -> np.ndarray:
        """Store documents, (L_i, d) float32 each. Return their slots, int64."""
        segments = self.segments()
        codebook = self._codebook(segments)
        first = max((int(segment.slots[-1]) + 1 for segment in segments), default=0)
        slots = np.arange(first, first + len(vectors))
        tokens = TokenVectors.of(vectors, np.float16)
        Segment.write(self._next(segments), slots, tokens.coded(codebook) if codebook else tokens)
        if not codebook and _whole_tokens(segments) + len(tokens.vectors) >= SAMPLE:
            self._encode()
        return slots

    def finish(self, live: np.ndarray) -> None:
        """Put vectors into codes if there are enough, and merge segments if they are many, or hold much garbage.

        `live`: the slots that are needed.
        """
        for gone in self.folder.glob(".*.gone"):
            shutil.rmtree(gone, ignore_errors=True)
        if self.codebook or _whole_tokens(self.segments()) >= CODED_FROM:
            self._encode()
        segments = self.segments()
        pairs = [(segment, np.flatnonzero(np.isin(segment.slots, live))) for segment in segments]
        tokens = sum(int(segment.tokens.lengths.sum()) for segment in segments)
        needed = sum(int(segment.tokens.lengths[numbers].sum()) for segment, numbers in pairs)
        slots = np.concatenate([np.empty(0, np.int64), *(segment.slots for segment in segments)])
        was_killed = len(np.unique(slots)) < len(slots)  # while the segments of a merge were removed
        if len(segments) > SEGMENTS or needed < (1 - GARBAGE) * tokens or was_killed:
            self._merge(segments, live)

    def open(self, reduction: str, impute: int) -> tuple[LateIndex, np.ndarray]:
        """Return a search among all documents, garbage included, and the slot of each; see `LateIndex`.

        Raises ValueError or OSError if there are none, or a file is damaged.
        """
        for attempt in range(TRIES):
            try:
                segments = self.segments()
                codebook = self._codebook(segments)  # after them: it is written before the first codes
                break
            except (FileNotFoundError, ValueError):  # perhaps merged by another process in between
                if attempt == TRIES - 1:
                    raise
        if not segments:
            raise ValueError(f"{self.folder} holds no token vectors")
        index = LateIndex([segment.tokens for segment in segments], reduction, impute, codebook)
        return index, np.concatenate([segment.slots for segment in segments])

    def _encode(self) -> None:
        """Put all vectors into codes; a codebook is learnt first, if there is none."""
        whole = [segment for segment in self.segments() if not segment.tokens.is_coded]
        if not whole:
            return
        codebook = self.codebook
        if codebook is None:
            vectors = np.concatenate([segment.tokens.vectors for segment in whole]).astype(np.float32)
            codebook = residual_codes.train(vectors[:SAMPLE], self.bits)
            codebook.save(self.folder / CODEBOOK)
            codebook = self.codebook
        for segment in whole:
            Segment.write(segment.folder, segment.slots, segment.tokens.coded(codebook))

    def _merge(self, segments: Sequence[Segment], live: np.ndarray) -> None:
        """Write one segment of all documents that are needed, and remove the others."""
        pairs, wanted = [], live
        for segment in segments:
            numbers = np.flatnonzero(np.isin(segment.slots, wanted))
            wanted = np.setdiff1d(wanted, segment.slots)
            if len(numbers):
                pairs.append((segment, numbers))
        if pairs:

            def fill(where: Path) -> None:
                parts = [(segment.slots[numbers], segment.tokens.lengths[numbers]) for segment, numbers in pairs]
                for name, arrays in zip(("slots", "lengths"), zip(*parts, strict=True), strict=True):
                    np.save(where / f"{name}.npy", np.concatenate(arrays))
                for name in pairs[0][0].tokens.arrays.keys() - {"lengths"}:
                    _copy(where / f"{name}.npy", name, pairs)

            files.write_folder(self._next(segments), fill)
        for segment in segments:
            _remove(segment.folder)

    def _next(self, segments: Sequence[Segment]) -> Path:
        last = max((int(segment.folder.name) for segment in segments), default=0)
        return self.folder / f"{last + 1:06}"


def _copy(path: Path, name: str, pairs: Sequence[tuple[Segment, np.ndarray]]) -> None:
    """Write an array of some documents of segments, one segment after another, without holding it in memory."""
    count = sum(int(segment.tokens.lengths[numbers].sum()) for segment, numbers in pairs)
    like = pairs[0][0].tokens.arrays[name]
    if not count:  # which cannot be mapped
        np.save(path, like[:0])
        return
    target = np.lib.format.open_memmap(path, "w+", like.dtype, (count, *like.shape[1:]))
    first = 0
    for segment, numbers in pairs:
        for some in np.array_split(numbers, -(-len(numbers) // DOCUMENTS_AT_ONCE)):
            part = segment.tokens.take(some).arrays[name]
            target[first : first + len(part)] = part
            first += len(part)
    target.flush()


def _remove(folder: Path) -> None:
    """Remove a segment; a kill leaves the whole of it, or nothing that counts as one."""
    gone = folder.with_name(f".{folder.name}.gone")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _whole_tokens(segments: Sequence[Segment]) -> int:
    """Return the number of vectors that are not codes."""
    return sum(len(segment.tokens.vectors) for segment in segments if not segment.tokens.is_coded)


def _read(path: Path) -> np.ndarray:
    """Return an array, mapped from disk unless it is small. Raises OSError or ValueError if it is damaged."""
    return np.load(path, mmap_mode="r" if path.stat().st_size >= MAPPED_FROM else None, allow_pickle=False)
