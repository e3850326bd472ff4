"""Read text, markdown, reStructuredText and source code as documents: what is not a heading stays as it is written."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_retrieval.dataset.chunks import Heading, front_matter, markdown_headings
from mlx_retrieval.dataset.documents.decoding import read_text
from mlx_retrieval.dataset.documents.document import (
    GENERATED,
    Document,
    Note,
    Section,
    SectionBuilder,
    UnreadableError,
    is_title,
    one_line,
    title_of,
)
from mlx_retrieval.dataset.source_code.generated import is_generated

TEXT, MARKDOWN, RST, CODE = "text", "markdown", "reStructuredText", "source code"
LONGEST_TITLE = 120  # characters of a text's first line, if that is to be its title

_ADORNMENT = re.compile(r"([!-/:-@\[-`{-~])\1+\s*")
_TITLE_KEY = re.compile(r"title *: *(.+)", re.IGNORECASE)


def read_plain(path: Path, name: str, note: Note) -> Iterator[Document]:
    """Read a text without headings. A short first line above a blank one is its title.

    Args:
        path: the file.
        name: its path in the document.
        note: see document.Note; all readers have these arguments, and raise UnreadableError.
    """
    lines = read_text(path).split("\n")
    first = next(row for row, line in enumerate(lines) if line.strip())
    title, below = one_line(lines[first]), lines[first + 1 :]
    if len(title) <= LONGEST_TITLE and is_title(title) and any(map(str.strip, below)) and not below[0].strip():
        yield _document(name, TEXT, lines, [], title, first + 1)
    else:
        yield _document(name, TEXT, lines, [])


def read_markdown(path: Path, name: str, note: Note) -> Iterator[Document]:
    """Read markdown. The title of its front matter counts; the rest of the front matter is left out."""
    lines = read_text(path).split("\n")
    rows = front_matter(lines)
    titles = (match[1].strip().strip("\"'") for line in lines[:rows] if (match := _TITLE_KEY.fullmatch(line.strip())))
    yield _document(name, MARKDOWN, lines, markdown_headings(lines), next(titles, ""), rows)


def read_rst(path: Path, name: str, note: Note) -> Iterator[Document]:
    """Read reStructuredText; its directives stay."""
    lines = read_text(path).split("\n")
    yield _document(name, RST, lines, rst_headings(lines))


def read_code(path: Path, name: str, note: Note) -> Iterator[Document]:
    """Read source code as one section without a heading: chunks name its functions and classes."""
    text = read_text(path)
    if is_generated(text):
        raise UnreadableError(GENERATED)
    sections = (Section((), 1, text),)
    yield Document(name, CODE, title_of(name, sections), sections)


def _document(
    name: str, form: str, lines: Sequence[str], headings: Iterator[Heading] | list, title: str = "", first: int = 0
) -> Document:
    """Return the document of some lines, without the first ones (`first`: how many)."""
    builder, row = SectionBuilder(), first
    if first:
        builder.skip(first)
    for heading in headings:
        builder.add_lines(lines[row : heading.row])
        builder.heading(heading.level, heading.title, heading.end - heading.row)
        row = heading.end
    builder.add_lines(lines[row:])
    sections = builder.sections()
    return Document(name, form, title_of(name, sections, title), sections)


def rst_headings(lines: Sequence[str]) -> Iterator[Heading]:
    """Yield the headings of reStructuredText: one line underlined, and perhaps overlined, by a row of one sign.

    The row is at least as long as the title. The level is that of the first heading with the same signs.
    """
    levels: dict[tuple[str, bool], int] = {}
    row = end = 0
    while row + 1 < len(lines):
        above = lines[row - 1].rstrip() if row > end else ""
        title, under = lines[row], lines[row + 1].rstrip()
        over = _is_adornment(above) and above == under
        is_title_line = title.strip() and not _is_adornment(title) and (over or not title[0].isspace())
        if not (is_title_line and _is_adornment(under) and len(under) >= len(title.strip())) or (above and not over):
            row += 1
            continue
        level = levels.setdefault((under[0], over), len(levels) + 1)
        yield Heading(row - over, row + 2, level, title.strip())
        row = end = row + 2


def _is_adornment(line: str) -> bool:
    return bool(_ADORNMENT.fullmatch(line))
