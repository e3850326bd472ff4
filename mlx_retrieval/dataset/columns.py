"""Map the columns of a source to the keys of rows: `--columns query=question,document=title+body,negatives=neg`.

columns = parse("query=question,document=title+body")
row = mapped({"question": "Why?", "title": "Because", "body": "...", "id": 7}, columns)

Columns are the keys of JSON rows, the columns of tables or the fields of an index's documents; a dotted name is that of
a key in an object. A row with none of these columns is read by its own names.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlx_retrieval.dataset.json_lines import RowError, reason_of
from mlx_retrieval.dataset.roles import ROLES, role_of, snake_case
from mlx_retrieval.utils.errors import UserError, near_miss
from mlx_retrieval.utils.text import listed, writable, writable_values

SINGLE = ("query", "label", "rank", "prompt")  # roles in which a list of one value stands for the value
SINGLE_DOCUMENTS = ("document", "positive", "passage", "answer")  # names of which the same is true
NEEDED = ("query", "document", "documents")  # roles

ELASTIC_DEFAULT = "query=query,document=title+snippet,rank=rank"  # --columns of an index

Columns = dict[str, tuple[str, ...]]  # a row's key -> the columns of its value


def parse(text: str, flag: str = "--columns") -> Columns:
    """Parse `key=column+column,key=column`. UserError, which names the flag, for another form or an unknown key."""
    columns: Columns = {}
    for key, group in _pairs(text, flag):
        if (role := role_of(key, weak=False)) is None:
            known = [name for words in ROLES.values() for name in words]
            listing = "query, document, documents, negatives, label, scores, pos_scores, neg_scores, rank, prompt"
            raise UserError(f"{flag}: no key {key!r} in a row; there are {listing}{near_miss(key, known)}")
        if key in columns or (role != "negatives" and role in map(role_of, columns)):
            raise UserError(f"{flag}: {key} twice")
        columns[snake_case(key)] = group
    return columns


def parse_keys(text: str, flag: str, keys: Sequence[str]) -> Columns:
    """Parse the same form with other `keys` than those of rows. UserError for another one."""
    columns: Columns = {}
    for key, group in _pairs(text, flag):
        if key not in keys:
            raise UserError(f"{flag}: no key {key!r}; there are {', '.join(keys)}{near_miss(key, keys)}")
        if key in columns:
            raise UserError(f"{flag}: {key} twice")
        columns[key] = group
    return columns


def _pairs(text: str, flag: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every key and its columns."""
    for part in text.split(","):
        key, equals, names = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not all(name.strip() for name in names.split("+")):
            raise UserError(f"{flag}: {part.strip()!r} is not of the form key=column or key=column+column")
        yield key, tuple(name.strip() for name in names.split("+"))


def check_roles(columns: Columns) -> None:
    """Raise UserError if the same columns have two roles, which only two tables of a folder can give them."""
    keys: dict[frozenset[str], str] = {}
    for key, group in columns.items():
        if (other := keys.setdefault(frozenset(group), key)) != key:
            raise UserError(f"--columns: {' + '.join(group)} is both {other} and {key}: a column has one role")


def names(columns: Columns) -> list[str]:
    """Return all columns that are mapped, in order, each once."""
    return list(dict.fromkeys(name for group in columns.values() for name in group))


def mapped(row: dict[str, Any], columns: Columns, origin: str = "--columns") -> dict[str, Any]:
    """Return a row with its columns under the keys of `columns`; as it is if it has none of the columns.

    A column is not read under its own name as well, and a role that is mapped is read from its columns only.
    RowError, with the `origin` of the columns, if the row has some of them, but none for the query or the document.
    """
    if not (there := [name for name in names(columns) if has(row, name)]):
        return row
    roles = {role_of(key) for key in columns}
    used = {name if name in row else name.partition(".")[0] for name in there}
    values = row_of(row, columns)
    for key, wanted in columns.items():
        if role_of(key) in NEEDED and key not in values:
            absent = [name for name in wanted if not has(row, name)]
            reason = f"no {' or '.join(absent)}" if absent else f"{' and '.join(wanted)} without a value"
            raise RowError(f"{reason} for the {key} ({origin}); there are {listing(row)}{_near(absent, row)}")
    return {key: row[key] for key in row if key not in used and role_of(key) not in roles} | values


def text_of(columns: Columns) -> str:
    """Return the columns as `parse` reads them."""
    return ",".join(f"{key}={'+'.join(group)}" for key, group in columns.items())


def missing(wanted: Iterable[str], there: Sequence[str]) -> str:
    """Return a message about columns that are mapped and that no row has. `there`: columns that rows have."""
    wanted = list(wanted)
    return f"--columns: no row has {' or '.join(wanted)}; there are {listing(there)}{_near(wanted, there)}"


def listing(keys: Iterable[str]) -> str:
    """Return the names of the first twenty columns; "(none)" = there are none."""
    return listed(keys, 20) or "(none)"


def _near(wanted: Iterable[str], there: Iterable[str]) -> str:
    """Return the first near miss of a name that is wanted, or ""."""
    return next(filter(None, (near_miss(name, there) for name in wanted)), "")


# --- values -----------------------------------------------------------------------------------------------------------


def has(row: Mapping[str, Any], name: str) -> bool:
    """Return whether a row has a column, perhaps without a value."""
    return name in row or ("." in name and value_at(row, name) is not None)


def row_of(source: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Return the values of the columns, several texts joined by line breaks; keys without a value are left out."""
    row = {}
    for key, group in columns.items():
        value = value_at(source, group[0]) if len(group) == 1 else joined(source, group) or None
        if value is not None:
            single = role_of(key) in SINGLE or key in SINGLE_DOCUMENTS
            row[key] = value[0] if single and isinstance(value, list) and len(value) == 1 else value
    return writable_values(row)


def joined(source: Mapping[str, Any], group: Sequence[str]) -> str:
    """Join the texts of several columns, and of lists in them, by line breaks; missing columns are left out."""
    values = [value for name in group if (value := value_at(source, name)) is not None]
    values = [text for value in values for text in (value if isinstance(value, list) else [value])]
    if reason := next(filter(None, map(reason_of, values)), ""):
        raise RowError(f"{' + '.join(group)}: not a text{reason}")
    texts = list(map(str, values))
    return writable("\n".join(text for text in texts if text.strip()))


def value_at(source: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column by its name, dotted or not; None if it is missing."""
    value: Any = source.get(name)  # a key may itself contain dots
    if value is None:
        value = source
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    return value
