"""Comparing models and files of results: `eval.py --compare`.

python -m pytest tests/evaluation/test_comparison.py
"""

import dataclasses
import json
import re

import numpy as np
import pytest
from beir_folders import WordCounts, write_folder

import eval as evaluation
from mlx_retrieval.evaluation import comparison, results
from mlx_retrieval.evaluation.comparison import compare_with_first, judge, read_evaluation
from mlx_retrieval.evaluation.results import METRICS, Evaluation
from mlx_retrieval.evaluation.retrieval import best_documents, evaluate, load_tasks


def by_hand(name: str, scores: list[float], task: str = "task", digest: str = "x") -> Evaluation:
    """An evaluation whose four metrics are alike, of queries q0, q1 ..."""
    by_query = {f"q{i}": float(score) for i, score in enumerate(scores)}
    figures = dict.fromkeys(METRICS, round(float(np.mean(scores)), 5))
    return Evaluation(name, {task: figures}, {task: dict.fromkeys(METRICS, by_query)}, {}, {}, {task: digest})


LEVEL = [0.5] * 20
UP, DOWN = [0.6] * 15 + [0.5] * 5, [0.4] * 15 + [0.5] * 5  # intervals: well clear of zero
MIXED = [0.9] * 10 + [0.2] * 10


@pytest.mark.parametrize(
    ("scores", "verdict", "sentence"),
    [
        (UP, "better", r"b is better than a: nDCG@10 \+0.0750, 95 % interval \+0.05\d* to \+0.09\d*, 20 queries"),
        (DOWN, "worse", r"b is worse than a: nDCG@10 -0.0750, 95 % interval -0.09\d* to -0.05\d*, 20 queries"),
        (MIXED, "no difference shown", r"no difference shown between b and a: nDCG@10 \+0.0500, .*, 20 queries"),
        (LEVEL, "no difference shown", r"no difference shown between b and a: nDCG@10 \+0.0000, .* \+0.0000 to .*"),
    ],
)
def test_verdicts(scores, verdict, sentence):
    (result,) = compare_with_first(["a", "b"], [by_hand("A", LEVEL), by_hand("B", scores)])
    assert result.verdict == verdict
    assert re.fullmatch(sentence, result.sentence)
    assert result.rows == results.compare(by_hand("A", LEVEL), by_hand("B", scores))


def test_an_interval_that_touches_zero_shows_nothing():
    assert judge(("ndcg_at_10", 0.5, 0.6, 0.1, 0.0, 0.2), 100) == "no difference shown"
    assert judge(("ndcg_at_10", 0.5, 0.4, -0.1, -0.2, 0.0), 100) == "no difference shown"
    assert judge(("ndcg_at_10", 0.5, 0.6, 0.1, 1e-9, 0.2), 100) == "better"


def test_a_handful_of_queries_shows_nothing():
    """All of five queries gain as much: the interval is a point, and chance alone does that once in sixteen times."""
    few, enough = (compare_with_first(["a", "b"], [by_hand("", [0] * n), by_hand("", [1] * n)])[0] for n in (5, 6))
    assert few.verdict == "no difference shown" and few.sentence.endswith("5 queries, too few: 6 are needed")
    assert enough.verdict == "better"


def test_every_other_model_is_compared_with_the_first():
    names = ["a", "b", "c"]
    for result in (compare_with_first(names, [by_hand("", scores) for scores in (LEVEL, UP, DOWN)]),):
        assert [r.verdict for r in result] == ["better", "worse"]
        assert all(" than a: " in r.sentence for r in result)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path):
    """Write an evaluation, or any record, as `--output` does; return its path."""

    def write(name: str, record) -> str:
        file = tmp_path / name
        file.write_text(json.dumps(record.to_json() if isinstance(record, Evaluation) else record))
        return str(file)

    return write


def test_results_are_read_as_they_were_written(save, words, tmp_path):
    whole = evaluate(WordCounts(name="m"), [str(words)])
    assert read_evaluation(comparison.Path(save("one.json", whole))) == whole
    (tmp_path / "before.json").write_text(json.dumps(dataclasses.asdict(whole)))  # as a training run writes it
    assert read_evaluation(tmp_path / "before.json") == whole


def test_files_are_compared_without_a_model(save, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison.embedder, "load", lambda *_: pytest.fail("a model was loaded"))
    one, two, three = (save(f"{n}.json", by_hand(n, s)) for n, s in (("one", LEVEL), ("two", UP), ("three", MIXED)))
    output = tmp_path / "comparison.json"
    assert evaluation.main(["--compare", one, two, three, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "task: 20 queries, differences to the first model" in out
    lines = out.splitlines()
    assert lines[-2].startswith(f"{two} is better than {one}: nDCG@10 +0.0750, 95 % interval +0.0")
    assert lines[-1].startswith(f"no difference shown between {three} and {one}: nDCG@10 +0.0500")
    record = json.loads(output.read_text())
    assert record["first"] == one and [model["name"] for model in record["models"]] == [one, two, three]
    assert record["models"][1]["per_query"]["task"]["ndcg_at_10"]["q0"] == 0.6
    assert [c["verdict"] for c in record["comparisons"]] == ["better", "no difference shown"]
    rows = results.compare(by_hand("", LEVEL), by_hand("", UP))
    assert record["comparisons"][0]["metrics"]["mrr_at_10"]["low"] == rows[1][4]
    assert evaluation.main(["--compare", str(output), one]) == 2  # not the results of one model
    assert "a comparison of several models" in capsys.readouterr().err


def test_the_table_of_every_task_and_of_all(save, capsys):
    pair = []
    for name, shift in (("one", 0.0), ("two", 0.1)):
        a, b = by_hand(name, [0.5 + shift] * 20, "a"), by_hand(name, [0.3 + shift] * 10, "b")
        both = Evaluation(name, a.tasks | b.tasks, a.per_query | b.per_query, {})
        pair.append(save(f"{name}.json", both))
    assert evaluation.main(["--compare", *pair]) == 0
    out = capsys.readouterr().out
    titles = [line.split(":")[0] for line in out.splitlines() if "queries, differences" in line]
    assert titles == ["a", "b", "a, b"]
    figures = [line.split()[-5:] for line in out.splitlines() if "nDCG@10" in line and "[" in line]
    assert [row[1:3] for row in figures] == [["0.6000", "+0.1000"], ["0.4000", "+0.1000"], ["0.5000", "+0.1000"]]


def wrong_files(save) -> list[tuple[list[str], str]]:
    one = save("one.json", by_hand("one", LEVEL))
    old = by_hand("old", LEVEL).to_json()
    del old["per_query"]
    broken = by_hand("broken", LEVEL).to_json() | {"per_query": {"task": {"ndcg_at_10": {"q0": 1.0}}}}
    nan = by_hand("nan", [float("nan")] * 6)
    return [
        ([one], "at least two models or files"),
        ([one, save("less.json", by_hand("", LEVEL[1:]))], "less.json: task has other queries than in"),
        ([one, save("other.json", by_hand("", LEVEL, "b"))], "other.json: evaluated on b, and "),
        ([one, save("data.json", by_hand("", LEVEL, digest="y"))], "data.json: task has other texts or judgements"),
        ([one, save("old.json", old)], "old.json: without the score of each query"),
        ([one, save("broken.json", broken)], "broken.json: not as eval.py --output writes it"),
        ([one, save("nan.json", nan)], "nan.json: not as eval.py --output writes it"),
        ([one, save("text.json", "text")], "text.json: no results of eval.py --output"),
        ([one, save("none.json", {"model": "m", "tasks": {}})], "none.json: no results of eval.py --output"),
        ([one, "no-such-file.json"], "--compare no-such-file.json: no such file"),
        ([one, one, "--eval-tasks", "eval-data"], "--eval-tasks: files of results are compared on the tasks"),
        ([one, one, "--depth", "5"], "--first-stage, --depth and --language are for rerankers"),
        ([one, one, "--precision", "int8", "--adapter", "a"], "--adapter and --precision: not with --compare"),
        ([one, one, "--task", "late"], "--task: not with --compare"),
        ([one, one, "--max-length", "9", "--query-max-length", "9"], "--max-length and --query-max-length: not with"),
    ]


def test_what_does_not_compare_is_refused_in_one_line(save, capsys, tmp_path):
    (tmp_path / "half.json").write_text('{"model": ')
    cases = wrong_files(save)
    for names, message in [*cases, ([cases[0][0][0], str(tmp_path / "half.json")], "half.json: not readable as JSON")]:
        assert evaluation.main(["--compare", *names]) == 2
        out, err = capsys.readouterr()
        error = err.splitlines()[-1]
        assert error.startswith("eval.py: ") and message in error and out == "" and "Traceback" not in err
    with pytest.raises(SystemExit):
        evaluation.main(["--compare", "a", "b", "--model", "m"])
    with pytest.raises(SystemExit):
        evaluation.main(["--eval-tasks", "eval-data"])


# --- models -----------------------------------------------------------------------------------------------------------


class Scorer:
    """Scores a document by the words that it shares with the query."""

    def __init__(self, name: str, **_):
        self.name = name

    def score_groups(self, groups):
        return [np.array([len(set(q.split()) & set(d.split())) for d in docs], float) for q, docs in groups]


@pytest.fixture
def models(monkeypatch):
    """Models named after their kind: embed-SEED is an encoder, rerank a reranker. Yields the names that are loaded."""
    loaded = []
    monkeypatch.setattr(comparison, "detect_kind", lambda name: "rerank" if "rerank" in name else "embed")

    def load(name, dtype=None):
        loaded.append(name)
        return WordCounts(seed=int(name[-1]), dimensions=64, name=name)

    monkeypatch.setattr(comparison.embedder, "load", load)
    monkeypatch.setattr(comparison.dtypes, "report", lambda *_: None)  # these have no weights
    monkeypatch.setattr(comparison, "Reranker", lambda name, **_: loaded.append(name) or Scorer(name))
    return loaded


def test_models_of_different_kinds_and_files_compare(models, save, words, capsys, tmp_path):
    saved = save("saved.json", evaluate(WordCounts(dimensions=8), [str(words)]))
    command = [
        "--compare",
        "embed-1",
        "rerank",
        saved,
        "--eval-tasks",
        str(words),
        "--output",
        str(tmp_path / "o.json"),
    ]
    assert evaluation.main(command) == 0
    assert models == ["embed-1", "rerank"]
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith("rerank is better than embed-1: ") and out[-1].startswith(
        f"{saved} is worse than embed-1"
    )
    record = json.loads((tmp_path / "o.json").read_text())
    alone = evaluate(WordCounts(seed=1, dimensions=64), [str(words)])
    assert record["models"][0]["per_query"] == alone.per_query
    assert evaluation.main(["--compare", "rerank", "embed-1", "--eval-tasks", str(words), "--depth", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("embed-1 is ")


def test_files_of_other_data_are_refused_before_a_model_is_loaded(models, save, words, tmp_path, capsys):
    saved = save("saved.json", evaluate(WordCounts(), [str(words)]))
    lines = (words / "corpus.jsonl").read_text(), (words / "queries.jsonl").read_text()
    qrels = (words / "qrels" / "test.tsv").read_text()
    same = write_folder(tmp_path / "same" / "words", *lines, qrels)
    edited = write_folder(tmp_path / "edited" / "words", lines[0].replace("w7", "w8"), lines[1], qrels)
    other = write_folder(tmp_path / "other", *lines, qrels)
    assert evaluation.main(["--compare", saved, "embed-0", "--eval-tasks", str(same)]) == 0
    assert models == ["embed-0"]
    capsys.readouterr()
    for folder, message in (
        (edited, "words has other texts or judgements"),
        (other, "evaluated on words, not on other"),
    ):
        assert evaluation.main(["--compare", saved, "embed-0", "--eval-tasks", str(folder)]) == 2
        assert message in capsys.readouterr().err
    assert models == ["embed-0"]


@pytest.mark.slow
def test_no_task_can_be_reached(models, no_hub, capsys):
    assert evaluation.main(["--compare", "embed-0", "embed-1", "--eval-tasks", "NanoMSMARCORetrieval"]) == 2
    assert "NanoMSMARCORetrieval: data set" in capsys.readouterr().err


# --- what an evaluation keeps -----------------------------------------------------------------------------------------


def test_the_first_documents_are_those_that_trec_eval_ranks_first(words):
    assert best_documents({"d1": 0.5, "d2": 0.5, "d3": 0.9}) == ["d3", "d2", "d1"]
    assert best_documents({f"d{i:02}": float(i) for i in range(30)}) == [f"d{i:02}" for i in range(29, 19, -1)]
    result = evaluate(WordCounts(), [str(words)])
    qrels = load_tasks([str(words)])[0]["words"].judged().qrels
    for query, documents in result.top_documents["words"].items():
        found = qrels[query].get(documents[0], 0) > 0
        assert result.per_query["words"]["precision_at_1"][query] == found


def test_digests_tell_data_apart(words, tmp_path):
    task = load_tasks([str(words)])[0]["words"]
    assert evaluate(WordCounts(), [str(words)]).digests == {"words": task.digest} and len(task.digest) == 32
    corpus, queries = [{"_id": "d1", "text": "a"}, {"_id": "d2", "text": "b"}], [{"_id": "q1", "text": "a"}]
    digests = set()
    for i, (text, asked, qrels) in enumerate(
        [("b", "a", "q1\td1\t1\n"), ("c", "a", "q1\td1\t1\n"), ("b", "b", "q1\td1\t1\n"), ("b", "a", "q1\td2\t1\n")]
    ):
        documents = [corpus[0], corpus[1] | {"text": text}]
        folder = write_folder(tmp_path / str(i), documents, [queries[0] | {"text": asked}], qrels)
        digests.add(load_tasks([str(folder)])[0][str(i)].digest)
    assert len(digests) == 4


@pytest.mark.slow
def test_mteb_tasks_have_texts_and_a_version(words):
    from mteb_folder import mteb_task

    from mlx_retrieval.evaluation import mteb_tasks

    task = mteb_tasks.MtebTask(mteb_task(words))
    folder = load_tasks([str(words)])[0]["words"]
    assert task.digest == "LocalFolder@local"
    judged, expected = task.judged(), folder.judged()
    assert dict(judged.queries) == expected.queries and judged.qrels == expected.qrels
    number, other = judged.corpus.ids.index("d7"), expected.corpus.ids.index("d7")
    assert judged.corpus.texts([number]) == expected.corpus.texts([other])
    assert task.judged(("test", "default")).queries == judged.queries
