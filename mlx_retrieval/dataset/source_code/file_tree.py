"""The text files of a folder as git sees them: what .gitignore names is left out, and every omission is counted.

from search_files import read_text, walk
found = walk(Path("src"))
print(len(found.files), found.left_out)       # Counter: reason -> files
text, reason = read_text(Path("src/main.py"))
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.dataset.source_code.gitignore import Rules, is_ignored, parse_patterns, read_patterns, rules_above
from mlx_retrieval.utils.errors import UserError

MAX_FILE_SIZE = 1_000_000  # bytes
BINARY_HEAD = 8_192  # bytes in which a NUL makes a file binary; git looks at as many

GIT, IGNORED, EXCLUDED = ".git folder", "ignored by .gitignore (a folder counts once)", "--exclude"
LINK, SPECIAL, UNREADABLE = "symbolic link", "no regular file", "unreadable"
TOO_LARGE, EMPTY, BINARY, NOT_UTF8 = "over --max-file-size", "empty", "binary", "not UTF-8"


class File(NamedTuple):
    """A file that may be indexed; `path` is relative to the folder, with slashes."""

    path: str
    size: int  # bytes
    mtime: int  # nanoseconds


@dataclass
class Found:
    """What `walk` found; `left_out` says how many files each reason cost."""

    files: list[File] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def walk(
    root: Path, max_file_size: int = MAX_FILE_SIZE, exclude: Sequence[str] = (), skip: Sequence[Path] = ()
) -> Found:
    """The files below `root`, sorted by path.

    Args:
        root: the .gitignore files above it, up to the top of its git repository, count as well.
        max_file_size: larger files are left out, in bytes.
        exclude: more patterns in .gitignore's language, relative to `root`.
        skip: folders that are passed over without a word (the index itself).

    Raises UserError where `root` is no folder that can be read, or a pattern is none.
    """
    found, root = Found(), root.resolve()
    passed_over = {path.resolve() for path in skip}
    excluded = parse_patterns(exclude, "--exclude")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    _walk(root, root, rules_above(root), (max_file_size, excluded, passed_over), found)
    found.files.sort()
    return found


def _walk(folder: Path, root: Path, rules: Rules, limits: tuple, found: Found) -> None:
    max_file_size, excluded, passed_over = limits
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        if folder == root:
            raise UserError(f"{root}: {error.strerror}") from error
        found.left_out[UNREADABLE] += 1
        return
    if (spec := read_patterns(folder / ".gitignore")) is not None:
        rules = (*rules, (folder, spec))
    for entry in entries:
        path, is_folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
        relative = path.relative_to(root).as_posix()
        if path in passed_over:
            continue
        if entry.name == ".git":
            found.left_out[GIT] += 1
        elif is_ignored(path, is_folder, rules):
            found.left_out[IGNORED] += 1
        elif excluded.match_file(relative + "/" * is_folder):
            found.left_out[EXCLUDED] += 1
        elif entry.is_symlink():
            found.left_out[LINK] += 1
        elif is_folder:
            _walk(path, root, rules, limits, found)
        elif not entry.is_file(follow_symlinks=False):
            found.left_out[SPECIAL] += 1
        elif (state := entry.stat(follow_symlinks=False)).st_size > max_file_size:
            found.left_out[TOO_LARGE] += 1
        elif not _is_utf8(relative):
            found.left_out[NOT_UTF8] += 1  # the name, which no table could hold
        else:
            found.files.append(File(relative, state.st_size, state.st_mtime_ns))


def read_text(path: Path) -> tuple[str, str, bytes]:
    """(text with `\\n` line ends, why it is left out, the file's bytes); one of text and reason is ""."""
    try:
        data = path.read_bytes()
    except OSError:
        return "", UNREADABLE, b""
    if b"\0" in data[:BINARY_HEAD]:
        return "", BINARY, data
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", NOT_UTF8, data
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return (text, "", data) if text.strip() else ("", EMPTY, data)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
