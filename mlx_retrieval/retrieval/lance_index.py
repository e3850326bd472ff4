"""The index that search.py makes and asks: chunks, vectors and full text in LanceDB, in one folder on disk.

from search_index import Index
index = Index.open(".index")
for hit in index.bm25("read line", 10): print(hit.path, hit.line, hit.score)
for hit in index.semantic(model.encode("read line", prompt="query"), 10): print(hit.path, hit.line, hit.score)

index.json       what the index is of: folder, model, settings
chunks.lance     a row a chunk: where it stands, its text, its words, its vector
files.lance      a row a file that was read: size, time, hash; written after the file's chunks
"""

import dataclasses
import json
import os
import shlex
import shutil
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_retrieval.retrieval.base import FILE, LOCK, VERSION, About, Hit, Record, fuse_hits, sort_hits
from mlx_retrieval.retrieval.chunks import Chunk, words
from mlx_retrieval.utils.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

OURS = frozenset({FILE, LOCK, f".{FILE}.new", ".gitignore", "chunks.lance", "files.lance"})
# From so many chunks on, LanceDB keeps vectors in partitions (IVF, uncompressed), which it holds in memory: some ten
# times faster than reading the table. The nearest PROBES of them are searched: up to 250,000 chunks, these are all, and
# nothing is missed; see benchmarks/search_latency.py. Told a number of partitions instead of their size, LanceDB would
# join them again to a few large ones.
PARTITIONS_FROM, PARTITION_SIZE, PROBES = 10_000, 1_000, 250
LATE_CANDIDATES = 300  # chunks whose tokens are compared, those with the nearest mean vectors
HIT_COLUMNS = ["path", "line", "end_line", "language", "kind", "name", "text"]


Vectors = np.ndarray | list[np.ndarray]  # (N, D) float32; of a late-interaction model N times (L, D)


class Index:
    """An index on disk. `create` and `open` make one."""

    def __init__(self, folder: Path, about: About, database: Any):
        self.folder, self.about, self.database = folder, about, database
        self.chunks, self.files = database.open_table("chunks"), database.open_table("files")

    @classmethod
    def create(cls, folder: Path, about: About) -> "Index":
        """An empty index; an older one in its place is removed. UserError where the folder holds anything else."""
        check_folder(folder)
        try:
            for name in (FILE, "chunks.lance", "files.lance"):  # index.json first: without it, there is no index
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".gitignore").write_text("*\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--index {folder}: {error.strerror}") from error
        database = _connect(folder)
        chunks = database.create_table("chunks", schema=_chunk_schema(about))
        _index_words(chunks)
        database.create_table("files", schema=_file_schema())
        index = cls(folder, about, database)
        index.write()
        return index

    @classmethod
    def open(cls, folder: str | Path) -> "Index":
        """The index in `folder`; UserError with the command that makes one where there is none."""
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise UserError(
                f"--index {folder}: no index there. To make one: "
                f"python search.py index PATH --model-path DIR --index {folder}"
            )
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if values.get("version") != VERSION:
                raise UserError(
                    f"{folder}: made by another version of this toolkit; search.py index --rebuild renews it"
                )
            about = About(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / FILE}: not readable ({error}); search.py index --rebuild renews it") from error
        database = _connect(folder)
        try:
            return cls(folder, about, database)
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(f"{folder}: damaged ({error}); search.py index --rebuild renews it") from error

    @property
    def root(self) -> Path:
        """The folder that is indexed."""
        return (self.folder.resolve() / self.about.root).resolve()

    def again(self, model: str) -> str:
        """The command that makes it anew with a model."""
        words = ["python", "search.py", "index", str(self.root), "--model-path", model, "--index", str(self.folder)]
        return shlex.join([*words, "--rebuild"])

    def write(self) -> None:
        """Write index.json, all or nothing."""
        temporary = self.folder / f".{FILE}.new"
        temporary.write_text(json.dumps(dataclasses.asdict(self.about), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / FILE)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    # --- writing: chunks first, then the records of their files ---

    def records(self) -> dict[str, Record]:
        """What was read, by path."""
        rows = self.files.search().limit(None).to_arrow().to_pylist()
        return {row["path"]: Record(**row) for row in rows}

    def remove(self, paths: Sequence[str]) -> None:
        """Forget files and their chunks: records first, so that a kill in between leaves chunks of no file."""
        for table in (self.files, self.chunks):
            for first in range(0, len(paths), 500):
                table.delete(_path_in(paths[first : first + 500]))

    def remove_orphans(self, records: dict[str, Record]) -> int:
        """Remove chunks that an interrupted run left without a record; returns how many."""
        before = self.chunks.count_rows()
        rows = self.chunks.search().select(["path", "file_hash"]).limit(None).to_arrow()
        found = set(zip(rows["path"].to_pylist(), rows["file_hash"].to_pylist(), strict=True))
        orphans = {path for path, sha256 in found if path not in records or records[path].sha256 != sha256}
        for first in range(0, len(orphans), 500):
            self.chunks.delete(_path_in(sorted(orphans)[first : first + 500]))
        return before - self.chunks.count_rows()

    def add(self, files: Sequence[tuple[Record, list[Chunk]]], vectors: Vectors, known: set[str]) -> None:
        """Add files with their chunks; `vectors` (N, D) has a row for every chunk. Those in `known` are replaced."""
        import pyarrow as pa

        self.remove([record.path for record, _ in files if record.path in known])
        rows = [
            {
                "id": f"{record.path}#{number}",
                "path": record.path,
                "file_hash": record.sha256,
                "tokens": " ".join(
                    words(f"{'' if self.about.is_corpus else record.path} {chunk.name} {chunk.embedded}")
                ),
                **chunk._asdict(),
            }
            for record, chunks in files
            for number, chunk in enumerate(chunks)
        ]
        if rows:
            schema = _chunk_schema(self.about)
            if self.about.maxsim:
                tokens = pa.array([part.astype(np.float16).tobytes() for part in vectors], pa.large_binary())
                vectors = np.stack([_mean(part) for part in vectors])
            plain = pa.Table.from_pylist(
                rows, schema=pa.schema([f for f in schema if f.name not in ("vector", "token_vectors")])
            )
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.about.dimensions)
            table = plain.append_column(schema.field("vector"), column)
            self.chunks.add(table.append_column("token_vectors", tokens) if self.about.maxsim else table)
        self.record([record for record, _ in files])

    def record(self, records: Sequence[Record]) -> None:
        """Write down what was read of files, in place of what stood there."""
        import pyarrow as pa

        rows = pa.Table.from_pylist([record._asdict() for record in records], schema=_file_schema())
        self.files.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def finish(self) -> None:
        """Bring full-text and vector search up to date, and give back the space of what was replaced."""
        from lancedb.index import IvfFlat

        count = self.chunks.count_rows()
        # Made anew, as LanceDB's own update would go on counting what was removed: the same chunks have to give the
        # same scores, however they came here. It takes some seconds for 100,000 chunks.
        _index_words(self.chunks)
        for table in (self.chunks, self.files):
            _tidy(table)
        if count >= max(
            PARTITIONS_FROM, 2 * self.about.partitioned
        ):  # partitions are trained anew as the index doubles
            sizes = {"target_partition_size": PARTITION_SIZE, "max_iterations": 20, "sample_rate": 64}
            config = IvfFlat(distance_type="dot", **sizes)
            self.chunks.create_index("vector", config=config, replace=True)
            _tidy(self.chunks)
            self.about.partitioned = count
        self.about.complete = True
        self.write()

    # --- searching ---

    def bm25(self, query: str, top: int) -> list[Hit]:
        """By words, any of them, scored by BM25. Nothing in a query is syntax."""
        from lancedb.query import MatchQuery

        terms = " ".join(words(query))
        if not terms:
            return []
        self.chunks.checkout_latest()
        found = self.chunks.search(MatchQuery(terms, "tokens"), query_type="fts")
        rows = found.select(["id", *HIT_COLUMNS, "_score"]).limit(top).to_list()
        return sort_hits(_hit(row, row["_score"]) for row in rows)

    def semantic(self, vector: np.ndarray, top: int) -> list[Hit]:
        """By the query's vector (D,), scored by the dot product: the cosine.

        Of a late-interaction model, by its tokens' vectors (L, D), scored by MaxSim with the tokens of the
        LATE_CANDIDATES chunks whose mean vectors are nearest.
        """
        self.chunks.checkout_latest()
        if self.about.maxsim:
            return self._by_tokens(vector, top)
        found = self.chunks.search(vector, vector_column_name="vector").distance_type("dot").nprobes(PROBES)
        rows = found.select(["id", *HIT_COLUMNS, "_distance"]).limit(top).to_list()
        return sort_hits(_hit(row, 1 - row["_distance"]) for row in rows)

    def _by_tokens(self, tokens: np.ndarray, top: int) -> list[Hit]:
        from mlx_retrieval.models.maxsim import score

        found = self.chunks.search(_mean(tokens), vector_column_name="vector").distance_type("dot").nprobes(PROBES)
        found = found.select(["id", *HIT_COLUMNS, "token_vectors", "_distance"]).limit(max(top, LATE_CANDIDATES))
        rows = found.to_arrow()
        if not len(rows):
            return []
        stored = [np.frombuffer(cell.as_buffer(), np.float16) for cell in rows["token_vectors"]]
        lengths = np.array([len(part) for part in stored]) // tokens.shape[1]
        stored = np.concatenate(stored).reshape(-1, tokens.shape[1])
        scores = score(tokens, stored, lengths, self.about.maxsim, self.about.impute)
        rows = rows.drop_columns("token_vectors").to_pylist()
        return sort_hits(_hit(row, float(found)) for row, found in zip(rows, scores, strict=True))[:top]

    def hybrid(self, query: str, vector: np.ndarray, top: int, weight: float = 0.5) -> list[Hit]:
        """Both, fused by their ranks among the first 100 of each, or `top` where that is more."""
        pool = max(100, top)
        return fuse_hits(self.bm25(query, pool), self.semantic(vector, pool), weight)[:top]


def check_folder(folder: Path) -> None:
    """UserError where a folder holds anything that is no index's: an index would be put among it, or remove it."""
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= OURS):
        raise UserError(f"--index {folder}: holds something else; name a folder for the index alone")


def _connect(folder: Path) -> Any:
    os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings are about how it stores things
    import lancedb

    return lancedb.connect(folder)


def _hit(row: dict[str, Any], score: float) -> Hit:
    return Hit(id=row["id"], score=score, **{name: row[name] for name in HIT_COLUMNS})


def _path_in(paths: Sequence[str]) -> str:
    quoted = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    return f"path IN ({quoted})"


def _index_words(table: Any) -> None:
    """Full text over the words that `chunks.words` made; LanceDB adds English stems and plain letters for accents."""
    from lancedb.index import FTS

    config = FTS(base_tokenizer="whitespace", stem=True, remove_stop_words=False, max_token_length=100)
    table.create_index("tokens", config=config, replace=True)


def _tidy(table: Any) -> None:
    """Take new rows into the indices, merge small files, and remove all versions but the newest."""
    with warnings.catch_warnings():
        # It warns of readers of older versions; ours turn to the newest one before every query.
        warnings.filterwarnings("ignore", message="optimize.cleanup_older_than=0")
        table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)


def _mean(tokens: np.ndarray) -> np.ndarray:
    """(D,) float32 of unit length: what stands for token vectors (L, D) while candidates are looked for."""
    mean = tokens.sum(axis=0)
    return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)


def _chunk_schema(about: About) -> "pa.Schema":
    import pyarrow as pa

    texts = ("id", "path", "file_hash", "language", "kind", "name", "context", "text", "tokens")
    fields = [*((name, pa.string()) for name in texts), ("line", pa.int32()), ("end_line", pa.int32())]
    tokens = [("token_vectors", pa.large_binary())] if about.maxsim else []
    return pa.schema([*fields, ("vector", pa.list_(pa.float32(), about.dimensions)), *tokens])


def _file_schema() -> "pa.Schema":
    import pyarrow as pa

    kinds = (pa.string(), pa.int64(), pa.int64(), pa.string(), pa.int32(), pa.string())
    return pa.schema(list(zip(Record._fields, kinds, strict=True)))
