"""Print tables and lines to the terminal."""

import functools
import sys
from collections.abc import Sequence
from textwrap import wrap

from rich.cells import cell_len
from rich.console import Console

Lines = list[tuple[str, str]]  # (name, text) pairs about a run or a result, as `print_lines` takes them
WARNING = "warning"  # the name of a pair of `print_lines`, as `Reporter.warn` begins
MARGIN = 15  # columns that `print_lines` takes before the values, for names of up to 12 characters
JOINERS = "\u200c\u200d"  # invisible, and needed to write Persian, Hindi or a family's emoji
NARROWEST = 12  # characters, of a table's first column
FRAME = 3  # columns of the terminal that padding and frame take, for each of a table's


@functools.cache
def console() -> Console:
    """Return the process's one console, on stdout, without markup, emoji or wrapping.

    training/distributed.py sets `quiet` on it, on all ranks but the first.
    """
    # Unless told, rich lets FORCE_COLOR write control codes into log files.
    terminal = None if sys.stdout.isatty() else False
    plain = {"soft_wrap": True, "highlight": False, "markup": False, "emoji": False}
    return Console(force_terminal=terminal, **plain)


def print_lines(pairs: Lines) -> None:
    """Print names and values in two aligned columns, one pair a line; a warning is a line of its own."""
    width = max((len(name) for name, _ in pairs if name != WARNING), default=0)
    for name, value in pairs:
        console().print(f"{WARNING}: {value}" if name == WARNING else f"{name:<{width}}   {value}")


def wrapped(pairs: Lines) -> Lines:
    """Return pairs of `print_lines` whose texts fit the terminal; further lines of a text have no name."""
    width = max(console().width - 3 - max((len(name) for name, _ in pairs), default=0), NARROWEST)
    parts = [(name, wrap(text, width, break_long_words=False, break_on_hyphens=False)) for name, text in pairs]
    return [(name if i == 0 else "", line) for name, lines in parts for i, line in enumerate(lines)]


def visible(text: str) -> str:
    """Return a text on one line in which what does not print, such as a line break, is spelt as in Python: `\\n`."""
    return "".join(c if c.isprintable() or c in JOINERS else ascii(c)[1:-1] for c in text)


def shortened(text: str, width: int) -> str:
    """Return a text as `visible` spells it, in `width` columns at most; of a longer one, "…" stands for the middle."""
    if len(text) > 8 * width:  # enough of both ends, and not megabytes; letters with many accents take no column
        text = text[: 4 * width] + text[-4 * width :]
        is_long = True
    else:
        is_long = False
    text = visible(text)
    if not is_long and cell_len(text) <= width:
        return text
    tail = (width - 1) // 3
    return f"{_beginning(text, width - 1 - tail).rstrip()}…{_beginning(text[::-1], tail)[::-1].lstrip()}"


def _beginning(text: str, width: int) -> str:
    """Return as much of a text as `width` columns hold."""
    columns = 0
    for i, character in enumerate(text):
        columns += cell_len(character)
        if columns > width:
            return text[:i]
    return text


def fits(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Return whether the terminal is wide enough for a table of `print_rows` whose texts do not wrap."""
    return sum(_widths(columns, rows)) + FRAME * len(columns) - 1 <= console().width


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column is text and may wrap, the others are figures, which are never cut.

    In a terminal that is too narrow for it, a row's figures are below its text, each with the name of its column.
    """
    from rich import box
    from rich.table import Table

    widths = _widths(columns, rows)
    if sum(widths[1:]) + min(widths[0], NARROWEST) + FRAME * len(columns) - 1 > console().width:
        _print_stacked(title, columns, rows)
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(columns[0], overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console().print(table, soft_wrap=False)


def _print_stacked(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print each row as a line of text, and below it `name figure` pairs, as many a line as fit."""
    console().print(f"{title}\n", style="bold")
    for text, *figures in rows:
        console().print(f"{columns[0]} {text}")
        line = ""
        for pair in (f"{name} {figure}" for name, figure in zip(columns[1:], figures, strict=True)):
            if line and len(line) + 3 + len(pair) > console().width:
                console().print(line)
                line = ""
            line = f"{line}   {pair}" if line else f"  {pair}"
        if line:
            console().print(line)
    console().print()
