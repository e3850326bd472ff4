"""Flags of search.py that would have no effect are refused, and values out of range, before anything is loaded.

python -m pytest tests/retrieval/test_search_flags.py
"""

import json
from pathlib import Path

import pytest

import search
from mlx_retrieval.retrieval import base
from mlx_retrieval.retrieval.lance_index import Index


def refused(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """Return the only line that a command prints before it ends because of its flags."""
    with pytest.raises(SystemExit) as stopped:
        search.main(words)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("search q --rerank-depth 7", "--rerank-depth is for --rerank: leave out --rerank-depth"),
        ("serve --depth 7", "leave out --rerank-depth"),
        ("mcp --depth 7", "leave out --rerank-depth"),
        ("search q --bm25 --model m", "--bm25 needs no model: leave out --model-path"),
        ("search q --store es://docs --index i", "--store searches in Elasticsearch: leave out --index"),
        ("eval q --store es://docs --index i", "leave out --index"),
        ("tune q --store es://docs --index i", "leave out --index"),
        ("serve --store es://docs --index i", "leave out --index"),
        ("mcp --store es://docs --index i", "leave out --index"),
        ("eval q --overwrite", "--overwrite is for --output: leave out --overwrite"),
        ("eval q.jsonl --strict", "are for folders in BEIR layout: leave out --strict"),
        ("tune --forget --model m --strict", "no model and no questions: leave out --model-path, --strict"),
        ("tune q.jsonl --forget", "--forget: not allowed with argument QUERIES"),
        ("tune", "one of the arguments QUERIES --forget is required"),
        ("tune q.jsonl --strict --ignore-identical-ids", "leave out --strict, --ignore-identical-ids"),
    ],
)
def test_flags_without_effect_are_named(words, message, tmp_path, monkeypatch, capsys):
    """They were taken in silence."""
    monkeypatch.chdir(tmp_path)
    Path("q.jsonl").write_text('{"query": "q", "path": "a"}\n')
    line = refused(words.split(), capsys)
    assert line.startswith(f"search.py {words.split()[0]}: ") and line.endswith(message)


@pytest.mark.parametrize("command", ["search q", "serve", "mcp"])
def test_a_reranker_scores_at_least_one_hit(command, capsys):
    """Regression: an MCP server started, and then every search failed."""
    assert search.main([*command.split(), "--rerank", "nowhere", "--rerank-depth", "0"]) == 2
    assert capsys.readouterr().err == "search.py: --rerank-depth 0: at least 1\n"


def test_token_vectors_are_late_interaction_s(small, tmp_path, capsys):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a.md").write_text("It drips.\n")
    flags = ["--model", small, "--index", str(tmp_path / "index")]
    with pytest.raises(SystemExit):
        search.main(["index", str(tmp_path / "tree"), *flags, "--token-bits", "2", "--token-pooling", "2"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("is no late-interaction model: leave out --token-bits, --token-pooling")
    assert not (tmp_path / "index").exists()


def test_a_corpus_is_cut_with_documents_alone(small, tmp_path, capsys):
    """Without it, sizes and patterns did nothing, but another run with other ones was refused."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.jsonl").write_text(json.dumps({"_id": "d", "text": "It drips. " * 40}) + "\n")
    index = tmp_path / "index"
    words = ["index", str(tmp_path / "corpus"), "--model", small, "--index", str(index)]
    size = ["--chunk-size", "150", "--overlap", "20"]
    others = ["--exclude", "x", "--max-file-size", "9"]
    message = "documents of a corpus are indexed whole: leave out --chunk-size, --overlap, --max-file-size, --exclude"
    assert refused([*words, *size, *others], capsys).endswith(message)
    assert search.main(words) == 0 and Index.open(index).count() == 1
    info = json.loads((index / base.FILE).read_text())
    (index / base.FILE).write_text(json.dumps(info | {"max_characters": 150, "overlap": 20, "exclude": ["x"]}))
    assert search.main(words) == 0  # an index that a version before has made
    assert "--chunk-size" not in Index.open(index).command(small)
    assert search.main([*words, *size, "--documents", "--rebuild"]) == 0 and Index.open(index).count() == 3
    assert search.main([*words, *size]) == 0  # as the index was made
    capsys.readouterr()
    assert "leave out --chunk-size" in refused([*words, *size, "--no-documents", "--rebuild"], capsys)
