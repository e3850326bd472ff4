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

# Settings of docutils: what it cannot read, such as directives of Sphinx, is left as it is, without a word.
_DOCUTILS = {
    "report_level": 5,
    "halt_level": 5,
    "warning_stream": False,
    "file_insertion_enabled": False,
    "raw_enabled": False,
    "syntax_highlight": "none",
}
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
    """Yield the headings of reStructuredText, as docutils finds them. No directive reads a file, a URL or an image."""
    from docutils import nodes
    from docutils.frontend import get_default_settings
    from docutils.parsers.rst import Parser
    from docutils.utils import new_document

    settings = get_default_settings(Parser)
    for name, value in _DOCUTILS.items():
        setattr(settings, name, value)
    document = new_document("", settings)
    Parser().parse("\n".join(lines), document)
    end = 0
    for title in document.findall(nodes.title):
        if not isinstance(title.parent, nodes.section) or title.line is None:  # a table's, or an admonition's
            continue
        under, level, section = title.line - 1, 0, title.parent  # the row below the title
        over = under - 2 >= end and lines[under - 2].rstrip() == lines[under].rstrip()
        while isinstance(section, nodes.section):
            level, section = level + 1, section.parent
        yield Heading(under - 1 - over, under + 1, level, one_line(title.astext()))
        end = under + 1
