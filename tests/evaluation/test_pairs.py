"""Scored pairs as evaluation: figures of scipy and mteb, intervals, files, folders, STS tasks, and what is refused.

python -m pytest tests/evaluation/test_pairs.py
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluation_command
from mlx_retrieval.evaluation import comparison, mteb_tasks, pairs
from mlx_retrieval.evaluation.correlation import correlations, drawn_differences
from mlx_retrieval.evaluation.results import Evaluation, VectorFormat, compare, print_comparison, print_table
from mlx_retrieval.evaluation.retrieval import evaluate, evaluate_formats, load_tasks
from mlx_retrieval.utils.errors import UserError

WORDS = ["cat", "dog", "stone", "rain", "river", "bread", "house", "light", "paper", "green"]


class Letters:
    """A stand-in for a model: counts of letters, of lengths other than 1. `noise` makes another model."""

    def __init__(self, noise: float = 0.0):
        self.name, self.noise, self.rng = f"letters {noise}", noise, np.random.default_rng(0)

    def encode(self, texts, prompt=None, show_progress=False):
        counts = np.array([[text.count(letter) for letter in "abcdeghilnoprstuvw"] for text in texts], np.float32)
        return counts + 0.1 + self.noise * self.rng.normal(size=counts.shape).astype(np.float32)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Sixty pairs; many of them have equal scores."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(60):
        first = rng.choice(WORDS, 5).tolist()
        kept = int(rng.integers(6))
        second = first[:kept] + rng.choice(WORDS, 5 - kept).tolist()
        made.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "score": kept / 5})
    return made


@pytest.fixture
def file(rows, tmp_path):
    path = tmp_path / "sts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mock_sts(rows, subsets=()):
    """A task of mteb's type STS over these rows, made as its documentation has it, with scores from 0 to 5."""
    from datasets import Dataset
    from mteb import TaskMetadata
    from mteb.abstasks import AbsTaskSTS

    metadata = TaskMetadata(
        name="MockSTS",
        description="Pairs.",
        dataset={"path": "mock", "revision": "local"},
        type="STS",
        category="t2t",
        eval_langs={name: ["eng-Latn"] for name in subsets} if subsets else ["eng-Latn"],
        eval_splits=["test"],
        main_score="cosine_spearman",
    )
    task = type("MockSTS", (AbsTaskSTS,), {"metadata": metadata})()
    data = {"test": Dataset.from_list([row | {"score": row["score"] * 5} for row in rows])}
    task.dataset, task.data_loaded = {name: data for name in subsets} or data, True
    return task


@pytest.mark.parametrize("subsets", [(), ("eng", "deu")])
def test_an_sts_task_has_the_figures_of_mteb(rows, monkeypatch, subsets):
    import mteb

    class Encoder:
        mteb_model_meta = None

        def encode(self, inputs, **_):
            return Letters().encode([text for batch in inputs for text in batch["text"]])

        def similarity(self, one, other):
            raise NotImplementedError

        def similarity_pairwise(self, one, other):
            one, other = np.asarray(one), np.asarray(other)
            return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)

    task = mock_sts(rows, subsets)
    theirs = task.evaluate(Encoder(), "test", encode_kwargs={"batch_size": 16})
    monkeypatch.setattr(mteb_tasks, "_hub_answers", lambda: True)
    monkeypatch.setattr(mteb, "get_task", lambda name: task)
    monkeypatch.setattr(task, "load_data", lambda: None)
    mteb_tasks._load.cache_clear()
    mine = evaluate(Letters(), ["MockSTS"])
    mteb_tasks._load.cache_clear()
    assert len(mine.tasks) == max(1, len(subsets))
    for label, figures in mine.tasks.items():
        expected = theirs[label.rsplit("/", 1)[1] if subsets else "default"]
        assert figures == pytest.approx({name: expected[name] for name in figures}, abs=1e-5)
    assert mine.main == "cosine_spearman" and mine.asked() == f"{60 * max(1, len(subsets))} pairs"


def test_a_file_and_a_folder_that_was_held_out_are_tasks(file, tmp_path):
    folder = tmp_path / "held-out"
    folder.mkdir()
    (folder / "pairs.jsonl").write_bytes(file.read_bytes())
    found = evaluate(Letters(), [str(file), str(folder)])
    assert found.tasks["sts.jsonl"] == found.tasks["held-out"] and 0.3 < found.average()["cosine_spearman"] < 1


def test_correlations_of_what_is_constant_are_zero():
    assert set(correlations(np.ones(5), np.arange(5.0)).values()) == {0.0}
    assert correlations(np.array([1.0, 8.0, 9.0]), np.array([0.0, 0.5, 1.0]))["cosine_spearman"] == pytest.approx(1.0)


def test_differences_of_resamples_are_those_of_scipy():
    rng = np.random.default_rng(1)
    before, after, scores = rng.normal(size=30), rng.normal(size=30), rng.integers(5, size=30) / 4
    found = drawn_differences(before, after, scores, 7, np.random.default_rng(3))
    for row, drawn in zip(found, np.random.default_rng(3).integers(30, size=(7, 30)), strict=True):
        old, new = (correlations(values[drawn], scores[drawn]) for values in (before, after))
        assert row == pytest.approx([new[name] - old[name] for name in new], abs=1e-9)


def test_two_models_are_compared_with_an_interval(file, capsys):
    first, second = evaluate(Letters(), [str(file)]), evaluate(Letters(50.0), [str(file)])
    rows = compare(first, second)
    assert [row[0] for row in rows] == ["cosine_spearman", "cosine_pearson"]
    for _, before, after, difference, low, high in rows:
        assert low < difference < high < 0 and difference == pytest.approx(after - before)
    assert comparison.compare_with_first(["a", "b"], [first, second])[0].verdict == "worse"
    print_table(first)
    print_comparison(first, second)
    out = capsys.readouterr().out
    assert "Spearman" in out and "60 pairs" in out and "nDCG" not in out


def test_results_in_files_are_read_back(file, tmp_path):
    result = evaluate(Letters(), [str(file)])
    path = tmp_path / "one.json"
    path.write_text(json.dumps(result.to_json()))
    assert comparison.read_evaluation(path) == result
    record = result.to_json()
    del record["per_query"]["sts.jsonl"]["cosine"]["1"]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="not as eval.py --output writes it"):
        comparison.read_evaluation(path)


def test_tasks_of_two_kinds_have_tables_of_their_own_and_no_common_verdict(file, capsys):
    both = evaluate(Letters(), [str(file), "eval-data"])
    print_table(both)
    out = capsys.readouterr().out
    assert out.index("nDCG@10") < out.index("Spearman")
    assert {"ndcg_at_10", "cosine_spearman"} <= both.average().keys()
    with pytest.raises(UserError, match="sts.jsonl by Spearman and eval-data by nDCG@10|eval-data by nDCG@10 and sts"):
        compare(both, both)
    with pytest.raises(UserError, match="sts.jsonl is judged by Spearman and eval-data by nDCG@10"):
        pairs.check_alike(load_tasks([str(file), "eval-data"])[0])


def test_what_cannot_be_evaluated_is_refused(file, tmp_path, capsys):
    with pytest.raises(UserError, match="late interaction has none"):
        evaluate(SimpleNamespace(late=True, name="late"), [str(file)])
    with pytest.raises(UserError, match="without --precision"):
        evaluate_formats(Letters(), [str(file)], [VectorFormat("int8", 16)])
    other = tmp_path / "other.jsonl"
    other.write_text('{"query": "q", "document": "d"}\n')
    with pytest.raises(UserError, match="not scored pairs: an evaluation file has rows of two texts and a score"):
        pairs.check_tasks([str(other)])
    other.write_text('{"text1": "q", "text2": "d", "score": 1}\n' * 3)
    with pytest.raises(UserError, match="all pairs have the same score"):
        pairs.check_tasks([str(other)])
    assert evaluation_command.main(["--model", "none", "--eval-tasks", str(tmp_path / "missing.jsonl")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_no_tasks_have_the_metrics_of_retrieval():
    empty = Evaluation("none", {}, {}, {})
    assert empty.average() == {} and empty.main == "ndcg_at_10" and empty.count() == 0
