"""Read PDF as documents, by pypdf: the text of its pages, with its bookmarks as headings."""

import io
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mlx_retrieval.dataset.documents.decoding import read_bytes
from mlx_retrieval.dataset.documents.document import (
    DAMAGED,
    ENCRYPTED,
    SCANNED,
    Document,
    Note,
    SectionBuilder,
    UnreadableError,
    clean,
    one_line,
    title_of,
)

if TYPE_CHECKING:
    from pypdf import PdfReader

PDF = "PDF"
HEAD = 1024  # bytes in which a PDF's mark must be
EDGE = 2  # lines at the top and at the foot of a page that may be running heads
FEWEST_PAGES = 3  # on which a running head stands

_HYPHENATED = re.compile(r"(?<=[^\W\d_])[-\u2010]\n([^\W\d_])")
_LIGATURE = re.compile("[\ufb00-\ufb06]")
_DIGITS = re.compile(r"\d+")


class Bookmark(NamedTuple):
    """A heading, and the page that it is on, counted from 0."""

    page: int
    level: int  # 1 is the highest
    title: str


def read_pdf(path: Path, name: str, note: Note) -> Iterator[Document]:
    """Read a PDF: see plain_text.read_plain for the arguments.

    A word that a line end divides is joined. Lines that recur at the top or foot of most pages are left out. A bookmark
    is a heading where its text stands on its page, else at the top of it. A PDF that opens without a password is read.
    """
    data = read_bytes(path)
    if b"%PDF-" not in data[:HEAD]:
        raise UnreadableError(DAMAGED, "it does not begin as a PDF does")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # each damaged object would be a line on the screen
    reader = _open(data)
    pages = _texts(reader, note)
    if not pages:
        raise UnreadableError(DAMAGED, "it has no pages")
    if not any(text.strip() for text in pages):
        raise UnreadableError(SCANNED)
    lines = [text.split("\n") for text in pages]
    left_out = leave_out_running_heads(lines)
    sections = _sections(lines, _bookmarks(reader, len(pages), note))
    title = title_of(name, sections, _title(reader, note))
    yield Document(name, PDF, title, sections, left_out=left_out)


def _open(data: bytes) -> "PdfReader":
    """Return the reader of a PDF. Raises UnreadableError."""
    import pypdf

    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableError(ENCRYPTED, "it needs a password")
        len(reader.pages)  # reads the tree of pages
    except UnreadableError:
        raise
    except Exception as error:  # of any kind: pypdf meets what it does not expect in damaged files
        raise _unreadable(error) from error
    return reader


def _unreadable(error: Exception, place: str = "") -> UnreadableError:
    """Return the reason that an error of pypdf stands for."""
    from pypdf.errors import DependencyError

    if isinstance(error, DependencyError):
        return UnreadableError(ENCRYPTED, "by AES: pip install cryptography, which opens it if it needs no password")
    return UnreadableError(DAMAGED, place + _reason(error))


def _texts(reader: "PdfReader", note: Note) -> list[str]:
    """Return the texts of the pages; one that cannot be read is noted, and "". Raises UnreadableError if none can."""
    texts: list[str] = []
    errors: list[UnreadableError] = []
    for number in range(len(reader.pages)):
        try:
            text = reader.pages[number].extract_text()
        except Exception as error:  # see _open
            errors.append(_unreadable(error, f"page {number + 1}: "))
            text = ""
        text = _LIGATURE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), clean(text))
        texts.append(_HYPHENATED.sub(lambda match: match[1] if match[1].islower() else match[0], text))
    if errors and not any(map(str.strip, texts)):
        raise errors[0]
    for error in errors:
        note(error.reason, "page", error.detail)
    return texts


def _title(reader: "PdfReader", note: Note) -> str:
    """Return the title that a PDF declares; "" if there is none, or a damaged one, which is noted."""
    try:
        title = reader.metadata.title if reader.metadata is not None else None
    except Exception as error:  # see _open; without it, the document's title is its first heading or its name
        note(DAMAGED, "declared title", _reason(error))
        return ""
    return title if isinstance(title, str) else ""


def _bookmarks(reader: "PdfReader", count: int, note: Note) -> list[Bookmark]:
    """Return the bookmarks of a PDF of `count` pages, by page; damaged ones are noted, and none."""
    bookmarks = []
    try:
        pending = [(1, item) for item in reversed(reader.outline)]
        while pending:
            level, item = pending.pop()
            if isinstance(item, list):
                pending += [(level + 1, inner) for inner in reversed(item)]
                continue
            page = reader.get_destination_page_number(item)
            if page is not None and 0 <= page < count and (title := one_line(str(item.title or ""))):
                bookmarks.append(Bookmark(page, level, title))
    except Exception as error:  # see _open
        note(DAMAGED, "table of bookmarks", _reason(error))
        return []
    return sorted(bookmarks, key=lambda bookmark: bookmark.page)


def _sections(pages: Sequence[list[str]], bookmarks: Sequence[Bookmark]) -> tuple:
    """Return the sections of pages of lines, below their bookmarks."""
    builder = SectionBuilder()
    for number, lines in enumerate(pages):
        begin = 0
        for bookmark in (bookmark for bookmark in bookmarks if bookmark.page == number):
            row = _row_of(bookmark.title, lines, begin)
            builder.add_lines(lines[begin : begin if row is None else row])
            builder.heading(bookmark.level, bookmark.title, rows=0 if row is None else 1)
            begin = begin if row is None else row + 1
        builder.add_lines(lines[begin:])
    return builder.sections()


def _row_of(title: str, lines: Sequence[str], begin: int) -> int | None:
    """Return the row from `begin` on that is a heading with this title, perhaps with a number before it; None."""
    wanted = _letters(title)
    for row in range(begin, len(lines)):
        if len(lines[row]) <= 2 * len(title) + 10 and (letters := _letters(lines[row])) and letters == wanted:
            return row
    return None


def _letters(text: str) -> str:
    """Return the letters of a text in one case; numbers, signs and spaces differ between bookmarks and pages."""
    return "".join(filter(str.isalpha, text.casefold()))


def leave_out_running_heads(pages: Sequence[list[str]]) -> int:
    """Leave out the running heads and feet of pages, lists of lines, in place; return how many lines.

    They are among the first or last EDGE lines with a text, on more than half of at least FEWEST_PAGES pages. All
    numbers are alike, so that page numbers count as well.
    """
    edges = [_edge_rows(lines) for lines in pages]
    counts = Counter(key for lines, rows in zip(pages, edges, strict=True) for key in {_key(lines[r]) for r in rows})
    if len(pages) < FEWEST_PAGES:
        return 0
    count = 0
    for lines, rows in zip(pages, edges, strict=True):
        heads = [row for row in rows if 2 * counts[_key(lines[row])] > len(pages)]
        for row in reversed(heads):
            del lines[row]
        count += len(heads)
    return count


def _edge_rows(lines: Sequence[str]) -> list[int]:
    rows = [row for row, line in enumerate(lines) if line.strip()]
    return sorted({*rows[:EDGE], *rows[-EDGE:]})


def _key(line: str) -> str:
    return _DIGITS.sub("0", " ".join(line.split()).casefold())


def _reason(error: Exception) -> str:
    return one_line(str(error)) or type(error).__name__
