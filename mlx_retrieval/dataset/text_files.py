"""Read texts from JSON lines and plain text files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_retrieval.dataset.json_lines import read_lines, read_values
from mlx_retrieval.utils.errors import UserError

TEXT_FIELDS = ("text", "document", "query", "positive")


def read_texts(path: Path, field: str | None = None) -> Iterator[str]:
    """Yield the texts of a .txt file (one a line, blank ones too), of JSON lines or a JSON array, `.gz` or plain.

    Args:
        field: key of the text in a row; default: the first of TEXT_FIELDS that is there, its title put before it.

    Raises UserError with file, line and reason.
    """
    return (text for _, text in read_numbered_texts(path, field))


def read_numbered_texts(path: Path, field: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of the texts that `read_texts` yields."""
    if path.name.removesuffix(".gz").endswith(".txt"):
        yield from read_lines(path)
    else:
        for number, row in read_values(path):
            yield number, _text_of(row, field, f"{path}:{number}")


def _text_of(row: Any, field: str | None, place: str) -> str:
    if isinstance(row, str):
        return row
    name = field
    if isinstance(row, dict) and name is None:
        name = next((name for name in TEXT_FIELDS if name in row), None)
    if not isinstance(row, dict) or name is None or not isinstance(row.get(name), str):
        raise UserError(f"{place}: no text under {field or ' or '.join(TEXT_FIELDS)} (--field names another key)")
    title = row.get("title") if field is None else None
    return f"{title} {row[name]}" if title else row[name]
