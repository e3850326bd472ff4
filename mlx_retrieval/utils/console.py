"""Print tables and lines to the terminal."""

import functools
import sys
from collections.abc import Sequence

from rich.console import Console


@functools.cache
def console() -> Console:
    """Return the process's one console, on stdout, without markup, emoji or wrapping.

    training/distributed.py sets `quiet` on it, on all ranks but the first.
    """
    # Unless told, rich lets FORCE_COLOR write control codes into log files.
    terminal = None if sys.stdout.isatty() else False
    plain = {"soft_wrap": True, "highlight": False, "markup": False, "emoji": False}
    return Console(force_terminal=terminal, **plain)


def print_lines(pairs: list[tuple[str, str]]) -> None:
    """Print names and values in two aligned columns, one pair a line."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        console().print(f"{name:<{width}}   {value}")


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column is text and may wrap, the others are figures."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(columns[0], overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console().print(table, soft_wrap=False)
