"""Read Word files (.docx) as documents, by python-docx: headings, paragraphs, tables; no headers, footers, comments."""

import functools
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_retrieval.dataset.documents.decoding import read_bytes
from mlx_retrieval.dataset.documents.document import (
    DAMAGED,
    ENCRYPTED,
    TOO_LARGE,
    Document,
    Note,
    SectionBuilder,
    UnreadableError,
    one_line,
    title_of,
)

if TYPE_CHECKING:
    from docx.document import Document as WordDocument

WORD = "Word"
OLE = b"\xd0\xcf\x11\xe0"  # how an encrypted .docx begins, and a .doc
MAX_UNPACKED = 500_000_000  # bytes of XML: python-docx holds all of it
NO_LEVEL = 9  # what Word calls the outline level of a paragraph that is no heading
MOST_STYLES = 20  # on which one style is based, one after another

_W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_MC = "http://schemas.openxmlformats.org/markup-compatibility/2006"
_HEADING = re.compile(r"heading ([1-9])", re.IGNORECASE)
_CONTENTS = re.compile(r"toc ?(?:\d|heading|$)|table ?of ?figures", re.IGNORECASE)


def read_docx(path: Path, name: str, note: Note) -> Iterator[Document]:
    """Read a Word file: see plain_text.read_plain for the arguments.

    A paragraph is a line; so is a row of a table, with ` | ` between the cells. Headings are paragraphs in a style
    that is or is based on one of Word's headings, and those with an outline level. Inserted text counts, deleted text
    does not; moved text counts at its new place. The table of contents is left out. The title is the paragraph in the
    style Title, else the file's.
    """
    data = read_bytes(path)
    _check(data)
    import docx

    try:
        word = docx.Document(io.BytesIO(data))
        sections, title = _read(word)
    except Exception as error:  # of any kind: python-docx meets what it does not expect in damaged files
        raise UnreadableError(DAMAGED, one_line(str(error)) or type(error).__name__) from error
    yield Document(name, WORD, title_of(name, sections, title), sections)


def _check(data: bytes) -> None:
    """Raise UnreadableError for a file that is no zip of a bearable size."""
    if data.startswith(OLE):
        raise UnreadableError(ENCRYPTED, "or a .doc under another name")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            files = packed.infolist()
    except Exception as error:  # zipfile raises errors of many kinds for damaged files
        raise UnreadableError(DAMAGED, "not a whole zip file") from error
    if any(file.flag_bits & 1 for file in files):
        raise UnreadableError(ENCRYPTED)
    if sum(file.file_size for file in files if file.filename.endswith((".xml", ".rels"))) > MAX_UNPACKED:
        raise UnreadableError(TOO_LARGE, f"over {MAX_UNPACKED / 1e6:,.0f} MB when it is unpacked")


def _read(word: "WordDocument") -> tuple[tuple, str]:
    """Return the sections and the title of an opened file."""
    levels, names = _styles(word)
    builder, title = SectionBuilder(), ""
    for block in _xpath("BLOCKS")(word.element.body):
        if block.tag == f"{{{_W}}}tr":
            cells = (" ".join(filter(None, map(_text, _xpath("PARAGRAPHS")(cell)))) for cell in _xpath("CELLS")(block))
            builder.add(" | ".join(filter(None, map(_flat, cells))))
            continue
        text, style = _text(block), next(iter(_xpath("STYLE")(block)), "")
        if _CONTENTS.match(names.get(style, style)):
            continue
        own = next(iter(_xpath("LEVEL")(block)), "")
        level = int(own) + 1 if own.isdecimal() else levels.get(style, 0)
        if not title and text.strip() and names.get(style, "").lower() == "title":
            title = text
        elif 0 < level <= NO_LEVEL and text.strip():
            builder.heading(level, text)
        elif text.strip():
            builder.add(text)
            builder.paragraph()
        else:
            builder.paragraph()
    return builder.sections(), title or _declared_title(word)


def _declared_title(word: "WordDocument") -> str:
    title = word.core_properties.title
    return title if isinstance(title, str) else ""


def _styles(word: "WordDocument") -> tuple[dict[str, int], dict[str, str]]:
    """Return the levels of the styles of headings, and the names of all styles, by their ids."""
    elements = {element.get(f"{{{_W}}}styleId", ""): element for element in _xpath("STYLES")(word.styles.element)}
    names = {style: next(iter(_xpath("NAME")(element)), "") for style, element in elements.items()}
    levels = {}
    for style in elements:
        base, steps = style, 0
        while base in elements and style not in levels and steps < MOST_STYLES:
            if match := _HEADING.fullmatch(names[base]):
                levels[style] = int(match[1])
            elif (own := next(iter(_xpath("LEVEL")(elements[base])), "")).isdecimal():
                levels[style] = int(own) + 1
            base, steps = next(iter(_xpath("BASE")(elements[base])), ""), steps + 1
    return levels, names


def _text(paragraph: Any) -> str:
    """Return the text of a paragraph: with hyperlinks and insertions, without deletions and text boxes."""
    signs = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
    pieces = ((element.tag.rpartition("}")[2], element) for element in _xpath("PIECES")(paragraph))
    return "".join(signs.get(tag) or element.text or "" for tag, element in pieces)


def _flat(text: str) -> str:
    return " ".join(text.split())


_PATHS = {
    # Paragraphs and rows of tables; those within a row are the row's, and those of text boxes are left out.
    "BLOCKS": ".//*[self::w:p or self::w:tr][not(ancestor::w:tr or ancestor::w:txbxContent or ancestor::mc:Fallback)]",
    "CELLS": "./w:tc | ./w:sdt/w:sdtContent/w:tc",
    "PARAGRAPHS": ".//w:p[not(ancestor::w:txbxContent or ancestor::mc:Fallback)]",
    "STYLE": "./w:pPr/w:pStyle/@w:val",
    "LEVEL": "./w:pPr/w:outlineLvl/@w:val",
    # What was moved away is w:t as what has arrived; of deletions, only the text has names of its own.
    "PIECES": ".//w:r[not(ancestor::w:txbxContent or ancestor::mc:Fallback or ancestor::w:moveFrom or ancestor::w:del)]"
    "/*[self::w:t or self::w:tab or self::w:br or self::w:cr or self::w:noBreakHyphen]",
    "STYLES": "./w:style",
    "NAME": "./w:name/@w:val",
    "BASE": "./w:basedOn/@w:val",
}


@functools.cache
def _xpath(name: str) -> Any:
    """Return one of _PATHS, compiled."""
    from lxml import etree

    return etree.XPath(_PATHS[name], namespaces={"w": _W, "mc": _MC})
