"""Write files and folders so that a kill at any moment leaves the old or the new one, never half of either."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable

READ_WHOLE = 64 << 20  # bytes; of a larger file, `sampled_blocks` reads BLOCKS blocks of BLOCK bytes
BLOCKS, BLOCK = 64, 256 << 10
# Of a volume that cannot flush folders, such as a network's; it has to keep names in its own way.
NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


class SaveError(UserError):
    """A file or folder could not be written, mostly because the disk is full. Everything saved before is intact."""


def reason(error: OSError) -> str:
    """Return the reason of an error of the system, or of MLX, without its number, tag and full stop."""
    return re.sub(r"^\[\w+\] ", "", error.strerror or str(error)).rstrip(".")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create `folder` with the files that `fill` writes into it: all or nothing, even if the power fails.

    `fill` writes into a temporary folder beside it; files and folder are flushed to disk, then renamed. A folder of
    that name is replaced. After an error the old one is still there; SaveError if the disk is full.
    """
    temporary, old = beside(folder, "new"), beside(folder, "old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        temporary.mkdir()
        fill(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise SaveError(f"could not save {folder}: {reason(error)}; what was saved before is whole") from error
    finally:
        tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what an interrupted `write_folder` left beside a folder; bring the folder back if it was moved away."""
    old = beside(folder, "old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    for leftover in (old, beside(folder, "new")):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def replacing(path: Path, name: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there replaces `path`, unless the block fails.

    Folders that are missing are made, and removed again if the block fails.

    Readers see the old file or the new one, even after the power failed. To write several files, all or none, enter
    several.

    Args:
        name: how an error names the file, for instance `--output FILE`; "" = its path.

    Raises SaveError if the file cannot be written, for instance because the disk is full.
    """
    temporary, folders = beside(path, "new"), [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush_folder(path.absolute().parent)
    except OSError as error:
        own = error.filename in (None, str(path), str(temporary), temporary, path)
        raise SaveError(f"{name or f'could not write {path}'}: {reason(error) if own else error}") from error
    finally:
        with suppress(OSError):  # renamed, or never created
            temporary.unlink()
        for folder in folders:
            with suppress(OSError):  # the file is there
                folder.rmdir()


def write_file(path: Path, text: str, name: str = "") -> None:
    """Write a text file in one piece: see `replacing`."""
    with replacing(path, name) as temporary:
        temporary.write_text(writable(text), encoding="utf-8")


def check_name(path: Path, name: str) -> None:
    """Raise UserError, with the flag `name`, for a path that is not UTF-8: MLX and LanceDB cannot open it."""
    if writable(str(path)) != str(path):
        raise UserError(f"{name} {path}: not a name in UTF-8, which the libraries that write there need")


def make_folder(folder: Path) -> None:
    """Create a run's folder if it is missing, its name flushed to disk: its checkpoints are found through it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _flush_folder(folder.absolute().parent)
    except OSError as error:
        raise SaveError(f"{folder}: {reason(error)}") from error


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Raise a SaveError that names `path` for an error of the system in this block, which writes to an open file."""
    try:
        yield
    except OSError as error:
        raise SaveError(f"could not write {path}: {reason(error)}") from error


def sampled_blocks(path: Path) -> Iterator[bytes]:
    """Yield the bytes to hash a file by: all of them, or of more than READ_WHOLE bytes BLOCKS blocks spread over it."""
    size = path.stat().st_size
    starts = range(0, size, BLOCK)
    if size > READ_WHOLE:
        last = size - BLOCK
        starts = [*(int(i * (last / (BLOCKS - 1))) for i in range(BLOCKS - 1)), last]
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            yield file.read(BLOCK)


def beside(path: Path, suffix: str) -> Path:
    """Return the hidden path beside `path` for its next or last contents: `.best.new` for `best` and `new`."""
    return path.parent / f".{path.name}.{suffix}"


def _flush_folder(folder: Path) -> None:
    with suppress(PermissionError):  # a folder that may be written to need not be readable
        _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    except OSError as error:
        if error.errno not in NO_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(handle)


def flush(handle: int) -> None:
    """Write what the system keeps of an open file to the disk itself, so that it survives a loss of power."""
    os.fsync(handle)
    if hasattr(fcntl, "F_FULLFSYNC"):  # on macOS, fsync leaves it in the disk's own cache
        with suppress(OSError):  # volumes that cannot do it have done what they can
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
