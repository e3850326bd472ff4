"""A document as all formats give it: a title, and sections of text below their headings.

builder = SectionBuilder()
builder.heading(1, "Install")
builder.add("pip install it")
Document("guide.txt", "text", "A guide", builder.sections())
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import NamedTuple

from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.utils.text import excerpt, writable

TITLE = 200  # characters of a title or heading that are kept

# Why a file is not read. The first four are those of search.py.
EMPTY, BINARY, NOT_UTF8, UNREADABLE = file_tree.EMPTY, file_tree.BINARY, file_tree.NOT_UTF8, file_tree.UNREADABLE
TOO_LARGE = "too large"
FORBIDDEN = "no permission to read it"
OTHER_FORMAT = "a format that is not read"
ENCRYPTED = "encrypted"
SCANNED = "pages without text, such as scans"
DAMAGED = "damaged"
GENERATED = "generated or minified code"
COPY = "the text of another file"
REASONS = (
    *(EMPTY, BINARY, NOT_UTF8, UNREADABLE, TOO_LARGE, FORBIDDEN, OTHER_FORMAT),
    *(ENCRYPTED, SCANNED, DAMAGED, GENERATED, COPY),
)

_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\xad\ufeff]")  # soft hyphens and byte order marks, too
_BREAKS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_FILE_NAME = re.compile(r"\S+\.\w{1,5}|.*\.(?:docx?|pdf|indd|pptx?|xlsx?|tex|dvi|html?|rtf|odt|pages)", re.IGNORECASE)
_PROGRAM = re.compile(r"microsoft \w+ - .*|untitled.*|word document|document ?\d*|slide \d+", re.IGNORECASE)


class UnreadableError(Exception):
    """A file, or what is left of it, cannot be read."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason  # one of REASONS
        self.detail = detail  # which row, or what a library says; "" = nothing more is known


# What a reader calls for a part of a file that it leaves out, with a reason, a noun such as "row", and a detail.
Note = Callable[[str, str, str], None]


class Section(NamedTuple):
    """The text below a heading, up to the next one."""

    headings: tuple[str, ...]  # from the outermost in; () = before the first heading
    line: int  # of the file where the text begins, counted from 1; of HTML, PDF and Word files of what was read
    text: str


@dataclass(frozen=True)
class Document:
    """A file, or a row of a table or of JSON lines."""

    path: str  # relative to the folder, with slashes
    format: str  # a value of formats.FORMATS
    title: str  # "" = a row without one; a file has one always
    sections: tuple[Section, ...]
    line: int = 0  # of a row, counted from 1; 0 = the whole file
    row_id: str = ""  # the row's `_id` or `id`
    left_out: int = 0  # navigation, running heads and the like that reading it left out: blocks or lines

    @property
    def name(self) -> str:
        """The path, and of a row its line: no other document of the folder has this name."""
        return f"{self.path}:{self.line}" if self.line else self.path

    @cached_property
    def text(self) -> str:
        """All sections, each below its innermost heading, with blank lines between."""
        parts = ("\n".join([*section.headings[-1:], section.text.strip("\n")]) for section in self.sections)
        return "\n\n".join(parts)


class SectionBuilder:
    """Takes the headings and lines of a document in their order; `sections` returns those that have a text."""

    def __init__(self):
        self._sections: list[Section] = []
        self._trail: list[tuple[int, str]] = []  # level and text of the headings above
        self._lines: list[str] = []
        self._line = 1  # where the section's text begins
        self._next = 1  # where the next line is

    def heading(self, level: int, text: str, rows: int = 1) -> None:
        """Begin a section. `level`: 1 is the highest; `rows`: lines that the heading takes."""
        self._end()
        while self._trail and self._trail[-1][0] >= level:
            self._trail.pop()
        if text := one_line(text):
            self._trail.append((level, text))
        self._next += rows
        self._line = self._next

    def add(self, text: str) -> None:
        """Add a line, or several."""
        lines = clean(text).split("\n")
        self._lines += lines
        self._next += len(lines)

    def add_lines(self, lines: Sequence[str]) -> None:
        """Add lines of a file, in which nothing else ends a line."""
        if lines:
            self.add("\n".join(lines))

    def skip(self, rows: int) -> None:
        """Pass over lines at the beginning of a file, so that the lines below them keep their numbers."""
        self._next += rows
        self._line = self._next

    def paragraph(self) -> None:
        """End a paragraph with a blank line, unless there is one."""
        if self._lines and self._lines[-1].strip():
            self.add("")

    def sections(self) -> tuple[Section, ...]:
        """Return the sections that have a text."""
        self._end()
        return tuple(self._sections)

    def _end(self) -> None:
        if any(map(str.strip, self._lines)):
            self._sections.append(Section(tuple(text for _, text in self._trail), self._line, "\n".join(self._lines)))
        self._lines, self._line = [], self._next


def clean(text: str) -> str:
    """Return a text without control characters and halves of surrogate pairs, with `\\n` as line ends."""
    if text.isascii() and text.isprintable():
        return text
    return _CONTROL.sub("", _BREAKS.sub("\n", writable(text))).replace("\xa0", " ")


def one_line(text: str) -> str:
    """Return a heading or title: on one line, of TITLE characters at most."""
    return excerpt(clean(text), TITLE)


def title_of(path: str, sections: Sequence[Section], declared: str = "") -> str:
    """Return a document's title.

    The one that the file declares, unless it is the name of a file or of a program; else the only heading of the
    highest level, if all sections below headings are below it; else the file's name in words.
    """
    if is_title(declared := one_line(declared)):
        return declared
    top = {section.headings[0] for section in sections if section.headings}
    if len(top) == 1 and is_title(heading := top.pop()):
        return heading
    stem = PurePosixPath(path).stem
    return one_line(re.sub(r"[\W_]+", " ", stem)) or one_line(stem) or "document"


def is_title(text: str) -> bool:
    """Return whether a text can be a title: it has letters, and is not the name of a file or of a program."""
    return any(map(str.isalpha, text)) and not _FILE_NAME.fullmatch(text) and not _PROGRAM.fullmatch(text)
