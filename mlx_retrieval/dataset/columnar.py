"""Read the rows of Parquet and Arrow files, some at a time.

for row in parquet_rows("rows.parquet"): ...        # a dict of Python values
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mlx_retrieval.utils.errors import UserError

BATCH = 1000  # rows that are Python objects at once
PARQUET, ARROW_FILE, ARROW_STREAM, FEATHER_1 = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"FEA1"  # first bytes


def parquet_rows(source: Path | BinaryIO, name: Path | str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file. UserError, with the file's name, if it is none."""
    from pyarrow import parquet

    with _errors(name), parquet.ParquetFile(source) as opened:
        _check_names(opened.schema_arrow.names, name)
        for batch in opened.iter_batches(BATCH):
            yield from batch.to_pylist()


def arrow_rows(source: Path | BinaryIO, name: Path | str) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow IPC file (Feather, version 2) or stream. UserError, with the file's name."""
    import pyarrow as pa

    with _errors(name), _opened(source) as opened:
        if bytes(opened.read(6)) == ARROW_FILE:
            reader = pa.ipc.open_file(opened)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            opened.seek(0)
            reader = batches = pa.ipc.open_stream(opened)
        _check_names(reader.schema.names, name)
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH):
                yield from batch.slice(start, BATCH).to_pylist()


def _opened(source: Path | BinaryIO) -> Any:
    import pyarrow as pa

    return pa.memory_map(str(source)) if isinstance(source, Path) else pa.PythonFile(source)


@contextmanager
def _errors(name: Path | str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error


def _check_names(names: list[str], name: Path | str) -> None:
    if twice := next((key for key in names if names.count(key) > 1), None):
        raise UserError(f"{name}: the column {twice} is there twice: rename one of them")
