"""Turn LanceDB's errors, which quote its sources, into one line."""

import errno
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_retrieval.utils.files import SaveError

REBUILD = "search.py index --rebuild replaces it"
DAMAGED = f"if the index is damaged, {REBUILD}"
# A write reads as well: rows that it replaces, and the vectors that it merges.
UNFINISHED = f"what is indexed stays; {DAMAGED}, otherwise the same command continues"
SOURCE = re.compile(r",? ?/[^ ,]+\.rs:\d+:\d+")
SYSTEM_ERROR = re.compile(r"([A-Z][\w ]+) \(os error (\d+)\)")  # such as `No space left on device (os error 28)`
# Errors of the system if a file is damaged or lost.
DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EIO}


@contextmanager
def plain_errors(folder: Path, advice: str) -> Iterator[None]:
    """Raise a SaveError of one line, with the reason and `advice`, for an error of LanceDB in the block."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise SaveError(f"--index {folder}: {reason_of(error)}; {advice}") from error


def reason_of(error: Exception) -> str:
    """Return the reason of an error of LanceDB in one line, without the places in its sources."""
    if reason := SYSTEM_ERROR.search(str(error)):
        return reason[1]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return SOURCE.sub("", str(error).partition("\n")[0])[:200]


def is_of_system(error: BaseException | None) -> bool:
    """Return whether something could not be read for another reason than damage: no permission, too many open files."""
    reason = SYSTEM_ERROR.search(str(error))
    number = int(reason[2]) if reason else getattr(error, "errno", None)
    return number is not None and number not in DAMAGE


def unreadable(error: Exception) -> str:
    """Return in one line why an index cannot be read, and what helps if it is damaged."""
    reason = reason_of(error)
    return f"not readable ({reason})" if is_of_system(error) else f"damaged ({reason}); {REBUILD}"


def writing(method: Callable) -> Callable:
    """Decorate a method of an index that writes."""
    return _with_advice(method, UNFINISHED)


def reading(method: Callable) -> Callable:
    """Decorate a method of an index that only reads: trying again does not help."""
    return _with_advice(method, DAMAGED)


def _with_advice(method: Callable, advice: str) -> Callable:
    @functools.wraps(method)
    def run(self, *args: Any, **options: Any) -> Any:
        with plain_errors(self.folder, advice):
            return method(self, *args, **options)

    return run
