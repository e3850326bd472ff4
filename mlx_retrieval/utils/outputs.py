"""Check where a command may write: never over an input, and over other files only if it is told to."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mlx_retrieval.utils.errors import UserError

DEVICES = ("/dev", "/dev/fd", "/proc/self/fd")  # links in there to a regular file must not be replaced either
MODEL_FILES = re.compile(r".*\.safetensors|.*(config|token|vocab|model|modules|state).*\.json")  # read with a model
NOTES = re.compile(r"\.DS_Store|\.localized|\._.*|Thumbs\.db|desktop\.ini|\.directory")  # of Finder, Explorer, Dolphin


def check_output(path: Path, overwrite: bool, inputs: Iterable[str | Path | None] = (), name: str = "--output") -> None:
    """Raise UserError if a file must not be written, before any work is done for it. Missing folders are no error.

    In a folder that holds a model, files with the names that models are read from are refused; in an index, all.

    Args:
        path: the file.
        overwrite: whether an existing file may be replaced.
        inputs: files and folders that the command reads. No file of them is replaced, whatever `overwrite` says.
            Names that are not those of a file or folder, such as a model's name on the hub, do not count.
        name: what a message calls the file.
    """
    if os.path.lexists(path):
        if path.is_dir():
            raise UserError(f"{name} {path}: this is a folder, not a file")
        if source := protected(path, inputs):
            also = f"inside the input {source}" if source.is_dir() else "also an input"
            raise UserError(f"{name} {path}: this file is {also}; inputs are never overwritten")
        if str(path.absolute().parent) in DEVICES or (path.exists() and not path.is_file()):
            raise UserError(f"{name} {path}: not a regular file")
        if not overwrite:
            raise UserError(f"{name} {path}: the file exists (--overwrite replaces it)")
    check_parent(path, name)
    _check_neighbours(path, name)


def _check_neighbours(path: Path, name: str) -> None:
    """Raise UserError if a file would become part of the model or the index in its folder."""
    folder = path.absolute().parent
    if (folder / "index.json").is_file() and (folder / "chunks.lance").is_dir():
        raise UserError(f"{name} {path}: {folder} is an index of search.py, which shares its folder with no other file")
    if MODEL_FILES.fullmatch(path.name) and holds_model(folder):
        raise UserError(f"{name} {path}: {folder} holds a model, and a file of that name would be read as a part of it")


def entries(folder: Path) -> list[str]:
    """Return the names of what is in a folder, without the notes that file managers leave in each one they show."""
    return [path.name for path in folder.iterdir() if not NOTES.fullmatch(path.name)]


def holds_model(folder: Path) -> bool:
    """Return whether a model or an adapter, its settings and its weights, is in a folder itself."""
    configs = ("config.json", "adapter_config.json")
    return any((folder / config).is_file() for config in configs) and any(folder.glob("*.safetensors"))


def protected(path: Path, inputs: Iterable[str | Path | None]) -> Path | None:
    """Return the input that an existing path is, or is inside of; None if it is no input."""
    target = path.resolve()
    for source in (Path(source).expanduser() for source in inputs if source):
        try:
            if path.exists() and source.exists() and path.samefile(source):
                return source
            if source.is_dir() and target.is_relative_to(source.resolve()):
                return source
        except OSError:  # a name that is too long for a file, for instance of a query
            continue
    return None


def check_parent(path: Path, name: str = "--output") -> None:
    """Raise UserError if nothing can be written beside a path, or its missing folders cannot be made."""
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{name} {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{name} {path}: the folder {folder} cannot be written to")
