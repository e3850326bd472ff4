"""Cut documents into chunks as search.py cuts files, without boilerplate and near-duplicates.

    counts = ChunkCounts()
    for chunk in chunk_documents(folder, counts): print(chunk.place, chunk.headings, chunk.text)

Held are, of each chunk, about 3 KB and 8 bytes a token, by which near-duplicates are found; not its text.
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
    """Yield the chunks of documents, in order.

    Args:
        counts: is added to.
        limit, overlap: in characters; see chunks.chunk_file. The context comes on top.

    A chunk keeps its id when others are left out, or when other documents change.
    """
    cleaner, seen = Cleaner(documents.lines), NearDuplicates()
    for document in documents:
        cleaned, lines = cleaner.clean(document)
        counts.boilerplate += lines + document.left_out
        before = counts.chunks
        for chunk in cut(cleaned, limit, overlap):
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


def cut(document: Document, limit: int = chunks.MAX_CHARACTERS, overlap: int = chunks.OVERLAP) -> Iterator[Chunk]:
    """Yield the chunks of a document: of source code its functions and classes, else parts of its sections."""
    number = 0
    for section in document.sections:
        if document.format == CODE:
            pieces = chunks.chunk_file(document.path, section.text, limit, overlap)
        else:
            pieces = chunks.chunk_text(section.text, limit, overlap)
        for piece in pieces:
            number += 1
            headings = ((piece.name,) if piece.name else ()) if document.format == CODE else section.headings
            yield Chunk(
                id=f"{document.name}#{number}",
                text=piece.text,
                place=Place(document.path, _line(document, section, piece)),
                title=document.title,
                headings=headings,
                document=document.name,
                context=piece.context if document.format == CODE else _heading_path(document, section),
            )


def _line(document: Document, section: Section, piece: chunks.Chunk) -> int | None:
    """Return the line of the file where a piece begins; None if the file has no lines that a reader could look up."""
    if document.line:
        return document.line
    return section.line + piece.line - 1 if document.format in BY_LINES else None


def _heading_path(document: Document, section: Section) -> str:
    """Return the title and the headings of a section; the title once, if it is a heading as well."""
    is_first = document.title in section.headings[:1]
    return " > ".join(filter(None, (*(() if is_first else (document.title,)), *section.headings)))
