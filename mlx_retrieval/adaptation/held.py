"""Other texts that a model keeps in place while it learns: files of rows, and folders of source code.

texts = rows_of(job, Path("handbook-model"))       # files of rows; code becomes pairs of docstrings and functions
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.dataset.rows import find_files
from mlx_retrieval.mining import code_pairs
from mlx_retrieval.mining.source_files import SourceFiles
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable

TRAIN = "train.jsonl"  # a folder that holds it is one of rows


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


def rows_of(job: Adaptation, folder: Path) -> list[str]:
    """Return the files of rows of `job.hold`; pairs of source code are written into `folder`, unless they are there.

    Raises UserError for a folder without documented source code.
    """
    return [
        _pairs_of(name, folder / f"held-code-{i}.jsonl") if _is_code(name) else name for i, name in enumerate(job.hold)
    ]


def _is_code(name: str) -> bool:
    return Path(name).is_dir() and not (Path(name) / TRAIN).exists()


def _pairs_of(name: str, target: Path) -> str:
    if not target.exists():
        counts = code_pairs.Counts()
        pairs = code_pairs.pairs([name], code_pairs.Rules(), counts)
        lines = [writable(json.dumps(pair._asdict(), ensure_ascii=False)) + "\n" for pair in pairs]
        if not lines:
            raise UserError(f"--hold {name}: no function in there has a comment on what it does; nor rows in {TRAIN}")
        files.write_file(target, "".join(lines))
    return str(target)
