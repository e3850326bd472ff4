"""Standard streams that work however a command was started, and whoever reads them.

`prepare` opens the null device on descriptors 0, 1 and 2 where they are closed: the next file that is opened would take
their place, and mlx takes descriptor 0 for a failure. It also makes standard output and error last: text for a reader
that has gone away, such as `head` or a closed terminal, is dropped, and half a surrogate pair is written as U+FFFD.
"""

import codecs
import errno
import io
import os
import sys
from contextlib import suppress

from mlx_retrieval.utils.text import REPLACEMENT

GONE = (errno.EPIPE, errno.EIO)  # the other end of a pipe, a terminal
ERRORS = "mlx_retrieval.replacement"  # the name of the codec error handler below


class LastingStream(io.FileIO):
    """A standard stream that outlives its reader.

    Args:
        descriptor: 1 or 2.
        program: if it is given, text that cannot be written for any reason, such as a full disk, is dropped too, and
            one line on standard error says so, unless it is "": no command ends for want of a standard error.
    """

    def __init__(self, descriptor: int, program: str | None = None):
        super().__init__(descriptor, "wb", closefd=False)
        self.program = program

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in GONE:
                discard(self.fileno())
            elif self.program is None:
                raise
            self._notify(error)
        return memoryview(data).nbytes

    def _notify(self, error: OSError) -> None:
        program, self.program = self.program, self.program and ""
        if program:
            reason = "has no reader any more" if error.errno in GONE else f"cannot be written ({error.strerror})"
            with suppress(OSError):
                print(f"{program}: standard output {reason}; the run goes on", file=sys.stderr)


def prepare(program: str | None = None) -> None:
    """Make this process's standard streams work. Streams that a notebook or a test has replaced stay.

    Args:
        program: the name of a command that goes on even if nothing can be printed; see `LastingStream`.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            discard(descriptor)
    if sys.stdin is None:
        sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or (stream is getattr(sys, f"__{name}__") and _is_own(stream, descriptor)):
            lasting = _lasting(stream, descriptor, program if descriptor == 1 else "")
            setattr(sys, name, lasting)
            setattr(sys, f"__{name}__", lasting)


def discard(descriptor: int) -> None:
    """Lead a descriptor to the null device."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)


def flush() -> str:
    """Write what is left for standard output; return the reason if that fails, else "". The rest is then dropped."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError, ValueError):  # a stream without a descriptor
            discard(sys.stdout.fileno())
        return error.strerror or str(error)
    return ""


def _is_own(stream, descriptor: int) -> bool:
    """Return whether a stream is Python's own on this descriptor, and not yet a lasting one."""
    try:
        own = isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor
        return own and not isinstance(getattr(stream.buffer, "raw", None), LastingStream)
    except (OSError, ValueError):
        return False


def _lasting(stream: io.TextIOWrapper | None, descriptor: int, program: str | None) -> io.TextIOWrapper:
    """Return a stream in place of Python's own; None = it was closed."""
    codecs.register_error(ERRORS, _replacement)
    buffer = io.BufferedWriter(LastingStream(descriptor, program))
    if stream is None:
        return io.TextIOWrapper(buffer, "utf-8", ERRORS, line_buffering=descriptor == 2)
    with suppress(OSError):
        stream.flush()
    buffering = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(buffer, stream.encoding, ERRORS, **buffering)


def _replacement(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace characters that an encoding lacks by U+FFFD, or by ? where it lacks that as well."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = REPLACEMENT * (error.end - error.start)
    return text.encode(error.encoding, "replace"), error.end
