"""Read texts from JSON lines and plain text files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlx_retrieval.dataset.json_lines import read_lines, read_values
from mlx_retrieval.utils.errors import UserError


class Text(NamedTuple):
    """A text, the number of its line, counted from 1, and its row's id; None = it has none."""

    line: int
    text: str
    id: str | None


TEXT_FIELDS = ("text", "document", "query", "positive")


def read_texts(path: Path, field: str | None = None) -> Iterator[str]:
    """Yield the texts of a .txt file (one a line, blank ones too), of JSON lines or a JSON array, `.gz` or plain.

    Args:
        field: key of the text in a row; default: the first of TEXT_FIELDS that is there, its title put before it.

    Raises UserError with file, line and reason.
    """
    return (row.text for row in read_text_rows(path, field))


def read_text_rows(path: Path, field: str | None = None) -> Iterator[Text]:
    """Yield the texts that `read_texts` yields, with their places and ids."""
    if path.name.removesuffix(".gz").endswith(".txt"):
        for number, line in read_lines(path):
            yield Text(number, line, None)
    else:
        for number, row in read_values(path):
            yield Text(number, _text_of(row, field, f"{path}:{number}"), _id_of(row))


def _id_of(row: Any) -> str | None:
    """Return a row's `_id` or `id`, a text or a whole number, as text; None if it has none."""
    names = [name for name in ("_id", "id") if isinstance(row, dict) and isinstance(row.get(name), str | int)]
    return str(row[names[0]]) if names else None


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
