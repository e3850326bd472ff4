"""Other texts that a model keeps in place while it learns: files of rows, and folders of source code.

texts = rows_of(job, Path("handbook-model"), 960)    # files with 960 rows; code becomes docstrings and functions
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.dataset.rows import find_files
from mlx_retrieval.mining import code_pairs
from mlx_retrieval.mining.collection import read_rows
from mlx_retrieval.mining.output import write_rows
from mlx_retrieval.mining.source_files import SourceFiles
from mlx_retrieval.utils.errors import UserError

TRAIN = "train.jsonl"  # a folder that holds it is one of rows
NO_CODE = f"no function in there has a comment on what it does; nor rows in {TRAIN}"
Row = TypeVar("Row")


class Held(NamedTuple):
    """Texts, and where the base model has them."""

    vectors: Path
    rows: Sequence[str]  # files


def check(names: Sequence[str]) -> None:
    """Raise UserError for what is not there."""
    try:
        find_files([name for name in names if not _is_code(name)])
    except UserError as error:
        raise UserError(f"--hold {error}") from error


def files_of(name: str) -> list[Path]:
    """Return the files that are read for a name of `job.hold`; of rows on the hub, none."""
    if _is_code(name):
        return [file.path for file in SourceFiles([name]).files]
    paths = [path for path in find_files([name]) if isinstance(path, Path)]
    return [file for path in paths for file in ([*path.glob("*.jsonl*"), *path.glob("qrels/*.tsv")] or [path])]


def rows_of(job: Adaptation, folder: Path, count: int) -> list[str]:
    """Write a file of rows into `folder` for each name of `job.hold`, unless it is there, and return their paths.

    Args:
        count: rows wanted, drawn at random, about equally many of each name.

    Raises UserError for a name without rows or documented source code.
    """
    each = math.ceil(count / len(job.hold))
    return [_rows_of(name, folder / f"held-{i}.jsonl", each, job.seed) for i, name in enumerate(job.hold)]


def _rows_of(name: str, target: Path, count: int, seed: int) -> str:
    if not target.exists():
        rows = _drawn(_pairs(name) if _is_code(name) else _rows(name), count, seed)
        if not rows:
            raise UserError(f"--hold {name}: {NO_CODE if _is_code(name) else 'no rows'}")
        write_rows(target, rows)
    return str(target)


def _drawn(rows: Iterable[Row], count: int, seed: int) -> list[Row]:
    """Return `count` of the rows, drawn at random, in their order; all of them if there are no more."""
    rng, kept = np.random.default_rng([seed, 0x4E1D]), []
    for number, row in enumerate(rows):  # reservoir sampling: each row is as likely as any other (Vitter 1985)
        if number < count:
            kept.append((number, row))
        elif (place := int(rng.integers(number + 1))) < count:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda item: item[0])]


def _rows(name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, of a folder of them, or of the hub."""
    return (row for row, _ in read_rows(find_files([name]), None))


def _pairs(name: str) -> Iterator[dict[str, Any]]:
    """Yield the pairs of docstrings and functions of a folder."""
    return (pair._asdict() for pair in code_pairs.pairs([name], code_pairs.Rules(), code_pairs.Counts()))


def _is_code(name: str) -> bool:
    return Path(name).is_dir() and not (Path(name) / TRAIN).exists()
