"""Read tables of text, CSV, TSV and their kin, record by record as rows with the columns' names as keys.

    table = Table(open("pairs.csv", "rb"), Path("pairs.csv"))
    table.form                                  # "comma-separated, header"
    for number, row in table.rows(): ...        # line of the file where the record begins; a dict, or a `Fault`

The delimiter, the encoding (UTF-8, or UTF-16 with its mark) and whether the first record is a header are recognised
from the beginning of the file. Without a header, columns are a query, its document and negatives, in this order. A cell
without text is absent. Cells are texts, but for labels, scores and ranks, which are numbers, and JSON lists of those
that may be several.
"""

import ast
import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mlx_retrieval.dataset.columns import Columns
from mlx_retrieval.dataset.columns import names as mapped_names
from mlx_retrieval.dataset.json_lines import MAX_ROW_BYTES, Fault
from mlx_retrieval.dataset.roles import role_of, snake_case
from mlx_retrieval.dataset.unread_keys import is_origin
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import quantity, shell

SAMPLE = 1 << 16  # bytes, and
SAMPLE_RECORDS = 200  # by which a table is recognised
DELIMITERS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "|"}  # where several fit, the first
UNQUOTED = ("\t", "|")  # between these, quotes may be signs like any other
LINE = 1 << 16  # characters that are read at once

NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
ID = re.compile(r"(?=.*\d)[\w.:/#-]*", re.ASCII)
NUMBERS = ("label", "rank")  # roles
SCORES = ("scores", "positive scores", "negative scores")
TEXTS = ("negatives", "documents")
POSITIVES = ("positives", "pos", "positive_passages", "positive_messages")  # columns that may be lists of texts as well
CONVERSATION = ("messages", "tools")  # columns of JSON


class Layout(NamedTuple):
    """How the records of a table are written."""

    delimiter: str
    quoting: int = csv.QUOTE_MINIMAL
    share: float = 0.0  # of the sample's records that have as many fields as the first

    def reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        """Return the records of some lines; csv.Error for one whose quotes are wrong, after which the next follows."""
        return csv.reader(lines, delimiter=self.delimiter, quoting=self.quoting, strict=True)


class Table:
    """The records of a table as rows.

    Args:
        handle: a binary file that can be rewound; this object closes it.
        name: of the file, for messages and its ending.
        columns: of `--columns`; they decide which cells are numbers. A table without a header has columns 1, 2, ...

    Attributes:
        form: what was recognised, in words.
        labels: keys of rows that the table does not have itself -> its columns.

    Raises UserError if the file is not a table of text with at least two columns.
    """

    def __init__(self, handle: BinaryIO, name: Path | str, columns: Columns | None = None):
        self.name = name
        encoding, sample = _decoded(handle, name)
        self._lines = _Lines(io.TextIOWrapper(handle, encoding=encoding, errors=_errors(encoding), newline=""))
        self._layout = _layout(sample)
        records = list(_records(self._layout, sample))
        first = records[0] if records else []
        wanted = mapped_names(columns) if columns else []
        by_number = bool(wanted) and all(name.isdigit() for name in wanted) and not {*wanted} & {*map(str.strip, first)}
        self.labels: dict[str, str] = {}
        self._header = header = _is_header(first, wanted, by_number)
        self._keys = self._names(first) if header and not by_number else self._ordered(records, columns)
        self._readers = [_cell_reader(key, columns) for key in self._keys]
        separated = f"{DELIMITERS[self._layout.delimiter]}-separated"
        self.form = ", ".join(
            [separated, "header" if header else "no header", *(["UTF-16"] if encoding == "utf-16" else [])]
        )

    def _names(self, first: Sequence[str]) -> list[str]:
        """Return the names of the header's columns; a column without a name is called by its number."""
        cells = [cell.strip() for cell in first]
        while cells and not cells[-1]:
            cells.pop()
        keys = [cell or f"column {i}" for i, cell in enumerate(cells, start=1)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"{self.name}:1: the header has the column {twice} twice: rename one of them")
        if len(keys) < 2:
            raise UserError(
                f"{self.name}:1: one column only ({keys[0][:60] if keys else ''}); a query and its document need two, "
                "with a comma, semicolon, tab or | between them"
            )
        return keys

    def _ordered(self, records: Sequence[Sequence[str]], columns: Columns | None) -> list[str]:
        """Return the keys of the columns of a table without a header."""
        width = len(records[0]) if records else 0
        numbers = list(map(str, range(1, width + 1)))
        if columns:
            self.labels = {number: f"column {number}" for number in numbers}
            self.labels |= {key: "+".join(map("column {}".format, group)) for key, group in columns.items()}
            return numbers
        texts = [i for i in range(width) if any(_is_text(record[i]) for record in records if len(record) > i)]
        if len(texts) < width or width < 2:
            other = next((i for i in range(width) if i not in texts), 0)
            roles = ("query", "document", "negatives")
            chosen = ",".join(f"{role}={i + 1}" for role, i in zip(roles, texts, strict=False))
            hint = f"; perhaps {shell('--columns', chosen)}" if len(texts) >= 2 else ""
            reason = f"column {other + 1} holds no texts" if width > 1 else "one column only"
            raise UserError(f"{self.name}:1: no header, and {reason}{hint}, or put a first line with names before it")
        keys = ["query", "document", *(f"negative_{i}" for i in range(1, width - 1))]
        self.labels = {key: f"column {i}" for i, key in enumerate(keys, start=1)}
        return keys

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
        """Yield the number of the first line of every record, and its row; records without any text are left out."""
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
        reader = self._layout.reader(self._lines)
        left_out = self._header  # the first record is not a row
        while True:
            number = self._lines.begin()
            try:
                record = next(reader)
            except StopIteration:
                return
            except (csv.Error, _LineError) as error:
                yield number, Fault(_reason(error, self._lines.number).encode())
                continue
            if not any(map(str.strip, record)):
                continue
            if left_out:
                left_out = False
                continue
            fault = self._lines.fault or self._misfit(record)
            yield number, Fault(fault.encode()) if fault else self._row(record)

    def _misfit(self, record: list[str]) -> str:
        """Return why a record has too many or too few fields; "" = it has as many as the first one."""
        expected = len(self._keys)
        if len(record) == expected or (len(record) > expected and not any(map(str.strip, record[expected:]))):
            return ""
        count = quantity(len(record), "field")
        before = "the header" if self._header else "the first record"
        sign = {"\t": "tab"}.get(self._layout.delimiter, f"'{self._layout.delimiter}'")
        return f"{count} where {before} has {expected}; a text with a {sign} or a line break in it must stand in quotes"

    def _row(self, record: list[str]) -> dict[str, Any] | Fault:
        row: dict[str, Any] = {}
        try:
            for key, read, cell in zip(self._keys, self._readers, record, strict=False):
                row[key] = read(cell) if cell and not cell.isspace() else None
        except ValueError as error:
            return Fault(f"{key}: {error}".encode())
        return row


# --- cells ------------------------------------------------------------------------------------------------------------


def _cell_reader(key: str, columns: Columns | None):
    """Return the function that reads the cells of a column: as texts, numbers or lists."""
    roles = {role_of(name) for name, group in (columns or {}).items() if group == (key,)}
    name = next((name for name, group in (columns or {}).items() if group == (key,)), key)
    role = next(iter(roles), None) or role_of(key)
    if role in NUMBERS:
        return _number_or_list if snake_case(name) == "score" else _number
    if role in SCORES:
        return _number_or_list
    if role in TEXTS or snake_case(name) in POSITIVES:
        return _texts
    return _json if snake_case(name) in CONVERSATION else str


def _number(cell: str) -> Any:
    """Return a cell's number; another text as it is, for the row's own check to name."""
    text = cell.strip()
    return json.loads(text) if re.fullmatch(r"-?\d{1,300}", text) else float(text) if NUMBER.fullmatch(text) else cell


def _number_or_list(cell: str) -> Any:
    return _json(cell) if cell.lstrip().startswith("[") else _number(cell)


def _texts(cell: str) -> Any:
    """Return the list of texts or passages that a cell holds, the passage, or the cell as one text. ValueError."""
    value = _json(cell)
    if isinstance(value, list) and not any(isinstance(item, int | float) for item in value):
        return value
    return value if isinstance(value, dict) and "text" in value else cell


def _json(cell: str) -> Any:
    """Return the list or object that a cell holds, as JSON or Python writes it, or the cell. ValueError."""
    text = cell.strip()
    if not (text.startswith(("[", "{")) and text.endswith(("]", "}"))):
        return cell
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = None
    if value is not None and repr(value) == text:
        return value
    if re.match(r"\[\s*['\"{]", text):
        raise ValueError('looks like a list, but is not one in JSON: ["a", "b"]')
    return cell


# --- recognition ------------------------------------------------------------------------------------------------------


def _decoded(handle: BinaryIO, name: Path | str) -> tuple[str, str]:
    """Return the encoding of a table, and its first lines. UserError if it is no text."""
    head = handle.read(SAMPLE)
    handle.seek(0)
    encoding = "utf-8"
    if head.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in head:
        raise UserError(f"{name}: neither JSON lines nor a table of text (it has zero bytes); CSV must be in UTF-8")
    text = head.decode(encoding, "ignore" if encoding == "utf-16" else "surrogateescape")
    if len(head) == SAMPLE:  # the last line may be a part
        text = text[: max(text.rfind("\n"), text.rfind("\r")) + 1] or text
    return encoding, text


def _errors(encoding: str) -> str:
    return "replace" if encoding == "utf-16" else "surrogateescape"


def _records(layout: Layout, sample: str) -> Iterator[list[str]]:
    """Yield the sample's records that have any text; broken ones are empty."""
    reader = layout.reader(iter(io.StringIO(sample, newline="")))
    for _ in range(SAMPLE_RECORDS):
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error:
            record = None
        if record is None or any(map(str.strip, record)):
            yield record or []


def _layout(sample: str) -> Layout:
    """Return the layout in which most records of the sample have as many fields as the first."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    layouts = [Layout(sign) for sign in DELIMITERS]
    layouts += [Layout(sign, csv.QUOTE_NONE) for sign in UNQUOTED]
    layouts.sort(key=lambda layout: list(DELIMITERS).index(layout.delimiter))
    best, highest = Layout(","), 0.0
    for layout in layouts:
        records = list(_records(layout, sample))
        if not records or len(records[0]) < 2:
            continue
        share = sum(len(record) == len(records[0]) for record in records) / len(records)
        known = sum(role_of(cell) is not None for cell in records[0])
        if (score := share + 0.5 * min(known, 2)) > highest:
            best, highest = layout._replace(share=share), score
    return best


def _is_header(cells: Sequence[str], wanted: Sequence[str], by_number: bool) -> bool:
    """Return whether the first record names the columns: one is a known name, also of ids, or all could be names.

    The latter does not count if `--columns` calls columns by their numbers.
    """
    cells = [cell.strip() for cell in cells]
    origins = any(len(cell.split()) <= 2 and is_origin(snake_case(cell)) for cell in cells)
    known = origins or any(cell in wanted or role_of(cell) for cell in cells)
    return known or (not by_number and all(_is_name(cell) for cell in cells))


def _is_text(cell: str) -> bool:
    """Return whether a cell could be a text rather than a number, a date or an id."""
    return any(map(str.isalpha, cell)) and not ID.fullmatch(cell.strip())


def _is_name(cell: str) -> bool:
    """Return whether a cell could be a column's name rather than a text or a number."""
    is_short = len(cell) <= 40 and len(cell.split()) <= 4
    return is_short and not NUMBER.fullmatch(cell) and not cell.endswith((".", "?", "!", "。", "？", "！"))


# --- lines ------------------------------------------------------------------------------------------------------------


class _LineError(Exception):
    """A record is too long to be one."""


class _Lines:
    """The lines of a text, for csv.reader; it notes where a record begins and what is wrong in it."""

    def __init__(self, text: io.TextIOWrapper):
        self._text = text
        self.number = 0  # lines read
        self.fault = ""  # why the record's text is not what it should be
        self._size = 0  # characters of the record

    def begin(self) -> int:
        """Begin a record; return the number of its first line."""
        self.fault, self._size = "", 0
        return self.number + 1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_ROW_BYTES)
        if not line:
            raise StopIteration
        self.number += 1
        self._size += len(line)
        if self._size > MAX_ROW_BYTES or (len(line) == MAX_ROW_BYTES and not line.endswith(("\n", "\r"))):
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(LINE)
            raise _LineError(f"the record has more than {MAX_ROW_BYTES:,} characters; is a quote not closed?")
        if not self.fault and not line.isascii() and (match := re.search("[\udc80-\udcff]", line)):
            self.fault = (
                f"not UTF-8 (line {self.number}: byte {ord(match[0]) - 0xDC00:#x} behind "
                f"{line[max(0, match.start() - 20) : match.start()].strip()!r}); save the table as CSV UTF-8, or "
                "convert it: iconv -f cp1252 -t utf-8"
            )
        return line


def _reason(error: Exception, last: int) -> str:
    """Return why a record is broken. `last`: the number of its last line."""
    if "unexpected end of data" in str(error):
        return "a quote that is opened in this record is not closed up to the end of the file"
    if "expected after" in str(error):
        return (
            f'text follows the end of a quoted text (line {last}): a quote inside must be doubled (""), and one that '
            "is opened must be closed"
        )
    return str(error)
