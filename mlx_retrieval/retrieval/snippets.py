"""Pick the lines of a chunk to show for a query, and the words in them that match."""

import re
from collections.abc import Iterator

from mlx_retrieval.dataset import chunks


def snippet(text: str, query: str, count: int = 2) -> list[tuple[int, str]]:
    """Return (row, line) of the `count` consecutive lines that hold most words of the query, or of the first lines.

    Rows are counted from 0; blank lines are skipped.
    """
    query_words, lines = set(chunks.words(query)), text.split("\n")
    rows = [row for row, line in enumerate(lines) if line.strip()]
    matches = [query_words.intersection(chunks.words(lines[row])) for row in rows]
    scores = [len(set().union(*matches[i : i + count])) for i in range(max(1, len(rows) - count + 1))]
    first = scores.index(max(scores))
    return [(row, lines[row]) for row in rows[first : first + count]]


def matching_spans(line: str, query: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the words in a line that share a term with the query."""
    query_words = set(chunks.words(query))
    for match in re.finditer(r"\w+", line):
        if query_words.intersection(chunks.words(match[0])):
            yield match.span()
