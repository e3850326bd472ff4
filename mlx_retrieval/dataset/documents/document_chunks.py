"""Cut documents into chunks: those that adapt.py trains on, and those that an index of documents holds.

    counts = ChunkCounts()
    for chunk in chunk_documents(folder, counts): print(chunk.place, chunk.headings, chunk.text)
    for document in cleaned(folder, counts):        # the same chunks, short and similar ones as well
        for headings, piece in pieces(document): print(piece.line, piece.embedded)

Held are, of each chunk of `chunk_documents`, about 3 KB and 8 bytes a token, by which near-duplicates are found; not
its text.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from mlx_retrieval.dataset import chunks
from mlx_retrieval.dataset.documents.boilerplate import Cleaner, RecurringLines
from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.dataset.documents.document import Document, Section
from mlx_retrieval.dataset.documents.formats import BY_LINES
from mlx_retrieval.dataset.documents.plain_text import CODE
from mlx_retrieval.dataset.near_duplicates import NearDuplicates
from mlx_retrieval.utils.errors import Place

FEWEST_LETTERS = 20  # in a chunk, unless it is a row of a table or of JSON
SHORT = f"fewer than {FEWEST_LETTERS} letters"


@dataclass
class ChunkCounts:
    """What `chunk_documents` did."""

    documents: int = 0  # that have a chunk
    without_chunks: int = 0  # documents of which nothing is left
    boilerplate: int = 0  # lines, and blocks around the text of pages
    chunks: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> chunks


class Documents(Protocol):
    """Documents, and in how many each line is: a DocumentFolder."""

    lines: RecurringLines

    def __iter__(self) -> Iterator[Document]: ...


def chunk_documents(
    documents: Documents, counts: ChunkCounts, limit: int = chunks.MAX_CHARACTERS, overlap: int = chunks.OVERLAP
) -> Iterator[Chunk]:
    """Yield the chunks of documents, in order, without near-duplicates and those that say too little.

    Args:
        counts: is added to.
        limit, overlap: in characters; see chunks.chunk_file. The context comes on top.

    A chunk keeps its id when others are left out, or when other documents change.
    """
    seen = NearDuplicates()
    for document in cleaned(documents, counts):
        before = counts.chunks
        for chunk in cut(document, limit, overlap):
            if not document.line and sum(map(str.isalpha, chunk.text)) < FEWEST_LETTERS:
                reason = SHORT
            else:
                reason = seen.add(chunk.embedded if document.line else chunk.text)
            if reason:
                counts.left_out[reason] += 1
            else:
                counts.chunks += 1
                yield chunk
        counts.documents += counts.chunks > before
        counts.without_chunks += counts.chunks == before


def cleaned(documents: Documents, counts: ChunkCounts) -> Iterator[Document]:
    """Yield documents without their boilerplate, whose lines are added to `counts`."""
    cleaner = Cleaner(documents.lines)
    for document in documents:
        document, lines = cleaner.clean(document)
        counts.boilerplate += lines + document.left_out
        yield document


def cut(document: Document, limit: int = chunks.MAX_CHARACTERS, overlap: int = chunks.OVERLAP) -> Iterator[Chunk]:
    """Yield the chunks of a document."""
    for number, (headings, piece) in enumerate(pieces(document, limit, overlap), start=1):
        yield Chunk(
            id=f"{document.name}#{number}",
            text=piece.text,
            place=Place(document.path, piece.line or None),
            title=document.title,
            headings=headings,
            document=document.name,
            context=piece.context,
        )


def pieces(
    document: Document, limit: int = chunks.MAX_CHARACTERS, overlap: int = chunks.OVERLAP
) -> Iterator[tuple[tuple[str, ...], chunks.Chunk]]:
    """Yield the pieces of a document, each after its headings: this is the one place where documents are cut.

    Source code is cut into its functions and classes, other documents into parts of their sections, below their title
    and headings. Lines are those of the file. A row has one; where nobody could look a line up, as in a PDF, it is 0.
    """
    for section in document.sections:
        if document.format == CODE:
            for piece in chunks.chunk_file(document.path, section.text, limit, overlap):
                yield ((piece.name,) if piece.name else ()), piece
            continue
        kind, context = "document" if document.line else "section", _heading_path(document, section)
        name = " > ".join(section.headings)
        for piece in chunks.chunk_text(section.text, limit, overlap):
            lines = _lines(document, section, piece)
            yield section.headings, chunks.Chunk(*lines, document.format, kind, name, context, piece.text)


def _lines(document: Document, section: Section, piece: chunks.Chunk) -> tuple[int, int]:
    """Return the first and the last line of a piece in its file; 0 if the file has none that a reader could look up."""
    if document.line:
        return document.line, document.line
    above = section.line - 1
    return (above + piece.line, above + piece.end_line) if document.format in BY_LINES else (0, 0)


def _heading_path(document: Document, section: Section) -> str:
    """Return the title and the headings of a section; the title once, if it is a heading as well."""
    is_first = document.title in section.headings[:1]
    return " > ".join(filter(None, (*(() if is_first else (document.title,)), *section.headings)))
