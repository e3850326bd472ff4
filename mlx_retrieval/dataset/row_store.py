"""Read rows again by their places, whatever the number of files: few of them are open at once.

store = RowStore()
start = store.write(data)                       # rows that are not as they lie in their file, one after the other
store.read(None, start, len(data))
number = store.keep(handle, path)               # a file whose rows are read where they lie
store.read(number, start, size)
"""

import os
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

from mlx_retrieval.utils.errors import UserError

MOST_OPEN = 64  # files; macOS allows a process 256


class RowStore:
    """One temporary file for all rows that are written, and the files whose rows are read where they lie.

    Of those, the ones that were read last are open. It may be read by several threads.
    """

    def __init__(self):
        self._written: BinaryIO | None = None
        self._size = 0
        self._kept: list[tuple[Path, tuple[int, int]]] = []  # files, and the inodes that they had
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self._lock = threading.Lock()

    def write(self, data: bytes) -> int:
        """Write a row; return its place. `flush` has to be called before it is read."""
        if self._written is None:
            self._written = tempfile.TemporaryFile()
        start = self._size
        self._written.write(data)
        self._size += len(data)
        return start

    def flush(self) -> None:
        """Make all written rows readable."""
        if self._written is not None:
            self._written.flush()

    def keep(self, handle: BinaryIO, path: Path) -> int:
        """Take over an open file; return the number by which it is read."""
        with self._lock:
            self._kept.append((path, _inode(handle)))
            self._add(len(self._kept) - 1, handle)
            return len(self._kept) - 1

    def read(self, number: int | None, start: int, size: int) -> bytes:
        """Return the bytes at a place of a file that was kept; without a number, of the rows that were written.

        Raises UserError if the file can no longer be read, or is another one by now.
        """
        if number is None:
            return os.pread(self._written.fileno(), size, start)
        with self._lock:  # so that no other thread closes it
            if number in self._open:
                self._open.move_to_end(number)
            else:
                self._add(number, self._opened(number))
            return os.pread(self._open[number].fileno(), size, start)

    def close(self) -> None:
        """Close all files; nothing can be read any more."""
        for handle in (self._written, *self._open.values()):
            if handle is not None:
                handle.close()

    def _add(self, number: int, handle: BinaryIO) -> None:
        self._open[number] = handle
        if len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)[1].close()

    def _opened(self, number: int) -> BinaryIO:
        path, inode = self._kept[number]
        try:
            handle = open(path, "rb")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; its rows are read during the whole run") from error
        if _inode(handle) != inode:
            handle.close()
            raise UserError(f"{path}: the file was replaced during the run")
        return handle


def _inode(handle: BinaryIO) -> tuple[int, int]:
    found = os.fstat(handle.fileno())
    return found.st_dev, found.st_ino
