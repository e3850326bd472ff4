"""One process at a time in a folder: the system lets go of the lock whatever ends the process, so none is ever stale.

with only_one(folder / ".lock", f"--output {folder}: another process is training there"):
    ...
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_retrieval.utils.errors import UserError


@contextmanager
def only_one(path: Path, refusal: str | UserError) -> Iterator[None]:
    """Hold the lock file `path`, which is made where it is missing, and so is its folder.

    Raises UserError with `refusal` where another process holds it, and where it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise (refusal if isinstance(refusal, UserError) else UserError(refusal)) from error
        yield
