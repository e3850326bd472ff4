"""Write mined rows as JSON lines."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.mining.collection import Collection, text_key
from mlx_retrieval.mining.hard_negatives import Mined
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable

REPLACED = ("anchor", "query", "document", "positive", "negative", "negatives", "scores")


def write_rows(output: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSON lines, all or none, and return their number."""
    count = 0
    with files.replacing(output) as temporary, open(temporary, "wb") as file:
        for count, row in enumerate(rows, start=1):  # noqa: B007
            file.write(line_of(row))
    return count


def line_of(row: dict[str, Any]) -> bytes:
    """Return a row as a line of JSON."""
    return writable(json.dumps(row, ensure_ascii=False)).encode() + b"\n"


def by_row(items: Iterable[tuple[dict[str, Any], Example, *tuple[Any, ...]]]) -> Iterator[list[tuple]]:
    """Yield together what was read of each row: an item for each of its positives."""
    together = []
    for item in items:
        together.append(item)
        if len(together) > len(item[1].other_positives):
            yield together
            together = []


def positives_of(items: list[tuple]) -> dict[str, Any]:
    """Return the key and value of a row's positives: one text, or a list of several. `items`: as of `by_row`."""
    texts = [example.positive for _, example, *_ in items]
    return {"positive": texts[0] if len(texts) == 1 else texts}


def mined_rows(
    rows: Iterable[tuple[dict[str, Any], Example]], collection: Collection, mined: Mined, with_scores: bool
) -> Iterator[dict[str, Any]]:
    """Yield the collected rows with their negatives; other keys stay, and so do several positives of a row.

    Raises UserError if `rows` are not the rows that were collected.
    """
    places = collection.row_pairs
    changed = UserError("--data: the file was changed during the run")
    end = 0
    for items in by_row(rows):
        start, end = end, end + len(items)
        row, example = items[0]
        if end > len(places):
            raise changed
        query = int(collection.row_query[start])
        if text_key(example.query) != text_key(collection.queries.read([query])[0]):
            raise changed
        numbers = mined.numbers[query][mined.numbers[query] >= 0].tolist()
        mined_row = {"query": example.query} | positives_of(items)
        mined_row |= {name: value for name, value in row.items() if name not in REPLACED}
        mined_row["negatives"] = collection.documents.read(numbers)
        if with_scores:
            mined_row["scores"] = shortened([*mined.known[places[start:end]], *mined.scores[query][: len(numbers)]])
        yield mined_row
    if end != len(places):
        raise changed


def shortened(scores: Iterable[float]) -> list[float]:
    """Return scores rounded to seven digits, as many as a float32 has."""
    return [float(f"{score:.7g}") for score in scores]
