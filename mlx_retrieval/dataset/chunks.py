"""Split files into chunks for search: functions and classes, sections of markdown, paragraphs.

from mlx_retrieval.dataset.chunks import chunk_file
for chunk in chunk_file("src/main.py", text):
    print(chunk.line, chunk.end_line, chunk.kind, chunk.name)

Every line that is not blank is in a chunk. A chunk's text is the lines of the file from `line` to `end_line`, both
counted from 1. `context` is a line from further up, such as the head of its class or section, that is embedded with it.
"""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from mlx_retrieval.dataset.source_code.definitions import grammar, name_of
from mlx_retrieval.dataset.source_code.languages import Language, language_of

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from tree_sitter import Node

MAX_CHARACTERS = 2_000  # in a chunk: about 500 tokens
OVERLAP = 200  # characters, in whole lines, that consecutive parts of a long function or section share
HEAD = 200  # characters kept of each line of context
FEWEST_LINES = 3  # lines, not counting blank ones, from which code between functions is a chunk of its own

_COMMENTS = ("comment", "line_comment", "block_comment", "multiline_comment")
_FUNCTION = re.compile(r"function|method|constructor|init_|macro|declarator|assignment|field_definition")
_KEY = re.compile(r"[\w-]+ *:.*")  # the first line of front matter
_MARKDOWN = (".md", ".markdown", ".mdx")


class Chunk(NamedTuple):
    """A piece of a file."""

    line: int
    end_line: int
    language: str  # a name in dataset.source_code.languages, "markdown" or "text"
    kind: str  # function, class, module, section, text, document
    name: str  # qualified; "" = no name
    context: str  # "" = no context
    text: str

    @property
    def embedded(self) -> str:
        """The text that the model embeds."""
        return f"{self.context}\n{self.text}" if self.context else self.text


def chunk_file(path: str, text: str, limit: int = MAX_CHARACTERS, overlap: int = OVERLAP) -> list[Chunk]:
    """Return the chunks of a file, in order.

    Args:
        path: its suffix determines the language; the file is not read.
        text: the file's content, with `\\n` as line ends.
        limit: maximum number of characters in a chunk.
        overlap: maximum number of characters that parts of the same function or section share.
    """
    chunker = _Chunker(text, limit, overlap)
    language = language_of(path.rpartition("/")[2], text.encode())
    if language is not None and has_grammar(language):
        return list(chunker.code(language))
    if path.lower().endswith(_MARKDOWN):
        return list(chunker.markdown())
    name = language.name if language is not None else "text"
    return list(chunker.parts(0, len(chunker.lines), name, "text"))


def chunk_text(text: str, limit: int = MAX_CHARACTERS, overlap: int = OVERLAP) -> list[Chunk]:
    """Return the chunks of a text that has no headings: see `chunk_file`."""
    chunker = _Chunker(text, limit, overlap)
    return list(chunker.parts(0, len(chunker.lines), "text", "text"))


def has_grammar(language: Language) -> bool:
    """Return whether the grammar of this language is installed; without it, files are split as text."""
    modules = ("tree_sitter", language.package.replace("-", "_"))
    return bool(language.package) and all(importlib.util.find_spec(module) is not None for module in modules)


def missing_grammar(path: str) -> str:
    """Return the package of the grammar that this file needs, if it is not installed, else ""."""
    language = language_of(path.rpartition("/")[2])
    return language.package if language is not None and language.package and not has_grammar(language) else ""


class Heading(NamedTuple):
    """A heading of a text, in the rows `row` up to `end` (exclusive), counted from 0; 1 is the highest level."""

    row: int
    end: int
    level: int
    title: str


def markdown_headings(lines: Sequence[str]) -> Iterator[Heading]:
    """Yield the headings of markdown by CommonMark's rules, those inside lists and quotations left out.

    Nothing in a code block, an HTML block, a table or front matter is a heading.
    """
    first = front_matter(lines)
    tokens = _markdown_parser().parse("\n".join([*[""] * first, *lines[first:]]))
    for opened, inline in pairwise(tokens):
        if opened.type == "heading_open" and opened.level == 0:
            yield Heading(*opened.map, int(opened.tag[1:]), " ".join(inline.content.split()))


@cache
def _markdown_parser() -> "MarkdownIt":
    """Return a parser of CommonMark's blocks and of tables, which leaves what is inside a line as it is."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    parser.core.ruler.enableOnly(["block"])
    return parser


def front_matter(lines: Sequence[str]) -> int:
    """Return how many rows of markdown are front matter: `key: value` lines at the top between two rows of `---`."""
    if len(lines) < 3 or lines[0].rstrip() != "---" or not _KEY.fullmatch(lines[1]):
        return 0
    return next((row + 1 for row, line in enumerate(lines) if row and line.rstrip() in ("---", "...")), 0)


class _Span:
    """A definition: rows `start` up to `end` (exclusive), the row `head` with its name, and the definitions inside."""

    def __init__(self, start: int, end: int, head: int, name: str, kind: str):
        self.start, self.end, self.head, self.name, self.kind = start, end, head, name, kind
        self.inside: list[_Span] = []


class _Chunker:
    """Splits one file; rows are counted from 0."""

    def __init__(self, text: str, limit: int, overlap: int):
        self.text, self.lines, self.limit, self.overlap = text, text.split("\n"), limit, overlap

    # --- by lines ---

    def parts(
        self, start: int, end: int, language: str, kind: str, name: str = "", heads: Sequence[int] = ()
    ) -> Iterator[Chunk]:
        """Split rows `start` up to `end` (exclusive) by size, without blank rows at the edges of chunks.

        The rows `heads` are the context of chunks that begin below them.
        """

        def chunk(first: int, last: int, text: str) -> Chunk:
            context = "\n".join(self.lines[row].strip()[:HEAD] for row in heads if row < first)
            return Chunk(first + 1, last, language, kind, name, context, text)

        while (start := self._forward(start, end)) < end:
            stop, size = start, -1
            while stop < end and (size := size + 1 + len(self.lines[stop])) <= self.limit:
                stop += 1
            if stop == start:  # a row that is too long by itself
                yield from (chunk(start, start + 1, piece) for piece in _pieces(self.lines[start], self.limit))
                start += 1
                continue
            is_last = self._forward(stop, end) >= end
            if not is_last:
                stop = self._end_of_paragraph(start, stop)
            last = self._backward(start, stop)
            yield chunk(start, last, "\n".join(self.lines[start:last]))
            if is_last:
                return
            start = self._with_overlap(start, stop)

    def _end_of_paragraph(self, start: int, stop: int) -> int:
        """Return the last blank row before `stop` that leaves the chunk at least half full, else `stop`."""
        size = sum(len(line) + 1 for line in self.lines[start:stop])
        for row in range(stop, start + 1, -1):
            if not self.lines[row].strip() or not self.lines[row - 1].strip():
                return row
            size -= len(self.lines[row - 1]) + 1
            if size < self.limit // 2:
                break
        return stop

    def _with_overlap(self, start: int, stop: int) -> int:
        """Return the first row of the chunk that follows the rows `start` to `stop`."""
        row, size = stop, 0
        while row - 1 > start and (size := size + len(self.lines[row - 1]) + 1) <= self.overlap:
            row -= 1
        return row

    def _forward(self, row: int, end: int) -> int:
        while row < end and not self.lines[row].strip():
            row += 1
        return row

    def _backward(self, start: int, row: int) -> int:
        while row > start and not self.lines[row - 1].strip():
            row -= 1
        return row

    def _filled(self, start: int, end: int) -> int:
        return sum(bool(line.strip()) for line in self.lines[start:end])

    # --- markdown ---

    def markdown(self) -> Iterator[Chunk]:
        """Split by sections, named by their headings."""
        sections: list[tuple[int, list[str]]] = [(0, [])]
        for heading in markdown_headings(self.lines):
            above = [*sections[-1][1], *[""] * 6][: heading.level - 1]
            sections.append((heading.row, [*above, heading.title]))
        ends = [row for row, _ in sections[1:]] + [len(self.lines)]
        for (start, trail), end in zip(sections, ends, strict=True):
            yield from self.parts(start, end, "markdown", "section", " > ".join(filter(None, trail)), (start,))

    # --- code ---

    def code(self, language: Language) -> Iterator[Chunk]:
        """Split by functions and classes, with the comments above them; long classes by their methods."""
        spans = _spans(self.text.encode(), language)
        yield from self._region(_Span(0, len(self.lines), 0, "", "module"), spans, language.name, ())

    def _region(self, around: _Span, spans: Sequence[_Span], language: str, heads: tuple[int, ...]) -> Iterator[Chunk]:
        """Split the rows of `around`, which holds `spans` in order."""
        pieces: list[_Span] = []
        pending = around.start
        for span in spans:
            if self._filled(pending, span.start) >= FEWEST_LINES:
                pieces.append(_Span(pending, span.start, around.head, around.name, around.kind))
                pending = span.start
            span.start, pending = pending, span.end  # too few lines for a chunk: they join the next one
            pieces.append(span)
        if pieces and self._filled(pending, around.end) < FEWEST_LINES:
            pieces[-1].end = around.end
        else:
            pieces.append(_Span(pending, around.end, around.head, around.name, around.kind))
        for piece in pieces:
            own = (*heads, piece.head) if piece in spans else heads
            size = sum(len(line) + 1 for line in self.lines[piece.start : piece.end]) - 1
            if size > self.limit and piece.inside and piece.kind != "function":
                yield from self._region(piece, piece.inside, language, own)
            else:
                yield from self.parts(piece.start, piece.end, language, piece.kind, piece.name, own)


def _spans(source: bytes, language: Language) -> list[_Span]:
    """Return the top-level definitions; the definitions inside them are in `inside`."""
    from tree_sitter import QueryCursor

    parser, query = grammar(language)
    captures = QueryCursor(query).captures(parser.parse(source).root_node)
    nodes = {node for capture in ("definition", "scope") for node in captures.get(capture, ())}
    top: list[_Span] = []
    open_spans: list[_Span] = []
    for node in sorted(nodes, key=lambda node: (node.start_byte, -node.end_byte)):
        outer = node
        while outer.parent is not None and outer.parent.type in language.wrappers:
            outer = outer.parent
        last = outer.end_point.row + (outer.end_point.column > 0)
        while open_spans and open_spans[-1].end <= outer.start_point.row:
            open_spans.pop()
        name = name_of(node, source)
        around = open_spans[-1] if open_spans else None
        if around is not None and around.name:
            name = f"{around.name}.{name}"
        kind = "function" if _FUNCTION.search(node.type) else "class"
        span = _Span(_first_row(outer, language), last, node.start_point.row, name.removesuffix(".?"), kind)
        beside = around.inside if around is not None else top
        if around is not None and last > around.end:  # starts on the last row of another definition and is longer
            around.end = last
        elif beside and span.start < beside[-1].end:  # shares a row with the one before; a row belongs to one chunk
            beside[-1].end = max(beside[-1].end, last)
        else:
            beside.append(span)
            open_spans.append(span)
    return top


def _first_row(node: "Node", language: Language) -> int:
    """Return the first row of the comments and attributes directly above a definition."""
    first, before = node.start_point.row, node.prev_sibling
    while before is not None and (before.type in _COMMENTS or before.type in language.between):
        last = before.end_point.row - (before.end_point.column == 0)  # Rust's line comments include the line end
        further = before.prev_sibling
        beside = further is not None and further.end_point.row == before.start_point.row and further.end_point.column
        if first - last > 1 or beside:
            break
        first, before = before.start_point.row, further
    return first


def _pieces(line: str, limit: int) -> Iterator[str]:
    """Split a long line, at spaces if there are any."""
    line = line.strip()
    while len(line) > limit:
        at = line.rfind(" ", limit // 2, limit) + 1 or limit
        yield line[:at].strip()
        line = line[at:].strip()
    if line:
        yield line
