"""Untidy evaluation folders: evaluated as pytrec_eval and mteb do, counted in one line, refused if strict.

python -m pytest tests/evaluation/test_untidy_folders.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from beir_folders import WordCounts, write_folder
from mteb_folder import mteb_task

import eval as evaluation
import search
from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.beir import FolderRules
from mlx_retrieval.evaluation import index_search, mteb_tasks, retrieval
from mlx_retrieval.evaluation import tasks as evaluation_tasks
from mlx_retrieval.evaluation.index_search import Target
from mlx_retrieval.evaluation.reranking import evaluate_reranker
from mlx_retrieval.evaluation.results import Evaluation
from mlx_retrieval.evaluation.retrieval import evaluate
from mlx_retrieval.inference import embedder
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.retrieval.base import Hit
from mlx_retrieval.utils.errors import UserError


class Exact(WordCounts):
    """Multiples of 1/256: their products are exact, so that no order of sums decides between equal documents."""

    late = False
    config = RetrievalConfig()

    def encode(self, texts, prompt=None, show_progress=False):
        if not self.late:
            return np.round(super().encode(texts, prompt) * 256) / 256
        return [np.round(super(Exact, self).encode(text.split() or [""]) * 256) / 256 for text in texts]


class Overlap:
    """A reranker that counts the words that query and document share."""

    name = "overlap"

    def score_groups(self, groups):
        return [
            np.array([len({*query.split()} & {*text.split()}) for text in documents], float)
            for query, documents in groups
        ]


def edited(folder: Path, name: str, edit) -> None:
    path = folder / name
    rows = [edit(i, json.loads(line)) for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def untidy(words, tmp_path) -> Path:
    """`words`, as real folders are; every tenth document has only a title, and q1 to q9 the ids of documents."""
    folder = shutil.copytree(words, tmp_path / "untidy")
    edited(folder, "corpus.jsonl", lambda i, row: row | ({"title": row["text"], "text": None} if i % 10 == 3 else {}))
    ids = {f"q{i}": f"d{i + 40}" for i in range(1, 10)}
    edited(folder, "queries.jsonl", lambda i, row: row | {"_id": ids.get(row["_id"], row["_id"])})
    judged = [line.split("\t") for line in (folder / "qrels" / "test.tsv").read_text().splitlines()]
    judged = [[ids.get(query, query), document, grade] for query, document, grade in judged]
    judged += [["q20", "d20", "0"], ["q20", "d99", "1"], ["q21", "d21", "3"], ["q20", "d99", "2"], ["q22", "d22", "2"]]
    judged += [["q23", f"gone{i}", "2"] for i in range(12)] + [["gone", "d1", "1"]]
    (folder / "qrels" / "test.tsv").write_text("".join("\t".join(fields) + "\n" for fields in judged))
    return folder


RULES = (FolderRules(), FolderRules(ignore_identical_ids=True))


def by_hand(folder: Path, rules: FolderRules) -> dict[str, dict[str, float]]:
    """pytrec_eval's scores of every query, from a ranking and judgements made without the toolkit's readers."""
    corpus, queries = (
        [json.loads(line) for line in (folder / f"{stem}.jsonl").read_text().splitlines()]
        for stem in ("corpus", "queries")
    )
    qrels: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines():
        query, document, grade = line.split("\t")
        qrels.setdefault(query, {})[document] = int(grade)
    texts = [f"{row.get('title') or ''} {row['text'] or ''}".strip() for row in corpus]
    scores = Exact().encode([row["text"] for row in queries]) @ Exact().encode(texts).T
    run = {
        row["_id"]: {
            document["_id"]: float(score)
            for document, score in zip(corpus, line, strict=True)
            if not (rules.ignore_identical_ids and document["_id"] == row["_id"])
        }
        for row, line in zip(queries, scores, strict=True)
        if row["_id"] in qrels
    }
    return pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "P.1"}).evaluate(run)


@pytest.mark.parametrize("rules", RULES)
def test_figures_are_those_of_pytrec_eval(untidy, rules):
    """Bug guarded against: a public set with two assessors' grades could not be used at all."""
    ours = evaluate(Exact(), [str(untidy)], rules=rules)
    expected = by_hand(untidy, rules)
    names = {"ndcg_at_10": "ndcg_cut_10", "recall_at_100": "recall_100", "precision_at_1": "P_1"}
    for metric, name in names.items():
        scores = ours.per_query["untidy"][metric]
        assert scores == {query: figures[name] for query, figures in expected.items()} and len(scores) == 40
        assert ours.tasks["untidy"][metric] == round(np.mean(list(scores.values())), 5)
    assert ours.per_query["untidy"]["recall_at_100"]["q23"] < 0.2  # of 14 judged documents, 12 are never found


def test_ignoring_identical_ids_changes_the_figures(untidy):
    with_them, without = (evaluate(Exact(), [str(untidy)], rules=rules).tasks["untidy"] for rules in RULES)
    assert with_them != without
    again = evaluate(Exact(), [str(untidy)], rules=RULES[0]).tasks["untidy"]
    assert again == with_them  # the task that is kept for one rule does not serve the other


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("late", [False, True])
def test_figures_are_those_of_mteb(untidy, rules, late):
    model, task = Exact(dimensions=64), mteb_task(untidy)
    model.late, task.ignore_identical_ids = late, rules.ignore_identical_ids
    through_mteb = Evaluation("toy", {}, {}, {})
    retrieval.add_task(through_mteb, retrieval.searcher_for(model, "untidy"), mteb_tasks.MtebTask(task))
    direct = evaluate(model, [str(untidy)], rules=rules)
    assert replace(direct, digests=through_mteb.digests) == through_mteb


@pytest.mark.parametrize("first_stage", ["bm25", Exact()])
def test_rerankers_see_and_find_no_identical_id(untidy, first_stage):
    before, after = evaluate_reranker(Overlap(), [str(untidy)], first_stage, depth=20, rules=RULES[1])
    task = evaluation_tasks.load(untidy, RULES[1])
    kept = next(iter(task.first_stages.values()))
    assert all(query not in ranked for query, ranked in kept.ranked["test", "default"].items())
    assert after.per_query["untidy"]["recall_at_100"] == before.per_query["untidy"]["recall_at_100"]
    if first_stage != "bm25":
        assert before.tasks["untidy"] == evaluate(first_stage, [str(untidy)], rules=RULES[1]).tasks["untidy"]
    assert after.tasks != evaluate_reranker(Overlap(), [str(untidy)], first_stage, depth=20)[1].tasks


def test_one_line_counts_each_kind(untidy, capsys):
    for _ in range(2):  # it is not said again
        evaluate(Exact(), [str(untidy)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    qrels, corpus = "qrels/test.tsv", "corpus.jsonl"
    assert lines[0] == (
        f"{untidy} is not tidy (--strict refuses it): judgements that a later line replaces: 3 (first: {qrels}:121); "
        f"judged documents that are not in the corpus, so never found: 12 (first: {qrels}:126); "
        f"judgements of queries that are not in the queries file, so left out: 1 (first: {qrels}:138); "
        f"documents whose text is null, so read as their titles alone: 15 (first: {corpus}:4)"
    )
    assert lines[1].startswith(f"{untidy}: queries that have the id of a document: 9, with the same text: 0; that doc")
    assert "--ignore-identical-ids leaves it out" in lines[1]
    evaluate(Exact(), [str(untidy)], rules=RULES[1])
    assert "with the same text: 0; that document is left out of their results" in capsys.readouterr().err


def test_tidy_folders_say_nothing(words, capsys):
    beir._read.cache_clear()
    evaluate(Exact(), [str(words)])
    assert capsys.readouterr().err == ""


CORPUS = [{"_id": "d1", "title": "t", "text": "x"}, {"_id": "d2", "text": "y"}]
QUERIES = [{"_id": "q1", "text": "x"}, {"_id": "q2", "text": "y"}]
UNTIDY = {
    "another grade": (
        {"qrels": "q1\td1\t1\nq1\td1\t2\n"},
        "test.tsv:2: query q1 and document d1 have another judgement",
    ),
    "no document": ({"qrels": "q1\td1\t1\nq1\td9\t1\n"}, "test.tsv:2: the document d9 is not in the corpus"),
    "no query": ({"qrels": "q1\td1\t1\nq9\td1\t1\n"}, "test.tsv:2: the query q9 is not in the queries file"),
    "null": ({"corpus": [*CORPUS, {"_id": "d3", "title": "t", "text": None}]}, 'corpus.jsonl:3: the "text" is null'),
    "twice": ({"corpus": [*CORPUS, CORPUS[0]]}, "corpus.jsonl:3: the id d1 occurs twice"),
}


@pytest.mark.parametrize("case", UNTIDY)
def test_strict_rules_refuse_with_file_and_line(tmp_path, case):
    change, message = UNTIDY[case]
    files = {"corpus": CORPUS, "queries": QUERIES, "qrels": "q1\td1\t1\nq1\td1\t1\n"}
    folder, tidy = write_folder(tmp_path / "bad", **files | change), write_folder(tmp_path / "good", **files)
    strict = FolderRules(strict=True)
    assert beir.read_folder(tidy, strict) == beir.read_folder(tidy)
    assert evaluate(Exact(), [str(folder)]).tasks["bad"]
    for attempt in (
        lambda: evaluate(Exact(), [str(folder)], rules=strict),
        lambda: evaluate_reranker(Overlap(), [str(folder)], rules=strict),
        lambda: index_search.read_queries(folder, strict),
        lambda: beir.check_folders([str(folder)], strict),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        assert str(error.value).startswith(str(folder)) and message in str(error.value)
        assert str(error.value).endswith("(read without --strict)")


def test_index_search_follows_the_rules(tmp_path):
    """`search.py eval`: a query's own document is no hit, and missing documents are never found."""
    corpus = [*CORPUS, {"_id": "q1", "text": "x"}]
    folder = write_folder(tmp_path / "own", corpus, QUERIES, "q1\td1\t1\nq1\td1\t2\nq1\tgone\t1\nq9\td1\t1\n")
    hits = [Hit("0", "q1", 1, 1, "", "", "", "x", 1.0), Hit("1", "d1", 1, 1, "", "", "", "x", 0.5)]
    ranked = []
    for rules in RULES:
        (query,) = index_search.read_queries(folder, rules)
        assert query.targets == {Target("d1"): 2, Target("gone"): 1}
        ranked.append(list(index_search.rank(hits, query)))
    assert ranked == [["chunk 0", "answer d1"], ["answer d1"]]


def test_the_commands_have_the_flags(tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "own", [*CORPUS, {"_id": "q1", "text": "x"}], QUERIES, "q1\td1\t1\nq1\td9\t1\n")
    for run in (
        lambda: evaluation.main(["--model", "nowhere", "--eval-tasks", str(folder), "--strict"]),
        lambda: search.main(["eval", str(folder), "--index", "nowhere", "--strict"]),
    ):
        assert run() == 2 and "test.tsv:2: the document d9 is not in the corpus" in capsys.readouterr().err
    monkeypatch.setattr(embedder, "load", lambda *_, **__: Exact())
    figures = []
    for flags in ([], ["--ignore-identical-ids"]):
        output = tmp_path / f"results-{len(flags)}.json"
        assert evaluation.main(["--model", "m", "--eval-tasks", str(folder), "--output", str(output), *flags]) == 0
        figures.append(json.loads(output.read_text())["tasks"]["own"]["mrr_at_10"])
    assert figures == [0.5, 1.0]  # q1 finds the document q1 before d1, which also has a title
