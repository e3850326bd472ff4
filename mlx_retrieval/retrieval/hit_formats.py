"""Show the hits of a search: for people, as JSON, or as grep does."""

import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_retrieval.retrieval.analyzer import ENGLISH
from mlx_retrieval.retrieval.base import Hit
from mlx_retrieval.retrieval.snippets import matching_spans, snippet
from mlx_retrieval.utils.errors import Place

FORMATS = ("text", "json", "grep")
FIELDS = ("path", "line", "end_line", "language", "kind", "name", "score", "text")  # of a hit, in JSON


def print_hits(hits: Sequence[Hit], query: str, root: Path, is_corpus: bool, language: str = ENGLISH) -> None:
    """Print path:line, score, name and two lines of each hit."""
    from rich.text import Text

    from mlx_retrieval.utils.console import console

    for hit in hits:
        place = hit.path if is_corpus else str(Place(_relative(root / hit.path), hit.line or None))
        console().print(
            Text.assemble((place, "cyan"), f"  {hit.score:.4f}", (f"  {hit.name}" if hit.name else "", "dim"))
        )
        rows = snippet(hit.text, query, language=language)
        lines = textwrap.dedent("\n".join(line for _, line in rows)).split("\n") if rows else []  # a chunk without text
        for (row, _), line in zip(rows, lines, strict=True):
            number = f"{line_of(hit, row):>6} " if hit.line and not is_corpus else ""
            text = Text(line.rstrip()[:160])
            for span in matching_spans(text.plain, query, language):
                text.stylize("bold yellow", *span)
            console().print(Text.assemble((f"{number:>7}", "dim"), text))
    if not hits:
        console().print("nothing found")


def grep_lines(hits: Sequence[Hit], query: str, root: Path, is_corpus: bool, language: str = ENGLISH) -> list[str]:
    """Return `path:line:text` of the line of each hit that holds most words of the query, for editors and scripts."""
    lines = []
    for hit in hits:
        ((row, line),) = snippet(hit.text, query, 1, language) or [(0, "")]
        place = hit.path if is_corpus else _relative(root / hit.path)
        number = hit.line + row if is_corpus else line_of(hit, row)
        lines.append(f"{place}:{number if hit.line else 1}:{line.rstrip()}")
    return lines


def line_of(hit: Hit, row: int) -> int:
    """Return the line of the file that has a row of a hit; of a row of a table, which is one line, always that."""
    return min(hit.line + row, hit.end_line)


def hits_to_json(hits: Sequence[Hit], query: str, mode: str, root: str) -> str:
    """Return the hits as one JSON object; `root`: what was searched, a folder or an address."""
    results = [{name: getattr(hit, name) for name in FIELDS} for hit in hits]
    return json.dumps({"mode": mode, "query": query, "root": root, "results": results}, ensure_ascii=False)


def highlighted(hit: Hit, query: str, language: str = ENGLISH) -> dict[str, Any]:
    """Return a hit for a page: its fields, its id, and what to show of its text.

    `best` are the two lines that hold most words of the query, [first, last] counted from 0; `spans` are the
    characters [start, end) of all words that match.
    """
    rows = [row for row, _ in snippet(hit.text, query, language=language)] or [0]
    spans = [list(span) for span in matching_spans(hit.text, query, language)]
    fields = {name: getattr(hit, name) for name in ("id", *FIELDS)}
    return fields | {"best": [rows[0], rows[-1]], "spans": spans}


def _relative(path: Path) -> str:
    """Return a path relative to the current folder if it is inside it."""
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)
