"""Rows of training data in files: `Rows` checks them once and reads them one by one.

Rows are JSON objects, one a line or in an array, in `.jsonl` or `.jsonl.gz` files or folders with `train.jsonl`:

    {"query": ..., "document": ..., "rank": 1}            rank is optional: 1 = best, weight 1 / log2(1 + rank)
    {"query": ..., "positive": ..., "negatives": [...]}   negatives are optional, a text or a list of texts
    {"anchor": ..., "positive": ..., "negative": ...}

row_formats.py lists the other names that keys may have. A row with several positives makes an example of each. `scores`
are a teacher's, of the positive and then the negatives, for distillation. A teacher may also have scored documents
without a known positive:

    {"query": ..., "documents": [...], "scores": [...]}

Rerankers also learn from single pairs, `{"query": ..., "document": ..., "label": 1}`, with a label from 0 to 1.

Every row is read and checked once, before training. After that only the places of the examples are kept in memory.
"""

import gzip
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlx_retrieval.dataset.contents import Content
from mlx_retrieval.dataset.json_lines import RowError, lines_of
from mlx_retrieval.dataset.row_formats import Example, common_parts, parse
from mlx_retrieval.utils.errors import Place, SettingError, UserError
from mlx_retrieval.utils.pipes import spooled

HUB = "hf://"


def find_files(sources: Sequence[str], split: str = "train") -> list[Path | str]:
    """Return the files that `--data` names: a file itself, a folder's `train.jsonl[.gz]`, or an `hf://` name."""
    files: list[Path | str] = []
    for source in sources:
        if source.startswith(HUB):
            files.append(source)
            continue
        path = Path(source).expanduser()
        if path.is_dir():
            inside = [path / f"{split}{ending}" for ending in (".jsonl", ".jsonl.gz")]
            if not (existing := [file for file in inside if file.is_file()]):
                raise UserError(f"--data {source}: the folder has no {split}.jsonl")
            files.append(existing[0])
        elif path.exists():  # pipes, too
            files.append(path)
        else:
            raise UserError(f"--data {source}: no such file or folder")
    return files


def find_validation(sources: Sequence[str]) -> list[Path]:
    """Return the `valid.jsonl[.gz]` of those folders that `--data` names and that have one."""
    folders = [Path(source).expanduser() for source in sources]
    names = ("valid.jsonl", "valid.jsonl.gz")
    return find_files([str(folder) for folder in folders if any((folder / name).is_file() for name in names)], "valid")


def open_rows(file: Path | str) -> BinaryIO:
    """Open rows as JSON lines: the file itself, or a temporary file with the rows of other formats. UserError."""
    if isinstance(file, str):
        return _as_json_lines(_hub_rows(file))
    if file.suffix == ".parquet":
        return _as_json_lines(_parquet_rows(file))
    try:
        file = spooled(file)
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


def _as_json_lines(rows: Iterable[dict]) -> BinaryIO:
    out = tempfile.TemporaryFile()
    for row in rows:
        out.write(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n")
    out.seek(0)
    return out


def _parquet_rows(file: Path) -> Iterator[dict]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(spooled(file)) as opened:
            for batch in opened.iter_batches(1000):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from error


def _hub_rows(source: str) -> Iterator[dict]:
    """Yield the rows of hf://owner/name[/config][:split] as the hub streams them."""
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
    """A `sources.Source`: the examples of files. Texts stay on disk, only the place of each example is in memory.

    Args:
        files: JSON lines, plain or `.gz`, Parquet, or `hf://` names. All but plain JSON lines are written once to a
            temporary file.
        skip_bad: leave out rows that cannot be used; `skipped` lists them as "file:line: reason".
        ignore_keys: keys of rows that are treated as absent.

    Raises UserError with file, line and reason at the first bad row, or if no row is left.
    """

    def __init__(self, files: Sequence[Path | str], skip_bad: bool = False, ignore_keys: Collection[str] = ()):
        self.files = list(files)
        self.ignore_keys = frozenset(ignore_keys)
        self.skipped: list[str] = []
        self.ignored: Counter[str] = Counter()
        self.format: str | None = None
        self.has_negatives = False
        self.has_scores = True
        self.score_range = (0.0, 1.0)
        self.without_positive: Place | None = None
        self._contents: list[Content] = []
        self.constant: dict[str, str] | None = None
        self._handles = [open_rows(file) for file in self.files]
        starts, sizes, numbers, counts = array("Q"), array("I"), array("I"), [0]
        for file, handle in zip(self.files, self._handles, strict=True):
            digest = self._check(file, handle, skip_bad, starts, sizes, numbers)
            counts.append(len(starts))
            self._contents.append(Content(str(file), counts[-1] - counts[-2], "rows", digest))
        if not starts:
            raise SettingError("{files}: no usable row", files=[Place(file) for file in self.files])
        if len(starts) == 1:  # with which nothing is shared
            self.constant = {}
        self._order: tuple[tuple[int, int], np.ndarray] | None = None
        # Views of the arrays: five million rows take 80 MB.
        self._starts, self._sizes, self._numbers = (np.frombuffer(a, a.typecode) for a in (starts, sizes, numbers))
        self._counts = np.array(counts)

    def _check(self, file: Path, handle, skip_bad: bool, starts: array, sizes: array, numbers: array) -> str:
        """Check every row of a file, and note its place; return a hash of all rows."""
        digest = hashlib.sha256()
        for line in lines_of(handle):
            digest.update(line.data)
            place = Place(file, line.number)
            try:
                examples, reading = parse(line.data, self.format, self.ignore_keys)
            except RowError as error:
                if not skip_bad:
                    raise SettingError(
                        "{place}: {reason} ({skip_bad_rows} leaves such rows out)", place=place, reason=error
                    ) from error
                self.skipped.append(f"{place}: {error}")
                continue
            self.format = reading.kind
            if reading.ignored:
                self.ignored.update(reading.ignored)
            for example in examples:
                if self.constant != {}:
                    self.constant = common_parts(self.constant, example, self.format)
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
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Example:
        file = int(np.searchsorted(self._counts, i, side="right")) - 1
        line = os.pread(self._handles[file].fileno(), int(self._sizes[i]), int(self._starts[i]))
        # The examples of a row have its place, one after the other.
        first = self._counts[file] + np.searchsorted(self._starts[self._counts[file] : i + 1], self._starts[i])
        try:
            examples = parse(line, self.format, self.ignore_keys)[0]
            if i - first < len(examples):
                return examples[i - first]
            error = "the row has fewer positives"
        except RowError as reason:
            error = reason
        raise UserError(f"{self.where(i)}: the file was changed during the run ({error})")

    @property
    def names(self) -> list[str]:
        return list(map(str, self.files))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return an epoch's permutation, (rows,) uint32. It depends on seed and epoch only."""
        if self._order is None or self._order[0] != (seed, epoch):
            permutation = np.random.default_rng([seed, epoch]).permutation(np.arange(len(self), dtype=np.uint32))
            self._order = (seed, epoch), permutation
        return self._order[1]

    def numbers(self, seed: int, position: int) -> Iterator[int]:
        for place in itertools.count(position):
            epoch, place_there = divmod(place, len(self))
            yield int(self.order(seed, epoch)[place_there])

    def preview(self, count: int) -> list[tuple[str, Example]]:
        """Return (place, example) of the first two rows and of others, spread evenly over the rest."""
        rest = np.linspace(2, len(self) - 1, max(0, min(count, len(self)) - 2), dtype=int).tolist()
        return [(self.where(i), self[i]) for i in [*range(min(count, len(self), 2)), *rest]]

    def cursor(self, position: int) -> dict:
        """Return {}: the order follows from the position alone."""
        return {}

    def restore(self, cursor: dict, position: int) -> None:
        """Do nothing: the order follows from the position alone."""

    def contents(self) -> list[Content]:
        return self._contents

    def close(self) -> None:
        """Do nothing: nothing is read ahead."""

    def where(self, i: int) -> str:
        file = int(np.searchsorted(self._counts, i, side="right")) - 1
        return f"{self.files[file]}:{int(self._numbers[i])}"
