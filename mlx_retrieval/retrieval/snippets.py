"""Pick the lines of a chunk to show for a query, and the words in them that match."""

from collections.abc import Iterator

from mlx_retrieval.retrieval.analyzer import ENGLISH, analyzer, runs


def snippet(text: str, query: str, count: int = 2, language: str = ENGLISH) -> list[tuple[int, str]]:
    """Return (row, line) of the `count` consecutive lines that hold most words of the query, or of the first lines.

    Rows are counted from 0; blank lines are skipped. Words are the same if their stems in this language are.
    """
    words = analyzer(language)
    query_words, lines = set(words.query_terms(query)), text.split("\n")
    rows = [row for row, line in enumerate(lines) if line.strip()]
    matches = [query_words.intersection(words.terms(lines[row])) for row in rows]
    scores = [len(set().union(*matches[i : i + count])) for i in range(max(1, len(rows) - count + 1))]
    first = scores.index(max(scores))
    return [(row, lines[row]) for row in rows[first : first + count]]


def matching_spans(line: str, query: str, language: str = ENGLISH) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the words in a line that share a term with the query."""
    words = analyzer(language)
    query_words = set(words.query_terms(query))
    for match in runs(line):
        if query_words.intersection(words.terms(match[0])):
            yield match.span()
