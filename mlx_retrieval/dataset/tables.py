"""Read tables of text, CSV, TSV and their kin, record by record as rows with the columns' names as keys.

    table = Table(open("pairs.csv", "rb"), Path("pairs.csv"))
    table.form                                  # "comma-separated, header"
    for number, row in table.rows(): ...        # line of the file where the record begins; a dict, or a `Fault`

The delimiter, the encoding (UTF-8, or UTF-16 with its mark) and whether the first record is a header are recognised
from the beginning of the file (table_layout.py). Without a header, columns are a query, its document and negatives, in
this order. A cell without text is absent, and so is one that says NaN or null. Cells are texts, but for labels, scores
and ranks, which are numbers, and lists of those that may be several (table_cells.py).
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mlx_retrieval.dataset import table_layout
from mlx_retrieval.dataset.column_order import WORDS, are_repeated, are_values, question_count
from mlx_retrieval.dataset.columns import Columns
from mlx_retrieval.dataset.columns import names as mapped_names
from mlx_retrieval.dataset.json_lines import MAX_ROW_BYTES, Fault
from mlx_retrieval.dataset.table_cells import MISSING, reader
from mlx_retrieval.dataset.table_layout import DELIMITERS, Records, is_header, is_text
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import quantity, shell

LINE = 1 << 16  # characters that are read at once


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
        size = table_layout.SAMPLE
        while True:
            sample = table_layout.read_sample(handle, name, size)
            self._layout, records = table_layout.layout_of(sample)
            if len(records) > 1 or sample.whole or size > MAX_ROW_BYTES:
                break
            size *= 8  # the records are very long
        if not records:
            raise UserError(f"{name}: the file is empty")
        errors = "replace" if sample.encoding == "utf-16" else "surrogateescape"
        self._lines = _Lines(io.TextIOWrapper(handle, encoding=sample.encoding, errors=errors, newline=""))
        if sample.delimiter:
            next(self._lines)
        first = records[0]
        wanted = mapped_names(columns) if columns else []
        by_number = bool(wanted) and all(name.isdigit() for name in wanted) and not {*wanted} & {*map(str.strip, first)}
        self.labels: dict[str, str] = {}
        self._header = header = is_header(records, wanted)
        self._keys = self._names(records) if header and not by_number else self._ordered(records, columns)
        self._readers = [reader(key, columns) for key in self._keys]
        separated = f"{DELIMITERS[self._layout.delimiter]}-separated"
        self.form = ", ".join(
            [separated, "header" if header else "no header", *(["UTF-16"] if sample.encoding == "utf-16" else [])]
        )

    def _names(self, records: Records) -> list[str]:
        """Return the names of the header's columns; a column without a name is called by its number."""
        cells = [cell.strip() for cell in records[0]]
        while cells and not cells[-1]:
            cells.pop()
        keys = [cell or f"column {i}" for i, cell in enumerate(cells, start=1)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"{self.name}:1: the header has the column {twice} twice: rename one of them")
        if len(keys) < 2:
            raise self._one_column(records)
        return keys

    def _one_column(self, records: Records) -> UserError:
        """Return the error of a table whose first line has one column."""
        wider = next((len(record) for record in records if len(record) > 1), 0)
        if wider:
            reason = f"the first line has one column, and a later one has {wider}: delete the lines above the header"
            return UserError(f"{self.name}:1: {reason}")
        return UserError(
            f"{self.name}:1: one column only ({records[0][0][:60] if records[0] else ''}); a query and its document "
            "need two, with a comma, semicolon, tab or | between them"
        )

    def _ordered(self, records: Records, columns: Columns | None) -> list[str]:
        """Return the keys of the columns of a table without a header, or of one whose columns have numbers."""
        width = len(records[0])
        numbers = list(map(str, range(1, width + 1)))
        if columns:
            self.labels = {number: f"column {number}" for number in numbers}
            self.labels |= {key: "+".join(map("column {}".format, group)) for key, group in columns.items()}
            return numbers
        if width < 2:
            raise self._one_column(records)
        self._check_order(records, width)
        keys = ["query", "document", *(f"negative_{i}" for i in range(1, width - 1))]
        self.labels = {key: f"column {i}" for i, key in enumerate(keys, start=1)}
        return keys

    def _check_order(self, records: Records, width: int) -> None:
        """Raise UserError if columns are not plainly a query, its document and negatives."""
        columns = [[record[i].strip() for record in records if len(record) > i] for i in range(width)]
        texts = [i for i in range(width) if any(map(is_text, columns[i]))]
        if len(texts) < width:
            other = next(i for i in range(width) if i not in texts)
            raise self._no_header(f"column {other + 1} holds no texts", texts if width > 2 else [0, 1])
        if width == 2:
            return
        repeated = [i for i in range(width) if i != 1 and are_repeated(columns[i])]
        if repeated:
            raise self._no_header(
                f"column {repeated[0] + 1} has few different texts", [i for i in texts if i not in repeated]
            )
        if are_values(columns[1]):
            raise self._no_header(f"column 2 has fewer than {WORDS} words in most rows", texts)
        if question_count(columns[1]) > question_count(columns[0]):
            raise self._no_header("column 2 holds questions", texts[1:])

    def _no_header(self, reason: str, texts: Sequence[int]) -> UserError:
        """Return the error of a table without a header. `texts`: columns that are a query, a document and negatives."""
        roles = ("query", "document", "negatives")
        chosen = ",".join(f"{role}={i + 1}" for role, i in zip(roles, texts, strict=False))
        hint = f"perhaps {shell('--columns', chosen)}, or " if len(texts) >= 2 else ""
        return UserError(f"{self.name}:1: no header, and {reason}; {hint}put a first line with names before it")

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
        """Yield the number of the first line of every record, and its row; records without any text are left out."""
        records = self._layout.reader(self._lines)
        left_out = self._header  # the first record is not a row
        while True:
            number = self._lines.begin()
            try:
                record = next(records)
            except StopIteration:
                return
            except (csv.Error, _LineError) as error:
                reason = _reason(error, self._lines.number)
                if (last := self._lines.number) > number:  # what else is in these lines was not read
                    raise UserError(
                        f"{self.name}:{number}: {reason}. This cannot be left out, as the quote takes in the rows up "
                        f"to line {last:,}"
                    ) from error
                yield number, Fault(reason.encode())
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
                row[key] = None if cell.strip() in MISSING else read(cell)
        except ValueError as error:
            return Fault(f"{key}: {error}".encode())
        return row


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
