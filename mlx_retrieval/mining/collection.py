"""Read the rows and the corpus that negatives are mined from; keep every distinct text on disk.

python mine.py negatives --data pairs.jsonl --corpus corpus.jsonl --model M --output mined.jsonl

A text is in memory only while it is used. About 200 bytes a document stay in memory while files are read, most of them
for a hash that recognises duplicates.
"""

import hashlib
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_retrieval.dataset.columns import Columns
from mlx_retrieval.dataset.json_lines import RowError
from mlx_retrieval.dataset.row_files import RowFile
from mlx_retrieval.dataset.row_formats import ColumnsError, Example, Reading, examples_of, own_row, reading_for
from mlx_retrieval.dataset.row_mapper import RowMapper
from mlx_retrieval.dataset.text_files import read_text_rows, read_texts
from mlx_retrieval.utils.errors import Place, UserError
from mlx_retrieval.utils.files import naming
from mlx_retrieval.utils.pipes import is_pipe

MINED = ("pair",)  # kinds of rows that negatives are mined for
SCORED = (*MINED, "documents")  # ... and that a teacher scores


# --- rows -------------------------------------------------------------------------------------------------------------


def read_rows(
    files: Sequence[Path],
    kinds: Sequence[str] | None,
    skipped: list[str] | None = None,
    ignored: Counter[str] | None = None,
    ignore_keys: Sequence[str] = (),
    columns: Columns | None = None,
) -> Iterator[tuple[dict[str, Any], Example]]:
    """Yield (its row as a JSON object, example) of every example, in order. Scores in the rows are not checked.

    Args:
        kinds: the kinds of rows that are accepted, see row_formats; None = all, and rows may differ in kind.
        skipped: takes "file:line: reason" of bad rows; None = a bad row raises UserError.
        ignored: counts the keys that are not read.
        ignore_keys: keys that are treated as absent, and left out of the yielded rows.
        columns: the columns that rows are made of, see dataset/columns.py.
    """
    expected, mapper = None, RowMapper(columns, ignore_keys)
    for file in files:
        with RowFile(file, columns) as opened:
            for line in mapper.lines(opened):
                try:
                    row = mapper.row(line.data, opened.columns)
                    examples, reading = _examples(row, kinds, expected)
                except RowError as error:
                    if skipped is None:
                        where = f"{opened.name}:{line.number}: {error}"
                        way_on = "" if isinstance(error, ColumnsError) else " (--skip-bad-rows leaves such rows out)"
                        raise UserError(f"{where}{way_on}") from error
                    skipped.append(f"{opened.name}:{line.number}: {error}")
                    continue
                expected = reading.kind if kinds else None
                if ignored is not None:
                    ignored.update(reading.ignored)
                for example in examples:
                    yield own_row(row, reading, example), example
    mapper.check()


def place_of(
    text: str,
    files: Sequence[Path],
    corpus: Path | None = None,
    field: str | None = None,
    ignore_keys: Sequence[str] = (),
    columns: Columns | None = None,
) -> Place | None:
    """Return the first line of the corpus or of the files of rows that has this text; None if there is none."""
    if corpus:
        for row in read_text_rows(corpus, field):
            if row.text == text:
                return Place(corpus, row.line)
    mapper = RowMapper(columns, ignore_keys)
    for file in files:
        with RowFile(file, columns) as opened:
            for line in mapper.lines(opened):
                with suppress(RowError):  # rows that are left out
                    examples, _ = _examples(mapper.row(line.data, opened.columns), SCORED, None)
                    if any(text in (example.query, example.positive, *example.negatives) for example in examples):
                        return Place(opened.name, line.number)
    return None


def _examples(row: dict[str, Any], kinds: Sequence[str] | None, expected: str | None) -> tuple[list[Example], Reading]:
    """Return the examples of a row as if it had no scores, and how it was read. RowError."""
    reading = reading_for(row, expected)
    if kinds and reading.kind not in kinds:
        raise RowError(f"has the key {reading.label or reading.document}: {_UNFIT[reading.kind]}")
    scores = (reading.scores, reading.positive_scores, reading.negative_scores)
    plain = {key: value for key, value in row.items() if key not in scores}
    if reading.kind == "documents" and isinstance(row[reading.document], list):  # equal scores keep the order
        plain["scores"] = [0.0] * len(row[reading.document])
    return examples_of(plain, expected)[0], reading


_UNFIT = {
    "label": "rows with labels have no positive",
    "documents": "rows that a teacher has scored have their negatives already",
}


def corpus_file(name: str) -> Path:
    """Return the file of documents that `--corpus` names: the file itself, or the corpus.jsonl of a BEIR folder."""
    path = Path(name).expanduser()
    file = path / "corpus.jsonl" if path.is_dir() else path
    if file.suffix == ".gz" or (not file.exists() and file.with_name(f"{file.name}.gz").is_file()):
        raise UserError(f"--corpus {name}: unpack it first (gunzip)")
    if not file.is_file() and not is_pipe(file):
        raise UserError(f"--corpus {name}: " + ("the folder has no corpus.jsonl" if path.is_dir() else "no such file"))
    return file


def read_corpus(file: Path, field: str | None = None) -> Iterator[str]:
    """Yield the documents of a file that are not blank (see text_files.read_texts). UserError if there is none."""
    count = 0
    for text in read_texts(file, field):
        if text.strip():
            count += 1
            yield text
    if not count:
        raise UserError(f"--corpus {file}: no document in it")


# --- texts on disk ----------------------------------------------------------------------------------------------------


class TextFile:
    """Distinct texts in a temporary file. In memory are only their places, and until `close` a key of each.

    Args:
        key: returns what equal texts share; by default, texts that differ only in case and white space are equal. The
            first of them is kept.
    """

    def __init__(self, folder: Path, key: Callable[[str], Hashable] | None = None):
        self._key = key or text_key
        self._folder, self._file = folder, tempfile.TemporaryFile(dir=folder)
        self._starts, self._numbers, self._digest = array("Q", [0]), dict[Hashable, int](), hashlib.sha256()

    def add(self, text: str) -> int:
        """Return the number of a text; a new text gets the next number."""
        number = self._numbers.setdefault(self._key(text), len(self))
        if number == len(self):
            data = text.encode("utf-8", "surrogatepass")
            with naming(self._folder):
                self._file.write(data)
            self._starts.append(self._starts[-1] + len(data))
            self._digest.update(b"%d " % len(data) + data)
        return number

    def find(self, text: str) -> int | None:
        """Return the number of a text, or None if it was not added."""
        return self._numbers.get(self._key(text))

    def close(self) -> str:
        """Finish adding: drop the hashes of the texts, and return one hash of all texts."""
        with naming(self._folder):
            self._file.flush()
        self._numbers.clear()
        return self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, numbers: Iterable[int]) -> list[str]:
        """Return texts by their numbers; only after `close`."""
        starts, handle = self._starts, self._file.fileno()
        parts = (os.pread(handle, starts[i + 1] - starts[i], starts[i]) for i in numbers)
        return [part.decode("utf-8", "surrogatepass") for part in parts]


def text_key(text: str) -> bytes:
    """Return 12 bytes that equal texts share; a hundred million different texts collide with a probability of 1e-13."""
    normalized = " ".join(text.split()).casefold()
    return hashlib.blake2b(normalized.encode("utf-8", "surrogatepass"), digest_size=12).digest()


@dataclass
class Collection:
    """Distinct queries and documents, and their pairs. A pair is an int64, query << 32 | document; pairs are sorted."""

    queries: TextFile
    documents: TextFile
    row_query: np.ndarray  # (R,) uint32: the query of each row
    row_positive: np.ndarray  # (R,) uint32
    known: np.ndarray  # (K,) pairs of queries and positives, of any row
    excluded: np.ndarray  # (B,) pairs that are never mined: `known`, and documents that equal the query
    read: int  # documents read, duplicates included
    corpus: np.ndarray  # (N,) uint32: the document of each text of the corpus
    fingerprints: dict[str, str]  # hashes of all that was read

    @staticmethod
    def part(pairs: np.ndarray, first: int, last: int) -> np.ndarray:
        """Return the pairs of queries `first` to `last` - 1."""
        return pairs[slice(*np.searchsorted(pairs, (first << 32, last << 32)))]

    @property
    def row_pairs(self) -> np.ndarray:
        """The place of each row's pair in `known`, (R,) int."""
        return np.searchsorted(self.known, _pairs(self.row_query, self.row_positive))


def _pairs(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    return (np.asarray(queries, np.int64) << 32) | np.asarray(documents, np.int64)


def collect(
    rows: Iterable[tuple[dict[str, Any], Example]],
    corpus: Iterable[str],
    folder: Path,
) -> Collection:
    """Read everything once into temporary files in `folder`: the documents of the corpus, then those of all rows."""
    queries, documents, read = TextFile(folder), TextFile(folder), 0
    row_query, row_positive, of_corpus = array("I"), array("I"), array("I")
    for text in corpus:
        of_corpus.append(documents.add(text))
    read += len(of_corpus)
    for _, example in rows:
        row_query.append(queries.add(example.query))
        row_positive.append(documents.add(example.positive))
        for text in example.negatives:
            documents.add(text)
        read += 1 + len(example.negatives)
    if not row_query:
        raise UserError("--data: no row in it")
    query_hash = queries.close()
    itself = [(i, documents.find(text)) for i, text in enumerate(_each(queries))]
    itself = np.array([pair for pair in itself if pair[1] is not None], np.int64).reshape(-1, 2)
    known = np.unique(_pairs(row_query, row_positive))
    excluded = np.union1d(known, _pairs(*itself.T))
    fingerprints = {"corpus": documents.close(), "queries": query_hash, "positives": hashlib.sha256(known).hexdigest()}
    of_rows = (np.frombuffer(each, np.uint32) for each in (row_query, row_positive))
    return Collection(queries, documents, *of_rows, known, excluded, read, np.array(of_corpus, np.uint32), fingerprints)


def _each(texts: TextFile) -> Iterator[str]:
    for i in range(len(texts)):
        yield from texts.read([i])
