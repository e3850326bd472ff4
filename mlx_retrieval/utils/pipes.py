"""Read pipes more than once: `<(zcat rows.gz)`, `/dev/stdin` and named pipes are copied to a temporary file.

open(spooled(Path("/dev/stdin")), "rb")
"""

import atexit
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path


def is_pipe(path: Path) -> bool:
    """Return whether a path is there and can be read only once: a pipe, a socket or a terminal."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def spooled(path: Path) -> Path:
    """Return the path of a file; for a pipe, that of a copy which lasts until the process ends.

    OSError if the pipe cannot be read or its contents not be written.
    """
    return _copy_of(path) if is_pipe(path) else path


@functools.cache
def _copy_of(path: Path) -> Path:
    with tempfile.NamedTemporaryFile(delete=False) as copy:
        atexit.register(Path(copy.name).unlink, missing_ok=True)
        with open(path, "rb") as pipe:
            shutil.copyfileobj(pipe, copy, 1 << 20)
    return Path(copy.name)
