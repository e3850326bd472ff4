"""Parse one row of training data into an example."""

from typing import NamedTuple

import numpy as np

from mlx_retrieval.dataset.json_lines import MAX_ROW_BYTES, RowError, parse_object

FORMATS = {
    "document": ("query", "document"),
    "positive": ("query", "positive"),
    "anchor": ("anchor", "positive"),
    "documents": ("query", "documents"),
    "label": ("query", "document"),
}
NEGATIVES = ("negatives", "negative")
MAX_RANK = 2**31 - 1


class Example(NamedTuple):
    """One row: a query, its positive, its own hard negatives, and the rank of the positive (1 = best)."""

    query: str
    positive: str
    negatives: tuple[str, ...]
    rank: int
    scores: tuple[float, ...] = ()  # a teacher's, of the positive and the negatives; () = not scored


def row_format(row: dict) -> str:
    """Return the format of a row, by its keys. RowError if they fit none."""
    if "anchor" in row:
        return "anchor"
    if "query" in row and "documents" in row:
        return "documents"
    if "query" in row and "document" in row:
        return "label" if "label" in row else "document"
    if "query" in row and "positive" in row:
        return "positive"
    if "query" in row:
        raise RowError("no positive: a row with a query needs a document or a positive")
    raise RowError(
        f"keys {', '.join(sorted(row)) or '(none)'} fit no format (query and document; query and positive; "
        "anchor, positive and negative)"
    )


def _text(row: dict, key: str) -> str:
    if key not in row:
        raise RowError(f"no {key}")
    if not isinstance(row[key], str):
        raise RowError(f"{key} is not a text")
    if not row[key].strip():
        raise RowError(f"{key} is empty")
    return row[key]


def decode(line: bytes) -> dict:
    """Return the JSON object of one line of training data. RowError, also if the line is too long for a row."""
    if len(line) > MAX_ROW_BYTES:
        raise RowError(f"the line has more than {MAX_ROW_BYTES:,} bytes; are line breaks missing?")
    return parse_object(line)


def parse(line: bytes, expected: str | None = None) -> tuple[Example, str]:
    """Return the example of one line, and its format. RowError gives the reason if the line is not a row."""
    return example_of(decode(line), expected)


def example_of(row: dict, expected: str | None = None) -> tuple[Example, str]:
    """Return the example of a decoded row, and its format; see `parse`."""
    form = row_format(row)
    if expected is not None and form != expected:
        here, before = ("/".join((*FORMATS[name], *(["label"] * (name == "label")))) for name in (form, expected))
        raise RowError(f"has the format {here}, but the rows before have {before}")
    if form == "documents":
        return _scored_documents(row), form
    query, positive = (_text(row, key) for key in FORMATS[form])
    negatives: list[str] = []
    for key in NEGATIVES:
        negatives += _texts(row, key)
    if form == "anchor" and not negatives:
        raise RowError("no negative")
    if form == "label":
        label = row["label"]
        if not isinstance(label, (int, float)) or not 0 <= label <= 1:
            raise RowError(f"label {repr(label)[:20]} is not a number from 0 to 1")
        return Example(query, positive, (), 1, (float(label),)), form
    rank = row.get("rank", 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise RowError(f"rank {repr(rank)[:20]} is not a whole number from 1 to {MAX_RANK:,}")
    return Example(query, positive, tuple(negatives), rank, _scores(row, 1 + len(negatives))), form


def _texts(row: dict, key: str) -> list[str]:
    value = row.get(key, [])
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise RowError(f"{key} must be a text or a list of texts, none of them empty")
    return value


def _scores(row: dict, count: int) -> tuple[float, ...]:
    """Return a teacher's scores of a row's documents; () if the row has none."""
    scores = row.get("scores")
    if scores is None:
        return ()
    numbers = isinstance(scores, list) and all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in scores)
    if not numbers or len(scores) != count or not np.isfinite(scores).all():
        raise RowError(f"scores must be {count} finite numbers, one for each document")
    return tuple(map(float, scores))


def _scored_documents(row: dict) -> Example:
    """Return the example of documents that a teacher has scored: the best is the positive, the rest are negatives."""
    documents = _texts(row, "documents")
    if len(documents) < 2:
        raise RowError("documents must be at least two texts")
    if not (scores := _scores(row, len(documents))):
        raise RowError("no scores")
    order = sorted(range(len(documents)), key=lambda i: -scores[i])
    best, *rest = (documents[i] for i in order)
    return Example(_text(row, "query"), best, tuple(rest), 1, tuple(scores[i] for i in order))
