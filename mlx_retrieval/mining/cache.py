"""The folder that a run of mine.py works in, so that a killed one continues where it was; and what such runs tell.

.mined.jsonl.work/        beside --output mined.jsonl, removed when that is written; or --work FOLDER, which stays
  about.json              what the run is of: hashes of texts and models, settings
  vectors.f32             vectors of the documents so far, float32, one after another
  block-000012.npz        what was found for one block of queries or rows

    python -m pytest tests/test_mine_negatives.py -k resume
"""

import argparse
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_retrieval.utils import locks
from mlx_retrieval.utils.console import print_rows
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import Progress

if TYPE_CHECKING:
    from mlx_retrieval.mining.collection import TextFile


ABOUT, VECTORS, LOCK, VERSION = "about.json", "vectors.f32", ".lock", 1
OURS = (LOCK, f".{ABOUT}.new")
DOCUMENTS_AT_ONCE = 2_048  # embedded between two writes; a kill costs no more


class Work:
    """A folder with what is finished. `begin` throws away what is of other texts, models or settings."""

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, marks: dict[str, Any], for_vectors: Sequence[str] = ()) -> tuple[bool, list[str]]:
        """Whether the folder is of an earlier run, and which of the marks have changed since.

        Args:
            marks: all that decides what is found; `for_vectors` names those that the documents' vectors depend on.
        """
        marks = json.loads(json.dumps(marks | {"version": VERSION}))
        about = self.folder / ABOUT
        try:
            before = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else None
        except ValueError:
            before = {}
        if before is None and any(path.name not in OURS for path in self.folder.iterdir()):
            raise UserError(f"{self.folder}: holds other files than those of an earlier run of mine.py")
        changed = [name for name in marks if (before or {}).get(name) != marks[name]]
        if {*for_vectors, "version"} & {*changed}:
            (self.folder / VECTORS).unlink(missing_ok=True)
        if changed:
            for path in self.folder.glob("block-*.npz"):
                path.unlink()
        _write(about, lambda file: file.write(json.dumps(marks, indent=2).encode()))
        return before is not None, changed

    def vectors(
        self,
        documents: "TextFile",
        dimensions: int,
        encode: Callable[[list[str]], np.ndarray],
        progress: Progress | None = None,
    ) -> np.ndarray:
        """(D, d) float32 of all documents, mapped from disk; those that are there are not computed again."""
        path, row = self.folder / VECTORS, 4 * dimensions
        with open(path, "ab") as file:
            # Whole lots only: texts of one lot are padded together, which shows in a vector's last digits.
            done = min(file.tell() // row, len(documents))
            done = done if done == len(documents) else done - done % DOCUMENTS_AT_ONCE
            file.truncate(done * row)
            for first in range(done, len(documents), DOCUMENTS_AT_ONCE):
                if progress:
                    progress(first, len(documents))
                last = min(first + DOCUMENTS_AT_ONCE, len(documents))
                file.write(np.ascontiguousarray(encode(documents.read(range(first, last))), np.float32))
                file.flush()
                os.fsync(file.fileno())
        return np.memmap(path, np.float32, "r", shape=(len(documents), dimensions))

    def block(self, number: int, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """The arrays of a finished block; None where there is none, or only a broken one."""
        try:
            with np.load(self._path(number), allow_pickle=False) as arrays:
                return {name: arrays[name] for name in names}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def keep(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep a finished block."""
        _write(self._path(number), lambda file: np.savez(file, **arrays))

    @property
    def blocks(self) -> int:
        """How many finished blocks there are."""
        return len(list(self.folder.glob("block-*.npz")))

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:06}.npz"


def _write(path: Path, fill: Callable[[Any], Any]) -> None:
    """Write a file beside its place, then move it there."""
    draft = path.with_name(f".{path.name}.new")
    with open(draft, "wb") as file:
        fill(file)
    draft.replace(path)


@contextmanager
def work_folder(output: Path, folder: str | None) -> Iterator[Work]:
    """The folder to work in, held for this process. The one beside the output is removed when all went well."""
    path = Path(folder).expanduser() if folder else output.with_name(f".{output.name}.work")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: not a folder")
    with locks.only_one(path / LOCK, f"{path}: another process is mining there"):
        finished = False
        try:
            yield Work(path)
            finished = True
        finally:
            if not folder and (finished or not (path / ABOUT).exists()):  # or nothing was begun
                shutil.rmtree(path, ignore_errors=True)


# --- what the commands that work in it share --------------------------------------------------------------------------


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C and full disks in commands that continue where they were."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nmine.py: stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        raise UserError(f"{error.filename or 'writing'}: {error.strerror or error}") from error


def tell_begun(work: Work, again: bool, changed: Sequence[str], skipped: Sequence[str] | None) -> None:
    """Say what is left out, and whether an earlier run is continued."""
    if skipped:
        print(f"mine.py: {len(skipped):,} bad rows left out, the first: {skipped[0]}", file=sys.stderr)
    if again and changed:
        print(f"mine.py: {work.folder}: begun anew, changed since: {', '.join(changed)}", file=sys.stderr)
    elif again:
        print(f"mine.py: {work.folder}: continued, {work.blocks:,} blocks are finished", file=sys.stderr)


def print_scores(name: str, positives: np.ndarray, others: np.ndarray, of: str = "negatives") -> None:
    """A table: how the scores of positives and negatives lie."""
    both = {"positives": np.asarray(positives), of: np.asarray(others)}
    rows = [[what, f"{len(s):,}", *(f"{x:.4f}" for x in _summary(s))] for what, s in both.items() if len(s)]
    print_rows(f"Scores of {name}", ("of", "count", "mean", "p5", "p50", "p95"), rows)


def _summary(scores: np.ndarray) -> list[float]:
    """Mean, 5th, 50th and 95th percentile; NaN where there is none."""
    return [float(scores.mean()), *np.percentile(scores, (5, 50, 95)).tolist()] if len(scores) else [float("nan")] * 4


def add_files(out: argparse.ArgumentParser, data: str) -> None:
    """Add the flags of what is read and written, and of the folder to work in."""
    out.add_argument("--data", nargs="+", required=True, metavar="FILE", help=f"{data}; .gz and folders, too")
    out.add_argument("--output", required=True, metavar="FILE", help="JSON lines that train.py reads")
    out.add_argument("--overwrite", action="store_true", help="replace --output where it exists")
    work = "keep what is finished here, for later runs, too (default: beside --output until that is written)"
    out.add_argument("--work", metavar="FOLDER", help=work)
    out.add_argument("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used (counted)")
