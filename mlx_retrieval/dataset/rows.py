"""Rows of training data in files: `Rows` checks them once and reads them one by one.

Rows are JSON objects, one a line or in an array, or those of a table; row_files.py lists the formats of files:

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

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from mlx_retrieval.dataset import beir_rows, readings
from mlx_retrieval.dataset.columns import Columns
from mlx_retrieval.dataset.contents import Content
from mlx_retrieval.dataset.json_lines import RowError
from mlx_retrieval.dataset.reshuffled import Reshuffled
from mlx_retrieval.dataset.row_files import HUB, RowFile
from mlx_retrieval.dataset.row_formats import (
    ColumnsError,
    Example,
    KindError,
    common_parts,
    examples_of,
    parse,
)
from mlx_retrieval.dataset.row_mapper import RowMapper
from mlx_retrieval.dataset.row_store import RowStore
from mlx_retrieval.utils.errors import Place, SettingError, UserError

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")  # of a folder's files of rows, in this order
PART = re.compile(rf"-\d+-of-(\d+)(?:{'|'.join(map(re.escape, ENDINGS))})(?:\.gz)?$")


def find_files(sources: Sequence[str], split: str = "train") -> list[Path | str]:
    """Return the files that `--data` names: a file itself, a folder's `train.jsonl`, a BEIR folder, or an `hf://` name.

    A folder's file may have any of ENDINGS instead, `.gz` included, or be in parts, `train-00000-of-00002.parquet`,
    also in its folder `data`, as the Hub has them.
    """
    files: list[Path | str] = []
    for source in sources:
        if source.startswith(HUB):
            files.append(source)
            continue
        path = Path(source).expanduser()
        if path.is_dir():
            if existing := _inside(path, split):
                files += existing
            elif split == "train" and beir_rows.is_folder(path):
                files.append(path)
            else:
                raise UserError(f"--data {source}: the folder has no {split}.jsonl, .csv or .parquet")
        elif path.exists():  # pipes, too
            files.append(path)
        else:
            raise UserError(f"--data {source}: no such file or folder")
    return files


def _inside(folder: Path, split: str) -> list[Path]:
    """Return the file of rows of a split that a folder has, or all its parts. UserError if one is missing."""
    names = [f"{split}{ending}{packed}" for ending in ENDINGS for packed in ("", ".gz")]
    if existing := [folder / name for name in names if (folder / name).is_file()]:
        return existing[:1]
    for place in (folder, folder / "data"):
        parts = sorted(path for path in place.glob(f"{split}-*-of-*") if PART.search(path.name))
        if not parts:
            continue
        count = int(PART.search(parts[0].name)[1])
        if len(parts) != count:
            raise UserError(f"--data {folder}: {len(parts)} of {count} parts of {split} are there, as {parts[0].name}")
        return parts
    return []


def find_validation(sources: Sequence[str]) -> list[Path]:
    """Return the validation rows of those folders that `--data` names and that have a file of them, or its parts."""
    folders = [folder for source in sources if (folder := Path(source).expanduser()).is_dir()]
    return [file for folder in folders for file in _inside(folder, "valid") or _inside(folder, "validation")]


class Rows(Reshuffled):
    """A `sources.Source`: the examples of files. Texts stay on disk, only the place of each example is in memory.

    Args:
        files: see row_files.py.
        skip_bad: leave out rows that cannot be used; `skipped` lists them as "file:line: reason".
        ignore_keys: keys of rows that are treated as absent.
        columns: the columns that rows are made of, see columns.py; None = by their own names.
        check_columns: whether each of them must be in some row.
        store: where rows are read again, which several sources share; None = its own.

    Raises UserError with file, line and reason at the first bad row, or if no row is left.
    """

    def __init__(
        self,
        files: Sequence[Path | str],
        skip_bad: bool = False,
        ignore_keys: Collection[str] = (),
        columns: Columns | None = None,
        check_columns: bool = True,
        store: RowStore | None = None,
    ):
        self.files = list(files)
        self.ignore_keys = frozenset(ignore_keys)
        self.readings: list[str] = []
        self.skipped: list[str] = []
        self.ignored: Counter[str] = Counter()
        self.format: str | None = None
        self.has_negatives = False
        self.has_scores = True
        self.has_some_scores = False
        self.score_range = (0.0, 1.0)
        self.without_positive: Place | None = None
        self._contents: list[Content] = []
        self.constant: dict[str, str] | None = None
        store = store or RowStore()
        for file in self.files[1:]:  # what cannot be read is told before the rows of others are
            if isinstance(file, Path) and not file.is_dir():
                RowFile(file, columns).close()
        self._opened: list[RowFile] = []
        self.mapper = mapper = RowMapper(columns, ignore_keys)
        starts, sizes, numbers, counts, texts = array("Q"), array("I"), array("I"), [0], []
        for file in self.files:
            self._opened.append(opened := RowFile(file, columns, store))
            counter, mapper.used = readings.ReadingCounter(), False
            digest = self._check(opened, skip_bad, starts, sizes, numbers, mapper, counter)
            counts.append(len(starts))
            self._contents.append(Content(str(file), counts[-1] - counts[-2], "rows", digest))
            texts.append(counter.text(opened.form, opened.labels, opened.columns if mapper.used else None))
        self.readings = readings.lines([getattr(file, "name", file) for file in self.files], texts)
        if not starts:
            reason = ", only a header" if all(file.form.endswith(", header") for file in self._opened) else ""
            if self.skipped:
                reason = f"; the first that was left out: {self.skipped[0]}"
            files = [Place(file) for file in self.files]
            raise SettingError("{files}: no usable row{reason}", files=files, reason=reason)
        if check_columns:
            mapper.check()
        if len(starts) == 1:  # with which nothing is shared
            self.constant = {}
        self._last: tuple[tuple[int, int], list[Example]] | None = None  # file and start of the row read last
        # Views of the arrays: five million rows take 80 MB.
        self._starts, self._sizes, self._numbers = (np.frombuffer(a, a.typecode) for a in (starts, sizes, numbers))
        self._counts = np.array(counts)

    def _check(
        self,
        file: RowFile,
        skip_bad: bool,
        starts: array,
        sizes: array,
        numbers: array,
        mapper: RowMapper,
        counter: readings.ReadingCounter,
    ) -> str:
        """Check every row of a file, and note its place; return a hash of all rows."""
        digest = hashlib.sha256()
        for line in mapper.lines(file):
            digest.update(line.data)
            place = Place(file.name, line.number)
            try:
                examples, reading = examples_of(mapper.row(line.data, file.columns), self.format)
            except RowError as error:
                if not skip_bad:
                    way_on = " ({skip_bad_rows} leaves such rows out)"
                    if isinstance(error, ColumnsError):
                        way_on = " (if line 1 is a row: add a line of names)" if file.form.endswith(", header") else ""
                    elif isinstance(error, KindError) and file is not self._opened[0]:
                        way_on = " (rows of two kinds need a source each: `sources:` in a file of settings, --config)"
                    raise SettingError("{place}: {reason}" + way_on, place=place, reason=error) from error
                self.skipped.append(f"{place}: {error}")
                continue
            counter.add(reading)
            self.format = reading.kind
            if reading.ignored:
                self.ignored.update(reading.ignored)
            for example in examples:
                if self.constant != {}:
                    self.constant = common_parts(self.constant, example, self.format)
                self.has_negatives |= bool(example.negatives)
                self.has_scores &= bool(example.scores)
                self.has_some_scores |= bool(example.scores)
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
        # The examples of a row have its place, one after the other.
        first = self._counts[file] + np.searchsorted(self._starts[self._counts[file] : i + 1], self._starts[i])
        try:
            examples = self._examples(file, int(self._starts[i]), int(self._sizes[i]))
            if i - first < len(examples):
                return examples[i - first]
            error = "the row has fewer positives"
        except RowError as reason:
            error = reason
        raise UserError(f"{self.where(i)}: the file was changed during the run ({error})")

    def _examples(self, file: int, start: int, size: int) -> list[Example]:
        """Return the examples of a row. Those of the last one are kept: several are read one after the other."""
        last = self._last
        if last is None or last[0] != (file, start):
            opened = self._opened[file]
            examples = parse(opened.read(start, size), self.format, self.ignore_keys, opened.columns)[0]
            self._last = last = (file, start), examples
        return last[1]

    @property
    def names(self) -> list[str]:
        return list(map(str, self.files))

    def shuffled(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(np.arange(len(self), dtype=np.uint32))

    def preview(self, count: int) -> list[tuple[str, Example]]:
        """Return (place, example) of the first two rows and of others, spread evenly over the rest."""
        rest = np.linspace(2, len(self) - 1, max(0, min(count, len(self)) - 2), dtype=int).tolist()
        return [(self.where(i), self[i]) for i in [*range(min(count, len(self), 2)), *rest]]

    def contents(self) -> list[Content]:
        return self._contents

    def close(self) -> None:
        """Do nothing: nothing is read ahead."""

    def where(self, i: int) -> str:
        file = int(np.searchsorted(self._counts, i, side="right")) - 1
        return f"{self._opened[file].name}:{int(self._numbers[i])}"
