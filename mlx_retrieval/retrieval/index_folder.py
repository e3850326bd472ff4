"""The folder of an index: what may be in it, its index.json, and how a rebuilt index takes the place of an older one.

info = read_info(Path(".index"))
check(Path(".index")); install(Path(".index"))
"""

import dataclasses
import json
import shutil
from pathlib import Path

from mlx_retrieval.retrieval.analyzer import check_language
from mlx_retrieval.retrieval.base import FILE, LOCK, VERSION, IndexInfo
from mlx_retrieval.retrieval.fields import check_weights
from mlx_retrieval.retrieval.lance_errors import REBUILD, is_of_system, unreadable
from mlx_retrieval.retrieval.late_chunks import TOKENS
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.outputs import check_parent, entries
from mlx_retrieval.utils.text import shell

TABLES = ("chunks.lance", "files.lance", TOKENS)
REBUILT = "rebuilt"  # in an index's folder: the index that will replace it
OLDEST = 1  # version of an index that can be brought up to date
OURS = frozenset({FILE, LOCK, f".{FILE}.new", ".gitignore", REBUILT, *TABLES})


def check(folder: Path) -> None:
    """Raise UserError if a folder holds other files than an index: making one removes and adds files."""
    files.check_name(folder, "--index")
    if folder.exists() and not (folder.is_dir() and {*entries(folder)} <= OURS):
        raise UserError(f"--index {folder}: holds something else; choose a folder for the index alone")
    check_parent(folder / FILE, "--index")


def clear(folder: Path) -> None:
    """Remove an index, but not its folder. OSError if a file cannot be removed."""
    for name in (FILE, *TABLES):  # index.json first: without it there is no index
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def install(folder: Path) -> None:
    """Put the index in `folder`/rebuilt in place of the one in `folder`; continue if that was interrupted."""
    source = folder / REBUILT
    (folder / FILE).unlink(missing_ok=True)
    if not json.loads((source / FILE).read_text(encoding="utf-8")).get("maxsim"):
        shutil.rmtree(folder / TOKENS, ignore_errors=True)
    for name in TABLES:
        if (source / name).exists():
            shutil.rmtree(folder / name, ignore_errors=True)
            (source / name).rename(folder / name)
    (source / FILE).rename(folder / FILE)
    shutil.rmtree(source, ignore_errors=True)


# --- index.json -------------------------------------------------------------------------------------------------------


def read_info(folder: Path) -> IndexInfo:
    """Read index.json. UserError, with the command to run, if it is missing, damaged, or of an unknown version."""
    if not (folder / FILE).is_file():
        raise UserError(
            f"--index {folder}: no index there. To create one: "
            f"{shell('python', 'search.py', 'index', 'PATH', '--model-path', 'MODEL', '--index', folder)}"
        )
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if values.get("version") not in range(OLDEST, VERSION + 1):
            raise UserError(f"{folder}: made by another version of this toolkit; {REBUILD}")
        info = IndexInfo(**values)
        check_weights(info.fields)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / FILE}: {unreadable(error)}") from error
    return info


def read_earlier(folder: Path, rebuild: bool) -> IndexInfo | None:
    """Return index.json of the index that is there, which a kill may have left aside; None if there is none.

    Args:
        rebuild: whether that index is to be replaced; None is returned, too, if its index.json cannot be used.

    Raises UserError as `read_info` does, with `rebuild` only if index.json cannot be opened at the moment.
    """
    place = next((place for place in (folder, folder / REBUILT) if (place / FILE).is_file()), None)
    if place is None:
        return None
    try:
        info = read_info(place)
        check_language(info.language)
    except UserError as error:
        if rebuild and not is_of_system(error.__cause__):
            return None
        raise
    return info


def write_info(folder: Path, info: IndexInfo) -> None:
    """Write index.json atomically."""
    files.write_file(folder / FILE, json.dumps(dataclasses.asdict(info), indent=2) + "\n")


def written_at(folder: Path) -> int:
    """Return when index.json was written, in nanoseconds; 0 = it is being replaced, or gone."""
    try:
        return (folder / FILE).stat().st_mtime_ns
    except OSError:
        return 0
