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


def mined_rows(
    rows: Iterable[tuple[dict[str, Any], Example]], collection: Collection, mined: Mined, with_scores: bool
) -> Iterator[dict[str, Any]]:
    """Yield the collected rows with their negatives; other keys stay.

    Raises UserError if `rows` are not the rows that were collected.
    """
    places = collection.row_pairs
    changed = UserError("--data: the file was changed during the run")
    i = -1
    for i, (row, example) in enumerate(rows):
        if i == len(places):
            raise changed
        query = int(collection.row_query[i])
        if text_key(example.query) != text_key(collection.queries.read([query])[0]):
            raise changed
        numbers = mined.numbers[query][mined.numbers[query] >= 0].tolist()
        mined_row = {"query": example.query, "positive": example.positive}
        mined_row |= {name: value for name, value in row.items() if name not in REPLACED}
        mined_row["negatives"] = collection.documents.read(numbers)
        if with_scores:
            mined_row["scores"] = shortened([mined.known[places[i]], *mined.scores[query][: len(numbers)]])
        yield mined_row
    if i + 1 != len(places):
        raise changed


def shortened(scores: Iterable[float]) -> list[float]:
    """Return scores rounded to seven digits, as many as a float32 has."""
    return [float(f"{score:.7g}") for score in scores]
