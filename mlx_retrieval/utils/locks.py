"""Let one process at a time work in a folder. The system releases the lock however the process ends.

with only_one(folder / ".lock", f"--output {folder}: another process is training there"):
    ...
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mlx_retrieval.utils.errors import UserError

NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}  # some network and external volumes


@contextmanager
def only_one(path: Path, refusal: str | UserError) -> Iterator[None]:
    """Hold the lock file `path`; it and its folder are created if they are missing.

    Raises UserError: with `refusal` if another process holds it; if it cannot be created or the disk has no locks.
    """
    try:
        lock = _acquired(path, 0)
    except Timeout as error:
        raise (refusal if isinstance(refusal, UserError) else UserError(refusal)) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Hold the lock file `path` as `only_one` does, after the process that holds it now has ended or released it."""
    lock = _acquired(path, -1)
    try:
        yield
    finally:
        lock.release()


def _acquired(path: Path, timeout: float) -> FileLock:
    """Return the lock, which this process now holds.

    Args:
        timeout: seconds to wait for it; -1 = for ever.

    Raises Timeout, or UserError if it cannot be created or the disk has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lock that is a mere file would outlive a process that is killed.
        lock = FileLock(path, timeout=timeout, fallback_to_soft=False)
        lock.acquire()
        return lock
    except Timeout:  # an OSError, too
        raise
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise UserError(
                f"{path}: this volume has no file locks ({error.strerror}), without which two processes could write "
                "there at once; choose a folder on another volume"
            ) from error
        raise UserError(f"{path}: {error.strerror}") from error
