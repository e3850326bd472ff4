"""The fields of a chunk that a search by words looks at, each with a weight: path, name, doc and text.

BM25F (Robertson, Zaragoza and Taylor 2004) adds a term's occurrences in all fields, each times the field's weight, and
only then lets them saturate. Its lengths are the weighted sums of the fields' lengths. With whole weights this is BM25
of a text in which the terms of each field stand as many times as the weight says. That text is what an index stores.

stream({"path": "src/reader.py", "name": "readLine", "doc": "", "text": "..."}, WEIGHTS, analyzer())
"""

import re
from collections.abc import Mapping

from mlx_retrieval.dataset.source_code.languages import LANGUAGES
from mlx_retrieval.retrieval.analyzer import Analyzer

FIELDS = ("path", "name", "doc", "text")
# The text holds the name and the doc as well: their weights are what they count beyond that.
WEIGHTS = {"path": 1, "name": 1, "doc": 1, "text": 1}
HEAVIEST = 8  # weight of a field

_STRING = re.compile(r'^[ \t]*[rRuU]?("""|\'\'\')(.*?)(?:\1|\Z)', re.DOTALL | re.MULTILINE)  # a statement of its own


def fields_of(path: str, name: str, language: str, context: str, text: str) -> dict[str, str]:
    """Return the text of every field of a chunk.

    Args:
        path: of its file; "" for a document, whose id says nothing.
        name: its symbol, or the headings above it; "" = none.
        language: a name in dataset.source_code.languages, or another one, which has no doc.
        context: lines from further up that belong to it; "" = none.
    """
    return {"path": path, "name": name, "doc": doc_of(text, language), "text": f"{context}\n{text}"}


def doc_of(text: str, language: str) -> str:
    """Return the docstrings and comments in a piece of source code; "" if `language` is no programming language."""
    if language not in LANGUAGES:
        return ""
    parts = [match[2] for match in _STRING.finditer(text)] if language == "python" else []
    comments = LANGUAGES[language].comments
    return "\n".join([*parts, *(line for line in text.split("\n") if line.lstrip().startswith(comments))])


def stream(fields: Mapping[str, str], weights: Mapping[str, int], analyzer: Analyzer) -> str:
    """Return the terms of all fields, separated by spaces, each as often as its field's weight says."""
    terms = ((analyzer.stream(fields[field]), weights[field]) for field in FIELDS if weights[field])
    return " ".join(text for text, weight in terms if text for _ in range(weight))


def check_weights(weights: Mapping[str, object]) -> None:
    """Raise ValueError if these are no weights of fields."""
    if set(weights) != set(FIELDS) or not all(isinstance(w, int) and 0 <= w <= HEAVIEST for w in weights.values()):
        raise ValueError(f"weights of fields: {', '.join(FIELDS)}, each from 0 to {HEAVIEST}, not {dict(weights)}")
    if not any(weights.values()):
        raise ValueError("weights of fields: all are 0, so no word would count")


def shown(weights: Mapping[str, int]) -> str:
    """Return weights in words: `path 1, name 4, doc 2, text 1`."""
    return ", ".join(f"{field} {weights[field]}" for field in FIELDS)
