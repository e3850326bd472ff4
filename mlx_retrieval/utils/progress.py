"""Show progress on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """A function that shows how much is done."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None: ...


@contextmanager
def progress_bar(description: str, unit: str, total: int | None = None, show: bool | None = None) -> Iterator[Progress]:
    """Yield a function that moves a bar such as `embedding ━━━━━━ 120/5000 texts 0:00:12`.

    Args:
        total: how many of `unit` there are; None = `Progress` says it. 0 = nothing to do, so no bar.
        show: None = if standard error is a terminal.
    """
    show = sys.stderr.isatty() if show is None else show
    if not show or total == 0:
        yield lambda done, total=None, note="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), unit, TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Bar(description, *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, note="")
        yield lambda done, total=total, note="": bar.update(task, completed=done, total=total, note=note)
