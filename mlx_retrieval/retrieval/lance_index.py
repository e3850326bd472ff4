"""The index of search.py: chunks, vectors and full text in LanceDB, in one folder on disk.

from mlx_retrieval.retrieval.lance_index import Index
index = Index.open(".index")
for hit in index.bm25("read line", 10): print(hit.path, hit.line, hit.score)
for hit in index.semantic(model.encode("read line", prompt="query"), 10): print(hit.path, hit.line, hit.score)

index.json       source folder, model and settings: base.IndexInfo
chunks.lance     one row a chunk: place, text, words, vector
files.lance      one row a file: size, time, hash; written after the chunks of the file
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_retrieval.dataset.chunks import Chunk, words
from mlx_retrieval.retrieval.base import FILE, LOCK, VERSION, FileRecord, Hit, IndexInfo, fuse_hits, sort_hits
from mlx_retrieval.retrieval.lance_errors import plain_errors, searching, writing
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.outputs import check_parent
from mlx_retrieval.utils.text import shell

if TYPE_CHECKING:
    import pyarrow as pa

TABLES = ("chunks.lance", "files.lance")
REBUILT = "rebuilt"  # in an index's folder: the index that will replace it
OURS = frozenset({FILE, LOCK, f".{FILE}.new", ".gitignore", REBUILT, *TABLES})
# From PARTITIONS_FROM chunks on, LanceDB keeps the vectors in partitions (IVF, uncompressed) in memory: about ten times
# faster than reading the table. The nearest PROBES partitions are searched: up to 250,000 chunks these are all of them,
# so nothing is missed (benchmarks/search_latency.py). The size of a partition is given, not their number: LanceDB would
# merge a given number into a few large ones.
PARTITIONS_FROM, PARTITION_SIZE, PROBES = 10_000, 1_000, 250
LATE_CANDIDATES = 300  # chunks whose token vectors are compared: those with the nearest mean vectors
HIT_COLUMNS = ["path", "line", "end_line", "language", "kind", "name", "text"]
Vectors = np.ndarray | list[np.ndarray]  # (N, D) float32; late interaction: N arrays (L, D)


class Index:
    """An index on disk. Make one by `create` or `open`."""

    def __init__(self, folder: Path, info: IndexInfo, database: Any):
        self.folder, self.info, self.database = folder, info, database
        self.chunks, self.files = database.open_table("chunks"), database.open_table("files")

    @classmethod
    def create(cls, folder: Path, info: IndexInfo) -> "Index":
        """Create an empty index in place of an older one. Raises UserError if the folder holds anything else."""
        check_folder(folder)
        try:
            for name in (FILE, *TABLES):  # index.json first: without it there is no index
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / ".gitignore").exists():
                (folder / ".gitignore").write_text("*\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--index {folder}: {error.strerror}") from error
        with plain_errors(folder, "nothing is indexed yet"):
            database = _connect(folder)
            chunks = database.create_table("chunks", schema=_chunk_schema(info))
            _index_words(chunks)
            database.create_table("files", schema=_file_schema())
            index = cls(folder, info, database)
        index.write()
        return index

    @classmethod
    def open(cls, folder: str | Path) -> "Index":
        """Open the index in `folder`. Raises UserError, with the command to run, if it is missing or damaged."""
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise UserError(
                f"--index {folder}: no index there. To create one: "
                f"{shell('python', 'search.py', 'index', 'PATH', '--model-path', 'MODEL', '--index', folder)}"
            )
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if values.get("version") != VERSION:
                raise UserError(
                    f"{folder}: made by another version of this toolkit; search.py index --rebuild replaces it"
                )
            info = IndexInfo(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / FILE}: not readable ({error}); search.py index --rebuild replaces it"
            ) from error
        database = _connect(folder)
        try:
            return cls(folder, info, database)
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(f"{folder}: damaged ({error}); search.py index --rebuild replaces it") from error

    @property
    def root(self) -> Path:
        """The indexed folder, absolute."""
        return (self.folder.resolve() / self.info.root).resolve()

    def rebuild_command(self, model: str) -> str:
        """Return the command that rebuilds the index with a model."""
        command = ["python", "search.py", "index", str(self.root), "--model-path", model, "--index", str(self.folder)]
        return shell(*command, "--rebuild")

    def write(self) -> None:
        """Write index.json atomically."""
        files.write_file(self.folder / FILE, json.dumps(dataclasses.asdict(self.info), indent=2) + "\n")

    def is_empty(self) -> bool:
        """Return whether the index was never finished and has neither chunks nor files."""
        return not (self.info.complete or self.chunks.count_rows() or self.files.count_rows())

    def size(self) -> int:
        """Return the size on disk in bytes."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    # --- writing: chunks first, then the records of their files ---

    @writing
    def records(self) -> dict[str, FileRecord]:
        """Return the records of all files that were read, by path."""
        rows = self.files.search().limit(None).to_arrow().to_pylist()
        return {row["path"]: FileRecord(**row) for row in rows}

    @writing
    def remove(self, paths: Sequence[str]) -> None:
        """Remove files and their chunks: records first, so that a kill in between leaves orphaned chunks at worst."""
        for table in (self.files, self.chunks):
            for first in range(0, len(paths), 500):
                table.delete(_path_in(paths[first : first + 500]))

    @writing
    def remove_orphans(self, records: dict[str, FileRecord]) -> int:
        """Remove chunks that an interrupted run left without a record. Return their number."""
        before = self.chunks.count_rows()
        rows = self.chunks.search().select(["path", "file_hash"]).limit(None).to_arrow()
        versions = set(zip(rows["path"].to_pylist(), rows["file_hash"].to_pylist(), strict=True))
        orphans = {path for path, sha256 in versions if path not in records or records[path].sha256 != sha256}
        for first in range(0, len(orphans), 500):
            self.chunks.delete(_path_in(sorted(orphans)[first : first + 500]))
        return before - self.chunks.count_rows()

    @writing
    def add(self, files: Sequence[tuple[FileRecord, list[Chunk]]], vectors: Vectors, stored: set[str]) -> None:
        """Add files and their chunks, with one vector a chunk. Files whose path is in `stored` are replaced."""
        import pyarrow as pa

        self.remove([record.path for record, _ in files if record.path in stored])
        rows = [
            {
                "id": f"{record.path}#{number}",
                "path": record.path,
                "file_hash": record.sha256,
                "tokens": " ".join(
                    words(f"{'' if self.info.is_corpus else record.path} {chunk.name} {chunk.embedded}")
                ),
                **chunk._asdict(),
            }
            for record, chunks in files
            for number, chunk in enumerate(chunks)
        ]
        if rows:
            schema = _chunk_schema(self.info)
            if self.info.maxsim:
                tokens = pa.array([each.astype(np.float16).tobytes() for each in vectors], pa.large_binary())
                vectors = np.stack([_mean(each) for each in vectors])
            plain = pa.Table.from_pylist(
                rows, schema=pa.schema([f for f in schema if f.name not in ("vector", "token_vectors")])
            )
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.info.dimensions)
            table = plain.append_column(schema.field("vector"), column)
            self.chunks.add(table.append_column("token_vectors", tokens) if self.info.maxsim else table)
        self.record([record for record, _ in files])

    @writing
    def record(self, records: Sequence[FileRecord]) -> None:
        """Add the records of files, or replace them."""
        import pyarrow as pa

        rows = pa.Table.from_pylist([record._asdict() for record in records], schema=_file_schema())
        self.files.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    @writing
    def finish(self) -> None:
        """Bring the full-text and vector indices up to date, and free the space of replaced rows."""
        from lancedb.index import IvfFlat

        count = self.chunks.count_rows()
        # Rebuilt, because LanceDB's own update still counts removed chunks: scores must depend on the chunks alone, not
        # on the history of the index. It takes a few seconds for 100,000 chunks.
        _index_words(self.chunks)
        for table in (self.chunks, self.files):
            _tidy(table)
        # Partitions are trained again whenever the index has doubled.
        if count >= max(PARTITIONS_FROM, 2 * self.info.partitioned):
            sizes = {"target_partition_size": PARTITION_SIZE, "max_iterations": 20, "sample_rate": 64}
            config = IvfFlat(distance_type="dot", **sizes)
            self.chunks.create_index("vector", config=config, replace=True)
            _tidy(self.chunks)
            self.info.partitioned = count
        self.info.complete = True
        self.write()

    # --- searching ---

    @searching
    def bm25(self, query: str, top: int) -> list[Hit]:
        """Return the chunks that hold any word of the query, scored by BM25. Queries have no operators."""
        from lancedb.query import MatchQuery

        terms = " ".join(words(query))
        if not terms:
            return []
        self.chunks.checkout_latest()
        search = self.chunks.search(MatchQuery(terms, "tokens"), query_type="fts")
        rows = search.select(["id", *HIT_COLUMNS, "_score"]).limit(top).to_list()
        return sort_hits(_hit(row, row["_score"]) for row in rows)

    @searching
    def semantic(self, vector: np.ndarray, top: int) -> list[Hit]:
        """Return the chunks nearest to the query's vector (D,), scored by the dot product: the cosine.

        Late interaction: `vector` holds the vectors of the query's tokens (L, D); scores are MaxSim with the tokens of
        the LATE_CANDIDATES chunks whose mean vectors are nearest.
        """
        self.chunks.checkout_latest()
        if self.info.maxsim:
            return self._by_tokens(vector, top)
        search = self.chunks.search(vector, vector_column_name="vector").distance_type("dot").nprobes(PROBES)
        rows = search.select(["id", *HIT_COLUMNS, "_distance"]).limit(top).to_list()
        return sort_hits(_hit(row, 1 - row["_distance"]) for row in rows)

    def _by_tokens(self, tokens: np.ndarray, top: int) -> list[Hit]:
        from mlx_retrieval.models.maxsim import score

        search = self.chunks.search(_mean(tokens), vector_column_name="vector").distance_type("dot").nprobes(PROBES)
        search = search.select(["id", *HIT_COLUMNS, "token_vectors", "_distance"]).limit(max(top, LATE_CANDIDATES))
        rows = search.to_arrow()
        if not len(rows):
            return []
        stored = [np.frombuffer(cell.as_buffer(), np.float16) for cell in rows["token_vectors"]]
        lengths = np.array([len(cell) for cell in stored]) // tokens.shape[1]
        stored = np.concatenate(stored).reshape(-1, tokens.shape[1])
        scores = score(tokens, stored, lengths, self.info.maxsim, self.info.impute)
        rows = rows.drop_columns("token_vectors").to_pylist()
        return sort_hits(_hit(row, float(value)) for row, value in zip(rows, scores, strict=True))[:top]

    def hybrid(self, query: str, vector: np.ndarray, top: int, weight: float = 0.5) -> list[Hit]:
        """Return the hits of both searches, fused by their ranks among the first 100 of each (or `top`, if larger)."""
        pool = max(100, top)
        return fuse_hits(self.bm25(query, pool), self.semantic(vector, pool), weight)[:top]


def check_folder(folder: Path) -> None:
    """Raise UserError if a folder holds other files than an index: `create` removes and adds files."""
    files.check_name(folder, "--index")
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= OURS):
        raise UserError(f"--index {folder}: holds something else; choose a folder for the index alone")
    check_parent(folder / FILE, "--index")


def install(folder: Path) -> None:
    """Put the index in `folder`/rebuilt in place of the one in `folder`; continue if that was interrupted."""
    source = folder / REBUILT
    (folder / FILE).unlink(missing_ok=True)
    for name in TABLES:
        if (source / name).exists():
            shutil.rmtree(folder / name, ignore_errors=True)
            (source / name).rename(folder / name)
    (source / FILE).rename(folder / FILE)
    shutil.rmtree(source, ignore_errors=True)


def _connect(folder: Path) -> Any:
    os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings concern storage internals
    import lancedb

    return lancedb.connect(folder)


def _hit(row: dict[str, Any], score: float) -> Hit:
    return Hit(id=row["id"], score=score, **{name: row[name] for name in HIT_COLUMNS})


def _path_in(paths: Sequence[str]) -> str:
    quoted = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    return f"path IN ({quoted})"


def _index_words(table: Any) -> None:
    """Index the words from `chunks.words` for full-text search; LanceDB adds English stemming and strips accents."""
    from lancedb.index import FTS

    config = FTS(base_tokenizer="whitespace", stem=True, remove_stop_words=False, max_token_length=100)
    table.create_index("tokens", config=config, replace=True)


def _tidy(table: Any) -> None:
    """Add new rows to the indices, merge small files, and remove all versions but the newest."""
    with warnings.catch_warnings():
        # It warns about readers of older versions; ours check out the newest one before every query.
        warnings.filterwarnings("ignore", message="optimize.cleanup_older_than=0")
        table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)


def _mean(tokens: np.ndarray) -> np.ndarray:
    """Return the normalised mean (D,) float32 of token vectors (L, D), by which candidates are found."""
    mean = tokens.sum(axis=0)
    return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)


def _chunk_schema(info: IndexInfo) -> "pa.Schema":
    import pyarrow as pa

    texts = ("id", "path", "file_hash", "language", "kind", "name", "context", "text", "tokens")
    fields = [*((name, pa.string()) for name in texts), ("line", pa.int32()), ("end_line", pa.int32())]
    tokens = [("token_vectors", pa.large_binary())] if info.maxsim else []
    return pa.schema([*fields, ("vector", pa.list_(pa.float32(), info.dimensions)), *tokens])


def _file_schema() -> "pa.Schema":
    import pyarrow as pa

    kinds = (pa.string(), pa.int64(), pa.int64(), pa.string(), pa.int32(), pa.string())
    return pa.schema(list(zip(FileRecord._fields, kinds, strict=True)))
