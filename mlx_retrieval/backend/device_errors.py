"""The errors with which Metal and CUDA end a computation, by their texts, and how to go on after them.

    for vectors in halved(lambda first, last: np.array(model(rows[first:last])), 0, len(rows)):

mlx raises RuntimeError for all of them. Less work at once helps against an overload: memory or resources that ran out,
and macOS ending work that keeps the GPU from drawing the screen. CPUs report none: mlx crashes there, or the process
is killed.
"""

import logging
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from mlx_retrieval.backend import mx

from mlx_retrieval.utils.errors import UserError

Result = TypeVar("Result")

SHORTAGE = ("out of memory", "outofmemory", "insufficient memory", "unable to allocate", "attempting to allocate")
SHORTAGE += ("resource limit",)  # Metal's number of buffers
# macOS's watchdog: one command took too long, or kept the screen from being drawn.
WATCHDOG = ("impacting interactivity", "gpu timeout", "gpu hang")
# Work that was queued behind a command that failed.
AFTERWARDS = ("discarded (victim", "ignored (for causing")
# Every text of an error that is the device's: Metal's with mlx's tag, CUDA's with the call that failed.
DEVICE = re.compile(r"^\[((?i:metal)\W|malloc\])|\b(cu[A-Z]|cuda|cublas|cudnn|nvrtc)\w*\b.* failed\b")
DRAINS = 8  # attempts to bring the device to rest


class DeviceError(UserError):
    """The GPU did not compute what it was asked to; the inputs are not at fault."""


def is_overload(error: Exception) -> bool:
    """Return whether Metal or CUDA may succeed with less work at once, by their error or a DeviceError about it."""
    text = str(error).lower()
    return any(words in text for words in SHORTAGE + WATCHDOG + AFTERWARDS)


def is_device_error(error: BaseException) -> bool:
    """Return whether Metal or CUDA report an error, be it an overload or of another kind."""
    return isinstance(error, RuntimeError) and (is_overload(error) or DEVICE.search(str(error)) is not None)


def what_happened(error: RuntimeError) -> str:
    """Return the cause in a few words, and the error's first line: `memory ran out ([malloc] Unable to ...)`."""
    text = str(error).strip()
    lower = text.lower()
    cause = "the GPU failed"
    if any(words in lower for words in SHORTAGE):
        cause = "memory ran out"
    elif any(words in lower for words in WATCHDOG):
        cause = "the system ended the GPU's work, which took too long at once"
    elif any(words in lower for words in AFTERWARDS):
        cause = "the GPU dropped its work after an error"
    return f"{cause} ({text.splitlines()[0].rstrip('.') if text else 'no reason given'})"


def advice(error: RuntimeError) -> str:
    """Return a sentence, without its end, about what may help beside less work at once."""
    text = str(error).lower()
    if any(words in text for words in SHORTAGE):
        return "Other programs that use much memory leave less of it"
    if any(words in text for words in WATCHDOG + AFTERWARDS):
        return "macOS lets the GPU work for longer while the display is off"
    return "If it happens again, the versions of mlx and of the system's driver may be the cause"


def explain(error: BaseException) -> str | None:
    """Return a message about an error of the device, with the way on; None for any other error."""
    if not is_device_error(error):
        return None
    way = "A lower --max-length or a smaller model needs less at once" if is_overload(error) else "Try again"
    return f"{what_happened(error)}. {way}. {advice(error)}"


def drain() -> None:
    """Bring the device to rest after an error, and free what is cached.

    Work that was queued behind the failed command fails later, one error at each synchronisation. Raises the last
    RuntimeError if they do not end: then the process can no longer use the device.
    """
    for attempt in range(DRAINS):
        try:
            mx.synchronize()
            mx.clear_cache()
            return
        except RuntimeError:
            if attempt == DRAINS - 1:
                raise


def halved(
    compute: Callable[[int, int], Result],
    first: int,
    last: int,
    most: int | None = None,
    overloaded: Callable[[int], None] = lambda most: None,
) -> Iterator[Result]:
    """Yield `compute(first, last)`, evaluated, or the results of parts of that range where it is an overload.

    Args:
        most: longest range to try; None = all of it.
        overloaded: called after each overload, with the length of the longest part that is tried next.

    Raises DeviceError where a range of one, or the device itself, fails.
    """
    length = last - first
    if most is None or length <= most:
        try:
            result = compute(first, last)
        except RuntimeError as error:
            if not is_device_error(error):
                raise
            if length <= 1 or not is_overload(error):
                raise DeviceError(explain(error)) from error
            happened = what_happened(error)
        else:
            yield result
            return
        # Outside the handler: the error holds on to everything that was computed before it.
        try:
            drain()
        except RuntimeError as error:
            raise DeviceError(f"{happened}, and this process can no longer use the device ({error})") from error
        logging.getLogger(__name__).warning("%s: repeated with half as much at once", happened)
        overloaded(-(-length // 2))
    middle = first + -(-length // 2)
    yield from halved(compute, first, middle, most, overloaded)
    yield from halved(compute, middle, last, most, overloaded)
