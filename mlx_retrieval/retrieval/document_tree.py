"""A folder of documents as adapt.py reads it, to be indexed: all formats, cut by sections and rows.

tree = DocumentTree(Path("handbook"), info, None, (), Path(".index"))
for file in tree.files: chunks, sha256, reason = tree.read(file)

The chunks are those of dataset/documents/document_chunks.py: what adapt.py trains on, and also the short and similar
ones that it leaves out. Which lines are boilerplate depends on all documents, so all are read whenever the folder is;
a file whose chunks are the same as before is not embedded again.
"""

import hashlib
import json
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.dataset.chunks import Chunk
from mlx_retrieval.dataset.documents.document_chunks import ChunkCounts, cleaned, pieces
from mlx_retrieval.dataset.documents.folder import MAX_FILE_SIZE, read_folder
from mlx_retrieval.dataset.source_code.file_tree import File
from mlx_retrieval.retrieval.base import IndexInfo
from mlx_retrieval.utils.errors import Place
from mlx_retrieval.utils.files import naming

BOILERPLATE = "boilerplate alone"


class DocumentTree:
    """The documents of a folder, by their files, or of a BEIR corpus by their ids.

    Their chunks are in a temporary file, not in memory.

    Args:
        max_file_size: larger files are left out, in bytes; None = MAX_FILE_SIZE.
        index: the index's own folder, which is passed over.

    Raises UserError if nothing can be read.
    """

    def __init__(self, root: Path, info: IndexInfo, max_file_size: int | None, exclude: Sequence[str], index: Path):
        self.shown, self.info = root, info
        self._texts = tempfile.TemporaryFile()
        weakref.finalize(self, self._texts.close)
        self._places: dict[str, list[tuple[int, int]]] = {}  # path -> where its chunks are in the file
        self._digests: dict[str, bytes] = {}  # path -> hash of its chunks
        with read_folder(root, max_file_size or MAX_FILE_SIZE, exclude, [index]) as folder:
            for document in cleaned(folder, ChunkCounts()):
                found = [piece for _, piece in pieces(document, info.max_characters, info.overlap)]
                if info.is_corpus:
                    found = [piece._replace(line=0, end_line=0) for piece in found]  # a document's id is its place
                    self._keep(document.row_id or str(document.line), found)
                else:
                    self._keep(document.path, found)
            self.left_out: Counter[str] = folder.left_out + folder.reasons
        with naming(tempfile.gettempdir()):
            self._texts.flush()
        self.files = [self._file(name) for name in sorted(self._places)]

    def _keep(self, name: str, chunks: Sequence[Chunk]) -> None:
        places, before = self._places.setdefault(name, []), self._digests.get(name, b"")
        data = b"".join(json.dumps(chunk).encode() + b"\n" for chunk in chunks)
        with naming(tempfile.gettempdir()):
            start = self._texts.tell()
            self._texts.write(data)
        places.append((start, start + len(data)))
        self._digests[name] = hashlib.sha256(before + data).digest()

    def _file(self, name: str) -> File:
        size = sum(end - start for start, end in self._places[name])
        return File(name, size, int.from_bytes(self._digests[name][:8], "big") >> 1)

    def read(self, file: File) -> tuple[list[Chunk], str, str]:
        """Return (chunks, sha256, the reason why the file is left out or "")."""
        chunks = []
        for start, end in self._places[file.path]:
            self._texts.seek(start)
            chunks += [Chunk(*json.loads(line)) for line in self._texts.read(end - start).splitlines()]
        return chunks, self._digests[file.path].hex(), "" if chunks else BOILERPLATE

    def place(self, path: str, line: int) -> str:
        """Return what a message calls a line of a file, or a document."""
        return f"{self.shown}: document {path}" if self.info.is_corpus else str(Place(self.shown / path, line or None))
