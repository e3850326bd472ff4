"""Read texts from JSON lines and plain text files."""

import json
from collections.abc import Iterator
from pathlib import Path

from mlx_retrieval.utils.errors import UserError

TEXT_FIELDS = ("text", "document", "query", "positive")


def read_texts(path: Path, field: str | None = None) -> Iterator[str]:
    """Texts of a .txt file (one a line) or of JSON lines (`field`; default: title and text, or the first known)."""
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.rstrip("\n")
                if path.suffix == ".txt":
                    yield line
                elif line.strip():
                    yield _field_of(line, field, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error


def _field_of(line: str, field: str | None, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error.msg} at character {error.pos + 1})") from error
    if isinstance(row, str):
        return row
    name = field or next((name for name in TEXT_FIELDS if name in row), None)
    if not isinstance(row, dict) or name is None or not isinstance(row.get(name), str):
        raise UserError(f"{where}: no text under {field or ' or '.join(TEXT_FIELDS)} (--field names another key)")
    title = row.get("title") if field is None else None
    return f"{title} {row[name]}" if title else row[name]
