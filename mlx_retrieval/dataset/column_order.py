"""Read rows whose columns have unknown names by order, as sentence-transformers does, where that is safe.

refusal([{"a": "Why does my kettle hiss?", "b": "Scale grows on the element.", "c": "How to paint a wall."}])    # ""
in_order(["a", "b", "c"])       # {"query": ("a",), "document": ("b",), "negatives": ("c",)}

The first column is a query, the second its document, and further ones are negatives. Trained on by mistake, a table of
something else would spoil a model unnoticed. So every column must hold sentences rather than values, no name may say
that it is something else or that the order is another, and negatives need names that say nothing but a place: a, b, c
or text_1, text_2, text_3. A third column of another name may as well hold more about the document.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_retrieval.dataset.column_hints import DOCUMENT_WORDS, QUERY_WORDS, UNWRITABLE, has_word, is_series
from mlx_retrieval.dataset.columns import Columns
from mlx_retrieval.dataset.roles import role_of, snake_case
from mlx_retrieval.dataset.unread_keys import is_origin, may_matter

MOST = 12  # columns
REPEATED = 8  # rows from which on a column of few different texts is one of categories
WORDS = 3  # that half the texts of a column have at least
LONGER = 3  # times: a text in the place of a query that is so much longer than its document may be the document
TITLES = ("title", "titel", "titre", "titulo", "subject", "betreff", "headline", "heading", "name", "keyword")
# Of names in a series that say nothing else; so does a letter alone.
PLACES = ("", "text", "sentence", "sent", "string", "column", "col", "field", "item", "doc", "passage")
# Letters of scripts that put no blank between words: Thai to Burmese, Khmer, kana, Chinese.
UNSPACED = re.compile(r"[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
LETTERS = 3  # of these, about a word


def in_order(names: Sequence[str]) -> Columns:
    """Return the columns of a query, its document and negatives, in this order."""
    roles = ["query", "document", "negatives"]
    if len(names) > 3:
        roles[2:] = [f"negative_{i}" for i in range(1, len(names) - 1)]
    return {role: (name,) for role, name in zip(roles, names, strict=False)}


def refusal(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why rows are not read by order: the first rows of a file; "" = they are.

    None if the question does not arise, as a name is known, or the rows have no two columns of texts.
    """
    names = list(rows[0]) if rows else []
    if any(map(role_of, names)) or sum(any(isinstance(row.get(name), str) for row in rows) for name in names) < 2:
        return None
    if any(list(row) != names for row in rows):
        return "not all rows have the same columns"
    if len(names) > MOST:
        return f"there are more than {MOST} columns"
    for i, name in enumerate(names):
        if reason := _refusal_by_name(name) or _refusal_by_values(i, [row[name] for row in rows]):
            return f"{name} {reason}"
    first, second = names[:2]
    if len(names) > 2 and not _are_places(names):
        return "negatives are read by order only from columns like a, b, c or text_1, text_2, text_3"
    if not is_series(names):
        if long := next((name for name in names if len(name.split()) > 1), None):
            return f"{long} is more than a word, perhaps a text itself"
        is_document, is_query = has_word(first, DOCUMENT_WORDS), has_word(second, QUERY_WORDS)
        if (is_document and not has_word(second, DOCUMENT_WORDS)) or (is_query and not has_word(first, QUERY_WORDS)):
            return f"{first} may be the document and {second} the query"
    texts = [[str(row[name] or "") for row in rows] for name in (first, second)]
    if question_count(texts[1]) > question_count(texts[0]):
        return f"{second} holds the questions"
    longer = sum(len(one) > LONGER * len(other) for one, other in zip(*texts, strict=True))
    return f"{first} holds much longer texts than {second}, as documents are" if 2 * longer > len(rows) else ""


def _are_places(names: Sequence[str]) -> bool:
    stem = snake_case(names[0])[:-1].rstrip("_0123456789")
    return is_series(names) and (stem in PLACES or len(stem) == 1)


def _refusal_by_name(name: str) -> str:
    """Return why a column is none of a text, by its name; "" = it may be one."""
    snake = snake_case(name)
    if UNWRITABLE.search(name) or not name.strip():
        return "is no name for a column"
    if is_origin(snake) or may_matter(snake) or any(part in TITLES for part in snake.split("_")):
        return "has the name of something about a text"
    return ""


def _refusal_by_values(i: int, values: Sequence[Any]) -> str:
    """Return why the values of column i are not the texts of its role; "" = they are."""
    texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    if len(texts) < sum(value is not None for value in values):
        return "holds not only texts"
    if 2 * len(texts) < len(values):
        return "is mostly without a value"
    if are_values(texts):
        return f"has fewer than {WORDS} words in most rows"
    return "has few different texts" if i != 1 and are_repeated(texts) else ""


def are_values(texts: Sequence[str]) -> bool:
    """Return whether most texts of a column are too short for sentences: as names of people or places are."""
    return 2 * sum(_words(text) >= WORDS for text in texts) < len(texts)


def are_repeated(texts: Sequence[str]) -> bool:
    """Return whether the texts of a column are few different ones, as of categories; documents may be so, too."""
    return REPEATED <= len(texts) >= 2 * len(set(texts))


def question_count(texts: Iterable[str]) -> int:
    """Return how many texts are plainly questions."""
    return sum(text.rstrip().endswith(("?", "？")) for text in texts)


def _words(text: str) -> int:
    """Return about how many words a text has; 0 for a list or object in JSON."""
    if text.startswith(("[", "{")):
        return 0
    spaced = sum(any(map(str.isalpha, word)) for word in text.split())
    return spaced + len(UNSPACED.findall(text)) // LETTERS
