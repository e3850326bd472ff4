"""The formats of documents: which endings they have, and what reads them.

for document in read_file(Path("docs/guide.pdf"), "guide.pdf", note): ...
"""

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from mlx_retrieval.dataset.documents.document import EMPTY, OTHER_FORMAT, Document, Note, UnreadableError
from mlx_retrieval.dataset.documents.docx_files import WORD, read_docx
from mlx_retrieval.dataset.documents.html_files import HTML, read_html
from mlx_retrieval.dataset.documents.pdf_files import PDF, read_pdf
from mlx_retrieval.dataset.documents.plain_text import (
    CODE,
    MARKDOWN,
    RST,
    TEXT,
    read_code,
    read_markdown,
    read_plain,
    read_rst,
)
from mlx_retrieval.dataset.documents.row_files import JSON, TABLE, read_json, read_table
from mlx_retrieval.dataset.source_code.languages import BY_SUFFIX

Reader = Callable[[Path, str, Note], Iterator[Document]]

READERS: dict[str, Reader] = {
    MARKDOWN: read_markdown,
    TEXT: read_plain,
    RST: read_rst,
    HTML: read_html,
    PDF: read_pdf,
    WORD: read_docx,
    TABLE: read_table,
    JSON: read_json,
    CODE: read_code,
}
ROWS = frozenset({TABLE, JSON})  # each row is a document
BY_LINES = frozenset({MARKDOWN, TEXT, RST, CODE})  # a section's lines are those of the file
# Languages without a grammar here; their chunks are cut by lines.
OTHER_LANGUAGES = (
    *(".sh", ".bash", ".zsh", ".rb", ".php", ".cs", ".kt", ".kts", ".scala", ".pl", ".pm", ".lua", ".r", ".jl", ".sql"),
    *(".hs", ".ml", ".ex", ".exs", ".erl", ".clj", ".dart", ".zig", ".ps1", ".f90", ".vb", ".groovy", ".gradle"),
)
FORMATS = {
    **dict.fromkeys((".md", ".markdown", ".mdx"), MARKDOWN),
    **dict.fromkeys(("", ".txt", ".text", ".tex", ".org", ".adoc", ".asciidoc"), TEXT),
    **dict.fromkeys((".rst", ".rest"), RST),
    **dict.fromkeys((".html", ".htm", ".xhtml"), HTML),
    **dict.fromkeys((".csv", ".tsv", ".tab"), TABLE),
    **dict.fromkeys((".json", ".jsonl", ".ndjson", ".jsonl.gz", ".json.gz"), JSON),
    **dict.fromkeys((*BY_SUFFIX, *OTHER_LANGUAGES), CODE),
    ".pdf": PDF,
    ".docx": WORD,
}


def format_of(name: str) -> str | None:
    """Return the format of a file by its ending, a key of READERS; None = it is not read."""
    suffixes = PurePosixPath(name.lower()).suffixes
    return FORMATS.get("".join(suffixes[-2:])) or FORMATS.get(suffixes[-1] if suffixes else "")


def read_file(path: Path, name: str, note: Note) -> Iterator[Document]:
    """Yield the documents of a file that have a text: one, or one a row.

    Args:
        path: the file.
        name: its path in the documents.
        note: called for each part of the file that is left out.

    Raises UnreadableError if nothing of the file can be read; OSError never.
    """
    if (form := format_of(name)) is None:
        raise UnreadableError(OTHER_FORMAT, PurePosixPath(name).suffix)
    reasons: list[tuple[str, str]] = []

    def noted(reason: str, noun: str, detail: str) -> None:
        if not reasons:
            reasons.append((reason, detail))
        note(reason, noun, detail)

    count = 0
    for document in READERS[form](path, name, noted):
        if document.sections:
            count += 1
            yield document
    if not count:
        raise UnreadableError(*next(iter(reasons), (EMPTY,)))
