"""The tables of a LanceDB index: their columns, full-text index, filters and upkeep."""

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_retrieval.retrieval.analyzer import LONGEST, analyzer
from mlx_retrieval.retrieval.base import EVERYWHERE, FileRecord, Hit, IndexInfo, Within, sort_hits
from mlx_retrieval.retrieval.fields import fields_of, stream
from mlx_retrieval.retrieval.lance_errors import DAMAGED, plain_errors

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS = ("id", "path", "file_hash", "language", "kind", "name", "context", "text", "tokens")
HIT_COLUMNS = ["path", "line", "end_line", "language", "kind", "name", "text"]
PATHS_AT_ONCE = 500  # in one filter
ROWS_AT_ONCE = 2_000


def connect(folder: Path) -> Any:
    """Return LanceDB's connection to a folder."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings concern storage internals
    import lancedb

    return lancedb.connect(folder)


def chunk_schema(info: IndexInfo) -> "pa.Schema":
    """Return the columns of chunks.lance."""
    import pyarrow as pa

    columns = [*((name, pa.string()) for name in TEXTS), ("line", pa.int32()), ("end_line", pa.int32())]
    vector = ("slot", pa.int64()) if info.maxsim else ("vector", pa.list_(pa.float32(), info.dimensions))
    return pa.schema([*columns, vector])


def file_schema() -> "pa.Schema":
    """Return the columns of files.lance."""
    import pyarrow as pa

    kinds = (pa.string(), pa.int64(), pa.int64(), pa.string(), pa.int32(), pa.string())
    return pa.schema(list(zip(FileRecord._fields, kinds, strict=True)))


def vector_column(vectors: np.ndarray) -> "pa.Array":
    """Return vectors (N, D) as a column."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])


def batches(table: Any, columns: Sequence[str], folder: Path) -> Iterator["pa.RecordBatch"]:
    """Yield columns of all rows. SaveError of one line, which names the index's `folder`, if they cannot be read."""
    with plain_errors(folder, DAMAGED):
        yield from table.search().select(list(columns)).limit(None).to_batches(ROWS_AT_ONCE)


def orphans(chunks: Any, records: Mapping[str, FileRecord]) -> list[str]:
    """Return the paths of chunks that an interrupted run left without a record of their file."""
    rows = chunks.search().select(["path", "file_hash"]).limit(None).to_arrow()
    versions = set(zip(rows["path"].to_pylist(), rows["file_hash"].to_pylist(), strict=True))
    return sorted({path for path, sha256 in versions if path not in records or records[path].sha256 != sha256})


# --- words ---


def word_stream(row: dict[str, Any], info: IndexInfo) -> str:
    """Return the terms that a search by words finds a chunk by; `row`: path, name, language, context and text."""
    path = "" if info.is_corpus else row["path"]
    fields = fields_of(path, row["name"], row["language"], row["context"], row["text"])
    return stream(fields, info.fields, analyzer(info.language))


def chunk_rows(columns: dict[str, Any], rows: Iterable[dict[str, Any]], info: IndexInfo) -> "pa.Table":
    """Return chunks as chunks.lance holds them: these columns, and their words, which are made of `rows`."""
    import pyarrow as pa

    schema = chunk_schema(info)
    columns = columns | {"tokens": pa.array([word_stream(row, info) for row in rows], pa.string())}
    return pa.table([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)


def index_words(table: Any) -> None:
    """Index the column `tokens` for full-text search. It holds terms, so LanceDB only splits at white space."""
    from lancedb.index import FTS

    off = {"stem": False, "remove_stop_words": False, "ascii_folding": False, "lower_case": False}
    config = FTS(base_tokenizer="whitespace", max_token_length=4 * LONGEST + 1, **off)  # in bytes
    table.create_index("tokens", config=config, replace=True)


# --- filters ---


def condition(within: Within) -> str:
    """Return a SQL condition on chunks; "" = none."""
    conditions = []
    if within.rows:
        conditions.append(f"_rowid IN ({', '.join(map(str, within.rows))})")
    elif within.ids is not None:
        conditions.append(f"id IN ({_quoted(within.ids)})" if within.ids else "false")
    if within.languages:
        conditions.append(f"language IN ({_quoted(within.languages)})")
    if within.paths:
        conditions.append(f"regexp_like(path, {_quoted([_whole(within.paths)])})")
    return " AND ".join(conditions)


def filtered(search: Any, within: Within) -> Any:
    """Return a search of LanceDB that looks only at some chunks, before it ranks them."""
    conditions = condition(within)
    return search.where(conditions, prefilter=True) if conditions else search


def path_conditions(paths: Sequence[str]) -> Iterator[str]:
    """Yield SQL conditions on chunks or files, which together select those of these paths."""
    for first in range(0, len(paths), PATHS_AT_ONCE):
        yield f"path IN ({_quoted(paths[first : first + PATHS_AT_ONCE])})"


def unmatched(patterns: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return those of the patterns, as `Within.paths` has them, that none of these paths matches."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pa.array(paths, pa.string())  # its regular expressions take linear time, Python's may not
    return [each for each in patterns if not pc.any(pc.match_substring_regex(column, _whole([each]))).as_py()]


def _quoted(values: Sequence[str]) -> str:
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)


def _whole(paths: Sequence[str]) -> str:
    """Return a regular expression for whole paths of these files and folders."""
    return f"^({'|'.join(map(_pattern, paths))})$"


def _pattern(path: str) -> str:
    """Return a regular expression for a file, or for all files of a folder: * and ? stand for any characters."""
    if path.rstrip("/") == ".":
        return ".*"
    pattern = re.escape(path.removeprefix("./").rstrip("/")).replace(r"\*", ".*").replace(r"\?", ".")
    return f"(.*/)?{pattern}(/.*)?" if "/" not in path.rstrip("/") else f"{pattern}(/.*)?"


# --- columns and hits ---


def distinct(table: Any, column: str, within: Within = EVERYWHERE) -> list[str]:
    """Return the values that a column has in some chunks, sorted."""
    table.checkout_latest()
    rows = filtered(table.search(), within).select([column]).limit(None).to_arrow()
    return sorted(rows[column].unique().to_pylist())


def lines_of(table: Any, paths: Sequence[str]) -> dict[str, list[range]]:
    """Return path -> the lines of each of its chunks, for those of these paths that have any."""
    table.checkout_latest()
    lines: dict[str, list[range]] = {}
    for selection in path_conditions(paths):
        for row in table.search().where(selection).select(["path", "line", "end_line"]).limit(None).to_list():
            lines.setdefault(row["path"], []).append(range(row["line"], row["end_line"] + 1))
    return lines


def chunks_where(table: Any, selection: str) -> list[Hit]:
    """Return the chunks that a SQL condition selects, in the order of their files, with a score of 0."""
    table.checkout_latest()
    rows = table.search().where(selection).select(["id", *HIT_COLUMNS]).limit(None).to_list()
    return sorted((hit(row, 0.0) for row in rows), key=lambda found: (found.line, int(found.id.rpartition("#")[2])))


def hit(row: dict[str, Any], score: float) -> Hit:
    """Return a row of chunks.lance as a hit."""
    return Hit(id=row["id"], score=score, row=row.get("_rowid"), **{name: row[name] for name in HIT_COLUMNS})


def hits(scored: Iterable[tuple[dict[str, Any], float]], within: Within) -> list[Hit]:
    """Return rows with their scores as hits, best first.

    `within`: what was searched; after a rebuild, a row that it names may hold another chunk, which is left out.
    """
    return sort_hits(hit(row, score) for row, score in scored if not within.rows or row["id"] in within.ids)


# --- upkeep ---


def tidy(table: Any) -> None:
    """Add new rows to the indices, merge small files, and remove all versions but the newest."""
    with warnings.catch_warnings():
        # It warns about readers of older versions; ours check out the newest one before every query.
        warnings.filterwarnings("ignore", message="optimize.cleanup_older_than=0")
        table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
