"""Progress bars."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]  # done, of how many


@contextmanager
def progress_bar(
    doing: str = "mining", unit: str = "files", show: bool | None = None, transient: bool = True
) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on standard error; yield a function of (done, total) that moves it, or None if there is no bar.

    Args:
        show: whether to show it; None = if standard error is a terminal.
        transient: remove the bar at the end.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (doing, BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=transient) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)
