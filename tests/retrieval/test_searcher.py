"""Searching: BM25 and fusion by hand, nothing in a query is syntax, and what the command prints.

python -m pytest tests/retrieval/test_searcher.py
"""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import search
from mlx_retrieval import backend
from mlx_retrieval.dataset.chunks import Chunk
from mlx_retrieval.inference import embedder
from mlx_retrieval.retrieval import base, lance_index
from mlx_retrieval.retrieval.analyzer import analyzer
from mlx_retrieval.retrieval.base import FileRecord, Hit, IndexInfo, Within
from mlx_retrieval.retrieval.fusion import fuse_ranks
from mlx_retrieval.retrieval.hit_formats import grep_lines, highlighted, print_hits
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.retrieval.searcher import MODES, Searcher
from mlx_retrieval.retrieval.snippets import matching_spans, snippet
from mlx_retrieval.utils.errors import UserError

TEXTS = {
    "reader.py": "def readLine(file):\n    # gives what comes before the end\n    return file.readline()\n",
    "read.txt": "read it and read it again\n",
    "boiler.md": "# Boiler\nIt drips, and hisses all night.\n",
    "bike.md": "# Bike\nThe chain squeaks or jumps.\n",
}


@pytest.fixture(scope="module")
def indexed(small, tmp_path_factory) -> tuple[Path, Path]:
    """(folder, its index), made by the command."""
    root = tmp_path_factory.mktemp("search") / "tree"
    root.mkdir()
    for name, text in TEXTS.items():
        (root / name).write_text(text)
    index = root.parent / "index"
    assert search.main(["index", str(root), "--model-path", small, "--index", str(index)]) == 0
    return root, index


@pytest.fixture(scope="module")
def searcher(indexed) -> Searcher:
    return Searcher(indexed[1])


def paths(hits: list[Hit]) -> list[str]:
    return [hit.path for hit in hits]


# --- modes ----------------------------------------------------------------------------------------------------------


def test_bm25_by_hand(tmp_path):
    """k1 = 1.2, b = 0.75, idf = ln(1 + (N - n + 0.5) / (n + 0.5)), also after additions and deletions."""
    texts = [
        "cat sat on the mat",
        "cat cat dog",
        "dog dog bird fish worm",
        "a bird",
        "the fish and the cat ran far away",
    ]
    index = Index.create(tmp_path / "index", IndexInfo("/", True, "", "", 4, 2_000, 200))
    for i, text in enumerate([*texts, "cat dog bird " * 5]):
        vector = np.eye(4, dtype=np.float32)[[i % 4]]
        index.add(
            [(FileRecord(f"d{i}", 1, 1, "", 1, ""), [Chunk(1, 1, "text", "document", "", "", text)])], vector, set()
        )
        index.finish()
    index.remove([f"d{len(texts)}"])
    index.finish()
    documents = [analyzer().terms(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)

    def score(document: list[str], query: str) -> float:
        total = 0.0
        for term in analyzer().terms(query):
            n, tf = sum(term in other for other in documents), document.count(term)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            total += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(document) / mean))
        return total

    for query in ("cat", "dog bird", "the fish"):
        expected = {f"d{i}": s for i, document in enumerate(documents) if (s := score(document, query)) > 0}
        assert {found.path: found.score for found in index.bm25(query, 10)} == pytest.approx(expected, rel=1e-4)
    assert paths(index.bm25("cats", 10)) == paths(index.bm25("cat", 10))  # English stems
    assert index.bm25("cat", 1) == index.bm25("cat", 10)[:1]


def test_bm25_finds_identifiers_by_their_words(searcher):
    for query in ("readLine", "read_line", "read line"):
        assert paths(searcher.search(query, "bm25"))[0] == "reader.py"
    assert paths(searcher.search("boiler", "bm25")) == ["boiler.md"]  # headings and file names count
    assert paths(searcher.search("reader", "bm25")) == ["reader.py"]
    assert "model" not in vars(searcher) and searcher.search("zebra", "bm25") == []


def test_bm25_needs_no_model(indexed, tmp_path, capsys):
    index = shutil.copytree(indexed[1], tmp_path / "index")
    about = json.loads((index / base.FILE).read_text())
    (index / base.FILE).write_text(json.dumps(about | {"model": str(tmp_path / "gone")}))
    assert paths(Searcher(index).search("boiler", "bm25")) == ["boiler.md"]
    with pytest.raises(UserError, match="no folder .*gone.*give the model.s new place with --model-path"):
        Searcher(index).search("boiler")
    assert len(Searcher(index, about["model"]).search("boiler", "semantic")) == 4
    (tmp_path / "queries.jsonl").write_text('{"query": "boiler", "path": "boiler.md"}\n')
    for command in (["search", "boiler"], ["eval", str(tmp_path / "queries.jsonl")]):
        assert search.main([*command, "--index", str(index)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]  # eval, tune, serve and mcp have no --bm25
        assert "new place with --model-path" in line and (", or search with --bm25" in line) == (command[0] == "search")


def test_semantic_is_the_cosine(searcher, indexed):
    rows = searcher.index.chunks.search().limit(None).to_list()
    for query in ("what drips at night", "chain"):
        vector = searcher.model.encode(query, prompt="query")
        cosines = {row["path"]: float(np.dot(row["vector"], vector)) for row in rows}
        hits = searcher.search(query, "semantic")
        assert {found.path: found.score for found in hits} == pytest.approx(cosines, abs=1e-5)
        assert paths(hits) == sorted(cosines, key=cosines.get, reverse=True)
        assert searcher.search(query, "semantic", top=2) == hits[:2]


def test_hybrid_fuses_both(searcher, indexed, capsys):
    query = "read the boiler"
    words, semantic = (searcher.search(query, mode, top=100) for mode in ("bm25", "semantic"))
    by_words, cosines = ({found.path: found.score for found in hits} for hits in (words, semantic))
    low, high = min(cosines.values()), max(cosines.values())
    most = max(by_words.values())
    expected = {
        path: 0.3 * (cosine - low) / (high - low) + 0.7 * by_words.get(path, 0) / most
        for path, cosine in cosines.items()
    }
    found = searcher.search(query, "hybrid", weight=0.3)
    assert {hit.path: hit.score for hit in found} == pytest.approx(expected, abs=1e-5)
    assert paths(found) == sorted(expected, key=expected.get, reverse=True)
    for weight in (0.0, 0.3, 1.0):
        assert searcher.search(query, "hybrid", weight=weight, fusion="ranks") == fuse_ranks(words, semantic, weight)
    assert searcher.search(query, "hybrid", top=1) == searcher.search(query, "hybrid")[:1]
    assert searcher.search(query) == searcher.search(query, "hybrid")  # the default
    for flags in (["--weight", "0.3"], ["--fusion", "ranks"]):
        assert search.main(["search", query, "--index", str(indexed[1]), "--bm25", *flags]) == 2
        assert f"{flags[0]} is for --hybrid" in capsys.readouterr().err


def test_chunks_that_are_named_are_scored_as_among_all(searcher):
    """What is missing in one search of hybrid: words as the index scores them, and cosines."""
    vector = searcher.model.encode("read the boiler", prompt="query")
    index, names = searcher.index, ("boiler.md#0", "read.txt#0")
    for search_in in (
        lambda *within: index.bm25("read the boiler", 10, *within),
        lambda *within: index.semantic(vector, 10, *within),
    ):
        everywhere = {hit.id: hit.score for hit in search_in()}
        found = {hit.id: hit.score for hit in search_in(Within(ids=names))}
        assert found == pytest.approx({name: everywhere[name] for name in names}, abs=1e-6)
        assert search_in(Within(ids=())) == []
        rows = tuple(hit.row for hit in search_in() if hit.id in names)
        assert {hit.id: hit.score for hit in search_in(Within(ids=names, rows=rows))} == pytest.approx(found, abs=1e-6)
        # Rows that are gone, or that became other chunks when the index was rebuilt meanwhile, are left out.
        assert [hit.id for hit in search_in(Within(ids=names[:1], rows=(*rows, 1 << 40)))] == [names[0]]


def test_an_index_keeps_its_own_weight(indexed, tmp_path):
    folder = shutil.copytree(indexed[1], tmp_path / "index")
    Index.open(folder).keep_weight(0.1)
    searcher = Searcher(folder)
    assert searcher.search("read the boiler", "hybrid") == searcher.search("read the boiler", "hybrid", weight=0.1)
    assert searcher.search("read the boiler", "hybrid") != searcher.search("read the boiler", "hybrid", weight=0.9)


def test_filters(searcher, indexed, capsys):
    def found(**filters):
        by_mode = {mode: set(paths(searcher.search("read the boiler", mode, **filters))) for mode in MODES}
        assert by_mode["bm25"] <= by_mode["semantic"] == by_mode["hybrid"]
        return by_mode["semantic"]

    assert found(languages=["python"]) == {"reader.py"}
    assert found(languages=["markdown", "text"]) == {"boiler.md", "bike.md", "read.txt"}
    assert found(paths=["*.md"]) == {"boiler.md", "bike.md"}
    assert found(paths=["b?ke.md", "./read.txt"]) == {"bike.md", "read.txt"}
    assert found(paths=["*.md"], languages=["python"]) == set()
    assert found(paths=["."]) == found(paths=["./"]) == set(TEXTS)
    for path in ("ike.md", "bike", "bike.m", str(indexed[0])):  # whole names, relative to the indexed folder
        for mode in MODES:
            with pytest.raises(UserError, match=f"--path {path}: no such file or folder in .*index, under .*tree"):
                searcher.search("read the boiler", mode, paths=[path])
    assert searcher.search("zebra", "bm25", paths=["bike.md"]) == []
    for mode in MODES:  # the others have hits, which hid it
        with pytest.raises(UserError, match=r"--path boyler\.md: no such file"):
            searcher.search("read the boiler", mode, paths=["*.md", "boyler.md"])
    assert search.main(["search", "boiler", "--index", str(indexed[1]), "--language", "pyton"]) == 2
    assert "there: markdown, python, text; did you mean python?" in capsys.readouterr().err


@pytest.mark.parametrize("mode", MODES)
def test_filters_that_have_hits_are_not_looked_up(searcher, monkeypatch, mode):
    """Regression: all chunks were read once for each path, and for the languages, in every search."""
    table, scans = type(searcher.index.chunks), []
    search_table, count_rows = table.search, table.count_rows

    def noting(self, query=None, *arguments, **options):
        scans.extend(["search"] if query is None else [])
        return search_table(self, query, *arguments, **options)

    monkeypatch.setattr(table, "search", noting)
    monkeypatch.setattr(table, "count_rows", lambda *arguments: (scans.append("count"), count_rows(*arguments))[1])
    query = "read the boiler and the bike"
    every = {"paths": ["b?ke.md", "boiler.*", "./read.txt", "*.py"], "languages": ["markdown", "python", "text"]}
    assert len(searcher.search(query, mode, **every)) == 4 and scans == []
    assert len(searcher.search(query, mode, top=1, paths=every["paths"])) == 1 and scans == ["search"]
    with pytest.raises(UserError, match=r"--path a\+\(\.md: no such file"):
        searcher.search(query, mode, paths=[*every["paths"], "a+(.md"])
    assert scans == ["search"] * 2


def test_a_query_of_stop_words_is_told(searcher):
    with pytest.raises(UserError, match=r"only stop words \(english\).*--semantic"):
        searcher.search("what is this", "bm25")
    assert len(searcher.search("what is this", "hybrid")) == 4  # by meaning alone


def test_a_query_of_a_megabyte_is_answered(searcher):
    text = "boiler " + " ".join(f"w{i}" for i in range(150_000))
    assert paths(searcher.search(text, "bm25"))[0] == "boiler.md"
    assert len(searcher.search(text, "hybrid")) == 4


def test_partitions_find_what_comparing_all_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(lance_index, "PARTITIONS_FROM", 400)
    monkeypatch.setattr(lance_index, "PARTITION_SIZE", 20)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((600, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = Index.create(tmp_path / "index", IndexInfo("/", True, "", "", 16, 2_000, 200))
    trained = []
    for first, last in ((0, 300), (300, 500), (500, 600)):
        files = [
            (FileRecord(f"d{i}", 1, 1, "", 1, ""), [Chunk(1, 1, "text", "document", "", "", f"text {i}")])
            for i in range(first, last)
        ]
        index.add(files, vectors[first:last], set())
        index.finish()
        trained.append(index.info.partitioned)
    assert trained == [0, 500, 500]
    assert index.chunks.index_stats("vector_idx").num_unindexed_rows == 0
    for query in vectors[::50] + 0.1:
        best = np.argsort(-vectors @ query)[:10]
        assert paths(index.semantic(query, 10)) == [f"d{i}" for i in best]
    monkeypatch.setattr(lance_index, "PROBES", 1)  # to see that there are several
    assert len(index.semantic(vectors[0], 600)) < 500


INJECTIONS = [
    '"',
    "'",
    '"read',
    "read AND boiler",
    "-read +boiler",
    "read*",
    "(read",
    "text:read",
    "read^2",
    "\\",
    "read~1",
]


@pytest.mark.parametrize(
    "query", [*INJECTIONS, "'; DROP TABLE chunks; --", "read' OR '1'='1", "[1, 2]", "été 🚲", "\0"]
)
def test_nothing_in_a_query_is_syntax(searcher, query):
    """BM25 finds exactly what the bare words find; hybrid and semantic take anything."""
    terms = analyzer("none").terms(query)
    plain = searcher.search(" ".join(terms), "bm25") if terms else []
    assert searcher.search(query, "bm25") == plain
    assert len(searcher.search(query, "semantic")) == len(searcher.search(query)) == 4
    assert searcher.index.chunks.count_rows() == 4


def test_operators_are_words(searcher):
    assert set(paths(searcher.search("boiler NOT squeaks", "bm25"))) == {"boiler.md", "bike.md"}
    assert paths(searcher.search("-boiler", "bm25")) == ["boiler.md"]


def test_bad_arguments(searcher):
    cases = {"the query is empty": ("  ",), "--top 0": ("a", "bm25", 0), "--weight 1.5": ("a", "hybrid", 1, 1.5)}
    for message, arguments in (cases | {"mode 'fuzzy'": ("a", "fuzzy")}).items():
        with pytest.raises(UserError, match=message):
            searcher.search(*arguments)


def test_a_model_that_was_trained_on_is_refused(indexed, small, tmp_path):
    other = shutil.copytree(small, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": "changed"}))
    with pytest.raises(UserError, match="other is another model than .*small-gemma.* --rebuild"):
        Searcher(indexed[1], str(other)).search("boiler")


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_places_and_snippets(indexed, capsys, monkeypatch):
    root, index = indexed
    monkeypatch.chdir(root.parent)
    assert search.main(["search", "drips night", "--bm25", "--index", str(index)]) == 0
    place, *lines = capsys.readouterr().out.splitlines()
    assert place.startswith("tree/boiler.md:1  ") and place.endswith("  Boiler")
    assert lines == ["     1 # Boiler", "     2 It drips, and hisses all night."]
    assert search.main(["search", "zebra", "--bm25", "--index", str(index)]) == 0
    assert capsys.readouterr().out == "nothing found\n"
    monkeypatch.chdir(index)
    search.main(["search", "drips", "--bm25", "--index", "."])
    assert capsys.readouterr().out.startswith(f"{root}/boiler.md:1  ")


def test_the_command_prints_as_grep_does(indexed, capsys, monkeypatch):
    root, index = indexed
    monkeypatch.chdir(root)
    flags = ["--bm25", "--format", "grep", "--index", str(index)]
    assert search.main(["search", "drips night", *flags]) == 0
    assert capsys.readouterr().out == "boiler.md:2:It drips, and hisses all night.\n"
    assert search.main(["search", "zebra", *flags]) == 1
    assert capsys.readouterr().out == ""
    assert search.main(["search", "zebra", "--bm25", "--json", "--index", str(index)]) == 0


def test_the_command_prints_json(indexed, searcher, capsys):
    for flags, mode in (([], MODES[0]), (["--semantic"], "semantic"), (["--bm25"], "bm25"), (["--hybrid"], "hybrid")):
        assert search.main(["search", "été boiler", "--json", "--top", "2", "--index", str(indexed[1]), *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["mode"], found["query"], found["root"]) == (mode, "été boiler", str(indexed[0]))
        hits = searcher.search("été boiler", mode, top=2)
        assert [row["path"] for row in found["results"]] == paths(hits)
        assert [row["score"] for row in found["results"]] == pytest.approx([h.score for h in hits], rel=1e-5)
        assert {"path", "line", "end_line", "kind", "name", "language", "score", "text"} == set(found["results"][0])


def test_the_command_prints_what_indexing_did(indexed, small, capsys):
    root, index = indexed
    (root / "photo.png").write_bytes(b"\0")
    flags = ["--model-path", small, "--index", str(index), "--exclude", "bike.*"]
    assert search.main(["index", str(root), *flags]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-8:])
    assert shown["files"] == "3" and shown["chunks"] == "3" and shown["removed"] == "1" and shown["unchanged"] == "3"
    assert shown["embedded"] == "0 chunks of 0 new or changed" and shown["next"].startswith("python search.py search ")
    (root / "photo.png").unlink()
    assert search.main(["index", str(root), *flags[:-2]]) == 0
    out = capsys.readouterr().out
    assert "left out" not in out and "1 chunk of 1 new or changed" in out


def test_an_unfinished_index_is_told(indexed, capsys, tmp_path):
    index = shutil.copytree(indexed[1], tmp_path / "index")
    about = json.loads((index / base.FILE).read_text())
    (index / base.FILE).write_text(json.dumps(about | {"complete": False}))
    assert search.main(["search", "boiler", "--bm25", "--index", str(index)]) == 0
    told = capsys.readouterr()
    assert "indexing was not finished" in told.err and "boiler.md" in told.out


def test_mistakes_are_one_line(tmp_path, small, indexed, capsys):
    (tmp_path / "file").write_text("x")
    cases = [
        (["search", "a", "--index", str(tmp_path / "none")], "python search.py index PATH --model-path MODEL --index "),
        (["search", "  ", "--index", str(indexed[1])], "the query is empty"),
        (["index", str(tmp_path / "none"), "--model-path", small], "no such folder"),
        (["index", str(tmp_path / "file"), "--model-path", small], "file: a file; give its folder"),
        (["index", str(tmp_path), str(tmp_path / "file"), "--model-path", small], "file: a file; give its folder"),
        (["index", str(tmp_path), "--model-path", str(tmp_path / "none")], "no folder"),
        (["index", str(tmp_path), "--model-path", small, "--overlap", "2000"], "--overlap 2000"),
        (["index", str(tmp_path), "--model-path", small, "--language", "german "], "did you mean german?"),
        (["eval", str(tmp_path / "none"), "--index", str(indexed[1])], "No such file"),
    ]
    for arguments, message in cases:
        assert search.main(arguments) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("search.py: ") and message in told


def test_half_a_surrogate_pair_in_ids_texts_and_queries(small, tmp_path, capsysbinary):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "corpus.jsonl").write_text(r'{"_id": "a\ud800", "title": "", "text": "whale \udc00"}')
    index = ["--index", str(tmp_path / "index")]
    assert search.main(["index", str(corpus), "--model-path", small, *index]) == 0
    capsysbinary.readouterr()
    for format in ([], ["--json"]):
        assert search.main(["search", "whale\udcff", *index, *format]) == 0
        out = capsysbinary.readouterr().out.decode()
        assert "a\ufffd" in out and "whale \ufffd" in out
    assert search.main(["index", str(corpus), "--model-path", small, "--index", str(tmp_path / "\udcff")]) == 2
    assert b"not a name in UTF-8" in capsysbinary.readouterr().err


def test_ctrl_c_says_how_to_go_on(monkeypatch, tmp_path, small, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "a.txt").write_text("text\n")
    monkeypatch.setattr(embedder.Model, "encode", stop)
    flags = ["index", str(tmp_path), "--model-path", small, "--index", str(tmp_path / "index")]
    assert search.main(flags) == 130
    assert "stopped; run the same command to continue" in capsys.readouterr().err


def test_help_is_quick_and_names_every_flag(run_python):
    code = "import sys, search\ntry: search.main([*sys.argv[1:], '--help'])\nexcept SystemExit: pass\n"
    slow = {"lancedb", "pyarrow", "mteb", "torch.nn", "transformers", "tree_sitter", "pathspec"}
    code += f"print('slow imports:', {slow} & set(sys.modules))"
    for command, flags in {
        "index": ("--model-path", "--chunk-size", "--overlap", "--max-file-size", "--exclude", "--rebuild"),
        "search": ("--hybrid", "--semantic", "--bm25", "--top", "--weight", "--json", "--model-path", "--path"),
        "eval": ("--weight", "--output", "--model-path", "--store"),
        "tune": ("--model-path", "--store"),
    }.items():
        shown = run_python(code, command)
        assert "slow imports: set()" in shown.stdout, shown
        assert all(flag in shown.stdout for flag in (*flags, "--index"))


def test_snippets_show_the_lines_with_most_words():
    text = "def f():\n\n    alpha = 1\n    beta = 2\n    gamma = 3\n"
    assert snippet(text, "beta gamma") == [(3, "    beta = 2"), (4, "    gamma = 3")]
    assert snippet(text, "zebra") == [(0, "def f():"), (2, "    alpha = 1")]
    assert snippet("one line", "zebra") == [(0, "one line")]
    assert list(matching_spans("def readLine(file):", "reads files")) == [(4, 12), (13, 17)]  # by stems
    assert list(matching_spans("def readLine(file):", "reads files", "none")) == []


def test_flags_have_the_spelling_of_other_commands():
    args = search.parser().parse_args(["search", "q", "--model", "m", "--top-n", "3", "--depth", "7"])
    assert (args.model_path, args.top, args.rerank_depth) == ("m", 3, 7)
    assert search.parser().parse_args(["index", ".", "--model", "m"]).model_path == "m"
    assert search.Searcher is Searcher and set(search.__all__) <= set(vars(search))


# --- reranking --------------------------------------------------------------------------------------------------------


class LastLetters:
    """A reranker that puts texts in the order of their last letters."""

    def __init__(self):
        self.asked: list[list[str]] = []

    def score(self, query: str, documents: list[str]) -> np.ndarray:
        self.asked.append(list(documents))
        return np.array([-ord(text.strip()[-1]) for text in documents], np.float32)


def test_a_reranker_orders_the_first_hits_anew(indexed):
    reranker = LastLetters()
    searcher = Searcher(indexed[1], reranker=reranker)
    first = searcher.index.bm25("read it hisses chain", 4)
    assert len(first) >= 3
    found = searcher.search("read it hisses chain", "bm25", top=2)
    expected = sorted(first, key=lambda hit: ord(hit.text.strip()[-1]))[:2]
    assert paths(found) == paths(expected)
    assert [hit.score for hit in found] == [-float(ord(hit.text.strip()[-1])) for hit in found]
    searcher.search("read it hisses chain", "bm25", top=1, depth=2)
    assert [len(documents) for documents in reranker.asked] == [len(first), 2]
    assert searcher.search("nowhere", "bm25") == []
    with pytest.raises(UserError, match="--rerank-depth 0"):
        searcher.search("read", "bm25", depth=0)


def test_hits_are_sorted_by_logits(indexed):
    """Of scores that a sigmoid makes 1, those with higher logits are first."""
    reranker = LastLetters()
    reranker.score_groups = lambda groups, raw: [1000 + raw * reranker.score(*group) for group in groups]
    reranker.activated = np.ones_like
    searcher = Searcher(indexed[1], reranker=reranker)
    found = searcher.search("read it hisses chain", "bm25", top=9)
    texts = [hit.text.strip()[-1] for hit in found]
    assert texts == sorted(texts) and {hit.score for hit in found} == {1.0}
    assert paths(found) == paths(Searcher(indexed[1], reranker=LastLetters()).search("read it hisses chain", "bm25"))
    assert paths(found) != paths(searcher.search("read it hisses chain", "bm25", rerank=False))


def test_a_hit_without_text_is_printed(capsys):
    """Regression, of a document of Elasticsearch: "ValueError: zip() argument 2 is longer than argument 1"."""
    empty = Hit("d#0", "d", 0, 0, "text", "", "", "", 0.5)
    print_hits([empty], "kettle", Path("/"), True)
    assert capsys.readouterr().out.split() == ["d", "0.5000"]
    assert grep_lines([empty], "kettle", Path("/"), True) == ["d:1:"] and highlighted(empty, "kettle")["best"] == [0, 0]


def test_the_command_reranks(indexed, tmp_path, capsys):
    from random_rerankers import cross_encoder

    cross_encoder("bert", tmp_path / "model")
    _, index = indexed
    command = [
        "search",
        "read it hisses chain",
        "--index",
        str(index),
        "--bm25",
        "--json",
        "--rerank",
        str(tmp_path / "model"),
    ]
    assert search.main(command) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    texts = [hit["text"] for hit in results]
    assert len(texts) >= 3 and [hit["score"] for hit in results] == sorted((h["score"] for h in results), reverse=True)
    assert search.main([*command[:-1], str(index / "nothing")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_a_searcher_answers_in_another_thread_than_it_was_made_in(indexed, monkeypatch):
    """Regression, as on GPUs: "There is no Stream(gpu, 0) in current thread"."""
    monkeypatch.setattr(backend, "COMPILED", False)
    searcher = Searcher(indexed[1])
    assert searcher.model.dimensions  # it is loaded here, and not used
    with ThreadPoolExecutor(1) as pool:
        hits = pool.submit(searcher.search, "the chain squeaks").result()
    assert paths(hits) == paths(searcher.search("the chain squeaks"))
