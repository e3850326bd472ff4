"""Write files and folders so that a kill at any moment leaves the old or the new one, never half of either."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mlx_retrieval.utils.errors import UserError


class SaveError(UserError):
    """Something could not be written, mostly for want of space. What was saved before is whole."""


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` with what `fill` writes into it: all or nothing, in the order that survives a loss of power.

    `fill` writes into a temporary folder beside it; files and folder are flushed to disk, then renamed. A folder that
    stands there already is replaced. Whatever goes wrong, what was there stays; a full disk is a SaveError.
    """
    temporary, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        temporary.mkdir()
        fill(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise SaveError(
            f"could not save {folder}: {error.strerror or error}; what was saved before is whole"
        ) from error
    finally:
        _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove what an interrupted `write_folder` left beside a folder; bring the folder back if it was moved away."""
    old = _beside(folder, "old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    for leftover in (old, _beside(folder, "new")):
        shutil.rmtree(leftover, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file in one piece: readers see the old one or the new one, after a loss of power too.

    SaveError where the disk is full.
    """
    temporary = _beside(path, "new")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise SaveError(f"could not write {path}: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    """Make a run's folder where it is missing, its name flushed to disk: its checkpoints are found through it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(PermissionError):  # the folder around it need not be ours to read
            _flush(folder.absolute().parent)
    except OSError as error:
        raise SaveError(f"{folder}: {error.strerror}") from error


def _beside(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.{what}"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
