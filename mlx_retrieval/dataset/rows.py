"""Rows of text on disk, checked once: what a row may be, and `Rows`, which reads them one by one.

Rows are JSON objects, one a line, in `.jsonl` or `.jsonl.gz` files or folders with `train.jsonl`:

    {"query": ..., "document": ..., "rank": 1}            rank is optional: 1 = best, weight 1 / log2(1 + rank)
    {"query": ..., "positive": ..., "negatives": [...]}   negatives are optional
    {"anchor": ..., "positive": ..., "negative": ...}

`negative` and `negatives`, a text or a list of texts, are understood in all of them. `scores`, of the positive and then
the negatives, are a teacher's, for distillation; it may also have ranked any documents:

    {"query": ..., "documents": [...], "scores": [...]}

Rerankers also learn from single pairs, `{"query": ..., "document": ..., "label": 1}`, a label being from 0 to 1.

Every row is read and checked once before training; after that only its place in the file is kept in memory.
"""

import gzip
import itertools
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlx_retrieval.dataset.json_lines import RowError, lines_of
from mlx_retrieval.dataset.row_formats import Example, parse
from mlx_retrieval.utils.errors import UserError

HUB = "hf://"


def find_files(sources: Sequence[str], split: str = "train") -> list[Path | str]:
    """The files that `--data` names: files themselves, `train.jsonl[.gz]` of a folder, or a name of the hub's."""
    files: list[Path | str] = []
    for source in sources:
        if source.startswith(HUB):
            files.append(source)
            continue
        path = Path(source).expanduser()
        if path.is_dir():
            inside = [path / f"{split}{ending}" for ending in (".jsonl", ".jsonl.gz")]
            if not (found := [file for file in inside if file.is_file()]):
                raise UserError(f"--data {source}: the folder has no {split}.jsonl")
            files.append(found[0])
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"--data {source}: no such file or folder")
    return files


def find_validation(sources: Sequence[str]) -> list[Path]:
    """The `valid.jsonl[.gz]` of the folders that `--data` names; none is no mistake."""
    folders = [Path(source).expanduser() for source in sources]
    names = ("valid.jsonl", "valid.jsonl.gz")
    return find_files([str(folder) for folder in folders if any((folder / name).is_file() for name in names)], "valid")


def open_rows(file: Path | str) -> BinaryIO:
    """Rows as JSON lines: a file itself, or a temporary one with what is packed or stored otherwise. UserError."""
    if isinstance(file, str):
        return _written_out(_of_hub(file))
    if file.suffix == ".parquet":
        return _written_out(_of_parquet(file))
    try:
        if file.suffix != ".gz":
            return open(file, "rb")
        unpacked = tempfile.TemporaryFile()
        with gzip.open(file, "rb") as packed:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not a whole gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
    unpacked.seek(0)
    return unpacked


def _written_out(rows: Iterable[dict]) -> BinaryIO:
    out = tempfile.TemporaryFile()
    for row in rows:
        out.write(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n")
    out.seek(0)
    return out


def _of_parquet(file: Path) -> Iterator[dict]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(1000):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from error


def _of_hub(source: str) -> Iterator[dict]:
    """The rows of hf://owner/name[/config][:split], as they come from the hub."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, split = source.removeprefix(HUB).partition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise UserError(f"--data {source}: a data set's name is needed, hf://owner/name[/config][:split]")
    try:
        stored = load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True)
        yield from stored
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--data {source}: {str(error).strip().splitlines()[0][:300]}") from error


class Rows:
    """The checked rows of some files: `len(rows)`, `rows[i]`; texts stay on disk.

    Args:
        files: JSON lines, gzip-compressed where the name ends in `.gz`, Parquet, or names of the hub's (these three are
            written out once to a temporary file).
        skip_bad: leave out rows that cannot be used; they are in `skipped`, as "file:line: reason".

    Raises UserError with file, line and reason at the first bad row, or where no row is left.
    """

    def __init__(self, files: Sequence[Path | str], skip_bad: bool = False):
        self.files = list(files)
        self.skipped: list[str] = []
        self.kind: str | None = None
        self.has_negatives = False
        self.has_scores = True  # all of them
        self.score_range = (0.0, 1.0)  # lowest and highest score or label
        self.without_positive = ""  # place of the first row whose scores are all 0 or less
        self._handles = [open_rows(file) for file in self.files]
        starts, sizes, numbers, counts = array("Q"), array("I"), array("I"), [0]
        for file, handle in zip(self.files, self._handles, strict=True):
            self._check(file, handle, skip_bad, starts, sizes, numbers)
            counts.append(len(starts))
        if not starts:
            raise UserError(f"{', '.join(map(str, self.files))}: no usable row")
        self._order: tuple[tuple[int, int], np.ndarray] | None = None
        # Views on the arrays: five million rows take 80 MB, their texts nothing.
        self._starts, self._sizes, self._numbers = (np.frombuffer(a, a.typecode) for a in (starts, sizes, numbers))
        self._counts = np.array(counts)

    def _check(self, file: Path, handle, skip_bad: bool, starts: array, sizes: array, numbers: array) -> None:
        for line in lines_of(handle):
            place = f"{file}:{line.number}"
            try:
                example, self.kind = parse(line.data, self.kind)
            except RowError as error:
                if not skip_bad:
                    raise UserError(f"{place}: {error} (--skip-bad-rows leaves such rows out)") from error
                self.skipped.append(f"{place}: {error}")
                continue
            self.has_negatives |= bool(example.negatives)
            self.has_scores &= bool(example.scores)
            if example.scores:
                low, high = self.score_range
                self.score_range = min(low, *example.scores), max(high, *example.scores)
                if max(example.scores) <= 0 and not self.without_positive:
                    self.without_positive = place
            starts.append(line.start)
            sizes.append(line.size)
            numbers.append(line.number)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Example:
        file = int(np.searchsorted(self._counts, i, side="right")) - 1
        line = os.pread(self._handles[file].fileno(), int(self._sizes[i]), int(self._starts[i]))
        try:
            return parse(line, self.kind)[0]
        except RowError as error:
            raise UserError(f"{self.where(i)}: the file was changed during the run ({error})") from error

    @property
    def names(self) -> list[str]:
        """Where the rows come from, for messages."""
        return list(map(str, self.files))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """(rows,) uint32: an epoch's permutation, which depends on seed and epoch only."""
        if self._order is None or self._order[0] != (seed, epoch):
            permutation = np.random.default_rng([seed, epoch]).permutation(np.arange(len(self), dtype=np.uint32))
            self._order = (seed, epoch), permutation
        return self._order[1]

    def numbers(self, seed: int, position: int) -> Iterator[int]:
        """The endless sequence of row numbers, epoch after epoch, from a position on."""
        for place in itertools.count(position):
            epoch, place_there = divmod(place, len(self))
            yield int(self.order(seed, epoch)[place_there])

    def cursor(self, position: int) -> dict:
        """What `restore` needs besides the position: nothing, all follows from that."""
        return {}

    def restore(self, cursor: dict, position: int) -> None:
        """Go on as the process did that gave the cursor."""

    def close(self) -> None:
        """Nothing is read ahead here."""

    def where(self, i: int) -> str:
        """The row's place as file:line."""
        file = int(np.searchsorted(self._counts, i, side="right")) - 1
        return f"{self.files[file]}:{int(self._numbers[i])}"
