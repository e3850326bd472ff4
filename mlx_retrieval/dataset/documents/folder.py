"""Read a folder of documents: every format, each file that cannot be read with its reason.

    with read_folder(Path("handbook")) as folder:
        print(folder.files, folder.unread)          # Counter: format -> files; files and their reasons
        for document in folder: print(document.title)

The texts are in a temporary file, not in memory: of each document 8 bytes are held, and 64 MB for the counts of lines.
"""

import array
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.documents.boilerplate import RecurringLines
from mlx_retrieval.dataset.documents.document import COPY, TOO_LARGE, Document, Section, UnreadableError
from mlx_retrieval.dataset.documents.formats import format_of, read_file
from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.dataset.source_code.file_tree import File, FileTree
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.files import naming
from mlx_retrieval.utils.progress import progress_bar
from mlx_retrieval.utils.text import quantity

MAX_FILE_SIZE = 100_000_000  # bytes
BESIDE_CORPUS = "beside the corpus.jsonl of an evaluation folder"


class Unread(NamedTuple):
    """A file that is not read, or parts of it."""

    path: str  # relative to the folder
    reason: str  # one of document.REASONS
    detail: str  # "" = nothing more is known
    parts: str = ""  # such as "3 rows": the rest is read; "" = nothing of the file is


class DocumentFolder:
    """The documents of a folder, in the order of their paths and rows.

    Attributes:
        root: the folder.
        files: how many files were read, by format.
        unread: the files that cannot be read, and the parts of others, in the order of paths.
        left_out: how many files and folders the rules left out, by reason: hidden, ignored by .gitignore, links.
        lines: in how many documents each line is; see boilerplate.py.
    """

    def __init__(self, root: Path):
        self.root = root
        self.files: Counter[str] = Counter()
        self.unread: list[Unread] = []
        self.left_out: Counter[str] = Counter()
        self.lines = RecurringLines()
        self._texts = tempfile.TemporaryFile()
        self._starts = array.array("Q", [0])  # of the documents in it, and its end
        self._seen: set[bytes] = set()  # hashes of texts, while the folder is read

    def __enter__(self) -> "DocumentFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Remove the texts; the counts stay."""
        self._texts.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Document:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self._starts[i : i + 2]
        fields = json.loads(os.pread(self._texts.fileno(), end - start, start))
        sections = tuple(Section(tuple(headings), line, text) for headings, line, text in fields.pop("sections"))
        return Document(**fields, sections=sections)

    @property
    def reasons(self) -> Counter[str]:
        """How many files could not be read, by reason."""
        return Counter(unread.reason for unread in self.unread if not unread.parts)

    def read(self, file: File) -> None:
        """Read a file and keep its documents; note it in `unread` if it cannot be read."""
        parts: dict[tuple[str, str], list] = {}  # (reason, noun) -> how many, the first one's detail

        def note(reason: str, noun: str, detail: str) -> None:
            parts.setdefault((reason, noun), [0, detail])[0] += 1

        copies = count = 0
        try:
            for document in read_file(self.root / file.path, file.path, note):
                is_new = self._keep(document)
                count += is_new
                copies += not is_new
            if not count:
                raise UnreadableError(COPY)
        except UnreadableError as error:
            rest = f"all after {quantity(count, 'row')}" if count else ""
            self.unread.append(Unread(file.path, error.reason, error.detail, rest))
            if not count:
                return
        self.files[format_of(file.path)] += 1
        if copies:
            parts[COPY, "row"] = [copies, ""]
        for (reason, noun), (number, detail) in parts.items():
            self.unread.append(Unread(file.path, reason, detail, quantity(number, noun)))

    def _keep(self, document: Document) -> bool:
        """Store a document, and return whether its text is new."""
        key = f"{document.title}\n{document.text}" if document.line else document.text
        digest = blake2b(key.encode(), digest_size=16).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        self.lines.count(document)
        fields = {name: value for name, value in vars(document).items() if name != "text"}
        data = json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with naming(tempfile.gettempdir()):
            self._texts.write(data)
        self._starts.append(self._starts[-1] + len(data))
        return True

    def finish(self) -> None:
        """Make all documents readable."""
        with naming(tempfile.gettempdir()):
            self._texts.flush()
        self._seen.clear()


def document_files(path: Path, exclude: Sequence[str] = (), skip: Sequence[Path] = ()) -> FileTree:
    """Return the files of a folder that `read_folder` reads, sorted by path, and counts of the others by reason."""
    root = path.expanduser()
    tree = file_tree.walk(root, sys.maxsize, exclude, skip, hidden=False)
    if beir.is_corpus(root):
        files = [file for file in tree.files if file.path == beir.texts_file(root, "corpus").name]
        tree.left_out[BESIDE_CORPUS] += len(tree.files) - len(files)
        tree.files = files
    return tree


def read_folder(
    path: Path, max_file_size: int = MAX_FILE_SIZE, exclude: Sequence[str] = (), skip: Sequence[Path] = ()
) -> DocumentFolder:
    """Read all documents of a folder.

    Files are found as search.py finds them: .gitignore is obeyed, and symbolic links are not followed. Hidden files are
    left out as well. Of a folder in BEIR's layout, the corpus alone is read, not the queries.

    Args:
        path: the folder.
        max_file_size: larger files are not read, in bytes.
        exclude: more patterns in .gitignore's language, relative to the folder.
        skip: folders that are passed over and not counted, such as an index.

    Raises UserError if there is no such folder, and if it has no document that can be read.
    """
    tree = document_files(path, exclude, skip)
    folder, files = DocumentFolder(path.expanduser().resolve()), tree.files
    folder.left_out = +tree.left_out
    try:
        with progress_bar("reading", "files", len(files)) as progress:
            for number, file in enumerate(files, start=1):
                if file.size > max_file_size:
                    folder.unread.append(Unread(file.path, TOO_LARGE, f"{file.size / 1e6:,.0f} MB"))
                else:
                    folder.read(file)
                progress(number, note=quantity(len(folder), "document"))
        folder.finish()
        if not len(folder):
            raise UserError(f"{path}: no document that can be read{_reasons(folder)}")
    except BaseException:  # Ctrl-C too; nothing is handled, only the temporary file is closed
        folder.close()
        raise
    return folder


def _reasons(folder: DocumentFolder) -> str:
    """Return the reasons why nothing of a folder is read, with counts; "" if it is empty."""
    counts = [*folder.reasons.most_common(), *folder.left_out.most_common()]
    return ": " + ", ".join(f"{count:,} {reason}" for reason, count in counts) if counts else ": it is empty"
