"""Leave out boilerplate: lines that recur in many documents, such as navigation, footers and licences.

    lines = RecurringLines()
    for document in documents: lines.count(document)
    cleaner = Cleaner(lines)
    for document in documents: text = cleaner.clean(document).text

A line is boilerplate if it is in at least FEWEST documents, and in at least a tenth (SHARE) of those of its format.
Upper and lower case, white space and the values of numbers do not count. The first document with such a line keeps it,
so that nothing is lost: of twelve versions of a handbook, the first stays as it is, the others keep what is theirs.

Lines without a letter and the fences of code blocks stay, and so do the rows of tables and JSON, which are data. In
source code, only comments are looked at.
"""

import dataclasses
import re
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from mlx_retrieval.dataset.documents.document import Document
from mlx_retrieval.dataset.documents.formats import ROWS
from mlx_retrieval.dataset.documents.plain_text import CODE
from mlx_retrieval.dataset.source_code.languages import language_of

FEWEST = 5
SHARE = 0.1
COUNTERS = 1 << 24  # 64 MB; lines share one by their hash, which of millions of lines condemns about none wrongly
COMMENTS = ("#", "//", "--", "/*", "* ", "*/")  # of languages without a grammar

_NUMBER = re.compile(r"\d+")
_FENCE = re.compile(r"\s*(?:```|~~~)")


class RecurringLines:
    """Counts in how many documents each line is. It holds no text, and takes the same memory for any number."""

    def __init__(self):
        self._counts = np.zeros(COUNTERS, np.uint32)
        self._documents: Counter[str] = Counter()

    def count(self, document: Document) -> None:
        """Count a document's lines, each once."""
        self._documents[document.format] += 1
        slots = {slot for section in document.sections for _, slot in _slots(document, section.text)}
        self._counts[np.fromiter(slots, np.int64, len(slots))] += 1

    def is_boilerplate(self, slot: int, form: str) -> bool:
        """Return whether the line of a slot is boilerplate among the documents of a format."""
        return bool(self._counts[slot] >= max(FEWEST, SHARE * self._documents[form]))


class Cleaner:
    """Leaves boilerplate out of documents, which come in the order in which they are read."""

    def __init__(self, lines: RecurringLines):
        self._lines = lines
        self._seen: set[int] = set()  # slots of boilerplate that a document has kept

    def clean(self, document: Document) -> tuple[Document, int]:
        """Return the document with blank lines in place of boilerplate, and how many lines those are."""
        count, kept, sections = 0, set(), []
        for section in document.sections:
            lines = section.text.split("\n")
            for row, slot in _slots(document, section.text):
                if not self._lines.is_boilerplate(slot, document.format):
                    continue
                if slot in self._seen:
                    lines[row] = ""
                    count += 1
                else:
                    kept.add(slot)
            sections.append(section._replace(text="\n".join(lines)))
        self._seen |= kept
        return (dataclasses.replace(document, sections=tuple(sections)) if count else document), count


def _slots(document: Document, text: str) -> Iterator[tuple[int, int]]:
    """Yield (row, the counter's place) of the lines of a section that may be boilerplate."""
    if document.format in ROWS:
        return
    comments = None
    if document.format == CODE:
        language = language_of(document.path)
        comments = language.comments if language is not None else COMMENTS
    for row, line in enumerate(text.split("\n")):
        key = " ".join(line.split())
        if comments is not None and not key.startswith(comments):
            continue
        if any(map(str.isalpha, key)) and not _FENCE.match(key):
            key = f"{document.format}\n{_NUMBER.sub('0', key.casefold())}"
            yield row, zlib.crc32(key.encode("utf-8", "surrogatepass")) % COUNTERS
