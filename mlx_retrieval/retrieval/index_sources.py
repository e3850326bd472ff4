"""What an index is made of: a folder of source code, texts and documents, or the documents of a BEIR corpus; see also
document_tree.py.

source = index_source(Path("src"), {}, info, None, (), Path(".index"))
for file in source.files: chunks, sha256, reason = source.read(file)
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.dataset import beir, chunks
from mlx_retrieval.dataset.chunks import Chunk
from mlx_retrieval.dataset.documents import folder as document_folder
from mlx_retrieval.dataset.documents.decoding import read_bytes
from mlx_retrieval.dataset.documents.document import UnreadableError
from mlx_retrieval.dataset.documents.document_chunks import pieces
from mlx_retrieval.dataset.documents.docx_files import WORD
from mlx_retrieval.dataset.documents.formats import format_of, read_file
from mlx_retrieval.dataset.documents.html_files import HTML
from mlx_retrieval.dataset.documents.pdf_files import PDF
from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.dataset.source_code.file_tree import File
from mlx_retrieval.retrieval.base import IndexInfo
from mlx_retrieval.retrieval.document_tree import DocumentTree
from mlx_retrieval.retrieval.forest import Forest, IndexSource
from mlx_retrieval.utils.errors import Place

DOCUMENTS = (PDF, WORD, HTML)  # formats that are read as documents; their chunks have no lines
# Bytes; of text files, and of DOCUMENTS, which hold pictures as well.
MAX_FILE_SIZE = {False: file_tree.MAX_FILE_SIZE, True: document_folder.MAX_FILE_SIZE}


def index_source(
    shown: Path,
    folders: dict[str, Path],
    info: IndexInfo,
    max_file_size: int | None,
    exclude: Sequence[str],
    index: Path,
) -> IndexSource:
    """Return the files or documents to index.

    Args:
        shown, folders: see forest.Roots.
        max_file_size, exclude: see indexer.update.
        index: the index's own folder, which is left out.
    """
    if info.is_corpus and not info.documents:
        return BeirCorpus(shown)
    tree = DocumentTree if info.documents else FileTree
    trees = {name: tree(path, info, max_file_size, exclude, index) for name, path in folders.items()}
    return Forest(trees) if trees else tree(shown, info, max_file_size, exclude, index)


def is_document(path: str) -> bool:
    """Return whether a file is read as one of DOCUMENTS."""
    return format_of(path) in DOCUMENTS


class FileTree:
    """A folder of source code, texts, and documents that are no text files: DOCUMENTS.

    Args:
        max_file_size: larger files are left out, in bytes; None = MAX_FILE_SIZE, which is more for DOCUMENTS.
    """

    def __init__(self, root: Path, info: IndexInfo, max_file_size: int | None, exclude: Sequence[str], index: Path):
        self.shown = root
        root = root.resolve()
        tree = file_tree.walk(root, sys.maxsize, exclude, skip=[index])
        self.left_out, self.root, self.info = tree.left_out, root, info
        limits = {documents: max_file_size or size for documents, size in MAX_FILE_SIZE.items()}
        self.files = [file for file in tree.files if file.size <= limits[is_document(file.path)]]
        if too_large := len(tree.files) - len(self.files):
            self.left_out[file_tree.TOO_LARGE] += too_large

    def read(self, file: File) -> tuple[list[Chunk], str, str]:
        if is_document(file.path):
            return self._read_document(file)
        text, reason, data = file_tree.read_text(self.root / file.path)
        sha256 = hashlib.sha256(data).hexdigest()
        if reason:
            return [], sha256, reason
        return chunks.chunk_file(file.path, text, self.info.max_characters, self.info.overlap), sha256, ""

    def _read_document(self, file: File) -> tuple[list[Chunk], str, str]:
        path = self.root / file.path
        found: list[Chunk] = []
        try:
            sha256 = hashlib.sha256(read_bytes(path)).hexdigest()
            for document in read_file(path, file.path, lambda reason, noun, detail: None):
                found += [piece for _, piece in pieces(document, self.info.max_characters, self.info.overlap)]
        except UnreadableError as error:
            return [], hashlib.sha256(f"{file.path} {error.reason}".encode()).hexdigest(), error.reason
        return found, sha256, ""

    def place(self, path: str, line: int) -> str:
        return str(Place(self.shown / path, line or None))


class BeirCorpus:
    """corpus.jsonl of a folder in BEIR layout: each document is a file of one chunk."""

    def __init__(self, root: Path):
        self.left_out: Counter[str] = Counter()
        self.shown = root
        self.texts: dict[str, str] = {}
        for name, (title, text) in beir.read_texts(root, "corpus").items():
            if document := beir.document_text(title, text):
                self.texts[name] = document
            else:
                self.left_out[file_tree.EMPTY] += 1
        self.files = [File(name, len(text), _stamp(text)) for name, text in sorted(self.texts.items())]

    def read(self, file: File) -> tuple[list[Chunk], str, str]:
        text = self.texts[file.path]
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        return [Chunk(1, text.count("\n") + 1, "text", "document", "", "", text)], sha256, ""

    def place(self, path: str, line: int) -> str:
        return f"{self.shown}: document {path}"


def _stamp(text: str) -> int:
    """Return 63 bits of a text's hash, in place of a modification time."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
