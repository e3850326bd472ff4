"""Read the bytes of a document's file, and decode texts."""

import codecs
import re
from pathlib import Path

from mlx_retrieval.dataset.documents.document import BINARY, EMPTY, FORBIDDEN, NOT_UTF8, UNREADABLE, UnreadableError
from mlx_retrieval.dataset.source_code.file_tree import BINARY_HEAD, decode_text
from mlx_retrieval.utils.files import reason

_MARKS = (  # those of UTF-32 begin like those of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_BREAKS = re.compile("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes. Raises UnreadableError if it cannot be read or is empty."""
    try:
        data = path.read_bytes()
    except PermissionError as error:
        raise UnreadableError(FORBIDDEN) from error
    except OSError as error:
        raise UnreadableError(UNREADABLE, reason(error)) from error
    if not data:
        raise UnreadableError(EMPTY)
    return data


def read_text(path: Path) -> str:
    """Return a text file: UTF-8, or UTF-16 or UTF-32 with its mark. Raises UnreadableError.

    Line ends are `\\n`, and nothing else ends a line: page breaks and Unicode's other line breaks become spaces.
    """
    if (text := decode(read_bytes(path))) is None:
        raise UnreadableError(NOT_UTF8)
    if not text.strip():
        raise UnreadableError(EMPTY)
    return _OTHER_BREAKS.sub(" ", text)


def decode(data: bytes) -> str | None:
    """Return bytes as a text with `\\n` line ends; None if they are neither UTF-8 nor marked as UTF-16 or UTF-32.

    Raises UnreadableError for bytes that are no text at all.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is not None:
        try:
            return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            return None
    if b"\0" in data[:BINARY_HEAD]:
        raise UnreadableError(BINARY)
    return decode_text(data)
