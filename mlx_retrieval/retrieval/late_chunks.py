"""Late interaction in an index of LanceDB: its rows hold slots, and a TokenStore beside it the token vectors."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_retrieval.retrieval import lance_tables
from mlx_retrieval.retrieval.base import EVERYWHERE, IndexInfo, Within
from mlx_retrieval.retrieval.late_interaction import LateIndex
from mlx_retrieval.retrieval.token_pooling import pool
from mlx_retrieval.retrieval.token_store import TokenStore

TOKENS = "tokens"  # the store, in an index's folder
NO_SLOT = -1


class Opened(NamedTuple):
    """The store as a version of the table needs it. Threads share it, so it is replaced in one piece."""

    version: int  # of the table
    index: LateIndex | None  # None = no chunks
    numbers: np.ndarray  # documents of `index` that have a row, ascending
    rows: np.ndarray  # the ids of their rows


class LateChunks:
    """The token vectors of the chunks in a table, and a search among them.

    Args:
        folder: of the index.
        table: chunks.lance, with a column `slot`.
    """

    def __init__(self, folder: Path, info: IndexInfo, table: Any):
        self.info, self.table = info, table
        self.store = TokenStore(folder / TOKENS, info.token_bits)
        self._opened: Opened | None = None

    def add(self, vectors: Sequence[np.ndarray]) -> np.ndarray:
        """Store the token vectors (L_i, d) float32 of chunks, pooled. Return their slots."""
        return self.store.add([pool(each, self.info.token_pooling) for each in vectors])

    def add_whole(self, cells: Any) -> Any:
        """Store the token vectors of an index of version 2, a column of float16. Return the column of their slots."""
        import pyarrow as pa

        vectors = [np.frombuffer(cell.as_buffer(), np.float16) for cell in cells]
        return pa.array(self.add([each.reshape(-1, self.info.dimensions).astype(np.float32) for each in vectors]))

    def copy(self, folder: Path) -> None:
        """Copy the store of another index, whose slots stay as they are, if it has one."""
        if (folder / TOKENS).exists():
            shutil.copytree(folder / TOKENS, self.store.folder, dirs_exist_ok=True)

    def finish(self) -> None:
        """Compress what is not yet compressed, and remove what no row needs."""
        self.store.finish(self._slots(EVERYWHERE)["slot"].to_numpy())

    def search(self, query: np.ndarray, top: int, within: Within) -> list[tuple[int, float]]:
        """Return (row id, score) of the best chunks for a query's token vectors (L, d), best first."""
        if (opened := self._opened) is None or opened.version != self.table.version:
            self._opened = opened = self._open()
        _, index, numbers, rows = opened
        if not len(numbers):
            return []
        among = None if len(numbers) == len(index) else numbers
        if within != EVERYWHERE:
            chosen = within.rows or self._slots(within)["_rowid"].to_numpy()
            among = numbers[np.isin(rows, chosen)]
        best = index.best(query, top, among)
        places = np.searchsorted(numbers, [number for number, _ in best])
        return [(row, score) for row, (_, score) in zip(rows[places].tolist(), best, strict=True)]

    def _open(self) -> Opened:
        """Open the store as the newest version of the table needs it."""
        version = self.table.version  # before its rows: if another thread moves it on meanwhile, this is opened again
        live = self._slots(EVERYWHERE)
        slots, rows = live["slot"].to_numpy(), live["_rowid"].to_numpy()
        if not len(slots):
            return Opened(version, None, slots, rows)
        index, stored = self.store.open(self.info.maxsim, self.info.impute)
        order = np.argsort(stored, kind="stable")  # of a slot that a killed merge left twice, the first
        places = np.searchsorted(stored, slots, sorter=order)
        there = places < len(stored)
        there[there] = stored[order[places[there]]] == slots[there]
        numbers, rows = order[places[there]], rows[there]
        ascending = np.argsort(numbers)
        return Opened(version, index, numbers[ascending], rows[ascending])

    def _slots(self, within: Within) -> Any:
        """Return `slot` and `_rowid` of the rows that meet conditions, an Arrow table."""
        search = self.table.search().select(["slot"]).with_row_id(True)
        return lance_tables.filtered(search, within).limit(None).to_arrow()
