"""Jobs that other files of questions have done: of other settings, which give some chunks the same jobs.

answered = Answered([Path("questions/none-1f0c.jsonl")])
if key in answered: lines = answered.rows_of(key)           # of the file; [] = the job gave no question
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlx_retrieval.dataset.json_lines import RowError, parse_object
from mlx_retrieval.utils import files

JOB = "job_hash"  # key of a row: of the job that gave it; see store.job_key


def done_path(path: Path) -> Path:
    """Return the file of finished jobs that belongs to a file of questions."""
    return files.beside(path, "done")


def finished(done: BinaryIO, size: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lots of a file of finished jobs, each with its line.

    It ends before a line that was cut off, or is about rows behind `size`, the bytes of the questions' file.
    """
    for line in done:
        try:
            lot = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return
        if not isinstance(lot, dict) or not {"jobs", "rows", "dropped", "end"} <= lot.keys() or lot["end"] > size:
            return
        yield line, lot


class Answered:
    """The finished jobs of files of questions; of a job that several have, the first one's rows."""

    def __init__(self, paths: Iterable[Path] = ()):
        self._places: dict[str, list[tuple[Path, int, int]]] = {}  # job -> file, first byte and length of its rows
        for path in paths:
            if path.is_file() and done_path(path).is_file():
                self._places = self._of(path) | self._places

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def rows_of(self, key: str) -> list[bytes]:
        """Return the lines of a job's questions."""
        return [_read(*place) for place in self._places[key]]

    def _of(self, path: Path) -> dict[str, list[tuple[Path, int, int]]]:
        """Return where the rows of a file's finished jobs are; {} if its rows do not say of which job they are."""
        with open(done_path(path), "rb") as done:
            lots = [lot for _, lot in finished(done, os.path.getsize(path))]
        places: dict[str, list[tuple[Path, int, int]]] = {key: [] for lot in lots for key in lot["jobs"]}
        start, end = 0, max((lot["end"] for lot in lots), default=0)
        with open(path, "rb") as rows:
            while start < end and (line := rows.readline()):
                try:
                    row = parse_object(line)
                except RowError:
                    return {}
                if not {"query", JOB} <= row.keys():
                    return {}
                if (key := row[JOB]) in places:
                    places[key].append((path, start, len(line)))
                start += len(line)
        return places


def _read(path: Path, start: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(length)
