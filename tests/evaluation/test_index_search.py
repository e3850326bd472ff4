"""The figures of a search: by hand for small rankings, equal to eval.py's for a BEIR folder.

python -m pytest tests/evaluation/test_index_search.py
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import search
from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.evaluation import index_answers, index_search, retrieval
from mlx_retrieval.evaluation.index_search import Query, Target, differences, evaluate, figures_of, rank, read_queries
from mlx_retrieval.evaluation.results import compare
from mlx_retrieval.inference import embedder
from mlx_retrieval.retrieval import lance_tables
from mlx_retrieval.retrieval.base import Hit
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.retrieval.searcher import Searcher
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
TOPICS = ("boiler drips", "bike chain", "kettle hiss", "lamp flickers", "radio hums", "door creaks")


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def beir(tmp_path_factory) -> Path:
    """24 documents, 12 queries; some judged 2."""
    root = tmp_path_factory.mktemp("beir") / "task"
    corpus = [{"_id": f"d{i}", "title": "", "text": f"{TOPICS[i % 6]} in case {i}"} for i in range(24)]
    queries = [{"_id": f"q{i}", "text": f"my {TOPICS[i % 6]} again, case {i}"} for i in range(12)]
    write_jsonl(root / "corpus.jsonl", corpus)
    write_jsonl(root / "queries.jsonl", queries)
    (root / "qrels").mkdir()
    judged = "".join(f"q{i}\td{i}\t{1 + i % 2}\nq{i}\td{i + 6}\t1\nq{i}\td{(i + 1) % 24}\t0\n" for i in range(12))
    (root / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return root


@pytest.fixture(scope="module")
def searcher(beir, small) -> Searcher:
    index = beir.parent / "index"
    assert search.main(["index", str(beir), "--model-path", small, "--index", str(index)]) == 0
    return Searcher(index)


class Fixed:
    """An index whose answers are written down."""

    info = SimpleNamespace(weight=None, impute=0)

    def __init__(self, bm25: list[Hit], semantic: list[Hit]):
        self._bm25, self._semantic = bm25, semantic

    def bm25(self, query: str, top: int, within=None) -> list[Hit]:
        return self._bm25

    def semantic(self, vector, top: int, within=None) -> list[Hit]:
        return self._semantic


def hit(path: str, line: int, end_line: int) -> Hit:
    return Hit(f"{path}:{line}", path, line, end_line, "", "", "", "", 0.0)


def test_figures_by_hand(small):
    model = embedder.load(small)
    wrong, half, answer = hit("b.py", 1, 9), hit("a.py", 1, 10), hit("a.py", 8, 20)
    index = Fixed([wrong, half, answer], [answer, wrong])
    queries = [Query("by line", {Target("a.py", 15): 1}), Query("by file", {Target("a.py"): 1})]
    queries.append(Query("never", {Target("c.py"): 1}))
    by_ranks = evaluate(index, model, queries, fusion="ranks")
    figures = {mode: result.per_query["queries"] for mode, result in by_ranks.items()}
    first, second, third = (figures["bm25"]["ndcg_at_10"][f"q{i}"] for i in range(3))
    assert (first, second, third) == pytest.approx((1 / math.log2(4), 1 / math.log2(3), 0))
    assert figures["bm25"]["mrr_at_10"] == pytest.approx({"q0": 1 / 3, "q1": 1 / 2, "q2": 0})
    assert figures["bm25"]["precision_at_1"] == {"q0": 0, "q1": 0, "q2": 0}
    assert figures["semantic"]["precision_at_1"] == {"q0": 1, "q1": 1, "q2": 0}
    # Fused: answer 1/63 + 1/61, wrong 1/61 + 1/62, half 1/62.
    assert figures["hybrid"]["mrr_at_10"] == pytest.approx({"q0": 1 / 2, "q1": 1 / 2, "q2": 0})
    averages = {mode: result.tasks["queries"]["mrr_at_10"] for mode, result in by_ranks.items()}
    assert averages == pytest.approx({"bm25": 5 / 18, "semantic": 2 / 3, "hybrid": 1 / 3})
    assert evaluate(Fixed([], []), model, queries)["hybrid"].tasks["queries"]["ndcg_at_10"] == 0


def test_several_chunks_of_an_answer_count_once():
    """Of a line in two overlapping chunks, and of a file in many: otherwise nDCG could not reach 1."""
    hits = [hit("a.py", 1, 10), hit("a.py", 8, 20), hit("b.py", 1, 5)]
    assert rank(hits, Query("q", {Target("a.py", 9): 1})) == {"answer a.py:9": 0.0, "chunk b.py:1": -1.0}
    assert rank(hits, Query("q", {Target("a.py"): 1})) == {"answer a.py": 0.0, "chunk b.py:1": -1.0}
    both = rank(hits, Query("q", {Target("a.py", 15): 1, Target("b.py"): 1}))
    assert both == {"chunk a.py:1": 0.0, "answer a.py:15": -1.0, "answer b.py": -2.0}


def test_several_answers_in_a_chunk_are_all_found_there():
    """The first alone was credited, so that the nDCG of a perfect search was 0.61, and never more."""
    hits = [hit("a.py", 1, 40), hit("b.py", 1, 5)]
    query = Query("q", {Target("a.py", 10): 1, Target("a.py", 30): 2, Target("b.py"): 1})
    assert rank(hits, query) == {"answer a.py:30": 0.0, "answer a.py:10": -1.0, "answer b.py": -2.0}
    assert figures_of("", [query], [hits]).tasks["queries"]["ndcg_at_10"] == pytest.approx(1)
    overlapping = [hit("a.py", 1, 20), hit("a.py", 5, 40)]  # the second repeats one and has another
    assert list(rank(overlapping, query)) == ["answer a.py:10", "answer a.py:30"]


def test_semantic_figures_are_those_of_eval(searcher, beir):
    """mteb searches exhaustively with the same model over the same folder."""
    results = evaluate(searcher.index, searcher.model, read_queries(beir))
    expected = retrieval.evaluate(searcher.model, [str(beir)])
    scores, wanted = results["semantic"].per_query["queries"], expected.per_query["task"]
    for metric in index_search.SHOWN:
        assert sorted(scores[metric].values()) == pytest.approx(sorted(wanted[metric].values()), abs=1e-6)
    assert results["bm25"].tasks["queries"]["precision_at_1"] == 1.0  # "case 7" is in one document alone


def test_differences_are_those_of_compare(searcher, beir):
    results = evaluate(searcher.index, searcher.model, read_queries(beir))
    compared = differences(results)
    for mode in ("semantic", "hybrid"):
        for metric, old, new, change, low, high in compare(results["bm25"], results[mode]):
            assert compared[mode][metric] == (change, low, high) and change == pytest.approx(new - old)
            assert low <= change <= high


def test_the_command_evaluates(searcher, beir, tmp_path, capsys):
    rows = [{"query": "boiler drips in case 0", "path": "d0"}, {"query": "case 7", "relevant": ["d7", "gone"]}]
    queries, output = write_jsonl(tmp_path / "queries.jsonl", rows), tmp_path / "figures.json"
    flags = ["--index", str(searcher.index.folder), "--output", str(output), "--overwrite"]
    assert search.main(["eval", queries, *flags]) == 0
    told = capsys.readouterr()
    assert "1 of the answers is not in" in told.err and "no search finds gone" in told.err and "2 queries" in told.out
    names = [line.split()[0] for line in told.out.splitlines() if line.startswith((" P@1", " MRR", " nDCG"))]
    assert names == ["P@1", "MRR@10", "nDCG@10"] * 3  # figures, differences to bm25 and to semantic
    found = json.loads(output.read_text())
    assert found["queries"] == 2 and found["bm25"]["precision_at_1"] == 1.0
    assert found["bm25"]["ndcg_at_10"] == pytest.approx((1 + 1 / (1 + 1 / math.log2(3))) / 2)
    assert set(found["to_bm25"]["hybrid"]["mrr_at_10"]) == {"difference", "low", "high"}
    assert set(found["to_semantic"]) == {"hybrid"}
    assert search.main(["eval", str(beir), *flags]) == 0
    assert "12 queries" in capsys.readouterr().out and json.loads(output.read_text())["queries"] == 12


def test_ids_with_colons_are_no_lines():
    queries = [Query("q", {Target("d", 2): 1}), Query("q", {Target("a.py", 3): 1}), Query("q", {Target("b", 1): 1})]
    resolved, missing, *_ = index_answers.resolve(queries, ["d:2", "a.py"])
    assert [list(query.targets) for query in resolved] == [[Target("d:2")], [Target("a.py", 3)], [Target("b", 1)]]
    assert missing == ["b"] and index_answers.wanted(queries) == ["d", "d:2", "a.py", "a.py:3", "b", "b:1"]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("area.py", "src/shapes/area.py"),
        ("shapes/area.py", "src/shapes/area.py"),
        ("./src/shapes/area.py", "src/shapes/area.py"),
        ("checkout/src/shapes/area.py", "src/shapes/area.py"),
        ("/home/me/checkout/src/shapes/area.py", "src/shapes/area.py"),
        ("src/src/shapes/area.py", "src/shapes/area.py"),  # in a checkout named as its package
        ("a/src/shapes/area.py", None),  # where it would be in the index, whose folder a has none
        ("b/b/lines.py", None),  # of a folder of the index that has none
        ("pes/area.py", None),  # part of a name
        ("other/area.py", None),
        ("lines.py", None),  # twice
        ("b/lines.py", "b/lines.py"),
        ("repo/docs/README.md", "docs/README.md"),  # and not README.md
    ],
)
def test_paths_match_by_their_ends(name, answer):
    """Regression: foo/foo/core.py, of a package foo in a checkout foo, was not foo/core.py."""
    paths = ["src/shapes/area.py", "a/lines.py", "b/lines.py", "b/b/words.py", "README.md", "docs/README.md"]
    resolved, missing, ambiguous, _ = index_answers.resolve([Query("q", {Target(name, 7): 1})], paths)
    assert list(resolved[0].targets) == [Target(answer or name, 7)] and missing == [name] * (answer is None)
    assert ambiguous == ({"lines.py": ["a/lines.py", "b/lines.py"]} if name == "lines.py" else {})


def test_a_table_of_zeros_is_refused(searcher, tmp_path, capsys):
    """Regression: questions whose paths were written from another folder got one, with exit code 0."""
    rows = [{"query": "boiler drips in case 0", "path": "texts/d0.txt"}, {"query": "case 7", "path": "d7.txt"}]
    queries, index = write_jsonl(tmp_path / "queries.jsonl", rows), str(searcher.index.folder)
    for command in ("eval", "tune"):
        assert search.main([command, queries, "--index", index]) == 2
        told = capsys.readouterr()
        assert "none of the answers, such as texts/d0.txt, is in" in told.err and "the index holds d0" in told.err
        assert not told.out


@pytest.fixture(scope="module")
def files(small, tmp_path_factory) -> str:
    """The index of a tree: a page at the top, a folder of pages, and a file without lines."""
    root = tmp_path_factory.mktemp("files")
    texts = {
        "README.md": "# Boiler\n\nIt drips.\n",
        "docs/bike.md": "# Bike\n\nIt squeaks.\n",
        "lamp.html": "<p>Dim.</p>",
    }
    for name, text in texts.items():
        (root / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "tree" / name).write_text(text)
    assert search.main(["index", str(root / "tree"), "--model-path", small, "--index", str(root / "index")]) == 0
    return str(root / "index")


def test_a_missing_file_of_a_folder_is_not_one_further_out(files, tmp_path, capsys):
    """Regression: docs/README.md, which is not in the index, counted as README.md, and nobody was told."""
    rows = [{"query": "boiler", "path": "docs/README.md"}, {"query": "bike", "path": "checkout/docs/bike.md"}]
    rows.append({"query": "boiler drips", "path": "checkout/README.md", "line": 1})
    assert search.main(["eval", write_jsonl(tmp_path / "queries.jsonl", rows), "--index", files]) == 0
    told = capsys.readouterr().err
    assert "1 of the answers is not in" in told and "no search finds docs/README.md\n" in told
    assert "2 of the answers are written from another folder than" in told
    assert "checkout/docs/bike.md is taken for docs/bike.md\n" in told


@pytest.mark.parametrize(("path", "line"), [("README.md", 99), ("lamp.html", 1)])
def test_a_line_that_no_chunk_has_is_told(files, tmp_path, capsys, path, line):
    """Regression: a table of zeros, with exit code 0."""
    rows = [{"query": "boiler", "path": path, "line": line}]
    queries, told = tmp_path / "queries.jsonl", f"{path}:{line} (no chunk has this line)"
    assert search.main(["eval", write_jsonl(queries, rows), "--index", files]) == 2
    assert f"none of the answers, such as {told}, is in" in capsys.readouterr().err
    assert search.main(["eval", write_jsonl(queries, [*rows, {"query": "dim", "path": path}]), "--index", files]) == 0
    error = capsys.readouterr().err
    assert "1 of the answers is not in" in error and f"no search finds {told}\n" in error


def test_the_lines_of_all_answers_are_read_together(files, monkeypatch):
    """Regression: all chunks were searched once for each file, and the texts of those found were kept."""
    index, columns = Index.open(files), []
    table = type(index.chunks)
    search_table = table.search

    def noting(self, *query, **options):
        columns.append([])
        builder = search_table(self, *query, **options)
        select = builder.select
        builder.select = lambda names: (columns[-1].extend(names), select(names))[1]
        return builder

    answers = [Target("README.md", 1), Target("README.md", 99), Target("docs/bike.md", 3), Target("lamp.html", 1)]
    monkeypatch.setattr(index, "known", lambda wanted: ["README.md", "docs/bike.md", "lamp.html"])
    monkeypatch.setattr(table, "search", noting)
    _, (note,) = index_answers.checked([Query("q", dict.fromkeys(answers, 1))], index)
    assert note.startswith("2 of the answers are not in") and columns == [["path", "line", "end_line"]]
    monkeypatch.setattr(lance_tables, "PATHS_AT_ONCE", 2)
    lines = {"README.md": [range(1, 4)], "docs/bike.md": [range(1, 4)], "lamp.html": [range(1)]}
    assert index.lines_of([*lines, "gone.md"]) == lines and len(columns) == 3


def test_questions_that_stand_in_a_document_are_pointed_out(searcher, tmp_path, capsys):
    rows = [{"query": "Bike chain in CASE 7?", "path": "d7"}, {"query": "chain of a bike", "path": "d1"}]
    rows.append({"query": "boiler drips", "path": "d0"})  # so short that it means nothing
    queries = write_jsonl(tmp_path / "queries.jsonl", rows)
    assert search.main(["eval", queries, "--index", str(searcher.index.folder)]) == 0
    told = capsys.readouterr().err
    assert (
        "1 of 3 questions stand word by word in an indexed document" in told and "'Bike chain in CASE 7?' in d7" in told
    )


def test_the_questions_about_this_repository_have_answers_in_it():
    queries = read_queries(ROOT / "eval-data" / "this-repository.jsonl")
    paths = [file.path for file in file_tree.walk(ROOT, exclude=["adapters"]).files]
    _, missing, ambiguous, renamed = index_answers.resolve(queries, paths)
    assert (len(queries), missing, ambiguous, renamed) == (40, [], {}, {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "broken JSON"),
        ("[]", "not a JSON object"),
        ('{"query": " ", "path": "a"}', '"query" is missing'),
        ('{"query": "q"}', 'neither "path" nor "relevant"'),
        ('{"query": "q", "relevant": []}', 'neither "path" nor "relevant"'),
        ('{"query": "q", "relevant": [1]}', 'neither "path" nor "relevant"'),
        ('{"query": "q", "path": "a", "line": 0}', '"line" 0 is not a line number'),
        ('{"query": "q", "path": "a", "line": true}', '"line" True is not a line number'),
        ("", "no query in it"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    path = tmp_path / "queries.jsonl"
    path.write_text('\n{"query": "good", "path": "a"}\n' * bool(row) + row + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_queries(path)
    assert f"{path}:3: " in str(caught.value) or not row


def test_folder_is_read_again_when_a_file_changes(beir, tmp_path):
    """Regression: its first state was kept as long as the process lived."""
    folder = shutil.copytree(beir, tmp_path / "copy")
    count = len(read_queries(folder))
    lines = (folder / "qrels" / "test.tsv").read_text().splitlines(keepends=True)
    (folder / "qrels" / "test.tsv").write_text("".join(lines[:-3]))
    assert len(read_queries(folder)) == count - 1  # a query has three lines


def test_rows_become_queries(tmp_path):
    rows = [{"query": "a", "path": "x.py"}, {"query": "b", "path": "x.py", "line": 3, "path_of": "unknown keys"}]
    rows.append({"query": "c", "relevant": ["x.py:7", "d1", "odd:0"]})
    assert read_queries(write_jsonl(tmp_path / "q.jsonl", rows)) == [
        Query("a", {Target("x.py"): 1}),
        Query("b", {Target("x.py", 3): 1}),
        Query("c", {Target("x.py", 7): 1, Target("d1"): 1, Target("odd:0"): 1}),
    ]
