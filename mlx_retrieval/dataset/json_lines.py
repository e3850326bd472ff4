"""Read JSON lines: one value a line, with errors that give file, line and reason.

    for number, row in read_objects(Path("corpus.jsonl")):
        print(number, row["text"])

Training data is read in two steps instead, `lines_of` and `parse_object`: the place of every row is kept, lines are
bounded in size, and a bad row can be left out.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable_values

ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

MAX_ROW_BYTES = 500_000  # a longer line is a file that lacks its line breaks, not a training example


class RowError(ValueError):
    """The reason why one row cannot be used, without its place."""


class Line(NamedTuple):
    """A line that is not blank, and its place in the file."""

    number: int  # counted from 1
    start: int  # bytes before it
    size: int  # bytes, line break included
    data: bytes  # at most the first MAX_ROW_BYTES + 1 of them


# --- one line ---------------------------------------------------------------------------------------------------------


def parse_value(line: str | bytes) -> Any:
    """Return the JSON value of a line. RowError if it is not valid UTF-8 or not valid JSON.

    Escapes can spell half a surrogate pair, which nothing could print or write: it becomes U+FFFD.
    """
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        value = json.loads(text)
        return writable_values(value) if ESCAPED_SURROGATE.search(text) else value
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise RowError(f"broken JSON ({error.msg} at character {error.pos + 1})") from error
    except ValueError as error:  # a number of thousands of digits
        raise RowError(f"broken JSON ({error})") from error
    except RecursionError as error:
        raise RowError("JSON nested too deeply") from error


def parse_object(line: str | bytes) -> dict[str, Any]:
    """Return the JSON object of a line. RowError as `parse_value`, and if the value is not an object."""
    if isinstance(row := parse_value(line), dict):
        return row
    raise RowError("not a JSON object")


# --- a file -----------------------------------------------------------------------------------------------------------


def lines_of(handle: BinaryIO) -> Iterator[Line]:
    """Yield the lines that are not blank. Of a line that is too long, only the beginning is kept in memory."""
    number = start = 0
    while data := handle.readline(MAX_ROW_BYTES + 1):
        number += 1
        size, end = len(data), data
        while not end.endswith(b"\n") and (end := handle.readline(MAX_ROW_BYTES)):
            size += len(end)
        if data.strip():
            yield Line(number, start, size, data)
        start += size


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text without its line break) of every line of a UTF-8 file, `.gz` or plain. UserError."""
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if not line.isascii():
                    _check_utf8(line, f"{path}:{number}")
                yield number, line.rstrip("\r\n")
    except (OSError, EOFError, zlib.error) as error:  # the latter two: a broken .gz
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _check_utf8(line: str, place: str) -> None:
    """UserError if a line holds bytes that were escaped because they are not UTF-8."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = len(line[: error.start].encode()) + 1
        raise UserError(f"{place}: not UTF-8 (byte {byte} of the line)") from error


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, JSON value) of every line that is not blank. UserError with file, line and reason."""
    return _read(path, parse_value)


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, JSON object) of every line that is not blank. UserError with file, line and reason."""
    return _read(path, parse_object)


def _read(path: Path, parse) -> Iterator[tuple[int, Any]]:
    for number, line in read_lines(path):
        if line.strip():
            try:
                yield number, parse(line)
            except RowError as error:
                raise UserError(f"{path}:{number}: {error}") from error
