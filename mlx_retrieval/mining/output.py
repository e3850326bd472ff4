"""Write mined rows."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.mining.collection import Collection, _key
from mlx_retrieval.utils.errors import UserError

if TYPE_CHECKING:
    from mlx_retrieval.mining.hard_negatives import Mined

REPLACED = ("anchor", "query", "document", "positive", "negative", "negatives", "scores")


def check_output(output: Path, overwrite: bool) -> None:
    """Raise UserError where `output` can not be written."""
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {output}: not a file in a folder that exists")
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: the file exists (--overwrite replaces it)")


def write_rows(output: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSON lines, all or nothing; returns how many."""
    draft, count = output.with_name(f".{output.name}.new"), 0
    try:
        with open(draft, "wb") as file:
            for count, row in enumerate(rows, start=1):  # noqa: B007
                file.write(_line(row))
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
    return count


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
        return json.dumps(row).encode() + b"\n"


def mined_rows(
    rows: Iterable[tuple[dict[str, Any], Example]], collection: Collection, mined: "Mined", with_scores: bool
) -> Iterator[dict[str, Any]]:
    """The rows that were collected, with their negatives; other keys stay. UserError where they are not those rows."""
    places = collection.row_pairs
    changed = UserError("--data: the file was changed during the run")
    i = -1
    for i, (row, example) in enumerate(rows):
        if i == len(places):
            raise changed
        query = int(collection.row_query[i])
        if _key(example.query) != _key(collection.queries.read([query])[0]):
            raise changed
        numbers = mined.numbers[query][mined.numbers[query] >= 0].tolist()
        made = {"query": example.query, "positive": example.positive}
        made |= {name: value for name, value in row.items() if name not in REPLACED}
        made["negatives"] = collection.documents.read(numbers)
        if with_scores:
            made["scores"] = shortened([mined.known[places[i]], *mined.scores[query][: len(numbers)]])
        yield made
    if i + 1 != len(places):
        raise changed


def shortened(scores: Iterable[float]) -> list[float]:
    """Scores as they are written: seven digits, as many as a float32 has."""
    return [float(f"{score:.7g}") for score in scores]
