"""The files of a folder as git sees them: .gitignore is obeyed, and every omission is counted.

    from mlx_retrieval.dataset.source_code.file_tree import read_text, walk
    tree = walk(Path("src"))
    print(len(tree.files), tree.left_out)         # Counter: reason -> files
    text, reason, data = read_text(Path("src/main.py"))

`visit` is the walker itself. `walk` lists the files for a search index, `mining/source_files.py` those that code pairs
are mined from.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.dataset.source_code.gitignore import Rules, is_ignored, parse_patterns, read_patterns, rules_above
from mlx_retrieval.utils.errors import UserError

MAX_FILE_SIZE = 1_000_000  # bytes
BINARY_HEAD = 8_192  # bytes in which a NUL makes a file binary; git looks at as many

GIT, IGNORED, EXCLUDED = ".git folder", "ignored by .gitignore (a folder counts once)", "--exclude"
HIDDEN = "hidden (a folder counts once)"
LINK, SPECIAL, UNREADABLE = "symbolic link", "no regular file", "unreadable"
TOO_LARGE, EMPTY, BINARY, NOT_UTF8 = "over --max-file-size", "empty", "binary", "not UTF-8"


# --- the walker -------------------------------------------------------------------------------------------------------


class Entry:
    """A file or folder that the walker meets. Symbolic links are neither: they are not followed."""

    def __init__(self, entry: os.DirEntry, rules: Rules):
        self.path, self.name = Path(entry.path), entry.name
        self.is_folder = entry.is_dir(follow_symlinks=False)
        self._entry, self._rules = entry, rules

    @property
    def is_link(self) -> bool:
        return self._entry.is_symlink()

    @property
    def is_file(self) -> bool:
        return self._entry.is_file(follow_symlinks=False)

    @property
    def is_ignored(self) -> bool:
        """Whether git ignores it. Patterns are matched only when this is read, as that takes most of the time."""
        return is_ignored(self.path, self.is_folder, self._rules)

    def stat(self) -> os.stat_result:
        return self._entry.stat(follow_symlinks=False)


def visit(
    folder: Path, judge: Callable[[Entry], str | None], left_out: Counter[str], rules: Rules = ()
) -> Iterator[Entry]:
    """Yield the files below a folder, each folder's entries in the order of their names.

    Args:
        judge: returns the reason why an entry is left out, "" to take it or enter it, None to pass over it uncounted.
        left_out: counts the reasons, and UNREADABLE for folders that cannot be read.
        rules: the .gitignore rules from outside; those of `folder` and of the folders below it are added.
    """
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError:
        left_out[UNREADABLE] += 1
        return
    if (patterns := read_patterns(folder / ".gitignore")) is not None:
        rules = (*rules, (folder, patterns))
    for entry in (Entry(entry, rules) for entry in entries):
        if reason := judge(entry):
            left_out[reason] += 1
        elif reason is not None and entry.is_folder:
            yield from visit(entry.path, judge, left_out, rules)
        elif reason is not None:
            yield entry


# --- files of a search index ------------------------------------------------------------------------------------------


class File(NamedTuple):
    """A file that may be indexed; `path` is relative to the folder, with slashes."""

    path: str
    size: int  # bytes
    mtime: int  # nanoseconds


@dataclass
class FileTree:
    """The files of a folder; `left_out` counts those that are left out, by reason."""

    files: list[File] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def walk(
    root: Path,
    max_file_size: int = MAX_FILE_SIZE,
    exclude: Sequence[str] = (),
    skip: Sequence[Path] = (),
    hidden: bool = True,
) -> FileTree:
    """Return the files below `root`, sorted by path.

    Args:
        root: the .gitignore files above it, up to the top of its git repository, count as well.
        max_file_size: larger files are left out, in bytes.
        exclude: more patterns in .gitignore's language, relative to `root`.
        skip: folders that are passed over and not counted (the index itself).
        hidden: also take files and folders whose names begin with a dot.

    Raises UserError if `root` is not a folder that can be read, or a pattern is not valid.
    """
    tree, root = FileTree(), root.resolve()
    passed_over = {path.resolve() for path in skip}
    excluded = parse_patterns(exclude, "--exclude")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    try:
        os.scandir(root).close()
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}") from error

    def judge(entry: Entry) -> str | None:
        relative = entry.path.relative_to(root).as_posix()
        if entry.path in passed_over:
            return None
        if entry.name == ".git":
            return GIT
        if not hidden and entry.name.startswith("."):
            return HIDDEN
        if entry.is_ignored:
            return IGNORED
        if excluded.match_file(relative + "/" * entry.is_folder):
            return EXCLUDED
        if entry.is_link:
            return LINK
        if entry.is_folder:
            return ""
        if not entry.is_file:
            return SPECIAL
        if entry.stat().st_size > max_file_size:
            return TOO_LARGE
        return "" if _is_utf8(relative) else NOT_UTF8  # the name, which no table could hold

    for entry in visit(root, judge, tree.left_out, rules_above(root)):
        state = entry.stat()
        tree.files.append(File(entry.path.relative_to(root).as_posix(), state.st_size, state.st_mtime_ns))
    tree.files.sort()
    return tree


def read_text(path: Path) -> tuple[str, str, bytes]:
    """Return (text with `\\n` line ends, reason why it is left out, the file's bytes); text or reason is ""."""
    try:
        data = path.read_bytes()
    except OSError:
        return "", UNREADABLE, b""
    if b"\0" in data[:BINARY_HEAD]:
        return "", BINARY, data
    if (text := decode_text(data)) is None:
        return "", NOT_UTF8, data
    return (text, "", data) if text.strip() else ("", EMPTY, data)


def decode_text(data: bytes) -> str | None:
    """Return UTF-8 bytes as a text with `\\n` line ends and no byte order mark; None if they are not UTF-8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
