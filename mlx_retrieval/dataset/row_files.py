"""Open the rows of a file of any format as lines of JSON: JSON lines and arrays, tables, Parquet, Arrow, hub data sets.

    with RowFile(Path("pairs.csv")) as file:
        for line in file.lines(): ...            # line.number is the place in pairs.csv
        file.read(line.start, line.size)         # the JSON of that row again, as long as the file is open

Plain JSON lines are read where they are. The rows of other formats are written to a temporary file as they are read,
so memory stays the same whatever the size; see row_store.py. The format is known by the file's ending, and without one
by its beginning.
"""

import codecs
import gzip
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

from mlx_retrieval.dataset import beir_rows
from mlx_retrieval.dataset.columnar import ARROW_FILE, ARROW_STREAM, FEATHER_1, PARQUET, arrow_rows, parquet_rows
from mlx_retrieval.dataset.columns import Columns, check_roles
from mlx_retrieval.dataset.json_lines import Fault, Line, RowError, lines_of, no_text, parse_value
from mlx_retrieval.dataset.row_store import RowStore
from mlx_retrieval.dataset.tables import Table
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.pipes import spooled

HUB = "hf://"
HEAD = 4096  # bytes by which a format is recognised
GZIP = b"\x1f\x8b"
FORMATS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv", ".tab"), "table"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".arrow", ".arrows", ".feather", ".ipc"), "arrow"),
}
# First bytes of files that are not read -> the way on.
OTHERS = {
    b"PK\x03\x04": "an Excel workbook or another zip file: save its sheet as CSV UTF-8, or unpack it",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save its sheet as CSV UTF-8",
    b"BZh": "compressed by bzip2: unpack it (bunzip2)",
    b"\xfd7zXZ": "compressed by xz: unpack it (unxz)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it (unzstd)",
    b"SQLite format 3": "an SQLite database: export the table as CSV",
    FEATHER_1: "Feather of version 1: write it again with pyarrow, as version 2",
}
TABLE = re.compile(rb"[^\W\d][^{\[\n]*[,;\t|]")  # how a table in a file of JSON begins
IN_ORDER = re.compile(rb'\s*(?:\[|\{\s*"set"\s*:)')  # rows whose texts have no names

OBJECT = re.compile(rb'\s*\[?\s*\{\s*"(?:[^"\\\n]|\\.)*"\s*:')  # how JSON begins, and no table does

Numbered = Iterator[tuple[int, Any]]


class RowFile:
    """The rows of a file, a BEIR folder or a hub data set.

    Args:
        file: a path, or an `hf://` name.
        columns: of `--columns`; tables and BEIR folders need to know them.
        store: where its rows are read again, which several files share; None = its own.

    Attributes:
        name: for messages; of a BEIR folder, its file of queries.
        form: how the rows are stored, in words; "" = as JSON objects. Known once `lines` has begun.
        labels: keys of rows that the file does not have itself -> what they are called there.
        columns: those that still apply to the rows that `lines` yields; None = none.

    Raises UserError if the file cannot be read, also while it is read.
    """

    def __init__(self, file: Path | str, columns: Columns | None = None, store: RowStore | None = None):
        self.name: Path | str = file
        self.form = ""
        self.labels: dict[str, str] = {}
        self.columns = columns or None
        self._opened: list[BinaryIO] = []  # while the rows are read for the first time
        self._folder: beir_rows.BeirRows | None = None
        self._store, self._owns_store = store or RowStore(), store is None
        self._path: Path | None = None  # of the JSON of the rows, if they are read where they are
        self._number: int | None = None  # of that file in the store
        try:
            self._lines = self._open(file)
        except (OSError, EOFError, zlib.error) as error:
            raise self._error(error) from error

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing can be read any more, but for what is in a shared store."""
        self._release()
        if self._owns_store:
            self._store.close()

    def _release(self) -> None:
        """Close what only the first reading needs."""
        while self._opened:
            self._opened.pop().close()

    def lines(self) -> Iterator[Line]:
        """Yield the rows, once; UserError as for the class."""
        try:
            yield from self._lines
            if self._folder:
                self.form = self._folder.form  # with what was left out
            if self._path:
                self._number = self._store.keep(self._opened.pop(), self._path)
            self._release()
        except (OSError, EOFError, zlib.error) as error:
            raise self._error(error) from error

    def read(self, start: int, size: int) -> bytes:
        """Return the JSON of a row by its place, once `lines` has yielded all of them."""
        return self._store.read(self._number, start, size)

    # --- formats ------------------------------------------------------------------------------------------------------

    def _open(self, file: Path | str) -> Iterator[Line]:
        if isinstance(file, str):
            check_roles(self.columns or {})
            self.form = "hub data set"
            return self._written(enumerate(_hub_rows(file), start=1))
        if file.is_dir():
            self._folder = folder = beir_rows.BeirRows(file, self.columns)
            self.columns = None
            self.name, self.form, self.labels = folder.queries_file, folder.form, folder.labels
            self._opened.append(folder)
            return self._written(folder.rows())
        check_roles(self.columns or {})
        path = spooled(file)
        plain = self._keep(open(path, "rb"))
        handle, head = plain, _head(plain)
        if packed := head.startswith(GZIP) or file.suffix == ".gz":
            handle = self._keep(gzip.open(plain))
            head = _head(handle)
        if reason := next((reason for magic, reason in OTHERS.items() if head.startswith(magic)), None):
            raise UserError(f"{file}: {reason}")
        kind = _kind(head, Path(file.name.removesuffix(".gz")).suffix.lower())
        if kind in ("parquet", "arrow"):
            self.form = "Parquet" if kind == "parquet" else "Arrow"
            rows = parquet_rows if kind == "parquet" else arrow_rows
            return self._written(enumerate(rows(self._unpacked(handle) if packed else path, file), start=1))
        if kind == "table":
            table = Table(handle, file, self.columns)
            self.form, self.labels = table.form, table.labels
            return self._written(table.rows())
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{file}: JSON in UTF-16; convert it to UTF-8: iconv -f utf-16 -t utf-8")
        return self._json(handle, packed)

    def _json(self, handle: BinaryIO, packed: bool) -> Iterator[Line]:
        lines = lines_of(handle)
        first = next(lines, None)
        if first and not isinstance(first.data, Fault) and TABLE.match(first.data):
            first = first._replace(data=Fault(b"not JSON; a table of text needs a name that ends in .csv or .tsv"))
        every = itertools.chain([first] if first else [], lines)
        if first and IN_ORDER.match(first.data):
            self.form, self.labels = (
                "texts in order",
                {"query": "text 1", "positive": "text 2", "negatives": "the rest"},
            )
            return self._written((line.number, _named(line.data)) for line in every)
        if packed:
            return self._written((line.number, line.data) for line in every)
        self._path = Path(handle.name).absolute()
        return every

    def _written(self, rows: Numbered) -> Iterator[Line]:
        """Yield rows as lines, once their JSON is in a temporary file. `rows`: their numbers; objects, or JSON."""
        for number, row in rows:
            data = row if isinstance(row, bytes) else _as_json(row)
            size = 0 if isinstance(data, Fault) else len(data)
            yield Line(number, self._store.write(data if size else b""), size, data)
        self._store.flush()

    def _unpacked(self, handle: BinaryIO) -> BinaryIO:
        """Return a temporary file with all that can be read from a handle: Parquet is not read in order."""
        file = self._keep(tempfile.TemporaryFile())
        shutil.copyfileobj(handle, file, 1 << 20)
        file.seek(0)
        return file

    def _keep(self, handle: BinaryIO) -> BinaryIO:
        self._opened.append(handle)
        return handle

    def _error(self, error: Exception) -> UserError:
        if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)):
            return UserError(f"{self.name}: not a whole gzip file ({error})")
        return UserError(f"{self.name}: {getattr(error, 'strerror', None) or error}")


def first_row(file: Path | str, columns: Columns | None = None) -> Any:
    """Return the first row of a file as a JSON value; None if there is none or it is broken. UserError as RowFile."""
    with RowFile(file, columns) as opened:
        if (line := next(opened.lines(), None)) is None:
            return None
        try:
            return parse_value(line.data)
        except RowError:
            return None


def _head(handle: BinaryIO) -> bytes:
    handle.seek(0)  # macOS opens /dev/stdin where it was left
    head = handle.read(HEAD)
    handle.seek(0)
    return head


def _kind(head: bytes, suffix: str) -> str:
    """Return json, table, parquet or arrow, by a file's first bytes and its ending."""
    if head.startswith(PARQUET):
        return "parquet"
    if head.startswith((ARROW_FILE, ARROW_STREAM)):
        return "arrow"
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if suffix in FORMATS and not (FORMATS[suffix] == "table" and _is_json(begins)):
        return FORMATS[suffix]
    return "json" if not begins or begins.startswith((b"{", b"[")) else "table"


def _is_json(head: bytes) -> bool:
    """Return whether a file begins with a JSON object, alone in its line if all of it is read, or an array of them."""
    if not OBJECT.match(head) or head.startswith(b"[") or b"\n" not in head:
        return bool(OBJECT.match(head))
    try:
        return isinstance(parse_value(head.partition(b"\n")[0]), dict)
    except RowError:
        return False


def _as_json(row: Any) -> bytes:
    return _ENCODER.encode(row).encode("utf-8", "replace") + b"\n"


def _as_value(value: Any) -> Any:
    """Return a value that JSON lacks as a text or number, or else `no_text`, which is refused where it is read."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return no_text("binary, not UTF-8")
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else no_text(f"a value of the type {type(value).__name__}")


_ENCODER = json.JSONEncoder(ensure_ascii=False, default=_as_value)


def _named(data: bytes) -> Any:
    """Return the row of a JSON list of texts: a query, its document and negatives; of `{"set": [...]}`, one query."""
    try:
        value = parse_value(data)
    except RowError:
        return data
    if isinstance(value, dict) and isinstance(texts := value.get("set"), list) and len(texts) > 1:
        return {"query": texts[0], "positive": texts[1:]} | {key: value[key] for key in value if key != "set"}
    if not isinstance(value, list):
        return data
    if len(value) < 2 or not all(isinstance(text, str) for text in value):
        return Fault(b"a list must hold texts: a query, its document, and then negatives")
    return {"query": value[0], "positive": value[1]} | ({"negatives": value[2:]} if value[2:] else {})


def hub_validation(source: str) -> str | None:
    """Return the name of the validation rows of a hub data set that is named without a split; None = it has none."""
    from datasets import get_dataset_split_names
    from datasets.exceptions import DatasetsError

    *name, split = _hub_name(source)
    if split:
        return None
    try:
        splits = get_dataset_split_names(*name)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--data {source}: {str(error).strip().splitlines()[0][:300]}") from error
    return next((f"{source}:{split}" for split in ("validation", "valid") if split in splits), None)


def hub_validations(sources: Iterable[str]) -> list[str]:
    """Return the names of the validation rows of those of some sources that are hub data sets with such rows."""
    return list(filter(None, (hub_validation(source) for source in sources if source.startswith(HUB))))


def _hub_name(source: str) -> list[str]:
    """Return owner/name, the config if one is named, and the split or "", of hf://owner/name[/config][:split]."""
    name, _, split = source.removeprefix(HUB).partition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise UserError(f"--data {source}: a data set's name is needed, hf://owner/name[/config][:split]")
    return ["/".join(parts[:2]), *parts[2:], split]


def _hub_rows(source: str) -> Iterable[dict]:
    """Yield the rows of hf://owner/name[/config][:split] as the hub streams them."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    *name, split = _hub_name(source)
    try:
        stored = load_dataset(*name, split=split or "train", streaming=True)
        yield from stored
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--data {source}: {str(error).strip().splitlines()[0][:300]}") from error
