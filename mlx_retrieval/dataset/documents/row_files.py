"""Read tables, JSON lines and JSON as documents: each row is one.

{"title": "Kettles", "text": "A kettle boils water."}       # title and text
{"name": "K1", "price": 20, "notes": "boils"}               # title K1; text "price: 20", "notes: boils"
"""

import csv
import gzip
import io
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from mlx_retrieval.dataset import table_layout
from mlx_retrieval.dataset.documents.decoding import read_text
from mlx_retrieval.dataset.documents.document import (
    DAMAGED,
    FORBIDDEN,
    NOT_UTF8,
    UNREADABLE,
    Document,
    Note,
    Section,
    UnreadableError,
    clean,
    one_line,
    title_of,
)
from mlx_retrieval.dataset.json_lines import MAX_ROW_BYTES, RowError, lines_of, parse_value
from mlx_retrieval.dataset.roles import snake_case
from mlx_retrieval.utils.files import reason

TABLE, JSON = "table", "JSON"
IDS = ("_id", "id")
TITLES = ("title", "headline", "question", "query", "heading", "subject", "name")
TEXTS = (
    *("text", "content", "contents", "body", "document", "passage", "positive"),
    *("article", "abstract", "answer", "description"),
)
LINKS = ("url", "uri", "href", "link")
NO_TEXTS = ("true", "false", "null", "none", "nan")  # cells that say something else

Fields = Sequence[tuple[str, Any]]


# --- a row ------------------------------------------------------------------------------------------------------------


def row_document(name: str, form: str, number: int, row: Any) -> Document | None:
    """Return the document of a row; None if it has no text.

    Its title is the first of TITLES that it has. Its text is all of TEXTS that it has, in the row's order, or else the
    other fields as lines `key: value`, without ids and links; values inside others have keys such as `author.name`.

    Args:
        name: the file's path.
        form: TABLE or JSON.
        number: the row's line, counted from 1; 0 = the file is one document.
        row: a JSON value, or pairs of (column, cell); a column without a name is "".
    """
    if isinstance(row, dict | tuple):
        fields: Fields = [*row.items()] if isinstance(row, dict) else row
    else:
        fields = [("text" if isinstance(row, str) else "", row)]
    by_name = {snake_case(key): value for key, value in reversed(fields)}  # of columns of one name, the first
    title_key = next((key for key in TITLES if _is_text(by_name.get(key))), None)
    title = by_name[title_key] if title_key else ""
    texts = [value for key, value in fields if snake_case(key) in TEXTS and _is_text(value)]
    if not texts:
        no_texts = {title_key, *IDS, *LINKS}
        texts = ["\n".join(_lines(field for field in fields if snake_case(field[0]) not in no_texts))]
    text = clean("\n\n".join(texts)).strip("\n")
    if not text.strip():
        text, title = clean(title).strip(), ""
    if not text:
        return None
    sections = (Section((), max(number, 1), text),)
    title = one_line(title) if number else title_of(name, sections, title)
    row_id = next((str(by_name[key]) for key in IDS if _is_id(by_name.get(key))), "")
    return Document(name, form, title, sections, line=number, row_id=clean(row_id))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and any(map(str.isalpha, value)) and value.strip().lower() not in NO_TEXTS


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _lines(fields: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Yield `key: value` of the texts and numbers among some fields and of all that is inside them, in their order."""
    pending = deque(fields)
    while pending:
        key, value = pending.popleft()
        if isinstance(value, dict):
            pending.extendleft([(f"{key}.{inner}" if key else inner, value[inner]) for inner in reversed(value)])
        elif isinstance(value, list):
            pending.extendleft([(key, inner) for inner in reversed(value)])
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            text = value.strip() if isinstance(value, str) else str(value)
            if text and text.lower() not in NO_TEXTS:
                yield f"{key}: {text}" if key else text


# --- tables -----------------------------------------------------------------------------------------------------------


def read_table(path: Path, name: str, note: Note) -> Iterator[Document]:
    """Read the rows of a table, CSV, TSV and their kin: see plain_text.read_plain for the arguments.

    Delimiter and header are recognised as in training data (dataset/table_layout.py). Broken rows are noted.
    """
    text = read_text(path)
    named = table_layout.EXCEL.match(text)
    delimiter = named[1] if named and named[1] in table_layout.DELIMITERS else ""
    text = text[named.end() :] if delimiter else text
    layout, records = table_layout.layout_of(_sample(text, delimiter))
    header, keys = len(records) > 1 and table_layout.is_header(records, ()), ()
    rows = layout.reader(iter(io.StringIO(text, newline="")))
    while True:
        number = 1 + bool(delimiter) + rows.line_num
        try:
            record = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            note(DAMAGED, "row", f"line {number}: {error}")
            continue
        if not any(map(str.strip, record)):
            continue
        if header:
            keys, header = tuple(map(str.strip, record)), False
            continue
        pairs = tuple((keys[i] if i < len(keys) else "", cell) for i, cell in enumerate(record))
        if document := row_document(name, TABLE, number, pairs):
            yield document


def _sample(text: str, delimiter: str) -> table_layout.Sample:
    """Return the first lines of a table's text."""
    if len(text) <= table_layout.SAMPLE:
        return table_layout.Sample(text, "utf-8", True, delimiter)
    first = text[: table_layout.SAMPLE]
    return table_layout.Sample(first[: first.rfind("\n") + 1] or first, "utf-8", False, delimiter)


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: Path, name: str, note: Note) -> Iterator[Document]:
    """Read JSON lines, a JSON array, or one JSON value: see plain_text.read_plain for the arguments.

    Each line or element is a document. Broken ones are noted. Lines are read one after another, so that the file may be
    larger than memory.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            whole = _one_value(file)
            if whole is None:
                yield from _rows(file, name, note)
            elif document := row_document(name, JSON, 0, whole):
                yield document
    except PermissionError as error:
        raise UnreadableError(FORBIDDEN) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableError(DAMAGED, f"not a whole gzip file ({error})") from error
    except OSError as error:
        raise UnreadableError(UNREADABLE, reason(error)) from error


def _rows(file: BinaryIO, name: str, note: Note) -> Iterator[Document]:
    for line in lines_of(file):
        try:
            row = parse_value(line.data)
        except RowError as error:
            note(NOT_UTF8 if "not UTF-8" in str(error) else DAMAGED, "row", f"line {line.number}: {error}")
        else:
            if document := row_document(name, JSON, line.number, row):
                yield document


def _one_value(file: BinaryIO) -> Any:
    """Return the JSON object that a file is, over several lines; None, with the file rewound, if it is rows."""
    head = file.readline(MAX_ROW_BYTES)
    rest = b"" if _is_row(head) else file.read(MAX_ROW_BYTES)
    whole = None
    if rest and not file.read(1):
        with suppress(RowError):  # rows, of which the first is broken
            whole = parse_value((head + rest).removeprefix(b"\xef\xbb\xbf").strip())
    file.seek(0)
    return whole if isinstance(whole, dict) else None


def _is_row(line: bytes) -> bool:
    """Return whether a line is a JSON value by itself, or begins an array."""
    line = line.removeprefix(b"\xef\xbb\xbf").strip()
    if line.startswith(b"["):
        return True
    try:
        parse_value(line)
    except RowError:
        return False
    return True
