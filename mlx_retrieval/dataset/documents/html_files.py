"""Read HTML as documents, by lxml: headings, paragraphs, lists, tables; no scripts, navigation, headers and footers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_retrieval.dataset.documents.decoding import decode, read_bytes
from mlx_retrieval.dataset.documents.document import (
    EMPTY,
    NOT_UTF8,
    Document,
    Note,
    SectionBuilder,
    UnreadableError,
    title_of,
)

if TYPE_CHECKING:
    from lxml.etree import _Element

HTML = "HTML"
HEADINGS = {f"h{level}": level for level in range(1, 7)}
# Elements that are no text for readers, and those around the text. Both are left out with all that is in them.
UNSEEN = frozenset(
    {"script", "style", "noscript", "template", "svg", "iframe", "object", "canvas", "audio", "video", "head"}
    | {"button", "select", "textarea", "dialog"}
)
AROUND = frozenset({"nav", "footer", "aside"})
AROUND_ROLES = frozenset({"navigation", "banner", "contentinfo", "complementary", "search"})
INNER = frozenset({"main", "article", "section"})  # a <header> in one of these is part of the text
PARAGRAPHS = frozenset({"p", "pre", "blockquote", "ul", "ol", "dl", "table", "figure", "address", "details"})
BLOCKS = PARAGRAPHS | {"div", "section", "article", "main", "header", "body", "form", "fieldset", "figcaption"}
BLOCKS |= {"li", "dt", "dd", "tr", "caption", "summary", "hr", "center", "td", "th"}
CELLS = frozenset({"td", "th"})

# Encodings that pages declare (encoding.spec.whatwg.org); others of Python's are no encodings of texts.
_DECLARED = re.compile(rb"""<meta[^>]{,200}?charset\s*=\s*["']?\s*([\w:.-]+)""", re.IGNORECASE)
_ENCODINGS = re.compile(
    r"(?:windows-|cp)?(?:125\d|874|949|866|31j)|iso[-_]?8859[-_]?\d+(?:-[ei])?|latin[-_]?\d|us-ascii|ascii"
    r"|koi8-[ru]|gbk?|gb2312|gb18030|big5(?:-hkscs)?|shift[-_]jis|sjis|euc[-_](?:jp|kr|cn)|iso-2022-jp|tis-620|macintosh"
)
_LATIN_1 = re.compile(r"iso[-_]?8859[-_]?1|latin[-_]?1|us-ascii|ascii")  # pages that declare it are in windows-1252
_SPACES = re.compile(r"[ \t\n\r\f\xa0]+")


def read_html(path: Path, name: str, note: Note) -> Iterator[Document]:
    """Read a page: see plain_text.read_plain for the arguments.

    The text is that of <main> if there is one, or of the only <article>, else of the whole page. The title is the only
    <h1>, else the <title>.
    """
    root = _parse(decode_page(read_bytes(path)))
    headings = [text for element in root.iter("h1") if (text := _text_of(element))]
    titles = [text for element in root.iter("title") if (text := _text_of(element))]
    title = headings[0] if len(headings) == 1 else next(iter(titles), "")
    page = _Page()
    page.read(_scope(root))
    sections = page.builder.sections()
    yield Document(name, HTML, title_of(name, sections, title), sections, left_out=page.left_out)


def decode_page(data: bytes) -> str:
    """Return a page as text: UTF-8, marked UTF-16 or UTF-32, or the encoding that it declares."""
    if (text := decode(data)) is not None:
        return text
    if declared := _DECLARED.search(data[:4096]):
        encoding = declared[1].decode("ascii", "replace").lower()
        if _ENCODINGS.fullmatch(encoding):
            try:
                return data.decode("cp1252" if _LATIN_1.fullmatch(encoding) else _python_name(encoding))
            except (LookupError, UnicodeDecodeError) as error:
                raise UnreadableError(NOT_UTF8, f"nor {encoding}, which it declares") from error
    raise UnreadableError(NOT_UTF8)


def _python_name(encoding: str) -> str:
    return {"macintosh": "mac-roman", "windows-31j": "cp932", "gb": "gbk", "x-sjis": "shift_jis"}.get(
        encoding, encoding.replace("windows-", "cp")
    )


def _parse(text: str) -> "_Element":
    """Return the root of a page. Raises UnreadableError if it has none: of what is damaged, lxml reads the rest."""
    from lxml import etree

    parser = etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, no_network=True)
    try:
        root = etree.fromstring(text.encode("utf-8", "replace"), parser)
    except etree.XMLSyntaxError as error:
        raise UnreadableError(EMPTY) from error
    if root is None:
        raise UnreadableError(EMPTY)
    return root


def _text_of(element: "_Element") -> str:
    return " ".join("".join(element.itertext()).split())


def _scope(root: "_Element") -> "_Element":
    """Return the element that holds the text of a page."""
    mains = [element for element in root.iter() if element.tag == "main" or element.get("role") == "main"]
    articles = list(root.iter("article"))
    for element in [*mains[:1], *(articles if len(articles) == 1 else [])]:
        if _text_of(element):
            return element
    return root


class _Page:
    """Reads the elements of a page in order. `left_out` counts the blocks around the text that have any."""

    def __init__(self):
        self.builder = SectionBuilder()
        self.left_out = 0
        self._words: list[str] = []  # of the block that is being read
        self._heading = 0  # the level of the heading that is being read; 0 = none
        self._pre = 0  # how many <pre> are open

    def read(self, scope: "_Element") -> None:
        """Read an element and all that is in it. Not recursive: pages nest deeply."""
        from lxml import etree

        walk = etree.iterwalk(scope, events=("start", "end"))
        skipped = None
        for event, element in walk:
            if event == "start":
                if element is not scope and self._is_skipped(element):
                    walk.skip_subtree()
                    skipped = element
                else:
                    self._begin(element)
            else:
                if element is skipped:
                    skipped = None
                else:
                    self._end(element)
                if element is not scope:
                    self._add(element.tail)
        self._flush()

    def _is_skipped(self, element: "_Element") -> bool:
        tag = element.tag
        if tag in UNSEEN or element.get("hidden") is not None or element.get("aria-hidden") == "true":
            return True
        around = tag in AROUND or element.get("role") in AROUND_ROLES
        if tag == "header":
            around = not any(above.tag in INNER for above in element.iterancestors())
        self.left_out += around and bool(_text_of(element))
        return around

    def _begin(self, element: "_Element") -> None:
        tag = element.tag
        if tag in HEADINGS and not self._heading:
            self._flush()
            self._heading = HEADINGS[tag]
        elif tag == "br":
            self._words.append("\n")
        elif tag in CELLS:
            self._words.append(" | " if any(map(str.strip, self._words)) else "")
        elif tag in BLOCKS:
            self._flush()
            self._pre += tag == "pre"
            if tag == "li":
                self._words.append("- ")
        self._add(element.text)

    def _end(self, element: "_Element") -> None:
        tag = element.tag
        if HEADINGS.get(tag) == self._heading and tag in HEADINGS:
            text = " ".join("".join(self._words).split())
            self._words.clear()
            level, self._heading = self._heading, 0
            if text:
                self.builder.heading(level, text)
        elif tag in BLOCKS and tag not in CELLS:
            self._flush()
            self._pre -= tag == "pre"
            if tag in PARAGRAPHS and not self._heading:
                self.builder.paragraph()

    def _add(self, text: str | None) -> None:
        if text:
            self._words.append(text if self._pre else _SPACES.sub(" ", text))

    def _flush(self) -> None:
        """End a block: its words become a line, or several if it has line breaks."""
        if self._heading:
            self._words.append(" ")
            return
        text = "".join(self._words)
        self._words.clear()
        if not self._pre:
            text = "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))
        if text.strip() not in ("", "-", "|"):
            self.builder.add(text.strip("\n"))
