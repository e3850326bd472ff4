"""Map the fields of an index's documents to the keys of rows: `--es-fields query=query,document=title+snippet`."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable, writable_values

SINGLE = ("query", "document", "positive", "anchor", "rank", "label")  # a list of one value stands for the value
KEYS = (*SINGLE, "negative", "negatives", "documents", "scores")

DEFAULT = "query=query,document=title+snippet,rank=rank"  # of --es-fields

Fields = dict[str, tuple[str, ...]]  # a row's key -> the fields of its value


def parse(text: str) -> Fields:
    """Parse `key=field+field,key=field`. UserError if it has another form or an unknown key."""
    fields: Fields = {}
    for part in text.split(","):
        key, equals, names = (piece.strip() for piece in part.partition("="))
        if not equals or not all(name.strip() for name in names.split("+")):
            raise UserError(f"--es-fields: {part.strip()!r} is not of the form key=field or key=field+field")
        if key not in KEYS:
            raise UserError(f"--es-fields: no key {key!r} in a row; there are {', '.join(KEYS)}")
        if key in fields:
            raise UserError(f"--es-fields: {key} twice")
        fields[key] = tuple(name.strip() for name in names.split("+"))
    return fields


def row_of(source: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Return the row of a document: the values of its fields, several texts joined by line breaks; no missing keys."""
    row = {}
    for key, names in fields.items():
        value = value_at(source, names[0]) if len(names) == 1 else joined(source, names) or None
        if value is not None:
            row[key] = value[0] if key in SINGLE and isinstance(value, list) and len(value) == 1 else value
    return writable_values(row)


def joined(source: Mapping[str, Any], names: Sequence[str]) -> str:
    """Join the texts of several fields, and of lists in them, by line breaks; missing fields are left out."""
    values = [value for name in names if (value := value_at(source, name)) is not None]
    texts = [str(text) for value in values for text in (value if isinstance(value, list) else [value])]
    return writable("\n".join(text for text in texts if text.strip()))


def value_at(source: Mapping[str, Any], name: str) -> Any:
    """Return a field's value by its dotted name; None if it is missing."""
    value: Any = source.get(name)  # a key may itself contain dots
    if value is None:
        value = source
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    return value
