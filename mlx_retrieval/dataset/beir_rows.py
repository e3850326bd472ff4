"""Read a folder in BEIR's layout as training data: a row for each query of qrels/train.tsv.

    rows = BeirRows(Path("scifact"))
    for number, row in rows.rows(): ...         # line of queries.jsonl; {"query": ..., "positive": [...], ...}

Documents that are judged above 0 are positives, those judged 0 or less are negatives. Of the corpus, only the places of
judged documents are in memory.
"""

import gzip
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlx_retrieval.dataset.beir import document_text, read_judgements, texts_file
from mlx_retrieval.dataset.columns import Columns, joined
from mlx_retrieval.dataset.json_lines import Fault, RowError, lines_of, parse_object, read_objects
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import quantity


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder in BEIR's layout, gzipped or not."""
    return all(any((path / f"{stem}.jsonl{end}").is_file() for end in ("", ".gz")) for stem in ("corpus", "queries"))


class BeirRows:
    """The rows of a folder.

    Args:
        columns: of `--columns`: `query` names keys of queries.jsonl, `document` or `negatives` those of corpus.jsonl;
            the default is the text, and of documents the title before it.

    Attributes:
        queries_file: its lines are the places of rows.
        form: what was read, in words.
        labels: keys of rows -> how they are called in the folder.

    Raises UserError, with file, line and reason, if the folder has no judgements to train on, or is broken.
    """

    def __init__(self, folder: Path, columns: Columns | None = None):
        self.queries_file = texts_file(folder, "queries")
        self._query, self._document = _mapped(columns or {})
        self._qrels_file = folder / "qrels" / "train.tsv"
        if not self._qrels_file.is_file():
            others = sorted(path.name for path in (folder / "qrels").glob("*.tsv"))
            held = f", and {', '.join(others)} is for evaluation (--eval-tasks {folder})" if others else ""
            raise UserError(f"--data {folder}: no qrels/train.tsv to train on{held}")
        self.labels = {
            "query": "+".join(self._query or ("queries.jsonl",)),
            "positive": "+".join(self._document or ("corpus.jsonl",)),
            "negatives": "judged 0",
        }
        self._corpus_file = texts_file(folder, "corpus")
        self._corpus = _seekable(self._corpus_file)
        self._places: dict[str, int] = {}  # id of a judged document -> its number
        self._starts, self._sizes = array("Q"), array("I")
        self.form = "BEIR folder, qrels/train.tsv"

    def close(self) -> None:
        """Close the corpus."""
        self._corpus.close()

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
        """Yield the line of every query that has a positive document in the corpus, and its row."""
        ids = {_id(row) for _, row in read_objects(self.queries_file)}
        grades: dict[str, dict[str, int]] = {}
        for judgement in read_judgements(self._qrels_file, ids):
            if judgement.query in ids:
                grades.setdefault(judgement.query, {})[judgement.document] = judgement.grade
        self._find({document for judged in grades.values() for document in judged})
        if not self._places:
            raise UserError(f"{self._qrels_file}: no judged document is in the corpus, so there is nothing to learn")
        left_out = 0
        for number, row in read_objects(self.queries_file):
            judged = grades.pop(_id(row), {})
            there = {document: grade for document, grade in judged.items() if document in self._places}
            if not any(grade > 0 for grade in there.values()):
                left_out += bool(judged)
                continue
            try:
                query = joined(row, self._query) if self._query else _text(row, "text")
                positives = [self._text(document) for document, grade in there.items() if grade > 0]
                negatives = [self._text(document) for document, grade in there.items() if grade <= 0]
            except RowError as error:
                yield number, Fault(str(error).encode())
                continue
            yield number, {"query": query, "positive": positives} | ({"negatives": negatives} if negatives else {})
        if left_out:
            self.form += f"; {quantity(left_out, 'query')} without a relevant document left out"

    def _find(self, wanted: set[str]) -> None:
        """Note the places of the documents that are wanted."""
        self._corpus.seek(0)
        for line in lines_of(self._corpus):
            try:
                name = _id(parse_object(line.data))
            except RowError as error:
                raise UserError(f"{self._corpus_file}:{line.number}: {error}") from error
            if name in wanted and name not in self._places:
                self._places[name] = len(self._starts)
                self._starts.append(line.start)
                self._sizes.append(line.size)

    def _text(self, name: str) -> str:
        """Return the text of a judged document. RowError if it has none."""
        i = self._places[name]
        row = parse_object(os.pread(self._corpus.fileno(), self._sizes[i], self._starts[i]))
        text = joined(row, self._document) if self._document else document_text(row.get("title"), _text(row, "text"))
        if not text.strip():
            raise RowError(f"the document {name} has no text")
        return text


def _mapped(columns: Columns) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys of queries.jsonl and of corpus.jsonl that texts are made of; () = the default."""
    unknown = [key for key in columns if key not in ("query", "document", "positive")]
    if unknown:
        raise UserError(f"--columns {unknown[0]}: in a BEIR folder there are query and document")
    return columns.get("query", ()), columns.get("document", ()) or columns.get("positive", ())


def _id(row: dict[str, Any]) -> str:
    return str(row.get("_id", row.get("id", "")))


def _text(row: dict[str, Any], key: str) -> str:
    text = row.get(key) or ""
    if not isinstance(text, str):
        raise RowError(f"the {key} is not a text")
    return text


def _seekable(path: Path) -> BinaryIO:
    """Return a file at its beginning; a `.gz` is unpacked to a temporary one."""
    if path.suffix != ".gz":
        return open(path, "rb")
    unpacked = tempfile.TemporaryFile()
    with gzip.open(path, "rb") as packed:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    unpacked.seek(0)
    return unpacked
