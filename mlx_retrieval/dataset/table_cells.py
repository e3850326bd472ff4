"""Read the cells of a table: texts, numbers, lists, and words that stand for a missing value.

read = reader("negatives", None)
read('["one", "two"]')                  # ["one", "two"]
"""

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from mlx_retrieval.dataset.columns import Columns
from mlx_retrieval.dataset.roles import role_of, snake_case

NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
NUMBERS = ("label", "rank")  # roles
SCORES = ("scores", "positive scores", "negative scores")
TEXTS = ("negatives", "documents")
POSITIVES = ("positives", "pos", "positive_passages", "positive_messages")  # columns that are meant for several texts
CONVERSATION = ("messages", "tools")  # columns of JSON
MISSING = frozenset(("", "nan", "NaN", "null", "NULL", "None"))  # as pandas, databases and Python write no value


def reader(key: str, columns: Columns | None) -> Callable[[str], Any]:
    """Return the function that reads the cells of a column: as texts, numbers or lists."""
    roles = {role_of(name) for name, group in (columns or {}).items() if group == (key,)}
    name = next((name for name, group in (columns or {}).items() if group == (key,)), key)
    role = next(iter(roles), None) or role_of(key)
    if role in NUMBERS:
        return _number_or_list if snake_case(name) == "score" else _number
    if role in SCORES:
        return _number_or_list
    if role in TEXTS or snake_case(name) in POSITIVES:
        return _texts
    if role == "document":
        return _text_or_texts
    return _json if snake_case(name) in CONVERSATION else str


def _number(cell: str) -> Any:
    """Return a cell's number; another text as it is, for the row's own check to name."""
    text = cell.strip()
    return json.loads(text) if re.fullmatch(r"-?\d{1,300}", text) else float(text) if NUMBER.fullmatch(text) else cell


def _number_or_list(cell: str) -> Any:
    return _json(cell) if cell.lstrip().startswith("[") else _number(cell)


def _texts(cell: str) -> Any:
    """Return the list of texts or passages that a cell holds, the passage, or the cell as one text. ValueError."""
    value = _json(cell)
    if isinstance(value, list) and not any(isinstance(item, int | float) for item in value):
        return value
    return value if isinstance(value, dict) and "text" in value else cell


def _text_or_texts(cell: str) -> Any:
    """Return the list of texts that the whole cell is, as JSON or Python writes it, or else the cell as one text."""
    try:
        value = _json(cell)
    except ValueError:
        return cell
    return value if isinstance(value, list) and value and all(isinstance(text, str) for text in value) else cell


def _json(cell: str) -> Any:
    """Return the list or object that a cell holds, as JSON or Python writes it, or the cell. ValueError."""
    text = cell.strip()
    if not (text.startswith(("[", "{")) and text.endswith(("]", "}"))):
        return cell
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = None
    if value is not None and repr(value) == text:
        return value
    if re.match(r"\[\s*['\"{]", text):
        raise ValueError('looks like a list, but is not one in JSON: ["a", "b"]')
    return cell
