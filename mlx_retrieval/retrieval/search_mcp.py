"""An MCP server over standard input and output: coding assistants search an index, and open what was found.

    run(Searcher(".index"))

It has two tools, `search` and `open_`, which is called `open`. Both read the index alone, never a file of the disk. The
protocol has standard output for itself; the library sends what others print there to standard error.
"""

import threading
from collections.abc import Callable
from itertools import accumulate
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from mlx_retrieval.retrieval.base import Hit
from mlx_retrieval.retrieval.searcher import DEPTH, MODES, Searcher
from mlx_retrieval.retrieval.snippets import snippet
from mlx_retrieval.utils.errors import UserError, near_miss
from mlx_retrieval.utils.text import writable

LINES = 6  # of a chunk, in an answer of `search`
LONGEST = 40_000  # characters in an answer of `open`
MOST = 50  # hits of a search


class Found(BaseModel):
    """A hit."""

    path: str = Field(description="of the file, relative to the indexed folder, or a document's id; `open` takes it")
    line: int = Field(description="first line of the chunk; 0 = the file has no lines, as a PDF")
    end_line: int
    passage: int = Field(description="number of the chunk in its file; `open` takes it")
    name: str = Field(description="of the function or class, or the headings above; may be empty")
    score: float = Field(description="only to be compared within one search")
    text: str = Field(description=f"the {LINES} lines of the chunk that fit the query best")


class Hits(BaseModel):
    """The answer of `search`."""

    root: str = Field(description="the indexed folder, to which paths are relative, or the address of the documents")
    hits: list[Found] = Field(description="best first; empty = nothing was found")


class Passage(BaseModel):
    """A chunk of a file or document."""

    line: int
    end_line: int
    name: str
    text: str


class Document(BaseModel):
    """The answer of `open`."""

    path: str
    passages: list[Passage] = Field(description="the chunks of the file, in their order")
    next_passage: int | None = Field(description="open this passage for the rest; null = there is no more")


def create_server(searcher: Searcher, depth: int = DEPTH) -> Any:
    """Return the MCP server of a searcher. Raises UserError if the library is missing."""
    try:
        from mcp.server.mcpserver import MCPServer
        from mcp.server.mcpserver.exceptions import ToolError
        from mcp.types import ToolAnnotations
    except ImportError as error:
        raise UserError(f"the MCP server needs the library mcp ({error}): pip install -r requirements.txt") from error

    one_at_a_time = threading.Lock()

    def told(answer: Callable[[], Any]) -> Any:
        """Return an answer; the assistant is told the user's errors."""
        try:
            with one_at_a_time:
                searcher.refresh()
                return answer()
        except UserError as error:
            raise ToolError(str(error)) from error

    texts = "documents" if searcher.index.info.is_corpus else "source code and texts"
    about = f"Search the {texts} of {searcher.source} by meaning and by words."
    server = MCPServer("mlx-retrieval", instructions=about, log_level="WARNING")
    reads = ToolAnnotations(read_only_hint=True, open_world_hint=False)

    @server.tool(description=f"{about} Then call open with a hit's path and passage.", annotations=reads)
    def search(
        query: Annotated[str, Field(description="a question or words; nothing in it is an operator")],
        mode: Annotated[
            Literal[MODES], Field(description="semantic = by meaning, bm25 = by words, hybrid = both")
        ] = MODES[0],
        top: Annotated[int, Field(ge=1, le=MOST, description="maximum number of hits")] = 10,
        languages: Annotated[
            list[str], Field(description="only these, such as python, markdown or text; [] = all")
        ] = [],  # noqa: B006
        paths: Annotated[
            list[str], Field(description="only these files or folders; * and ? stand for any characters; [] = all")
        ] = [],  # noqa: B006
    ) -> Hits:
        def answer() -> Hits:
            hits = searcher.search(writable(query), mode, top, depth=depth, languages=languages, paths=paths)
            language = searcher.index.info.language
            return Hits(root=searcher.source, hits=[_found(hit, query, language) for hit in hits])

        return told(answer)

    reading = "Read an indexed file or document, from its beginning, a passage or a line on."

    @server.tool("open", description=reading, annotations=reads)
    def open_(
        path: Annotated[str, Field(description="as `search` gives it")],
        line: Annotated[int, Field(ge=0, description="read from the passage with this line; 0 = not by line")] = 0,
        passage: Annotated[int, Field(ge=0, description="read from this passage on, of a hit or next_passage")] = 0,
    ) -> Document:
        return told(lambda: open_document(searcher, path, line, passage))

    return server


def _found(hit: Hit, query: str, language: str) -> Found:
    text = "\n".join(line for _, line in snippet(hit.text, query, LINES, language))
    number = int(hit.id.removeprefix(hit.path).removeprefix("#") or 0)  # a document of Elasticsearch is one passage
    place = {"path": hit.path, "line": hit.line, "end_line": hit.end_line, "passage": number}
    return Found(**place, name=hit.name, score=hit.score, text=text)


def open_document(searcher: Searcher, path: str, line: int = 0, passage: int = 0) -> Document:
    """Return the passages of an indexed file from the one that holds a line on, or from a number above 0 on.

    They have at most LONGEST characters together, or are a single one. A file without lines begins with the first.

    Raises UserError if the index has no such file, or the file no such passage.
    """
    index, name = searcher.index, PurePath(path)
    inside = name.is_absolute() and not index.info.is_corpus and name.is_relative_to(index.root)
    chunks = index.chunks_of(name.relative_to(index.root).as_posix() if inside else path)
    if not chunks:
        near = "" if index.info.is_corpus else near_miss(path, index.known([path]))
        raise UserError(f"{path[:200]!r} is not in the index; `search` gives the paths that are{near}")
    if passage >= len(chunks):
        raise UserError(f"{path[:200]!r} has passages 0 to {len(chunks) - 1}, and no passage {passage}")
    lines = [chunk.line for chunk in chunks]
    first = passage or lines.index(max((start for start in lines if start <= line), default=lines[0]))
    lengths = accumulate(len(chunk.text) for chunk in chunks[first:])
    count = max(1, sum(length <= LONGEST for length in lengths))
    passages = [
        Passage(line=chunk.line, end_line=chunk.end_line, name=chunk.name, text=chunk.text)
        for chunk in chunks[first : first + count]
    ]
    return Document(
        path=chunks[0].path, passages=passages, next_passage=first + count if first + count < len(chunks) else None
    )


def run(searcher: Searcher, depth: int = DEPTH) -> None:
    """Answer an assistant until it closes standard input."""
    create_server(searcher, depth).run("stdio")
