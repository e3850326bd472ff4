"""Recognise how a table of text is written, by its first records: encoding, delimiter, quotes and header.

sample = read_sample(open("pairs.csv", "rb"), "pairs.csv")
layout, records = layout_of(sample)         # Layout(";", ...), [["question", "answer"], ...]
"""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mlx_retrieval.dataset.column_hints import DOCUMENT_WORDS, QUERY_WORDS
from mlx_retrieval.dataset.json_lines import MAX_ROW_BYTES
from mlx_retrieval.dataset.roles import role_of, snake_case
from mlx_retrieval.dataset.table_cells import NUMBER
from mlx_retrieval.utils.errors import UserError

SAMPLE = 1 << 16  # bytes by which a table is recognised
DELIMITERS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "|"}  # where several fit, the first
UNQUOTED = ("\t", "|")  # between these, quotes may be signs like any other

ID = re.compile(r"(?=.*\d)[\w.:/#-]*", re.ASCII)
EXCEL = re.compile(r'"?sep=(.)"?(?:\r\n|\n|\r)')  # a first line that names the delimiter

Records = list[list[str]]


class Layout(NamedTuple):
    """How the records of a table are written."""

    delimiter: str
    quoting: int = csv.QUOTE_MINIMAL
    skip_blanks: bool = False  # behind a delimiter

    def reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        """Return the records of some lines; csv.Error for one whose quotes are wrong, after which the next follows."""
        return csv.reader(
            lines, delimiter=self.delimiter, quoting=self.quoting, skipinitialspace=self.skip_blanks, strict=True
        )


class Sample(NamedTuple):
    """The first lines of a table."""

    text: str
    encoding: str
    whole: bool  # the table has no more lines
    delimiter: str = ""  # that Excel's first line, `sep=;`, names; the line is not in `text`


def read_sample(handle: BinaryIO, name: Path | str, size: int = SAMPLE) -> Sample:
    """Return the first lines of a table, `size` bytes at most. UserError if it is no text."""
    handle.seek(0)
    head = handle.read(size)
    handle.seek(0)
    encoding = "utf-8"
    if head.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    elif head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise UserError(f"{name}: UTF-32 is not read: save the table as CSV UTF-8")
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in head:
        raise UserError(f"{name}: neither JSON lines nor a table of text (it has zero bytes); CSV must be in UTF-8")
    text = head.decode(encoding, "ignore" if encoding == "utf-16" else "surrogateescape")
    if not (whole := len(head) < size):  # the last line may be a part
        text = text[: max(text.rfind("\n"), text.rfind("\r")) + 1] or text
    named = EXCEL.match(text)
    delimiter = named[1] if named and named[1] in DELIMITERS else ""
    return Sample(text[named.end() :] if delimiter else text, encoding, whole, delimiter)


def records_of(layout: Layout, sample: Sample) -> Records:
    """Return the sample's records that have any text; broken ones are empty, and one that is cut is left out."""
    reader = layout.reader(iter(io.StringIO(sample.text, newline="")))
    records: Records = []
    while True:
        try:
            record = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if not sample.whole and "unexpected end" in str(error):
                break
            records.append([])
        else:
            if any(map(str.strip, record)):
                records.append(record)
    return records


def layout_of(sample: Sample) -> tuple[Layout, Records]:
    """Return the layout in which most records of the sample have as many fields as the first, and these records.

    Where several delimiters fit equally, one with a blank behind it is punctuation.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    best, highest = None, (0.0, True)
    for delimiter in [sample.delimiter] if sample.delimiter else DELIMITERS:
        layout, records = _quoting_of(delimiter, sample)
        fields = [field for record in records for field in record[1:]]
        is_mark = layout.skip_blanks or 2 * sum(field[:1] == " " for field in fields) <= len(fields)
        if (score := (_fit(records), is_mark)) > highest:
            best, highest = (layout, records), score
    return best or _quoting_of(sample.delimiter or ",", sample)


def _quoting_of(delimiter: str, sample: Sample) -> tuple[Layout, Records]:
    """Return the layout for a delimiter, and the sample's records.

    Between tabs and bars, quotes are signs like any other if no text of the sample stands in them, and if they join
    lines of which each is a record without them.
    """
    layout = Layout(delimiter)
    records = records_of(layout, sample)
    if delimiter in UNQUOTED:
        plain = Layout(delimiter, csv.QUOTE_NONE)
        lines = records_of(plain, sample)
        if lines == records or (_fit(lines), len(lines)) > (_fit(records), len(records)):
            return plain, lines
    skipping = Layout(delimiter, skip_blanks=True)
    skipped = records_of(skipping, sample)
    if _fit(skipped) >= _fit(records) and _has_blanks_before_quotes(records, skipped):
        return skipping, skipped
    return layout, records


def _fit(records: Records) -> float:
    """Return the share of records that have as many fields as the first, and more for known names there."""
    if not records or len(records[0]) < 2:
        return 0.0
    share = sum(len(record) == len(records[0]) for record in records) / len(records)
    return share + 0.5 * min(sum(role_of(cell) is not None for cell in records[0]), 2)


def _has_blanks_before_quotes(records: Records, skipped: Records) -> bool:
    """Return whether fields have a blank before their quotes. `skipped`: the records, read without such blanks."""
    if [*map(len, records)] != [*map(len, skipped)]:
        return True
    pairs = ((a, b) for one, other in zip(records, skipped, strict=True) for a, b in zip(one, other, strict=True))
    return any(a[:1] == " " and (text := a.lstrip(" "))[:1] == '"' and b not in (a, text) for a, b in pairs)


# --- header -----------------------------------------------------------------------------------------------------------


def is_header(records: Records, wanted: Sequence[str]) -> bool:
    """Return whether the first record names the columns.

    It does if names of `--columns` are among its cells (`wanted`), or known names of a query and a document; if a
    column has a name, and then numbers, dates or ids only; or if all its cells could be names, and most later records
    have cells that could not.
    """
    first, *later = [[cell.strip() for cell in record] for record in records] or [[]]
    if any(cell in wanted for cell in first) or _names_a_pair(first):
        return True
    for i, cell in enumerate(first):
        below = [record[i] for record in later if len(record) > i and record[i]]
        if below and is_text(cell) and _is_name(cell) and not any(map(is_text, below)):
            return True
    texts = sum(not all(map(_is_name, record)) for record in later)
    by_name = any(not name.isdigit() for name in wanted)
    return all(map(_is_name, first)) and (not later or by_name or texts > len(later) / 2)


def _names_a_pair(cells: Sequence[str]) -> bool:
    """Return whether a query and a document are among the names, in any language that `--columns` is suggested for."""
    roles, names = {role_of(cell) for cell in cells}, {snake_case(cell) for cell in cells}
    is_query = "query" in roles or any(name in QUERY_WORDS for name in names)
    return is_query and (bool(roles & {"document", "documents"}) or any(name in DOCUMENT_WORDS for name in names))


def is_text(cell: str) -> bool:
    """Return whether a cell could be a text rather than a number, a date or an id."""
    return any(map(str.isalpha, cell)) and not ID.fullmatch(cell.strip())


def _is_name(cell: str) -> bool:
    """Return whether a cell could be a column's name rather than a text or a number."""
    is_short = len(cell) <= 40 and len(cell.split()) <= 4
    return is_short and not NUMBER.fullmatch(cell) and not cell.endswith((".", "?", "!", "。", "？", "！"))
