"""Match paths against .gitignore files as git does."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_retrieval.utils.errors import UserError

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

Rules = tuple[tuple[Path, "GitIgnoreSpec"], ...]  # (folder, its patterns), from the outermost in; inner ones win


def parse_patterns(lines: Sequence[str], origin: str) -> "GitIgnoreSpec":
    """Parse patterns in .gitignore's language. UserError naming `origin` if one is not valid."""
    from pathspec import GitIgnoreSpec

    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from error


def read_patterns(path: Path) -> "GitIgnoreSpec | None":
    """Read the patterns of a .gitignore file, without invalid lines, as git does; None if there is no file."""
    from pathspec import GitIgnoreSpec

    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    patterns = []
    for line in lines:
        with suppress(ValueError):
            patterns += GitIgnoreSpec.from_lines([line]).patterns
    return GitIgnoreSpec(patterns)


def rules_above(root: Path) -> Rules:
    """Return the rules of the git repository around `root`: .git/info/exclude, and the .gitignore files above `root`.

    If they ignore `root` itself, none of them applies: a folder that is named is wanted.
    """
    top = next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), root)
    around = [folder for folder in reversed(root.parents) if folder.is_relative_to(top)]
    places = [(top, top / ".git" / "info" / "exclude"), *((folder, folder / ".gitignore") for folder in around)]
    rules = tuple((folder, spec) for folder, file in places if (spec := read_patterns(file)) is not None)
    return () if is_ignored(root, True, rules) else rules


def is_ignored(path: Path, is_folder: bool, rules: Rules) -> bool:
    """Whether a path is ignored. The deepest .gitignore with a pattern that matches it decides."""
    for folder, spec in reversed(rules):
        if path == folder:
            continue
        verdict = spec.check_file(path.relative_to(folder).as_posix() + "/" * is_folder).include
        if verdict is not None:
            return verdict
    return False
