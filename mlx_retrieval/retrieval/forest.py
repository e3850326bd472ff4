"""Several folders as one source of an index: their files are named relative to the folder that holds them all."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from mlx_retrieval.dataset.chunks import Chunk
from mlx_retrieval.dataset.source_code.file_tree import File
from mlx_retrieval.utils.errors import UserError


class IndexSource(Protocol):
    """Files or documents to index."""

    files: list[File]
    left_out: Counter[str]

    def read(self, file: File) -> tuple[list[Chunk], str, str]:
        """Return (chunks, sha256, the reason why the file is left out or "")."""

    def place(self, path: str, line: int) -> str:
        """Return what a message calls a line of a file, or a document."""


class Roots(NamedTuple):
    """The folders to index."""

    root: Path  # absolute: the folder itself, or the one that holds all of them
    folders: dict[str, Path]  # each folder relative to `root` -> as the user wrote it; {} = `root` alone
    shown: Path  # `root` as the user wrote it


class Forest:
    """The files of several folders; `trees`: each folder relative to the common one -> its files."""

    def __init__(self, trees: Mapping[str, IndexSource]):
        self.trees = trees
        self.files = sorted(
            file._replace(path=f"{name}/{file.path}") for name, tree in trees.items() for file in tree.files
        )
        self.left_out: Counter[str] = sum((tree.left_out for tree in trees.values()), Counter())

    def read(self, file: File) -> tuple[list[Chunk], str, str]:
        name = self._tree_of(file.path)
        return self.trees[name].read(file._replace(path=file.path[len(name) + 1 :]))

    def place(self, path: str, line: int) -> str:
        name = self._tree_of(path)
        return self.trees[name].place(path[len(name) + 1 :], line)

    def _tree_of(self, path: str) -> str:
        return next(name for name in self.trees if path.startswith(f"{name}/"))


def roots_of(paths: Sequence[Path]) -> Roots:
    """Return the folders to index, without those inside another one. Raises UserError for one that is missing."""
    absolute: dict[Path, Path] = {}
    for path in paths:
        if not (resolved := path.expanduser().resolve()).is_dir():
            raise UserError(f"{path}: {'a file; give its folder' if path.exists() else 'no such folder'}")
        absolute.setdefault(resolved, path.expanduser())
    outer = {path: shown for path, shown in absolute.items() if not any(other in path.parents for other in absolute)}
    if len(outer) == 1:
        ((root, shown),) = outer.items()
        return Roots(root, {}, shown)
    root = Path(os.path.commonpath(outer))
    return Roots(root, {path.relative_to(root).as_posix(): shown for path, shown in sorted(outer.items())}, root)
