"""The index of search.py: chunks, vectors and full text in LanceDB, in one folder on disk.

from mlx_retrieval.retrieval.lance_index import Index
index = Index.open(".index")
for hit in index.bm25("read line", 10): print(hit.path, hit.line, hit.score)
for hit in index.semantic(model.encode("read line", prompt="query"), 10): print(hit.path, hit.line, hit.score)

index.json       source folder, model and settings: base.IndexInfo
chunks.lance     one row a chunk: place, text, terms, vector; late interaction: slot
tokens           late interaction: the token vectors by their slots, see token_store.py
files.lance      one row a file: size, time, hash; written after the chunks of the file
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_retrieval.dataset.chunks import MAX_CHARACTERS, OVERLAP, Chunk
from mlx_retrieval.retrieval import index_folder, lance_tables
from mlx_retrieval.retrieval.analyzer import ANALYSIS, analyzer, is_cut_otherwise
from mlx_retrieval.retrieval.base import EVERYWHERE, TOKEN_BITS, VERSION, FileRecord, Hit, IndexInfo, Within
from mlx_retrieval.retrieval.index_folder import read_info, write_info, written_at
from mlx_retrieval.retrieval.lance_errors import plain_errors, reading, unreadable, writing
from mlx_retrieval.retrieval.lance_tables import HIT_COLUMNS, filtered, hits
from mlx_retrieval.retrieval.late_chunks import TOKENS, LateChunks
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.products import product
from mlx_retrieval.utils.progress import Progress
from mlx_retrieval.utils.text import shell

WHOLE_TOKENS = 2  # version that kept the vectors of all tokens as they are
TEXTS = ["path", "name", "language", "context", "text"]  # columns that words are made of
# From PARTITIONS_FROM chunks on, LanceDB keeps the vectors in partitions (IVF, uncompressed) in memory: about ten times
# faster than reading the table. The nearest PROBES partitions are searched: up to 250,000 chunks these are all of them,
# so nothing is missed (benchmarks/search_latency.py). The size of a partition is given, not their number: LanceDB would
# merge a given number into a few large ones.
PARTITIONS_FROM, PARTITION_SIZE, PROBES = 10_000, 1_000, 250
Vectors = np.ndarray | list[np.ndarray]  # (N, D) float32; late interaction: N arrays (L, D)


class Index:
    """An index on disk. Make one by `create` or `open`."""

    def __init__(self, folder: Path, info: IndexInfo, database: Any):
        self.folder, self.info, self.database = folder, info, database
        self._written = written_at(folder)
        self.chunks, self.files = database.open_table("chunks"), database.open_table("files")
        self.late = LateChunks(folder, info, self.chunks) if info.maxsim else None

    @classmethod
    def create(cls, folder: Path, info: IndexInfo) -> "Index":
        """Create an empty index in place of an older one. Raises UserError if the folder holds anything else."""
        index_folder.check(folder)
        try:
            index_folder.clear(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if info.maxsim:
                (folder / TOKENS).mkdir()
            if not (folder / ".gitignore").exists():
                (folder / ".gitignore").write_text("*\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--index {folder}: {error.strerror}") from error
        with plain_errors(folder, "nothing is indexed yet"):
            database = lance_tables.connect(folder)
            chunks = database.create_table("chunks", schema=lance_tables.chunk_schema(info))
            lance_tables.index_words(chunks)
            database.create_table("files", schema=lance_tables.file_schema())
            index = cls(folder, info, database)
        index.write()
        return index

    @classmethod
    def open(cls, folder: str | Path, outdated: bool = False) -> "Index":
        """Open the index in `folder`.

        Args:
            outdated: open one of an earlier version, too: `rewriting.rewrite` brings it up to date.

        Raises UserError, with the command to run, if it is missing, damaged, or of another version.
        """
        folder = Path(folder).expanduser()
        info = read_info(folder)
        database = lance_tables.connect(folder)
        try:
            index = cls(folder, info, database)
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(f"{folder}: {unreadable(error)}") from error
        if info.version == WHOLE_TOKENS and not info.maxsim:
            info.version = VERSION
        if info.version != VERSION and not outdated:
            how = "kept token vectors uncompressed" if info.version == WHOLE_TOKENS else "split words differently"
            raise UserError(
                f"{folder}: made by an earlier version, which {how}. To bring it up to date, without embedding again: "
                f"{index.command(info.model)}"
            )
        return index

    @property
    def root(self) -> Path:
        """The indexed folder, absolute."""
        return (self.folder.resolve() / self.info.root).resolve()

    def command(self, model: str, *flags: str, late: bool = True) -> str:
        """Return the command that brings the index up to date: with the flags that it was made with.

        `late`: whether the model may compute token vectors. Others refuse the flags for them.
        """
        info = self.info
        folders = [str(self.root / name) for name in info.folders or ["."]]
        settings = (
            ("--chunk-size", info.max_characters, MAX_CHARACTERS),
            ("--overlap", info.overlap, OVERLAP),
            ("--max-file-size", info.max_file_size, None),
        )
        of_tokens = ("--token-bits", info.token_bits, TOKEN_BITS), ("--token-pooling", info.token_pooling, 1)
        settings += of_tokens if late else ()
        given = [str(word) for flag, value, default in settings if value != default for word in (flag, value)]
        given += [f"--exclude={pattern}" for pattern in info.exclude] + ["--documents"] * info.documents
        start = ("python", "search.py", "index", *folders, "--model-path", model, "--index", self.folder)
        return shell(*start, *given, *flags)

    def rebuild_command(self, model: str, late: bool) -> str:
        """Return the command that rebuilds the index with a model, of late interaction or not."""
        return self.command(model, "--rebuild", late=late)

    def write(self) -> None:
        """Write index.json atomically."""
        write_info(self.folder, self.info)
        self._written = written_at(self.folder)

    def refreshed(self) -> "Index":
        """Return this index, opened again if another process has written index.json since."""
        return self if written_at(self.folder) in (0, self._written) else Index.open(self.folder)

    def keep_weight(self, weight: float | None) -> None:
        """Record the share of the meaning in a search by both; None = the default."""
        self.info.weight = weight
        self.write()

    @reading
    def has_older_words(self) -> bool:
        """Return whether an earlier version cut words in here otherwise than ANALYSIS does."""
        if self.info.analysis == ANALYSIS:
            return False
        batches = lance_tables.batches(self.chunks, TEXTS, self.folder)
        texts = (text for batch in batches for column in batch.columns for text in column.to_pylist())
        return any(map(is_cut_otherwise, texts))

    @reading
    def is_empty(self) -> bool:
        """Return whether the index was never finished and has neither chunks nor files."""
        return not (self.info.complete or self.chunks.count_rows() or self.files.count_rows())

    def size(self) -> int:
        """Return the size on disk in bytes."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    # --- writing: chunks first, then the records of their files ---

    @reading
    def records(self) -> dict[str, FileRecord]:
        """Return the records of all files that were read, by path."""
        rows = self.files.search().limit(None).to_arrow().to_pylist()
        return {row["path"]: FileRecord(**row) for row in rows}

    @writing
    def remove(self, paths: Sequence[str]) -> None:
        """Remove files and their chunks: records first, so that a kill in between leaves orphaned chunks at worst."""
        for table in (self.files, self.chunks):
            for condition in lance_tables.path_conditions(paths):
                table.delete(condition)

    @writing
    def remove_orphans(self, records: dict[str, FileRecord]) -> int:
        """Remove chunks that an interrupted run left without a record. Return their number."""
        before = self.chunks.count_rows()
        for condition in lance_tables.path_conditions(lance_tables.orphans(self.chunks, records)):
            self.chunks.delete(condition)
        return before - self.chunks.count_rows()

    @reading
    def check(self) -> None:
        """Raise UserError if a run could not go on with this index. Nothing is written."""
        lance_tables.orphans(self.chunks, self.records())
        if self.late:
            self.late.store.check()

    @writing
    def add(self, files: Sequence[tuple[FileRecord, list[Chunk]]], vectors: Vectors, stored: set[str]) -> None:
        """Add files and their chunks, with one vector a chunk. Files whose path is in `stored` are replaced."""
        import pyarrow as pa

        self.remove([record.path for record, _ in files if record.path in stored])
        rows = [
            {"id": f"{record.path}#{number}", "path": record.path, "file_hash": record.sha256, **chunk._asdict()}
            for record, chunks in files
            for number, chunk in enumerate(chunks)
        ]
        if rows:
            columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
            if self.late:
                columns["slot"] = pa.array(self.late.add(vectors))
            else:
                columns["vector"] = lance_tables.vector_column(vectors)
            self.chunks.add(lance_tables.chunk_rows(columns, rows, self.info))
        self.record([record for record, _ in files])

    @writing
    def copy(self, other: "Index", progress: Progress) -> None:
        """Add all files and chunks of another index of the same model, with their vectors; the words are made again."""
        count = 0
        if self.late:
            self.late.copy(other.folder)
        kept = [name for name in other.chunks.schema.names if name != "tokens"]
        for batch in lance_tables.batches(other.chunks, kept, other.folder):
            if len(batch):
                columns = {name: batch[name] for name in kept}
                if self.late and "slot" not in columns:
                    columns["slot"] = self.late.add_whole(columns.pop("token_vectors"))
                self.chunks.add(lance_tables.chunk_rows(columns, batch.select(TEXTS).to_pylist(), self.info))
                progress(count := count + len(batch))
        if records := list(other.records().values()):
            self.record(records)

    @writing
    def record(self, records: Sequence[FileRecord]) -> None:
        """Add the records of files, or replace them."""
        import pyarrow as pa

        rows = pa.Table.from_pylist([record._asdict() for record in records], schema=lance_tables.file_schema())
        self.files.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    @writing
    def finish(self) -> None:
        """Bring the full-text and vector indices up to date, and free the space of replaced rows."""
        from lancedb.index import IvfFlat

        count = self.chunks.count_rows()
        # Rebuilt, because LanceDB's own update still counts removed chunks: scores must depend on the chunks alone, not
        # on the history of the index. It takes a few seconds for 100,000 chunks.
        lance_tables.index_words(self.chunks)
        for table in (self.chunks, self.files):
            lance_tables.tidy(table)
        if self.late:
            self.late.finish()
        # Partitions are trained again whenever the index has doubled.
        elif count >= max(PARTITIONS_FROM, 2 * self.info.partitioned):
            sizes = {"target_partition_size": PARTITION_SIZE, "max_iterations": 20, "sample_rate": 64}
            config = IvfFlat(distance_type="dot", **sizes)
            self.chunks.create_index("vector", config=config, replace=True)
            lance_tables.tidy(self.chunks)
            self.info.partitioned = count
        self.info.complete = True
        self.write()

    # --- searching ---

    @reading
    def bm25(self, query: str, top: int, within: Within = EVERYWHERE) -> list[Hit]:
        """Return the chunks that hold any word of the query, scored by BM25F. Queries have no operators.

        Raises UserError, with the command to run, for a query whose words an earlier version cut otherwise.
        """
        from lancedb.query import MatchQuery

        if self.info.analysis < ANALYSIS and is_cut_otherwise(query):
            raise UserError(
                f"{self.folder}: made by an earlier version, which cut words of this script otherwise. To bring it up "
                f"to date, without embedding again: {self.command(self.info.model)}"
            )
        terms = " ".join(analyzer(self.info.language).query_terms(query))
        if not terms:
            return []
        self.chunks.checkout_latest()
        search = filtered(self.chunks.search(MatchQuery(terms, "tokens"), query_type="fts"), within)
        rows = search.select(["id", *HIT_COLUMNS, "_score"]).with_row_id(True).limit(top).to_list()
        return hits(((row, row["_score"]) for row in rows), within)

    @reading
    def semantic(self, vector: np.ndarray, top: int, within: Within = EVERYWHERE) -> list[Hit]:
        """Return the chunks nearest to the query's vector (D,), scored by the dot product: the cosine.

        Late interaction: `vector` holds the vectors of the query's tokens (L, D); scores are MaxSim, see LateIndex.
        """
        self.chunks.checkout_latest()
        if self.late:
            scores = dict(self.late.search(vector, top, within))
            rows = self._rows(list(scores))
            return hits(((row, scores[row["_rowid"]]) for row in rows), within)
        if within.rows:  # LanceDB would look through the whole table for them
            rows = self._rows(within.rows, "vector")
            scores = product(np.array([row["vector"] for row in rows], np.float32).reshape(-1, len(vector)), vector)
            return hits(zip(rows, scores.tolist(), strict=True), within)[:top]
        search = self.chunks.search(vector, vector_column_name="vector").distance_type("dot").nprobes(PROBES)
        # Chunks that are named are compared one by one.
        search = filtered(search if within.ids is None else search.bypass_vector_index(), within)
        rows = search.select(["id", *HIT_COLUMNS, "_distance"]).with_row_id(True).limit(top).to_list()
        return hits(((row, 1 - row["_distance"]) for row in rows), within)

    def _rows(self, numbers: Sequence[int], *columns: str) -> list[dict[str, Any]]:
        """Return the rows with these ids; those that were removed meanwhile are left out."""
        return self.chunks.take_row_ids(list(numbers)).select(["id", *HIT_COLUMNS, *columns]).with_row_id().to_list()

    @reading
    def chunk_texts(self) -> list[dict[str, Any]]:
        """Return id, path, place and texts of all chunks."""
        columns = ["id", *HIT_COLUMNS, "context"]
        return self.chunks.search().select(columns).limit(None).to_arrow().to_pylist()

    @reading
    def languages(self) -> list[str]:
        """Return the languages of all chunks, sorted."""
        return lance_tables.distinct(self.chunks, "language")

    @reading
    def unmatched(self, paths: Sequence[str], hits: Sequence[Hit]) -> list[str]:
        """Return those of the paths, as `Within` has them, that no chunk matches. `hits` are looked at first."""
        rest = lance_tables.unmatched(paths, [hit.path for hit in hits])
        others = lance_tables.distinct(self.chunks, "path", Within(paths=tuple(rest))) if rest else []
        return lance_tables.unmatched(rest, others)

    @reading
    def chunks_of(self, path: str) -> list[Hit]:
        """Return the chunks of a file or document, in their order, with a score of 0; [] if there is no such one."""
        (condition,) = lance_tables.path_conditions([path])
        return lance_tables.chunks_where(self.chunks, condition)

    @reading
    def chunk(self, name: str) -> Hit | None:
        """Return the chunk with this id, with a score of 0; None if there is no such one."""
        return next(iter(lance_tables.chunks_where(self.chunks, lance_tables.condition(Within(ids=(name,))))), None)

    @reading
    def lines_of(self, paths: Sequence[str]) -> dict[str, list[range]]:
        """Return path -> the lines of each of its chunks, for those of these files or documents that have any."""
        return lance_tables.lines_of(self.chunks, paths)

    @reading
    def count(self, within: Within = EVERYWHERE) -> int:
        """Return the number of chunks."""
        self.chunks.checkout_latest()
        return self.chunks.count_rows(lance_tables.condition(within) or None)

    def known(self, wanted: Sequence[str]) -> list[str]:
        """Return the paths of all files, or the ids of all documents, that have chunks, whichever are `wanted`."""
        return [path for path, record in self.records().items() if not record.left_out]
