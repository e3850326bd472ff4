"""Read JSON lines: one value a line, with errors that give file, line and reason.

    for number, row in read_objects(Path("corpus.jsonl")):
        print(number, row["text"])

A file that begins with `[` is read as one JSON array: its elements count as lines. If its first line is a whole array
of texts and further lines follow, each line is a value as usual. A byte order mark is dropped.

Training data is read in two steps instead, `lines_of` and `parse_object`: the place of every row is kept, lines are
bounded in size, and a bad row can be left out.
"""

import codecs
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.pipes import spooled
from mlx_retrieval.utils.text import writable_values

ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

MAX_ROW_BYTES = 64_000_000  # a longer line is a file that lacks its line breaks, not a row
CHUNK = 1 << 16  # bytes of an array that are read at once


class RowError(ValueError):
    """The reason why one row cannot be used, without its place."""


class Fault(bytes):
    """In place of a line's data: the reason, as text, why it is no row."""


class Line(NamedTuple):
    """A line that is not blank, or an element of an array, and its place in the file."""

    number: int  # of its first line, counted from 1
    start: int  # bytes before it
    size: int  # bytes, line break included
    data: bytes  # a `Fault` if it is longer than MAX_ROW_BYTES


NO_TEXT = "not a text"  # the key of an object in place of a value


def no_text(reason: str) -> dict[str, str]:
    """Return an object in place of a value that JSON does not have."""
    return {NO_TEXT: reason}


def reason_of(value: Any) -> str:
    """Return why a value has no JSON, with a blank and brackets; "" if it has."""
    return f" ({value[NO_TEXT]})" if isinstance(value, dict) and value.keys() == {NO_TEXT} else ""


# --- one line ---------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of keys and values. RowError if it names a key twice: `json` would keep the last value."""
    if len(row := dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"the key {next(key for key in keys if keys.count(key) > 1)} is there twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_value(line: str | bytes) -> Any:
    """Return the JSON value of a line. RowError if it is not valid UTF-8 or not valid JSON.

    Escapes can spell half a surrogate pair, which nothing could print or write: it becomes U+FFFD.
    """
    if isinstance(line, Fault):
        raise RowError(line.decode())
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        value = _DECODER.decode(text.rstrip("\r\n"))
        return writable_values(value) if ESCAPED_SURROGATE.search(text) else value
    except UnicodeDecodeError as error:
        raise RowError(_not_utf8(error)) from error
    except json.JSONDecodeError as error:
        missing = "; is a line break missing?" if error.msg == "Extra data" else ""
        raise RowError(f"broken JSON ({error.msg} at character {error.pos + 1}){missing}") from error
    except RowError:
        raise
    except ValueError as error:
        raise RowError(f"broken JSON (a number of more than {sys.get_int_max_str_digits():,} digits)") from error
    except RecursionError as error:
        raise RowError("JSON nested too deeply") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.start + 1} of the line)"


def parse_object(line: str | bytes) -> dict[str, Any]:
    """Return the JSON object of a line. RowError as `parse_value`, and if the value is not an object."""
    if isinstance(row := parse_value(line), dict):
        return row
    raise RowError("not a JSON object")


# --- lines of a file --------------------------------------------------------------------------------------------------


def lines_of(handle: BinaryIO) -> Iterator[Line]:
    """Yield the lines that are not blank, or the elements of the array, of a file that is opened at its beginning."""
    head, start = _without_mark(handle.readline(CHUNK))
    head, number, start = _skip_blanks(handle, head, 1, start)
    if not head.lstrip().startswith(b"["):
        yield from (line for line in _lines(handle, head, number, start) if line.data.strip())
        return
    if head.endswith(b"\n") and _is_array_of_texts(head):
        following = _skip_blanks(handle, handle.readline(CHUNK), number + 1, start + len(head))
        if following[0]:
            yield Line(number, start, len(head), head)
            yield from (line for line in _lines(handle, *following) if line.data.strip())
            return
    yield from _elements(handle, head, number, start)


def _skip_blanks(handle: BinaryIO, head: bytes, number: int, start: int) -> tuple[bytes, int, int]:
    """Return the beginning of the first line from `head` on that is not blank, its number and its place."""
    while head and not head.strip():
        number += head.endswith(b"\n")
        start += len(head)
        head = handle.readline(CHUNK)
    return head, number, start


def _is_array_of_texts(line: bytes) -> bool:
    try:
        value = parse_value(line)
    except RowError:
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _without_mark(head: bytes) -> tuple[bytes, int]:
    """Return the first bytes of a file without a byte order mark, and the size of the mark."""
    size = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    return head[size:], size


def _lines(handle: BinaryIO, head: bytes, number: int, start: int) -> Iterator[Line]:
    """Yield all lines, blank ones too. `head`: the beginning of the first one, which is read already."""
    while head:
        data, size, end = head, len(head), head
        while not end.endswith(b"\n") and (end := handle.readline(max(CHUNK, MAX_ROW_BYTES + 1 - size))):
            size += len(end)
            data = data + end if size <= MAX_ROW_BYTES else b""
        yield Line(number, start, size, data if size <= MAX_ROW_BYTES else _too_long("line"))
        number += 1
        start += size
        head = handle.readline(MAX_ROW_BYTES + 1)


def _too_long(unit: str) -> Fault:
    limit = f"{MAX_ROW_BYTES:,} bytes"
    return Fault(
        f"the {unit} has more than {limit}; are line breaks missing? A text of that size must be split".encode()
    )


def _elements(handle: BinaryIO, head: bytes, number: int, start: int) -> Iterator[Line]:
    """Yield the elements of an array. `head`: the file from there on, as far as it is read; `[` after white space."""
    opening = head.index(b"[") + 1
    number += head.count(b"\n", 0, opening)
    start += opening
    element, size, breaks, closed = bytearray(), 0, 0, False
    for piece, end in _pieces(handle, head[opening:]):
        if not size:
            text = piece.lstrip()
            number += piece.count(b"\n", 0, len(piece) - len(text))
            start += len(piece) - len(text)
            piece = text
        size += len(piece)
        breaks += piece.count(b"\n")
        if closed and (size or end):
            yield Line(number, start, size, Fault(b"text behind the end of the JSON array"))
            return
        if size <= MAX_ROW_BYTES:
            element += piece
        else:
            element.clear()
        if end:
            if size or end == b",":
                yield Line(number, start, size, bytes(element) if size <= MAX_ROW_BYTES else _too_long("element"))
            number += breaks
            start += size + 1
            element.clear()
            size = breaks = 0
            closed = end == b"]"
    if not closed:
        yield Line(number, start, size, Fault(b"the JSON array does not end: its last bytes are missing"))


_OUTSIDE_TEXTS = re.compile(rb'[][{}",]')
_INSIDE_TEXTS = re.compile(rb'["\\]')


def _pieces(handle: BinaryIO, chunk: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (bytes, the `,` or `]` that ends an element behind them), or with b"" the bytes up to a chunk's end."""
    depth, in_text, at = 0, False, 0
    chunk = chunk or handle.read(CHUNK)
    while chunk:
        begin = 0
        while match := (_INSIDE_TEXTS if in_text else _OUTSIDE_TEXTS).search(chunk, at):
            sign, at = match[0], match.end()
            if sign == b"\\":
                at += 1  # perhaps in the next chunk
            elif sign == b'"':
                in_text = not in_text
            elif sign in b"[{":
                depth += 1
            elif depth:
                depth -= sign in b"]}"
            elif sign != b"}":
                yield chunk[begin : match.start()], sign
                begin = at
        yield chunk[begin:], b""
        at = max(0, at - len(chunk))
        chunk = handle.read(CHUNK)


# --- a file by its path -----------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, `.gz` or plain. UserError if it cannot be read."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(spooled(path), "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # the latter two: a broken .gz
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text without its line break) of every line of a UTF-8 file, `.gz` or plain. UserError.

    A lone carriage return ends no line. A byte order mark is dropped.
    """
    with _opened(path) as file:
        head, start = _without_mark(file.readline(CHUNK))
        for line in _lines(file, head, 1, start):
            if isinstance(line.data, Fault):
                raise UserError(f"{path}:{line.number}: {line.data.decode()}")
            try:
                text = line.data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{line.number}: {_not_utf8(error)}") from error
            yield line.number, text.removesuffix("\n").removesuffix("\r")


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, JSON value) of every line that is not blank. UserError with file, line and reason."""
    return _read(path, parse_value)


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, JSON object) of every line that is not blank. UserError with file, line and reason."""
    return _read(path, parse_object)


def _read(path: Path, parse: Callable[[bytes], Any]) -> Iterator[tuple[int, Any]]:
    with _opened(path) as file:
        for line in lines_of(file):
            try:
                yield line.number, parse(line.data)
            except RowError as error:
                raise UserError(f"{path}:{line.number}: {error}") from error
