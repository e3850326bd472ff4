"""The MCP server, as the library's own client sees it: in this process, and over standard input and output.

python -m pytest tests/retrieval/test_search_mcp.py
"""

import asyncio
import builtins
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from indexed import SCRIPT, TEXTS, make_index
from mcp import StdioServerParameters
from mcp.client import Client

import search
from mlx_retrieval.inference import embedder
from mlx_retrieval.retrieval import search_mcp
from mlx_retrieval.retrieval.indexer import update
from mlx_retrieval.retrieval.search_mcp import create_server
from mlx_retrieval.retrieval.searcher import MODES, Searcher
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def index(small, tmp_path_factory) -> Path:
    return make_index(tmp_path_factory.mktemp("mcp"), small)


@pytest.fixture(scope="module")
def server(index) -> Any:
    return create_server(Searcher(index))


def talk(server: Any, work: Callable[[Client], Awaitable[Any]]) -> Any:
    """Return what `work` makes of a connected client."""

    async def main() -> Any:
        async with Client(server, read_timeout_seconds=120) as client:
            return await work(client)

    return asyncio.run(main())


def call(server: Any, name: str, **arguments: Any) -> dict[str, Any]:
    result = talk(server, lambda client: client.call_tool(name, arguments))
    assert not result.is_error, result.content
    return result.structured_content


def refused(server: Any, name: str, **arguments: Any) -> str:
    result = talk(server, lambda client: client.call_tool(name, arguments))
    assert result.is_error
    return result.content[0].text


def test_two_tools_that_read_only(server):
    tools = {tool.name: tool for tool in talk(server, lambda client: client.list_tools()).tools}
    assert set(tools) == {"search", "open"}
    assert all(tool.annotations.read_only_hint and tool.description for tool in tools.values())
    assert tools["search"].input_schema["required"] == ["query"]
    assert tools["open"].input_schema["required"] == ["path"]


@pytest.mark.parametrize("mode", MODES)
def test_hits_are_those_of_a_search(server, index, mode):
    expected = Searcher(index).search("read the boiler", mode, 2)
    found = call(server, "search", query="read the boiler", mode=mode, top=2)
    assert [(hit["path"], hit["line"]) for hit in found["hits"]] == [(hit.path, hit.line) for hit in expected]
    assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    assert found["root"] == str(index.parent / "tree")


def test_filters_and_what_is_not_found(server):
    found = call(server, "search", query="read", languages=["python"], paths=["src"])
    assert [hit["path"] for hit in found["hits"]] == ["src/reader.py"]
    assert call(server, "search", query="zebra", mode="bm25")["hits"] == []
    (hit,) = call(server, "search", query=SCRIPT, mode="bm25", paths=["odd.md"])["hits"]
    assert SCRIPT in hit["text"]


def test_what_was_found_can_be_opened(server, index):
    text = TEXTS["src/reader.py"].rstrip()
    for path in ("src/reader.py", str(index.parent / "tree" / "src" / "reader.py")):
        document = call(server, "open", path=path)
        assert (document["path"], document["next_passage"]) == ("src/reader.py", None)
        assert [passage["text"].rstrip() for passage in document["passages"]] == [text]


def test_a_long_file_is_read_in_parts(small, tmp_path, monkeypatch):
    """Every passage once, in order; a line is answered by the passage that holds it."""
    functions = "\n\n".join(f"def f{i}():\n    return {i}" for i in range(6))
    monkeypatch.setitem(TEXTS, "src/long.py", functions + "\n")
    monkeypatch.setattr(search_mcp, "LONGEST", 60)
    searcher = Searcher(make_index(tmp_path, small))
    everything = searcher.index.chunks_of("src/long.py")
    read, passage = [], 0
    while passage is not None:
        document = search_mcp.open_document(searcher, "src/long.py", passage=passage)
        assert len(document.passages) == 1 or sum(len(each.text) for each in document.passages) <= 60
        read += [each.text for each in document.passages]
        passage = document.next_passage
    assert read == [chunk.text for chunk in everything] and len(everything) > 1
    for chunk in everything:
        first = search_mcp.open_document(searcher, "src/long.py", line=chunk.end_line).passages[0]
        assert first.line == chunk.line


ROWS = "".join(json.dumps({"id": i, "text": f"drips {i} " * 40}) + "\n" for i in range(3))


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("manual.html", "".join(f"<h2>Part {i}</h2><p>{'It drips. ' * 20}</p>" for i in range(3)), False),
        ("rows.jsonl", ROWS, True),
        ("corpus.jsonl", ROWS.replace("id", "_id"), True),
    ],
)
def test_a_file_without_lines_or_with_long_ones_is_opened_at_its_beginning(small, tmp_path, name, content, documents):
    """Regression: "the passage with this line" was the last of those that begin there, so the last of a whole PDF."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / name).write_text(content)
    update(tmp_path / "tree", tmp_path / "index", embedder.load(small), 150, 20, documents=documents)
    searcher = Searcher(tmp_path / "index")
    path = searcher.index.known([])[0]
    texts = [chunk.text for chunk in searcher.index.chunks_of(path)]
    assert len(texts) > 2
    for line in (0, 1):
        document = search_mcp.open_document(searcher, path, line=line)
        assert [passage.text for passage in document.passages] == texts and document.next_passage is None
    hits = call(create_server(searcher), "search", query="drips", paths=[path])["hits"]
    assert sorted(hit["passage"] for hit in hits) == [*range(len(texts))]
    for hit in hits:
        passages = search_mcp.open_document(searcher, path, hit["line"], hit["passage"]).passages
        assert [passage.text for passage in passages] == texts[hit["passage"] :] and hit["text"] in passages[0].text
    with pytest.raises(UserError, match=f"has passages 0 to {len(texts) - 1}, and no passage {len(texts)}"):
        search_mcp.open_document(searcher, path, passage=len(texts))


def test_only_the_index_can_be_opened(server, index):
    secret = index.parent / "tree" / "later.md"
    secret.write_text("written after the index\n")
    for path in (
        "/etc/passwd",
        "../../etc/passwd",
        str(secret),
        "later.md",
        "src/../later.md",
        "' OR 1=1 --",
        "",
        "\0",
    ):
        assert "is not in the index" in refused(server, "open", path=path)
    assert "did you mean src/reader.py?" in refused(server, "open", path="src/readr.py")
    secret.unlink()


def test_mistakes_are_told_in_one_line(server):
    for words, arguments in (
        ("the query is empty", {"query": " "}),
        ("only stop words", {"query": "what is this", "mode": "bm25"}),
        ("did you mean python?", {"query": "read", "languages": ["pyton"]}),
    ):
        message = refused(server, "search", **arguments)
        assert words in message and "\n" not in message
    assert "mode" in refused(server, "search", query="a", mode="fuzzy")
    assert "top" in refused(server, "search", query="a", top=0)


def test_without_the_library_the_command_says_what_to_install(index, monkeypatch, capsys):
    imported = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "mcp":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert search.main(["mcp", "--index", str(index)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs the library mcp" in line and "pip install" in line


@pytest.mark.slow
def test_over_standard_input_and_output(index):
    """Nothing but the protocol is on standard output, while models are loaded too; closing the input ends it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    arguments = [str(ROOT / "search.py"), "mcp", "--index", str(index)]
    parameters = StdioServerParameters(command=sys.executable, args=arguments, env=environment)
    found = call(parameters, "search", query="read the boiler", top=2)
    expected = Searcher(index).search("read the boiler", top=2)
    assert [hit["path"] for hit in found["hits"]] == [hit.path for hit in expected]
    document = call(parameters, "open", path="docs/boiler.md")
    assert "hisses all night" in document["passages"][0]["text"]
